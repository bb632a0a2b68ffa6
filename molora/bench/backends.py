"""Tables of one mixture of a linear by every kernel that can compute it: side by side, and where they cross over."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from molora.bench.correct import Step, gradient_error
from molora.bench.measure import captured, measure
from molora.bench.subjects import Shape, device, dtype
from molora.bench.tables import Bar, Result
from molora.kernels import selection
from molora.kernels.reference import Projection

EXPERTS, RANKS, TOP_K = (8, 16, 32, 64, 128), (8, 16, 64), (1, 2, 4)


class Problem:
    """A mixture of a linear of width `hidden` on random inputs, with its routing given."""

    def __init__(self, shape: Shape, num_experts: int, r: int, top_k: int) -> None:
        generator = torch.Generator().manual_seed(1)
        make = lambda *size: torch.randn(*size, generator=generator).to(device(), dtype())  # noqa: E731
        tokens, width = shape.rows * shape.length, shape.hidden
        self.x, self.out, self.dy = (make(tokens, width).requires_grad_(i < 2) for i in range(3))
        A, B = make(num_experts, r, width) / width**0.5, make(num_experts, r, width) / r**0.5
        self.experts = Projection(A.requires_grad_(), B.requires_grad_(), 2.0)
        logits = torch.randn(tokens, num_experts, generator=generator).to(device())
        weights, self.topk_ids = logits.topk(top_k)
        self.gates = torch.zeros_like(logits).scatter(1, self.topk_ids, weights.softmax(1)).requires_grad_()
        self.request = selection.Shape(
            tokens, width, width, num_experts, r, top_k, False, dtype(), torch.empty(0, device=device()).device
        )

    def forward(self, kernel: str) -> Tensor:
        return selection.mixture_linear(kernel, self.x, self.gates, self.experts, self.out, topk_ids=self.topk_ids)

    def step(self, kernel: str) -> Step:
        wanted = [self.x, self.gates, self.experts.A, self.experts.B]
        chosen = torch.zeros_like(self.gates).scatter(1, self.topk_ids, 1.0)

        def run() -> tuple[Tensor | None, ...]:
            x, gates, A, B = torch.autograd.grad(self.forward(kernel), wanted, self.dy)
            return x, gates * chosen, A, B  # kernels that dispatch give a gate without a token no gradient

        return run

    def outputs(self, kernel: str) -> Step:
        @torch.no_grad()
        def run() -> tuple[Tensor]:
            return (self.forward(kernel),)

        return run


def backends(shape: Shape, repeats: int) -> Result:
    """8 and 64 experts of rank 16, top-2, by every kernel: the delta alone, without the frozen linear."""
    result = Result({}, {}, details={}, notes={"absent": {}})
    for num_experts in (8, 64):
        problem = Problem(shape, num_experts, 16, 2)
        subjects: dict[str, Callable[[], Any]] = {}
        for kernel in selection.KERNELS:
            reason = selection.why_not(kernel, problem.request)
            if reason is not None:
                result.notes["absent"][kernel] = reason
                continue
            for what, run in (("forward", problem.outputs(kernel)), ("forward+backward", problem.step(kernel))):
                name = f"{kernel}, {num_experts} x r16 top-2, {what}"
                subjects[name] = run
                result.details[name] = {"backend": kernel, "what": what, "num_experts": num_experts}
            forward = gradient_error(kernel, problem.outputs(kernel), problem.outputs("reference"))
            backward = gradient_error(kernel, problem.step(kernel), problem.step("reference"))
            result.errors.update(zip(list(subjects)[-2:], (forward, backward), strict=True))
        result.rows.update(measure(subjects, repeats=repeats, flush=True))
        del problem, subjects
    return result


def crossover(shape: Shape, repeats: int) -> Result:
    """Where the grouped kernel overtakes the dense-masked one, as CUDA graphs, and what the cost model chooses."""
    result = Result({}, {}, details={})
    regrets = []
    for num_experts, r, top_k in itertools.product(EXPERTS, RANKS, TOP_K):
        problem = Problem(shape, num_experts, r, top_k)
        usable = [k for k in ("dense_masked", "grouped") if selection.why_not(k, problem.request) is None]
        names = {f"{kernel}, {num_experts} x r{r} top-{top_k}": kernel for kernel in usable}
        for name, kernel in names.items():
            result.errors[name] = gradient_error(name, problem.step(kernel), problem.step("reference"))
        timed = measure(
            {n: captured(problem.step(k)) for n, k in names.items()}, warmup=1, repeats=max(3, repeats // 2)
        )
        chosen = selection.choose(None, problem.request)
        for name, kernel in names.items():
            result.details[name] = {
                "num_experts": num_experts, "r": r, "top_k": top_k, "kernel": kernel, "chosen": chosen.kernel,
            }  # fmt: skip
        result.rows.update(timed)
        milliseconds = {kernel: timed[name].median_ms for name, kernel in names.items()}
        if chosen.kernel in milliseconds:
            regrets.append(milliseconds[chosen.kernel] / min(milliseconds.values()))
        del problem
    return Result(result.rows, result.errors, [Bar("selection_regret", max(regrets), 1.25)], result.details)


def explain(shape: Shape) -> list[dict[str, Any]]:
    """What is chosen for mixtures of a linear of width `hidden` on this device, and why."""
    here = torch.empty(0, device=device()).device
    found = []
    for num_experts, r, top_k in itertools.product(EXPERTS, RANKS, (2,)):
        tokens = shape.rows * shape.length
        request = selection.Shape(tokens, shape.hidden, shape.hidden, num_experts, r, top_k, False, dtype(), here)
        kernel, reason = selection.choose(None, request)
        found.append({"num_experts": num_experts, "r": r, "top_k": top_k, "kernel": kernel, "reason": reason})
    return found
