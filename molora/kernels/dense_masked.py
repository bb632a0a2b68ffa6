"""Dense-masked mixture of a linear: all experts as one LoRA of rank E*R, the gates a mask on its ranks.

Two skinny GEMMs and an in-place expand: static shapes, no sort, no host sync. A LoRA is bound by memory traffic, and
this reads x once and writes y once, where dispatch does both once per chosen expert; it wins up to several hundred
total ranks. Legend in `reference.py`. The first half, `shrink`, can be shared by linears that read the same input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora.kernels import decode, reference
from molora.kernels.launch import apply, no_autocast
from molora.kernels.ranks import gate_ranks, gate_ranks_backward
from molora.kernels.reference import Projection
from molora.kernels.shrink import shrink
from molora.kernels.skinny import add_product_, product


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shrunk: Tensor, gates: Tensor | None, B: Tensor, scaling: float, out: Tensor, inplace: bool
    ) -> Tensor:
        with no_autocast(out.device):
            B_cat = B.flatten(0, 1).to(out.dtype)
            ranks, kept = gate_ranks(shrunk, gates, B_cat.shape[0], scaling, out.dtype)
            # B as it was multiplied with: half an fp32 parameter's memory, and no second cast.
            ctx.save_for_backward(kept, gates, B_cat)
            ctx.B_shape, ctx.B_dtype = B.shape, B.dtype
            ctx.scaling, ctx.dtype = scaling, shrunk.dtype
            if not inplace:
                # No view, for the code behind a linear may add to its output in place (Falcon's does).
                result = torch.empty(out.shape, dtype=out.dtype, device=out.device)
                torch.addmm(out.flatten(0, -2), ranks, B_cat, out=result.view(-1, out.shape[-1]))
                return result
            ctx.mark_dirty(out)
            add_product_(out.view(-1, out.shape[-1]), ranks, B_cat.contiguous())
            return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        kept, gates, B_cat = ctx.saved_tensors
        grad_B = None
        with no_autocast(grad_out.device):
            dy = grad_out.flatten(0, -2)
            grad_ranks = dy @ B_cat.T
            ranks, grad_shrunk, grad_gates = gate_ranks_backward(grad_ranks, kept, gates, ctx.scaling, ctx.dtype)
            if ctx.needs_input_grad[2]:
                grad_B = product(ranks.T, dy, ctx.B_dtype).view(ctx.B_shape)
        return grad_shrunk, grad_gates, grad_B, None, grad_out, None


def expand(
    shrunk: Tensor,
    gates: Tensor | None,
    B: Tensor,
    scaling: float,
    out: Tensor,
    inplace: bool = False,
    topk_ids: Tensor | None = None,
    gated: Tensor | None = None,
) -> Tensor:
    """``out + scaling * (gates . shrunk) Bcat``, the second half of `mixture_linear`.

    Args:
        shrunk: ``x Acat^T``, (T, E*R), or (T, R) where the experts share A; fp32 or the dtype of `out`. Of a few tokens
            it may be the (S, T, .) parts of a sum.
        gates: (T, G), or None for an ungated LoRA.
        B: (E, R, O).
        out: (..., O), T tokens in all.
        inplace: as for `mixture_linear`.
        topk_ids: (T, K), the gates that are not zero, if they are known: a few tokens then read no other rows of a B of
            many.
        gated: what `decode.gated_few` made of the other arguments, if it was called before.

    Saved for the backward: `shrunk` in the dtype of `out`, and the gates; never a (T, O) tensor.
    """
    if torch.compiler.is_compiling():  # plain operations, which the compiler fuses
        ranks = (reference.gate_ranks(shrunk, gates, shrunk.shape[1] != B.shape[0] * B.shape[1]) * scaling).to(
            out.dtype
        )
        return out + (ranks @ B.flatten(0, 1).to(out.dtype)).view_as(out)
    if decode.takes(out, [B]):
        y, num_ranks = out if inplace else out.clone(), B.shape[0] * B.shape[1]
        if num_ranks <= decode.MAX_RANKS:
            ranks, gates, scaling = (shrunk, gates, scaling) if gated is None else (gated, None, 1.0)
            return decode.add_few_(y, ranks, gates, B.flatten(0, 1), scaling)
        return decode.expand_few_(y, shrunk, gates, topk_ids, B.flatten(0, 1), scaling)
    if shrunk.dim() == 3:
        shrunk = shrunk.sum(0)
    result: Tensor = apply(_Expand, shrunk, gates, B, scaling, out, inplace)
    return result


def mixture_linear(
    x: Tensor,
    gates: Tensor | None,
    experts: Projection,
    out: Tensor,
    *,
    topk_ids: Tensor | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    inplace: bool = False,
) -> Tensor:
    """`reference.mixture_linear` with a hand-written backward; same arguments, same result.

    Saved for the backward: x (which is there anyway), the gates and the (T, E*R) shrunk input; never a (T, O) tensor.
    The dropout mask is made again from its seed. With `inplace` the result is written into `out`, which must then be a
    fresh, contiguous tensor that nobody else reads.
    """
    (shrunk,) = shrink(x, [experts.A], dtype=out.dtype, dropout=dropout, seed=seed).ranks
    return expand(shrunk, gates, experts.B, experts.scaling, out, inplace, topk_ids)
