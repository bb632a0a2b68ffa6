"""The FFN kernels against a literal loop over tokens and experts that shares no code with them.

Legend: T tokens, D input features, O output features, F hidden FFN features, E experts, K top-k, R rank of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

from molora.kernels import dense_masked_ffn, reference
from molora.kernels.reference import Projection

FFN_KERNELS = {"reference": reference.mixture_ffn, "dense_masked": dense_masked_ffn.mixture_ffn}
every_ffn = pytest.mark.parametrize("kernel", FFN_KERNELS.values(), ids=FFN_KERNELS)


def oracle_ffn(
    x: Tensor, pre: Sequence[Tensor], gates: Tensor, ups: Sequence, down: Any, act: Callable, residual: bool
):
    """Hidden states (T, F) and ranks (T, E*R); `ups` and `down` are (A, B, scaling) or None."""
    hidden, ranks = [], []
    for t in range(len(x)):
        frozen = act(pre[0][t]) * (pre[1][t] if len(pre) == 2 else 1)
        mixed, row = frozen if residual else 0 * frozen, []
        for e in range(gates.shape[1]):
            parts = [p[t] for p in pre]
            for i, up in enumerate(ups):
                if up is not None:
                    A, B, scaling = up
                    parts[i] = parts[i] + scaling * B[e].T @ (A[e % len(A)] @ x[t])
            h = act(parts[0]) * (parts[1] if len(parts) == 2 else 1)
            mixed = mixed + gates[t, e] * (h - frozen if residual else h)
            if down is not None:
                row.append(down[2] * gates[t, e] * (down[0][e % len(down[0])] @ h))
        hidden.append(mixed)
        ranks += [torch.cat(row)] if row else []
    return torch.stack(hidden), torch.stack(ranks) if ranks else None


# What the block looks like: which pre-activations are adapted (None: frozen), and whether the down-projection is.
FFN_SHAPES = {
    "gated": (("gate", "up"), True),
    "two-layer": (("up",), True),
    "fused-gate-up": (("gate_up",), True),
    "no-down": (("gate", "up"), False),
    "down-only": ((None, None), True),
    "gate-only": (("gate", None), False),
    "up-only": ((None, "up"), True),
}
every_shape = pytest.mark.parametrize("shape", FFN_SHAPES.values(), ids=FFN_SHAPES)
FFN_CASES = {
    n: CASES[n]
    for n in ("mixed", "one-token", "k1", "kE", "prime-E", "R1", "R16", "single-expert", "unused-expert", "all-on-one")
    + ("shared-A", "shared-A-kE-prime")
} | {"T63-odd-tail": Case(T=63, E=5, R=8, D=17, O=23)}
Shape = tuple[tuple[str | None, ...], bool]


def ffn_leaves(case: Case, shape: Shape, dtype: torch.dtype = torch.float64) -> tuple[Leaves, Tensor]:
    """Leaves and the choices (T, K); "gates" are (T, K) here, so that an expert without a choice has no gradient."""
    parts, has_down = shape
    gates, ids = choose(case, case.E)
    tensors = {"x": torch.randn(case.T, case.D), "gates": gates.gather(1, ids)}
    if parts == ("gate_up",):
        tensors["pre"] = torch.randn(case.T, 2 * case.O)
        tensors["A_gate_up"], tensors["B_gate_up"] = experts(case, case.D, 2 * case.O)
    else:
        tensors |= {f"pre{i}": torch.randn(case.T, case.O) for i in range(len(parts))}
        for part in filter(None, parts):
            tensors[f"A_{part}"], tensors[f"B_{part}"] = experts(case, case.D, case.O)
    if has_down:
        tensors["A_down"] = experts(case, case.O, 5)[0]
    return leaves_of(tensors, dtype), ids


def ffn(
    run: Callable, v: Leaves, ids: Tensor, case: Case, shape: Shape, residual: bool, with_ids: bool = True
) -> tuple[Tensor, Tensor | None]:
    parts, has_down = shape
    gates = v["gates"].new_zeros(case.T, case.E).scatter(1, ids, v["gates"])
    if parts == ("gate_up",):
        pre = v["pre"].chunk(2, 1)
        ups = [Projection(v["A_gate_up"], half, SCALING) for half in v["B_gate_up"].chunk(2, 2)]
    else:
        pre = [v[f"pre{i}"] for i in range(len(parts))]
        ups = [part and Projection(v[f"A_{part}"], v[f"B_{part}"], SCALING) for part in parts]
    down = Projection(v["A_down"], v["A_down"].new_zeros(case.E, case.R, 5), SCALING / 2) if has_down else None
    if run is oracle_ffn:
        return oracle_ffn(v["x"], pre, gates, ups, down, F.silu, residual)
    return run(v["x"], pre, gates, ids if with_ids else None, ups, down, F.silu, residual=residual)


def ffn_upstream(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Random upstream gradients of hidden and ranks, of unequal size."""
    sizes = (case.O, 1.0), (case.E * case.R, 0.3)
    return [(scale * torch.randn(case.T, n, dtype=torch.float64)).to(dtype) for n, scale in sizes]


