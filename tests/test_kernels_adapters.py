"""The adapters to other packages' grouped GEMMs against the token loop: the algorithm, each backend's glue, refusals.

On a CPU, PyTorch's grouped GEMM runs for real; MegaBlocks is replaced by the functions below, written in plain torch to
what its sources say. With -m gpu the real packages run, where they are installed.
Legend: T tokens, D input features, O output features, E experts, K top-k, R rank of one expert, N = T*K routed rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from kernel_cases import (
    SCALING,
    TOLERANCE,
    Case,
    Leaves,
    assert_close,
    autocast,
    choose,
    double,
    experts,
    gradients,
    leaves_of,
    odd_layouts,
)
from test_kernels import oracle_linear
from torch import Tensor

from molora.kernels import grouped_gemms, megablocks_adapter, reference, torch_grouped_mm
from molora.kernels.reference import Projection

BF16, FP32 = torch.bfloat16, torch.float32
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = (4, 16, 64, 48)
ADAPTERS = {"torch": torch_grouped_mm, "megablocks": megablocks_adapter}

# D and O are multiples of 8, as both packages want; E, T and the number of rows per expert are not.
CASES = {
    "mixed": Case(D=24, O=40, R=8),
    "one-token": Case(T=1, D=16, O=8, R=8),
    "T63-prime-E": Case(T=63, E=7, D=32, O=24, R=16, K=3),
    "k1": Case(K=1, D=16, O=24, R=8),
    "kE": Case(K=4, D=16, O=24, R=8),
    "single-expert-one-row": Case(T=1, E=1, K=1, D=16, O=24, R=8),
    "R64": Case(T=31, E=5, D=72, O=16, R=64),
    "unused-expert": Case(T=9, load="unused", D=16, O=24, R=8),
    "all-on-one": Case(T=9, load="one", K=1, D=16, O=24, R=8),
}


def fake_megablocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs what the adapter calls of megablocks 0.10.0 and grouped_gemm 0.3.0, as strict about its arguments."""

    def sort(x: Tensor, end_bit: int) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.int32 and x.ndim == 1 and int(x.max()) < 2**end_bit
        values, order = x.sort(stable=True)
        return values, order.int()

    def gather(x: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int) -> Tensor:
        assert all(t.dtype == torch.int32 and t.ndim == 1 for t in (indices, bin_ids, bins))
        assert x.ndim == 2 and x.is_contiguous() and len(indices) == len(bin_ids) == len(x) * top_k
        return x[indices.long() // top_k]

    def scatter(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: None, bins: Tensor, top_k: int) -> Tensor:
        assert all(t.dtype == torch.int32 and t.ndim == 1 for t in (indices, bin_ids, bins))
        assert x.is_contiguous() and weights is None
        out = torch.empty_like(x)
        out[indices.long()] = x
        return out.view(-1, top_k, x.shape[1]).sum(1)

    def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool = False, trans_b: bool = False) -> Tensor:
        assert not (trans_a and trans_b) and a.ndim == 2 and b.ndim == (2 if trans_a else 3)
        assert a.is_contiguous() and b.is_contiguous() and a.dtype == b.dtype == BF16
        assert batch_sizes.dtype == torch.int64 and int(batch_sizes.sum()) == len(a)
        groups = a.split(batch_sizes.tolist())
        if trans_a:
            return torch.stack([g.T @ h for g, h in zip(groups, b.split(batch_sizes.tolist()), strict=True)])
        return torch.cat([g @ (w.T if trans_b else w) for g, w in zip(groups, b, strict=True)])

    ops = SimpleNamespace(sort=sort, gather=gather, scatter=scatter)
    ops.histogram = lambda x, num_bins: torch.bincount(x, minlength=num_bins).int()
    ops.inclusive_cumsum = lambda x, dim: x.cumsum(dim, dtype=x.dtype).squeeze()
    monkeypatch.setitem(sys.modules, "megablocks", SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "grouped_gemm", SimpleNamespace(backend=SimpleNamespace(gmm=gmm)))


