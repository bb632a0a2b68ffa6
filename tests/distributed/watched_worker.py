"""Run by test_watched.py under torch.distributed.run: trains with WatchedTrainer on several ranks.

Arguments: the cells as JSON. A cell has the ZeRO ``stage`` (0: DDP) and what is spoiled on the last rank alone in step
3: ``logits``, a ``gradient``, or null. Rank 0 prints one line ``RESULT [...]`` for each cell with the result of each
rank: what stopped it, or the log of the training and what the saved checkpoint lacks.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate.state import AcceleratorState
from gradients import Batch, make_trainer, micro_batches, mixture, training_options
from test_not_finite import Poison
from zero_worker import deepspeed_config

from molora.train import throughput
from molora.train.durable import damage
from molora.train.task_loss import TaskLosses
from molora.train.watched import WatchedTrainer

TARGET = "model.layers.0.self_attn.o_proj"
TASKS = ("a", "b")
MICRO_BATCHES = 8


class Clock:
    """A second passes between two looks."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


def batches_with_tasks() -> list[Batch]:
    return [
        {**batch, "task": torch.tensor([i % 2, 0])} for i, batch in enumerate(micro_batches(MICRO_BATCHES, "right"))
    ]


class Spoiled(WatchedTrainer):
    """Spoils one micro-batch on the last rank."""

    how: str | None = None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        last = self.args.process_index == self.args.world_size - 1
        if self.how is None or not last or self.state.global_step != 2:
            return super().compute_loss(model, inputs, *args, **kwargs)
        tasks = inputs["task"]

        def hook(module: Any, inputs_: Any, output: Any) -> Any:
            if self.how == "gradient":
                return Poison.apply(output)
            return torch.where((tasks == 0).view(-1, 1, 1), torch.nan, output)

        name = TARGET if self.how == "gradient" else "lm_head"
        handle = next(m for n, m in model.named_modules() if n.endswith(name)).register_forward_hook(hook)
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            handle.remove()


def make(cell: dict[str, Any], folder: str, **more: Any) -> Spoiled:
    options = training_options(1, "none", 4, folder)
    # What is not spoiled stands still, so that its losses are those of the model as it was made.
    options |= {"learning_rate": 0.0 if cell["how"] is None else 0.01, "logging_strategy": "steps"}
    options |= {"logging_steps": 2, "logging_nan_inf_filter": False}
    options |= {"save_strategy": "steps", "save_steps": 2, **more}
    if cell["stage"]:
        options |= {"deepspeed": deepspeed_config(cell["stage"])}
    trainer: Any = make_trainer("trainer", lambda: mixture("linear"), batches_with_tasks(), options, Spoiled)
    trainer.task_losses = TaskLosses(TASKS)
    trainer.how = cell["how"]
    return trainer


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    folder = cell["folder"]
    trainer = make(cell, folder)
    throughput.time = Clock()  # type: ignore[attr-defined]
    try:
        trainer.train()
    except FloatingPointError as error:
        return {"stopped": str(error), "step": trainer.state.global_step}
    torch.distributed.barrier()
    (path,) = Path(folder).glob("checkpoint-4")
    log = [line for line in trainer.state.log_history if "loss" in line]
    return {"log": log, "damage": damage(path), "files": len(list(path.rglob("*")))}


def main() -> None:
    torch.distributed.init_process_group("gloo")
    for cell in json.loads(sys.argv[1]):
        start = time.perf_counter()
        result: dict[str, Any] = {"cell": cell, "rank": torch.distributed.get_rank()}
        try:
            result |= run_cell(cell)
        except Exception:
            result["failure"] = traceback.format_exc()
        result["seconds"] = round(time.perf_counter() - start, 1)
        AcceleratorState._reset_state(True)
        every: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(every, result)
        if result["rank"] == 0:
            print("RESULT " + json.dumps(every), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
