"""A mixture of a linear for a few tokens by Triton, without gradients: against fp64, and inside a CUDA graph.

On a GPU, or in Triton's interpreter on the CPU.
Legend: T tokens, D input features, N output features, E experts, K top-k, R rank of one expert, C ranks in all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import CASES, SCALING, Case, choose, error
from peft import get_peft_model
from test_kernels import linear, linear_leaves, oracle_linear
from tiny_models import VOCAB, base_model, config
from torch import Tensor

pytest.importorskip("triton", reason="these kernels are Triton's")
from molora import record_routing
from molora.kernels import decode, dense_masked
from molora.kernels.shrink import shrink

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, FP16 = torch.float32, torch.float16

# RMS(error) / RMS(fp64 on the same rounded inputs), with the worst over all cases in the interpreter. Products and sums
# are fp32 whatever the inputs are; fp16 rounds the result alone.
TOLERANCE = {FP32: 1e-6, FP16: 5e-4}  # 1.4e-7, 2.7e-4

# E, R, N and how experts are gated
GATING = {
    "k2": Case(E=6, R=16, O=130),
    "odd": Case(E=5, R=3, O=65, K=3),
    "kE": Case(E=3, R=5, O=11, K=3),
    "blocks-of-ranks": Case(E=3, R=40, O=7),
    "rank-wise": Case(E=1, R=64, O=40, K=8, gating="ranks"),
    "shared-A": Case(E=5, R=4, O=40, gating="shared_A"),
    "ungated": Case(E=1, R=8, O=33, gating="none"),
    "dense": Case(E=7, R=5, O=64, gating="dense"),
}


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, triton_on_cpu: None) -> list[str]:
    """The names of the decode kernels that are launched."""
    names: list[str] = []
    for name in ("shrink_few", "gated_few", "add_few_", "expand_few_"):
        run = getattr(decode, name)
        # The defaults bind this turn's values.
        counted = lambda *args, run=run, name=name: (names.append(name), run(*args))[1]  # noqa: E731
        monkeypatch.setattr(decode, name, counted)
    return names


# T, D, dtypes of x and of the matrices; the sums for the ranks come in parts where D is large.
SHRINKS = [
    (1, 33, FP32, FP32),
    (1, 4100, FP16, FP32),
    (3, 300, FP32, FP32),
    (3, 1100, FP16, FP32),
    (3, 600, FP16, FP16),
    (8, 33, FP16, FP16),
    (16, 33, FP32, FP32),
    (33, 600, FP16, FP16),
    (64, 70, FP16, FP32),
]


@pytest.mark.parametrize(("T", "D", "x_dtype", "dtype"), SHRINKS)
@pytest.mark.usefixtures("poison_empty")
def test_shrink_few(T: int, D: int, x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Of more matrices than go into one launch."""
    x = torch.randn(T, D, device=DEVICE).to(x_dtype)
    experts, routers = ([torch.randn(n, D, device=DEVICE).to(dtype) for n in rows] for rows in ((5, 17, 2, 1), (4, 3)))
    # Experts' masters may be rounded to the dtype of x, as in training; a router's are not.
    rounding = 1e-6 if x_dtype == dtype else 5e-4
    for own in ((experts, routers), (experts[:1], []), ([], routers))[: 3 if D == 33 else 1]:
        ranks, logits = decode.shrink_few(x, *own)
        for found, matrices, tolerance in zip(([t.sum(0) for t in ranks], logits), own, (rounding, 1e-6), strict=True):
            assert [t.shape for t in found] == [(T, len(m)) for m in matrices]
            if matrices:
                got, want = torch.cat(found, 1), x.double() @ torch.cat(matrices).double().T
                assert got.dtype == FP32 and error(got, want) <= tolerance  # 3.0e-7, 2.5e-4


def test_a_row_of_few_does_not_depend_on_the_others() -> None:
    x, m = torch.randn(8, 70, device=DEVICE), torch.randn(6, 70, device=DEVICE)
    other = torch.cat([x[:3], 100 * torch.randn_like(x[3:])])
    (ranks,), (logits,) = decode.shrink_few(x, [m], [m])
    (other_ranks,), (other_logits,) = decode.shrink_few(other, [m], [m])
    assert torch.equal(ranks[:, :3], other_ranks[:, :3]) and torch.equal(logits[:3], other_logits[:3])


