"""Watches a training run for losses and gradients that are not finite, without waiting for the device in a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

NEVER = 2**62
MAX_SKIPPED = 20
"""Optimizer steps in a row that fp16's loss scaling may skip: from 65536 the scale is then below 1."""


class FiniteWatch:
    """Remembers, on the device, the first step whose loss or gradient was not finite and what was not finite in it.

    Every gradient of a later step is not finite either, because the optimizer has then spread it; so only the first
    counts. `verdict` reads what was remembered; it is called on all ranks where the log waits for the device anyway.

    Args:
        model: its trainable parameters are watched.
        tasks: names, by their number in the sums of `loss`.
        fp16: gradients that are not finite are then normal, as the loss scaling skips their steps; only too many such
            steps in a row are told. Counted here, for a fused optimizer skips a step where nobody else sees it.
        hidden: whether the engine (DeepSpeed) takes the gradients away within the backward; hooks then look at them.
    """

    def __init__(self, model: nn.Module, tasks: Sequence[str], *, fp16: bool, hidden: bool, device: Any) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.tasks, self.fp16, self.hidden = list(tasks), fp16, hidden
        self.first = torch.full((2,), NEVER, device=device)  # the step of the first loss, and of the first gradient
        self.sizes = torch.zeros(len(named), device=device)  # of each parameter's gradient in that step
        self.task_sums = torch.zeros(len(self.tasks), dtype=torch.float64, device=device)
        self.skipped = torch.zeros(2, dtype=torch.long, device=device)  # steps in a row, and up to which step
        self._hooked = torch.zeros(len(named), device=device)
        if hidden:
            for number, parameter in enumerate(self.parameters):
                parameter.register_hook(lambda grad, number=number: self._see(number, grad))

    @torch.no_grad()
    def _see(self, number: int, grad: Tensor) -> None:
        self._hooked[number] += grad.sum(dtype=torch.float32)

    @torch.no_grad()
    def loss(self, step: int, value: Tensor, task_sums: Tensor | None) -> None:
        """Looks at the loss of one micro-batch.

        Args:
            step: that the micro-batch is part of, from 1.
            value: 0-dim.
            task_sums: (tasks,) sums of the token losses of each task, taken from the logits.
        """
        if task_sums is not None:
            self.task_sums = torch.where(self.first[0] < step, self.task_sums, task_sums)
        now = torch.where(value.isfinite(), NEVER, step)
        self.first[0] = torch.minimum(self.first[0], now.to(self.first))

    @torch.no_grad()
    def gradients(self, step: int) -> None:
        """Looks at the gradients of a step, after its last backward and before they are clipped."""
        if self.hidden:
            sizes, self._hooked = self._hooked, torch.zeros_like(self._hooked)
        else:
            sizes = largest([p.grad for p in self.parameters], self.sizes)
        # Those of the first step stay.
        self.sizes = torch.where(self.first[1] < step, self.sizes, sizes)
        finite = sizes.isfinite().all()
        if self.fp16:
            self.skipped = torch.where(finite, torch.zeros_like(self.skipped), self.skipped + 1)
            self.skipped[1] = step
        else:
            self.first[1] = torch.minimum(self.first[1], torch.where(finite, NEVER, step).to(self.first))

    def verdict(self) -> str | None:
        """What was not finite first, on any rank, and at which step; ``None``: nothing. Called on all ranks."""
        loss, gradient = over_ranks(self.first.clone(), "MIN").tolist()
        if loss <= gradient and loss < NEVER:
            bad = over_ranks((~self.task_sums.isfinite()).int(), "MAX").tolist()
            tasks = [name for name, is_bad in zip(self.tasks, bad, strict=True) if is_bad]
            if tasks:
                named = ", ".join(map(repr, tasks))
                return f"at step {loss} the logits gave rows of task {named} a loss that is not finite"
            return f"at step {loss} the loss was not finite, though the logits gave every row a finite one"
        if gradient < NEVER:
            return f"at step {gradient} {self.worst()}"
        in_a_row, step = over_ranks(self.skipped.clone(), "MAX").tolist() if self.fp16 else (0, 0)
        return scale_gave_up(in_a_row, step, self) if in_a_row > MAX_SKIPPED else None

    def worst(self) -> str:
        """Where in the backward pass the gradient was not finite first. Called on all ranks."""
        bad = over_ranks((~self.sizes.isfinite()).int(), "MAX").nonzero().flatten().tolist()
        if not bad:
            return "a gradient was not finite"
        # A backward runs from the last module to the first.
        return (
            f"the gradient of {short_name(self.names[bad[-1]])} was not finite (of {len(bad)} among {len(self.names)} "
            "parameters the first in the backward)"
        )


def scale_gave_up(in_a_row: int, step: int, watch: FiniteWatch) -> str:
    """That fp16's loss scaling has skipped too many steps."""
    return f"{in_a_row} steps in a row up to step {step} were skipped by fp16's loss scaling, and still {watch.worst()}"


def short_name(parameter: str) -> str:
    """The name of a PEFT model's parameter as its base names it."""
    return parameter.removeprefix("base_model.model.")


def largest(tensors: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """(N,) the largest magnitude in each tensor, NaN where it holds one; 0 for those that are None or empty.

    A handful of kernels for hundreds of tensors. Of a sharded tensor only this rank's part is seen.
    """
    found = torch.zeros_like(like, dtype=torch.float32)
    local = [(i, _local(tensor)) for i, tensor in enumerate(tensors) if tensor is not None]
    local = [(i, tensor) for i, tensor in local if tensor.numel()]
    if local:
        norms = torch._foreach_norm([tensor for _, tensor in local], float("inf"))
        values = torch.stack([norm.to(found) for norm in norms])
        if len(local) == len(found):
            return values
        found[[i for i, _ in local]] = values
    return found


def not_finite(model: nn.Module, device: Any) -> list[str]:
    """Names of the trainable parameters that hold a value that is not finite, on any rank. Called on all ranks."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # At ZeRO-3 the parameter itself is empty, and `ds_tensor` is this rank's part.
    sizes = largest([getattr(p, "ds_tensor", p).detach() for _, p in named], torch.zeros(len(named), device=device))
    bad = over_ranks((~sizes.isfinite()).int(), "MAX").tolist()
    return [name for (name, _), is_bad in zip(named, bad, strict=True) if is_bad]


def over_ranks(values: Tensor, operation: str) -> Tensor:
    """The values combined over all processes (``SUM``, ``MIN``, ``MAX``); themselves in a single one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values, getattr(torch.distributed.ReduceOp, operation))
    return values


def _local(tensor: Tensor) -> Tensor:
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
