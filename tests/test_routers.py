"""The routers against formulas written out per token; against recorded runs of the authors' code: test_oracles.py.

Legend: T tokens, D input features, E experts, G gates, K top-k, S statistics of one router.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from molora.routers import Router, SiteStats, Tokens, TopK, router_config
from molora.routers.base import common_size, masked_mean, split_statistics
from molora.routers.centroid import cosine_similarities


def make(E: int = 5, D: int = 12, scale: float = 1.0, **options: Any) -> Router:
    """A top-k router in evaluation mode whose probabilities differ clearly."""
    router = TopK(init_std=scale, **options).build(D, E).eval()
    assert router.weight.shape == (E, D) and router.weight.dtype == torch.float32
    return router


class Token(NamedTuple):
    """What a token by itself gives, in Python floats."""

    probs: list[float]
    gates: list[float]
    chosen: list[float]

    def common(self) -> list[float]:
        """entropy_before, entropy_after, top1_share, load (G,), mean_gate (G,) of this token alone."""

        def entropy(values: list[float]) -> float:
            parts = [v / sum(values) for v in values if v > 0]
            return -sum(p * math.log(p) for p in parts) / math.log(max(len(values), 2))

        total = sum(self.gates)
        share = max(self.gates) / total if total else 0.0
        return [entropy(self.probs), entropy(self.gates), share, *self.chosen, *self.gates]


def mean_of(rows: list[list[float]], mask: list[bool]) -> Tensor:
    counted = [row for row, counts in zip(rows, mask, strict=True) if counts]
    return torch.tensor([sum(column) / len(counted) for column in zip(*counted, strict=True)], dtype=torch.float64)


def oracle_route(x: Tensor, W: Tensor, K: int, normalise: bool) -> tuple[list[Token], list[float]]:
    """Each token's routing among its K best experts, and its squared log-sum-exp."""
    tokens, z = [], []
    for token in x.tolist():
        logits = [sum(w * v for w, v in zip(row, token, strict=True)) for row in W.tolist()]
        exp = [math.exp(logit) for logit in logits]
        probs = [e / sum(exp) for e in exp]
        chosen = sorted(range(len(probs)), key=lambda e: -probs[e])[:K]
        total = sum(probs[e] for e in chosen) if normalise else 1.0
        hits = [float(e in chosen) for e in range(len(probs))]
        tokens.append(Token(probs, [hit * p / total for hit, p in zip(hits, probs, strict=True)], hits))
        z.append(math.log(sum(exp)) ** 2)
    return tokens, z


def oracle_statistics(tokens: list[Token], z: list[float], mask: list[bool]) -> Tensor:
    """(4E + 7,): the common statistics, then mean z, the task loss (none here), F and P."""
    common = [float(sum(mask)), float(len(mask)), *mean_of([t.common() for t in tokens], mask).tolist()]
    own = mean_of([[value, 0.0, *t.chosen, *t.probs] for t, value in zip(tokens, z, strict=True)], mask)
    return torch.cat([torch.tensor(common, dtype=torch.float64), own])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "published-scale"])
@pytest.mark.parametrize(("E", "K"), [(5, 2), (8, 1), (7, 3), (4, 4), (1, 1)], ids=lambda n: str(n))
def test_top_k_equals_the_formula(E: int, K: int, normalise: bool, dtype: torch.dtype) -> None:
    router = make(E, top_k=K, norm_topk_prob=normalise, scale=0.3)
    x = torch.randn(33, 12).to(dtype)
    routing = router(x, with_stats=True)
    tokens, z = oracle_route(x.double(), router.weight.double(), K, normalise)
    gates = torch.tensor([t.gates for t in tokens], dtype=torch.float64)
    stats = oracle_statistics(tokens, z, [True] * 33)
    # Measured: gates 3.3e-16 in fp64 and 9.3e-8 in fp32, statistics 8.9e-16 and 4.9e-7.
    tolerance = 1e-14 if dtype == torch.float64 else 2e-7
    assert routing.gates.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert routing.topk_ids is not None and routing.topk_ids.shape == (33, K) and routing.topk_ids.dtype == torch.int64
    chosen = torch.zeros_like(gates).scatter(1, routing.topk_ids, 1.0)
    assert chosen.tolist() == [t.chosen for t in tokens]
    assert (routing.gates - gates).abs().max() < tolerance
    assert routing.stats.shape == stats.shape == (4 * E + 7,)
    assert (routing.stats - stats).abs().max() < 10 * tolerance  # z is a square of the order of 10
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
    tokens, z = oracle_route(x, router.weight, 2, True)
    routing = router(x, Tokens(mask=mask), with_stats=True)
    assert (routing.stats - oracle_statistics(tokens, z, mask.tolist())).abs().max() < 1e-12
    assert torch.equal(routing.gates, router(x).gates)  # padding is routed all the same
    changed = torch.where(mask.unsqueeze(1), x, torch.randn(9, 12, dtype=torch.float64))
    assert torch.equal(router(changed, Tokens(mask=mask), with_stats=True).stats, routing.stats)
    assert router(x).stats is None
    common, own = split_statistics(routing.stats, 5)
    assert common["tokens"] == 5 and torch.allclose(common["load"].sum(), torch.tensor(2.0).double())
    assert torch.equal(own, routing.stats[common_size(5) :]) and own.shape == (12,)
    named = router.config.describe_own(own, 5)
    assert torch.equal(named["mean_probability"], own[7:]) and named["z"] == own[0] and "task_loss" not in named


