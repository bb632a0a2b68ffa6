"""Mixture of FFN experts by Triton: what lies between the frozen linears, in one pass each way over (T, F) tensors.

Tokens are visited in blocks that chose the same experts, so that each slot multiplies with R ranks and not with E*R;
activations are computed again in the backward, so that the only (T, F) tensors kept are the frozen pre-activations.
Legend in `fused_ffn_kernels.py`. The reference is `reference.mixture_ffn`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora.kernels.launch import apply, blocks, power_of_2

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
MAX_SETS = 1024
"""Sets of experts that a token can choose: each begins a block of its own, so many sets leave blocks empty."""
MAX_RANK = 64
BLOCK_T = 64
_SLOT_BYTES, _FIXED_BYTES = 384, 288
"""Shared memory that the forward kernel took on an H100, for each rank of all slots: for each slot, and beside them."""
OPTIONS = {
    "fwd": {"BLOCK_F": 32, "num_warps": 4, "num_stages": 2, "maxnreg": 168},
    "rows": {"BLOCK_F": 16, "num_warps": 4, "num_stages": 2, "maxnreg": 168},
    "experts": {"BLOCK_F": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 168},
}
"""Launch options of the three kernels: what was fastest on an H100 among tiles that keep to their registers."""


class Plan(NamedTuple):
    """What is the same for all tokens.

    Attributes:
        act: one of ACTIVATIONS.
        residual: the frozen FFN enters with weight one (gates sum to one).
        scales: of the experts of the first, the second and the down-projection; 0 where one has none.
    """

    act: str
    residual: bool
    scales: tuple[float, float, float]


def num_sets(num_experts: int, top_k: int) -> int:
    """How many keys the sets of `top_k` of `num_experts` are given."""
    return 1 if top_k == num_experts else min(num_experts**top_k, 2**num_experts)


def fits(device: torch.device, num_experts: int, top_k: int, r: int) -> bool:
    """Whether the kernels can take experts of this kind: they hold the ranks of all slots in shared memory at once."""
    if r > MAX_RANK or num_sets(num_experts, top_k) > MAX_SETS:
        return False
    ranks = power_of_2(top_k) * max(16, power_of_2(r))
    return ranks * (_SLOT_BYTES * top_k + _FIXED_BYTES) <= _shared_memory(device)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may have; Triton's interpreter has no bound."""
    if device.type != "cuda":
        return 2**62
    properties: Any = torch.cuda.get_device_properties(device)  # whose stubs lack what it has
    return int(properties.shared_memory_per_block_optin)


def _keys(ids: Tensor, num_experts: int) -> Tensor:
    """(T, 1) the key of each token's set; ids (T, K) ascending."""
    if ids.shape[1] == num_experts:
        return torch.zeros_like(ids[:, :1])
    if num_experts ** ids.shape[1] <= 2**num_experts:
        key = ids[:, :1]
        for j in range(1, ids.shape[1]):
            key = key * num_experts + ids[:, j : j + 1]
        return key
    return torch.bitwise_left_shift(torch.ones_like(ids), ids).sum(1, keepdim=True)