def check_ffn(kernel: Callable, case: Case, shape: Shape, dtype: torch.dtype, unnormalised: bool = False) -> None:
    leaves, ids = ffn_leaves(case, shape, dtype)
    if unnormalised:
        leaves["gates"] = (leaves["gates"].detach() * 0.6).requires_grad_()
    upstream = ffn_upstream(case, dtype)
    hidden, ranks = ffn(kernel, leaves, ids, case, shape, residual=not unnormalised)
    got = {"hidden": hidden} | gradients([hidden, ranks], leaves, upstream)
    exact = double(leaves)
    want_hidden, want_ranks = ffn(oracle_ffn, exact, ids, case, shape, residual=not unnormalised)
    want = {"hidden": want_hidden} | gradients([want_hidden, want_ranks], exact, upstream)
    assert (ranks is None) == (want_ranks is None) == (not shape[1])
    if ranks is not None and want_ranks is not None:
        got["ranks"], want["ranks"] = ranks, want_ranks
    assert hidden.dtype == dtype and all(got[f"grad_{n}"].dtype == t.dtype for n, t in leaves.items())
    assert_close(got, want, TOLERANCE[dtype])
    if case.load == "unused":
        assert not any(got[f"grad_{n}"][0].any() for n in leaves if n[0] in "AB")


@every_ffn
@every_dtype
@pytest.mark.parametrize("case", FFN_CASES.values(), ids=FFN_CASES)
@pytest.mark.usefixtures("poison_empty")
def test_ffn_equals_the_token_loop(case: Case, dtype: torch.dtype, kernel: Callable) -> None:
    check_ffn(kernel, case, FFN_SHAPES["gated"], dtype)


@every_ffn
@every_dtype
@pytest.mark.parametrize("unnormalised", [False, True], ids=["residual", "unnormalised"])
@every_shape
@pytest.mark.usefixtures("poison_empty")
def test_ffn_of_every_shape_equals_the_token_loop(
    shape: Shape, unnormalised: bool, dtype: torch.dtype, kernel: Callable
) -> None:
    check_ffn(kernel, CASES["mixed"], shape, dtype, unnormalised)


def test_residual_form_is_the_plain_sum_where_gates_sum_to_one() -> None:
    case, shape = CASES["mixed"], FFN_SHAPES["gated"]
    leaves, ids = ffn_leaves(case, shape)
    residual, plain = (ffn(oracle_ffn, leaves, ids, case, shape, form)[0] for form in (True, False))
    assert error(residual, plain) < 1e-12


