"""Several skinny matrices applied to one input, which is read once: the A of all experts, of linears that share the
input, and the routers' weights with them.

Legend: T tokens, D input features, C ranks of one linear's experts (E*R), G gates of one router, n rows in all.

What a linear adds to its frozen product is bound by memory traffic, so passes over x and its gradient are what counts:

    forward    one GEMM with n columns, read of x
    backward   one GEMM for the gradient of all matrices, read of x; and one that adds to the gradient of x. The frozen
               linears read x through `Input`, so that their gradient of x arrives there and is added to in place
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora.kernels import decode
from molora.kernels.launch import apply, no_autocast
from molora.kernels.reference import dropout_mask
from molora.kernels.skinny import add_product_, product

ALIGNMENT = 8
"""Rows and columns of a GEMM operand are padded to multiples of 16 bytes."""


class Shrunk(NamedTuple):
    """What `shrink` returns.

    Attributes:
        ranks: for each A ``x A^T``, (T, C); fp32 on a GPU, where they are views of one matrix. Of a few tokens without
            gradients: (S, T, C), the parts of a sum.
        logits: for each router's weight ``x W^T``, (T, G) fp32.
    """

    ranks: list[Tensor]
    logits: list[Tensor]


class _Alias(torch.autograd.Function):
    """The identity; its backward adds what the shrinks of the same input have left for it, after they have run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, left: list[tuple[int, Tensor, Tensor]], adds_in_place: bool) -> Tensor:
        ctx.left, ctx.adds_in_place, ctx.shape, ctx.dtype = left, adds_in_place, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor | None) -> tuple[Tensor | None, None, None]:
        task = torch._C._current_graph_task_id()
        for left_by, grad, packed in ctx.left:
            if left_by != task:
                continue  # by a backward that did not come as far as x
            with no_autocast(grad.device):
                if grad_x is None:
                    grad_x = (grad @ packed).view(ctx.shape).to(ctx.dtype)
                elif grad_x.dtype != grad.dtype:
                    grad_x = grad_x + (grad @ packed).view(ctx.shape).to(ctx.dtype)
                elif ctx.adds_in_place and grad_x.is_contiguous():
                    add_product_(grad_x.view(grad.shape[0], packed.shape[1]), grad, packed)
                else:
                    grad_x = torch.addmm(grad_x.reshape(grad.shape[0], packed.shape[1]), grad, packed).view(ctx.shape)
        ctx.left.clear()
        return grad_x, None, None


class Input:
    """An input that frozen linears and their experts read, so that its gradient is one tensor that is added to.

    Args:
        x: (..., D).
        adds_in_place: the gradient that comes back from the frozen linears is a fresh tensor that nobody else reads
            (true where only frozen `nn.Linear`s without hooks read it), so that it may be added to in place.

    Attributes:
        x: what the frozen linears and `shrink` must read.
    """

    def __init__(self, x: Tensor, adds_in_place: bool) -> None:
        self.left: list[tuple[int, Tensor, Tensor]] = []
        needs_grad = torch.is_grad_enabled() and x.requires_grad
        self.x: Tensor = _Alias.apply(x, self.left, adds_in_place) if needs_grad else x


class _Options(NamedTuple):
    num_experts: int  # how many of the matrices belong to experts; the others to routers
    dtype: torch.dtype
    dropout: float
    seed: int
    left: list[tuple[int, Tensor, Tensor]] | None  # where the gradient of x is left for an `Input`


