"""The middle of a mixture of FFN experts by Triton, against the literal loop over tokens and experts.

On a GPU, or in Triton's interpreter on the CPU, which multiplies fp32 and fp16 (its bf16 products are garbage).
Legend: T tokens, D input features, F hidden FFN features (`Case.O`), E experts, K top-k, R rank of one expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from kernel_cases import SCALING, Case, Leaves, assert_close, double, error, gradients
from test_kernels_ffn import FFN_CASES, FFN_SHAPES, Shape, ffn, ffn_leaves, ffn_upstream, oracle_ffn
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="these kernels are Triton's")
from molora.kernels import fused_ffn as module
from molora.kernels import reference
from molora.kernels.fused_ffn import ACTIVATIONS, Plan, _keys, fused_ffn, num_sets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# RMS(error) / RMS(oracle in fp64 on the same rounded inputs), with the worst tensor over all cases.
TOLERANCE = {
    torch.float32: 2e-6,  # 6.4e-7
    torch.float16: 3e-3,  # 7.8e-4
    torch.bfloat16: 2e-2,  # GPU only
}
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
CASES = {n: c for n, c in FFN_CASES.items() if c.gating != "shared_A"}
SMALL = Case(T=9, E=3, R=3, D=5, O=7)
TINY = Case(T=5, E=2, R=3, D=5, O=7)  # one set of experts, one tile
GATED = FFN_SHAPES["gated"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the interpreter, where a tile costs what its operations cost, and few tokens must fill several."""
    if DEVICE == "cpu":
        monkeypatch.setattr(module, "BLOCK_T", 16)
        monkeypatch.setattr(module, "OPTIONS", {n: {**o, "BLOCK_F": 16} for n, o in module.OPTIONS.items()})


def fused(act: str = "silu", base: Tensor | None = None) -> Callable:
    """`fused_ffn` with the arguments of `reference.mixture_ffn`."""

    def run(x: Tensor, pre: Sequence, gates: Tensor, ids: Any, ups: Sequence, down: Any, _: Any, residual: bool) -> Any:
        shrunk = [up and x @ up.A.flatten(0, 1).T for up in ups]
        scales = [0.0 if p is None else p.scaling for p in (ups[0], ups[1] if len(ups) == 2 else None, down)]
        plan = Plan(act, residual, (scales[0], scales[1], scales[2]))
        B, A = [up and up.B for up in ups], None if down is None else down.A
        return fused_ffn(pre, shrunk, B, A, gates, ids, plan, base)

    return run


def oracle(act: str = "silu") -> Callable:
    return lambda x, pre, gates, ids, ups, down, _, residual: oracle_ffn(x, pre, gates, ups, down, ACTS[act], residual)


def make(case: Case, shape: Shape, dtype: torch.dtype, residual: bool = True) -> tuple[Leaves, Tensor, list[Tensor]]:
    """Leaves, the choices (T, K) and upstream gradients, all on the device of the tests."""
    leaves, ids = ffn_leaves(case, shape, dtype)
    if not residual:
        leaves["gates"] = leaves["gates"].detach() * 0.6
    leaves = {n: t.detach().to(DEVICE).requires_grad_() for n, t in leaves.items()}
    return leaves, ids.to(DEVICE), [g.to(DEVICE) for g in ffn_upstream(case, dtype)]


def run(
    kernel: Callable,
    leaves: Leaves,
    ids: Tensor,
    upstream: list[Tensor],
    case: Case,
    shape: Shape,
    residual: bool = True,
    with_ids: bool = True,
) -> Leaves:
    hidden, ranks = ffn(kernel, leaves, ids, case, shape, residual, with_ids)
    found = {"hidden": hidden} | ({} if ranks is None else {"ranks": ranks})
    found |= gradients([hidden, ranks], leaves, upstream)
    if residual:
        # The oracle takes the gates for free numbers; the kernel leaves out <grad, h0>, the same for all gates of a
        # token. Gates that sum to one cannot move along it, so nothing that made them sees the difference.
        found["grad_gates"] = found["grad_gates"] - found["grad_gates"].mean(1, keepdim=True)
    return found