@pytest.fixture(autouse=True)
def fresh_probes() -> Iterator[None]:
    """What a test taught the caches must not outlive it."""
    yield grouped_gemms.probe.cache_clear()
    grouped_gemms.probe.cache_clear()
    megablocks_adapter.sizes_stay_on_gpu.cache_clear()


Backend = tuple[ModuleType, torch.dtype]
BACKENDS: dict[str, Backend] = {
    "torch-fp32": (torch_grouped_mm, FP32),
    "torch-bf16": (torch_grouped_mm, BF16),
    "megablocks-bf16": (megablocks_adapter, BF16),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    module, dtype = BACKENDS[request.param]
    if module is megablocks_adapter:
        fake_megablocks(monkeypatch)
    return module, dtype


class Problem(NamedTuple):
    """Inputs of a case, and the mixture of one backend."""

    mixture: Callable[..., Tensor]
    v: Leaves
    ids: Tensor
    upstream: Tensor

    def mix(self, **options: Any) -> Tensor:
        """The output, with some of the leaves or of the options replaced."""
        v = self.v | {n: options.pop(n) for n in self.v if n in options}
        options.setdefault("topk_ids", self.ids)
        return self.mixture(v["x"], v["gates"], Projection(v["A"], v["B"], SCALING), v["out"], **options)

    def run(self, **options: Any) -> Leaves:
        """Output and gradients."""
        out = self.mix(**options)
        leaves = {n: options.get(n, t) for n, t in self.v.items()}
        return {"out": out} | gradients([out], leaves, [self.upstream])


def problem(case: Case, module: ModuleType, dtype: torch.dtype) -> Problem:
    A, B = experts(case, case.D, case.O)
    gates, ids = choose(case, case.E)
    tensors = {"x": torch.randn(case.T, case.D), "out": torch.randn(case.T, case.O), "A": A, "B": B, "gates": gates}
    return Problem(module.mixture_linear, leaves_of(tensors, dtype), ids, torch.randn(case.T, case.O).to(dtype))


@pytest.fixture
def mixed(backend: Backend) -> Problem:
    return problem(CASES["mixed"], *backend)


def exact(p: Problem, oracle: Callable[..., Tensor] = oracle_linear, mask: Tensor | float = 1.0) -> Leaves:
    """The truth in fp64. It has gradients of gates that were not chosen, and a dispatch has none."""
    v = double(p.v)
    out = oracle(v["x"] * mask, v["gates"], v["A"], v["B"], v["out"])
    want = {"out": out} | gradients([out], v, [p.upstream])
    chosen = torch.zeros_like(v["gates"]).scatter(1, p.ids, 1.0)
    return want | {"grad_gates": want["grad_gates"] * chosen}


def assert_equal(got: Leaves, want: Leaves) -> None:
    assert all(torch.equal(got[n], want[n]) for n in got.keys() | want.keys())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("poison_empty")
def test_output_and_gradients_equal_the_token_loop(case: Case, backend: Backend) -> None:
    p = problem(case, *backend)
    got = p.run()
    assert got["out"].dtype == p.upstream.dtype and all(got[f"grad_{n}"].dtype == t.dtype for n, t in p.v.items())
    assert_close(got, exact(p), TOLERANCE[p.upstream.dtype])
    if case.load == "unused":
        assert not got["grad_A"][0].any() and not got["grad_B"][0].any()


@pytest.mark.parametrize("layout", ["transposed", "strided", "outer-transposed", "flat-buffer"])
def test_any_strides_and_addresses(layout: str, mixed: Problem) -> None:
    """Sharded training keeps parameters as slices of one buffer, at addresses that grouped GEMMs refuse."""
    slices = lambda t: {"flat-buffer": torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)}  # noqa: E731
    change = lambda t: (odd_layouts(t) | slices(t))[layout].detach()  # noqa: E731
    odd = {n: change(t).requires_grad_() for n, t in mixed.v.items()}
    assert_equal(mixed._replace(v=odd, upstream=change(mixed.upstream)).run(), mixed.run())
    assert grouped_gemms._weights(odd["A"], odd["A"].dtype).data_ptr() % 16 == 0


