"""A pool of LoRA experts in one basis: each expert keeps a small matrix, the two large ones are shared; or in one A.

``B_e^T A_e ~ U Sigma_e V^T``: JD-Full of Compress then Serve (arXiv 2407.00066), an orthogonal Tucker decomposition of
two sides. No (O, D) matrix is made: with thin QR decompositions ``A_e^T = Q_A F_e`` and ``B_e^T = Q_B G_e`` of all
experts at once, every step works on the factors F (E, P, R) and G (E, Q, R), and Q_A, Q_B enter again at the end.

Legend: D input features, O output features, E experts, R rank of one expert, K rank of the basis, P and Q sizes of the
cores, at most max(E*R, K) and at most D and O.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from molora.adapters.low_rank import checked_experts, product_norms, relative
from molora.checks import check_int


class JointBasis(NamedTuple):
    """Experts in a shared basis, ``U Sigma_e V^T``; all float64, on the device of the experts.

    Attributes:
        U: (O, K), orthonormal columns.
        Sigma: (E, K, K), full matrices; zero for an absent expert.
        V: (D, K), orthonormal columns.
        error: (E,), ``|B_e^T A_e - U Sigma_e V^T| / |B_e^T A_e|``, Frobenius norms; 0 for an absent expert.
        total_error: (), the same of all experts stacked: the root of the summed squares of the residuals over that of
            the products.
    """

    U: Tensor
    Sigma: Tensor
    V: Tensor
    error: Tensor
    total_error: Tensor


class SharedA(NamedTuple):
    """Experts that share A, ``B_e^T A``; all float64, on the device of the experts; the scaling is 1.

    Attributes:
        A: (1, K, D), orthonormal rows.
        B: (E, K, O); zero for an absent expert.
        error: (E,), as in `JointBasis`.
        total_error: (), as in `JointBasis`.
    """

    A: Tensor
    B: Tensor
    error: Tensor
    total_error: Tensor


class PoolSize(NamedTuple):
    """Numbers that three forms of a pool of one linear hold, biases and routers aside.

    Attributes:
        experts: A and B of every expert, ``E R (D + O)``.
        basis: U, V and every Sigma_e, ``K (D + O) + E K^2``.
        share_A: a shared A and a B for each expert, ``K D + E K O``: what runs. More than `experts` where K is above
            about ``R (D + O) / O``.
    """

    experts: int
    basis: int
    share_A: int


@torch.no_grad()
def joint_basis(
    A: Tensor, B: Tensor, rank: int, *, iterations: int = 10, normalize: bool = False, seed: int | None = None
) -> JointBasis:
    """The shared basis of rank K that keeps most of all experts of a linear.

    Minimises ``sum_e w_e^2 |B_e^T A_e - U Sigma_e V^T|^2`` over orthonormal U, V and any Sigma_e, which is
    ``U^T B_e^T A_e V`` at the best. In turn, U becomes the first K left singular vectors of ``[w_e B_e^T A_e V]_e``
    and V those of ``[w_e A_e^T B_e U]_e``: no step raises the objective, and where it ends depends on where it starts.
    Exact once K reaches the rank of the stacked A and that of the stacked B. Each sweep costs two SVDs of about
    (E R, E min(R, K)), cubic in E R up to D or O.

    Args:
        A: (E, R, D), or (1, R, D) shared; any floating dtype. Zero rows pad experts of lower rank.
        B: (E, R, O), the scaling of the experts folded in. An expert of zeros is absent.
        rank: K, 1 <= K <= min(D, O).
        iterations: sweeps, each a new U and a new V; at least 1.
        normalize: w_e = 1 / |B_e^T A_e|, so that large experts do not take the basis; else w_e = 1. The norms stay in
            Sigma, and the errors are of the experts as they came.
        seed: None: the sweeps begin with the first K right singular vectors of the stacked ``w_e B_e^T A_e``, from
            which even one ends within sqrt(2) of the least error, and which zero rows and absent experts do not change.
            A number: with a random orthonormal V drawn on the CPU, as in the paper.

    Returns:
        U, Sigma, V and the errors. The same input gives the same numbers on one machine.

    Raises:
        ValueError: see `checked_experts`; iterations below 1, or a seed below 0.

    Source: arXiv 2407.00066, JD-Full; error by ``|X - U U^T X V V^T|^2 = |X - U U^T X|^2 + |U^T X (1 - V V^T)|^2``.
    """
    A, B = checked_experts(A, B, rank)
    check_int("iterations", iterations)
    if seed is not None:
        check_int("seed", seed, at_least=0)
    Q_A, F = _core(A, rank)
    Q_B, G = _core(B, rank)
    norms = product_norms(G, F)
    weighted = _weighted(G, norms) if normalize else G
    if seed is None:
        V = _singular_vectors(F, torch.linalg.qr(weighted, mode="r").R, rank)
    else:
        start = torch.randn(F.shape[1], rank, dtype=F.dtype, generator=torch.Generator().manual_seed(seed))
        V = torch.linalg.qr(start.to(F.device)).Q
    for _ in range(iterations):
        U = _singular_vectors(weighted, torch.linalg.qr(V.T @ F, mode="r").R, rank)
        V = _singular_vectors(F, torch.linalg.qr(U.T @ weighted, mode="r").R, rank)
    UG, VF = U.T @ G, V.T @ F
    residuals = torch.hypot(product_norms(G - U @ UG, F), product_norms(UG, F - V @ VF))
    total_error = relative(residuals.norm(), norms.norm())
    return JointBasis(Q_B @ U, UG @ VF.mT, Q_A @ V, relative(residuals, norms), total_error)


def experts_of(basis: JointBasis) -> tuple[Tensor, Tensor]:
    """The experts of a basis in the form that runs with ``share_A``: ``A = V^T`` and ``B_e = (U Sigma_e)^T``.

    Their factor is 1, since the scaling is in Sigma; `shared_A` gives better ones of that form. Gates of whole experts
    mean what they meant; gates of single ranks do not, for there is no old rank in the basis.

    Returns:
        A (1, K, D) and B (E, K, O), float64, contiguous; round them to the dtype of the pool.
    """
    return basis.V.T[None].contiguous(), (basis.U @ basis.Sigma).mT.contiguous()


@torch.no_grad()
def shared_A(A: Tensor, B: Tensor, rank: int, *, normalize: bool = False) -> SharedA:
    """The experts of one common A that are nearest to those of a linear: the best that ``share_A`` can hold.

    Minimises ``sum_e w_e^2 |B_e^T A_e - B'_e^T V^T|^2`` over V (D, K) and B': V are the first K right singular vectors
    of the stacked ``w_e B_e^T A_e``, and ``B'_e = (B_e^T A_e V)^T``. No iteration, and that sum is at most what
    `joint_basis` leaves, whose B' must lie in U as well: for a pool that runs with a shared A, U costs accuracy and
    saves nothing. `joint_basis` is for a pool that is kept as U, Sigma and V.

    Args:
        A, B, rank, normalize: as in `joint_basis`.

    Raises:
        ValueError: see `checked_experts`.

    Source: Eckart and Young's theorem on the stacked products.
    """
    A, B = checked_experts(A, B, rank)
    Q_A, F = _core(A, rank)
    G = torch.linalg.qr(B.mT, mode="r").R
    norms = product_norms(G, F)
    V = _singular_vectors(F, _weighted(G, norms) if normalize else G, rank)
    VF = V.T @ F
    residuals = product_norms(G, F - V @ VF)
    total_error = relative(residuals.norm(), norms.norm())
    return SharedA((Q_A @ V).T[None].contiguous(), VF @ B, relative(residuals, norms), total_error)


def pool_size(num_experts: int, r: int, in_features: int, out_features: int, rank: int) -> PoolSize:
    """How many numbers a pool of one linear holds as experts of rank r, as a basis of rank `rank`, and as it runs.

    Raises:
        ValueError: a count below 1.
    """
    counts = {"num_experts": num_experts, "r": r, "in_features": in_features, "out_features": out_features}
    for key, count in (counts | {"rank": rank}).items():
        check_int(key, count)
    features = in_features + out_features
    return PoolSize(
        num_experts * r * features,
        rank * features + num_experts * rank**2,
        rank * in_features + num_experts * rank * out_features,
    )


def _core(X: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Q (D, P) orthonormal and factors (E, P, R) of X (E, R, D) with ``X_e^T = Q F_e``, P at least `rank`.

    Householder's Q is orthonormal whatever the columns, so rows of zeros widen a core that is too narrow.
    """
    rows = X.flatten(0, 1)
    rows = functional.pad(rows, (0, 0, 0, max(0, rank - len(rows))))
    Q, F = torch.linalg.qr(rows.T)
    return Q, F[:, : X.shape[0] * X.shape[1]].unflatten(1, X.shape[:2]).movedim(1, 0)


def _weighted(G: Tensor, norms: Tensor) -> Tensor:
    """Factors G (E, ., R) of products with norms (E,), scaled to a norm of 1; absent ones stay as they are."""
    return G / norms.where(norms > 0, 1).view(-1, 1, 1)


def _singular_vectors(F: Tensor, L: Tensor, rank: int) -> Tensor:
    """The first K left singular vectors (P, K) of ``[F_e L_e^T]_e``.

    Args:
        F: (E, P, R), or (1, P, R).
        L: (E, M, R), or (1, M, R): triangular factors of what stands right of F_e, whose orthonormal part changes no
            left singular vector.
    """
    stack = (F @ L.mT).movedim(0, 1).flatten(1)
    stack = functional.pad(stack, (0, max(0, rank - stack.shape[1])))
    return torch.linalg.svd(stack, full_matrices=False).U[:, :rank]
