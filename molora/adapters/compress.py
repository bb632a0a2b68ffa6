"""A pool of experts made smaller: one basis for all of them, or one LoRA in their place."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from molora.adapters.from_adapters import linears_of, replace_experts
from molora.adapters.joint_compression import joint_basis
from molora.adapters.lora_files import LoraPair, write_lora
from molora.adapters.low_rank import product_norms
from molora.adapters.rank_clusters import merge_ranks
from molora.adapters.to_adapters import make_way
from molora.checks import check_int
from molora.context import Runtime, adapter_of
from molora.experts import StackedWeight
from molora.linear import MixedLinear


def compress_experts(model: Any, rank: int, adapter_name: str | None = None) -> dict[str, float]:
    """Gives the experts of each linear one basis of `rank` on each side (Compress then Serve, JD-Full).

    ``B_e^T A_e`` becomes ``U Sigma_e V^T``: U and V are shared, Sigma_e (rank, rank) is the expert's. The config
    keeps the errors (`compression`), so that a checkpoint says what it lost. Routers stay as they are.

    Args:
        model: with a mixture of placement "linear" or "block"; changed in place.
        rank: of the basis; a linear with fewer features has a smaller one.
        adapter_name: the active adapter if None.

    Returns:
        For each linear the relative Frobenius error of its experts' products, all stacked.

    Raises:
        ValueError: rank-wise gates, FFN experts, or experts that share a basis already.
    """
    check_int("rank", rank)
    runtime, adapter, config = _mixture(model, adapter_name)
    linears = {n: m for n, m in linears_of(runtime, adapter).items() if m.molora_specs[adapter][""].router is not None}
    errors, residual, total = {}, 0.0, 0.0
    for name, layer in linears.items():
        A, B = _experts(layer, adapter)
        basis = joint_basis(A, B, min(rank, layer.in_features, layer.out_features))
        errors[name] = float(basis.total_error)
        norm = float(product_norms(B.double().mT, A.double().mT).square().sum())
        residual, total = residual + errors[name] ** 2 * norm, total + norm
        _use_basis(layer, adapter, basis.U, basis.Sigma, basis.V)
    ranks = {name: layer.molora_specs[adapter][""].r for name, layer in linears.items()}
    config.r, config.lora_alpha, config.use_rslora = max(ranks.values()), max(ranks.values()), False
    config.rank_pattern = {name: r for name, r in ranks.items() if r != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.share_A = config.shared_basis = True
    config.compression = {
        "method": "joint_basis",
        "rank": rank,
        "error": (residual / total) ** 0.5 if total else 0.0,
        "largest_error": max(errors.values()),
    }
    return errors


def merge_experts(
    model: Any,
    rank: int,
    out: str | os.PathLike[str],
    adapter_name: str | None = None,
    output_factor: float = 1.0,
    overwrite: bool = False,
) -> dict[str, float]:
    """Writes one PEFT LoRA of `rank` whose ranks are the centroids of the clustered ranks of all experts (LoRA-LEGO).

    Returns:
        For each linear the relative Frobenius error against the mean of the experts' products.

    Raises:
        ValueError: rank-wise gates, FFN experts, or a directory that holds something.
    """
    check_int("rank", rank)
    runtime, adapter, _ = _mixture(model, adapter_name)
    pairs, errors = {}, {}
    for name, layer in linears_of(runtime, adapter).items():
        A, B = _experts(layer, adapter)
        merged = merge_ranks(A, B, min(rank, layer.in_features, layer.out_features), output_factor=output_factor)
        errors[name] = float(merged.error)
        pairs[name] = LoraPair(merged.A[0].float(), merged.B[0].T.float().contiguous(), 1.0)
    base: Any = runtime.model()
    make_way([Path(out)], overwrite)
    write_lora(out, pairs, getattr(base, "name_or_path", None) or None, model=base)
    return errors


def _mixture(model: Any, adapter_name: str | None) -> tuple[Runtime, str, Any]:
    runtime, adapter, config = adapter_of(model, adapter_name, "to compress")
    if config.placement not in ("linear", "block") or config.router.name == "rank_wise":
        raise ValueError(
            f"placement {config.placement!r} with router {config.router.name!r} has no experts of single linears; only "
            "those are made smaller"
        )
    if config.shared_basis:
        raise ValueError(f"the experts of adapter {adapter!r} share a basis already; compress the original ones")
    return runtime, adapter, config


def _experts(layer: MixedLinear, adapter: str) -> tuple[Tensor, Tensor]:
    """A and B with the scaling in it."""
    experts = layer.experts(adapter, "")
    assert experts is not None
    return experts.A.detach(), experts.B.detach() * experts.scaling


def _use_basis(layer: MixedLinear, adapter: str, U: Tensor, Sigma: Tensor, V: Tensor) -> None:
    spec, old = layer.molora_specs[adapter][""], getattr(layer, "molora_B")[adapter].weight  # noqa: B009
    dtype = old.dtype
    K = U.shape[1]
    layer.molora_specs[adapter][""] = replace(
        spec, r=K, lora_alpha=K, use_rslora=False, share_A=True, shared_basis=True
    )
    basis = StackedWeight(1, K, layer.out_features)
    basis.weight = nn.Parameter(U.T[None].to(dtype), requires_grad=old.requires_grad)
    layer.molora_U[adapter] = basis
    replace_experts(layer, adapter, V.T[None].to(dtype), Sigma.mT.contiguous().to(dtype))
