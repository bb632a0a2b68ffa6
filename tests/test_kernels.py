"""The linear kernels against a literal loop over tokens and experts that shares no code with them.

Legend: T tokens, D input features, O output features, F hidden FFN features, E experts, K top-k, R rank of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import (
    CASES,
    SCALING,
    SMALL,
    TOLERANCE,
    Case,
    Leaves,
    assert_close,
    autocast,
    choose,
    double,
    error,
    every_autocast,
    every_dtype,
    experts,
    gradients,
    leaves_of,
    odd_layouts,
)
from torch import Tensor
from torch.nn import functional as F

from molora.kernels import dense_masked, reference, selection
from molora.kernels.reference import Projection

LINEAR_KERNELS = {"reference": reference.mixture_linear, "dense_masked": dense_masked.mixture_linear}
every_linear = pytest.mark.parametrize("kernel", LINEAR_KERNELS.values(), ids=LINEAR_KERNELS)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def oracle_linear(x: Tensor, gates: Tensor | None, A: Tensor, B: Tensor, out: Tensor) -> Tensor:
    rows = []
    for t in range(len(out)):
        y = out[t]
        for e in range(len(B)):
            ranks = A[e % len(A)] @ x[t]
            if gates is not None:
                ranks = ranks * gates[t].reshape(len(B), -1)[e]
            y = y + SCALING * B[e].T @ ranks
        rows.append(y)
    return torch.stack(rows)


def linear_leaves(case: Case, dtype: torch.dtype = torch.float64) -> Leaves:
    A, B = experts(case, case.D, case.O)
    tensors = {"x": torch.randn(case.T, case.D), "out": torch.randn(case.T, case.O), "A": A, "B": B}
    if case.gating != "none":
        tensors["gates"] = choose(case, case.E * case.R if case.gating == "ranks" else case.E)[0]
    return leaves_of(tensors, dtype)


def linear(kernel: Callable, v: Leaves, **options: Any) -> Tensor:
    return kernel(v["x"], v.get("gates"), Projection(v["A"], v["B"], SCALING), v["out"], **options)


@every_linear
@every_dtype
@every_case
@pytest.mark.usefixtures("poison_empty")
def test_linear_equals_the_token_loop(case: Case, dtype: torch.dtype, kernel: Callable) -> None:
    leaves = linear_leaves(case, dtype)
    upstream = torch.randn(case.T, case.O, dtype=torch.float64).to(dtype)
    got = {"out": linear(kernel, leaves)}
    assert got["out"].dtype == dtype
    got |= gradients([got["out"]], leaves, [upstream])
    assert all(got[f"grad_{n}"].dtype == t.dtype for n, t in leaves.items())

    exact = double(leaves)
    want = {"out": oracle_linear(exact["x"], exact.get("gates"), exact["A"], exact["B"], exact["out"])}
    want |= gradients([want["out"]], exact, [upstream])
    assert_close(got, want, TOLERANCE[dtype])
    if case.load == "unused":
        assert not got["grad_A"][0].any() and not got["grad_B"][0].any()


def test_permuting_the_experts_but_not_the_gates_changes_the_output() -> None:
    """Or a kernel that mixes up experts would pass: the numbers above must tell experts apart."""
    leaves = linear_leaves(CASES["mixed"])
    order = torch.tensor([2, 0, 3, 1])
    for kernel in LINEAR_KERNELS.values():
        want = linear(kernel, leaves)
        moved = leaves | {"A": leaves["A"][order], "B": leaves["B"][order]}
        assert error(linear(kernel, moved), want) > 0.1
        assert error(linear(kernel, moved | {"gates": leaves["gates"][:, order]}), want) < 1e-12


@every_linear
@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["no-dropout", "dropout"])
@pytest.mark.parametrize("gating", ["experts", "ranks", "shared_A", "none"])
def test_linear_gradcheck(gating: str, dropout: float, kernel: Callable) -> None:
    leaves = linear_leaves(Case(T=3, E=1 if gating == "none" else 3, R=2, D=4, O=3, gating=gating))
    run = lambda *v: linear(kernel, dict(zip(leaves, v, strict=True)), dropout=dropout, seed=3)  # noqa: E731
    assert torch.autograd.gradcheck(run, tuple(leaves.values()))
    if kernel is reference.mixture_linear:
        assert torch.autograd.gradgradcheck(run, tuple(leaves.values()))


def test_a_second_derivative_of_the_hand_written_backward_raises() -> None:
    leaves = linear_leaves(SMALL)
    (grad,) = torch.autograd.grad(
        linear(dense_masked.mixture_linear, leaves).square().sum(), leaves["A"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@every_linear
def test_no_tokens(kernel: Callable) -> None:
    for case in (Case(T=0), Case(T=0, gating="shared_A"), Case(T=0, gating="ranks")):
        leaves = linear_leaves(case)
        out = linear(kernel, leaves)
        assert out.shape == (0, case.O)
        assert not any(g.any() for g in gradients([out], leaves, [torch.zeros_like(out)]).values())


@every_linear
@pytest.mark.parametrize("layout", ["transposed", "strided", "outer-transposed"])
@pytest.mark.parametrize("gating", ["experts", "shared_A"])
def test_linear_takes_any_strides(gating: str, layout: str, kernel: Callable) -> None:
    leaves = linear_leaves(Case(gating=gating))
    upstream = torch.randn(7, 11, dtype=torch.float64)
    want = gradients([linear(kernel, leaves)], leaves, [upstream])
    odd = {n: odd_layouts(t)[layout].detach().requires_grad_() for n, t in leaves.items()}
    out = linear(kernel, odd)
    assert error(out, linear(kernel, leaves)) < 1e-12
    assert_close(gradients([out], odd, [odd_layouts(upstream)[layout]]), want, 1e-12)


@every_linear
def test_expanded_upstream_gradients(kernel: Callable) -> None:
    """``y.sum()`` sends a gradient of stride 0 in both dimensions."""
    leaves = linear_leaves(CASES["mixed"])
    out = linear(kernel, leaves)
    want = gradients([out], leaves, [torch.ones_like(out)])
    out = linear(kernel, leaves)
    assert_close(gradients([out], leaves, [out.new_ones(()).expand_as(out)]), want, 1e-12)


@every_linear
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no-dropout", "dropout"])
def test_linear_keeps_leading_dimensions(dropout: float, kernel: Callable) -> None:
    leaves = linear_leaves(Case(T=12))
    cube = leaves | {n: leaves[n].detach().view(3, 4, -1).requires_grad_() for n in ("x", "out")}
    upstream = torch.randn(12, 11, dtype=torch.float64)
    want = gradients([linear(kernel, leaves, dropout=dropout)], leaves, [upstream])
    # Batch-first seen from sequence-first storage: no view of (T, D) exists.
    cube["x"] = cube["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    out = linear(kernel, cube, dropout=dropout)
    assert out.shape == (3, 4, 11)
    # random numbers are drawn in the order of the (3, 4, D) shape, so the mask is that of (12, D)
    got = gradients([out], cube, [upstream.view(3, 4, -1)])
    assert got["grad_x"].shape == (3, 4, 13) and got["grad_out"].shape == (3, 4, 11)
    assert_close({n: g.view(want[n].shape) if n in ("grad_x", "grad_out") else g for n, g in got.items()}, want, 1e-12)


@every_linear
@pytest.mark.parametrize(
    ("x_dtype", "out_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["bf16-model", "fp32-x", "fp32-out"],
)
def test_fp32_experts_in_a_bf16_model(x_dtype: torch.dtype, out_dtype: torch.dtype, kernel: Callable) -> None:
    leaves = linear_leaves(Case(T=31, R=8))
    dtypes = {"x": x_dtype, "out": out_dtype}
    leaves = {n: t.detach().to(dtypes.get(n, torch.float32)).requires_grad_() for n, t in leaves.items()}
    upstream = torch.randn(31, 11).to(out_dtype)
    out = linear(kernel, leaves)
    got = {"out": out} | gradients([out], leaves, [upstream])
    assert out.dtype == out_dtype and all(got[f"grad_{n}"].dtype == t.dtype for n, t in leaves.items())
    exact = double(leaves)
    want = {"out": oracle_linear(exact["x"], exact["gates"], exact["A"], exact["B"], exact["out"])}
    want |= gradients([want["out"]], exact, [upstream])
    assert_close(got, want, TOLERANCE[torch.bfloat16])


@every_autocast
def test_autocast_changes_nothing(name: str, forward: bool, backward: bool) -> None:
    leaves = linear_leaves(CASES["mixed"], torch.float32)
    upstream = torch.randn(7, 11)
    out = linear(LINEAR_KERNELS[name], leaves)
    want = {"out": out} | gradients([out], leaves, [upstream])
    with autocast(forward):
        out = linear(LINEAR_KERNELS[name], leaves)
    with autocast(backward):
        got = {"out": out} | gradients([out], leaves, [upstream])
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


@every_linear
def test_the_dropout_mask_of_the_backward_is_that_of_the_forward(kernel: Callable) -> None:
    """With A = B = 1 and nothing frozen the output is the masked input, so that the mask can be read off."""
    eye = torch.eye(64, dtype=torch.float64)[None]
    x = torch.randn(50, 64, dtype=torch.float64, requires_grad=True)
    run = lambda seed: kernel(x, None, Projection(eye, eye, 1.0), torch.zeros_like(x), dropout=0.25, seed=seed)  # noqa: E731
    out = run(5)
    mask = (out / x).detach()
    assert torch.allclose(mask[mask != 0], torch.tensor(1 / 0.75, dtype=torch.float64))
    assert abs(float((mask == 0).double().mean()) - 0.25) < 0.03
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert error(grad, mask) < 1e-12
    assert torch.equal(out, run(5)) and not torch.equal(out, run(6))


@every_linear
@every_dtype
def test_dropout_equals_the_token_loop_on_masked_inputs(dtype: torch.dtype, kernel: Callable) -> None:
    leaves = linear_leaves(Case(T=31), dtype)
    upstream = torch.randn(31, 11, dtype=torch.float64).to(dtype)
    out = linear(kernel, leaves, dropout=0.4, seed=11)
    got = {"out": out} | gradients([out], leaves, [upstream])
    exact = double(leaves)
    keep = torch.rand(31, 13, generator=torch.Generator().manual_seed(11)) >= 0.4
    want = {"out": oracle_linear(exact["x"] * keep / 0.6, exact["gates"], exact["A"], exact["B"], exact["out"])}
    assert_close(got, want | gradients([want["out"]], exact, [upstream]), TOLERANCE[dtype])


@pytest.mark.parametrize(
    "case", [CASES["mixed"], CASES["rank-wise"], CASES["shared-A"]], ids=["experts", "ranks", "shared_A"]
)
def test_inplace_writes_into_out(case: Case) -> None:
    leaves = linear_leaves(case)
    upstream = torch.randn(case.T, case.O, dtype=torch.float64)
    out = linear(dense_masked.mixture_linear, leaves)
    want = {"out": out} | gradients([out], leaves, [upstream])
    fresh = leaves["out"] * 1
    result = linear(dense_masked.mixture_linear, leaves | {"out": fresh}, inplace=True)
    assert result.data_ptr() == fresh.data_ptr() and result is fresh
    assert_close({"out": result} | gradients([result], leaves, [upstream]), want, 1e-12)


def test_a_result_can_be_added_to_in_place() -> None:
    """As Falcon does to the output of its attention, whose linears are of a kind of their own."""
    leaves = linear_leaves(CASES["mixed"])
    result = linear(dense_masked.mixture_linear, leaves)
    result += 1
    result.sum().backward()


def test_inplace_into_the_output_of_a_frozen_linear() -> None:
    leaves = linear_leaves(CASES["mixed"])
    W = torch.randn(11, 13, dtype=torch.float64)
    del leaves["out"]
    upstream = torch.randn(7, 11, dtype=torch.float64)
    run = lambda inplace: linear(  # noqa: E731
        dense_masked.mixture_linear, leaves | {"out": F.linear(leaves["x"], W)}, inplace=inplace
    )
    assert_close(gradients([run(True)], leaves, [upstream]), gradients([run(False)], leaves, [upstream]), 1e-12)


def test_inplace_over_a_tensor_that_a_backward_needs_raises() -> None:
    """Never a silently wrong gradient: autograd counts the versions of what it saved."""
    leaves = linear_leaves(CASES["mixed"])
    saved_by_its_maker = leaves["out"].exp()
    result = linear(dense_masked.mixture_linear, leaves | {"out": saved_by_its_maker}, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()
    fresh = leaves["out"] * 1
    saved_by_a_reader = fresh.square()
    result = linear(dense_masked.mixture_linear, leaves | {"out": fresh}, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (result.sum() + saved_by_a_reader.sum()).backward()
    with pytest.raises(RuntimeError, match="leaf Variable"):
        linear(dense_masked.mixture_linear, leaves, inplace=True)


def test_inplace_without_grad() -> None:
    leaves = linear_leaves(CASES["mixed"])
    want = linear(dense_masked.mixture_linear, leaves)
    with torch.no_grad():
        fresh = leaves["out"].clone()
        assert torch.equal(linear(dense_masked.mixture_linear, leaves | {"out": fresh}, inplace=True), want)
    assert torch.equal(fresh, want)


@every_linear
@every_dtype
def test_zero_B_gives_the_frozen_output_bit_for_bit(dtype: torch.dtype, kernel: Callable) -> None:
    leaves = linear_leaves(CASES["mixed"], dtype)
    leaves["B"] = torch.zeros_like(leaves["B"])
    assert torch.equal(linear(kernel, leaves), leaves["out"])


@every_linear
@pytest.mark.parametrize("gating", ["experts", "ranks", "shared_A"])
def test_linear_gradients_of_single_inputs(gating: str, kernel: Callable) -> None:
    """A frozen input must not change the gradients of the others."""
    leaves = linear_leaves(Case(gating=gating))
    upstream = torch.randn(7, 11, dtype=torch.float64)
    want = gradients([linear(kernel, leaves)], leaves, [upstream])
    frozen = {n: t.detach() for n, t in leaves.items()}
    for name, leaf in leaves.items():
        got = gradients([linear(kernel, frozen | {name: leaf})], {name: leaf}, [upstream])
        assert_close(got, {f"grad_{name}": want[f"grad_{name}"]}, 1e-12)
    assert linear(kernel, frozen).grad_fn is None
    with torch.no_grad():
        assert linear(kernel, leaves).grad_fn is None
        assert torch.equal(linear(kernel, leaves), linear(kernel, frozen))


def test_kernels_are_chosen_by_name_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = linear_leaves(CASES["mixed"])
    arguments = (leaves["x"], leaves["gates"], Projection(leaves["A"], leaves["B"], SCALING), leaves["out"])
    hand_written = dense_masked.mixture_linear(*arguments).grad_fn.name()
    monkeypatch.delenv("MOLORA_KERNEL", raising=False)
    assert selection.mixture_linear(None, *arguments).grad_fn.name() == hand_written
    assert selection.mixture_linear("reference", *arguments).grad_fn.name() != hand_written
    monkeypatch.setenv("MOLORA_KERNEL", "reference")
    assert selection.mixture_linear(None, *arguments).grad_fn.name() != hand_written
    assert selection.mixture_linear("dense_masked", *arguments).grad_fn.name() == hand_written
    monkeypatch.setenv("MOLORA_KERNEL", "fast")
    with pytest.raises(ValueError, match="unknown kernel 'fast'; choose one of reference, dense_masked"):
        selection.mixture_linear(None, *arguments)
    with pytest.raises(ValueError, match="unknown kernel 'magic'"):
        selection.check("magic")
