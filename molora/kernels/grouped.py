"""Grouped mixture of a linear: tokens in blocks by expert, each block times the ranks of its own expert only.

For many experts of high total rank, where `dense_masked` computes ranks that the gates then drop. MegaBlocks'
formulation (arXiv 2211.15841) without its padded copy: rows are gathered inside the kernels, as in ScatterMoE
(arXiv 2403.08245). No host sync, no atomics, CUDA-graph safe; static launch grids whatever the router chose.

Legend: T tokens, D input features, O output features, E experts, K top-k, R rank of one expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora.kernels import grouped_kernels as kernels
from molora.kernels import reference
from molora.kernels.reference import Projection, dropout_mask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton's interpreter (TRITON_INTERPRET=1, read when the kernels are imported) runs the kernels on the CPU.
INTERPRETED = not isinstance(kernels.topology_kernel, triton.JITFunction)


class Topology(NamedTuple):
    """Which token belongs to which expert in every slot, int32; the table in `grouped_kernels` gives the meaning.

    order         (K, T)      tokens sorted by their expert in the slot, stable
    offsets       (K, E+1)    where the tokens of an expert begin in `order`
    tile_experts  (K, tiles)  expert of every tile of at most `block` tokens, -1 for an empty tile
    """

    order: Tensor
    offsets: Tensor
    tile_experts: Tensor


class Tiles(NamedTuple):
    """Tokens of a tile of the topology, and the launch options of the kernels."""

    tokens: int
    shrink: dict[str, int]
    expand: dict[str, int]
    wgrad: dict[str, int]


def tiles(dtype: torch.dtype, R: int) -> Tiles:
    """Block sizes for the compute dtype and the rank: a heuristic that fits every GPU, not a table of known ones."""
    ranks = max(16, triton.next_power_of_2(R))  # 16: the least that tl.dot takes
    tokens = 64 if ranks <= 128 else 16
    columns = 128 if dtype.itemsize == 2 else 64
    # The shrink holds all ranks of its tokens: the wider, the fewer features at a time.
    features = max(16, columns * 64 // max(64, ranks))
    # 96 KiB: what the smallest of current GPUs let one program have of shared memory.
    stages = max(1, min(4, 96 * 1024 // ((tokens + ranks) * features * dtype.itemsize)))
    shrink = {"BLOCK_T": tokens, "BLOCK_R": ranks, "BLOCK_N": features, "num_stages": stages}
    shrink["num_warps"] = 4 if ranks <= 128 else 8  # 4 is Triton's default elsewhere
    # Without tensor cores, as in fp32, a product over more ranks at a time than 16 spills registers.
    expand = {"BLOCK_T": tokens, "BLOCK_R": min(ranks, 64 if dtype.itemsize == 2 else 16), "BLOCK_N": columns}
    wgrad = {"BLOCK_T": 64, "BLOCK_R": min(ranks, 64), "BLOCK_N": columns}
    return Tiles(tokens, shrink, expand | {"num_warps": 4, "num_stages": 2}, wgrad | {"num_warps": 4, "num_stages": 3})


def topology(topk_ids: Tensor, num_experts: int, block: int) -> Topology:
    """Groups the choices (T, K) of tokens by slot and expert, on the device, in one launch.

    Every id must lie in [0, num_experts); that is not checked, because it would need a host sync.

    Args:
        topk_ids: (T, K), integer, T >= 1.
        num_experts: E.
        block: tokens of a tile, a power of two.
    """
    T, K = topk_ids.shape
    num_tiles = T // block + num_experts
    make = lambda n: torch.empty(K, n, dtype=torch.int32, device=topk_ids.device)  # noqa: E731
    result = Topology(make(T), make(num_experts + 1), make(num_tiles))
    kernels.topology_kernel[(num_experts, K)](
        topk_ids.contiguous(), *result, T, num_tiles, BLOCK_T=block, BLOCK=min(2048, max(64, triton.next_power_of_2(T)))
    )
    return result


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, .) in `dtype` with contiguous rows: a view wherever one exists."""
    rows = x.flatten(0, -2).to(dtype)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _gather_shrink(
    x: Tensor,
    m: Tensor,
    index: Topology,
    scaling: float,
    shrunk: Tensor | None = None,
    grad_gates: Tensor | None = None,
) -> Tensor:
    """(T, K, R) in fp32: rows of x times their chosen experts of m (E, R, .).

    fp32, because it costs T*K*R words, little beside the T*D that x needs anyway, and spares a rounding before the
    gate. With `grad_gates`, fills it in with the products of result and `shrunk`.
    """
    (E, R, N), (K, num_tiles) = m.shape, index.tile_experts.shape
    ranks = torch.empty(len(x), K, R, dtype=torch.float32, device=x.device)
    kernels.gather_shrink_kernel[(num_tiles, K)](
        x, m, ranks, shrunk, grad_gates, *index, len(x), E, R, N, x.stride(0), scaling,
        WITH_GATES_GRAD=grad_gates is not None, **tiles(x.dtype, R).shrink,
    )  # fmt: skip
    return ranks


