"""The routers against formulas written out per token, and router + kernel against outputs of the authors' own code.

Legend: T tokens, D input features, E experts, K top-k, S statistics of one layer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from molora.kernels import dense_masked_ffn, reference
from molora.kernels.reference import Projection
from molora.routers import Router, TopK, router_config
from molora.routers.base import masked_mean

FFN_KERNELS = {"reference": reference.mixture_ffn, "dense_masked": dense_masked_ffn.mixture_ffn}


def make(E: int = 5, D: int = 12, scale: float = 1.0, **options: Any) -> Router:
    """A router in evaluation mode whose probabilities differ clearly."""
    router = TopK(init_std=scale, **options).build(D, E).eval()
    assert router.weight.shape == (E, D) and router.weight.dtype == torch.float32
    return router


def oracle_route(x: Tensor, W: Tensor, K: int, normalise: bool) -> tuple[Tensor, list[set[int]], Tensor]:
    """Gates (T, E) and choices token by token in Python floats, and the statistics (T, 2E + 1) of every token."""
    gates, choices, stats = [], [], []
    for token in x.tolist():
        logits = [sum(w * v for w, v in zip(row, token, strict=True)) for row in W.tolist()]
        exp = torch.tensor(logits, dtype=torch.float64).exp().tolist()
        probs = [e / sum(exp) for e in exp]
        chosen = sorted(range(len(probs)), key=lambda e: -probs[e])[:K]
        total = sum(probs[e] for e in chosen) if normalise else 1.0
        gates.append([probs[e] / total if e in chosen else 0.0 for e in range(len(probs))])
        choices.append(set(chosen))
        z = torch.tensor(sum(exp), dtype=torch.float64).log().item() ** 2
        stats.append([float(e in chosen) for e in range(len(probs))] + probs + [z])
    return torch.tensor(gates, dtype=torch.float64), choices, torch.tensor(stats, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "published-scale"])
@pytest.mark.parametrize(("E", "K"), [(5, 2), (8, 1), (7, 3), (4, 4), (1, 1)], ids=lambda n: str(n))
def test_top_k_equals_the_formula(E: int, K: int, normalise: bool, dtype: torch.dtype) -> None:
    router = make(E, top_k=K, norm_topk_prob=normalise, scale=0.3)
    x = torch.randn(33, 12).to(dtype)
    routing = router(x, with_stats=True)
    gates, choices, stats = oracle_route(x.double(), router.weight.double(), K, normalise)
    # Measured: gates 3.3e-16 in fp64 and 9.3e-8 in fp32, statistics 8.9e-16 and 4.9e-7.
    tolerance = 1e-14 if dtype == torch.float64 else 2e-7
    assert routing.gates.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert routing.topk_ids is not None and routing.topk_ids.shape == (33, K) and routing.topk_ids.dtype == torch.int64
    assert [set(ids) for ids in routing.topk_ids.tolist()] == choices
    assert (routing.gates - gates).abs().max() < tolerance
    assert (routing.stats - stats.mean(0)).abs().max() < 10 * tolerance  # z is a square of the order of 10
    assert ((routing.gates > 0).sum(1) == K).all()
    assert routing.sums_to_one == (normalise or K == E)
    assert bool(((routing.gates.sum(1) - 1).abs() < 1e-6).all()) == routing.sums_to_one


def test_equal_logits_still_choose_k_experts() -> None:
    routing = make(6, top_k=3)(torch.zeros(4, 12))
    assert all(len(set(ids)) == 3 for ids in routing.topk_ids.tolist())
    assert torch.allclose(routing.gates.sum(1), torch.ones(4))


def test_statistics_leave_padding_out() -> None:
    router = make(5, top_k=2)
    x = torch.randn(9, 12, dtype=torch.float64)
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 0], dtype=torch.bool)
    want, count = torch.zeros(11, dtype=torch.float64), 0
    for row, counts in zip(oracle_route(x, router.weight, 2, True)[2], mask.tolist(), strict=True):
        if counts:
            want, count = want + row, count + 1
    routing = router(x, mask, with_stats=True)
    assert (routing.stats - want / count).abs().max() < 1e-12
    assert torch.equal(routing.gates, router(x).gates)  # padding is routed all the same
    changed = torch.where(mask.unsqueeze(1), x, torch.randn(9, 12, dtype=torch.float64))
    assert torch.equal(router(changed, mask, with_stats=True).stats, routing.stats)
    assert router(x).stats is None
    named = router.config.describe(routing.stats)
    assert torch.allclose(named["load"].sum(), torch.tensor(1.0).double())
    assert torch.equal(named["mean_probability"], routing.stats[5:10]) and named["z"] == routing.stats[10]


def test_gradients_of_gates_and_statistics() -> None:
    router = make(4, 3, top_k=2).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True])

    def run(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        routing = torch.func.functional_call(router, {"weight": weight}, (x, mask, True))
        return routing.gates, routing.stats

    assert torch.autograd.gradcheck(run, (x, router.weight))


def test_masked_mean_of_nothing_is_zero() -> None:
    values = torch.randn(4, 3, requires_grad=True)
    mean = masked_mean(values, torch.zeros(4, dtype=torch.bool))
    (grad,) = torch.autograd.grad(mean.sum(), values)
    assert torch.equal(mean, torch.zeros(3)) and torch.equal(grad, torch.zeros(4, 3))
    assert torch.equal(masked_mean(torch.empty(0, 3), None), torch.zeros(3))
    assert torch.equal(masked_mean(torch.empty(0, 3), torch.empty(0, dtype=torch.bool)), torch.zeros(3))
    routing = make(5)(torch.empty(0, 12), with_stats=True)
    assert routing.gates.shape == (0, 5) and torch.equal(routing.stats, torch.zeros(11))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("pool", [True, False], ids=["pooled", "per-layer"])
def test_losses_have_the_gradient_of_their_formula(pool: bool, layers: int) -> None:
    E = 5
    config = TopK(pool_layers=pool, router_aux_loss_coef=0.3, router_z_loss_coef=0.07)
    router = make(E)
    stats = [router(torch.randn(20, 12, dtype=torch.float64), with_stats=True).stats.detach() for _ in range(layers)]
    leaves = [s.clone().requires_grad_() for s in stats]
    loads, probs = [s[:E].detach() for s in leaves], [s[E : 2 * E] for s in leaves]
    if pool:
        balance = E * (sum(loads) / layers * (sum(probs) / layers)).sum()
    else:
        balance = sum(E * (f * p).sum() for f, p in zip(loads, probs, strict=True)) / layers
    value = 0.3 * balance + 0.07 * sum(s[2 * E] for s in leaves) / layers
    got = config.losses(stats)
    assert got.value.dim() == 0 and abs(got.value - value) < 1e-12
    assert len(got.grads) == layers
    for grad, want in zip(got.grads, torch.autograd.grad(value, leaves), strict=True):
        assert grad.shape == (2 * E + 1,) and (grad - want).abs().max() < 1e-12
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as inside a backward
        assert torch.equal(config.losses(stats).value, got.value)


def test_pooled_and_per_layer_losses_differ() -> None:
    stats = [torch.tensor([2.0, 0.0, 0.9, 0.1, 1.0]), torch.tensor([0.0, 2.0, 0.1, 0.9, 1.0])]
    pooled, single = (TopK(pool_layers=p, router_aux_loss_coef=1.0).losses(stats).value for p in (True, False))
    assert torch.isclose(pooled, torch.tensor(2.0)) and torch.isclose(single, torch.tensor(3.6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("E", "K"), [(8, 2), (8, 1), (7, 5), (16, 11), (64, 8)], ids=lambda n: str(n))
def test_a_token_is_routed_the_same_in_any_batch(E: int, K: int, dtype: torch.dtype) -> None:
    """Bit for bit: one last bit of a logit can be another expert, so generation would depend on the batch."""
    router = make(E, 256, top_k=K, scale=0.1)
    x = torch.randn(256, 256).to(dtype)
    whole = router(x)
    for size in (1, 2, 17):
        for start in range(0, 256 - size, 19):
            part = router(x[start : start + size])
            assert torch.equal(part.gates, whole.gates[start : start + size])
            assert torch.equal(part.topk_ids, whole.topk_ids[start : start + size])
    order = torch.randperm(256)
    assert torch.equal(router(x[order]).gates, whole.gates[order])


def test_jitter_is_for_training_only() -> None:
    router = make(router_jitter_noise=0.25)
    x = torch.randn(400, 12)
    seen: list[Tensor] = []
    logits = router.logits
    router.logits = lambda x: (seen.append(x), logits(x))[1]  # type: ignore[method-assign]
    still = router(x).gates
    assert torch.equal(seen.pop(), x)
    router.train()
    assert not torch.equal(router(x).gates, still)
    factor = seen.pop() / x
    assert 0.75 <= factor.min() < 0.76 and 1.24 < factor.max() <= 1.2501 and abs(factor.mean() - 1) < 0.01
    assert not torch.equal(router(x).gates, router(x).gates)
    router.eval()
    assert torch.equal(router(x).gates, still)
    assert router.train()(x.bfloat16()).gates.dtype == torch.float32


def test_no_jitter_by_default() -> None:
    router = make()
    x = torch.randn(5, 12)
    assert torch.equal(router.train()(x).gates, router.eval()(x).gates)


def test_autocast_changes_nothing() -> None:
    router = make(8, 64)
    x = torch.randn(30, 64)
    plain = router(x, with_stats=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x, with_stats=True)
    assert cast.gates.dtype == cast.stats.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(cast[:3], plain[:3], strict=True))
    upstream = torch.randn(30, 8)
    grads = [torch.autograd.grad(r.gates, router.weight, upstream)[0] for r in (plain, cast)]
    assert torch.equal(*grads)


def test_bf16_weights_still_give_fp32_gates() -> None:
    router = make(8, 64).to(torch.bfloat16)
    x = torch.randn(30, 64).to(torch.bfloat16).requires_grad_()
    routing = router(x, with_stats=True)
    assert routing.gates.dtype == routing.stats.dtype == torch.float32
    gates, choices, _ = oracle_route(x.detach().double(), router.weight.detach().double(), 2, True)
    assert [set(ids) for ids in routing.topk_ids.tolist()] == choices
    assert (routing.gates - gates).abs().max() < 2e-7
    routing.gates.square().sum().backward()
    assert x.grad.dtype == router.weight.grad.dtype == torch.bfloat16


def test_a_new_router_is_fp32_with_the_configured_spread() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        router = TopK(init_std=0.02).build(1000, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert router.weight.dtype == torch.float32 and abs(float(router.weight.detach().std()) - 0.02) < 0.001


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k=0 must be an integer of at least 1"),
        ({"top_k": 1.5}, "top_k=1.5 must be an integer"),
        ({"router_jitter_noise": 1.0}, "router_jitter_noise=1.0 must be at least 0 and below 1"),
        ({"router_jitter_noise": -0.1}, "router_jitter_noise=-0.1 must be a finite number of at least 0"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef=-1.0 must be a finite number of at least 0"),
        ({"router_z_loss_coef": -1.0}, "router_z_loss_coef=-1.0 must be a finite number of at least 0"),
        ({"init_std": 0.0}, "init_std=0.0 must be a finite number above 0"),
        ({"topk": 2}, "unknown key 'topk' in router 'top_k': did you mean 'top_k'"),
        ({"name": "top-k"}, "router='top-k': did you mean 'top_k'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options_say_what_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router_config(options)


def test_wrong_routers_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="top_k=4 exceeds num_experts=3; lower router.top_k or raise num_experts"):
        TopK(top_k=4).check(3)
    TopK(top_k=3).check(3)
    with pytest.raises(ValueError, match="router=2 must be a router config, a dict or a name"):
        router_config(2)  # type: ignore[arg-type]


def test_configs_survive_json() -> None:
    config = TopK(top_k=3, norm_topk_prob=False, router_z_loss_coef=0.01)
    assert router_config(json.loads(json.dumps(config.to_dict()))) == config
    assert router_config(config) is config
    assert router_config("top_k") == router_config({}) == TopK()


# From here on: inputs and outputs of MixLoRA's official code, recorded once. They are data that the repository does not
# carry; MOLORA_SHARED names the directory above them.
SHARED = Path(os.environ.get("MOLORA_SHARED") or Path(__file__).resolve().parents[2] / "shared")


def recorded(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the hyper-parameters of a recorded run; skips the test where the file is not there."""
    path = SHARED / "oracles" / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"no recorded run {name}: set MOLORA_SHARED to the directory that holds oracles/")
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["hyper"])  # noqa: SIM118


