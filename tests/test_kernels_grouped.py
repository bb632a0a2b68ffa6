"""The grouped Triton kernels against the literal token loop: on a GPU, or in Triton's interpreter on the CPU.

The interpreter (TRITON_INTERPRET=1, before triton is imported) multiplies fp32 and fp16; its bf16 products are garbage.
Legend: T tokens, D input features, O output features, E experts, K top-k, R rank of one expert.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import (
    SCALING,
    Case,
    Leaves,
    assert_close,
    choose,
    error,
    experts,
    gradients,
    leaves_of,
    odd_layouts,
)
from test_kernels import oracle_linear
from torch import Tensor

pytest.importorskip("triton", reason="the grouped kernels need Triton")
from molora.kernels import grouped
from molora.kernels.reference import Projection

device = "cuda" if torch.cuda.is_available() else "cpu"

# RMS(error) / RMS(oracle in fp64 on the same rounded inputs), with the worst tensor over all cases and
# three seeds in the interpreter.
TOLERANCE = {
    torch.float32: 2e-6,  # 2.2e-7, gates
    torch.float16: 1e-3,  # 4.0e-4, output of one token
    torch.bfloat16: 2e-2,  # GPU only
}
CASES = {
    "T7": Case(),
    "one-token": Case(T=1),
    "T16-R16-k1": Case(T=16, R=16, K=1),
    "T63-odd-tail": Case(T=63, E=5, R=8, D=33, O=47),
    "T64-R64-kE": Case(T=64, E=3, R=64, K=3),
    "T65-prime-E": Case(T=65, E=7, R=3),
    "R1": Case(R=1),
    "single-expert": Case(E=1, K=1, R=3),
    "unused-expert": Case(load="unused"),
    "all-on-one-two-tiles": Case(T=65, load="one", K=1),
    "several-blocks-of-columns": Case(T=5, E=2, D=131, O=257),
    "several-blocks-of-ranks": Case(T=20, E=2, R=130),
}
IN_FP16 = ["T7", "T63-odd-tail", "several-blocks-of-columns", "several-blocks-of-ranks"]


def make(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Leaves, Tensor, Tensor]:
    """Leaves, topk_ids (T, K) and a random upstream gradient (T, O), all on the device of the tests."""
    A, B = experts(case, case.D, case.O)
    gates, ids = choose(case, case.E)
    tensors = {"x": torch.randn(case.T, case.D), "out": torch.randn(case.T, case.O), "A": A, "B": B, "gates": gates}
    leaves = leaves_of({n: t.to(device) for n, t in tensors.items()}, dtype)
    return leaves, ids.to(device), torch.randn(case.T, case.O).to(device, dtype)


def mix(v: Leaves, ids: Tensor, **options: Any) -> Tensor:
    return grouped.mixture_linear(
        v["x"], v["gates"], Projection(v["A"], v["B"], SCALING), v["out"], topk_ids=ids, **options
    )


def mix_and_gradients(v: Leaves, ids: Tensor, upstream: Tensor, **options: Any) -> Leaves:
    out = mix(v, ids, **options)
    return {"out": out} | gradients([out], v, [upstream])


def oracle(v: Leaves, ids: Tensor, upstream: Tensor, x_factor: Tensor | float = 1.0) -> Leaves:
    """The token loop in fp64; gates that were not chosen get no gradient."""
    v = {n: t.detach().double().cpu().requires_grad_() for n, t in v.items()}
    out = oracle_linear(v["x"] * x_factor, v["gates"], v["A"], v["B"], v["out"])
    want = {"out": out} | gradients([out], v, [upstream.cpu()])
    want["grad_gates"] = want["grad_gates"] * torch.zeros_like(v["gates"]).scatter(1, ids.cpu(), 1.0)
    return {n: t.to(device) for n, t in want.items()}


def check(case: Case, dtype: torch.dtype) -> None:
    leaves, ids, upstream = make(case, dtype)
    got = mix_and_gradients(leaves, ids, upstream)
    assert got["out"].dtype == dtype and all(got[f"grad_{n}"].dtype == t.dtype for n, t in leaves.items())
    assert_close(got, oracle(leaves, ids, upstream), TOLERANCE[dtype])
    if case.load == "unused":
        assert not got["grad_A"][0].any() and not got["grad_B"][0].any() and not got["grad_gates"][:, 0].any()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("poison_empty")
def test_fp32_equals_the_token_loop(case: Case) -> None:
    check(case, torch.float32)


@pytest.mark.parametrize("name", IN_FP16)
@pytest.mark.usefixtures("poison_empty")
def test_fp16_equals_the_token_loop(name: str) -> None:
    check(CASES[name], torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("poison_empty")
def test_bf16_equals_the_token_loop(case: Case) -> None:
    check(case, torch.bfloat16)


@pytest.mark.parametrize(
    ("T", "E", "K", "load"),
    [(1, 3, 2, "mixed"), (63, 7, 3, "mixed"), (64, 1, 1, "mixed"), (65, 5, 5, "unused"), (100, 4, 1, "one")],
)
@pytest.mark.parametrize("block", [16, 64])
def test_the_topology_lists_every_token_once_per_slot(T: int, E: int, K: int, load: str, block: int) -> None:
    ids = choose(Case(T=T, E=E, K=K, load=load), E)[1].to(device)
    order, offsets, tile_experts = (t.tolist() for t in grouped.topology(ids, E, block))
    for slot, chosen in enumerate(ids.T.tolist()):
        assert order[slot] == sorted(range(T), key=lambda t: chosen[t])  # sorted() is stable
        assert offsets[slot] == [sum(other < e for other in chosen) for e in range(E + 1)]
        assert len(tile_experts[slot]) == T // block + E
        seen = []
        for i, e in enumerate(tile_experts[slot]):
            if e < 0:
                continue
            first, end = offsets[slot][e], offsets[slot][e + 1]
            start = first + (i - first // block - e) * block
            rows = order[slot][start : min(start + block, end)]
            assert first <= start < end and {chosen[t] for t in rows} == {e}
            seen += rows
        assert seen == order[slot]


def test_two_runs_give_the_same_bits() -> None:
    leaves, ids, upstream = make(CASES["T63-odd-tail"])
    first, second = mix_and_gradients(leaves, ids, upstream), mix_and_gradients(leaves, ids, upstream)
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("layout", ["transposed", "strided", "outer-transposed"])
def test_any_strides(layout: str) -> None:
    leaves, ids, upstream = make(Case())
    want = mix_and_gradients(leaves, ids, upstream)
    with torch.device(device):
        odd = {n: odd_layouts(t)[layout].detach().requires_grad_() for n, t in leaves.items()}
        got = mix_and_gradients(odd, odd_layouts(ids)[layout], odd_layouts(upstream)[layout])
    assert_close(got, want, 1e-6)


def test_expanded_inputs_and_upstream_gradients() -> None:
    """``y.sum()`` sends a gradient of stride 0 in both dimensions; a broadcast row has it in one."""
    leaves, ids, upstream = make(Case())
    leaves |= {n: leaves[n].detach()[:1].expand(7, -1).requires_grad_() for n in ("x", "out")}
    for grad in (upstream.new_ones(()).expand_as(upstream), upstream[:1].expand_as(upstream)):
        assert_close(mix_and_gradients(leaves, ids, grad), oracle(leaves, ids, grad), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["no-dropout", "dropout"])
def test_leading_dimensions_and_dropout(dropout: float) -> None:
    leaves, ids, upstream = make(Case(T=12))
    cube = leaves | {n: leaves[n].detach().view(3, 4, -1).requires_grad_() for n in ("x", "out")}
    # Batch-first seen from sequence-first storage: no view of (T, D) exists.
    cube["x"] = cube["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    got = mix_and_gradients(cube, ids, upstream.view(3, 4, -1), dropout=dropout, seed=11)
    assert got["out"].shape == got["grad_out"].shape == (3, 4, 11) and got["grad_x"].shape == (3, 4, 13)
    keep = torch.rand(12, 13, generator=torch.Generator(device).manual_seed(11), device=device) >= dropout
    want = oracle(leaves, ids, upstream, keep.double().cpu() / (1 - dropout))
    assert_close({n: g.view(want[n].shape) for n, g in got.items()}, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float32], ids=["fp16-x", "fp32-x"])
def test_fp32_experts_in_an_fp16_model(x_dtype: torch.dtype) -> None:
    leaves, ids, upstream = make(Case(T=17, R=8))
    dtypes = {"x": x_dtype, "out": torch.float16}
    leaves = {n: t.detach().to(dtypes.get(n, torch.float32)).requires_grad_() for n, t in leaves.items()}
    upstream = upstream.half()
    got = mix_and_gradients(leaves, ids, upstream)
    assert got["out"].dtype == torch.float16 and all(got[f"grad_{n}"].dtype == t.dtype for n, t in leaves.items())
    assert_close(got, oracle(leaves, ids, upstream), TOLERANCE[torch.float16])


def test_gradients_of_single_inputs() -> None:
    """A frozen input must not change the gradients of the others."""
    leaves, ids, upstream = make(Case())
    want = mix_and_gradients(leaves, ids, upstream)
    frozen = {n: t.detach() for n, t in leaves.items()}
    for name, leaf in leaves.items():
        got = gradients([mix(frozen | {name: leaf}, ids)], {name: leaf}, [upstream])
        assert torch.equal(got[f"grad_{name}"], want[f"grad_{name}"])
    assert mix(frozen, ids).grad_fn is None


def test_inplace_writes_into_out_where_it_is_contiguous() -> None:
    leaves, ids, upstream = make(Case())
    want = mix_and_gradients(leaves, ids, upstream)
    fresh = leaves["out"] * 1
    out = mix(leaves | {"out": fresh}, ids, inplace=True)
    assert out is fresh
    got = {"out": out} | gradients([out], leaves, [upstream])
    assert all(torch.equal(got[n], want[n]) for n in want)
    turned = leaves["out"].detach().T.contiguous().T
    assert torch.equal(mix(leaves | {"out": turned}, ids, inplace=True), want["out"])
    assert torch.equal(turned, leaves["out"])


def test_zero_B_gives_the_frozen_output_bit_for_bit() -> None:
    leaves, ids, _ = make(Case(), torch.float16)
    assert torch.equal(mix(leaves | {"B": torch.zeros_like(leaves["B"])}, ids), leaves["out"])


def test_no_tokens() -> None:
    leaves, ids, upstream = make(Case(T=0))
    got = mix_and_gradients(leaves, ids, upstream, dropout=0.1, inplace=False)
    assert got["out"].shape == (0, 11) and not any(got[f"grad_{n}"].any() for n in leaves)


def test_what_it_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, ids, _ = make(Case())
    with pytest.raises(ValueError, match=r"one A per expert, got A of \(1, 4, 13\) for 4 experts; use dense_masked"):
        mix(leaves | {"A": leaves["A"][:1]}, ids)
    with pytest.raises(TypeError, match="computes in fp32, bf16 or fp16, got an output of torch.float64"):
        mix(leaves | {"out": leaves["out"].double()}, ids)
    with pytest.raises(ValueError, match=r"gates of \(7, 4\) and topk_ids of \(7, K\), got \(7, 4\) and \(6, 2\)"):
        mix(leaves, ids[1:])
    (grad,) = torch.autograd.grad(mix(leaves, ids).square().sum(), leaves["A"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    monkeypatch.setattr(grouped, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a GPU, got x on cpu; use dense_masked there"):
        mix({n: t.cpu() for n, t in leaves.items()}, ids.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("R", [16, 64])
def test_many_experts(R: int, dtype: torch.dtype) -> None:
    case = Case(T=4097, E=64, R=R, D=520, O=264)
    leaves, ids, upstream = make(case, dtype)
    got = mix_and_gradients(leaves, ids, upstream)
    v = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
    ranks = torch.einsum("td,erd->ter", v["x"], v["A"]) * v["gates"].unsqueeze(-1)
    out = v["out"] + SCALING * torch.einsum("ter,ero->to", ranks, v["B"])
    want = {"out": out} | gradients([out], v, [upstream])
    want["grad_gates"] = want["grad_gates"] * torch.zeros_like(v["gates"]).scatter(1, ids, 1.0)
    assert_close(got, want, TOLERANCE[dtype])
    again = mix_and_gradients(leaves, ids, upstream)
    assert all(torch.equal(got[n], again[n]) for n in got)


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    T, D, O, E, R = 140_000, 64, 16384, 8, 16
    assert T * O > 2**31
    case = Case(T=T, D=D, E=E, R=R, O=1)
    gates, ids = (t.to(device) for t in choose(case, E))
    make_leaf = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16, device=device)  # noqa: E731
    A, B = make_leaf(E, R, D) / D**0.5, make_leaf(E, R, O) / R**0.5
    leaves = {"x": make_leaf(T, D), "out": make_leaf(T, O), "A": A, "B": B, "gates": gates.float()}
    leaves = {n: t.requires_grad_() for n, t in leaves.items()}
    upstream = make_leaf(T, O)
    got = mix_and_gradients(leaves, ids, upstream)
    some = torch.tensor([0, 1, 2**31 // O - 1, 2**31 // O, T - 2, T - 1], device=device)
    part = {n: t if n in "AB" else t[some] for n, t in leaves.items()}
    want = oracle(part, ids[some], upstream[some])
    rows = ("out", "grad_x", "grad_out", "grad_gates")
    assert_close({n: got[n][some] for n in rows}, {n: want[n] for n in rows}, TOLERANCE[torch.bfloat16])
    # The weight gradients sum over all tokens: expert 3's, against matrix products of its rows.
    gate = SCALING * leaves["gates"].detach()[:, 3:4]
    tokens = gate[:, 0].nonzero()[:, 0]
    x, dy, gate = leaves["x"].detach()[tokens].float(), upstream[tokens].float(), gate[tokens]
    assert error(got["grad_B"][3], (gate * (x @ A[3].T.float())).T @ dy) <= TOLERANCE[torch.bfloat16]
    assert error(got["grad_A"][3], (gate * (dy @ B[3].T.float())).T @ x) <= TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_a_cuda_graph_follows_the_routing() -> None:
    case = Case(T=65, E=7, R=16, D=64, O=96)
    leaves, ids, _ = make(case, torch.bfloat16)
    leaves = {n: t.detach() for n, t in leaves.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        mix(leaves, ids)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mix(leaves, ids)
    for load in ("mixed", "one", "unused"):
        gates, chosen = choose(Case(T=65, E=7, load=load), 7)
        leaves["gates"].copy_(gates)
        ids.copy_(chosen)
        graph.replay()
        assert torch.equal(captured, mix(leaves, ids))
