"""Every preset by one set of properties: gates, fresh mixtures, checkpoints, generation, statistics, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import (
    CHECKPOINTING,
    VOCAB,
    Batch,
    assert_gates,
    micro_batches,
    router_inputs,
    tiny_llama,
    use_checkpointing,
)
from peft import PeftModel
from router_formulas import decide, margin
from tiny_models import PRESETS_THAT_TRAIN, preset_config, preset_model
from torch import Tensor, nn

from molora import record_routing, routing_report, routing_statistics
from molora.context import runtime_of
from molora.ffn import MixedFFN
from molora.linear import MixedLinear
from molora.presets import PRESETS
from molora.routers import Tokens

TAU = 1e-5  # a token nearer to another selection than this is exempt, with what follows it in its row (test_generation)
# Their gates do not sum to one, and an FFN mixture scales the frozen FFN by that sum, as published.
SCALES_THE_FFN = {"mixlora-dynamic", "mixlora-switch"}
# What a checkpoint of the routers holds, where it is more than their weight, or other.
STATE = {
    "smora": {"weight", "bias_steps"},
    "lora-tle": {"centroid_bits"},
    "arrow": {"prototype_bits", "present"},
    "xlora-single-pass": {"weight", "bias"},
    "adamole": {"weight", "threshold_weight", "threshold_bias"},
    "mole": {"weight", "log_temperature"},
    "llava-mole": {"weight", "bias"},
}

every_preset = pytest.mark.parametrize("name", PRESETS_THAT_TRAIN)


def labelled(name: str, batch: Batch) -> Batch:
    """The batch with a task for each row, where the preset's losses need one."""
    tasks = preset_config(name).router.task_labels(4)
    return {**batch, "task_labels": torch.arange(len(batch["input_ids"])) % tasks} if tasks else batch


def one_batch(name: str, padding: str = "left", seed: int = 5) -> Batch:
    """A micro-batch whose padding holds tokens like any other."""
    (batch,) = micro_batches(1, padding, seed)
    batch["input_ids"] = batch["input_ids"] + (batch["attention_mask"] == 0) * 7
    return labelled(name, batch)


def logits(model: nn.Module, name: str) -> Tensor:
    """Logits of the real tokens of a fixed batch, (N, V), in evaluation."""
    batch = one_batch(name)
    with torch.no_grad():
        out = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return out[batch["attention_mask"].bool()]


def state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a model, copied."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def routers(model: nn.Module) -> list[Any]:
    return [site.router for site in runtime_of(model).sites]


# -- gates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@every_preset
def test_gates_equal_the_formula(name: str, dtype: torch.dtype) -> None:
    """On what the routers of a model see, with and without padding, in training (with capacity) and in evaluation."""
    model = preset_model(name, tiny_llama()).to(dtype)
    batch = one_batch(name)
    limited = 0
    for training in (True, False):
        for masked in (True, False):
            told = {k: v for k, v in batch.items() if k == "input_ids" or (masked and k == "attention_mask")}
            with torch.no_grad(), router_inputs(model.eval(), hooks=True) as inputs:
                model(**told)
            tokens = Tokens(2, batch["attention_mask"].flatten().bool() if masked else None)
            assert len(inputs) == len(routers(model))
            for router, x, _ in inputs:
                assert_gates(router.train(training), x, tokens)
                limited += int((router(x, tokens).gates.sum(1) == 0).sum())
    assert (limited > 0) == (name == "mixlora-switch")  # its capacity leaves some tokens without an expert


@every_preset
def test_a_token_is_routed_the_same_in_any_batch(name: str) -> None:
    """Bit for bit, in evaluation, also where the gates do not fill a processor's vectors."""
    model = preset_model(name, tiny_llama(), **({"r": 7} if name == "smora" else {})).eval()
    for router in routers(model)[:7]:
        x = torch.randn(64, router.vectors.shape[1] if hasattr(router, "vectors") else router.weight.shape[1])
        whole = router(x).gates
        for part in [*(slice(t, t + 1) for t in range(64)), slice(30, 33), slice(5, 64)]:
            assert torch.equal(router(x[part]).gates, whole[part])
        order = torch.randperm(64)
        assert torch.equal(router(x[order]).gates, whole[order])


