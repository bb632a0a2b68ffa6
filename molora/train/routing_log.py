"""How the routers use their experts, in the trainer's log."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from molora.telemetry import RouterUse, routing_report

_SCALARS = ("largest_load", "entropy_before", "entropy_after", "top1_share", "dead_experts")


class RoutingLog(TrainerCallback):
    """Adds to each line of the trainer's log what `molora.routing_report` says of the steps since the line before.

    For each router ``routing/<its module>/`` largest_load, entropy_before, entropy_after, top1_share, dead_experts, and
    the lists load and mean_gate; over all routers largest_load and dead_experts. One copy from the device for each
    line, none for a step. A router that uses no more experts than a single token does is named in a warning, once.

    For any Trainer: ``Trainer(..., callbacks=[RoutingLog()])``. Figures are those of the process that logs. For
    TensorBoard and the like it has to stand before their callbacks: ``trainer.callback_handler.callbacks.insert(0,
    RoutingLog())``; they get the scalars.

    Args:
        warn: called with the sentence that names a collapsed router.
    """

    def __init__(self, warn: Callable[[str], Any] = warnings.warn) -> None:
        self.warn = warn
        self._warned: set[str] = set()

    def on_log(
        self, args: Any, state: Any, control: Any, model: Any = None, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.log_history or "loss" not in state.log_history[-1]:
            return
        report = routing_report(model)
        if not report:
            return
        line = state.log_history[-1]
        over_all = {
            "largest_load": max(use.largest_load for use in report.values()),
            "dead_experts": sum(use.dead_experts for use in report.values()),
        }
        line |= over_all
        if logs is not None:
            logs |= over_all
        for name, use in report.items():
            scalars = {f"routing/{name}/{key}": getattr(use, key) for key in _SCALARS}
            line |= scalars | {f"routing/{name}/load": use.load, f"routing/{name}/mean_gate": use.mean_gate}
            if logs is not None:
                logs |= scalars  # for the callbacks behind this one
            if use.collapsed and name not in self._warned:
                self._warned.add(name)
                self.warn(collapse_warning(name, use, state.global_step))


def collapse_warning(name: str, use: RouterUse, step: int) -> str:
    """One sentence about a router that has collapsed."""
    named = ", ".join(map(str, use.alive[:8]))
    return (
        f"the router of {name} has collapsed: by step {step} its tokens go to {len(use.alive)} of {len(use.load)} "
        f"experts ({named}); raise router.router_aux_loss_coef, or lower the learning rate"
    )
