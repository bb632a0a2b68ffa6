"""One forward, one record: masks, ways of calling, recomputation, several forwards at once, and nothing left behind."""

from __future__ import annotations

import gc
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
    use_checkpointing,
)
from torch import Tensor, nn
from torch.nn import functional

from molora.context import runtime_of
from molora.layers import MoloraLayer
from molora.record import token_mask
from molora.telemetry import router_losses, routing_statistics

EXACT = 1e-5  # relative, per parameter, fp32
NOT_LM = "not the model's own"  # the warning of a loss whose weight cannot be read

pytestmark = pytest.mark.filterwarnings(f"error:.*{NOT_LM}")


def step(model: nn.Module, batch: Batch, scale: float = 1.0, **kwargs: Any) -> None:
    (model(**batch, **kwargs).loss * scale).backward()


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
    runtime.inputs.token_mask = batch["attention_mask"][:, 1:].bool().flatten()
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
