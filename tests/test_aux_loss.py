"""The router losses reach every parameter with the weight of the trainer: against the loss written by hand."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from gradients import (
    CHECKPOINTING,
    VOCAB,
    Batch,
    cross_entropy,
    hand_written,
    label_tokens,
    micro_batches,
    mixture,
    mixture_config,
    relative_error,
    take_gradients,
    tiny_llama,
    token_weights,
    trainer_gradients,
    use_checkpointing,
)
from torch import Tensor, nn
from torch.nn import functional

EXACT = 1e-5  # relative, per parameter, fp32
NOT_LM = "not the model's own"  # the warning of a loss whose weight cannot be read

pytestmark = pytest.mark.filterwarnings(f"error:.*{NOT_LM}")


def step(model: nn.Module, batch: Batch, scale: float = 1.0, **kwargs: Any) -> None:
    (model(**batch, **kwargs).loss * scale).backward()


# -- the matrix ------------------------------------------------------------------------------------------------------

# Each checkpointing kind x trainer x accumulation; placements, B, pooling and padding take turns.
_TURNS = [
    ("linear", False, True, "left"),
    ("block", False, False, "right"),
    ("ffn", False, True, "right"),
    ("linear", True, False, "right"),
    ("block", True, True, "left"),
    ("ffn", False, False, "left"),
    ("linear", False, False, "left"),
]
MATRIX = [
    (trainer, checkpointing, accumulation, *_TURNS[i % len(_TURNS)])
    for i, (trainer, checkpointing, accumulation) in enumerate(
        (t, c, a) for a in (1, 4) for t in ("loop", "trainer", "sft") for c in CHECKPOINTING
    )
]


@pytest.mark.parametrize("trainer, checkpointing, accumulation, placement, zero_B, pool, padding", MATRIX)
def test_gradients_equal_the_hand_written_loss(
    trainer: str, checkpointing: str, accumulation: int, placement: str, zero_B: bool, pool: bool, padding: str
) -> None:
    if trainer == "sft":
        pytest.importorskip("trl")
    batches = micro_batches(accumulation, padding)
    assert accumulation == 1 or len({label_tokens(b) for b in batches}) > 2
    weights = token_weights(batches)
    want = hand_written(mixture(placement, zero_B, pool), batches, weights, pool)
    model = mixture(placement, zero_B, pool)
    if trainer == "loop":
        use_checkpointing(model, checkpointing)
        steps = []
        for _ in range(2):
            for batch, weight in zip(batches, weights, strict=True):
                step(model, batch, weight)
            steps.append(take_gradients(model))
    else:
        steps = trainer_gradients(trainer, model, batches, checkpointing)
    assert any("router" in name for name in want)
    for got in steps:
        assert relative_error(got, want) <= EXACT


def test_the_oracle_sees_the_router_losses() -> None:
    """Without them, or with F or P of another batch, the matrix would fail by far."""
    batches = micro_batches(1)
    want = hand_written(mixture(), batches, [1.0])
    without = hand_written(mixture(), batches, [1.0], aux_weights=[0.0])
    assert relative_error(without, want, "router") > 0.1
    assert relative_error(without, want, "molora_A") > 1e-3  # the losses of a layer reach the layers below it
    per_layer = hand_written(mixture(), batches, [1.0], pool=False)
    assert relative_error(per_layer, want, "router") > 1e-3


def test_trainer_that_averages_micro_batches() -> None:
    """Without a token count Trainer weighs every micro-batch alike, and so do the router losses."""
    batches = micro_batches(4)

    def no_token_count(trainer: Any) -> None:
        trainer.model_accepts_loss_kwargs = False

    want = hand_written(mixture(), batches, [0.25] * 4)
    (got,) = trainer_gradients("trainer", mixture(), batches, "non-reentrant", steps=1, prepare=no_token_count)
    assert relative_error(got, want) <= EXACT


def test_native_adapter() -> None:
    """transformers' own add_adapter and load_adapter: no PeftModel, the hooks sit on the base."""
    batches = micro_batches(2)

    def native() -> nn.Module:
        model = tiny_llama()
        torch.manual_seed(1)
        model.add_adapter(mixture_config(init_lora_weights=False))
        return model.train()

    want = hand_written(native(), batches, [0.5, 0.5])
    for checkpointing in CHECKPOINTING:
        model = native()
        use_checkpointing(model, checkpointing)
        for batch in batches:
            step(model, batch, 0.5)
        assert relative_error(take_gradients(model), want) <= EXACT


