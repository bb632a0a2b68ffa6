"""Riemannian preconditioning of the experts' gradients, as a transform in the backward of the layer that owns them.

ZeRO hands its optimiser flat slices of parameters, in which A and B have no shape, so no optimiser can do this there; a
transform of the gradient can. It is linear in the gradient, so it is the same for each micro-batch as for their sum,
and any optimiser steps on what it leaves. It holds nothing but (E, R, R) matrices, made in the forward, and so does not
care whether the parameters are whole when the backward runs.

Legend: E experts, R rank of one expert, D input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from molora.kernels.reference import Projection

DELTA = 1e-6
"""What is added to the diagonal of A A^T and B B^T; the published value."""


class _Solve(torch.autograd.Function):
    """The weight itself; in the backward ``gram^-1 grad`` for each expert."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gram: Tensor) -> Tensor:
        ctx.save_for_backward(gram)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gram,) = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            wide = grad.to(gram.dtype)
            # The form that does not ask the device whether it went well.
            solved, info = torch.linalg.solve_ex(gram, wide)
            good = (info == 0)[:, None, None] & solved.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
            return torch.where(good, solved, wide).to(grad.dtype), None


@torch.no_grad()
def _gram(weight: Tensor, delta: float, summed: bool = False) -> Tensor:
    """``W W^T + delta I`` of each expert or, `summed`, of all: (E, R, N) -> (E, R, R) or (1, R, R), fp32 at least."""
    with torch.autocast(weight.device.type, enabled=False):
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        gram = wide @ wide.mT
        if summed:
            gram = gram.sum(0, keepdim=True)
        return gram + delta * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def preconditioned(experts: Projection, delta: float = DELTA) -> Projection:
    """The same experts, whose gradients come back preconditioned.

    For each expert ``dA <- (B B^T + delta I)^-1 dA`` and ``dB <- (A A^T + delta I)^-1 dB``, with A and B as they were
    in the forward. Where experts share A, the matrix for it is ``sum_e B_e B_e^T + delta I``: of the metric
    ``sum_e |B_e^T dA|^2`` of all products that A is part of; for one expert it is the same.

    With B zero, as in a fresh mixture, ``(delta I)^-1`` meets a gradient of A that is exactly zero: the first step
    moves B alone. B is then as small as one step, and A's gradient, a product with B, comes back with B / (B^2 + delta)
    in the place of B: at most ``1 / (2 sqrt(delta))`` = 500, where B is near sqrt(delta). Plain SGD makes its largest
    steps there; AdamW divides them away; clipping by the norm of all gradients lets them shrink everybody else's.

    Args:
        experts: A (E, R, D) or (1, R, D), B (E, R, O), any floating dtype. Matrices and solutions are in fp32 (fp64 for
            fp64); the gradient comes back in the dtype of its parameter, so that fp16 parameters can overflow. Rounding
            of dA outside the span of a B of lower rank is magnified by up to 1 / delta: keep experts in fp32, which is
            PEFT's default (`autocast_adapter_dtype`).
        delta: > 0.

    Where the system is singular to working precision, or its solution not finite, the gradient of that expert is left
    as it is. No host sync. Not a gradient of anything: do not differentiate it again.

    Source: arXiv 2502.15828, section 3; THUDM/MoELoRA_Riemannian, custom_optimizer.py (SGDr, AdamWr), where B is
    (O, R). Deviation: AdamWr steps on A in place before it reads A for B's matrix, so it pairs the gradient of B with
    the A of the next step; here, as in SGDr, both are the matrices the gradients were taken at.
    """
    A, B = experts.A, experts.B
    new_A: Tensor = _Solve.apply(A, _gram(B, delta, experts.shares_A))
    new_B: Tensor = _Solve.apply(B, _gram(A, delta).expand(len(B), -1, -1))
    return Projection(new_A, new_B, experts.scaling)


Mix = Callable[[Tensor, Tensor, Projection, Tensor], Tensor]
"""(input, gates, experts, out) -> out + mixture."""


def gate_rescaled(mix: Mix, x: Tensor, gates: Tensor, experts: Projection, out: Tensor) -> Tensor:
    """A mixture whose experts get the gradient of ``sqrt(g)`` in the place of the gate g.

    ``out_i = sg(sqrt g_i) E_i(x) + (g_i - sg(sqrt g_i)) sg(E_i(x))`` with sg the stop-gradient: the value is that of
    the ordinary mixture, here bit for bit; dA and dB carry sqrt(g_i), the gradient of the gates is the ordinary one. As
    published, dx through the experts carries sqrt(g_i) too, so what earlier layers get is not the gradient of the
    forward.

    Preconditioning by B_i B_i^T makes a step of the product g_i^2 times as large as without a gate; sqrt(g_i) in the
    gradient leaves g_i^1.5.

    Cost: the mixture twice, one of the two backwards for the gates alone, and two element-wise passes over the output.

    Args:
        mix: adds the mixture to `out`; called twice with the same dropout mask.
        x: what it reads, of any shape.
        gates: (T, G), >= 0.
        experts: A and B; preconditioned or not.
        out: (..., O).

    Source: arXiv 2502.15828; THUDM/MoELoRA_Riemannian, moe_lora.py ("moe-riemannian").
    """
    fixed = Projection(experts.A.detach(), experts.B.detach(), experts.scaling)
    y = mix(x.detach(), gates, fixed, out)
    path = mix(x, gates.detach().sqrt(), experts, torch.zeros_like(out))
    return y + (path - path.detach())  # adds zero, and a gradient