def assert_recorded(got: Tensor, want: Tensor, tolerance: float) -> None:
    """The tolerance of the recorded files: the largest difference over the largest entry, or over one."""
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("loss", ["balance_mask", "balance_nomask", "switch_z"])
def test_losses_equal_the_official_code(loss: str) -> None:
    run, hyper = recorded("mixlora_aux_loss")
    coefs = {"router_aux_loss_coef": float(loss != "switch_z"), "router_z_loss_coef": float(loss == "switch_z")}
    config = TopK(top_k=hyper["top_k"], **coefs)
    router = config.build(hyper["E"], hyper["E"]).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(hyper["E"]))  # the recorded run starts from logits
    mask = run["attn_mask"].flatten().bool() if loss == "balance_mask" else None
    layers = [t.clone().requires_grad_() for t in run["logits"].chunk(hyper["layers"])]
    stats = [router(x, mask, with_stats=True).stats for x in layers]
    losses = config.losses([s.detach() for s in stats])
    # The official counts are fp32, so 1e-7; measured 9.2e-9.
    assert_recorded(losses.value, run[f"loss_{loss}"], 1e-7)
    assert_recorded(torch.cat(torch.autograd.grad(stats, layers, losses.grads)), run[f"grad_loss_{loss}"], 1e-7)


