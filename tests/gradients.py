"""The oracle of every gradient test: the loss with its router losses written by hand, and trainers to compare with it.

``L = sum_m w_m (CE_m + aux_m)`` over the micro-batches m. Only the forward of the layers is molora's own: cross
entropy, routing statistics, losses and weights are computed here and in `router_formulas` with plain torch from
captured router inputs, and molora's hooks on the gates and on the loss are switched off.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import transformers
from peft import PeftModel, get_peft_model
from router_formulas import Earlier, RouterInput, decide, loads
from router_formulas import loss as written_loss
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from molora import MoloraConfig
from molora.layers import MoloraLayer
from molora.routers import Tokens

VOCAB = 97
NUM_EXPERTS = 4
TOP_K = 2
AUX = 0.1
Z = 0.01
CHECKPOINTING = {"none": None, "non-reentrant": False, "reentrant": True}
Batch = dict[str, Tensor]
Gradients = dict[str, Tensor]


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Three layers of width 32 with larger weights than the default, so that tokens differ in their routing."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        initializer_range=0.1,
        pad_token_id=0,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def mixture_config(placement: str = "linear", pool: bool = True, **options: Any) -> MoloraConfig:
    """A mixture with a balance loss and a z-loss; `router` options are merged into the router's own."""
    router = {
        "name": "top_k",
        "top_k": TOP_K,
        "router_aux_loss_coef": AUX,
        "router_z_loss_coef": Z,
        "pool_layers": pool,
        "init_std": 0.2,
        **options.pop("router", {}),
    }
    return MoloraConfig(
        **{"num_experts": NUM_EXPERTS, "r": 4, "lora_alpha": 4, "placement": placement, "router": router, **options}
    )


def mixture(
    placement: str = "linear", zero_B: bool = False, pool: bool = True, base: nn.Module | None = None, **options: Any
) -> PeftModel:
    """A fresh model in training mode, of `tiny_llama()` if no base is given; equal arguments give equal weights."""
    base = tiny_llama() if base is None else base
    torch.manual_seed(1)
    model = get_peft_model(base, mixture_config(placement, pool, init_lora_weights=zero_B, **options))
    return model.train()


def use_checkpointing(model: nn.Module, kind: str) -> None:
    """Switches activation checkpointing on, by the words of CHECKPOINTING."""
    if CHECKPOINTING[kind]:
        model.enable_input_require_grads()  # or nothing in a frozen base asks for a gradient
    if CHECKPOINTING[kind] is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": CHECKPOINTING[kind]})


def micro_batches(count: int, padding: str = "left", seed: int = 5) -> list[Batch]:
    """Micro-batches of two rows with unequal lengths and unequal numbers of label tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    batches = []
    for _ in range(count):
        length = draw(7, 13)
        ids = torch.randint(3, VOCAB, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        pad = draw(2, 5)
        mask[1, :pad] = 0
        if padding == "right":
            mask = mask.flip(1)
        labels = ids.masked_fill(mask == 0, -100)
        labels[0, : draw(1, length - 2)] = -100  # a prompt that is not learned
        batches.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return batches


def label_tokens(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def token_weights(batches: Sequence[Batch]) -> list[float]:
    """The weights of Trainer and SFTTrainer: every label token of the step counts the same."""
    counts = [label_tokens(batch) for batch in batches]
    return [n / sum(counts) for n in counts]


# -- the hand-written loss -------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over label tokens, written out."""
    targets = labels[:, 1:]
    log_probs = logits[:, :-1].float() - logits[:, :-1].float().logsumexp(-1, keepdim=True)
    picked = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    keep = targets != -100
    return -(picked * keep).sum() / keep.sum()


@contextlib.contextmanager
def router_inputs(model: nn.Module, hooks: bool = False) -> Iterator[list[RouterInput]]:
    """Collects (router, its input, its decoder layer) of the forwards inside, with molora's own loss switched off
    unless `hooks`."""
    seen: list[RouterInput] = []

    def watch(router: Any, layer: int | None) -> Any:
        return router.register_forward_pre_hook(lambda module, args: seen.append((module, args[0], layer)))

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, MoloraLayer):
            number = re.search(r"\blayers\.(\d+)\.", name)
            handles += [watch(r, int(number[1]) if number else None) for r in module.molora_router.values()]
    with contextlib.ExitStack() as off:
        if not hooks:
            off.enter_context(mock.patch("molora.layers.attach", lambda runtime, site, gates, stats: gates))
            off.enter_context(mock.patch("molora.aux_loss.observe_output", lambda runtime, output, *args: output))
        yield seen
    for handle in handles:
        handle.remove()


