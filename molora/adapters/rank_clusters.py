"""A pool of LoRA experts merged into one LoRA by clustering their ranks: LoRA-LEGO (arXiv 2409.16167).

A LoRA is a sum of units ``b_j a_j^T`` in any order, so units of different experts may be compared one by one: like ones
are averaged, and each average is one rank of the merged LoRA.

Legend: D input features, O output features, E experts, R rank of one expert, N live units, C = D + O, K merged rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from molora.adapters.low_rank import checked_experts, product_norms, relative
from molora.checks import check_int, check_number

# Squared relative distance below which two units are one: rounding by the balance, far below any training difference.
SAME_UNIT = 1e-24


class MergedRanks(NamedTuple):
    """One LoRA in place of a pool; floating fields float64, all on the device of the experts.

    Attributes:
        A: (1, K, D); rows of zeros where there were fewer than K different units.
        B: (1, K, O), the output factor folded in.
        cluster: (E, R) int64, the merged rank that a unit went into, -1 for a unit of zeros.
        error: (), ``|B^T A - M| / |M|`` with M the mean of the experts' products, absent ones included.
        cosine: (E,), of the merged product and each expert's, as vectors; 0 where one of them is zero.
        best_output_factor: (), the factor on the merged product at which `error` is least: ``<B^T A, M> / |B^T A|^2``
            of the product without the factor that was asked for; 1 where the product is zero.
    """

    A: Tensor
    B: Tensor
    cluster: Tensor
    error: Tensor
    cosine: Tensor
    best_output_factor: Tensor


@torch.no_grad()
def merge_ranks(
    A: Tensor, B: Tensor, rank: int, *, iterations: int = 100, output_factor: float = 1.0, seed: int = 0
) -> MergedRanks:
    """One LoRA of rank K whose ranks are the centroids of the clustered ranks of all experts.

    Units ``(a_j, b_j)`` are balanced, ``(c a_j, b_j / c)`` with ``|c a_j| = |b_j / c|``: c changes no product, so
    training leaves it where it happens to, and distances must not depend on it. Then k-means with signs, since
    ``(-a_j, -b_j)`` is the same product: it minimises ``sum_j |s_j u_j - centroid(j)|^2`` over clusters, s_j = +-1 and
    centroids. Averages of unlike units are short, so each centroid is scaled to the mean norm of its members (the
    paper's parameter reweighting).

    Args:
        A: (E, R, D), or (1, R, D) shared; any floating dtype.
        B: (E, R, O), the scaling of the experts folded in. A unit with a zero row in A or B does not count.
        rank: K, 1 <= K <= min(D, O).
        iterations: of Lloyd's algorithm at most; it ends when no unit moves.
        output_factor: on the merged product, above 0 (the paper's output reweighting, whose formula we could not
            verify). Clusters of N / K like units each meet the mean product with ``N / (E K)``, mean rank over merged
            rank; unrelated units keep the norm of one expert with the root of that. Both are 1 at K = N / E, and no
            factor fits every pool, hence 1: see `best_output_factor`.
        seed: of the k-means++ start, drawn on the CPU; each of its K draws is a host sync, as is each iteration.

    Returns:
        The merged LoRA (its scaling is 1), what went where, and how far it is from the experts.

    Raises:
        ValueError: see `checked_experts`; iterations below 1, a seed below 0, or a factor that is not above 0.

    Source: arXiv 2409.16167; balance and signs are ours.
    """
    A, B = checked_experts(A, B, rank)
    check_int("iterations", iterations)
    check_int("seed", seed, at_least=0)
    check_number("output_factor", output_factor, above=0)
    A = A.expand(len(B), -1, -1)
    lengths_A, lengths_B = A.norm(dim=-1), B.norm(dim=-1)
    live = (lengths_A > 0) & (lengths_B > 0)
    lengths = (lengths_A[live].sqrt() * lengths_B[live].sqrt()).unsqueeze(1)
    live_A, live_B = A[live], B[live]
    units = torch.cat([live_A / lengths_A[live].unsqueeze(1), live_B / lengths_B[live].unsqueeze(1)], 1) * lengths

    cluster = torch.full(live.shape, -1, device=A.device)
    ranks = units.new_zeros(rank, units.shape[1])
    if len(units):
        cluster[live], centroids = _cluster(units, rank, iterations, torch.Generator().manual_seed(seed))
        ranks[: len(centroids)] = centroids
    new_A, new_B = ranks.split([A.shape[2], B.shape[2]], 1)

    num_experts = len(B)
    mean_norm = product_norms(live_B.T / num_experts, live_A.T)
    merged_norm = product_norms(new_B.T, new_A.T)
    dots = ((new_B @ B.mT) * (new_A @ A.mT)).sum((1, 2))
    best = torch.where(merged_norm > 0, dots.mean() / merged_norm.square(), 1.0)
    new_B = new_B * output_factor
    residual = product_norms(torch.cat([new_B.T, live_B.T / -num_experts], 1), torch.cat([new_A.T, live_A.T], 1))
    norms = merged_norm * product_norms(B.mT, A.mT)
    cosine = torch.where(norms > 0, dots / norms, 0.0).clamp(-1, 1)
    return MergedRanks(new_A[None].contiguous(), new_B[None], cluster, relative(residual, mean_norm), cosine, best)


def _cluster(units: Tensor, rank: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The cluster (N,) of each of `units` (N, C), N > 0, and the scaled centroids (at most K, C)."""
    centroids = _starts(units, rank, generator)
    before = None
    for _ in range(iterations):
        dots = units @ centroids.T
        cluster = (2 * dots.abs() - centroids.square().sum(1)).argmax(1)
        signs = torch.where(dots.gather(1, cluster.unsqueeze(1)) < 0, -1.0, 1.0).to(units.dtype)
        _fill_empty(units, signs, cluster, centroids)
        if before is not None and torch.equal(cluster, before[0]) and torch.equal(signs, before[1]):
            break
        before = (cluster, signs)
        centroids = _mean_by_cluster(units * signs, cluster, centroids)
    norms = _mean_by_cluster(units.norm(dim=1, keepdim=True), cluster, centroids.new_zeros(len(centroids), 1))
    lengths = centroids.norm(dim=1, keepdim=True)
    return cluster, centroids * (norms / lengths.where(lengths > 0, 1))


def _starts(units: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next start is drawn in proportion to its squared distance, up to its sign, from those before.

    Fewer than K where the units have fewer different ones: a second cluster of the same unit would count it twice.
    """
    squares = units.square().sum(1)
    distances = torch.ones_like(squares)
    starts: list[Tensor] = []
    for _ in range(rank):
        if not (distances > 0).any():
            break
        start = units[torch.multinomial((distances / distances.max()).cpu(), 1, generator=generator).to(units.device)]
        near = torch.minimum((units - start).square().sum(1), (units + start).square().sum(1))
        near = near.where(near > SAME_UNIT * squares, 0)
        distances = torch.minimum(distances, near) if starts else near
        starts.append(start)
    return torch.cat(starts)


def _fill_empty(units: Tensor, signs: Tensor, cluster: Tensor, centroids: Tensor) -> None:
    """Gives each empty cluster, in place, the unit that is farthest from its centroid among clusters of several."""
    counts = torch.bincount(cluster, minlength=len(centroids))
    distances = (units * signs - centroids[cluster]).square().sum(1)
    for empty in (counts == 0).nonzero().flatten().tolist():
        taken = distances.where(counts[cluster] > 1, 0).argmax()
        if distances[taken] <= SAME_UNIT * units[taken].square().sum() or counts[cluster[taken]] < 2:
            return
        counts[cluster[taken]] -= 1
        counts[empty], cluster[taken], signs[taken], distances[taken] = 1, empty, 1.0, 0.0


def _mean_by_cluster(values: Tensor, cluster: Tensor, empty: Tensor) -> Tensor:
    """Means (K, C) of values (N, C) by their cluster; a row of `empty` where a cluster has none."""
    members = functional.one_hot(cluster, len(empty)).to(values.dtype).T  # a product adds in one order on a GPU too
    counts = members.sum(1, keepdim=True)
    return torch.where(counts > 0, members @ values / counts.clamp(min=1), empty)
