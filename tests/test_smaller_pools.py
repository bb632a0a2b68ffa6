"""Pools of experts made smaller, against dense products and plain loops in float64."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from molora.adapters.joint_compression import experts_of, joint_basis, pool_size, shared_A
from molora.adapters.low_rank import product_norms
from molora.adapters.rank_clusters import MergedRanks, merge_ranks
from molora.kernels.reference import Projection, mixture_linear


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pool(E: int, R: int, D: int, O: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(E, R, D, seed=seed), normal(E, R, O, seed=seed + 1)


def related(E: int, R: int, D: int, O: int, shared: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Experts whose products lie in one subspace of `shared` dimensions on each side, and some noise outside."""
    A = normal(E, R, shared, seed=seed) @ normal(shared, D, seed=seed + 1) + noise * normal(E, R, D, seed=seed + 2)
    B = normal(E, R, shared, seed=seed + 3) @ normal(shared, O, seed=seed + 4) + noise * normal(E, R, O, seed=seed + 5)
    return A, B


def products(A: Tensor, B: Tensor) -> Tensor:
    return torch.stack([B[e].T @ A[e if len(A) > 1 else 0] for e in range(len(B))])  # (E, O, D)


def dense_errors(A: Tensor, B: Tensor, approximation: Tensor) -> tuple[list[float], float]:
    """Relative errors of each expert and of all, of dense products; 0 for an absent expert."""
    wanted = products(A, B)
    residuals, norms = [(x - y).norm() for x, y in zip(wanted, approximation, strict=True)], [x.norm() for x in wanted]
    each = [float(r / n) if n else float(r) for r, n in zip(residuals, norms, strict=True)]
    return each, float((wanted - approximation).norm() / wanted.norm())


def dense_jd_full(A: Tensor, B: Tensor, rank: int, sweeps: int, start: Tensor) -> tuple[Tensor, list[float]]:
    """The paper's alternation on dense products: the approximation (E, O, D), and its squared error by sweep."""
    wanted, V, errors = products(A, B), start, []
    for _ in range(sweeps):
        U = torch.linalg.svd(torch.cat([x @ V for x in wanted], 1)).U[:, :rank]
        V = torch.linalg.svd(torch.cat([x.T @ U for x in wanted], 1)).U[:, :rank]
        kept = torch.stack([U @ U.T @ x @ V @ V.T for x in wanted])
        errors.append(float((wanted - kept).square().sum()))
    return kept, errors


POOLS = {
    "several": (4, 3, 20, 17, 5),
    "one expert": (1, 4, 13, 9, 3),
    "rank one": (3, 2, 10, 12, 1),
    "rank of a unit": (1, 1, 7, 5, 1),
    "more ranks than features": (7, 5, 11, 9, 4),
    "basis above the stacked rank": (2, 2, 16, 15, 9),
    "whole smaller side": (3, 4, 9, 14, 9),
}