@every_preset
def test_a_linear_adds_its_experts(name: str) -> None:
    """``y = W x + alpha / r * sum_i g_i B_i A_i x``, where r is that of an expert, or the number of active ranks."""
    model = preset_model(name, tiny_llama()).eval()
    seen: list[tuple[Any, Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, MixedLinear):
            module.register_forward_hook(lambda linear, args, out: seen.append((linear, args[0], out)))
    model(input_ids=torch.randint(3, VOCAB, (2, 6)))
    for linear, x, out in seen:
        x, shared = x.flatten(0, 1), linear.molora_shared.get("default")
        owner = linear if shared is None else shared.owner
        g = torch.ones(12, 1)  # plain LoRA
        if "default" in owner.molora_router:
            g = decide(owner.molora_router.default, x, 2, None, False).gates
        A, B = (getattr(linear, f"molora_{part}").default().double() for part in "AB")
        A, B = (A.view(8, 1, -1), B.view(8, 1, -1)) if name == "smora" else (A.expand(len(B), -1, -1), B)
        delta = sum(g[:, i : i + 1] * (x.double() @ A[i].T @ B[i]) for i in range(len(B)))
        want = linear.base_layer(x).double() + 8 / (3 if name == "smora" else 4) * delta
        torch.testing.assert_close(out.flatten(0, 1).double(), want, rtol=1e-4, atol=1e-5)


# -- a fresh mixture, and a saved one ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@every_preset
def test_a_fresh_mixture_is_the_base(name: str, training: bool) -> None:
    """Bit for bit; where an FFN is scaled by its gates, each FFN gives its base's output times their sum."""
    batch = one_batch(name)
    with torch.no_grad():
        want = tiny_llama().train(training)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        model = preset_model(name, tiny_llama(), init_lora_weights=True).train(training)
        seen: list[tuple[Tensor, Tensor, Tensor, Any]] = []
        for module in model.modules():
            if isinstance(module, MixedFFN):
                module.register_forward_hook(
                    lambda ffn, args, out: seen.append((args[0], out, ffn.base_layer(*args), ffn))
                )
        got = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    assert torch.equal(got, want) == (name not in SCALES_THE_FFN)
    assert (len(seen) > 0) == (PRESETS[name].placement == "ffn")
    counted = batch["attention_mask"].flatten().bool()
    for x, out, base, ffn in seen:
        x = x.flatten(0, 1)
        made = decide(ffn.molora_router.default, x, 2, counted, training)
        expected = made.gates.sum(1, keepdim=True) * base.flatten(0, 1).double()
        if made.input_weight is not None:
            expected = expected + made.input_weight * x.double()
        torch.testing.assert_close(out.flatten(0, 1)[counted].double(), expected[counted], rtol=1e-4, atol=1e-6)


@every_preset
def test_save_and_load(tmp_path: Path, name: str) -> None:
    """The same bits after training, among them all that the routers keep."""
    model = preset_model(name, tiny_llama())
    trained(model, name)
    want = logits(model, name)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert again.peft_config["default"].to_dict()["router"] == model.peft_config["default"].to_dict()["router"]
    kept = [equal(state(a), state(b)) for a, b in zip(routers(model), routers(again), strict=True)]
    assert kept and all(kept)
    assert set(state(routers(again)[0])) == STATE.get(name, {"weight"})
    assert torch.equal(logits(again, name), want)


@every_preset
def test_a_cast_of_the_model_leaves_integers_alone(name: str) -> None:
    model = preset_model(name, tiny_llama())
    trained(model, name)
    before = [state(router) for router in routers(model)]
    model.to(torch.bfloat16)
    for router, old in zip(routers(model), before, strict=True):
        for key, value in state(router).items():
            if key.endswith(("_steps", "_bits")):
                assert value.dtype == torch.int32 and torch.equal(value, old[key]) and bool(value.any())
            elif key != "present":
                assert value.dtype == torch.bfloat16
    assert logits(model, name).isfinite().all()


def trained(model: nn.Module, name: str, steps: int = 2) -> None:
    """A few steps of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for seed in range(steps):
        model(**one_batch(name, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# -- generation and evaluation -----------------------------------------------------------------------------------------


class Margins:
    """Watches all routers of a model: how far each token is from another selection in any of them."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[Tensor] = []
        for router in routers(model):
            router.register_forward_pre_hook(lambda router, args: self.seen.append(margin(router, args[0])))

    def safe(self, shape: tuple[int, int]) -> Tensor:
        """(B, T) bool: no token up to here in its row was nearly tied since the last call."""
        smallest = torch.stack([m.view(shape) for m in self.seen]).amin(0)
        self.seen.clear()
        return (smallest > TAU).int().cummin(1).values > 0


@every_preset
@torch.no_grad()
def test_cached_equals_uncached(name: str, record_property: pytest.RecordProperty) -> None:
    model = preset_model(name, tiny_llama()).eval()
    margins = Margins(model)
    ids = torch.randint(3, VOCAB, (2, 12))
    whole = model(input_ids=ids).logits
    safe = margins.safe((2, 12))
    cache, steps = None, []
    for chunk in ids.split([5, 1, 1, 2, 3], dim=1):
        out = model(input_ids=chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    record_property("exempt", int((~safe).sum()))
    assert safe.float().mean() > 0.9
    torch.testing.assert_close(torch.cat(steps, 1)[safe], whole[safe], rtol=1e-5, atol=1e-5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    generated = [model.generate(input_ids=ids, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*generated) and generated[0].shape == (2, 20)


@every_preset
@torch.no_grad()
def test_a_left_padded_row_equals_the_row_alone(name: str, record_property: pytest.RecordProperty) -> None:
    model = preset_model(name, tiny_llama()).eval()
    margins = Margins(model)
    rows = [torch.randint(3, VOCAB, (n,)) for n in (12, 9, 4)]
    ids = torch.stack([torch.cat([torch.full((12 - len(row),), 7), row]) for row in rows])
    mask = torch.stack([(torch.arange(12) >= 12 - len(row)).long() for row in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batched = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    margins.seen.clear()
    exempt = 0
    for i, row in enumerate(rows):
        alone = model(input_ids=row[None]).logits
        safe = margins.safe((1, len(row)))
        exempt += int((~safe).sum())
        torch.testing.assert_close(batched[i, -len(row) :][safe[0]], alone[safe], rtol=1e-5, atol=1e-5)
    record_property("exempt", exempt)
    assert exempt <= 2


@every_preset
def test_evaluation_repeats_and_no_forward_changes_state(name: str) -> None:
    model = preset_model(name, tiny_llama(), lora_dropout=0.3)
    before = state(model)
    first = logits(model, name)
    assert torch.equal(first, logits(model, name)) and equal(state(model), before)
    model.train()
    model(**one_batch(name)).loss.backward()
    with torch.no_grad():
        model(**one_batch(name))
    assert equal(state(model), before)


def test_the_exception_a_bias_that_moves_in_each_forward() -> None:
    model = preset_model("smora", tiny_llama(), router={"bias_update": "forward"})
    before = state(model)
    assert torch.equal(logits(model, "smora"), logits(model, "smora")) and equal(state(model), before)
    model.train()(**one_batch("smora"))
    changed = {key for key, value in state(model).items() if not torch.equal(value, before[key])}
    assert changed and all(key.endswith("bias_steps") for key in changed)


# -- what the routers did ----------------------------------------------------------------------------------------------


@every_preset
def test_statistics_and_reports(name: str) -> None:
    model = preset_model(name, tiny_llama())
    names = [site.name for site in runtime_of(model).sites]
    assert len(set(names)) == len(names) and routing_report(model) == {} == routing_statistics(model)
    trained(model, name)
    statistics, report = routing_statistics(model), routing_report(model)
    assert list(statistics) == names == list(report)
    config = preset_config(name).router
    for router, (site, parts) in zip(routers(model), statistics.items(), strict=True):
        assert all(bool(value.isfinite().all()) for value in parts.values())
        assert float(parts["load"].sum()) == pytest.approx(1, abs=1e-6)
        use = report[site]
        assert sum(use.load) == pytest.approx(1, abs=1e-6) and len(use.load) == router.num_gates
        assert use.tokens == sum(int(one_batch(name, seed=seed)["attention_mask"].sum()) for seed in range(2))
        assert 0 <= use.entropy_after <= 1 and 0 <= use.entropy_before <= 1 and 0 < use.top1_share <= 1
        for key in ("task_loss", "localized_balance"):
            assert (key in parts) == bool(getattr(config, f"{key}_coef", 0))
    assert routing_report(model) == {}


@every_preset
def test_recorded_routing(name: str) -> None:
    """A forward and a generation: the gates of the formula, in the shapes of their forwards."""
    model = preset_model(name, tiny_llama()).eval()
    ids = torch.randint(3, VOCAB, (2, 5))
    with torch.no_grad(), record_routing(model) as recorded, router_inputs(model, hooks=True) as inputs:
        model(input_ids=ids)
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, use_cache=True
        )
    assert set(recorded) == {site.name for site in runtime_of(model).sites}
    for site in runtime_of(model).sites:
        router: Any = site.router
        own = recorded[site.name]
        assert own.shapes == [(2, 5), (2, 5), (2, 1), (2, 1)] and own.gates.shape == (24, router.num_gates)
        want = [decide(router, x, 2, None, False).gates for found, x, _ in inputs if found is router]
        assert (own.gates - torch.cat(want)).abs().max() < 3e-6
        if own.topk_ids is not None:
            assert torch.equal(own.gates > 0, torch.zeros_like(own.gates).scatter(1, own.topk_ids, 1.0) > 0)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@every_preset
def test_a_recomputation_is_not_recorded(name: str, checkpointing: str) -> None:
    model = preset_model(name, tiny_llama())
    use_checkpointing(model, checkpointing)
    batch = one_batch(name)
    with record_routing(model) as recorded:
        model(**batch).loss.backward()
    for site in runtime_of(model).sites:
        assert recorded[site.name].shapes == [tuple(batch["input_ids"].shape)]


# -- bad input: one sentence each --------------------------------------------------------------------------------------

BAD = [
    ("adamole", {"router": {"max_threshold": 1.5}}, "max_threshold=1.5 must be above 0 and below 1"),
    ("adamole", {"router": {"max_threshold": 0}}, "max_threshold=0 must be a finite number above 0"),
    (
        "dynmole",
        {"router": {"entropy_threshold": -0.1}},
        "entropy_threshold=-0.1 must be a finite number of at least 0",
    ),
    ("dynmole", {"router": {"keep_top_k": 5}}, "keep_top_k=5 exceeds num_experts=4; lower router.keep_top_k"),
    ("dynmole", {"router": {"top_p": 0}}, "top_p=0 must be a finite number above 0"),
    ("mixlora-dynamic", {"router": {"top_p": 0.0}}, "top_p=0.0 must be a finite number above 0"),
    ("mixlora-dynamic", {"router": {"top_p": 1.2}}, "top_p=1.2 must be above 0 and at most 1"),
    ("smora", {"router": {"active_ranks": 9}}, "active_ranks=9 exceeds r=8; lower router.active_ranks or raise r"),
    ("smora", {"num_experts": 2}, "'rank_wise' routes the ranks of one LoRA, got num_experts=2; set num_experts=1"),
    ("smora", {"placement": "ffn"}, "'rank_wise' mixes ranks, not whole FFNs; use placement='linear' or 'block'"),
    (
        "loramoe",
        {"num_experts": 3},
        "localized_balance_coef needs an even num_experts, a half for each task type, got 3",
    ),
    ("mixlora-swich", {}, "preset='mixlora-swich': did you mean 'mixlora-switch'"),
    ("mola", {"num_experts": [2, 3]}, r"num_experts=\[2, 3\] has 2 numbers; give one for each of the 3 decoder layers"),
]


@pytest.mark.parametrize("name, options, message", BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_input_says_what_to_do(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        preset_model(name, tiny_llama(), **options)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 320


@pytest.mark.parametrize("name", [name for name in PRESETS_THAT_TRAIN if preset_config(name).router.task_labels(4)])
def test_bad_task_labels(name: str) -> None:
    model = preset_model(name, tiny_llama())
    batch = one_batch(name)
    tasks = preset_config(name).router.task_labels(4)
    without = {key: value for key, value in batch.items() if key != "task_labels"}
    with pytest.raises(ValueError, match="this training batch has none; pass task_labels, "):
        model(**without)
    with pytest.raises(ValueError, match=f"task_labels holds {tasks}, but this router tells {tasks} tasks apart; give"):
        model(**without, task_labels=torch.tensor([0, tasks]))
    with pytest.raises(
        ValueError, match=r"task_labels has shape \(3,\); give one number for each row, \(2,\), or for each token"
    ):
        model(**without, task_labels=torch.tensor([0, 1, 0]))
    model(**batch).loss.backward()
    assert model.eval()(**without).loss.isfinite()