def make(case: Case, dtype: torch.dtype, B_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Any, Tensor]:
    """y (T, N), ranks of the input, gates, the choices (T, K), and B (E, R, N)."""
    T, C = case.T, case.E * case.R
    B = torch.randn(case.E, case.R, case.O)
    gates = ids = None
    if case.gating == "dense":
        gates = torch.rand(T, case.E)
    elif case.gating != "none":
        gates, ids = choose(case, C if case.gating == "ranks" else case.E)
        gates, ids = gates.float().to(DEVICE), ids.to(DEVICE)
    # Rows apart, as the ranks of one linear among those of others are.
    shrunk = torch.randn(T, (case.R if case.gating == "shared_A" else C) + 5)[:, 2:-3]
    y = torch.randn(T, case.O).to(DEVICE, dtype)
    return y, shrunk.to(DEVICE), None if gates is None else gates.to(DEVICE), ids, B.to(DEVICE, B_dtype)


def expanded(y: Tensor, shrunk: Tensor, gates: Tensor | None, B: Tensor) -> Tensor:
    """The token loop in fp64, with the ranks in the place of an input and ones on the diagonal of A."""
    width = shrunk.shape[1]
    eye = torch.eye(width, dtype=torch.float64)
    A = eye.expand(1, -1, -1) if width < B.shape[0] * B.shape[1] else eye.view(B.shape[0], -1, width)
    inputs = [None if t is None else t.double().cpu() for t in (shrunk, gates, B, y)]
    return oracle_linear(inputs[0], inputs[1], A, inputs[2], inputs[3]).to(DEVICE)


@pytest.mark.parametrize(("name", "T"), [*itertools.product(GATING, [1, 3]), ("odd", 16), ("odd", 40), ("shared-A", 8)])
@pytest.mark.usefixtures("poison_empty")
def test_expand_few(name: str, T: int) -> None:
    for dtype, B_dtype in ((FP32, FP32), (FP16, FP32), (FP16, FP16)) if T == 1 else ((FP16, FP32),):
        case = Case(**{**vars(GATING[name]), "T": T})
        y, shrunk, gates, ids, B = make(case, dtype, B_dtype)
        want = expanded(y, shrunk, gates, B)
        # What follows y in memory is somebody else's.
        whole = torch.cat([y.flatten(), torch.full((200,), 7.0, device=DEVICE, dtype=dtype)])
        inner = whole[: y.numel()].view(y.shape)
        found = decode.expand_few_(inner, shrunk, gates, ids, B.flatten(0, 1), SCALING)
        assert found is inner and bool((whole[y.numel() :] == 7).all())
        assert error(found, want) <= TOLERANCE[dtype]
        if ids is not None and T < 8:
            again = decode.expand_few_(y.clone(), shrunk, gates, None, B.flatten(0, 1), SCALING)
            assert error(again, want) <= TOLERANCE[dtype]


# All rows of B are multiplied, or those that were chosen: by the number of ranks up to which the former is done.
every_way = pytest.mark.parametrize("max_ranks", [256, 0], ids=["product", "chosen-rows"])
LAUNCHES = {256: ["add_few_"], 0: ["expand_few_"]}


@every_way
@pytest.mark.parametrize("name", ["odd", "rank-wise", "shared-A", "ungated"])
def test_ranks_may_come_in_parts_of_a_sum(
    name: str, max_ranks: int, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "MAX_RANKS", max_ranks)
    y, shrunk, gates, ids, B = make(GATING[name], FP32, FP32)
    want = expanded(y, shrunk, gates, B)
    # Between those of other linears, as `shrink_few` leaves them.
    parts = torch.full((3, 7, shrunk.shape[1] + 4), math.nan, device=DEVICE)[..., 1:-3]
    parts.copy_(torch.randn(3, *shrunk.shape))
    parts[2] = shrunk - parts[0] - parts[1]
    found = dense_masked.expand(parts, gates, B, SCALING, y, topk_ids=ids)
    assert launches == LAUNCHES[max_ranks] and error(found, want) <= TOLERANCE[FP32]
    one = dense_masked.expand(shrunk.unsqueeze(0), gates, B, SCALING, y, topk_ids=ids)
    assert error(one, want) <= TOLERANCE[FP32]
    # An output that the decode kernels do not take.
    launches.clear()
    spread = torch.stack([y, y], 2)[..., 0]
    found = dense_masked.expand(parts, gates, B, SCALING, spread, topk_ids=ids)
    assert not launches and error(found, want) <= TOLERANCE[FP32]