def _scatter_expand(
    base: Tensor | None, y: Tensor, ranks: Tensor, gates: Tensor, m: Tensor, index: Topology, scaling: float
) -> Tensor:
    """Writes base (T, .) plus the gated ranks times their experts of m (E, R, .) into y (T, .).

    One launch per slot, so that a row has one writer; y is rounded to its dtype after every slot.
    """
    (E, R, N), (K, num_tiles) = m.shape, index.tile_experts.shape
    launch = tiles(m.dtype, R).expand
    grid = (num_tiles * triton.cdiv(N, launch["BLOCK_N"]),)
    for slot in range(K):
        kernels.scatter_expand_kernel[grid](
            base, y, ranks, gates, m, *index, slot, num_tiles, len(y), E, K, R, N,
            0 if base is None else base.stride(0), y.stride(0), scaling,
            WITH_BASE=base is not None, **launch,
        )  # fmt: skip
        base = y
    return y


def _group_wgrad(z: Tensor, like: Tensor, ranks: Tensor, gates: Tensor, index: Topology, scaling: float) -> Tensor:
    """(E, R, .), shape and dtype of `like`: per expert, its gated ranks transposed times the rows of z."""
    E, R, N = like.shape
    launch = tiles(z.dtype, R).wgrad
    grad = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    kernels.group_wgrad_kernel[(E, triton.cdiv(N, launch["BLOCK_N"]), triton.cdiv(R, launch["BLOCK_R"]))](
        z, grad, ranks, gates, index.order, index.offsets, len(z), ranks.shape[1], R, N, z.stride(0), scaling, **launch
    )  # fmt: skip
    return grad


class _MixtureLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gates, topk_ids, A, B, scaling, out, dropout, seed, inplace):
        ctx.scaling, ctx.dropout, ctx.seed = scaling, dropout, seed
        if inplace:
            ctx.mark_dirty(out)
        # Triton launches on the current device.
        with torch.cuda.device_of(x):
            dtype = out.dtype
            inputs = _rows(x * dropout_mask(x, dropout, seed) if dropout else x, dtype)
            index = topology(topk_ids, len(A), tiles(dtype, A.shape[1]).tokens)
            shrunk = _gather_shrink(inputs, A.to(dtype).contiguous(), index, scaling)
            ctx.save_for_backward(x, gates, A, B, shrunk, *index)
            result = out if inplace else torch.empty(out.shape, dtype=dtype, device=out.device)
            y = result.view(-1, out.shape[-1])
            _scatter_expand(_rows(out, dtype), y, shrunk, gates.contiguous(), B.to(dtype).contiguous(), index, scaling)
            return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        x, gates, A, B, shrunk, *index = ctx.saved_tensors
        need_x, need_gates, _, need_A, need_B = ctx.needs_input_grad[:5]
        grad_x = grad_gates = grad_A = grad_B = None
        index, scaling = Topology(*index), ctx.scaling
        with torch.cuda.device_of(grad_out):
            dtype = grad_out.dtype
            dy = _rows(grad_out, dtype)
            gate = gates.contiguous()
            if need_B:
                grad_B = _group_wgrad(dy, B, shrunk, gate, index, scaling)
            if need_x or need_gates or need_A:
                if need_gates:
                    grad_gates = torch.zeros(gates.shape, dtype=gates.dtype, device=gates.device)
                grad_ranks = _gather_shrink(dy, B.to(dtype).contiguous(), index, scaling, shrunk, grad_gates)
                mask = dropout_mask(x, ctx.dropout, ctx.seed) if ctx.dropout else None
                if need_A:
                    inputs = _rows(x if mask is None else x * mask, dtype)
                    grad_A = _group_wgrad(inputs, A, grad_ranks, gate, index, scaling)
                if need_x:
                    grad_x = torch.empty(x.shape, dtype=dtype, device=x.device)
                    _scatter_expand(
                        None, grad_x.view(-1, x.shape[-1]), grad_ranks, gate, A.to(dtype).contiguous(), index, scaling
                    )
                    grad_x = (grad_x if mask is None else grad_x * mask).to(x.dtype)
        return grad_x, grad_gates, None, grad_A, grad_B, None, grad_out, None, None, None


