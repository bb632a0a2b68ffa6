"""A mixture of a linear for a few tokens without gradients, in few launches.

Parameters are read as they are, fp32 or 16 bits wide; of many ranks, only the chosen rows of B. Static shapes, no host
sync and no allocation that depends on values, so that a CUDA graph captures it and replays it with other choices.
Legend in `decode_kernels.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from molora.kernels import launch
from molora.kernels.launch import blocks, power_of_2
from molora.kernels.ranks import gate_ranks_triton

MAX_TOKENS = 64
"""A program holds all tokens; above it their number is what costs, not launches."""
MAX_RANKS = 256
"""Up to so many ranks of all experts, their product as a whole is quicker than a choice of rows."""
_MAX_MATRICES = 3


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def beside(x: Tensor) -> torch.cuda.StreamContext:
    """While a CUDA graph is captured: runs what is inside on a second stream.

    In the graph it becomes a branch beside the frozen linear, which is bound by its weights and hides it. Each branch
    begins after all that came before and is joined (`join`) before what follows, so no memory is taken too early.
    """
    side = _side_stream(x.device)
    side.wait_stream(torch.cuda.current_stream(x.device))
    return torch.cuda.stream(side)


def join(x: Tensor) -> None:
    """Ends the branch of `beside`."""
    torch.cuda.current_stream(x.device).wait_stream(_side_stream(x.device))


def captures(x: Tensor) -> bool:
    """Whether a CUDA graph of a few tokens is being captured."""
    if torch.is_grad_enabled() or not x.is_cuda or x.numel() > MAX_TOKENS * x.shape[-1]:
        return False
    return not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def takes(x: Tensor, matrices: Sequence[Tensor]) -> bool:
    """Whether x (..., D) is of a few tokens, on a device with Triton, outside of autograd."""
    if torch.is_grad_enabled() or not launch.ready(x.device) or x.numel() > MAX_TOKENS * x.shape[-1] or not x.numel():
        return False
    return x.dtype != torch.float64 and x.is_contiguous() and all(m.is_contiguous() for m in matrices)


def shrink_few(x: Tensor, experts: Sequence[Tensor], routers: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """``x M^T`` in fp32 for each matrix (rows, D) of experts and of routers, three of each in a launch.

    Ranks come as (S, T, rows), parts of a sum over the features, which `expand_few_` adds; logits as (T, rows).
    """
    from molora.kernels import decode_kernels

    T, D = x.shape[:-1].numel(), x.shape[-1]
    ranks: list[Tensor] = []
    logits: list[Tensor] = []
    block_t, tile_t = power_of_2(T), min(T, 2)
    # One token: two rows of a few thousand features. Several: 16 rows by matrix units, of so many features that all
    # multiprocessors have some.
    block_j, chunk = (2, 4096) if T == 1 else (16, 512)
    splits = blocks(D, chunk)
    for i in range(0, max(len(experts), len(routers)), _MAX_MATRICES):
        own = [list(m[i : i + _MAX_MATRICES]) for m in (experts, routers)]
        sizes = [[m.shape[0] for m in part] for part in own]
        absent = [_MAX_MATRICES - len(part) for part in own]
        found = torch.empty(splits, T, sum(sizes[0]), dtype=torch.float32, device=x.device)
        routed = torch.empty(T, sum(sizes[1]), dtype=torch.float32, device=x.device)
        decode_kernels.few_shrink_kernel[
            (splits * sum(blocks(n, block_j) for n in sizes[0]) + sum(sizes[1]) * blocks(T, tile_t),)
        ](
            x,
            *own[0],
            *[x] * absent[0],
            *own[1],
            *[x] * absent[1],
            found,
            routed,
            T,
            D,
            *sizes[0],
            *[0] * absent[0],
            *sizes[1],
            *[0] * absent[1],
            CHUNK=chunk,
            SPLITS=splits,
            BLOCK_T=block_t,
            BLOCK_J=block_j,
            BLOCK_D=min(power_of_2(D), 2048),
            BLOCK_W=min(power_of_2(D), 8192 // tile_t),
            TILE_T=tile_t,
            TILES=blocks(T, tile_t),
            num_warps=4,
        )
        ranks += found.split_with_sizes(sizes[0], 2)
        logits += routed.split_with_sizes(sizes[1], 1)
    return ranks, logits


def _parts(ranks: Tensor) -> Tensor:
    """(S, T, .), the parts of a sum; rows may be strided."""
    ranks = ranks.unsqueeze(0) if ranks.dim() == 2 else ranks
    return ranks if ranks.stride(2) == 1 else ranks.contiguous()


def expand_few_(
    y: Tensor, ranks: Tensor, gates: Tensor | None, topk_ids: Tensor | None, B: Tensor, scaling: float
) -> Tensor:
    """``y += scaling * (gates . ranks) Bcat`` in place.

    Args:
        y: (..., N), contiguous, T tokens.
        ranks: (T, C), or (T, C / G) where experts share A; rows may be strided. With one more dimension in front: the
            parts of a sum.
        gates: (T, G) fp32, or None.
        topk_ids: (T, K), outside of which gates are zero; None: all of them count.
        B: (C, N), contiguous.
    """
    from molora.kernels import decode_kernels

    ranks = _parts(ranks)
    (splits, T, width), (C, N) = ranks.shape, B.shape
    G = 1 if gates is None else gates.shape[1]
    K = 0 if topk_ids is None or gates is None or topk_ids.shape[1] == G else topk_ids.shape[1]
    rows = K * (C // G) if K else C
    block_n = 128
    decode_kernels.few_expand_kernel[(blocks(N, block_n), T)](
        y,
        ranks,
        ranks if gates is None else gates.contiguous(),
        ranks if topk_ids is None else topk_ids.contiguous(),
        B,
        N,
        ranks.stride(1),
        ranks.stride(0),
        scaling,
        SPLITS=splits,
        C=C,
        G=G,
        K=K,
        SHARED=width != C,
        GATED=gates is not None,
        BLOCK_C=min(64, power_of_2(rows)),
        BLOCK_N=block_n,
        num_warps=4,
    )
    return y


def gated_few(ranks: Tensor, gates: Tensor | None, num_ranks: int, scaling: float, dtype: torch.dtype) -> Tensor:
    """``scaling * gates . ranks``, (T, C) in `dtype`, of ranks as `shrink_few` gives them."""
    return gate_ranks_triton(ranks, gates, num_ranks, scaling, dtype)[0]


def add_few_(y: Tensor, ranks: Tensor, gates: Tensor | None, B: Tensor, scaling: float) -> Tensor:
    """`expand_few_` with all rows of B as one product, its ranks rounded to the dtype of y: bit for bit the same as of
    what `gated_few` makes of these ranks, without gates and with a scaling of one."""
    from molora.kernels import decode_kernels

    ranks = _parts(ranks)
    (splits, T, width), (C, N) = ranks.shape, B.shape
    block_n = 32 if N <= 4096 else 64
    decode_kernels.few_product_kernel[(blocks(N, block_n),)](
        y,
        ranks,
        ranks if gates is None else gates.contiguous(),
        B,
        T,
        N,
        ranks.stride(1),
        ranks.stride(0),
        scaling,
        SPLITS=splits,
        C=C,
        G=1 if gates is None else gates.shape[1],
        SHARED=width != C,
        GATED=gates is not None,
        IEEE=y.dtype == torch.float32,
        BLOCK_T=max(16, power_of_2(T)),
        BLOCK_C=max(16, min(128, power_of_2(C))),
        BLOCK_N=block_n,
        num_warps=4,
    )
    return y