def test_losses_may_count_padding_which_the_common_statistics_do_not() -> None:
    router = make(5, top_k=2, count_padding=True)
    x = torch.randn(9, 12, dtype=torch.float64)
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 0], dtype=torch.bool)
    tokens, z = oracle_route(x, router.weight, 2, True)
    stats = router(x, Tokens(mask=mask), with_stats=True).stats
    size = common_size(5)
    assert (stats[:size] - oracle_statistics(tokens, z, mask.tolist())[:size]).abs().max() < 1e-12
    assert (stats[size:] - oracle_statistics(tokens, z, [True] * 9)[size:]).abs().max() < 1e-12


ALL_ROUTERS: list[dict[str, Any]] = [
    {"name": "top_k", "top_k": 2, "norm_topk_prob": False},
    {"name": "top_p", "top_p": 0.6},
    {"name": "tsallis", "entropy_threshold": 0.8, "top_p": 0.6, "keep_top_k": 1},
    {"name": "rank_wise", "active_ranks": 4, "rank_partition": 2},
    {"name": "threshold"},
    {"name": "threshold", "adaptive": False, "max_threshold": 0.3},  # some tokens have no active expert
    {"name": "softmax"},
    {"name": "centroid"},
]


@pytest.mark.parametrize("options", ALL_ROUTERS, ids=lambda o: f"{o['name']}-{len(o)}")
def test_common_statistics_of_every_router(options: dict[str, Any]) -> None:
    """tokens, positions, entropies, top1_share, load and mean_gate are the same plain means whatever the router."""
    config = router_config(options)
    G, D = config.num_gates(6, 12), 7
    router = config.build(D, 6, 12).eval()
    if options["name"] == "centroid":
        router.set_vectors(torch.randn(6, D))
    else:
        torch.nn.init.normal_(router.weight, std=0.5)
    x = torch.randn(24, D, dtype=torch.float64)
    mask = torch.arange(24) % 5 != 0
    routing = router(x, Tokens(rows=3, mask=mask), with_stats=True)
    with torch.no_grad():
        if options["name"] == "centroid":
            probs = cosine_similarities(x, router.vectors).softmax(1)
        else:
            logits = x @ router.weight.double().T
            probs = logits.sigmoid() if options["name"] == "rank_wise" else logits.softmax(1)
    gates = routing.gates.detach()
    hits = (gates > 0).double()
    tokens = [Token(*values) for values in zip(probs.tolist(), gates.tolist(), hits.tolist(), strict=True)]
    common, _ = split_statistics(routing.stats, G)
    got = torch.cat([value.view(-1) for value in common.values()])
    scalars = ["tokens", "positions", "entropy_before", "entropy_after", "top1_share"]
    assert list(common) == [*scalars, "load", "mean_gate"]
    means = mean_of([t.common() for t in tokens], mask.tolist()).tolist()
    want = torch.tensor([float(mask.sum()), 24.0, *means], dtype=torch.float64)
    if routing.stats.requires_grad:  # by the router's own statistics; the common ones carry no gradient
        (grad,) = torch.autograd.grad(got.sum(), router.weight, materialize_grads=True)
        assert not grad.any()
    assert (got.detach() - want).abs().max() < 1e-14  # measured 2.2e-16
    assert (common["entropy_after"] > 0) and common["entropy_before"] < 1
    used = gates[mask].sum(1)
    assert bool((used == 0).any()) == ("max_threshold" in options)
    if options["name"] != "threshold":
        assert routing.sums_to_one == bool(((used - 1).abs() < 1e-12).all())