def test_expanded_upstream_gradient(mixed: Problem) -> None:
    """``y.sum()`` sends a gradient of stride 0, which PyTorch's own backward of a grouped GEMM refuses."""
    ones = torch.ones_like(mixed.upstream)
    assert_equal(mixed._replace(upstream=ones[:1, :1].expand_as(ones)).run(), mixed._replace(upstream=ones).run())


def test_leading_dimensions_and_dropout(backend: Backend) -> None:
    p = problem(Case(T=12, D=24, O=40, R=8), *backend)
    keep = torch.rand(12, 24, generator=torch.Generator().manual_seed(11)) >= 0.4
    want = exact(p, mask=keep / 0.6)
    cube = p.v | {n: p.v[n].detach().view(3, 4, -1).requires_grad_() for n in ("x", "out")}
    # Batch-first seen from sequence-first storage: no view of (T, D) exists.
    cube["x"] = cube["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    got = p._replace(v=cube, upstream=p.upstream.view(3, 4, 40)).run(dropout=0.4, seed=11)
    assert got["out"].shape == (3, 4, 40) and got["grad_x"].shape == (3, 4, 24)
    assert_close({n: g.reshape(want[n].shape) for n, g in got.items()}, want, TOLERANCE[backend[1]])


@pytest.mark.parametrize("x_dtype", [BF16, FP32], ids=["bf16-x", "fp32-x"])
def test_fp32_masters_in_a_bf16_model(x_dtype: torch.dtype, backend: Backend) -> None:
    p = problem(CASES["T63-prime-E"], backend[0], FP32)
    for name, dtype in (("x", x_dtype), ("out", BF16)):
        p.v[name] = p.v[name].detach().to(dtype).requires_grad_()
    p = p._replace(upstream=p.upstream.to(BF16))
    got = p.run()
    assert got["out"].dtype == BF16 and all(got[f"grad_{n}"].dtype == t.dtype for n, t in p.v.items())
    assert_close(got, exact(p), TOLERANCE[BF16])


@pytest.mark.parametrize(("forward", "backward"), [(True, False), (False, True), (True, True)])
def test_autocast_changes_nothing(forward: bool, backward: bool, mixed: Problem) -> None:
    with autocast(forward):
        out = mixed.mix()
    with autocast(backward):
        got = {"out": out} | gradients([out], mixed.v, [mixed.upstream])
    assert_equal(got, mixed.run())


def test_inplace(mixed: Problem) -> None:
    fresh = mixed.v["out"] * 1
    result = mixed.mix(out=fresh, inplace=True)
    assert result is fresh
    assert_equal({"out": result} | gradients([result], mixed.v, [mixed.upstream]), mixed.run())
    # Never a silently wrong gradient: autograd counts the versions of what it saved.
    result = mixed.mix(out=mixed.v["out"].exp(), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_gradients_of_single_inputs(mixed: Problem) -> None:
    """A frozen input must not change the gradients of the others."""
    want = mixed.run()
    frozen = {n: t.detach() for n, t in mixed.v.items()}
    for name, leaf in mixed.v.items():
        (got,) = gradients([mixed.mix(**frozen | {name: leaf})], {name: leaf}, [mixed.upstream]).values()
        assert torch.equal(got, want[f"grad_{name}"])
    assert mixed.mix(**frozen).grad_fn is None
    assert torch.equal(mixed.mix(B=torch.zeros_like(mixed.v["B"])), mixed.v["out"])


def test_no_tokens(backend: Backend) -> None:
    got = problem(Case(T=0, D=16, O=24, R=8), *backend).run()
    assert got["out"].shape == (0, 24) and not any(g.any() for g in got.values())


def test_arguments_that_do_not_fit(mixed: Problem) -> None:
    with pytest.raises(ValueError, match=r"the experts share one A, of shape \(1, 8, 24\)"):
        mixed.mix(A=mixed.v["A"][:1])
    with pytest.raises(ValueError, match=r"expected gates of \(7, 4\) and topk_ids of \(7, K\), got \(7, 32\)"):
        mixed.mix(gates=mixed.v["gates"].repeat(1, 8))
    with pytest.raises(ValueError, match=r"got \(7, 4\) and \(6, 2\)"):
        mixed.mix(topk_ids=mixed.ids[1:])


def test_megablocks_refuses_what_would_overflow_its_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megablocks_adapter, "MAX_ELEMENTS", 7 * 2 * 40)
    with pytest.raises(ValueError, match=r"int32, too small for 14 routed rows of 40 features \(560 elements"):
        problem(CASES["mixed"], megablocks_adapter, BF16).mix()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_plans_lose_no_token(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_megablocks(monkeypatch)
    _, ids = choose(case, case.E)
    order, ends, inverse = torch_grouped_mm._sort(ids, case.E)
    counts = torch.bincount(ids.flatten(), minlength=case.E)
    assert torch.equal(order[inverse], torch.arange(ids.numel())) and torch.equal(ends, counts.cumsum(0).int())
    same_order, sizes, _, bin_ids, bins = megablocks_adapter._sort(ids, case.E)
    assert torch.equal(same_order, order) and torch.equal(sizes, counts) and torch.equal(bins, ends)
    assert torch.equal(bin_ids.long(), ids.flatten()[order])


@pytest.mark.parametrize("module", ADAPTERS.values(), ids=ADAPTERS)
def test_reasons_for_a_problem_of_another_kind(module: ModuleType) -> None:
    name = module.__name__.rpartition(".")[2].removesuffix("_adapter")
    for dtype in (torch.half, FP32):
        assert module.why_not(CUDA, dtype, SHAPE) == f"{name} computes in torch.bfloat16, not in {dtype}"
    for at, what in ((1, "rank R"), (2, "input features D"), (3, "output features O")):
        shape = (*SHAPE[:at], 12, *SHAPE[at + 1 :])
        reason = f"{name} needs rows of whole 16 bytes, and {what}=12 is not a multiple of 8"
        assert module.why_not(CUDA, BF16, shape) == reason
    reason = f"{name} has nothing to sort where the experts share one A, of shape (1, 16, 64); use dense_masked"
    assert module.why_not(CUDA, BF16, SHAPE, shares_A=True) == reason
    assert f"{name} runs on cuda" in str(module.why_not(torch.device("mps"), BF16, SHAPE))


def test_reasons_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert megablocks_adapter.why_not(CPU, BF16, SHAPE) == "megablocks runs on cuda, not on cpu"
    reason = "torch_grouped_mm computes in torch.bfloat16 or torch.float32, not in torch.float64"
    assert torch_grouped_mm.why_not(CPU, torch.float64, SHAPE) == reason
    for package in ("megablocks", "grouped_gemm"):
        fake_megablocks(monkeypatch)
        monkeypatch.setitem(sys.modules, package, None)
        reason = str(megablocks_adapter.why_not(CUDA, BF16, SHAPE))
        assert f"import of {package} halted" in reason and reason.endswith("docs/kernels.md says how to install it")


def test_right_numbers_pass_the_probe(backend: Backend) -> None:
    module, dtype = backend
    state = torch.get_rng_state()
    with torch.inference_mode(), autocast(True):
        assert grouped_gemms.probe(module.mixture_linear, CPU, dtype) is None
    assert torch.equal(torch.get_rng_state(), state), "the probe drew from the global generator"
    if module is torch_grouped_mm:
        assert module.why_not(CPU, dtype, SHAPE) is None


def test_wrong_numbers_fail_the_probe(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    module, dtype = backend
    _, gather, combine, gemm = right = module.PRIMITIVES

    def unwritten(
        a: Tensor, b: Tensor, plan: grouped_gemms.Plan, trans_a: bool = False, trans_b: bool = False
    ) -> Tensor:
        """Leaves the gradient of an expert without rows as it was allocated."""
        out = gemm(a, b, plan, trans_a, trans_b)
        return torch.where(out == 0, torch.nan, out) if trans_a else out

    for text, wrong in (
        ("gradient of A nan, gradient of B nan", right._replace(gemm=unwritten)),
        ("output ", right._replace(combine=lambda rows, plan, K: combine(rows.roll(1, 0), plan, K))),
        ("output ", right._replace(gather=lambda tokens, plan, K: gather(tokens.roll(1, 0), plan, K))),
    ):
        grouped_gemms.probe.cache_clear()
        monkeypatch.setattr(module, "PRIMITIVES", wrong)
        reason = str(grouped_gemms.probe(module.mixture_linear, CPU, dtype))
        assert f"fails its probe on cpu with relative errors of {text}" in reason


def test_the_probe_runs_once_and_keeps_the_text_of_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", broken)
    for _ in range(2):
        reason = torch_grouped_mm.why_not(CPU, BF16, SHAPE)
        assert reason == "torch_grouped_mm fails its probe on cpu with RuntimeError: no kernel image is available"
    assert len(calls) == 1


@pytest.mark.parametrize("stay", [True, False], ids=["cutlass", "cublas"])
def test_which_build_of_grouped_gemm(stay: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Tensor:
        raise RuntimeError("Expected batch_sizes.is_cpu() to be true, but got false.")

    fake_megablocks(monkeypatch)
    if not stay:
        monkeypatch.setattr(sys.modules["grouped_gemm"].backend, "gmm", refuse)
    assert megablocks_adapter.sizes_stay_on_gpu(CPU) is stay
    monkeypatch.setattr(grouped_gemms, "probe", lambda *args: None)
    monkeypatch.setattr(megablocks_adapter, "sizes_stay_on_gpu", lambda device: stay)
    assert megablocks_adapter.why_not(CUDA, BF16, (512, *SHAPE[1:])) is None
    limit = "megablocks takes at most 512 experts with grouped_gemm's CUTLASS build, not 513"
    assert megablocks_adapter.why_not(CUDA, BF16, (513, *SHAPE[1:])) == (limit if stay else None)


REAL_SIZE = {"real-size": Case(T=4097, E=64, R=16, D=1024, O=2816)}


@pytest.mark.gpu
@pytest.mark.parametrize("case", (CASES | REAL_SIZE).values(), ids=CASES | REAL_SIZE)
@pytest.mark.parametrize("module", ADAPTERS.values(), ids=ADAPTERS)
def test_real_packages_on_a_gpu(module: ModuleType, case: Case) -> None:
    reason = module.why_not(CUDA, BF16, (case.E, case.R, case.D, case.O))
    if reason and "cannot be imported" in reason:
        pytest.skip(reason)
    assert reason is None
    p = problem(case, module, BF16)
    v = {n: t.detach().cuda().requires_grad_() for n, t in p.v.items()}
    p = p._replace(v=v, ids=p.ids.cuda(), upstream=p.upstream.cuda())
    got = p.run()
    # Not the token loop, which would take minutes: test_kernels holds the reference to it.
    truth = lambda x, gates, A, B, out: reference.mixture_linear(x, gates, Projection(A, B, SCALING), out)  # noqa: E731
    assert_close(got, exact(p, truth), TOLERANCE[BF16])
    # Repeatable bit for bit, and untouched by autocast, which casts sums to fp32 and the inputs of MegaBlocks to fp16.
    with torch.autocast("cuda", torch.half):
        assert_equal(p.run(), got)


@pytest.mark.gpu
def test_torch_in_a_cuda_graph_follows_a_changed_routing() -> None:
    if torch.cuda.get_device_capability() not in ((9, 0), (10, 0)):
        pytest.skip("PyTorch's grouped GEMM syncs on this GPU")
    case = Case(T=64, E=8, R=16, D=64, O=96)
    p = problem(case, torch_grouped_mm, BF16)
    p = p._replace(v={n: t.detach().cuda() for n, t in p.v.items()}, ids=p.ids.cuda())
    p.mix()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = p.mix()
    gates, ids = choose(case, case.E)
    p.v["gates"].copy_(gates)
    p.ids.copy_(ids)
    graph.replay()
    assert torch.equal(out, p.mix())