def check(
    case: Case,
    shape: Shape = GATED,
    dtype: torch.dtype = torch.float32,
    act: str = "silu",
    residual: bool = True,
    with_ids: bool = True,
) -> None:
    leaves, ids, upstream = make(case, shape, dtype, residual)
    got = run(fused(act), leaves, ids, upstream, case, shape, residual, with_ids)
    outputs = [got[n] for n in ("hidden", "ranks") if n in got]
    assert [o.dtype for o in outputs] == [dtype] * (1 + shape[1])
    assert all(got[f"grad_{n}"].dtype == t.dtype for n, t in leaves.items())
    exact = {n: t.cpu() for n, t in leaves.items()}
    want = run(oracle(act), double(exact), ids.cpu(), [g.cpu() for g in upstream], case, shape, residual)
    assert_close({n: t.cpu() for n, t in got.items()}, want, TOLERANCE[dtype])
    if case.load == "unused":
        assert not any(got[f"grad_{n}"][0].any() for n in leaves if n[0] in "AB")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("poison_empty")
def test_fused_equals_the_token_loop(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "unnormalised"])
@pytest.mark.parametrize("shape", FFN_SHAPES.values(), ids=FFN_SHAPES)
@pytest.mark.usefixtures("poison_empty")
def test_every_shape_of_an_ffn(shape: Shape, residual: bool) -> None:
    """Of "fused-gate-up" the pre-activations and B are halves of one tensor."""
    check(TINY, shape, residual=residual)


@pytest.mark.parametrize("shape", [FFN_SHAPES[n] for n in ("two-layer", "fused-gate-up")])
@pytest.mark.usefixtures("poison_empty")
def test_several_sets_of_experts(shape: Shape) -> None:
    check(SMALL, shape, residual=False)


@pytest.mark.parametrize("act", ACTIVATIONS[1:])
@pytest.mark.parametrize("shape", ["gated", "two-layer"])
@pytest.mark.usefixtures("poison_empty")
def test_every_activation(shape: str, act: str) -> None:
    """All but silu, which the others test."""
    check(TINY, FFN_SHAPES[shape], act=act, residual=shape == "gated")


@pytest.mark.parametrize("case", [SMALL, CASES["k1"]], ids=["small", "k1"])
@pytest.mark.usefixtures("poison_empty")
def test_fp16_equals_the_token_loop(case: Case) -> None:
    check(case, dtype=torch.float16)


@pytest.mark.parametrize(
    "case",
    [Case(T=130, E=3, R=2, D=3, O=5), Case(T=20, E=2, R=2, D=3, O=130, K=1), Case(T=9, E=5, R=1, D=3, O=5, K=3)],
    ids=["tokens", "features", "sets-as-bits"],
)
@pytest.mark.usefixtures("poison_empty")
def test_several_tiles(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "unnormalised"])
@pytest.mark.usefixtures("poison_empty")
def test_without_choices_every_expert_is_one_of_every_token(residual: bool) -> None:
    check(Case(**{**vars(SMALL), "K": 3}), residual=residual, with_ids=False)


