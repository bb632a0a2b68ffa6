"""Gates, statistics and gradients of routing by an entropy: Triton against the router that defines them.

On a GPU, or in Triton's interpreter on the CPU. The truth is the router's plain PyTorch on the same logits: in fp32 for
its choices, in fp64 for the numbers. Legend: T tokens, E experts.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import error
from torch import Tensor

pytest.importorskip("triton", reason="these kernels are Triton's")
from molora.kernel_routing import kernel_routing
from molora.kernels import gates
from molora.routers import Routing, Tokens, Tsallis

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 2e-6  # RMS(error) / RMS(router in fp64)

pytestmark = pytest.mark.usefixtures("poison_empty", "triton_on_cpu")

# name: config, experts
ROUTERS: dict[str, tuple[Tsallis, int]] = {
    "preset": (Tsallis(), 8),
    "normalised": (Tsallis(norm_topk_prob=True), 6),
    "one-kept-normalised": (Tsallis(norm_topk_prob=True, keep_top_k=1, top_p=None, entropy_threshold=1.0), 5),
    "with-the-crossing": (Tsallis(include_crossing=True, keep_top_k=1, top_p=0.6), 7),
    "padding-counts": (Tsallis(count_padding=True), 3),
    "padding-in-entropy": (Tsallis(entropy_over_padding=True), 6),
    "shannon": (Tsallis(q=1, top_p=0.5, entropy_threshold=0.8), 8),
    "renyi": (Tsallis(entropy="renyi", q=0.5, entropy_threshold=0.95), 6),
    "renyi-2": (Tsallis(entropy="renyi", q=2, keep_top_k=3), 16),
    "renyi-1": (Tsallis(entropy="renyi", q=1), 4),
    "nearly-shannon": (Tsallis(q=1.01), 8),
    "q-2": (Tsallis(q=2.0), 2),
    "sparse": (Tsallis(entropy_threshold=1.0), 64),
    "first-only": (Tsallis(top_p=None, keep_top_k=1, include_crossing=True), 8),
    "dense": (Tsallis(entropy_threshold=0), 4),
    "all-kept": (Tsallis(keep_top_k=3), 3),
    "one-expert": (Tsallis(keep_top_k=1), 1),
    "one-expert-renyi": (Tsallis(keep_top_k=1, entropy="renyi"), 1),
    "one-expert-shannon": (Tsallis(keep_top_k=1, q=1), 1),
    "E70": (Tsallis(), 70),  # a program takes 32 tokens
}
every_router = pytest.mark.parametrize("name", ROUTERS)


def route(config: Tsallis, logits: Tensor, mask: Tensor | None) -> Routing:
    """The router's own code, in the dtype of the logits."""
    router = config.build(3, logits.shape[1]).to(logits.device)
    return router(torch.empty(len(logits), 3, device=logits.device), Tokens(1, mask, logits=logits), True)


def by_kernel(config: Tsallis, logits: Tensor, mask: Tensor | None, with_stats: bool = True) -> Routing:
    router = config.build(3, logits.shape[1]).to(logits.device)
    found = kernel_routing(router, Tokens(1, mask, logits=logits), with_stats)
    assert found is not None
    return found


def gradient(found: Routing, logits: Tensor, upstream: tuple[Tensor, Tensor]) -> Tensor:
    outputs = (found.gates, found.stats)
    given = [u.to(o.dtype) for o, u in zip(outputs, upstream, strict=True)]
    return torch.autograd.grad(outputs, logits, given, retain_graph=True)[0]


def some(T: int) -> Tensor:
    return (torch.rand(T) > 0.4).to(DEVICE)


def mixed(T: int, E: int) -> Tensor:
    """Logits (T, E) of tokens from flat to peaked, so that a threshold on their entropy tells them apart."""
    return (torch.linspace(0.1, 4, T).unsqueeze(1) * torch.randn(T, E)).to(DEVICE)


