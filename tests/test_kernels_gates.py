"""Gates, choices and statistics by Triton against the routers that define them, and the gates as a mask on ranks.

On a GPU, or in Triton's interpreter on the CPU. The truth is the routers' plain PyTorch in fp64, on the same logits.
Legend: T tokens, E gates of a token (experts, or groups of ranks), K chosen, V ranks that share a gate, C = E*V ranks.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernel_cases import error
from torch import Tensor

pytest.importorskip("triton", reason="these kernels are Triton's")
from molora.kernel_routing import kernel_routing
from molora.kernels import gates, ranks
from molora.routers import Centroid, RankWise, Router, Routing, Softmax, Threshold, Tokens, TopK, TopP
from molora.routers.rank_wise import RankWiseRouter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# RMS(error) / RMS(router in fp64), with the worst over all cases in the interpreter.
TOLERANCE = 2e-6  # 4.2e-7, gradients

# name: config, experts (or ranks), whether it trains
ROUTERS: dict[str, tuple[TopK | RankWise, int, bool]] = {
    "k2": (TopK(top_k=2), 8, True),
    "k1-raw": (TopK(top_k=1, norm_topk_prob=False), 5, True),
    "k1-constant": (TopK(top_k=1), 4, True),  # a gate of one, whatever the logits
    "kE": (TopK(top_k=4), 4, True),
    "kE-raw": (TopK(top_k=3, norm_topk_prob=False), 3, True),
    "prime-E-padding-counts": (TopK(top_k=3, count_padding=True), 7, True),
    "E64-raw": (TopK(top_k=2, norm_topk_prob=False), 64, True),
    "E130": (TopK(top_k=2), 130, True),  # a program takes 16 tokens
    "one-expert": (TopK(top_k=1), 1, True),
    "bias": (TopK(top_k=2, bias=True), 6, True),
    "temperature": (TopK(top_k=3, router_temperature=15.0), 6, False),
    "ranks": (RankWise(active_ranks=3, bias_update_rate=1e-3), 13, True),
    "ranks-unbiased-gates": (RankWise(active_ranks=8, bias_update_rate=1e-3, bias_in_gates=False), 64, True),
    "ranks-in-blocks": (RankWise(active_ranks=4, rank_partition=2, bias_update_rate=1e-3), 8, True),
    "one-rank": (RankWise(active_ranks=1, bias_update_rate=1e-3), 1, True),
    "all-ranks": (RankWise(active_ranks=5, bias_update_rate=1e-3), 5, False),
}
every_router = pytest.mark.parametrize("name", ROUTERS)


def make(name: str, T: int, mask: str = "some") -> tuple[Router, Tensor, Tensor | None]:
    """A router with biases, logits (T, E) and the mask of tokens that count."""
    config, n, trains = ROUTERS[name]
    router = config.build(3, *((1, n) if isinstance(config, RankWise) else (n, 0))).to(DEVICE).train(trains)
    if isinstance(router, RankWiseRouter):
        router.bias_steps.copy_(torch.randint(0, 300, router.bias_steps.shape))  # no chosen value below zero
    if router.bias is not None:
        torch.nn.init.normal_(router.bias)
    logits = 2 * torch.randn(T, router.num_gates)
    counts = {"none": None, "some": torch.rand(T) > 0.4, "all-out": torch.zeros(T, dtype=torch.bool)}[mask]
    return router, logits.to(DEVICE), None if counts is None else counts.to(DEVICE)


def route(router: Router, logits: Tensor, mask: Tensor | None) -> Routing:
    """The router's own code, in the dtype of the logits."""
    return router(torch.empty(len(logits), 3, device=logits.device), Tokens(1, mask, logits=logits), True)


def direct(router: Router, logits: Tensor, mask: Tensor | None, with_stats: bool = True) -> gates.Gates:
    config = router.config
    if isinstance(config, RankWise):
        return gates.rank_wise_gates(
            logits,
            router.bias_steps,
            mask,
            top_k=config.active_ranks // config.rank_partition,
            bias_update_rate=config.bias_update_rate,
            bias_in_gates=config.bias_in_gates,
            with_stats=with_stats,
        )
    return gates.top_k_gates(
        logits if router.bias is None else logits + router.bias,
        mask,
        top_k=config.top_k,
        norm_topk_prob=config.norm_topk_prob,
        temperature=1.0 if router.training else config.router_temperature,
        with_stats=with_stats,
        mask_losses=not config.count_padding,
    )