def without_B(leaves: Leaves) -> Leaves:
    return {n: torch.zeros_like(t) if n[0] == "B" else t.detach() for n, t in leaves.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_experts_of_zero_B_leave_the_frozen_hidden_state(act: str, dtype: torch.dtype) -> None:
    leaves, ids, _ = make(TINY, GATED, dtype)
    leaves = without_B(leaves)
    frozen = ACTS[act](leaves["pre0"]) * leaves["pre1"]
    assert torch.equal(ffn(fused(act, frozen), leaves, ids, TINY, GATED, True)[0], frozen)
    # Computed in the kernel it is rounded where torch rounds, but not by the same exp().
    found = ffn(fused(act), leaves, ids, TINY, GATED, True)[0]
    assert error(found, frozen) <= {torch.float32: 2e-7, torch.float16: 3e-4}[dtype]


@pytest.mark.usefixtures("poison_empty")
def test_a_frozen_hidden_state_that_is_given_changes_no_gradient() -> None:
    leaves, ids, upstream = make(TINY, GATED, torch.float32)
    want = run(fused(), leaves, ids, upstream, TINY, GATED)
    frozen = (F.silu(leaves["pre0"]) * leaves["pre1"]).detach()
    got = run(fused(base=frozen), leaves, ids, upstream, TINY, GATED)
    assert (
        all(torch.equal(got[n], want[n]) for n in want if n != "hidden") and error(got["hidden"], want["hidden"]) < 2e-7
    )
    moved = ffn(fused(base=frozen + 1), leaves, ids, TINY, GATED, True)[0]
    assert error(moved - 1, want["hidden"]) < 1e-6  # it is what enters with weight one


@pytest.mark.parametrize("used", ["hidden", "ranks"])
@pytest.mark.usefixtures("poison_empty")
def test_a_gradient_for_one_output_only(used: str) -> None:
    leaves, ids, upstream = make(TINY, GATED, torch.float32)
    both = [g if n == used else torch.zeros_like(g) for n, g in zip(("hidden", "ranks"), upstream, strict=True)]
    want = run(fused(), leaves, ids, both, TINY, GATED)
    index = ("hidden", "ranks").index(used)
    output = ffn(fused(), leaves, ids, TINY, GATED, True)[index]
    got = gradients([output], leaves, [upstream[index]])
    got["grad_gates"] = got["grad_gates"] - got["grad_gates"].mean(1, keepdim=True)
    assert_close(got, {n: want[n] for n in got}, 1e-6)


@pytest.mark.usefixtures("poison_empty")
def test_gradients_of_single_inputs() -> None:
    """A frozen input must not change the gradients of the others."""
    leaves, ids, upstream = make(TINY, GATED, torch.float32)
    want = run(fused(), leaves, ids, upstream, TINY, GATED)
    frozen = {n: t.detach() for n, t in leaves.items()}
    for name in ("x", "gates", "pre1", "B_gate", "A_down"):
        outputs = ffn(fused(), frozen | {name: leaves[name]}, ids, TINY, GATED, True)
        (got,) = torch.autograd.grad(outputs, leaves[name], upstream)
        got = got - got.mean(1, keepdim=True) if name == "gates" else got
        assert torch.equal(got, want[f"grad_{name}"])
    assert all(o.grad_fn is None for o in ffn(fused(), frozen, ids, TINY, GATED, True))


def test_two_runs_give_the_same_bits_and_leave_their_inputs_alone() -> None:
    case = Case(T=33, E=2, R=3, D=5, O=7, K=1)
    leaves, ids, upstream = make(case, GATED, torch.float32)
    before = {n: t.detach().clone() for n, t in leaves.items()}
    first, second = (run(fused(), leaves, ids, upstream, case, GATED) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert all(torch.equal(before[n], t) for n, t in leaves.items())


def test_odd_strides_and_the_order_of_choices() -> None:
    leaves, ids, upstream = make(TINY, GATED, torch.float32)
    want = run(fused(), leaves, ids, upstream, TINY, GATED)
    turn = lambda t: t.detach().transpose(0, -1).contiguous().transpose(0, -1)  # noqa: E731
    odd = {n: t if n == "pre1" else turn(t).requires_grad_() for n, t in leaves.items()}
    # Halves of a wider tensor on one side only: each side has its own strides.
    odd["pre0"] = torch.cat([leaves["pre0"].detach()] * 2, 1).chunk(2, 1)[1].requires_grad_()
    odd["B_up"] = torch.cat([leaves["B_up"].detach()] * 2, 2).chunk(2, 2)[1].requires_grad_()
    odd["gates"] = leaves["gates"].detach().flip(1).requires_grad_()
    got = run(fused(), odd, ids.flip(1), [turn(g) for g in upstream], TINY, GATED)
    got["grad_gates"] = got["grad_gates"].flip(1)
    assert_close(got, want, 1e-6)


def test_expanded_upstream_gradients() -> None:
    """``y.sum()`` sends one of stride 0 in both dimensions."""
    leaves, ids, upstream = make(TINY, GATED, torch.float32)
    want = run(fused(), leaves, ids, [torch.ones_like(g) for g in upstream], TINY, GATED)
    assert_close(run(fused(), leaves, ids, [g.new_ones(()).expand_as(g) for g in upstream], TINY, GATED), want, 1e-6)


def test_fp32_experts_in_an_fp16_ffn() -> None:
    leaves, ids, upstream = make(TINY, GATED, torch.float16)
    leaves = {n: t.detach().to(torch.float32 if n[0] in "AB" else t.dtype).requires_grad_() for n, t in leaves.items()}
    shrunk = {n: (leaves["x"].float() @ leaves[f"A_{n}"].flatten(0, 1).T).detach() for n in ("gate", "up")}
    gates = torch.zeros(5, 2, device=DEVICE).scatter(1, ids, leaves["gates"].detach())
    experts = [leaves["B_gate"], leaves["B_up"], leaves["A_down"]]
    inputs = ([leaves["pre0"], leaves["pre1"]], [shrunk["gate"], shrunk["up"]], experts[:2], experts[2], gates)
    hidden, ranks = fused_ffn(*inputs, ids, Plan("silu", True, (SCALING, SCALING, SCALING / 2)))
    grads = torch.autograd.grad([hidden, ranks], experts, upstream)
    assert hidden.dtype == ranks.dtype == torch.float16 and all(g.dtype == torch.float32 for g in grads)
    exact = {n: t.cpu() for n, t in leaves.items()}
    want = run(oracle(), double(exact), ids.cpu(), [g.cpu() for g in upstream], TINY, GATED)
    names = ("grad_B_gate", "grad_B_up", "grad_A_down")
    assert_close({n: g.cpu() for n, g in zip(names, grads, strict=True)}, {n: want[n] for n in names}, 3e-3)


def test_no_tokens() -> None:
    case = Case(T=0)
    leaves, ids, upstream = make(case, GATED, torch.float32)
    hidden, ranks = ffn(fused(), leaves, ids, case, GATED, True)
    assert hidden.shape == (0, case.O) and ranks is not None and ranks.shape == (0, case.E * case.R)
    assert not any(g.any() for g in gradients([hidden, ranks], leaves, upstream).values())


@pytest.mark.parametrize(
    ("E", "K"), [(1, 1), (2, 1), (4, 2), (5, 3), (8, 2), (10, 9), (10, 5), (32, 2), (1024, 1), (6, 6), (3, 2)]
)
def test_a_set_of_experts_has_one_key_of_its_own(E: int, K: int) -> None:
    sets = list(itertools.islice(itertools.combinations(range(E), K), 2000))
    keys = _keys(torch.tensor(sets, dtype=torch.int32), E)
    assert keys.shape == (len(sets), 1) and len(set(keys.flatten().tolist())) == len(sets)
    assert int(keys.min()) >= 0 and int(keys.max()) < num_sets(E, K) <= module.MAX_SETS
    assert torch.equal(_keys(torch.tensor(sets[::-1], dtype=torch.int32), E), keys.flip(0))


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("shape", ["gated", "two-layer"])
def test_zero_B_is_the_frozen_ffn_in_bf16(shape: str, act: str) -> None:
    case = Case(T=300, E=8, R=16, D=32, O=1000)
    leaves, ids, _ = make(case, FFN_SHAPES[shape], torch.bfloat16)
    leaves = without_B(leaves)
    want = ACTS[act](leaves["pre0"])
    want = want * leaves["pre1"] if shape == "gated" else want
    found = ffn(fused(act), leaves, ids, case, FFN_SHAPES[shape], True)[0]
    if act == "silu":
        assert torch.equal(found, want)
    torch.testing.assert_close(found, want, rtol=1.6e-2, atol=1e-5)
    assert torch.equal(ffn(fused(act, want), leaves, ids, case, FFN_SHAPES[shape], True)[0], want)


@pytest.mark.gpu
@pytest.mark.parametrize("K", [1, 2, 8])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "unnormalised"])
@pytest.mark.usefixtures("poison_empty")
def test_bf16_of_a_models_size(residual: bool, K: int) -> None:
    case = Case(T=4097, E=8, R=16, D=64, O=1000, K=K)
    leaves, ids, upstream = make(case, GATED, torch.bfloat16, residual)
    got = run(fused(), leaves, ids, upstream, case, GATED, residual)
    wide = {n: t.detach().float().requires_grad_() for n, t in leaves.items()}
    assert_close(got, run(reference.mixture_ffn, wide, ids, upstream, case, GATED, residual), 2e-2)
    again = run(fused(), leaves, ids, upstream, case, GATED, residual)
    assert all(torch.equal(got[n], again[n]) for n in got)