@pytest.mark.parametrize(("dtype", "B_dtype"), [(FP32, FP32), (FP16, FP32), (FP16, FP16), (FP32, FP16)])
@pytest.mark.parametrize(("T", "C", "N"), [(1, 5, 33), (16, 64, 64), (7, 136, 70), (50, 40, 70)])
@pytest.mark.usefixtures("poison_empty", "triton_on_cpu")
def test_gated_ranks_times_all_rows(T: int, C: int, N: int, dtype: torch.dtype, B_dtype: torch.dtype) -> None:
    y, shrunk = torch.randn(T, N, device=DEVICE).to(dtype), torch.randn(2, T, C, device=DEVICE)
    gates, B = torch.rand(T, C, device=DEVICE), torch.randn(C, N, device=DEVICE).to(B_dtype)
    gated = decode.gated_few(shrunk, gates, C, SCALING, dtype)
    ranks = SCALING * gates.double() * shrunk.double().sum(0)
    assert gated.dtype == dtype and error(gated, ranks) <= TOLERANCE[dtype]
    # The masters of B are multiplied in the dtype of y, as in training.
    want = y.double() + gated.double() @ B.double()
    at_once = decode.add_few_(y.clone(), shrunk, gates, B, SCALING)
    found = decode.add_few_(y, gated, None, B, 1.0)
    assert found is y and error(found, want) <= TOLERANCE[dtype]
    assert torch.equal(at_once, found)  # a graph takes the two steps


@pytest.mark.parametrize("name", ["k2", "odd", "rank-wise", "shared-A"])
def test_rows_of_experts_that_were_not_chosen_are_not_read(name: str) -> None:
    y, shrunk, gates, ids, B = make(GATING[name], FP32, FP32)
    assert gates is not None
    absent = 1 if name == "rank-wise" else 2
    # Every choice moves to another gate than the absent one, and no token has the same twice.
    G = gates.shape[1]
    ids = (torch.arange(len(y), device=DEVICE)[:, None] + torch.arange(ids.shape[1], device=DEVICE)) % (G - 1)
    ids = (ids + (ids >= absent)).flip(1)
    gates = torch.zeros_like(gates).scatter(1, ids, torch.rand(ids.shape, device=DEVICE))
    want = expanded(y, shrunk, gates, B)
    rows = B.flatten(0, 1).unflatten(0, (G, -1))
    rows[absent] = math.nan
    if shrunk.shape[1] == B.shape[0] * B.shape[1]:
        shrunk.unflatten(1, (G, -1))[:, absent] = math.nan
    gates[:, absent] = math.nan
    found = decode.expand_few_(y, shrunk, gates, ids, rows.flatten(0, 1), SCALING)
    assert error(found, want) <= TOLERANCE[FP32]


def test_what_takes_refuses(request: pytest.FixtureRequest) -> None:
    x, m = torch.randn(2, 8, 6), torch.randn(4, 6)
    assert not decode.takes(x, [m])  # on a CPU
    request.getfixturevalue("triton_on_cpu")
    assert decode.takes(x, [m]) and decode.takes(x[0, 0], [m, m]) and decode.takes(x, [])
    assert not decode.takes(torch.randn(65, 6), [m])
    assert not decode.takes(x[:, :0], [m])
    assert not decode.takes(x.transpose(0, 1), [m]) and not decode.takes(x[..., ::2], [m[:, :3].contiguous()])
    assert not decode.takes(x, [m, m.T.contiguous().T])
    with torch.enable_grad():
        assert not decode.takes(x, [m])