class _FusedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: Plan, ids: Tensor, gates: Tensor, base: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, Any]:
        from molora.kernels import fused_ffn_kernels, grouped

        pre0, pre1, s0, s1, b0, b1, a2 = tensors
        assert pre0 is not None
        (T, F), E, dtype = pre0.shape, gates.shape[1], pre0.dtype
        K = ids.shape[1]
        R = next(m.shape[1] for m in (b0, b1, a2) if m is not None)
        ids = ids.sort(1).values
        index = grouped.topology(_keys(ids, E), num_sets(E, K), BLOCK_T)
        s0, s1 = (None if s is None else s.to(dtype).contiguous() for s in (s0, s1))
        b0, b1, a2 = _cast((b0, b1, None if a2 is None else a2.contiguous()), dtype)
        sizes: dict[str, Any] = {
            "E": E,
            "K": K,
            "R": R,
            "GATED": pre1 is not None,
            "ACT": plan.act,
            "FAST": not grouped.INTERPRETED,
        }
        sizes |= {"HAS0": b0 is not None, "HAS1": b1 is not None, "HAS2": a2 is not None, "BLOCK_T": BLOCK_T}
        sizes["BLOCK_R"] = max(16, power_of_2(R))
        chunk = 64 * blocks(F, 64 * min(blocks(F, 64), blocks(1024, max(1, T // BLOCK_T))))
        wide = {"BLOCK_KR": power_of_2(K) * sizes["BLOCK_R"], "CHUNK": chunk}
        chunks = blocks(F, wide["CHUNK"])
        hidden = torch.empty(T, F, dtype=dtype, device=pre0.device)
        partial = torch.empty(chunks if a2 is not None else 0, T, K, R, device=pre0.device)
        fused_ffn_kernels.ffn_fwd_kernel[(index.tile_experts.shape[1], chunks)](
            *_pointers(pre0, pre1, s0, s1, b0, b1, a2), gates, ids, pre0 if base is None else base, hidden, partial,
            *index, T, num_sets(E, K), F, *_strides(pre0, pre1, b0, b1), *plan.scales[:2],
            RESIDUAL=plan.residual, WITH_BASE=base is not None, **sizes, **wide, **OPTIONS["fwd"],
        )  # fmt: skip
        ctx.plan, ctx.sizes, ctx.wide = plan, sizes, wide
        ctx.save_for_backward(ids, gates, pre0, pre1, s0, s1, b0, b1, a2, *index)
        ctx.dtypes = [None if m is None else m.dtype for m in tensors[4:]]
        ctx.set_materialize_grads(False)
        if a2 is None:
            return hidden, None
        ranks = torch.empty(T, E * R, dtype=dtype, device=pre0.device)
        return hidden, _collect(partial, 0, ids, ranks, plan.scales[2], gates, K, R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dm: Tensor | None, grad_ranks: Tensor | None) -> tuple[Any, ...]:
        from molora.kernels import fused_ffn_kernels, grouped

        ids, gates, pre0, pre1, s0, s1, b0, b1, a2, order, offsets, tiles = ctx.saved_tensors
        plan, sizes, wide = ctx.plan, ctx.sizes, ctx.wide
        (T, F), E, K, R, dtype = pre0.shape, sizes["E"], sizes["K"], sizes["R"], pre0.dtype
        dm = torch.zeros_like(pre0, memory_format=torch.contiguous_format) if dm is None else dm.contiguous()
        sizes = sizes | {"HAS2": sizes["HAS2"] and grad_ranks is not None}
        s2 = None if grad_ranks is None else grad_ranks.to(dtype).contiguous()
        chunks = blocks(F, wide["CHUNK"])
        d0 = torch.empty_like(dm)
        d1 = None if pre1 is None else torch.empty_like(dm)
        sums = torch.empty(chunks, T, 2 * K * R + K, device=dm.device)
        read = (*_pointers(pre0, pre1, s0, s1, s2, b0, b1, a2), gates)
        shape = (F, *_strides(pre0, pre1, b0, b1), *plan.scales)
        fused_ffn_kernels.ffn_bwd_rows_kernel[(tiles.shape[1], chunks)](
            *read, ids, dm, *_pointers(d0, d1), sums, order, offsets, tiles, T, num_sets(E, K), *shape,
            BLOCK_K=power_of_2(K), **sizes, **wide, **OPTIONS["rows"],
        )  # fmt: skip
        # Zeros, because nothing is written for a down-projection whose ranks nobody used.
        grads = [None if d is None else torch.zeros(E, R, F, dtype=d, device=dm.device) for d in ctx.dtypes]
        by_expert = grouped.topology(ids, E, BLOCK_T)
        fused_ffn_kernels.ffn_bwd_experts_kernel[(E * blocks(F, OPTIONS["experts"]["BLOCK_F"]),)](
            *read, dm, *_pointers(*grads, like=dm), by_expert.order, by_expert.offsets, T, *shape,
            **sizes, **OPTIONS["experts"],
        )  # fmt: skip
        make = lambda n: torch.empty(T, n, dtype=torch.float32, device=dm.device)  # noqa: E731
        ds = [
            None if s is None else _collect(sums, i * K * R, ids, make(E * R), 1.0, None, K, R)
            for i, s in enumerate((s0, s1))
        ]
        grad_gates = _collect(sums, 2 * K * R, ids, make(E), 1.0, None, K, 1)
        return None, None, grad_gates, None, d0, d1, *ds, *grads


def _cast(matrices: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """The matrices (E, R, F) in `dtype`, rows equally far apart and contiguous (those of halves of a wider one are): in
    one launch, or none where they are so already."""
    result: list[Tensor | None] = []
    copies: list[Tensor] = []
    originals: list[Tensor] = []
    for m in matrices:
        if m is None or (m.dtype == dtype and m.stride(2) == 1 and m.stride(0) == m.shape[1] * m.stride(1)):
            result.append(m)
        else:
            originals.append(m)
            copies.append(torch.empty(m.shape, dtype=dtype, device=m.device))
            result.append(copies[-1])
    if copies:
        torch._foreach_copy_(copies, originals)
    return result


def _pointers(*tensors: Tensor | None, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """The tensors, with any one of them in the place of an absent one, which the kernel then does not read."""
    some = next((t for t in tensors if t is not None), like)
    assert some is not None
    return tuple(some if t is None else t for t in tensors)


def _strides(pre0: Tensor, pre1: Tensor | None, b0: Tensor | None, b1: Tensor | None) -> tuple[int, ...]:
    strides = (pre0.stride(0), 0 if pre1 is None else pre1.stride(0))
    return (*strides, *(0 if b is None else b.stride(1) for b in (b0, b1)))


def _collect(
    partial: Tensor, start: int, ids: Tensor, out: Tensor, scale: float, gates: Tensor | None, K: int, R: int
) -> Tensor:
    """out (T, E*R): the sums over chunks of `partial` (chunks, T, ...) from column `start` on, under their experts."""
    from molora.kernels import fused_ffn_kernels

    chunks, T, width = partial.flatten(2).shape
    block_c = min(128, power_of_2(out.shape[1]))
    block_t = 2048 // block_c
    fused_ffn_kernels.collect_kernel[(blocks(T, block_t), blocks(out.shape[1], block_c))](
        partial.view(-1)[start:], ids, ids if gates is None else gates, out, T, chunks, T * width, width, scale,
        E=out.shape[1] // R, K=K, R=R, GATED=gates is not None, BLOCK_T=block_t, BLOCK_C=block_c,
    )  # fmt: skip
    return out


def fused_ffn(
    pre: Sequence[Tensor],
    shrunk: Sequence[Tensor | None],
    experts: Sequence[Tensor | None],
    down_A: Tensor | None,
    gates: Tensor,
    topk_ids: Tensor | None,
    plan: Plan,
    base: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The hidden states of a mixture of FFN experts, and the ranks of its down-projection.

    ``h_e = act(p0 + s0 S0_e B0_e) * (p1 + s1 S1_e B1_e)``; ``hidden = h0 + sum_e gate_e (h_e - h0)`` in residual form,
    else ``sum_e gate_e h_e``; ``ranks_e = s2 gate_e A_e h_e``, as in `reference.mixture_ffn`.

    Args:
        pre: (p0, p1), or (p0,) for a two-layer FFN; each (T, F), 16-bit or fp32, rows may be strided.
        shrunk: for each of `pre` its S (T, E*R), the input times A of all experts, or None.
        experts: for each of `pre` its B (E, R, F), any float dtype, or None.
        down_A: (E, R, F), or None.
        gates: (T, E) fp32.
        topk_ids: (T, K), each expert at most once; None: every expert is one of every token.
        base: (T, F) contiguous, the frozen hidden state h0, for residual form with an activation that is not torch's
            silu to the last bit; None: the kernel computes it, rounding where torch does.

    Returns:
        hidden (T, F), and ranks (T, E*R) or None, in the dtype of `pre`. In residual form, where gates sum to one, the
        gradient of the gates is given up to a number for each token, which any gates that sum to one cancel.

    Saved for the backward: `pre`, the shrunk inputs in the compute dtype, gates and indices. The gradients of the
    matrices are accumulated in fp32 in a fixed order.
    """
    if topk_ids is None:
        topk_ids = torch.arange(gates.shape[1], device=gates.device).expand(gates.shape)
    if not len(pre[0]):  # no launch has an empty grid
        none = pre[0] * pre[-1]
        return none, None if down_A is None else none[:, :1].expand(0, down_A.shape[0] * down_A.shape[1])
    two = len(pre) == 2
    second = (pre[1], shrunk[1], experts[1]) if two else (None, None, None)
    tensors = (pre[0], second[0], shrunk[0], second[1], experts[0], second[2], down_A)
    hidden, ranks = apply(_FusedFFN, plan, topk_ids, gates.float().contiguous(), base, *tensors)
    return hidden, ranks