def _pack(experts: Sequence[Tensor], routers: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(n, D) in `dtype`: experts, routers, what rounding the routers' weights has left, zeros up to the alignment."""
    num_ranks, num_gates = sum(m.shape[0] for m in experts), sum(m.shape[0] for m in routers)
    split = dtype in (torch.bfloat16, torch.half) and any(w.dtype != dtype for w in routers)
    rows = num_ranks + num_gates * (2 if split else 1)
    like = [*experts, *routers][0]
    if not rows % ALIGNMENT and all(m.dtype == dtype for m in (*experts, *routers)):
        return torch.cat([*experts, *routers])
    packed = like.new_empty(rows + -rows % ALIGNMENT, like.shape[1], dtype=dtype)
    if experts:
        torch._foreach_copy_(packed[:num_ranks].split([m.shape[0] for m in experts]), list(experts))
    if routers:
        weight = routers[0] if len(routers) == 1 else torch.cat([w.float() for w in routers])
        rounded = packed[num_ranks : num_ranks + num_gates].copy_(weight)
        if split:
            torch.sub(weight, rounded, out=packed[num_ranks + num_gates : rows])
    if rows < packed.shape[0]:
        packed[rows:] = 0
    return packed


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: _Options, x: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:
        ctx.options = options
        ctx.set_materialize_grads(False)
        n, dtype = options.num_experts, options.dtype
        with no_autocast(x.device):
            inputs = x.flatten(0, -2).to(dtype)
            if options.dropout:
                inputs = inputs * dropout_mask(x, options.dropout, options.seed).flatten(0, -2).to(dtype)
            flat = [m.flatten(0, -2) for m in matrices]  # in here, where autograd does not see it
            sizes = [m.shape[0] for m in flat]
            wide_dtype = torch.float32 if x.is_cuda and dtype != torch.float64 else dtype
            packed = _pack(flat[:n], flat[n:], dtype)
            wide = product(inputs, packed.T, wide_dtype)
            # Packed, at half an fp32 parameter's memory, they spare the backward a dozen launches.
            ctx.save_for_backward(x, packed)
            ctx.sizes, ctx.likes = sizes, [(m.dtype, m.shape) for m in matrices]
            parts = list(wide[:, : sum(sizes)].split(sizes, 1))
            if matrices[n:] and wide.shape[1] >= sum(sizes) + sum(sizes[n:]):
                rests = wide[:, sum(sizes) : sum(sizes) + sum(sizes[n:])].split(sizes[n:], 1)
                parts[n:] = [part + rest for part, rest in zip(parts[n:], rests, strict=True)]
            logits = [part.to(torch.float64 if dtype == torch.float64 else torch.float32) for part in parts[n:]]
            return *parts[:n], *logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, packed = ctx.saved_tensors
        options: _Options = ctx.options
        sizes: list[int] = ctx.sizes
        dtype, none = options.dtype, [None] * len(sizes)
        if all(grad is None for grad in grads):
            return None, None, *none
        with no_autocast(x.device):
            tokens = x.shape[:-1].numel()
            known = [x.new_zeros(tokens, n) if g is None else g for g, n in zip(grads, sizes, strict=True)]
            if pad := -sum(sizes) % ALIGNMENT:
                known.append(x.new_zeros(tokens, pad, dtype=known[0].dtype))
            grad = torch.cat(known, 1).to(dtype)
            mask = None
            if options.dropout:
                mask = dropout_mask(x, options.dropout, options.seed).flatten(0, -2).to(dtype)
            result: list[Tensor | None] = list(none)
            if any(ctx.needs_input_grad[2:]):
                inputs = x.flatten(0, -2).to(dtype)
                wanted = functools.reduce(torch.promote_types, (own for own, _ in ctx.likes))
                found = product(grad.T, inputs if mask is None else inputs * mask, wanted).split([*sizes, pad])
                result = [
                    f.to(own).view(shape) if needed else None
                    for f, (own, shape), needed in zip(found, ctx.likes, ctx.needs_input_grad[2:], strict=False)
                ]
            if not ctx.needs_input_grad[1]:
                return None, None, *result
            packed = packed[: grad.shape[1]]
            if options.left is not None and mask is None:
                options.left.append((torch._C._current_graph_task_id(), grad, packed))
                return None, None, *result
            grad_x = grad @ packed
            return None, (grad_x if mask is None else grad_x * mask).view_as(x).to(x.dtype), *result


def shrink(
    x: Tensor | Input,
    experts: Sequence[Tensor],
    routers: Sequence[Tensor] = (),
    *,
    dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Shrunk:
    """``x M^T`` for several skinny matrices M, with one read of x.

    In 16-bit compute a router's fp32 weight is split in two 16-bit terms, ``W = hi + lo``, whose products are exact in
    the fp32 accumulator: its logits are those of W to 16 bits of mantissa. A row's logits do not depend on what else is
    in a batch of the same size. The weight's gradient is computed in the compute dtype.

    Args:
        x: (..., D), or the `Input` of it, which then completes the gradient of x.
        experts: the A of one linear each, (C, D) or (E, R, D) with C = E*R, any float dtype; gradients come back in it.
        routers: weights (G, D).
        dtype: compute dtype; None: that of x.
        dropout: probability of dropping a feature of x, one mask for all matrices, 0 <= dropout < 1.
        seed: of the dropout mask.
    """
    left = x.left if isinstance(x, Input) else None
    x = x.x if isinstance(x, Input) else x
    if not experts and not routers:
        return Shrunk([], [])
    if not dropout and (dtype or x.dtype) == x.dtype and decode.takes(x, [*experts, *routers]):
        return Shrunk(*decode.shrink_few(x, [A.flatten(0, -2) for A in experts], routers))
    parts = apply(_Shrink, _Options(len(experts), dtype or x.dtype, dropout, seed, left), x, *experts, *routers)
    return Shrunk(list(parts[: len(experts)]), list(parts[len(experts) :]))