@every_ffn
@pytest.mark.parametrize("with_ids", [True, False], ids=["topk_ids", "no-topk_ids"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("shape", [FFN_SHAPES[n] for n in ("gated", "two-layer", "fused-gate-up")])
def test_ffn_gradcheck(shape: Shape, residual: bool, with_ids: bool, kernel: Callable) -> None:
    leaves, ids = ffn_leaves(SMALL, shape)
    run = lambda *v: ffn(kernel, dict(zip(leaves, v, strict=True)), ids, SMALL, shape, residual, with_ids)  # noqa: E731
    assert torch.autograd.gradcheck(run, tuple(leaves.values()))


@every_ffn
def test_ffn_without_choices_takes_every_gate(kernel: Callable) -> None:
    """Dense routing: topk_ids is None and every gate, zero or not, has a gradient."""
    case, shape = CASES["mixed"], FFN_SHAPES["gated"]
    leaves, ids = ffn_leaves(Case(K=case.E), shape)
    upstream = ffn_upstream(case, torch.float64)
    got, want = (
        gradients(ffn(run, leaves, ids, case, shape, False, with_ids=False), leaves, upstream)
        for run in (kernel, oracle_ffn)
    )
    assert_close(got, want, 1e-12)


@every_ffn
@every_shape
def test_no_tokens_in_an_ffn(shape: Shape, kernel: Callable) -> None:
    case = Case(T=0)
    leaves, ids = ffn_leaves(case, shape)
    outputs = ffn(kernel, leaves, ids, case, shape, True)
    assert outputs[0].shape == (0, case.O)
    assert not any(g.any() for g in gradients(outputs, leaves, ffn_upstream(case, torch.float64)).values())


@every_ffn
@pytest.mark.parametrize("layout", ["transposed", "strided", "outer-transposed"])
@pytest.mark.parametrize("gating", ["experts", "shared_A"])
def test_ffn_takes_any_strides(gating: str, layout: str, kernel: Callable) -> None:
    """Experts stored as (E, O, R) reach a kernel as a transposed view: no gradient may get lost in a copy."""
    case, shape = Case(gating=gating), FFN_SHAPES["gated"]
    leaves, ids = ffn_leaves(case, shape)
    upstream = ffn_upstream(case, torch.float64)
    want = gradients(ffn(kernel, leaves, ids, case, shape, True), leaves, upstream)
    odd = {n: odd_layouts(t)[layout].detach().requires_grad_() for n, t in leaves.items()}
    outputs = ffn(kernel, odd, ids, case, shape, True)
    assert_close(gradients(outputs, odd, [odd_layouts(g)[layout] for g in upstream]), want, 1e-12)


@every_ffn
def test_expanded_upstream_gradients_of_an_ffn(kernel: Callable) -> None:
    case, shape = CASES["mixed"], FFN_SHAPES["gated"]
    leaves, ids = ffn_leaves(case, shape)
    hidden, ranks = ffn(kernel, leaves, ids, case, shape, True)
    want = gradients([hidden, ranks], leaves, [torch.ones_like(hidden), torch.ones_like(ranks)])
    got = gradients(
        ffn(kernel, leaves, ids, case, shape, True), leaves, [t.new_ones(()).expand_as(t) for t in (hidden, ranks)]
    )
    assert_close(got, want, 1e-12)


@every_ffn
@pytest.mark.parametrize("used", ["hidden", "ranks"])
def test_ffn_with_a_gradient_for_one_output_only(used: str, kernel: Callable) -> None:
    case, shape = CASES["mixed"], FFN_SHAPES["gated"]
    leaves, ids = ffn_leaves(case, shape)
    upstream = ffn_upstream(case, torch.float64)
    both = [g if n == used else torch.zeros_like(g) for n, g in zip(("hidden", "ranks"), upstream, strict=True)]
    want = gradients(ffn(oracle_ffn, leaves, ids, case, shape, True), leaves, both)
    index = ("hidden", "ranks").index(used)
    output = ffn(kernel, leaves, ids, case, shape, True)[index]
    grads = torch.autograd.grad(
        output, list(leaves.values()), upstream[index], allow_unused=True, materialize_grads=True
    )
    assert_close({f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}, want, 1e-12)


@every_ffn
def test_fp32_experts_in_a_bf16_ffn(kernel: Callable) -> None:
    case, shape = Case(T=31, R=8), FFN_SHAPES["gated"]
    leaves, ids = ffn_leaves(case, shape)
    bf16 = ("x", "pre0", "pre1")
    leaves = {
        n: t.detach().to(torch.bfloat16 if n in bf16 else torch.float32).requires_grad_() for n, t in leaves.items()
    }
    upstream = ffn_upstream(case, torch.bfloat16)
    outputs = ffn(kernel, leaves, ids, case, shape, True)
    assert all(o.dtype == torch.bfloat16 for o in outputs)
    got = gradients(outputs, leaves, upstream)
    assert all(got[f"grad_{n}"].dtype == t.dtype for n, t in leaves.items())
    exact = double(leaves)
    assert_close(
        got, gradients(ffn(oracle_ffn, exact, ids, case, shape, True), exact, upstream), TOLERANCE[torch.bfloat16]
    )


@every_autocast
def test_autocast_changes_nothing_in_an_ffn(name: str, forward: bool, backward: bool) -> None:
    case, shape = CASES["mixed"], FFN_SHAPES["gated"]
    leaves, ids = ffn_leaves(case, shape, torch.float32)
    upstream = ffn_upstream(case, torch.float32)
    outputs = ffn(FFN_KERNELS[name], leaves, ids, case, shape, True)
    want = dict(zip(("hidden", "ranks"), outputs, strict=True)) | gradients(outputs, leaves, upstream)
    with autocast(forward):
        outputs = ffn(FFN_KERNELS[name], leaves, ids, case, shape, True)
    with autocast(backward):
        got = dict(zip(("hidden", "ranks"), outputs, strict=True)) | gradients(outputs, leaves, upstream)
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


@every_ffn
@every_dtype
def test_zero_B_gives_the_frozen_hidden_state_bit_for_bit(dtype: torch.dtype, kernel: Callable) -> None:
    case, shape = CASES["mixed"], FFN_SHAPES["gated"]
    leaves, ids = ffn_leaves(case, shape, dtype)
    leaves |= {n: torch.zeros_like(leaves[n]) for n in ("B_gate", "B_up")}
    hidden, _ = ffn(kernel, leaves, ids, case, shape, residual=True)
    assert torch.equal(hidden, F.silu(leaves["pre0"]) * leaves["pre1"])


@every_ffn
def test_ffn_gradients_of_single_inputs(kernel: Callable) -> None:
    case, shape = CASES["mixed"], FFN_SHAPES["gated"]
    leaves, ids = ffn_leaves(case, shape)
    upstream = ffn_upstream(case, torch.float64)
    want = gradients(ffn(kernel, leaves, ids, case, shape, True), leaves, upstream)
    frozen = {n: t.detach() for n, t in leaves.items()}
    for name, leaf in leaves.items():
        outputs = [o if o.requires_grad else None for o in ffn(kernel, frozen | {name: leaf}, ids, case, shape, True)]
        given = [g for o, g in zip(outputs, upstream, strict=True) if o is not None]
        assert_close(gradients(outputs, {name: leaf}, given), {f"grad_{name}": want[f"grad_{name}"]}, 1e-12)
    with torch.no_grad():
        assert all(o.grad_fn is None for o in ffn(kernel, leaves, ids, case, shape, True))


@every_ffn
def test_ffn_leaves_its_inputs_alone(kernel: Callable) -> None:
    case, shape = CASES["mixed"], FFN_SHAPES["gated"]
    leaves, ids = ffn_leaves(case, shape)
    before = {n: t.detach().clone() for n, t in leaves.items()}
    gradients(ffn(kernel, leaves, ids, case, shape, True), leaves, ffn_upstream(case, torch.float64))
    assert all(torch.equal(before[n], t) for n, t in leaves.items())