def router_loss(
    inputs: Sequence[RouterInput],
    mask: Tensor | None,
    pool: bool | None = None,
    rows: int = 1,
    task_labels: Tensor | None = None,
    earlier: Earlier | None = None,
) -> Tensor:
    """The router losses of one micro-batch, padding excluded; `pool` in the place of the config's balance_pool."""
    config: Any = inputs[0][0].config
    if pool is not None:
        config = replace(config, balance_pool="model" if pool else "router")
    return written_loss(config, inputs, mask, rows if mask is None else mask.shape[0], task_labels, earlier)


def hand_written(
    model: nn.Module,
    batches: Sequence[Batch],
    weights: Sequence[float],
    pool: bool | None = None,
    aux_weights: Sequence[float] | None = None,
    lm_loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> Gradients:
    """The gradients of the loss written by hand; `aux_weights` where the router losses have weights of their own."""
    for p in model.parameters():
        p.grad = None
    earlier: Earlier | None = None
    for batch, weight, aux in zip(batches, weights, aux_weights or weights, strict=True):
        told = {key: batch[key] for key in ("input_ids", "attention_mask", "task_labels") if key in batch}
        with router_inputs(model) as inputs:
            logits = model(**told).logits
        rows, mask = len(batch["input_ids"]), batch.get("attention_mask")
        written = router_loss(inputs, mask, pool, rows, batch.get("task_labels"), earlier)
        config: Any = inputs[0][0].config
        if getattr(config, "balance_over", "micro") == "window":
            earlier = loads(config, inputs, mask, rows, earlier)
        (weight * lm_loss(logits, batch["labels"]) + aux * written).backward()
    return take_gradients(model)


def assert_gates(router: Any, x: Tensor, tokens: Tokens) -> None:
    """The router's gates, and their gradients, are those of the formula; of tokens that count."""
    exact = x.dtype == torch.float64
    x = x.detach().requires_grad_()
    routing = router(x, tokens)
    want = decide(router, x, tokens.rows, tokens.mask, router.training)
    counted = slice(None) if tokens.mask is None else tokens.mask
    assert routing.gates.dtype == x.dtype and routing.gates.shape == want.gates.shape
    assert (routing.gates - want.gates)[counted].abs().max() < (1e-13 if exact else 3e-6)
    assert torch.equal(routing.gates[counted] > 0, want.gates[counted] > 0)
    if routing.sums_to_one:
        assert (routing.gates.sum(1) - 1).abs().max() < 1e-6
    if routing.topk_ids is not None:
        chosen = torch.zeros_like(want.load).scatter(1, routing.topk_ids, 1.0)
        assert torch.equal(chosen[counted], want.load[counted])
    assert (routing.input_weight is None) == (want.input_weight is None)
    if want.input_weight is not None:
        assert (routing.input_weight - want.input_weight)[counted].abs().max() < 3e-6
    if exact and routing.gates.requires_grad:
        upstream = torch.randn_like(want.gates) * (1 if tokens.mask is None else tokens.mask.unsqueeze(1))
        leaves = [x, *router.parameters()]
        grads = [torch.autograd.grad(g, leaves, upstream, allow_unused=True) for g in (routing.gates, want.gates)]
        for got, expected in zip(*grads, strict=True):
            assert torch.allclose(got, torch.zeros_like(got) if expected is None else expected, rtol=1e-10, atol=1e-13)


def take_gradients(model: nn.Module) -> Gradients:
    """The gradients of all trainable parameters, by name; clears them."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    for p in model.parameters():
        p.grad = None
    return found


def preconditioned_by_hand(model: nn.Module, plain: Gradients, delta: float = 1e-6) -> Gradients:
    """Plain gradients preconditioned one expert at a time, in fp64, in the authors' orientation of B."""
    found = dict(plain)
    parameters = dict(model.named_parameters())
    for name in plain:
        if ".molora_A" not in name:
            continue
        partner = name.replace(".molora_A", ".molora_B")
        A, B = parameters[name].detach().double(), parameters[partner].detach().double().mT  # (E, O, R)
        R, shared = A.shape[1], len(A) < len(B)
        eye = delta * torch.eye(R, dtype=torch.float64)
        metrics = [B[e].T @ B[e] for e in range(len(B))]
        if shared:
            metrics = [torch.stack(metrics).sum(0)]
        dA, dB = plain[name].double(), plain[partner].double().mT
        new_A = [torch.linalg.inv(metrics[i] + eye) @ dA[i] for i in range(len(A))]
        new_B = [dB[e] @ torch.linalg.inv(A[0 if shared else e] @ A[0 if shared else e].T + eye) for e in range(len(B))]
        found[name] = torch.stack(new_A).to(plain[name].dtype)
        found[partner] = torch.stack(new_B).mT.to(plain[partner].dtype)
    return found


def relative_error(got: Gradients, want: Gradients, only: str = "") -> float:
    """The largest ``|got - want| / |want|`` over the parameters whose name contains `only`; names must agree, and what
    should be zero must be zero."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    names = [n for n in want if only in n]
    assert names
    for name in names:
        if not bool(want[name].any()):
            assert not bool(got[name].any()), f"{name} should have no gradient"
    return max(float((got[n] - want[n]).norm() / want[n].norm()) for n in names if bool(want[n].any()))


# -- trainers --------------------------------------------------------------------------------------------------------


class CaptureGradients(transformers.TrainerCallback):
    """Keeps the gradients of every step as they are right before it."""

    def __init__(self) -> None:
        self.steps: list[Gradients] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        self.steps.append({n.removeprefix("module."): grad.clone() for n, grad in found.items()})  # DDP's prefix


def training_options(accumulation: int, checkpointing: str, steps: int, output_dir: str) -> dict[str, Any]:
    """Arguments that leave the gradient alone: SGD without clipping at learning rate 0, fp32."""
    kind = CHECKPOINTING[checkpointing]
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "bf16": False,
        "gradient_checkpointing": kind is not None,
        "gradient_checkpointing_kwargs": None if kind is None else {"use_reentrant": kind},
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }


def make_trainer(
    trainer: str,
    make_model: Callable[[], nn.Module],
    batches: Sequence[Batch],
    options: dict[str, Any],
    make: Any = transformers.Trainer,
    **more: Any,
) -> transformers.Trainer:
    """A Trainer ("trainer") or SFTTrainer ("sft") for which each row of the data set is one of the micro-batches.

    `make` is the class of the first. The model is made after the arguments: under ZeRO-3 they decide how it is loaded.
    """

    def collate(rows: list[dict[str, int]]) -> Batch:
        (row,) = rows
        return dict(batches[row["index"]])

    rows = [{"index": i} for i in range(len(batches))]
    if trainer == "trainer":
        arguments = transformers.TrainingArguments(**options)
        return make(make_model(), arguments, data_collator=collate, train_dataset=rows, **more)
    import datasets
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(
        make_model(),
        arguments,
        data_collator=collate,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=_tokenizer(),
        **more,
    )


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """SFTTrainer asks for one, though the rows are tokenised already."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<pad>", "<unk>", "<eos>", *(f"t{i}" for i in range(3, VOCAB))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )


def trainer_gradients(
    trainer: str,
    model: nn.Module,
    batches: Sequence[Batch],
    checkpointing: str = "none",
    steps: int = 2,
    prepare: Callable[[transformers.Trainer], None] = lambda trainer: None,
    **options: Any,
) -> list[Gradients]:
    """Trains `steps` steps over all `batches` each, and returns the gradients of every step."""
    capture = CaptureGradients()
    if CHECKPOINTING[checkpointing]:
        model.enable_input_require_grads()
    with tempfile.TemporaryDirectory() as output_dir:
        arguments = training_options(len(batches), checkpointing, steps, output_dir) | options
        run = make_trainer(trainer, lambda: model, batches, arguments, callbacks=[capture])
        prepare(run)
        run.train()
    assert len(capture.steps) == steps
    return capture.steps
