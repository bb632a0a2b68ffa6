"""Arrow's prototypes: for each expert the input direction that its product stretches most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from molora.checks import check_int
from molora.context import Runtime, adapter_of
from molora.layers import MoloraLayer
from molora.routers import Arrow
from molora.routers.fixed_vectors import FixedVectorRouter

_CHUNK = 16
"""Experts whose matrices are in fp64 at a time."""


def right_singular_vectors(
    experts: Iterable[tuple[Tensor, Tensor]], power_iterations: int | None = None, seed: int = 0
) -> Tensor:
    """The right singular vector of ``B_e^T A_e`` with the largest singular value, (E, D) fp32 of unit length.

    Exact: with ``C_e = (B_e B_e^T)^(1/2) A_e``, which has the same right singular vectors, by the eigenvectors of the
    (R, R) matrices ``C_e C_e^T``, in fp64; the sign is that of its largest entry. The (O, D) products are never made.

    Args:
        experts: (A (E, R, D), B (E, R, O)) of each linear that reads the input; of several (q, k, v) the outputs are
            taken as one.
        power_iterations: instead of the exact vector so many steps of power iteration in fp32 (PEFT 0.21: 15), which
            have not converged where singular values are close.
        seed: of the iterations' start, the same for each expert.

    Returns:
        A row of zeros where an expert's product is zero.
    """
    pairs = list(experts)
    with torch.no_grad():
        if power_iterations is not None:
            return torch.stack([_iterated([(A[e], B[e]) for A, B in pairs], power_iterations, seed)
                                for e in range(len(pairs[0][1]))])  # fmt: skip
        starts = range(0, len(pairs[0][1]), _CHUNK)
        return torch.cat([_exact([(A[s : s + _CHUNK], B[s : s + _CHUNK]) for A, B in pairs]) for s in starts])


def _exact(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    C = torch.cat([_square_root(B.double() @ B.double().mT) @ A.double() for A, B in pairs], 1)
    values, vectors = torch.linalg.eigh(C @ C.mT)
    found = (C.mT @ vectors[:, :, -1:]).squeeze(2)
    norms = values[:, -1:].clamp(min=0).sqrt()
    found = torch.where(norms > 0, found / torch.where(norms > 0, norms, 1), 0)
    largest = found.gather(1, found.abs().argmax(1, keepdim=True))
    return (found * torch.where(largest < 0, -1.0, 1.0)).float()


def _square_root(gram: Tensor) -> Tensor:
    """The symmetric square root of (E, R, R) positive semi-definite matrices."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(1)) @ vectors.mT


def _iterated(linears: list[tuple[Tensor, Tensor]], iterations: int, seed: int) -> Tensor:
    device = linears[0][0].device
    generator = torch.Generator(device.type).manual_seed(seed)
    v = torch.randn(linears[0][0].shape[1], device=device, generator=generator)
    v = v / (v.norm() + 1e-8)
    for _ in range(iterations):
        w = torch.stack([A.float().T @ ((B.float() @ B.float().T) @ (A.float() @ v)) for A, B in linears]).sum(0)
        v = w / (w.norm() + 1e-8)
    return v


@torch.no_grad()
def set_prototypes(
    model: nn.Module, adapter_name: str | None = None, power_iterations: int | None = None, seed: int = 0
) -> None:
    """Makes the prototypes of an arrow router from its experts as they are now.

    Args:
        model: a PeftModel, or a transformers model with an adapter of its own.
        adapter_name: the active adapter if None.
        power_iterations, seed: as for `right_singular_vectors`; None: exact.

    Raises:
        ValueError: the adapter has another router.
    """
    if power_iterations is not None:
        check_int("power_iterations", power_iterations)
    runtime, adapter, _ = adapter_of(model, adapter_name, "to make prototypes for")
    sites = [site for site in runtime.sites if site.adapter == adapter and site.owner is not None]
    if not sites or not all(isinstance(site.router.config, Arrow) for site in sites):
        raise ValueError(f"adapter {adapter!r} has no arrow router, so no prototypes; convert it with router='arrow'")
    found = prototypes(runtime, adapter, power_iterations, seed)
    for site in sites:
        assert isinstance(site.router, FixedVectorRouter)
        site.router.set_vectors(found[site.name])


def prototypes(
    runtime: Runtime,
    adapter: str,
    power_iterations: int | None = None,
    seed: int = 0,
    experts: Mapping[MoloraLayer, tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """For each router of the adapter, by name, the prototypes (n, D) of its experts, or of others: for each linear
    their A (n, R, D) and B (n, R, O)."""
    readers: dict[MoloraLayer, list[MoloraLayer]] = {}
    for module in runtime.model().modules():  # type: ignore[union-attr]
        if isinstance(module, MoloraLayer) and adapter in module.molora_specs:
            shared = module.molora_shared.get(adapter)
            owner = module if shared is None else shared.owner
            if owner is not None:
                readers.setdefault(owner, []).append(module)
    result = {}
    for site in runtime.sites:
        if site.adapter == adapter and site.owner is not None:
            if experts is not None:
                pairs = [experts[layer] for layer in readers[site.owner] if layer in experts]
            else:
                linears = [own for layer in readers[site.owner] if (own := layer.experts(adapter, "")) is not None]
                pairs = [(own.A.expand(own.num_experts, -1, -1), own.B) for own in linears]
            result[site.name] = right_singular_vectors(pairs, power_iterations, seed)
    return result
