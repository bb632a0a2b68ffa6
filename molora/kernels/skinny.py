"""Products of skinny matrices, as an expand and a shrink need them.

Legend: T tokens, N features, K inner size (the ranks of all experts).
"""

from __future__ import annotations

import torch
from torch import Tensor

from molora.kernels import launch
from molora.kernels.launch import blocks, power_of_2

MAX_INNER = 192
"""Above it the product itself is what costs, and a library's GEMM is better at that."""


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` in `dtype`, accumulated in fp32 (fp64 for fp64); a CPU rounds to the dtype of a and b in between."""
    if a.is_cuda and torch.version.hip is None and dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.half):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def add_product_(y: Tensor, p: Tensor, m: Tensor) -> Tensor:
    """``y += p @ m`` in place, accumulated in fp32 and rounded once.

    A GEMM library reads and writes y at little more than half of the memory's rate where K is small; this kernel loads
    its tile of y before it multiplies.

    Args:
        y: (T, N), contiguous.
        p: (T, K), last dimension contiguous.
        m: (K, N), contiguous; all three of one dtype.
    """
    T, K = p.shape
    if not (launch.ready(y.device) and y.dtype in (torch.bfloat16, torch.half) and 0 < K <= MAX_INNER and T):
        return y.addmm_(p, m)
    return add_product_triton_(y, p, m)


def add_product_triton_(
    y: Tensor, p: Tensor, m: Tensor, tile: tuple[int, int, int] = (64, 128, 128), warps: int = 4
) -> Tensor:
    """`add_product_` by Triton, in tiles of (tokens, features, inner size)."""
    from molora.kernels import skinny_kernels

    (T, K), N = p.shape, m.shape[1]
    block_t, block_n, block_k = tile[0], tile[1], min(tile[2], max(16, power_of_2(K)))
    tail = max(16, power_of_2(K % block_k)) if K % block_k else 0
    skinny_kernels.add_product_kernel[(blocks(T, block_t) * blocks(N, block_n),)](
        y,
        p,
        m,
        T,
        N,
        p.stride(0),
        K=K,
        TAIL=tail,
        EVEN=T % block_t == 0 and N % block_n == 0,
        IEEE=y.dtype == torch.float32,
        BLOCK_T=block_t,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
    )
    return y
