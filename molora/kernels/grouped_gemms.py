"""Mixture of a linear by sorted tokens and grouped GEMMs: the one algorithm behind the adapters to other packages.

`torch_grouped_mm` and `megablocks_adapter` give it four primitives each. Rows are copied K times in the order of their
experts, multiplied group by group, and summed back: 2K times the traffic of `dense_masked` on x and y, paid off only
where E*R ranks of work per token, instead of K*R, cost more than that.

Legend: T tokens, D input features, O output features, E experts, K top-k, R rank of one expert, N = T*K routed rows.

array       shape   meaning
topk_ids    (T, K)  experts of each token that have a gate, an expert at most once
order       (N,)    place among the rows sorted by expert -> flat (t, k) of `topk_ids`
rows        (N, .)  copies of token rows in that order; the rows of one expert are consecutive
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora.kernels import reference
from molora.kernels.reference import Projection, dropout_mask

Plan = tuple[Tensor, ...]
"""`order`, int64, and then whatever else the primitives of one backend need to know about the routing."""

PROBE_TOLERANCE = 2e-2
"""RMS(error) / RMS(reference in fp32). PyTorch's CPU path is at 3.4e-3 in bf16 and 9.7e-8 in fp32."""


class Primitives(NamedTuple):
    """What a backend computes. All rows are contiguous, in the compute dtype, and every one of them is written.

    Attributes:
        sort: (topk_ids, E) to a plan; stable, so that the sums below have a fixed order.
        gather: (T, .), plan, K to the (N, .) copies sorted by expert.
        combine: (N, .), plan, K to (T, .), the sum over the K copies of each token, accumulated in fp32.
        gemm: (a, b, plan, trans_a=False, trans_b=False), accumulated in fp32. For rows a (N, Y): ``a_e b_e`` (N, X)
            with weights b (E, Y, X), or b (E, X, Y) if trans_b; if trans_a, ``a_e^T b_e`` (E, Y, X) with rows b (N, X),
            zero for an expert without rows.
    """

    sort: Callable[[Tensor, int], Plan]
    gather: Callable[[Tensor, Plan, int], Tensor]
    combine: Callable[[Tensor, Plan, int], Tensor]
    gemm: Callable[..., Tensor]


