"""Run by test_zero.py under torch.distributed.run: trains cells of the gradient matrix on several ranks and compares.

Every rank has the gradients of the loss written by hand, of one process over the micro-batches of all ranks. Arguments:
the cells as JSON, and a directory with `gradients.tiny_llama()`. Rank 0 prints one line ``RESULT {...}`` for each cell.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate.state import AcceleratorState
from deepspeed.utils import safe_get_full_grad
from gradients import (
    CaptureGradients,
    Gradients,
    hand_written,
    make_trainer,
    micro_batches,
    mixture,
    relative_error,
    token_weights,
    training_options,
)
from transformers import LlamaForCausalLM, TrainerCallback


def deepspeed_config(stage: int) -> dict[str, Any]:
    """fp32, every parameter partitioned at stage 3, the rest left to the trainer."""
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


class CaptureBeforeStep(TrainerCallback):
    """accelerate runs DeepSpeed's step inside its backward, so the engine's step is where the gradients are whole."""

    def __init__(self) -> None:
        self.steps: list[Gradients] = []
        self.trainer: Any = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        engine = self.trainer.model_wrapped
        run = engine.step

        def step(*args: Any, **kwargs: Any) -> None:
            if engine.is_gradient_accumulation_boundary():
                found = {n: safe_get_full_grad(p) for n, p in engine.module.named_parameters() if p.requires_grad}
                self.steps.append({n: g.clone() for n, g in found.items() if g is not None})
            run(*args, **kwargs)

        engine.step = step


def run_cell(cell: dict[str, Any], base_dir: str, world: int) -> float:
    """The largest relative error of any gradient in any step."""
    accumulation, checkpointing = cell["accumulation"], cell["checkpointing"]
    placement, pool, zero_B = cell["placement"], cell["pool"], cell["zero_B"]
    batches = micro_batches(accumulation * world, cell["padding"])
    want = hand_written(mixture(placement, zero_B, pool), batches, token_weights(batches), pool)
    with tempfile.TemporaryDirectory() as folder:
        options = training_options(accumulation, checkpointing, 2, folder)
        capture: Any = CaptureGradients()
        if cell["stage"]:
            options |= {"deepspeed": deepspeed_config(cell["stage"])}
            capture = CaptureBeforeStep()

        def make_model() -> torch.nn.Module:
            base = None
            if cell["from_pretrained"]:  # arrives partitioned at stage 3
                base = LlamaForCausalLM.from_pretrained(base_dir)
            model = mixture(placement, zero_B, pool, base)
            if checkpointing == "reentrant":
                model.enable_input_require_grads()
            return model

        trainer = make_trainer(cell["trainer"], make_model, batches, options, callbacks=[capture])
        capture.trainer = trainer
        trainer.train()
    assert len(capture.steps) == 2
    return max(relative_error(got, want) for got in capture.steps)


def main() -> None:
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for cell in json.loads(sys.argv[1]):
        start = time.perf_counter()
        result: dict[str, Any] = {"cell": cell}
        try:
            result["error"] = run_cell(cell, sys.argv[2], world)
        except Exception:
            result["failure"] = traceback.format_exc()
            print(f"rank {rank}: {result['failure']}", file=sys.stderr, flush=True)
        result["seconds"] = round(time.perf_counter() - start, 1)
        AcceleratorState._reset_state(True)
        if rank == 0:
            print("RESULT " + json.dumps(result), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