def gradient(found: Any, logits: Tensor, upstream: tuple[Tensor, Tensor]) -> Tensor:
    pairs = [(o, u) for o, u in zip((found.gates, found.stats), upstream, strict=True) if o.requires_grad]
    given = [u.to(o.dtype) for o, u in pairs]
    (grad,) = torch.autograd.grad([o for o, _ in pairs], logits, given, retain_graph=True)
    return grad


def check(name: str, T: int, mask: str) -> None:
    router, values, counts = make(name, T, mask)
    exact, logits = values.double().requires_grad_(), values.clone().requires_grad_()
    want = route(router, exact, counts)
    got = kernel_routing(router, Tokens(1, counts, logits=logits), True)
    assert got is not None and want.topk_ids is not None and want.stats is not None
    assert got.topk_ids.dtype == torch.int64 and torch.equal(got.topk_ids, want.topk_ids)
    assert got.sums_to_one == want.sums_to_one and got.input_weight is None
    assert got.gates.dtype == got.stats.dtype == torch.float32
    assert error(got.gates, want.gates) <= TOLERANCE
    assert torch.equal(got.gates != 0, want.gates != 0)
    # One by one: the counts are large, and an error in a small mean would drown in an RMS over all.
    torch.testing.assert_close(got.stats.double(), want.stats, rtol=2e-6, atol=1e-6)
    assert torch.equal(got.stats[:2].double(), want.stats[:2])

    # Of the common statistics too, which are detached: their gradient must go nowhere.
    upstream = (torch.randn_like(got.gates), torch.randn_like(got.stats))
    truth = gradient(want, exact, upstream)
    truth[truth.abs() < 1e-14] = 0  # what fp64 leaves of a constant gate's gradient, which is zero
    assert error(gradient(got, logits, upstream), truth) <= TOLERANCE
    again = direct(router, logits, counts)
    assert all(torch.equal(a, b) for a, b in zip(again, got[:3], strict=True))
    assert torch.equal(gradient(again, logits, upstream), gradient(got, logits, upstream))


@every_router
@pytest.mark.usefixtures("poison_empty", "triton_on_cpu")
def test_gates_statistics_and_gradients_are_the_routers(name: str) -> None:
    check(name, 7, "some")


@pytest.mark.parametrize("mask", ["none", "all-out"])
@pytest.mark.parametrize("name", ["k2", "prime-E-padding-counts", "ranks"])
@pytest.mark.usefixtures("poison_empty", "triton_on_cpu")
def test_every_token_counts_or_none(name: str, mask: str) -> None:
    check(name, 7, mask)


@pytest.mark.parametrize(("name", "T"), [*itertools.product(["k2"], [1, 63, 64, 130]), ("ranks", 65), ("E130", 130)])
@pytest.mark.usefixtures("poison_empty", "triton_on_cpu")
def test_blocks_of_tokens_whole_and_cut(name: str, T: int) -> None:
    """130 tokens of E130 are nine programs, whose sums are added in two rounds."""
    check(name, T, "some")


@every_router
@pytest.mark.usefixtures("poison_empty", "triton_on_cpu")
def test_no_tokens(name: str) -> None:
    router, logits, mask = make(name, 0)
    logits.requires_grad_()
    found, want = kernel_routing(router, Tokens(1, mask, logits=logits), True), route(router, logits, mask)
    assert found is not None and found.gates.shape == want.gates.shape and found.topk_ids.shape == want.topk_ids.shape
    assert torch.equal(found.stats, want.stats)
    assert gradient(found, logits, (found.gates, found.stats)).shape == logits.shape


@pytest.mark.parametrize("name", ["k2", "k1-raw", "ranks"])
@pytest.mark.parametrize("used", ["gates", "stats"])
@pytest.mark.usefixtures("poison_empty", "triton_on_cpu")
def test_a_gradient_for_one_output_only(name: str, used: str) -> None:
    router, logits, mask = make(name, 7)
    logits.requires_grad_()
    found = direct(router, logits, mask)
    upstream = [torch.randn_like(found.gates), torch.randn_like(found.stats)]
    both = [u if n == used else torch.zeros_like(u) for n, u in zip(("gates", "stats"), upstream, strict=True)]
    want = gradient(found, logits, (both[0], both[1]))
    one = {"gates": found.gates, "stats": found.stats}[used]
    (got,) = torch.autograd.grad(one, logits, upstream[used == "stats"], allow_unused=True, materialize_grads=True)
    assert torch.equal(got, want)
    alone = direct(router, logits, mask, with_stats=False)
    assert alone.stats is None and torch.equal(alone.gates, found.gates)
    if used == "gates":
        assert torch.equal(torch.autograd.grad(alone.gates, logits, upstream[0])[0], want)


