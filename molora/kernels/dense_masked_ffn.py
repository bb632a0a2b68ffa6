"""Slot-masked mixture of FFN experts with one down-projection, recomputing instead of saving activations.

For each of the K slots of a token, the ranks of all experts but the chosen one are masked, so that one GEMM of width
E*R expands every token in token order: no sort, static shapes, and the only (T, F) tensors kept for the backward are
the frozen pre-activations. Legend and formula in `reference.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora.kernels.launch import apply
from molora.kernels.reference import Activation, Projection, combine, gate_ranks


def _slots(gates: Tensor, topk_ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each slot: which expert each token chose, one-hot (T, E), and the gate of that choice (T, 1)."""
    for ids in topk_ids.split(1, dim=1):
        yield torch.zeros_like(gates).scatter_(1, ids, 1), gates.gather(1, ids)


def _shrink(inputs: Tensor, choice: Tensor, p: Projection) -> Tensor:
    """(T, E*R): the scaled ranks of the chosen expert of each token, zero for the others."""
    return (gate_ranks(inputs @ p.cat(inputs.dtype)[0].T, choice, p.shares_A) * p.scaling).to(inputs.dtype)


def _unshrink(grad_ranks: Tensor, choice: Tensor, p: Projection) -> Tensor:
    """The transpose of `_shrink`'s mask: gradients of (T, E*R) ranks to those of the ranks of A, (T, E*R) or (T, R)."""
    grad = gate_ranks(grad_ranks, choice, False) * p.scaling
    return (grad.unflatten(1, (p.num_experts, -1)).sum(1) if p.shares_A else grad).to(grad_ranks.dtype)


def _adapted(inputs: Tensor, pre: Sequence[Tensor], ups: Sequence[Projection | None], choice: Tensor) -> list[Tensor]:
    """The pre-activations of the chosen experts, each (T, F)."""
    return [
        p if experts is None else torch.addmm(p, _shrink(inputs, choice, experts), experts.cat(p.dtype)[1])
        for p, experts in zip(pre, ups, strict=True)
    ]


def _unpack(tensors: Sequence[Tensor], scalings: Sequence[float]) -> tuple[Sequence[Tensor], list, Projection | None]:
    """(pre-activations, experts of their linears, experts of the down-projection) from the flat list of tensors."""
    num_pre = len(scalings) - 1
    pairs = [
        None if tensors[i] is None else Projection(tensors[i], tensors[i + 1], scaling)
        for i, scaling in zip(range(num_pre, len(tensors), 2), scalings, strict=True)
    ]
    return tensors[:num_pre], pairs[:-1], pairs[-1]


class _MixtureFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, act, residual, scalings, topk_ids, x, gates, *tensors):
        pre, ups, down = _unpack(tensors, scalings)
        ctx.act, ctx.residual, ctx.scalings = act, residual, scalings
        ctx.save_for_backward(topk_ids, x, gates, *tensors)
        with torch.autocast(x.device.type, enabled=False):
            inputs = x.to(pre[0].dtype)
            base = combine(pre, act)
            hidden = base.clone() if residual else torch.zeros_like(base)
            ranks: Any = None if down is None else base.new_zeros(len(base), down.num_experts * down.B.shape[1])
            for choice, gate in _slots(gates, topk_ids):
                h = combine(_adapted(inputs, pre, ups, choice), act)
                hidden += gate.to(h.dtype) * (h - base if residual else h)
                if down is not None:
                    ranks += _shrink(h, choice * gate, down)
            return hidden, ranks

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_hidden, grad_ranks):
        topk_ids, x, gates, *tensors = ctx.saved_tensors
        pre, ups, down = _unpack(tensors, ctx.scalings)
        with torch.autocast(x.device.type, enabled=False):
            inputs = x.to(pre[0].dtype)
            dtype = inputs.dtype
            grad_x, grad_gates = torch.zeros_like(inputs), torch.zeros_like(gates)
            # Contiguous, unlike zeros_like of a transposed view: they are flattened and added to in place below.
            grads: list[Any] = [None if t is None else t.new_zeros(t.shape, dtype=dtype) for t in tensors]
            num_pre = len(pre)
            with torch.enable_grad():
                leaves = [p.detach().requires_grad_() for p in pre]
                base = combine(leaves, ctx.act)
            if ctx.residual:
                # hidden = base + sum_e gate_e (h_e - base): the gates are data here, so what is left is 1 - sum.
                left = (1 - gates.gather(1, topk_ids).sum(1, keepdim=True)).to(dtype)
                for i, grad in enumerate(torch.autograd.grad(base, leaves, left * grad_hidden)):
                    grads[i] += grad
            base = base.detach()
            for choice, gate in _slots(gates, topk_ids):
                with torch.enable_grad():
                    leaves = [p.detach().requires_grad_() for p in _adapted(inputs, pre, ups, choice)]
                    hidden = combine(leaves, ctx.act)
                h = hidden.detach()
                grad_gate = (grad_hidden * (h - base if ctx.residual else h)).sum(1, keepdim=True, dtype=gates.dtype)
                grad_h = gate.to(dtype) * grad_hidden
                if down is not None:
                    grad_gate += (grad_ranks * _shrink(h, choice, down)).sum(1, keepdim=True, dtype=gates.dtype)
                    grad_shrunk = _unshrink(grad_ranks, choice * gate, down)
                    grad_h = torch.addmm(grad_h, grad_shrunk, down.cat(dtype)[0])
                    grads[-2].flatten(0, 1).addmm_(grad_shrunk.T, h)
                grad_gates += choice * grad_gate
                for i, grad in enumerate(torch.autograd.grad(hidden, leaves, grad_h)):
                    grads[i] += grad
                    if (experts := ups[i]) is None:
                        continue
                    A_cat, B_cat = experts.cat(dtype)
                    grad_A, grad_B = grads[num_pre + 2 * i], grads[num_pre + 2 * i + 1]
                    grad_shrunk = _unshrink(grad @ B_cat.T, choice, experts)
                    grad_A.flatten(0, 1).addmm_(grad_shrunk.T, inputs)
                    grad_B.flatten(0, 1).addmm_(_shrink(inputs, choice, experts).T, grad)
                    grad_x.addmm_(grad_shrunk, A_cat)
        if down is not None:
            grads[-1] = None  # B of the down-projection is read by the caller, after the frozen linear
        grads = [g if g is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)]
        return None, None, None, None, grad_x.to(x.dtype), grad_gates, *grads


def mixture_ffn(
    x: Tensor,
    pre: Sequence[Tensor],
    gates: Tensor,
    topk_ids: Tensor | None,
    up_experts: Sequence[Projection | None],
    down_experts: Projection | None,
    act: Activation,
    *,
    residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """`reference.mixture_ffn` with a hand-written backward; same arguments, same result.

    Works slot by slot; without `topk_ids` every expert is a slot of every token.
    `act` must be element-wise: its derivative is taken by autograd on the recomputed pre-activations.
    """
    if topk_ids is None:
        topk_ids = torch.arange(gates.shape[1], device=gates.device).expand(gates.shape)
    pairs = [*up_experts, down_experts]
    scalings = tuple(0.0 if p is None else p.scaling for p in pairs)
    flat = [t for p in pairs for t in ((None, None) if p is None else (p.A, p.B))]
    return apply(_MixtureFFN, act, residual, scalings, topk_ids, x, gates, *pre, *flat)
