"""Several skinny matrices times one input, the gradient of that input, and products of small inner size.

On a GPU, or on the CPU with Triton's kernels interpreted. The truth is autograd of plain products in fp64.
Legend: T tokens, D input features, N features, C ranks of one linear's experts, G gates of one router, K inner size.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_cases import TOLERANCE, Leaves, assert_close, double, error, every_dtype, gradients
from torch import Tensor
from torch.nn import functional as F

from molora.kernels import shrink as module
from molora.kernels import skinny
from molora.kernels.shrink import ALIGNMENT, Input, Shrunk, _pack, shrink

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Rows of the experts' matrices and of the routers'.
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "one": ((5,), ()),
    "aligned": ((16,), ()),
    "several": ((5, 12, 1), ()),
    "with-router": ((5, 12), (3,)),
    "with-routers": ((4, 3), (3, 5, 2)),
    "router-only": ((), (7,)),
}


def make(sizes: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype, lead: tuple[int, ...] = (2, 9)) -> Leaves:
    """x (..., D) and experts in `dtype`; routers in fp32 at least, as they are trained."""
    leaves: Leaves = {"x": torch.randn(*lead, 13, device=DEVICE).to(dtype)}
    for kind, rows in zip("AW", sizes, strict=True):
        wide = dtype if kind == "A" else torch.promote_types(dtype, torch.float32)
        leaves |= {f"{kind}{i}": torch.randn(n, 13, device=DEVICE).to(wide) / 4 for i, n in enumerate(rows)}
    return {n: t.requires_grad_() for n, t in leaves.items()}


def run(v: Leaves, x: Tensor | Input | None = None, **options: Any) -> Shrunk:
    experts, routers = ([v[n] for n in v if n[0] == kind] for kind in "AW")
    return shrink(v["x"] if x is None else x, experts, routers, **options)


def plain(v: Leaves, mask: Tensor | float = 1.0) -> list[Tensor]:
    x = (v["x"] * mask).flatten(0, -2)
    return [x @ m.T for n, m in v.items() if n[0] in "AW"]


def named(outputs: list[Tensor]) -> Leaves:
    return {f"out{i}": t for i, t in enumerate(outputs)}


@every_dtype
@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["no-dropout", "dropout"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.usefixtures("poison_empty")
def test_shrink_equals_plain_products(
    sizes: tuple[tuple[int, ...], tuple[int, ...]], dropout: float, dtype: torch.dtype
) -> None:
    leaves = make(sizes, dtype)
    found = run(leaves, dropout=dropout, seed=7)
    outputs = [*found.ranks, *found.logits]
    assert [len(t) for t in outputs] == [18] * len(outputs)
    assert all(t.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for t in found.logits)
    upstream = [torch.randn_like(t) for t in outputs]
    got = named(outputs) | gradients(outputs, leaves, upstream)
    assert all(got[f"grad_{n}"].dtype == t.dtype for n, t in leaves.items())

    keep = torch.rand(2, 9, 13, generator=torch.Generator(DEVICE).manual_seed(7), device=DEVICE) >= dropout
    exact = double(leaves)
    want = plain(exact, keep.double() / (1 - dropout))
    assert_close(got, named(want) | gradients(want, exact, upstream), TOLERANCE[dtype])


@every_dtype
def test_gradients_of_some_outputs_and_of_some_inputs(dtype: torch.dtype) -> None:
    leaves = make(SIZES["with-router"], dtype)
    exact, upstream = double(leaves), torch.randn(18, 12, device=DEVICE).to(dtype)
    some = run(leaves).ranks[1]
    want = gradients([plain(exact)[1]], exact, [upstream])
    assert_close(gradients([some], leaves, [upstream.to(some.dtype)]), want, TOLERANCE[dtype])
    for name, leaf in leaves.items():
        alone = {n: t if n == name else t.detach() for n, t in leaves.items()}
        outputs = [*run(alone).ranks, *run(alone).logits]
        given = [torch.ones_like(t) for t in outputs]
        want = gradients(plain(exact), {name: exact[name]}, given)
        assert_close(gradients(outputs, {name: leaf}, given), want, TOLERANCE[dtype])
    assert run({n: t.detach() for n, t in leaves.items()}).ranks[0].grad_fn is None


def test_fp32_experts_and_another_compute_dtype() -> None:
    """As under autocast: x and the experts in fp32, the products in bf16."""
    leaves = make(SIZES["with-router"], torch.float32)
    exact = double(leaves)
    for x in (leaves["x"], Input(leaves["x"], True)):
        frozen = [] if isinstance(x, Tensor) else [x.x.flatten(0, -2).sin()]
        found = run(leaves, x, dtype=torch.bfloat16)
        outputs = [*frozen, *found.ranks, *found.logits]
        assert found.logits[0].dtype == torch.float32
        upstream = [torch.randn_like(t) for t in outputs]
        got = gradients(outputs, leaves, upstream)
        assert all(g.dtype == torch.float32 for g in got.values())
        want = [exact["x"].flatten(0, -2).sin()] * len(frozen) + plain(exact)
        assert_close(got, gradients(want, exact, upstream), TOLERANCE[torch.bfloat16])


def test_nothing_to_shrink_and_no_tokens() -> None:
    assert shrink(torch.randn(3, 4), [], []) == Shrunk([], [])
    leaves = make(SIZES["with-router"], torch.float32, (2, 0))
    found = run(leaves)
    outputs = [*found.ranks, *found.logits]
    assert [tuple(t.shape) for t in outputs] == [(0, 5), (0, 12), (0, 3)]
    assert not any(g.any() for g in gradients(outputs, leaves, outputs).values())


def test_a_second_derivative_raises() -> None:
    leaves = make(SIZES["one"], torch.float64)
    (grad,) = torch.autograd.grad(run(leaves).ranks[0].square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# -- the gradient of x, completed once ---------------------------------------------------------------------------------

# How often frozen linears and shrinks read x, and which of their outputs are used.
READERS = {
    "one-linear": (1, 1, "both"),
    "two-linears": (2, 1, "both"),
    "two-shrinks": (1, 2, "both"),
    "shrink-unused": (2, 1, "frozen"),
    "linears-unused": (1, 1, "shrunk"),
    "no-linear": (0, 2, "both"),
}


def read(leaves: Leaves, x: Input, frozen: list[Tensor], num_shrinks: int, used: str) -> list[Tensor]:
    outputs = [F.linear(x.x, W) for W in frozen]
    founds = [run(leaves, x) for _ in range(num_shrinks)]
    if used == "frozen":
        return outputs
    shrunk = [t for found in founds for t in (*found.ranks, *found.logits)]
    return shrunk if used == "shrunk" else outputs + shrunk


@every_dtype
@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "out-of-place"])
@pytest.mark.parametrize(("num_linears", "num_shrinks", "used"), READERS.values(), ids=READERS)
@pytest.mark.usefixtures("poison_empty")
def test_the_gradient_of_x_is_that_of_all_readers(
    num_linears: int, num_shrinks: int, used: str, in_place: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = make(SIZES["with-router"], dtype)
    frozen = [torch.randn(10, 13, device=DEVICE).to(dtype) / 4 for _ in range(num_linears)]
    added: list[int] = []
    add = module.add_product_
    monkeypatch.setattr(module, "add_product_", lambda y, p, m: (added.append(len(y)), add(y, p, m))[1])
    x = Input(leaves["x"] * 1, in_place)
    outputs = read(leaves, x, frozen, num_shrinks, used)
    upstream = [torch.randn_like(t) for t in outputs]
    got = gradients(outputs, leaves, upstream)
    # In place there is one addition for each shrink, into the gradient that the linears or the first of them left.
    whole = num_shrinks if num_linears and used == "both" else num_shrinks - 1
    assert len(added) == (whole if in_place and used != "frozen" else 0)
    assert not x.left

    exact = double(leaves)
    want = [exact["x"] @ W.double().T for W in frozen] if used != "shrunk" else []
    want += plain(exact) * num_shrinks if used != "frozen" else []
    assert_close(got, gradients(want, exact, upstream), TOLERANCE[dtype])


def test_a_gradient_that_others_may_hold_is_left_alone() -> None:
    for in_place in (False, True):
        leaves = make(SIZES["one"], torch.float32)
        x = Input(leaves["x"] * 1, in_place)
        held: list[Tensor] = []
        x.x.register_hook(held.append)
        upstream = torch.randn(2, 9, 13, device=DEVICE)
        outputs = [x.x * 2, run(leaves, x).ranks[0]]
        gradients(outputs, leaves, [upstream, torch.randn_like(outputs[1])])
        assert torch.equal(held[0], 2 * upstream) != in_place  # in place it shows, or this test would see nothing


def test_a_gradient_that_is_no_whole_tensor_is_not_added_into() -> None:
    """``x.sum()`` sends one of stride 0."""
    leaves = make(SIZES["one"], torch.float64)
    x = Input(leaves["x"] * 1, True)
    outputs = [x.x.sum(), run(leaves, x).ranks[0]]
    upstream = [torch.randn_like(t) for t in outputs]
    exact = double(leaves)
    want = gradients([exact["x"].sum(), *plain(exact)], exact, upstream)
    assert_close(gradients(outputs, leaves, upstream), want, 1e-12)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_backward_that_runs_twice_gives_the_same(in_place: bool) -> None:
    leaves = make(SIZES["with-router"], torch.float32)
    frozen = [torch.randn(10, 13, device=DEVICE) for _ in range(2)]
    x = Input(leaves["x"] * 1, in_place)
    outputs = read(leaves, x, frozen, 1, "both")
    upstream = [torch.randn_like(t) for t in outputs]
    first, second = (torch.autograd.grad(outputs, list(leaves.values()), upstream, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_dropout_and_inputs_without_a_gradient() -> None:
    leaves = make(SIZES["with-router"], torch.float64)
    x = Input(leaves["x"], True)
    found = run(leaves, x, dropout=0.4, seed=3)
    outputs = [x.x * 1, *found.ranks, *found.logits]
    upstream = [torch.randn_like(t) for t in outputs]
    keep = torch.rand(2, 9, 13, generator=torch.Generator(DEVICE).manual_seed(3), device=DEVICE) >= 0.4
    exact = double(leaves)
    want = gradients([exact["x"] * 1, *plain(exact, keep.double() / 0.6)], exact, upstream)
    assert_close(gradients(outputs, leaves, upstream), want, 1e-12)

    constant = leaves["x"].detach()
    assert Input(constant, True).x is constant
    with torch.no_grad():
        assert Input(leaves["x"], True).x is leaves["x"]
    leaves["x"] = constant
    matrices = {n: t for n, t in leaves.items() if n != "x"}
    found = run(leaves, Input(constant, True))
    outputs = [*found.ranks, *found.logits]
    want = gradients(plain(exact), {n: exact[n] for n in matrices}, upstream[1:])
    assert_close(gradients(outputs, matrices, upstream[1:]), want, 1e-12)


# -- router weights in two 16-bit terms --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("sizes", [SIZES[n] for n in ("with-router", "with-routers", "router-only")])
@pytest.mark.usefixtures("poison_empty")
def test_a_routers_weight_is_split_without_loss(
    sizes: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype
) -> None:
    experts, routers = ([torch.randn(n, 24, device=DEVICE) for n in rows] for rows in sizes)
    packed = _pack(experts, routers, dtype)
    C, G = sum(sizes[0]), sum(sizes[1])
    assert packed.dtype == dtype and packed.shape == (math.ceil((C + 2 * G) / ALIGNMENT) * ALIGNMENT, 24)
    assert torch.equal(packed[:C], torch.cat([*experts, packed[:0].float()]).to(dtype))
    weight = torch.cat(routers).double()
    high, low = packed[C : C + G].double(), packed[C + G : C + 2 * G].double()
    assert torch.equal(high, weight.to(dtype).double()) and low.any()
    smallest = 2**-25 if dtype == torch.float16 else 0  # half a step of fp16 below 2**-14
    assert bool(((high + low - weight).abs() <= 2**-16 * weight.abs() + smallest).all())
    assert not packed[C + 2 * G :].any()


def test_weights_of_the_compute_dtype_are_not_split() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        experts, routers = ([torch.randn(n, 24, device=DEVICE).to(dtype)] for n in (5, 4))
        packed = _pack(experts, routers, dtype)
        assert torch.equal(packed[:9], torch.cat(experts + routers)) and len(packed) == 16 and not packed[9:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_logits_are_those_of_the_fp32_weight(dtype: torch.dtype) -> None:
    x = torch.randn(200, 1024, device=DEVICE).to(dtype)
    A = torch.randn(40, 1024, device=DEVICE).to(dtype) / 32
    routers = [torch.randn(n, 1024, device=DEVICE) / 32 for n in (8, 5)]
    found = shrink(x.requires_grad_(), [A], routers)
    for logits, W in zip(found.logits, routers, strict=True):
        assert logits.dtype == torch.float32 and error(logits, x.double() @ W.double().T) <= 2e-5
    assert found.ranks[0].dtype == torch.float32 and error(found.ranks[0], x.double() @ A.double().T) <= 1e-5
    # In a batch of one size a row does not depend on the other rows.
    other = torch.cat([x.detach()[:100], torch.randn_like(x[100:])]).requires_grad_()
    assert torch.equal(shrink(other, [A], routers).logits[0][:100], found.logits[0][:100])


# -- products of small inner size --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_in_the_dtype_that_is_asked_for(dtype: torch.dtype) -> None:
    a, b = torch.randn(7, 33, device=DEVICE).to(dtype), torch.randn(33, 5, device=DEVICE).to(dtype)
    want = a.double() @ b.double()
    rounding = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-2)
    for wanted in (dtype, torch.promote_types(dtype, torch.float32)):
        found = skinny.product(a, b, wanted)
        # On a GPU sixteen bits multiply into thirty-two; on a CPU they are rounded before.
        fine = DEVICE == "cuda" and wanted == torch.float32
        assert found.dtype == wanted and error(found, want) <= (1e-6 if fine else rounding)


SHAPES = [(16, 32, 16), (7, 33, 5), (33, 17, 40), (17, 16, 64), (65, 70, 136)]  # T, N, K


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("tile", [(16, 16, 64), (64, 32, 128)], ids=["small-tiles", "large-tiles"])
@pytest.mark.parametrize(("T", "N", "K"), SHAPES)
def test_add_product_by_triton(
    T: int, N: int, K: int, tile: tuple[int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    """Measured: 9.2e-8, 2.9e-4."""
    pytest.importorskip("triton")
    y, m = torch.randn(T, N, device=DEVICE).to(dtype), torch.randn(K, N, device=DEVICE).to(dtype)
    wide = torch.full((T, K + 3), math.nan, device=DEVICE, dtype=dtype)
    p = wide[:, :K].copy_(torch.randn(T, K))
    whole = torch.cat([y.flatten(), torch.full((64,), 7.0, device=DEVICE, dtype=dtype)])
    inner = whole[: T * N].view(T, N)
    found = skinny.add_product_triton_(inner, p, m, tile)
    assert found is inner and bool((whole[T * N :] == 7).all())
    assert error(found, y.double() + p.double() @ m.double()) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "K"), [(9, 5), (9, skinny.MAX_INNER), (9, skinny.MAX_INNER + 1), (9, 0), (0, 5)])
@pytest.mark.usefixtures("triton_on_cpu")
def test_add_product_goes_to_triton_where_that_pays(
    T: int, K: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[int] = []
    monkeypatch.setattr(skinny, "add_product_triton_", lambda y, p, m: (launched.append(len(y)), y.addmm_(p, m))[1])
    y, p, m = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((T, 6), (T, K), (K, 6)))
    want = y.double() + p.double() @ m.double()
    found = skinny.add_product_(y, p, m)
    assert found is y and (T == 0 or error(y, want) <= (1e-3 if dtype == torch.float16 else 1e-6))
    assert bool(launched) == (dtype == torch.float16 and 0 < K <= skinny.MAX_INNER and T > 0)