def check(config: Tsallis, values: Tensor, mask: Tensor | None, tolerance: float = TOLERANCE) -> Routing:
    exact, logits = values.double().requires_grad_(), values.clone().requires_grad_()
    want, got = route(config, exact, mask), by_kernel(config, logits, mask)
    plain = route(config, values, mask)
    assert want.stats is not None and got.stats is not None and plain.stats is not None
    assert torch.equal(got.gates != 0, plain.gates != 0)
    assert got.topk_ids is None and got.sums_to_one == want.sums_to_one
    assert got.gates.dtype == got.stats.dtype == torch.float32
    assert error(got.gates, want.gates) <= tolerance
    # One by one: the counts are large, and an error in a small mean would drown in an RMS over all.
    # Choices among probabilities that are zero in fp32 alone are those in fp32.
    means, choices = want.stats.detach().clone(), slice(5, 5 + values.shape[1])
    means[choices] = plain.stats[choices].double()
    torch.testing.assert_close(got.stats.double(), means, rtol=2e-6, atol=1e-6)
    assert torch.equal(got.stats[:2].double(), want.stats[:2])
    # Of the common statistics too, which are detached: their gradient must go nowhere.
    upstream = (torch.randn_like(got.gates), torch.randn_like(got.stats))
    truth = gradient(want, exact, upstream)
    truth[truth.abs() < 1e-14] = 0  # what fp64 leaves of a constant gate's gradient, which is zero
    assert error(gradient(got, logits, upstream), truth) <= tolerance
    again = by_kernel(config, logits, mask)
    assert torch.equal(again.gates, got.gates) and torch.equal(again.stats, got.stats)
    assert torch.equal(gradient(again, logits, upstream), gradient(got, logits, upstream))
    return got


@every_router
def test_gates_statistics_and_gradients_are_the_routers(name: str) -> None:
    config, E = ROUTERS[name]
    check(config, mixed(31, E), some(31))


def test_the_cases_hold_dense_and_sparse_tokens() -> None:
    config, E = ROUTERS["preset"]
    kept = (route(config, mixed(31, E), None).gates != 0).sum(1)
    assert (kept == E).sum() >= 3 and (kept == config.keep_top_k).sum() >= 3 and len(kept.unique()) >= 3


@pytest.mark.parametrize(("T", "E"), [(1, 8), (3, 8), (64, 8), (127, 8), (1025, 3)])
def test_blocks_of_tokens_whole_and_cut(T: int, E: int) -> None:
    check(Tsallis(), mixed(T, E), some(T))


@pytest.mark.parametrize("name", ["preset", "padding-counts", "padding-in-entropy"])
@pytest.mark.parametrize("counted", ["all", "none"])
def test_every_token_counts_or_none(name: str, counted: str) -> None:
    config, E = ROUTERS[name]
    check(config, mixed(7, E), None if counted == "all" else torch.zeros(7, dtype=torch.bool, device=DEVICE))


@every_router
def test_no_tokens(name: str) -> None:
    config, E = ROUTERS[name]
    logits = torch.zeros(0, E, device=DEVICE, requires_grad=True)
    found, want = by_kernel(config, logits, None), route(config, logits, None)
    assert found.gates.shape == want.gates.shape
    assert torch.equal(found.stats, want.stats)
    assert gradient(found, logits, (found.gates, found.stats)).shape == logits.shape