@every_way
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", ["mixed", "one-token", "kE", "rank-wise", "shared-A", "ungated"])
def test_a_mixture_without_gradients_is_that_with_them(
    name: str, dtype: torch.dtype, max_ranks: int, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "MAX_RANKS", max_ranks)
    case, inplace = CASES[name], name != "mixed"
    leaves = {n: t.detach().to(DEVICE) for n, t in linear_leaves(case, dtype).items()}
    ids = leaves["gates"].topk(case.K).indices if "gates" in leaves else None
    with torch.enable_grad():
        want = linear(dense_masked.mixture_linear, leaves, topk_ids=ids)
    assert not launches
    out = leaves["out"].clone()
    found = linear(dense_masked.mixture_linear, leaves | {"out": out}, topk_ids=ids, inplace=inplace)
    assert launches == ["shrink_few", *LAUNCHES[max_ranks]]
    assert (found is out) == inplace and torch.equal(out, leaves["out"]) != inplace
    assert found.dtype == dtype and error(found, want) <= {FP32: 1e-6, FP16: 2e-3}[dtype]


def test_what_the_decode_kernels_cannot_do_goes_the_other_way(launches: list[str]) -> None:
    leaves = {n: t.detach().to(DEVICE) for n, t in linear_leaves(Case(T=65), FP32).items()}
    linear(dense_masked.mixture_linear, leaves)
    few = leaves | {n: leaves[n][:3] for n in ("x", "out", "gates")}
    linear(dense_masked.mixture_linear, few, dropout=0.1)
    linear(dense_masked.mixture_linear, few | {"x": few["x"].half()})
    assert launches == 2 * LAUNCHES[256]  # dropout, and another dtype of x, are the shrink's affair


def test_shrink_of_a_few_tokens_has_the_same_ranks_and_logits(launches: list[str]) -> None:
    x, A, W = (torch.randn(*shape, device=DEVICE) for shape in ((2, 3, 13), (5, 13), (4, 13)))
    few = shrink(x, [A, A[:2]], [W])
    assert launches == ["shrink_few"]
    with torch.enable_grad():
        many = shrink(x, [A, A[:2]], [W])
    for a, b in zip((*few.ranks, *few.logits), (*many.ranks, *many.logits), strict=True):
        assert error(a.sum(0) if a.dim() == 3 else a, b) < 1e-6


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def capture(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `run`, after runs that compile and choose, and what it returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


@pytest.mark.gpu
@every_way
@pytest.mark.parametrize("T", [1, 8])
@pytest.mark.parametrize("placement", ["linear", "block"])
def test_a_whole_model_in_a_cuda_graph_follows_the_routing(
    placement: str, T: int, max_ranks: int, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "MAX_RANKS", max_ranks)
    base = base_model(dtype=torch.bfloat16)
    model = get_peft_model(base, config(placement, init_lora_weights=False)).cuda().eval()
    ids = torch.zeros(1, T, dtype=torch.int64, device="cuda")
    # A mask that is there already: transformers makes another one, or none, depending on whether it is captured.
    mask = torch.ones(1, 1, T, T, dtype=torch.bool, device="cuda").tril()
    run = lambda: model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # noqa: E731
    graph, captured = capture(run)
    seen, choices = [], []
    for seed in range(3):
        ids.copy_(torch.randint(3, VOCAB, (1, T), generator=torch.Generator().manual_seed(seed)))
        launches.clear()
        with record_routing(model) as recorded:
            want = run()
        assert launches.count(LAUNCHES[max_ranks][-1]) == 2 * 7
        choices.append(torch.cat([recorded[name].topk_ids.sort(1).values.flatten() for name in recorded]))
        graph.replay()
        assert torch.equal(captured, want)
        seen.append(want)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(choices[0], choices[1])


@pytest.mark.gpu
def test_bf16_of_a_models_size() -> None:
    case = Case(T=8, E=8, R=16, O=1000)
    y, shrunk, gates, ids, B = make(case, torch.bfloat16, torch.bfloat16)
    want = expanded(y, shrunk, gates, B)
    assert error(decode.expand_few_(y, shrunk, gates, ids, B.flatten(0, 1), SCALING), want) <= 4e-3
    x, m = (torch.randn(n, 4096, device=DEVICE).to(torch.bfloat16) for n in (8, 128))
    (ranks,), (logits,) = decode.shrink_few(x, [m], [m.float()])
    assert max(error(found, x.double() @ m.double().T) for found in (ranks.sum(0), logits)) <= 2e-6
