"""Products B_e^T A_e of the experts of one linear, measured without multiplying them out.

Legend: D input features, O output features, E experts, R rank of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molora.checks import check_int


def checked_experts(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Experts and a new rank, checked; A and B come back in float64.

    Args:
        A: (E, R, D), or (1, R, D) where the experts share it; any floating dtype.
        B: (E, R, O), any floating dtype, on A's device.
        rank: of what replaces the experts, 1 <= rank <= min(D, O).

    Raises:
        ValueError: shapes that disagree, an empty size, a dtype that is not floating, values that are not finite (one
            host sync), or a rank out of range.
    """
    check_int("rank", rank)
    shapes = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
    if A.dim() != 3 or B.dim() != 3 or A.shape[1] != B.shape[1] or A.shape[0] not in (1, B.shape[0]):
        raise ValueError(f"got {shapes}; stack the experts of one linear as A (E, R, D) or (1, R, D) and B (E, R, O)")
    if not A.numel() or not B.numel():
        raise ValueError(f"got {shapes}; a pool needs at least one expert, one rank and one feature on each side")
    if not A.is_floating_point() or not B.is_floating_point():
        raise ValueError(f"got {A.dtype} and {B.dtype} for A and B; experts have a floating dtype")
    if rank > (limit := min(A.shape[2], B.shape[2])):
        raise ValueError(f"rank={rank} exceeds {limit}, the smaller side of the linear in {shapes}; lower the rank")
    A, B = A.double(), B.double()
    if not (A.isfinite().all() and B.isfinite().all()):
        raise ValueError("A or B has values that are not finite; remove the broken experts from the pool")
    return A, B


def product_norms(X: Tensor, Y: Tensor) -> Tensor:
    """Frobenius norms ``|X_e Y_e^T|``, of the triangular factors of both: ``|X Y^T| = |R_x R_y^T|``.

    The trace of ``(X^T X)(Y^T Y)`` squares its rounding errors, which hides norms below 1e-8 of those of the factors;
    this form does not.

    Args:
        X: (..., M, R), leading sizes broadcast.
        Y: (..., N, R), same dtype.

    Returns:
        (...), in the dtype of X.
    """
    factors = (torch.linalg.qr(Z, mode="r").R for Z in (X, Y))
    return torch.linalg.matrix_norm(next(factors) @ next(factors).mT)


def relative(residual: Tensor, norm: Tensor) -> Tensor:
    """``residual / norm`` element-wise, and 0 for 0 / 0: nothing is missing where nothing was."""
    return torch.where(residual == 0, residual, residual / norm)