# The largest error over the largest entry, measured over y and all gradients: 1.0e-15 in fp64, 4.3e-7 in fp32.
RECORDED_FFN = {
    "mixlora_llama_top2_f64": 1e-13,
    "mixlora_llama_top2_f32": 2e-6,
    "mixlora_llama_top1_f64": 1e-13,
    "mixlora_llama_top2_downonly_f64": 1e-13,
    "mixlora_phi_top2_f64": 1e-13,
    "mixlora_phi3_top2_f64": 1e-13,
}


@pytest.mark.parametrize("kernel", FFN_KERNELS.values(), ids=FFN_KERNELS)
@pytest.mark.parametrize("name", RECORDED_FFN)
def test_router_and_kernel_equal_the_official_ffn(name: str, kernel: Callable) -> None:
    run, hyper = recorded(name)
    E, K = hyper["E"], hyper["top_k"]
    router = TopK(top_k=K).build(run["router"].shape[1], E).to(run["x"].dtype)
    with torch.no_grad():
        router.weight.copy_(run["router"])
    leaves = {n: run[n].requires_grad_() for n in run if n == "x" or n[:2] in ("A_", "B_")} | {"router": router.weight}

    def experts(part: str) -> Projection | None:
        """Recorded as (E, out, r): a transposed view."""
        if part not in hyper["targets"]:
            return None
        return Projection(run[f"A_{part}"], run[f"B_{part}"].transpose(1, 2), hyper["scaling"])

    x = run["x"].flatten(0, 1)
    routing = router(x)
    assert [set(i) for i in routing.topk_ids.tolist()] == [set(i) for i in run["topk_idx"].tolist()]
    assert_recorded(routing.gates, run["gates"], RECORDED_FFN[name])
    parts = {"phi": ["fc1"], "phi3": ["gate_up_proj"], "llama": ["gate_proj", "up_proj"]}[hyper["model_type"]]
    pre, ups = [F.linear(x, run[f"W_{part}"]) for part in parts], [experts(part) for part in parts]
    if hyper["model_type"] == "phi3":
        pre = list(pre[0].chunk(2, 1))
        ups = [ups[0]._replace(B=half) for half in ups[0].B.chunk(2, 2)]
    down = "fc2" if hyper["model_type"] == "phi" else "down_proj"
    act = {"silu": F.silu, "gelu_new": lambda t: F.gelu(t, approximate="tanh")}[hyper["act"]]
    hidden, ranks = kernel(
        x, pre, routing.gates, routing.topk_ids, ups, experts(down), act, residual=routing.sums_to_one
    )
    y = (F.linear(hidden, run[f"W_{down}"]) + ranks @ experts(down).B.flatten(0, 1)).view_as(run["y"])
    assert_recorded(y, run["y"], RECORDED_FFN[name])
    grads = torch.autograd.grad(y, list(leaves.values()), run["grad_y"])
    for leaf, grad in zip(leaves, grads, strict=True):
        assert_recorded(grad, run[f"grad_{leaf}"], RECORDED_FFN[name])
    if K == 1:
        assert grads[-1].abs().max() < 1e-12  # a gate that is the constant 1
