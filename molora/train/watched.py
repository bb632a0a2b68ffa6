"""The Trainer of a run: stops where a loss or gradient is not finite, and logs speed, memory and losses by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from torch import Tensor, nn

from molora.train.checkpoint import AtomicTrainer
from molora.train.durable import last_whole_checkpoint
from molora.train.finite import MAX_SKIPPED, FiniteWatch, not_finite, scale_gave_up, short_name
from molora.train.throughput import Throughput


class WatchedTrainer(AtomicTrainer):
    """AtomicTrainer that never goes on from, or saves, what is not finite; ``logging_nan_inf_filter`` must be off.

    Raises:
        FloatingPointError: from ``train``, on all ranks at the same line of the log or save: one sentence with the
            step, what was not finite first, and the last checkpoint.
    """

    _watch: FiniteWatch | None = None
    _throughput: Throughput | None = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        # Not earlier, because an engine may replace the parameters when it takes the model.
        if self._watch is None or self._throughput is None:
            hidden = self.accelerator.distributed_type == DistributedType.DEEPSPEED
            tasks = self.task_losses.names if self.task_losses is not None else []
            device = self.accelerator.device
            self._watch = FiniteWatch(self.model, tasks, fp16=self.args.fp16, hidden=hidden, device=device)
            self._throughput = Throughput(self.model, device)
        step = self.state.global_step + 1
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except Exception as error:
            if "loss scale already at minimum" in str(error):  # DeepSpeed's own end of fp16
                self._stop(scale_gave_up(MAX_SKIPPED, step, self._watch))
            raise
        self._watch.loss(step, loss, self.task_losses.sums if self.task_losses is not None else None)
        if self.accelerator.sync_gradients:
            self._watch.gradients(step)
        self._throughput.add(inputs)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._watch is not None and self._throughput is not None:
            wrong = self._watch.verdict()
            if wrong is None and not math.isfinite(logs["loss"]):
                wrong = f"the loss is not finite by step {self.state.global_step}"
            if wrong is not None:
                self._stop(wrong)
            logs = logs | self._throughput.collect()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_finite()
        if self._throughput is None:
            return super()._save_checkpoint(model, trial)
        with self._throughput.paused():
            super()._save_checkpoint(model, trial)

    def save_final(self) -> None:
        self._check_finite()
        super().save_final()

    def _check_finite(self) -> None:
        bad = not_finite(self.model, self.accelerator.device)
        if bad:
            self._stop(
                f"after step {self.state.global_step} {short_name(bad[0])} holds values that are not finite "
                f"({len(bad)} parameters do)"
            )

    def _stop(self, wrong: str) -> None:
        last, _ = last_whole_checkpoint(Path(self.args.output_dir))
        before = f"{last} is the last checkpoint and is from before" if last else "there is no checkpoint from before"
        raise FloatingPointError(
            f"training stopped: {wrong}; {before}; --resume would repeat this, so start anew in another "
            "training.output_dir with a lower training.learning_rate, more training.warmup_steps, or base.dtype "
            "bfloat16 or float32 instead of float16"
        )