@pytest.mark.parametrize("norm", [True, False], ids=["normalised", "raw"])
def test_of_equal_logits_the_lower_expert_wins(norm: bool) -> None:
    logits = torch.tensor([[0.0, 2, 2, 1, 2], [1, 1, 1, 1, 1], [3, 0, 3, 0, 3], [-9, -9, 0, 0, -9]], device=DEVICE)
    # Differences that exp() underflows to nothing are ties as well, of probability zero.
    far = torch.tensor([[-300.0, -200, 0, -400, -500]], device=DEVICE)
    found = gates.top_k_gates(torch.cat([logits, far]), None, top_k=2, norm_topk_prob=norm)
    assert found.topk_ids.tolist() == [[1, 2], [0, 1], [0, 2], [2, 3], [2, 0]]
    probs = logits.double().softmax(1).gather(1, found.topk_ids[:4])
    want = probs / probs.sum(1, keepdim=True) if norm else probs
    assert error(found.gates[:4].gather(1, found.topk_ids[:4]), want) < TOLERANCE
    assert int((found.gates[:4] != 0).sum()) == 8 and found.gates[4].tolist() == [0, 0, 1, 0, 0]


def test_of_equal_scores_the_lower_rank_wins() -> None:
    steps = torch.tensor([0, 0, 5, 0, 5], dtype=torch.int32, device=DEVICE)
    found = gates.rank_wise_gates(torch.zeros(3, 5, device=DEVICE), steps, None, top_k=3, bias_update_rate=0.01)
    assert found.topk_ids.tolist() == 3 * [[2, 4, 0]]
    want = torch.tensor([0.5, 0, 0.55, 0, 0.55], dtype=torch.float64, device=DEVICE)
    assert error(found.gates, (3 * want / want.sum()).expand(3, -1)) < TOLERANCE


@pytest.mark.usefixtures("triton_on_cpu")
def test_large_logits_overflow_nothing() -> None:
    router, logits, mask = make("k2", 9)
    exact, logits = (20 * logits).double().requires_grad_(), (20 * logits).requires_grad_()
    assert logits.max() > 88  # where exp() does
    want, got = route(router, exact, mask), kernel_routing(router, Tokens(1, mask, logits=logits), True)
    assert got is not None and error(got.gates, want.gates) < TOLERANCE
    torch.testing.assert_close(got.stats.double(), want.stats, rtol=1e-5, atol=1e-6)
    upstream = (torch.randn_like(got.gates), torch.randn_like(got.stats))
    assert error(gradient(got, logits, upstream), gradient(want, exact, upstream)) < TOLERANCE


@pytest.mark.usefixtures("triton_on_cpu")
def test_odd_strides() -> None:
    router, logits, mask = make("k2", 7)
    assert mask is not None
    want = direct(router, logits, mask)
    turned, spread = logits.T.contiguous().T, torch.stack([mask, ~mask], 1)[:, 0]
    assert not turned.is_contiguous() and not spread.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(direct(router, turned, spread), want, strict=True))
    leaf = logits.clone().requires_grad_()
    upstream = torch.randn_like(logits)
    grads = [
        torch.autograd.grad(direct(router, leaf, mask).gates, leaf, g)[0] for g in (upstream, upstream.T.contiguous().T)
    ]
    assert torch.equal(*grads)


@pytest.mark.usefixtures("triton_on_cpu")
def test_a_bias_that_moves_before_the_backward_changes_nothing() -> None:
    router, logits, mask = make("ranks", 7)
    logits.requires_grad_()
    upstream = torch.randn_like(logits)
    want = torch.autograd.grad(direct(router, logits, mask).gates, logits, upstream)[0]
    found = direct(router, logits, mask)
    router.bias_steps += 400
    assert torch.equal(torch.autograd.grad(found.gates, logits, upstream)[0], want)


REFUSED: dict[str, tuple[Any, bool]] = {  # config, whether it has a kernel outside training
    "capacity": (TopK(expert_capacity=2), True),
    "capacity-factor": (TopK(capacity_factor=1.0), True),
    "balance-per-sample": (TopK(balance_over="sample"), False),
    "task-loss": (TopK(task_loss_coef=0.1), False),
    "bias-moves-in-forward": (RankWise(active_ranks=2, bias_update="forward"), True),
    "top-p": (TopP(), False),
    "softmax": (Softmax(), False),
    "threshold": (Threshold(), False),
    "centroid": (Centroid(), False),
}