def test_native_load_adapter(tmp_path: Any) -> None:
    batches = micro_batches(1)
    trained = mixture()
    trained.save_pretrained(tmp_path)
    want = hand_written(trained, batches, [1.0])
    model = tiny_llama()
    model.load_adapter(str(tmp_path), is_trainable=True)
    step(model.train(), batches[0])
    got = {f"base_model.model.{name}": grad for name, grad in take_gradients(model).items()}
    assert relative_error(got, want) <= EXACT


def test_loss_scale() -> None:
    """fp16's scale of 65536 is inside the weight, exactly."""
    (batch,) = micro_batches(1)
    plain, scaled = mixture(), mixture()
    step(plain, batch)
    step(scaled, batch, 65536.0)
    got = {name: grad / 65536 for name, grad in take_gradients(scaled).items()}
    assert relative_error(got, take_gradients(plain)) <= 1e-7


# Relative, over all routers. Measured: 9.4e-3 with the base in bf16 and 6.6e-3 under autocast, where the language-model
# loss reaches the routers through bf16 activations; with B = 0 they learn from the router losses alone, in fp32.
BF16 = {False: 2e-2, True: 1e-6}


@pytest.mark.parametrize("zero_B", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16(autocast: bool, zero_B: bool) -> None:
    """Same forward, hence same routing, with the router losses written by hand in fp64: only rounding differs."""
    batches = micro_batches(2)
    weights = [0.5, 0.5]

    def model() -> nn.Module:
        return mixture(zero_B=zero_B).to(torch.float32 if autocast else torch.bfloat16)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = hand_written(model(), batches, weights)
        without = hand_written(model(), batches, weights, aux_weights=[0.0, 0.0])
        trained = model()
        use_checkpointing(trained, "non-reentrant")
        for batch, weight in zip(batches, weights, strict=True):
            step(trained, batch, weight)

    def all_routers(grads: dict[str, Tensor]) -> Tensor:
        return torch.cat([grads[name].flatten().float() for name in sorted(want) if "router" in name])

    reference = all_routers(want)
    error = float((all_routers(take_gradients(trained)) - reference).norm() / reference.norm())
    left_out = float((all_routers(without) - reference).norm() / reference.norm())
    print(f"bf16 {autocast=} {zero_B=}: {error:.1e}; without the router losses {left_out:.1e}")
    assert error <= BF16[zero_B] < left_out


# -- torch.compile ---------------------------------------------------------------------------------------------------

# Some linears of each layer: a compiler takes its time for every one.
FEW = {"target_modules": ["q_proj", "k_proj", "down_proj"]}


@pytest.mark.parametrize(
    "backend, checkpointing", [("aot_eager", "none"), ("aot_eager", "non-reentrant"), ("inductor", "none")]
)
def test_compiled_full_graph(backend: str, checkpointing: str) -> None:
    batches = micro_batches(1) * 2
    weights = [0.3, 0.7]
    want = hand_written(mixture(**FEW), batches, weights)
    torch._dynamo.reset()
    model = mixture(**FEW)
    use_checkpointing(model, checkpointing)
    if checkpointing != "none":
        model.disable_input_require_grads()  # transformers' requires_grad_() in the forward breaks a full graph
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(2):
        for batch, weight in zip(batches, weights, strict=True):
            step(compiled, batch, weight)
        assert relative_error(take_gradients(model), want) <= EXACT


def test_compiled_loss_from_logits() -> None:
    """Three steps of different tokens: each backward uses its own forward's statistics."""
    torch._dynamo.reset()
    model = mixture(**FEW)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first = micro_batches(1)[0]
    for seed in range(3):
        ids = (first["input_ids"] + seed).clamp(max=VOCAB - 1)
        batch = {**first, "input_ids": ids, "labels": ids.masked_fill(first["attention_mask"] == 0, -100)}
        want = hand_written(mixture(**FEW), [batch], [0.5])
        with model.aux_weight(0.5):
            logits = compiled(input_ids=ids, attention_mask=batch["attention_mask"]).logits
        (0.5 * cross_entropy(logits, batch["labels"])).backward()
        assert relative_error(take_gradients(model), want) <= EXACT


# -- losses that are not the model's own -----------------------------------------------------------------------------


def _loss_from(model: nn.Module, batch: Batch, source: str) -> Tensor:
    """The mean LM loss, made outside the model from something it returns."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if source == "logits":
        logits = model(**inputs).logits
    elif source == "tuple":
        logits = model(**inputs, return_dict=False)[0]
    elif source == "logits beside a loss":
        logits = model(**batch).logits
    else:
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        logits = functional.linear(hidden, model.get_output_embeddings().weight)
    return cross_entropy(logits, batch["labels"])


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("source", ["logits", "tuple", "logits beside a loss", "hidden states"])
def test_loss_made_outside_gets_weight_one_and_one_warning(source: str, checkpointing: str) -> None:
    """After a step of another shape, so that a recomputation which took that step for its own would show."""
    other, batch = micro_batches(2)
    want = hand_written(mixture(), [batch], [0.5], aux_weights=[1.0])
    model = mixture()
    use_checkpointing(model, checkpointing)
    step(model, other)
    take_gradients(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            (0.5 * _loss_from(model, batch, source)).backward()
            assert relative_error(take_gradients(model), want) <= EXACT
    assert sum(NOT_LM in str(w.message) for w in caught) == 1


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_aux_weight(checkpointing: str) -> None:
    """The explicit weight holds, also where the model's own loss is used, and warns of nothing."""
    (batch,) = micro_batches(1)
    want = hand_written(mixture(), [batch], [1.0], aux_weights=[0.25])
    model = mixture()
    use_checkpointing(model, checkpointing)
    for source in ("logits", "loss"):
        with model.aux_weight(0.25):
            loss = model(**batch).loss if source == "loss" else _loss_from(model, batch, source)
        loss.backward()
        assert relative_error(take_gradients(model), want) <= EXACT


def _smoothed(epsilon: float) -> Any:
    """Label smoothing as transformers' LabelSmoother has it."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        log_probs = logits[:, :-1].log_softmax(-1)
        keep = labels[:, 1:] != -100
        smooth = -(log_probs.mean(-1) * keep).sum() / keep.sum()
        return (1 - epsilon) * cross_entropy(logits, labels) + epsilon * smooth

    return loss


@pytest.mark.parametrize("trainer", ["trainer", "sft"])
@pytest.mark.parametrize("checkpointing", ["none", "reentrant"])
def test_label_smoothing(trainer: str, checkpointing: str) -> None:
    """Made from logits; SFTTrainer runs a second forward, without gradient, before the backward."""
    if trainer == "sft":
        pytest.importorskip("trl")
    batches = micro_batches(1)
    want = hand_written(mixture(), batches, [1.0], lm_loss=_smoothed(0.1))
    with pytest.warns(UserWarning, match=NOT_LM):
        steps = trainer_gradients(trainer, mixture(), batches, checkpointing, label_smoothing_factor=0.1)
    for got in steps:
        assert relative_error(got, want) <= EXACT


@pytest.mark.parametrize("kind", ["mean", "preference"])
def test_log_probs_of_trl(kind: str) -> None:
    """The mean of the log-probabilities has a weight; a preference loss, which pushes tokens apart, has none."""
    utils = pytest.importorskip("trl.trainer.utils")
    (batch,) = micro_batches(1)
    weights = torch.tensor([[-0.5], [-0.5 if kind == "mean" else 0.4]])

    def lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
        targets = labels[:, 1:]
        picked = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (picked * (targets != -100) * weights).sum()

    aux = 0.5 * label_tokens(batch) if kind == "mean" else 1.0
    want = hand_written(mixture(), [batch], [1.0], aux_weights=[aux], lm_loss=lm_loss)
    model = mixture()
    utils.add_fused_lm_head(model.get_base_model())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (model(**batch, fused_lm_head=True).log_probs * weights).sum().backward()
    assert relative_error(take_gradients(model), want) <= EXACT
    assert any(NOT_LM in str(w.message) for w in caught) == (kind == "preference")


def test_weights_of_two_outputs_add_up() -> None:
    """TRL's forward returns loss and log_probs; a compiled graph or DDP may hand the unused one zeros."""
    utils = pytest.importorskip("trl.trainer.utils")
    (batch,) = micro_batches(1)
    for share in (0.0, 0.25):
        want = hand_written(mixture(), [batch], [1.0])
        model = mixture()
        utils.add_fused_lm_head(model.get_base_model())
        output = model(**batch, fused_lm_head=True)
        mean = -output.log_probs.sum() / label_tokens(batch)
        (share * output.loss + (1 - share) * mean).backward()
        assert relative_error(take_gradients(model), want) <= EXACT
