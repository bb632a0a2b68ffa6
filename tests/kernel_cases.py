"""What the tests of the mixture kernels share: shapes, inputs, gradients and the measure of error.

Legend: T tokens, D input features, O output features, F hidden FFN features, E experts, K top-k, R rank of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

SCALING = 1.7

# RMS(error) / RMS(oracle in fp64 on the same rounded inputs), with the worst tensor over all cases as measured (x86,
# torch 2.13). In bf16 the reference and the hand-written backward are equally far off.
TOLERANCE = {
    torch.float64: 1e-12,  # 8.1e-16
    torch.float32: 1e-6,  # 3.4e-7, gates of the FFN
    torch.bfloat16: 2e-2,  # 1.4e-2, x of the FFN with one token
}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))

Leaves = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    T: int = 7
    E: int = 4
    R: int = 4
    D: int = 13
    O: int = 11
    K: int = 2
    gating: str = "experts"  # experts, ranks (one gate per rank), shared_A, none
    load: str = "mixed"  # mixed, unused (nobody chooses expert 0), one (all tokens choose the same)


CASES = {
    "mixed": Case(),
    "one-token": Case(T=1),
    "T63-odd-tail": Case(T=63, E=5, R=8, D=33, O=47),
    "k1": Case(K=1),
    "kE": Case(K=4),
    "prime-E": Case(E=7, R=3),
    "R1": Case(R=1),
    "R16": Case(R=16, T=9),
    "single-expert": Case(E=1, K=1, R=3),
    "unused-expert": Case(load="unused"),
    "all-on-one": Case(load="one", K=1),
    "rank-wise": Case(gating="ranks", E=3, R=4, K=5),
    "rank-wise-R16": Case(gating="ranks", E=2, R=16, K=8, T=17),
    "shared-A": Case(gating="shared_A"),
    "shared-A-kE-prime": Case(gating="shared_A", E=7, K=7, R=3),
    "ungated": Case(gating="none", E=1, R=8),
}


def choose(case: Case, G: int) -> tuple[Tensor, Tensor]:
    """Gates (T, G) fp64 that sum to one over K choices, and the choices (T, K)."""
    logits = torch.randn(case.T, G, dtype=torch.float64)
    if case.load == "unused":
        logits[:, 0] = -9
    if case.load == "one":
        logits[:, G - 1] = 9
    weights, ids = logits.topk(case.K)
    return torch.zeros_like(logits).scatter(1, ids, weights.softmax(1)), ids


def experts(case: Case, D: int, O: int) -> tuple[Tensor, Tensor]:
    """A and B of trained scale: their product is about as large as the frozen output."""
    A = torch.randn(1 if case.gating == "shared_A" else case.E, case.R, D, dtype=torch.float64) / D**0.5
    return A, torch.randn(case.E, case.R, O, dtype=torch.float64) / case.R**0.5


def leaves_of(tensors: dict[str, Tensor], dtype: torch.dtype) -> Leaves:
    """Leaves in `dtype`; gates stay in at least fp32, as the routers give them."""
    gate_dtype = dtype if dtype == torch.float64 else torch.float32
    return {n: t.to(gate_dtype if n == "gates" else dtype).requires_grad_() for n, t in tensors.items()}


def gradients(outputs: Sequence[Tensor | None], leaves: Leaves, upstream: Sequence[Tensor]) -> Leaves:
    outputs = [o for o in outputs if o is not None]
    given = [g.to(o.dtype) for o, g in zip(outputs, upstream, strict=False)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), given, allow_unused=True, materialize_grads=True)
    return {f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}


def double(leaves: Leaves) -> Leaves:
    return {n: t.detach().double().requires_grad_() for n, t in leaves.items()}


def error(got: Tensor, want: Tensor) -> float:
    """RMS(error) / RMS(reference); of a reference that is zero, the largest error itself."""
    assert got.shape == want.shape
    difference = got.detach().double() - want.detach().double()
    scale = want.detach().double().square().mean().sqrt()
    return float(difference.square().mean().sqrt() / scale if scale > 0 else difference.abs().max())


def assert_close(got: Leaves, want: Leaves, tolerance: float) -> None:
    assert got.keys() == want.keys()
    errors = {n: error(got[n], want[n]) for n in want}
    wrong = {n: e for n, e in errors.items() if not e <= tolerance}  # "not <=", so that a NaN is wrong too
    assert not wrong, f"above {tolerance}: {wrong}"


SMALL = Case(T=3, E=3, R=2, D=4, O=3)


def odd_layouts(t: Tensor) -> dict[str, Tensor]:
    """The same values with other strides."""
    padded = torch.zeros(*t.shape[:-1], t.shape[-1] * 2, dtype=t.dtype)
    padded[..., ::2] = t
    return {
        "transposed": t.detach().transpose(-1, -2).contiguous().transpose(-1, -2),
        "strided": padded[..., ::2],
        "outer-transposed": t.detach().transpose(0, -1).contiguous().transpose(0, -1),
    }


def autocast(on: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


# Plain operations cannot keep autocast out of a backward, so the reference is held to the forward only.
AUTOCAST = [("reference", True, False)] + [
    ("dense_masked", f, b) for f, b in ((True, False), (False, True), (True, True))
]
every_autocast = pytest.mark.parametrize(("name", "forward", "backward"), AUTOCAST)
