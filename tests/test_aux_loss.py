"""The router losses reach every parameter with the weight of the trainer: against the loss written by hand."""

from __future__ import annotations

import gc
import warnings
import weakref
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
    router_inputs,
    router_loss,
    take_gradients,
    tiny_llama,
    token_weights,
    trainer_gradients,
    use_checkpointing,
)
from torch import Tensor, nn
from torch.nn import functional

from molora.context import router_losses, routing_statistics, runtime_of, token_mask
from molora.layers import MoloraLayer

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


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant"])
def test_compiled_full_graph(backend: str, checkpointing: str) -> None:
    if (backend, checkpointing) == ("inductor", "non-reentrant"):
        pytest.skip("compiled once is enough")
    batches = micro_batches(1) * 2
    weights = [0.3, 0.7]
    want = hand_written(mixture(), batches, weights)
    torch._dynamo.reset()
    model = mixture()
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
    model = mixture()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first = micro_batches(1)[0]
    for seed in range(3):
        ids = (first["input_ids"] + seed).clamp(max=VOCAB - 1)
        batch = {**first, "input_ids": ids, "labels": ids.masked_fill(first["attention_mask"] == 0, -100)}
        want = hand_written(mixture(), [batch], [0.5])
        with model.aux_weight(0.5):
            logits = compiled(input_ids=ids, attention_mask=batch["attention_mask"]).logits
        (0.5 * cross_entropy(logits, batch["labels"])).backward()
        assert relative_error(take_gradients(model), want) <= EXACT


# -- several forwards, recomputation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("source", ["loss", "logits"])
def test_two_forwards_before_one_backward(checkpointing: str, source: str) -> None:
    """Each with its own mask, statistics and weight."""
    first, second = micro_batches(2)
    want = hand_written(mixture(pool=False), [first, second], [0.3, 0.7], pool=False)
    model = mixture(pool=False)
    use_checkpointing(model, checkpointing)
    losses = []
    for batch, weight in ((first, 0.3), (second, 0.7)):
        if source == "loss":
            losses.append(weight * model(**batch).loss)
            continue
        with model.aux_weight(weight):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses.append(weight * cross_entropy(logits, batch["labels"]))
    (losses[0] + losses[1]).backward()
    assert relative_error(take_gradients(model), want) <= EXACT


@pytest.mark.parametrize("checkpointing", ["non-reentrant", "reentrant"])
@pytest.mark.parametrize("placement", ["linear", "block", "ffn"])
def test_recomputation_changes_no_gate_and_no_statistic(checkpointing: str, placement: str) -> None:
    """Jitter noise and dropout included: bitwise equal gates, each statistic recorded once, gradients as without."""
    options: dict[str, Any] = {"router": {"router_jitter_noise": 0.3}, "lora_dropout": 0.2}
    (batch,) = micro_batches(1)

    def run(kind: str) -> tuple[dict[str, list[Tensor]], dict[str, Tensor], nn.Module]:
        model = mixture(placement, **options)
        use_checkpointing(model, kind)
        gates: dict[str, list[Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, MoloraLayer):
                for router in module.molora_router.values():
                    router.register_forward_hook(
                        lambda module, args, routing, name=name: gates.setdefault(name, []).append(
                            routing.gates.detach()
                        )
                    )
        torch.manual_seed(7)
        step(model, batch)
        return gates, take_gradients(model), model

    gates, grads, model = run(checkpointing)
    _, plain, _ = run("none")
    for first, again in gates.values():
        assert torch.equal(first, again)
    assert relative_error(grads, plain) <= EXACT
    (record,) = runtime_of(model).records.values()
    assert sorted(record.stats) == list(range(len(runtime_of(model).sites)))
    assert routing_statistics(model).keys() == {site.name for site in runtime_of(model).sites}


def test_statistics_are_the_same_after_the_backward() -> None:
    (batch,) = micro_batches(1)
    model = mixture()
    use_checkpointing(model, "reentrant")
    loss = model(**batch).loss
    before = {n: {k: v.clone() for k, v in s.items()} for n, s in routing_statistics(model).items()}
    loss.backward()
    after = routing_statistics(model)
    assert before.keys() == after.keys() and before
    for name, parts in before.items():
        for key, value in parts.items():
            assert torch.equal(value, after[name][key])
        assert float(parts["load"].sum()) == pytest.approx(1.0, abs=1e-6)


def test_reported_losses_are_the_hand_written_ones() -> None:
    (batch,) = micro_batches(1)
    model = mixture()
    step(model, batch, 0.125)
    with router_inputs(model) as inputs:
        model(**batch)
    want = router_loss(inputs, batch["attention_mask"], pool=True).item()
    assert router_losses(model)["default"].item() == pytest.approx(want, rel=1e-5)


def test_second_backward_through_a_retained_graph() -> None:
    (batch,) = micro_batches(1)
    want = hand_written(mixture(), [batch], [3.0])
    model = mixture()
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    (2 * loss).backward()
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


# -- ways of calling -------------------------------------------------------------------------------------------------


def test_tuple_output_and_loss_scaled_in_place() -> None:
    (batch,) = micro_batches(1)
    want = hand_written(mixture(), [batch], [3.0])
    model = mixture()
    for return_dict in (True, False):
        loss = model(**batch, return_dict=return_dict)[0]
        loss *= 3.0
        loss.backward()
        assert relative_error(take_gradients(model), want) <= EXACT


def test_positional_labels_with_a_divisor() -> None:
    (batch,) = micro_batches(1)
    want = hand_written(mixture(), [batch], [label_tokens(batch) / 7])
    model = mixture()
    base = model.get_base_model()
    base(
        batch["input_ids"],
        batch["attention_mask"],
        None,
        None,
        None,
        batch["labels"],
        num_items_in_batch=torch.tensor(7),
    ).loss.backward()
    assert relative_error(take_gradients(model), want) <= EXACT


def test_shifted_labels_with_a_divisor() -> None:
    """What collators for packed or split sequences pass."""
    (batch,) = micro_batches(1)
    want = hand_written(mixture(), [batch], [label_tokens(batch) / 7])
    model = mixture()
    shifted = functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    model(**batch, shift_labels=shifted, num_items_in_batch=7).loss.backward()
    assert relative_error(take_gradients(model), want) <= EXACT


def _four_dimensional(mask: Tensor, additive: bool) -> Tensor:
    length = mask.shape[1]
    allowed = torch.ones(length, length).tril().bool()[None, None] & mask.bool()[:, None, None]
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min) if additive else allowed