@pytest.mark.parametrize(("config", "outside"), REFUSED.values(), ids=REFUSED)
@pytest.mark.usefixtures("triton_on_cpu")
def test_what_has_no_kernel_is_refused(config: Any, outside: bool) -> None:
    router = config.build(3, 1 if isinstance(config, RankWise) else 4, 4).to(DEVICE)
    tokens = Tokens(1, logits=torch.randn(5, 4, device=DEVICE))
    assert kernel_routing(router.train(), tokens, False) is None
    found = kernel_routing(router.eval(), tokens, False)
    assert (found is not None) == outside
    if found is not None:
        assert torch.equal(found.gates != 0, route(router, tokens.logits, None).gates != 0)


def test_without_logits_or_a_device_or_with_too_many_gates_there_is_no_kernel(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    router = TopK().build(3, 4)
    logits = torch.randn(5, 4)
    assert kernel_routing(router, Tokens(1, logits=logits), True) is None  # on a CPU
    request.getfixturevalue("triton_on_cpu")
    assert kernel_routing(router, Tokens(1), True) is None
    monkeypatch.setattr(gates, "MAX_GATES", 3)
    assert kernel_routing(router, Tokens(1, logits=logits), True) is None


# -- the gates as a mask on ranks --------------------------------------------------------------------------------------

# T, gates, ranks of a gate, whether experts share A; gates 0: ungated
RANKS = {
    "experts": (7, 4, 4, False),
    "T63-prime": (63, 5, 8, False),
    "blocks-of-ranks": (33, 9, 17, False),
    "rank-wise": (65, 64, 1, False),
    "one-token": (1, 16, 1, False),
    "shared-A": (9, 3, 5, True),
    "shared-A-prime": (3, 7, 3, True),
    "shared-A-in-two-rounds": (2, 40, 9, True),
    "ungated": (6, 0, 5, False),
    "no-tokens": (0, 4, 2, False),
}


def oracle_ranks(shrunk: Tensor, weights: Tensor | None, num_ranks: int) -> Tensor:
    if weights is None:
        return 1.7 * shrunk
    per_gate = num_ranks // weights.shape[1]
    columns = [1.7 * weights[:, c // per_gate] * shrunk[:, c % shrunk.shape[1]] for c in range(num_ranks)]
    return torch.stack(columns, 1)


@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize(
    ("source", "dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.float16)],
    ids=["fp32", "fp32-to-fp16", "fp16"],
)
@pytest.mark.parametrize(("T", "G", "V", "shared"), RANKS.values(), ids=RANKS)
@pytest.mark.usefixtures("poison_empty")
def test_gated_ranks(
    T: int, G: int, V: int, shared: bool, source: torch.dtype, dtype: torch.dtype, triton: bool
) -> None:
    C = max(G, 1) * V
    wide = torch.randn(T, (V if shared else C) + 3).to(DEVICE, source)
    weights = torch.rand(T, G).to(DEVICE) if G else None
    upstream = torch.randn(T, C).to(DEVICE, dtype)
    forward, backward = (
        (ranks.gate_ranks_triton, ranks.gate_ranks_backward_triton)
        if triton
        else (ranks.gate_ranks, ranks.gate_ranks_backward)
    )
    if not triton and DEVICE == "cuda":
        pytest.skip("plain PyTorch runs where Triton does not")
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3  # measured: 8.7e-8, 3.5e-4
    for shrunk in (wide[:, :-3], wide[:, :-3].T.contiguous().T):  # rows apart, columns apart
        found, kept = forward(shrunk, weights, C, 1.7, dtype)
        again, grad_shrunk, grad_gates = backward(upstream, kept, weights, 1.7, source)
        exact = shrunk.to(dtype).double().requires_grad_()
        exact_gates = None if weights is None else weights.double().requires_grad_()
        want = oracle_ranks(exact, exact_gates, C)
        leaves = [exact] + ([] if exact_gates is None else [exact_gates])
        grads = torch.autograd.grad(want, leaves, upstream.double())
        assert torch.equal(kept, shrunk.to(dtype)) and (kept.is_contiguous() or not triton)
        assert found.dtype == again.dtype == dtype and grad_shrunk.dtype == source
        assert T == 0 or error(found, oracle_ranks(shrunk.double(), weights, C)) <= tolerance
        assert T == 0 or max(error(again, want), error(grad_shrunk, grads[0])) <= tolerance
        assert (grad_gates is None) == (weights is None)
        if grad_gates is not None:
            assert grad_gates.dtype == torch.float32 and grad_gates.shape == (T, G)
            assert T == 0 or error(grad_gates, grads[1]) <= tolerance
