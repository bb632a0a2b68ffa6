"""Dense-masked mixture of a linear: all experts as one LoRA of rank E*R, the gates a mask on its ranks.

Two skinny GEMMs and an in-place expand: static shapes, no sort, no host sync. A LoRA is bound by memory traffic, and
this reads x once and writes y once, where dispatch does both once per chosen expert; it wins up to several hundred
total ranks. Legend in `reference.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora.kernels.reference import Projection, dropout_mask, gate_ranks


class _MixtureLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gates, A, B, scaling, out, dropout, seed, inplace):
        with torch.autocast(x.device.type, enabled=False):
            experts = Projection(A, B, scaling)
            A_cat, B_cat = experts.cat(out.dtype)
            inputs = x.flatten(0, -2).to(out.dtype)
            if dropout:
                inputs = inputs * dropout_mask(x, dropout, seed).flatten(0, -2).to(out.dtype)
            shrunk = inputs @ A_cat.T
            ranks = (gate_ranks(shrunk, gates, experts.shares_A) * scaling).to(out.dtype)
            ctx.save_for_backward(x, gates, A, B, shrunk)
            ctx.scaling, ctx.dropout, ctx.seed = scaling, dropout, seed
            if not inplace:
                return torch.addmm(out.flatten(0, -2), ranks, B_cat).view_as(out)
            ctx.mark_dirty(out)
            out.view(-1, out.shape[-1]).addmm_(ranks, B_cat)
            return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        x, gates, A, B, shrunk = ctx.saved_tensors
        need_x, need_gates, need_A, need_B = ctx.needs_input_grad[:4]
        grad_x = grad_gates = grad_A = grad_B = None
        with torch.autocast(grad_out.device.type, enabled=False):
            experts = Projection(A, B, ctx.scaling)
            dtype = grad_out.dtype
            A_cat, B_cat = experts.cat(dtype)
            dy = grad_out.flatten(0, -2)
            if need_B:
                ranks = (gate_ranks(shrunk, gates, experts.shares_A) * ctx.scaling).to(dtype)
                grad_B = (ranks.T @ dy).view_as(B).to(B.dtype)
            if need_x or need_gates or need_A:
                grad_ranks = (dy @ B_cat.T) * ctx.scaling
                if need_gates:
                    # d loss / d gate in rank space: R products per gate, and no division by the gate.
                    per_gate = grad_ranks.unflatten(1, (gates.shape[1], -1)).to(gates.dtype)
                    groups = (1, -1) if experts.shares_A else per_gate.shape[1:]
                    grad_gates = (per_gate * shrunk.unflatten(1, groups)).sum(-1)
                if experts.shares_A:
                    grad_shrunk = (grad_ranks.unflatten(1, (gates.shape[1], -1)) * gates.unsqueeze(-1)).sum(1)
                else:
                    grad_shrunk = gate_ranks(grad_ranks, gates, False)
                grad_shrunk = grad_shrunk.to(dtype)
                mask = dropout_mask(x, ctx.dropout, ctx.seed).flatten(0, -2).to(dtype) if ctx.dropout else None
                if need_A:
                    inputs = x.flatten(0, -2).to(dtype)
                    grad_A = (grad_shrunk.T @ (inputs if mask is None else inputs * mask)).view_as(A).to(A.dtype)
                if need_x:
                    grad_inputs = grad_shrunk @ A_cat
                    grad_x = (grad_inputs if mask is None else grad_inputs * mask).view_as(x).to(x.dtype)
        return grad_x, grad_gates, grad_A, grad_B, None, grad_out, None, None, None


def mixture_linear(
    x: Tensor,
    gates: Tensor | None,
    experts: Projection,
    out: Tensor,
    *,
    dropout: float = 0.0,
    seed: int = 0,
    inplace: bool = False,
) -> Tensor:
    """`reference.mixture_linear` with a hand-written backward; same arguments, same result.

    Saved for the backward: x (which is there anyway), the gates and the (T, E*R) shrunk input; never a (T, O) tensor.
    The dropout mask is made again from its seed. With `inplace` the result is written into `out`, which must then be a
    fresh, contiguous tensor that nobody else reads.
    """
    return _MixtureLinear.apply(x, gates, *experts, out, dropout, seed, inplace)