@pytest.mark.parametrize("shape", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("normalize", [False, True])
def test_errors_are_those_of_dense_products(shape: tuple[int, ...], normalize: bool) -> None:
    *sizes, K = shape
    A, B = pool(*sizes)
    basis = joint_basis(A, B, K, normalize=normalize)
    each, total = dense_errors(A, B, basis.U @ basis.Sigma @ basis.V.T)
    torch.testing.assert_close(basis.error.tolist(), each, rtol=1e-9, atol=1e-12)
    assert float(basis.total_error) == pytest.approx(total, rel=1e-9, abs=1e-12)
    for side, features in ((basis.U, sizes[3]), (basis.V, sizes[2])):
        assert side.shape == (features, K) and side.dtype == torch.float64
        torch.testing.assert_close(side.T @ side, torch.eye(K, dtype=torch.float64), rtol=0, atol=1e-12)
    best = torch.stack([basis.U.T @ x @ basis.V for x in products(A, B)])
    torch.testing.assert_close(basis.Sigma, best, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalize", [False, True])
def test_as_good_as_the_dense_alternation(normalize: bool) -> None:
    A, B = related(5, 3, 18, 15, shared=4, noise=0.5)
    scale = products(A, B).flatten(1).norm(dim=1).view(-1, 1, 1) if normalize else 1.0
    start = torch.linalg.svd((products(A, B) / scale).flatten(0, 1)).Vh[:4].T
    kept, errors = dense_jd_full(A, B / scale, 4, 60, start)
    basis = joint_basis(A, B, 4, iterations=60, normalize=normalize)
    ours = ((products(A, B) - basis.U @ basis.Sigma @ basis.V.T) / scale).square().sum()
    assert float(ours) == pytest.approx(errors[-1], rel=1e-9)
    torch.testing.assert_close(basis.U @ basis.Sigma @ basis.V.T, kept * scale, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("normalize", [False, True])
def test_no_sweep_raises_the_objective(normalize: bool, seed: int | None) -> None:
    A, B = pool(6, 3, 24, 20)
    B = B * torch.logspace(-1, 1, 6, dtype=torch.float64).view(-1, 1, 1)
    weights = products(A, B).flatten(1).norm(dim=1) if not normalize else torch.ones(6, dtype=torch.float64)
    objectives = [
        float((joint_basis(A, B, 4, iterations=n, normalize=normalize, seed=seed).error * weights).square().sum())
        for n in range(1, 12)
    ]
    assert all(after <= before * (1 + 1e-12) for before, after in zip(objectives, objectives[1:], strict=False))
    assert objectives[-1] < objectives[0]


def test_one_sweep_is_near_the_best_and_random_starts_are_not_better() -> None:
    for trial in range(10):
        A, B = pool(4, 3, 15, 12, seed=10 * trial)
        errors = [float(joint_basis(A, B, 3, iterations=100, seed=seed).total_error) for seed in (None, 0, 1, 2)]
        assert float(joint_basis(A, B, 3, iterations=1).total_error) <= 2**0.5 * min(errors)
        assert errors[0] <= 1.02 * min(errors)


@pytest.mark.parametrize("K", [6, 7, 10])
def test_exact_where_the_basis_holds_every_rank(K: int) -> None:
    A, B = pool(3, 2, 14, 10)
    basis = joint_basis(A, B, K, iterations=1)
    torch.testing.assert_close(basis.U @ basis.Sigma @ basis.V.T, products(A, B), rtol=0, atol=1e-12)
    assert basis.error.max() < 1e-13 and basis.total_error < 1e-13


def test_small_errors_are_not_lost_in_rounding() -> None:
    A, B = related(4, 3, 30, 25, shared=3, noise=0.0)
    A[1] += 1e-10 * normal(3, 30, seed=7)
    basis = joint_basis(A, B, 3)
    dense, _ = dense_errors(A, B, basis.U @ basis.Sigma @ basis.V.T)
    assert 1e-12 < basis.error[1] < 1e-9
    assert float(basis.error[1]) == pytest.approx(dense[1], rel=1e-3)


def test_a_planted_subspace_is_recovered() -> None:
    A, B = related(6, 3, 40, 30, shared=4, noise=0.0)
    basis = joint_basis(A, B, 4, iterations=2)
    assert basis.total_error < 1e-12
    left, right = (torch.linalg.qr(X.flatten(0, 1).T[:, :4]).Q for X in (B, A))
    for found, planted in ((basis.U, left), (basis.V, right)):
        torch.testing.assert_close(found @ found.T, planted @ planted.T, rtol=0, atol=1e-10)
    noisy = joint_basis(*related(6, 3, 40, 30, shared=4, noise=0.05), 4)
    assert noisy.total_error < 0.1


def test_a_shared_basis_beats_an_svd_of_each_expert() -> None:
    E, R, D, O, K = 16, 8, 96, 80, 8
    A, B = related(E, R, D, O, shared=8, noise=0.1)
    basis = joint_basis(A, B, K)
    budget = pool_size(E, R, D, O, K).basis
    each = budget // (E * (D + O))  # the rank that independent experts get for as many numbers, rounded up
    kept = []
    for x in products(A, B):
        U, S, Vh = torch.linalg.svd(x)
        kept.append(U[:, : each + 1] * S[: each + 1] @ Vh[: each + 1])
    _, alone = dense_errors(A, B, torch.stack(kept))
    assert basis.total_error < 0.5 * alone


@pytest.mark.parametrize("normalize", [False, True])
def test_absent_experts_and_unequal_ranks(normalize: bool) -> None:
    A, B = pool(4, 3, 15, 12)
    A[2], B[2] = 0.0, 0.0
    A[0, 1:], B[0, 1:] = 0.0, 0.0  # rank 1, padded
    B[3, 2] = 0.0  # a rank that adds nothing whatever its A
    basis = joint_basis(A, B, 3, iterations=30, normalize=normalize)
    assert basis.error[2] == 0 and not basis.Sigma[2].any()
    each, total = dense_errors(A, B, basis.U @ basis.Sigma @ basis.V.T)
    torch.testing.assert_close(basis.error.tolist(), each, rtol=1e-9, atol=1e-12)
    present = joint_basis(A[[0, 1, 3]], B[[0, 1, 3]], 3, iterations=30, normalize=normalize)
    torch.testing.assert_close(basis.error[[0, 1, 3]], present.error, rtol=1e-8, atol=1e-10)
    exact = joint_basis(A, B, 6, iterations=1, normalize=normalize)  # 1 + 3 + 0 + 2 ranks
    assert exact.error.max() < 1e-12

    nothing = joint_basis(torch.zeros(2, 2, 6), torch.zeros(2, 2, 5), 3, normalize=normalize)
    assert nothing.total_error == 0 and not nothing.error.any() and not nothing.Sigma.any()
    torch.testing.assert_close(nothing.U.T @ nothing.U, torch.eye(3, dtype=torch.float64))


def test_normalizing_keeps_small_experts() -> None:
    A, B = pool(2, 2, 16, 16)
    B[0] *= 1e-3
    small, fair = joint_basis(A, B, 2).error[0], joint_basis(A, B, 2, normalize=True).error[0]
    assert small > 0.9 and fair < 0.9


def test_shared_A_and_low_precision() -> None:
    A, B = pool(1, 3, 14, 14)[0], pool(4, 3, 14, 11)[1]
    one, stacked = joint_basis(A, B, 2), joint_basis(A.expand(4, -1, -1), B, 2)
    torch.testing.assert_close(one.error, stacked.error, rtol=1e-8, atol=1e-10)
    assert joint_basis(A, B, 11, iterations=1).total_error < 1e-12
    half_A, half_B = A.bfloat16().requires_grad_(), B.bfloat16()
    basis, merged = joint_basis(half_A, half_B, 2), merge_ranks(half_A, half_B, 2)
    assert torch.equal(basis.U, joint_basis(half_A.detach().double(), half_B.double(), 2).U)
    assert all(t.dtype == torch.float64 and not t.requires_grad for t in basis)
    assert merged.A.dtype == merged.B.dtype == torch.float64 and not merged.A.requires_grad


def test_experts_of_a_basis_run_in_the_reference_kernel() -> None:
    A, B = related(5, 3, 22, 18, shared=4, noise=0.3)
    basis = joint_basis(A, B, 4)
    new_A, new_B = experts_of(basis)
    assert new_A.shape == (1, 4, 22) and new_B.shape == (5, 4, 18)
    assert new_A.is_contiguous() and new_B.is_contiguous()
    x, out, gates = normal(2, 3, 22, seed=1), normal(2, 3, 18, seed=2), normal(6, 5, seed=3).softmax(1)
    wanted = out.clone().flatten(0, 1)
    for t in range(6):
        for e in range(5):
            wanted[t] += gates[t, e] * basis.U @ (basis.Sigma[e] @ (basis.V.T @ x.flatten(0, 1)[t]))
    got = mixture_linear(x, gates, Projection(new_A, new_B, 1.0), out)
    torch.testing.assert_close(got.flatten(0, 1), wanted, rtol=1e-10, atol=1e-10)
    size = pool_size(5, 3, 22, 18, 4)
    assert size.experts == A.numel() + B.numel() and size.share_A == new_A.numel() + new_B.numel()
    assert size.basis == basis.U.numel() + basis.V.numel() + basis.Sigma.numel()
    one_A, one_B = experts_of(joint_basis(A[:1], B[:1], 3))
    got = mixture_linear(x, None, Projection(one_A, one_B, 1.0), out)
    torch.testing.assert_close(got, out + x @ products(A[:1], B[:1])[0].T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("normalize", [False, True])
def test_the_best_shared_A(shape: tuple[int, ...], normalize: bool) -> None:
    *sizes, K = shape
    A, B = pool(*sizes)
    if sizes[0] > 2:
        B[1] = 0.0
        B[2] *= 10
    shared, basis = shared_A(A, B, K, normalize=normalize), joint_basis(A, B, K, normalize=normalize)
    assert shared.A.shape == (1, K, sizes[2]) and shared.B.shape == (sizes[0], K, sizes[3])
    each, total = dense_errors(A, B, products(shared.A.expand(sizes[0], -1, -1), shared.B))
    torch.testing.assert_close(shared.error.tolist(), each, rtol=1e-9, atol=1e-12)
    assert float(shared.total_error) == pytest.approx(total, rel=1e-9, abs=1e-12)
    norms = products(A, B).flatten(1).norm(dim=1)
    weights = (norms > 0).double() if normalize else norms
    stacked = (products(A, B) * (weights / norms.where(norms > 0, 1)).view(-1, 1, 1)).flatten(0, 1)
    least = torch.linalg.svdvals(stacked)[K:].norm()  # Eckart and Young
    assert float((shared.error * weights).norm()) == pytest.approx(float(least), rel=1e-9, abs=1e-10)
    assert (shared.error * weights).norm() <= (basis.error * weights).norm() + 1e-10


def planted_units(E: int, R: int, D: int, O: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Experts of the same R units in other orders, with other signs and other scales between a and b; and the units."""
    unit_A, unit_B = pool(1, R, D, O, seed=20)
    orders = torch.stack([torch.randperm(R, generator=torch.Generator().manual_seed(e)) for e in range(E)])
    factors = normal(E, R, 1, seed=30).sign() * normal(E, R, 1, seed=31).mul(2).exp()
    return unit_A[0][orders] * factors, unit_B[0][orders] / factors, orders, unit_B[0].T @ unit_A[0]


def test_planted_units_are_clustered_whatever_their_order_sign_and_scale() -> None:
    A, B, orders, product = planted_units(6, 4, 30, 24)
    merged = merge_ranks(A, B, 4)
    torch.testing.assert_close(merged.B[0].T @ merged.A[0], product, rtol=0, atol=1e-12)
    assert merged.error < 1e-13 and merged.best_output_factor == pytest.approx(1)
    torch.testing.assert_close(merged.cosine, torch.ones(6, dtype=torch.float64))
    for unit in range(4):
        assert len(merged.cluster[orders == unit].unique()) == 1
    assert set(merged.cluster.flatten().tolist()) == {0, 1, 2, 3}
    wide = merge_ranks(A, B, 9)  # fewer different units than ranks: the others stay zero
    torch.testing.assert_close(wide.B[0].T @ wide.A[0], product, rtol=0, atol=1e-12)
    assert int((wide.A[0].norm(dim=1) == 0).sum()) == 5


@pytest.mark.parametrize("shape", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_merged_ranks_against_dense_products(shape: tuple[int, ...], factor: float) -> None:
    *sizes, K = shape
    A, B = pool(*sizes)
    if sizes[0] > 2:
        A[1], B[1, 0] = 0.0, 0.0
        B[0, 0] = 0.0
    merged = merge_ranks(A, B, K, output_factor=factor)
    assert merged.A.shape == (1, K, sizes[2]) and merged.B.shape == (1, K, sizes[3])
    new, each = merged.B[0].T @ merged.A[0], products(A, B)
    mean = each.mean(0)
    assert float(merged.error) == pytest.approx(float((new - mean).norm() / mean.norm()), rel=1e-9, abs=1e-12)
    cosines = [float((new * x).sum() / (new.norm() * x.norm())) if x.any() else 0.0 for x in each]
    torch.testing.assert_close(merged.cosine.tolist(), cosines, rtol=1e-9, atol=1e-12)
    best = float((new / factor * mean).sum() / (new / factor).square().sum())
    assert float(merged.best_output_factor) == pytest.approx(best, rel=1e-9)
    assert_centroids(A, B, merged, factor)


def assert_centroids(A: Tensor, B: Tensor, merged: MergedRanks, factor: float) -> None:
    """Each rank is the signed mean of its balanced units, at their mean norm; no unit has a nearer centroid."""
    members: dict[int, list[Tensor]] = {}
    for e in range(len(B)):
        for j in range(B.shape[1]):
            a, b = A[e, j], B[e, j]
            if not a.any() or not b.any():
                assert merged.cluster[e, j] == -1
                continue
            balance = (b.norm() / a.norm()).sqrt()
            members.setdefault(int(merged.cluster[e, j]), []).append(torch.cat([a * balance, b / balance]))
    ranks = torch.cat([merged.A[0], merged.B[0] / factor], 1)
    means = {}
    for k, units in members.items():
        signed = [u if u @ ranks[k] >= 0 else -u for u in units]
        means[k] = sum(signed, torch.zeros_like(units[0])) / len(units)
        wanted = means[k] / means[k].norm() * sum(float(u.norm()) for u in units) / len(units)
        torch.testing.assert_close(ranks[k], wanted, rtol=1e-9, atol=1e-12)
    assert not ranks[[k for k in range(len(ranks)) if k not in members]].any()
    for k, units in members.items():
        for unit in units:
            distances = {m: float(min((unit - c).norm(), (unit + c).norm())) for m, c in means.items()}
            assert distances[k] <= min(distances.values()) + 1e-9


def test_lloyd_never_raises_its_objective() -> None:
    A, B = pool(8, 4, 12, 12)

    def objective(iterations: int) -> float:
        merged = merge_ranks(A, B, 5, iterations=iterations)
        balance = (B.norm(dim=-1, keepdim=True) / A.norm(dim=-1, keepdim=True)).sqrt()
        units, total = torch.cat([A * balance, B / balance], -1), 0.0
        ranks = torch.cat([merged.A[0], merged.B[0]], 1)
        for k in range(5):
            own = units[merged.cluster == k]
            own = own * torch.where(own @ ranks[k] < 0, -1.0, 1.0).unsqueeze(1)
            total += float((own - own.mean(0)).square().sum()) if len(own) else 0.0
        return total

    values = [objective(n) for n in range(1, 12)]
    assert all(after <= before + 1e-9 for before, after in zip(values, values[1:], strict=False))
    assert values[-1] < values[0]


def test_an_empty_cluster_takes_the_farthest_unit() -> None:
    from molora.adapters.rank_clusters import _fill_empty

    units = torch.tensor([[1.0, 0.0], [1.0, 0.1], [5.0, 5.0]], dtype=torch.float64)
    cluster, signs = torch.tensor([0, 0, 0]), torch.tensor([[1.0], [1.0], [-1.0]], dtype=torch.float64)
    _fill_empty(units, signs, cluster, torch.tensor([[1.0, 0.0], [9.0, 0.0]], dtype=torch.float64))
    assert cluster.tolist() == [0, 0, 1] and signs.flatten().tolist() == [1, 1, 1]
    cluster = torch.tensor([0, 1])
    _fill_empty(units[:2], signs[:2], cluster, normal(3, 2))
    assert cluster.tolist() == [0, 1]  # none may be left empty for it


def test_absent_experts_only() -> None:
    merged = merge_ranks(torch.zeros(3, 2, 7), normal(3, 2, 6).float(), 2)
    assert not merged.A.any() and not merged.B.any() and (merged.cluster == -1).all()
    assert merged.error == 0 and not merged.cosine.any() and merged.best_output_factor == 1


def test_every_unit_its_own_cluster_gives_the_sum() -> None:
    A, B = pool(3, 2, 12, 10)
    merged = merge_ranks(A, B, 6, output_factor=1 / 3)
    torch.testing.assert_close(merged.B[0].T @ merged.A[0], products(A, B).mean(0), rtol=0, atol=1e-12)
    assert merged.error < 1e-13


def test_the_same_seed_gives_the_same_numbers() -> None:
    A, B = pool(6, 4, 30, 20)
    for function in (joint_basis, merge_ranks):
        first, again, other = function(A, B, 5), function(A, B, 5), function(A, B, 5, seed=1)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
        assert torch.equal(function(A, B, 5, seed=1)[0], other[0]) and not torch.equal(first[0], other[0])


def test_norms_of_products() -> None:
    X, Y = normal(3, 9, 4), normal(1, 2, 4, seed=1)
    wanted = torch.stack([(x @ Y[0].T).norm() for x in X])
    torch.testing.assert_close(product_norms(X, Y), wanted)


ONE = torch.ones(2, 3, 6), torch.ones(2, 3, 4)
BAD = {
    "rank below 1": ((*ONE, 0), {}, "rank=0 must be an integer of at least 1"),
    "rank of a side": (
        (*ONE, 5),
        {},
        r"rank=5 exceeds 4, the smaller side of the linear in A (2, 3, 6) and B (2, 3, 4)",
    ),
    "ranks": ((ONE[0][:, :2], ONE[1], 1), {}, "got A (2, 2, 6) and B (2, 3, 4); stack the experts"),
    "experts": ((torch.ones(3, 3, 6), ONE[1], 1), {}, "got A (3, 3, 6) and B (2, 3, 4); stack the experts"),
    "one expert's matrices": ((ONE[0][0], ONE[1][0], 1), {}, "got A (3, 6) and B (3, 4); stack the experts"),
    "no experts": ((ONE[0][:0], ONE[1][:0], 1), {}, "a pool needs at least one expert"),
    "dtype": ((ONE[0].long(), ONE[1], 1), {}, "got torch.int64 and torch.float32 for A and B; experts have"),
    "not finite": ((ONE[0] * float("nan"), ONE[1], 1), {}, "A or B has values that are not finite; remove"),
    "iterations": ((*ONE, 1), {"iterations": 0}, "iterations=0 must be an integer of at least 1"),
    "seed": ((*ONE, 1), {"seed": -1}, "seed=-1 must be an integer of at least 0"),
}


@pytest.mark.parametrize("function", [joint_basis, shared_A, merge_ranks])
@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input(function: object, case: tuple[tuple[object, ...], dict[str, int], str]) -> None:
    args, options, message = case
    if function is shared_A and options:
        return  # it has none of these
    with pytest.raises(ValueError, match=re.escape(message)):
        function(*args, **options)  # type: ignore[operator]


def test_bad_factor_and_counts() -> None:
    with pytest.raises(ValueError, match="output_factor=0 must be a finite number above 0"):
        merge_ranks(*ONE, 1, output_factor=0)
    with pytest.raises(ValueError, match="num_experts=0 must be an integer of at least 1"):
        pool_size(0, 4, 8, 8, 2)