def mixture_linear(
    x: Tensor,
    gates: Tensor,
    experts: Projection,
    out: Tensor,
    *,
    topk_ids: Tensor,
    dropout: float = 0.0,
    seed: int = 0,
    inplace: bool = False,
) -> Tensor:
    """Adds the chosen low-rank experts of every token to the output of a frozen linear.

    ``out_t + scaling sum_j gates[t, e_j] (dropout(x)_t A_{e_j}^T) B_{e_j}``, with e_j = topk_ids[t, j].

    Saved for the backward: x (which is there anyway), the gates, (T, K, R) ranks in fp32 and T*K indices. The result is
    rounded to the dtype of `out` once per slot. On a GPU, or on a CPU under TRITON_INTERPRET=1.

    Args:
        x: input of the linear, (..., D). Computed in the dtype of `out`, whatever its own.
        gates: (T, E), zero where not chosen, T the product of x's leading sizes.
        experts: A (E, R, D), B (E, R, O), any floating dtype (gradients come back in it), and their factor.
        out: output of the frozen linear, (..., O), fp32, bf16 or fp16.
        topk_ids: (T, K), an expert at most once per token. Neither that nor the range is checked: it would take a sync.
        dropout: probability of dropping an input feature, one mask for all experts, 0 <= dropout < 1.
        seed: of the dropout mask.
        inplace: allowed to overwrite `out`, which nobody else may read then; done where it is contiguous.

    Returns:
        (..., O) in the dtype of `out`.

    Raises:
        TypeError: another dtype of `out`.
        ValueError: experts that share A, gates or topk_ids of another shape, no GPU.

    Source:
        MegaBlocks, arXiv 2211.15841; the gather inside the kernels, ScatterMoE, arXiv 2403.08245. No code of theirs.
    """
    num_tokens, num_experts = x.numel() // x.shape[-1], experts.num_experts
    if experts.shares_A:
        raise ValueError(
            f"the grouped kernel needs one A per expert, got A of {tuple(experts.A.shape)} for {num_experts} experts; "
            "use dense_masked where experts share A"
        )
    if out.dtype not in DTYPES:
        raise TypeError(f"the grouped kernel computes in fp32, bf16 or fp16, got an output of {out.dtype}")
    if gates.shape != (num_tokens, num_experts) or topk_ids.shape[:-1] != (num_tokens,):
        raise ValueError(
            f"expected gates of {(num_tokens, num_experts)} and topk_ids of ({num_tokens}, K), "
            f"got {tuple(gates.shape)} and {tuple(topk_ids.shape)}"
        )
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(f"the grouped kernel needs a GPU, got x on {x.device}; use dense_masked there")
    if num_tokens == 0:
        return reference.mixture_linear(x, gates, experts, out)  # no launch has an empty grid
    return _MixtureLinear.apply(x, gates, topk_ids, *experts, out, dropout, seed, inplace and out.is_contiguous())