@pytest.mark.parametrize("additive", [False, True])
def test_four_dimensional_masks(additive: bool) -> None:
    (batch,) = micro_batches(1, "right")  # with left padding some rows attend to nothing
    want = hand_written(mixture(), [batch], [1.0])
    model = mixture()
    step(model, {**batch, "attention_mask": _four_dimensional(batch["attention_mask"], additive)})
    assert relative_error(take_gradients(model), want) <= EXACT


def test_no_mask_counts_every_token() -> None:
    (batch,) = micro_batches(1)
    ids = batch["input_ids"].clamp(min=3)  # the padding token's embedding is zero, and all experts tie
    batch = {"input_ids": ids, "labels": batch["labels"]}
    want = hand_written(mixture(), [batch], [1.0])
    model = mixture()
    step(model, batch)
    assert relative_error(take_gradients(model), want) <= EXACT


def test_dict_masks() -> None:
    """Gemma-3 takes a mask for each kind of attention."""
    from peft import get_peft_model
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    base = Gemma3ForCausalLM(
        Gemma3TextConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=VOCAB,
            layer_types=["sliding_attention", "full_attention"],
            pad_token_id=0,
        )
    )
    model = get_peft_model(base, mixture_config(init_lora_weights=False)).train()
    (batch,) = micro_batches(1, "right")
    step(model, batch)
    want = take_gradients(model)
    mask = _four_dimensional(batch["attention_mask"], additive=True)
    step(model, {**batch, "attention_mask": {"full_attention": mask, "sliding_attention": mask}})
    assert relative_error(take_gradients(model), want) <= EXACT


def test_token_mask() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    flat = mask.bool().flatten()
    assert token_mask(None) is None
    for form in (
        mask,
        mask.float(),
        _four_dimensional(mask, False),
        _four_dimensional(mask, True),
        {"a": None, "b": mask},
        _four_dimensional(mask, True)[:, :, 2:],  # the last queries of a longer sequence
    ):
        got = token_mask(form)
        assert got is not None
        want = flat if got.numel() == flat.numel() else mask[:, 2:].bool().flatten()
        assert torch.equal(got, want)


def test_mask_of_another_length_is_named() -> None:
    (batch,) = micro_batches(1)
    model = mixture()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    runtime = runtime_of(model)
    runtime.token_mask = batch["attention_mask"][:, 1:].bool().flatten()
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj got 6 tokens but the attention mask has"):
        layer(torch.randn(2, 3, 32))
    longer = functional.pad(batch["attention_mask"], (3, 0), value=1)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj got"):
        model(input_ids=batch["input_ids"], attention_mask=longer, labels=batch["labels"])


# -- state -----------------------------------------------------------------------------------------------------------


def test_evaluation_and_no_grad_record_nothing() -> None:
    (batch,) = micro_batches(1)
    model = mixture()
    runtime = runtime_of(model)
    model.eval()
    model(**batch).loss.backward()
    assert not runtime.records and routing_statistics(model) == {}
    evaluated = take_gradients(model)
    assert relative_error(evaluated, hand_written(mixture().eval(), [batch], [1.0], aux_weights=[0.0])) <= EXACT
    model.train()
    with torch.no_grad():
        model(**batch)
    assert not runtime.records and routing_statistics(model) == {} and runtime.opened is None


def test_forward_without_gradient_between_forward_and_backward() -> None:
    first, second = micro_batches(2)
    want = hand_written(mixture(), [first], [1.0])
    model = mixture()
    use_checkpointing(model, "reentrant")
    loss = model(**first).loss
    with torch.no_grad():
        model(**second)
    loss.backward()
    assert relative_error(take_gradients(model), want) <= EXACT


def test_failed_forward_leaves_nothing_behind() -> None:
    first, second = micro_batches(2)
    model = mixture()
    with pytest.raises(RuntimeError, match="dtype"):
        model(input_ids=first["input_ids"], labels=first["labels"] + 0.5)
    step(model, second)
    assert relative_error(take_gradients(model), hand_written(mixture(), [second], [1.0])) <= EXACT


def test_records_do_not_pile_up_and_die_with_the_model() -> None:
    (batch,) = micro_batches(1)
    model = mixture("block", target_modules=["q_proj", "k_proj"], layers_to_transform=[0])
    sizes = []
    for _ in range(300):
        step(model, batch)
        sizes.append(len(runtime_of(model).records))
    assert max(sizes) == max(sizes[:20]) <= 10
    alive = [weakref.ref(runtime_of(model)), weakref.ref(model), weakref.ref(runtime_of(model).last)]
    del model
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3