def test_gradients_of_gates_and_statistics() -> None:
    router = make(4, 3, top_k=2).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True])

    def run(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        routing = torch.func.functional_call(router, {"weight": weight}, (x, Tokens(mask=mask), True))
        return routing.gates, split_statistics(routing.stats, 4)[1]

    assert torch.autograd.gradcheck(run, (x, router.weight))


def test_masked_mean_of_nothing_is_zero() -> None:
    values = torch.randn(4, 3, requires_grad=True)
    mean = masked_mean(values, torch.zeros(4, dtype=torch.bool))
    (grad,) = torch.autograd.grad(mean.sum(), values)
    assert torch.equal(mean, torch.zeros(3)) and torch.equal(grad, torch.zeros(4, 3))
    assert torch.equal(masked_mean(torch.empty(0, 3), None), torch.zeros(3))
    assert torch.equal(masked_mean(torch.empty(0, 3), torch.empty(0, dtype=torch.bool)), torch.zeros(3))
    routing = make(5)(torch.empty(0, 12), with_stats=True)
    assert routing.gates.shape == (0, 5) and torch.equal(routing.stats, torch.zeros(27))


@pytest.mark.parametrize("sites", [1, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("pool", ["model", "layer", "router"])
def test_losses_have_the_gradient_of_their_formula(pool: str, reduction: str, sites: int) -> None:
    """Routers 0 and 1 lie in one decoder layer, 2 and 3 in the next."""
    E = 5
    coefs = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.07}
    config = TopK(balance_pool=pool, balance_reduction=reduction, **coefs)
    router = make(E)
    own = []
    for _ in range(sites):
        stats = router(torch.randn(20, 12, dtype=torch.float64), with_stats=True).stats
        own.append(split_statistics(stats.detach(), E)[1])
    leaves = [o.clone().requires_grad_() for o in own]
    loads, probs = [o[2 : 2 + E].detach() for o in leaves], [o[2 + E :] for o in leaves]
    pools = {"model": [range(sites)], "layer": [range(0, 2), range(2, 4)], "router": [[i] for i in range(sites)]}[pool]
    members = [[i for i in group if i < sites] for group in pools if min(group) < sites]
    balance = torch.zeros((), dtype=torch.float64)
    for group in members:
        load, prob = (sum(values[i] for i in group) / len(group) for values in (loads, probs))
        balance = balance + E * (load * prob).sum()
    if reduction == "mean":
        balance = balance / len(members)
    value = 0.3 * balance + 0.07 * sum(o[0] for o in leaves) / sites
    infos = [SiteStats(o, E, layer=i // 2) for i, o in enumerate(own)]
    got = config.losses(infos)
    assert got.value.dim() == 0 and abs(got.value - value) < 1e-12
    assert len(got.grads) == sites
    for grad, want in zip(got.grads, torch.autograd.grad(value, leaves), strict=True):
        assert grad.shape == (2 * E + 2,) and (grad - want).abs().max() < 1e-12
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as inside a backward
        assert torch.equal(config.losses(infos).value, got.value)


def test_pooled_and_per_layer_losses_differ() -> None:
    own = [torch.tensor([1.0, 0.0, 2.0, 0.0, 0.9, 0.1]), torch.tensor([1.0, 0.0, 0.0, 2.0, 0.1, 0.9])]
    infos = [SiteStats(o, 2) for o in own]
    pooled, single = (TopK(balance_pool=p, router_aux_loss_coef=1.0).losses(infos).value for p in ("model", "router"))
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
    router.logits = lambda x, tokens: (seen.append(x), logits(x))[1]  # type: ignore[method-assign]
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
    tokens, _ = oracle_route(x.detach().double(), router.weight.detach().double(), 2, True)
    chosen = torch.zeros_like(routing.gates).scatter(1, routing.topk_ids, 1.0)
    assert chosen.tolist() == [t.chosen for t in tokens]
    assert (routing.gates - torch.tensor([t.gates for t in tokens])).abs().max() < 2e-7
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
        ({"balance_pool": "all"}, "balance_pool='all'"),
        ({"balance_reduction": "max"}, "balance_reduction='max'"),
        ({"balance_over": "step"}, "balance_over='step'"),
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
        TopK(top_k=4).check(3, 2, "linear")
    TopK(top_k=3).check(3, 2, "linear")
    with pytest.raises(ValueError, match="router=2 must be a router config, a dict or a name"):
        router_config(2)  # type: ignore[arg-type]


def test_configs_survive_json() -> None:
    config = TopK(top_k=3, norm_topk_prob=False, router_z_loss_coef=0.01)
    assert router_config(json.loads(json.dumps(config.to_dict()))) == config
    assert router_config(config) is config
    assert router_config("top_k") == router_config({}) == TopK()


@pytest.mark.parametrize(("old", "new"), [(True, "model"), (False, "router")])
def test_the_old_word_for_pooling_is_still_read(old: bool, new: str) -> None:
    assert router_config({"pool_layers": old}) == TopK(balance_pool=new)
    with pytest.raises(TypeError):
        TopK(pool_layers=old)  # type: ignore[call-arg]