@pytest.mark.gpu
def test_a_cuda_graph_follows_the_routing() -> None:
    case = Case(T=130, E=8, R=16, D=64, O=200)
    leaves, ids, upstream = make(case, GATED, torch.bfloat16)
    step = lambda: run(fused(), leaves, ids, upstream, case, GATED)  # noqa: E731
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for load in ("mixed", "one", "unused"):
        other, chosen, _ = make(Case(**{**vars(case), "load": load}), GATED, torch.bfloat16)
        with torch.no_grad():
            leaves["gates"].copy_(other["gates"])
        ids.copy_(chosen)
        graph.replay()
        want = step()
        assert all(torch.equal(captured[n], want[n]) for n in want)


def test_only_what_fits_into_shared_memory_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings of an H100, which has 232,448 bytes for a program: what ran there, and what did not."""
    monkeypatch.setattr(module, "_shared_memory", lambda device: 232448)
    device = torch.device("cuda")
    for num_experts, top_k, r in ((8, 2, 16), (8, 2, 64), (4, 4, 16), (3, 1, 32)):
        assert module.fits(device, num_experts, top_k, r)
    for num_experts, top_k, r in ((8, 8, 16), (8, 8, 8), (8, 4, 32), (5, 5, 3), (8, 2, 65), (64, 32, 1)):
        assert not module.fits(device, num_experts, top_k, r)


@pytest.mark.gpu
@pytest.mark.parametrize(("E", "K", "R"), [(8, 2, 64), (4, 4, 16), (8, 3, 16), (16, 1, 64), (3, 3, 3)])
def test_what_fits_runs_forward_and_backward(E: int, K: int, R: int) -> None:
    T, F = 70, 512
    assert module.fits(torch.device("cuda", 0), E, K, R)
    make = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    ups, A = [torch.randn(E, R, F, **make) for _ in range(2)], torch.randn(E, R, F, **make)
    shrunk = [torch.randn(T, E * R, **make) for _ in range(2)]
    pre, gates = [torch.randn(T, F, **make) for _ in range(2)], torch.rand(T, E, device="cuda", requires_grad=True)
    ids = None if K == E else torch.rand(T, E, device="cuda").topk(K).indices
    hidden, ranks = fused_ffn(pre, shrunk, ups, A, gates, ids, Plan("silu", True, (1.0, 1.0, 1.0)))
    assert ranks is not None
    (hidden.float().sum() + ranks.float().sum()).backward()
    assert all(t.grad is not None and bool(t.grad.isfinite().all()) for t in (*ups, A, *shrunk, *pre, gates))
