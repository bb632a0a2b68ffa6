"""The mixture equations in plain PyTorch: any device, any dtype, differentiable twice. The truth the other kernels are
checked against, and what `torch.compile` sees (Inductor fuses it; a hand-written backward would only hide it).

Legend: T tokens, D input features, O output features, F hidden FFN features, E experts, R rank of one expert,
G gates per token (E for experts, E*R for rank-wise routing).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Projection(NamedTuple):
    """The experts of one linear: ``A`` (E, R, D) or shared (1, R, D), ``B`` (E, R, O), and the factor of B A."""

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def num_experts(self) -> int:
        return self.B.shape[0]

    @property
    def shares_A(self) -> bool:
        return self.A.shape[0] == 1 and self.B.shape[0] > 1

    def cat(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The two matrices (E*R or R, D) and (E*R, O): views where `dtype` is theirs, never a rearranged copy."""
        return self.A.flatten(0, 1).to(dtype), self.B.flatten(0, 1).to(dtype)


def gate_ranks(shrunk: Tensor, gates: Tensor | None, shares_A: bool) -> Tensor:
    """Multiplies each group of consecutive ranks by its gate.

    Args:
        shrunk: ``x Acat^T``: (T, E*R), or (T, R) where the experts share A.
        gates: (T, G), G dividing E*R (G = E where A is shared); None means a gate of one everywhere.
        shares_A: whether every expert reads the same R ranks.

    Returns:
        (T, E*R), in the promoted dtype of the two.
    """
    if gates is None:
        return shrunk
    groups = (1, -1) if shares_A else (gates.shape[1], shrunk.shape[1] // gates.shape[1])
    return (shrunk.unflatten(1, groups) * gates.unsqueeze(-1)).flatten(1)


def dropout_mask(x: Tensor, p: float, seed: int) -> Tensor:
    """The inverted-dropout factor of x: 0 with probability p, else 1/(1-p). The same seed gives the same mask."""
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return keep.to(x.dtype) / (1 - p)


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
    """Adds a gated mixture of low-rank experts to the output of a frozen linear.

    ``out + scaling * (G(x) . (dropout(x) Acat^T)) Bcat`` (design section 1; SMoRA, arXiv 2501.15103, shows that every
    mixture of LoRA experts has this form).

    Args:
        x: input of the linear, (..., D). Computed in the dtype of `out`, whatever its own.
        gates: (T, G), T the product of x's leading sizes; None for an ungated LoRA.
        experts: A, B (any floating dtype; gradients come back in it) and their factor.
        out: output of the frozen linear, (..., O).
        topk_ids: (T, K) experts with a gate, a hint for kernels that dispatch; this one multiplies by every gate.
        dropout: probability of dropping an input feature, one mask for all experts, 0 <= dropout < 1.
        seed: of the dropout mask.
        inplace: allowed to overwrite `out`; the reference never does.

    Returns:
        (..., O) in the dtype of `out`.
    """
    with torch.autocast(x.device.type, enabled=False):
        if dropout:
            x = x * dropout_mask(x, dropout, seed)
        A, B = experts.cat(out.dtype)
        shrunk = x.flatten(0, -2).to(out.dtype) @ A.T
        ranks = (gate_ranks(shrunk, gates, experts.shares_A) * experts.scaling).to(out.dtype)
        return out + (ranks @ B).view_as(out)


Activation = Callable[[Tensor], Tensor]


def combine(pre: Sequence[Tensor], act: Activation) -> Tensor:
    """The hidden state of an FFN from its pre-activations: ``act(gate) * up``, or ``act(up)`` without a gate."""
    return act(pre[0]) * pre[1] if len(pre) == 2 else act(pre[0])


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
    """Mixes FFN experts before the frozen down-projection, which then runs once per token, exactly.

    ``h_e = act(g0 + s B_g,e A_g,e x) * (u0 + s B_u,e A_u,e x)``; ``hidden = h0 + sum_e gate_e (h_e - h0)`` in residual
    form (equal to ``sum_e gate_e h_e`` where gates sum to one, and equal to h0 bit for bit where every B is zero), else
    ``sum_e gate_e h_e``; ``ranks_e = s gate_e A_d,e h_e``. The block's output is ``W_down hidden + ranks Bcat``.
    Source: MixLoRA, arXiv 2404.15159, section 3.2, with the down-projection taken out of the sum over experts.

    Args:
        x: input of the FFN, (T, D).
        pre: pre-activations of the frozen FFN: (g0, u0) for a gated one, (u0,) for a two-layer one, each (T, F).
        gates: (T, E).
        topk_ids: (T, K) experts with a gate, a hint for other kernels; the reference sums over all of them.
        up_experts: the experts of each of `pre`'s linears; None where one is not adapted.
        down_experts: the experts of the down-projection, or None.
        act: the element-wise activation.
        residual: whether gates sum to one, so that the frozen FFN enters with weight one.

    Returns:
        hidden (T, F) in the dtype of `pre`, and ranks (T, E*R) in the same, or None without `down_experts`.
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = pre[0].dtype
        base = combine(pre, act)
        hidden = base if residual else torch.zeros_like(base)
        ranks = []
        for e in range(gates.shape[1]):
            gate = gates[:, e : e + 1].to(dtype)
            adapted = []
            for p, experts in zip(pre, up_experts, strict=True):
                if experts is None:
                    adapted.append(p)
                    continue
                A, B = experts.A[0 if experts.shares_A else e].to(dtype), experts.B[e].to(dtype)
                adapted.append(p + experts.scaling * (x.to(dtype) @ A.T) @ B)
            h = combine(adapted, act)
            hidden = hidden + gate * (h - base if residual else h)
            if down_experts is not None:
                A = down_experts.A[0 if down_experts.shares_A else e].to(dtype)
                ranks.append(gate * down_experts.scaling * (h @ A.T))
        return hidden, torch.cat(ranks, 1) if ranks else None