def _weights(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous and at a multiple of 16 bytes: a slice of a flat buffer (FSDP, ZeRO) may begin anywhere."""
    t = t.to(dtype).contiguous()
    return t.clone() if t.data_ptr() % 16 else t


class _MixtureLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: float,
        out: Tensor,
        topk_ids: Tensor,
        dropout: float,
        seed: int,
        inplace: bool,
        ops: Primitives,
    ) -> Tensor:
        # Autocast knows nothing of grouped GEMMs, yet on a GPU it casts the sums around them to fp32.
        with torch.autocast(x.device.type, enabled=False):
            dtype, K = out.dtype, topk_ids.shape[1]
            inputs = (x * dropout_mask(x, dropout, seed) if dropout else x).flatten(0, -2).to(dtype)
            plan = ops.sort(topk_ids, len(B))
            shrunk = ops.gemm(ops.gather(inputs, plan, K), _weights(A, dtype), plan, trans_b=True)
            factors = gates.gather(1, topk_ids).flatten()[plan[0]].unsqueeze(1) * scaling  # (N, 1)
            ranks = (shrunk * factors).to(dtype)
            delta = ops.combine(ops.gemm(ranks, _weights(B, dtype), plan), plan, K)
            ctx.save_for_backward(x, gates, A, B, topk_ids, shrunk, factors, *plan)
            ctx.scaling, ctx.dropout, ctx.seed, ctx.ops = scaling, dropout, seed, ops
            if not inplace:
                return out + delta.view(out.shape)
            ctx.mark_dirty(out)
            out.view(delta.shape).add_(delta)
            return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, A, B, topk_ids, shrunk, factors, *saved = ctx.saved_tensors
        plan, ops, K, dtype = tuple(saved), ctx.ops, topk_ids.shape[1], shrunk.dtype
        need_x, need_gates, need_A, need_B = ctx.needs_input_grad[:4]
        grad_x = grad_gates = grad_A = grad_B = None
        with torch.autocast(grad_out.device.type, enabled=False):
            dy = ops.gather(grad_out.flatten(0, -2).to(dtype), plan, K)
            if need_B:
                grad_B = ops.gemm((shrunk * factors).to(dtype), dy, plan, trans_a=True).to(B.dtype)
            if need_x or need_gates or need_A:
                grad_ranks = ops.gemm(dy, _weights(B, dtype), plan, trans_b=True)
                if need_gates:
                    # d loss / d gate in rank space: R products per gate, and no division by the gate.
                    per_row = (grad_ranks.to(gates.dtype) * shrunk).sum(1) * ctx.scaling
                    per_choice = torch.empty_like(per_row).scatter_(0, plan[0], per_row).view(topk_ids.shape)
                    grad_gates = torch.zeros_like(gates).scatter_(1, topk_ids, per_choice)
                grad_shrunk = (grad_ranks * factors).to(dtype)
                mask = dropout_mask(x, ctx.dropout, ctx.seed) if ctx.dropout else None
                if need_A:
                    inputs = (x if mask is None else x * mask).flatten(0, -2).to(dtype)
                    grad_A = ops.gemm(grad_shrunk, ops.gather(inputs, plan, K), plan, trans_a=True).to(A.dtype)
                if need_x:
                    rows = ops.gemm(grad_shrunk, _weights(A, dtype), plan)
                    grad_x = ops.combine(rows, plan, K).view(x.shape)
                    grad_x = (grad_x if mask is None else grad_x * mask).to(x.dtype)
        return grad_x, grad_gates, grad_A, grad_B, None, grad_out, None, None, None, None, None


def mixture_linear(
    ops: Primitives,
    x: Tensor,
    gates: Tensor,
    experts: Projection,
    out: Tensor,
    topk_ids: Tensor,
    dropout: float,
    seed: int,
    inplace: bool,
) -> Tensor:
    """Adds the chosen low-rank experts of every token to the output of a frozen linear, with the primitives `ops`.

    ``out_t + scaling sum_j gates[t, e_j] (dropout(x)_t A_{e_j}^T) B_{e_j}``, with e_j = topk_ids[t, j].

    Saved for the backward: x (which is there anyway), the gates, the (N, R) shrunk rows and the plan.

    Args:
        ops: of one backend.
        x: input of the linear, (..., D). Computed in the dtype of `out`, whatever its own.
        gates: (T, E) fp32, T the product of x's leading sizes. Only those at `topk_ids` are read, and only they get a
            gradient; the others must be zero for this to be the mixture of `reference.mixture_linear`.
        experts: A (E, R, D), B (E, R, O), any floating dtype (gradients come back in it), and their factor.
        out: output of the frozen linear, (..., O), in the dtype to compute in.
        topk_ids: (T, K) int64, an expert at most once per token. Neither that nor the range is checked: it would take a
            host sync.
        dropout: probability of dropping an input feature, one mask for all experts, 0 <= dropout < 1.
        seed: of the dropout mask.
        inplace: write into `out`, which must then be a fresh, contiguous tensor that nobody else reads.

    Returns:
        (..., O) in the dtype of `out`.

    Raises:
        ValueError: experts that share A, gates or topk_ids of another shape.

    Source:
        MegaBlocks, arXiv 2211.15841, section 5, its "grouped" form; no code of theirs.
    """
    num_tokens = x.numel() // x.shape[-1]
    if experts.shares_A:
        raise ValueError("a grouped GEMM " + SHARED_A.format(shape=tuple(experts.A.shape)))
    if gates.shape != (num_tokens, experts.num_experts) or topk_ids.shape[:-1] != (num_tokens,):
        raise ValueError(
            f"expected gates of {(num_tokens, experts.num_experts)} and topk_ids of ({num_tokens}, K), "
            f"got {tuple(gates.shape)} and {tuple(topk_ids.shape)}"
        )
    if topk_ids.numel() == 0:
        return reference.mixture_linear(x, gates, experts, out)  # no kernel is made for an empty grid
    result: Tensor = _MixtureLinear.apply(x, gates, *experts, out, topk_ids, dropout, seed, inplace, ops)
    return result


SHARED_A = "has nothing to sort where the experts share one A, of shape {shape}; use dense_masked"


def refusal(
    dtype: torch.dtype, dtypes: tuple[torch.dtype, ...], shape: tuple[int, int, int, int], shares_A: bool
) -> str | None:
    """Why no grouped GEMM computes this problem: the dtype, the sizes (E, R, D, O), or one A for all; else None."""
    E, R, D, O = shape
    if dtype not in dtypes:
        return f"computes in {' or '.join(str(d) for d in dtypes)}, not in {dtype}"
    if shares_A:
        return SHARED_A.format(shape=(1, R, D))
    for name, size in (("rank R", R), ("input features D", D), ("output features O", O)):
        if size % 8:
            return f"needs rows of whole 16 bytes, and {name}={size} is not a multiple of 8"
    return None


@functools.cache
def probe(mixture: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs a small problem once per process, forward and backward, against plain torch in fp32.

    Unequal groups, one expert without tokens. Synchronises with the device, so do not call it first while a CUDA graph
    is captured. The global random state is left alone.

    Args:
        mixture: `mixture_linear` of a backend.
        device: to run on.
        dtype: to compute in.

    Returns:
        None where output and gradients are right, else what is wrong: an error's type and text, or the relative errors.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            errors = _probe_errors(mixture, device, dtype)
    except Exception as error:  # an extension built for another torch or GPU may raise anything
        return f"fails its probe on {device} with {type(error).__name__}: {error}"
    wrong = ", ".join(f"{name} {e:.1e}" for name, e in errors.items() if not e <= PROBE_TOLERANCE)
    return f"fails its probe on {device} with relative errors of {wrong}" if wrong else None


def _probe_errors(mixture: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    T, E, K, R, D, O = 40, 4, 2, 16, 64, 48
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # Expert 0 is popular and expert 2 is never chosen, so that groups are unequal and one of them is empty.
    weights, ids = (draw(T, E) + torch.tensor([1.0, 0.0, -99.0, 0.0])).topk(K)
    chosen = torch.zeros(T, E).scatter(1, ids, 1.0).to(device)
    gates = torch.zeros(T, E).scatter(1, ids, weights.softmax(1)).to(device)
    tensors = {"x": draw(T, D), "A": draw(E, R, D) / D**0.5, "B": draw(E, R, O) / R**0.5, "out": draw(T, O)}
    rounded = {name: t.to(device, dtype) for name, t in tensors.items()} | {"gates": gates}
    upstream = draw(T, O).to(device, dtype)

    def run(kernel: Callable[..., Tensor], cast: Callable[[Tensor], Tensor], **hint: Tensor) -> dict[str, Tensor]:
        v = {name: cast(t).detach().requires_grad_() for name, t in rounded.items()}
        out = kernel(v["x"], v["gates"], Projection(v["A"], v["B"], 0.5), v["out"], **hint)
        grads = torch.autograd.grad(out, list(v.values()), cast(upstream))
        return {"output": out.detach()} | {f"gradient of {n}": g for n, g in zip(v, grads, strict=True)}

    got = run(mixture, lambda t: t, topk_ids=ids.to(device))
    want = run(reference.mixture_linear, Tensor.float)
    want["gradient of gates"] = want["gradient of gates"] * chosen
    return {n: float((got[n].float() - want[n]).norm() / want[n].norm()) for n in want}