@pytest.mark.parametrize("E", [2, 3, 6, 8, 64])
@pytest.mark.parametrize("crossing", [False, True], ids=["without", "with-the-crossing"])
def test_equal_logits_at_the_threshold_and_at_the_mass(E: int, crossing: bool) -> None:
    """Entropies and running masses that are the thresholds themselves, by the router's choices on the CPU, whose
    running sums are exact."""
    rows = torch.zeros(3, E)
    rows[1] = 5.0
    rows[2, E // 2 :] = -200.0  # half the experts share all of the mass
    uniform = route(Tsallis(keep_top_k=1), rows[:1], None).stats[5 + 2 * E].item()
    kept = []
    for threshold, top_p in [(uniform, 0.5), (uniform, 1.0), (uniform - 1e-6, 1 / E), (uniform + 1e-6, 1 / E)]:
        options = {"entropy_threshold": threshold, "top_p": top_p, "include_crossing": crossing}
        config = Tsallis(keep_top_k=1, **options)
        got, want = by_kernel(config, rows.to(DEVICE), None), route(config, rows, None)
        torch.testing.assert_close(got.gates.cpu(), want.gates, rtol=1e-6, atol=0)
        torch.testing.assert_close(got.stats.cpu(), want.stats, rtol=1e-6, atol=1e-6)
        kept.append(int((got.gates[0] != 0).sum()))
    # H at the threshold is not above it, below the threshold as little: E gates only where it is lower.
    assert kept[2] == E and kept[3] == 1 + crossing and kept[0] == max(1, E // 2 + crossing)


def test_of_equal_logits_the_lower_expert_wins() -> None:
    logits = torch.tensor([[0.0, 2, 2, 1, 2], [1, 1, 1, 1, 1], [3, 0, 3, 0, 3], [-9, -9, 0, 0, -9]], device=DEVICE)
    # Differences that exp() underflows to nothing are ties as well, of probability zero.
    far = torch.tensor([[-300.0, -200, 0, -400, -500]], device=DEVICE)
    config = Tsallis(entropy_threshold=1.0, top_p=None)
    found = by_kernel(config, torch.cat([logits, far]), None)
    assert [row.nonzero().flatten().tolist() for row in found.gates] == [[1, 2], [0, 1], [0, 2], [2, 3], [2]]
    # Of the last row the lower of the experts without mass was chosen, which its gate does not show.
    assert found.stats[5:10].tolist() == pytest.approx([3 / 5, 2 / 5, 4 / 5, 1 / 5, 0])


@pytest.mark.parametrize("name", ["preset", "normalised", "shannon", "renyi", "renyi-2"])
def test_large_logits_overflow_nothing(name: str) -> None:
    config, E = ROUTERS[name]
    values = 40 * mixed(31, E)
    assert values.max() > 88  # where exp() does
    check(config, values, some(31), 1e-5)


@pytest.mark.parametrize("used", ["gates", "stats"])
@pytest.mark.parametrize("name", ["preset", "normalised"])
def test_a_gradient_for_one_output_only(name: str, used: str) -> None:
    config, E = ROUTERS[name]
    logits = mixed(7, E).requires_grad_()
    found = by_kernel(config, logits, None)
    upstream = [torch.randn_like(found.gates), torch.randn_like(found.stats)]
    both = [u if n == used else torch.zeros_like(u) for n, u in zip(("gates", "stats"), upstream, strict=True)]
    want = gradient(found, logits, (both[0], both[1]))
    one = {"gates": found.gates, "stats": found.stats}[used]
    assert torch.equal(torch.autograd.grad(one, logits, upstream[used == "stats"])[0], want)
    alone = by_kernel(config, logits, None, with_stats=False)
    assert alone.stats is None and torch.equal(alone.gates, found.gates)
    if used == "gates":
        assert torch.equal(torch.autograd.grad(alone.gates, logits, upstream[0])[0], want)


def test_a_tokens_gates_do_not_depend_on_the_others() -> None:
    logits = mixed(130, 8)
    whole = by_kernel(Tsallis(), logits, None).gates
    for part in (logits[:1], logits[3:70], logits[60:]):
        at = int((logits == part[0]).all(1).nonzero())
        assert torch.equal(by_kernel(Tsallis(), part, None).gates, whole[at : at + len(part)])


def test_odd_strides() -> None:
    logits, mask = mixed(7, 8), some(7)
    want = by_kernel(Tsallis(), logits, mask)
    turned, spread = logits.T.contiguous().T, torch.stack([mask, ~mask], 1)[:, 0]
    got = by_kernel(Tsallis(), turned, spread)
    assert torch.equal(got.gates, want.gates) and torch.equal(got.stats, want.stats)
    leaf, upstream = logits.clone().requires_grad_(), torch.randn_like(logits)
    gates_of = by_kernel(Tsallis(), leaf, mask).gates
    turns = (upstream, upstream.T.contiguous().T)
    assert torch.equal(*(torch.autograd.grad(gates_of, leaf, turn, retain_graph=True)[0] for turn in turns))


def test_losses_of_each_row_fp64_and_too_many_experts_have_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    router, logits = Tsallis(balance_over="sample").build(3, 4).to(DEVICE), mixed(5, 4)
    assert kernel_routing(router, Tokens(1, logits=logits), True) is None
    router = Tsallis().build(3, 4).to(DEVICE)
    assert kernel_routing(router, Tokens(1, logits=logits.double()), True) is None
    assert kernel_routing(router, Tokens(1), True) is None
    monkeypatch.setattr(gates, "MAX_GATES", 3)
    assert kernel_routing(router, Tokens(1, logits=logits), True) is None
