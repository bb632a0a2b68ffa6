"""Run by test_zero.py under torch.distributed.run: trains cells of the gradient matrix on several ranks and compares.

Every rank has the gradients of the loss written by hand, of one process over the micro-batches of all ranks; for a
router with a bias, that bias after each step too. Arguments: the cells as JSON, and a directory with
`gradients.tiny_llama()`. Rank 0 prints one line ``RESULT {...}`` for each cell.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed
import torch
from accelerate.state import AcceleratorState
from deepspeed.utils import safe_get_full_grad
from gradients import (
    Batch,
    CaptureGradients,
    Gradients,
    cross_entropy,
    hand_written,
    make_trainer,
    micro_batches,
    mixture,
    preconditioned_by_hand,
    relative_error,
    router_inputs,
    router_loss,
    take_gradients,
    tiny_llama,
    token_weights,
    training_options,
)
from peft import get_peft_model, get_peft_model_state_dict
from router_formulas import bias_step, chosen_counts, loads
from safetensors.torch import load_file
from tiny_models import config, preset_model
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, TrainerCallback

from molora.kernels import selection
from molora.layers import MoloraLayer
from molora.loading import base_fingerprint
from molora.partitioned import is_hooked
from molora.train.checkpoint import AtomicTrainer

FITTED = ("stage3_param_persistence_threshold", "stage3_prefetch_bucket_size")


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


def engine_options(stage: int | str, fitted: bool = False) -> dict[str, Any]:
    """Training arguments of a stage of ZeRO, of DDP (0), or of FSDP2; `fitted`: sizes are those that fit the model."""
    if stage == "fsdp":
        return {"fsdp": True}
    config = deepspeed_config(int(stage))
    if fitted:
        config["zero_optimization"] |= dict.fromkeys(FITTED, "auto")
    return {"deepspeed": config} if stage else {}


class CaptureWhole(CaptureGradients):
    """Of FSDP2: the gradients put together."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
        self.steps.append({n: grad.clone() for n, grad in found.items()})


def capture_for(stage: int | str) -> Any:
    return CaptureWhole() if stage == "fsdp" else CaptureBeforeStep() if stage else CaptureGradients()


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


def in_time(batches: list[Batch], seen: list[int], steps: int) -> list[list[list[Batch]]]:
    """For each step, and each micro-batch of a rank in it, the micro-batches of all ranks."""
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, seen)
    together = [[batches[i] for i in at] for at in zip(*every, strict=True)]
    size = len(together) // steps
    return [together[step * size : (step + 1) * size] for step in range(steps)]


def loads_of(model: torch.nn.Module, batch: Batch, earlier: Any) -> Any:
    with torch.no_grad(), router_inputs(model) as inputs:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return loads(inputs[0][0].config, inputs, batch["attention_mask"], len(batch["input_ids"]), earlier)


def written_step(model: torch.nn.Module, step: list[list[Batch]], over: str) -> Gradients:
    """The gradients of one step by hand, with F over the micro-batches of all ranks, or over all so far too."""
    weights = iter(token_weights([batch for at in step for batch in at]))
    before = None
    for at in step:
        for i, batch in enumerate(at):
            others = before if over == "window" else None
            for other in at[:i] + at[i + 1 :] if over else []:
                others = loads_of(model, other, others)
            with router_inputs(model) as inputs:
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            aux = router_loss(inputs, batch["attention_mask"], earlier=others)
            (next(weights) * (cross_entropy(logits, batch["labels"]) + aux)).backward()
        for batch in at if over else []:
            before = loads_of(model, batch, before)
    return take_gradients(model)


def move_biases(model: torch.nn.Module, step: list[list[Batch]]) -> None:
    """What one optimiser step does to the biases of rank-wise routers, by hand."""
    counts: dict[Any, Any] = {}
    model.eval()
    for batch in (batch for at in step for batch in at):
        with torch.no_grad(), router_inputs(model) as inputs:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for router, x, _ in inputs:
            counts[router] = counts.get(router, 0) + chosen_counts(router, x, batch["attention_mask"])
    model.train()
    for router, count in counts.items():
        router.bias_steps += bias_step(count)


def biases(model: torch.nn.Module) -> list[list[int]]:
    return [value.tolist() for name, value in model.named_buffers() if name.endswith("bias_steps")]


def run_preset(cell: dict[str, Any], world: int) -> float:
    """As `run_cell`, for a preset whose router counts over all ranks; fails where a bias is not that of one process."""
    accumulation, steps, over = cell["accumulation"], 2, cell["over"]
    router = {"balance_over": over} if over else {}
    batches = micro_batches(accumulation * world, "right")
    seen: list[int] = []

    def make_model() -> torch.nn.Module:
        model = preset_model(cell["preset"], tiny_llama(), router=router)
        if cell["checkpointing"] == "reentrant":
            model.enable_input_require_grads()
        return model

    with tempfile.TemporaryDirectory() as folder:
        options = training_options(accumulation, cell["checkpointing"], steps, folder) | engine_options(cell["stage"])
        capture = capture_for(cell["stage"])
        trainer = make_trainer(cell["trainer"], make_model, batches, options, AtomicTrainer, callbacks=[capture])
        collate = trainer.data_collator

        def watched(rows: list[dict[str, int]]) -> Batch:
            seen.append(rows[0]["index"])
            return collate(rows)

        trainer.data_collator = watched
        capture.trainer = trainer
        trainer.train()
        moved = biases(trainer.model)
    want = make_model()
    error = 0.0
    for step, got in zip(in_time(batches, seen[: steps * accumulation], steps), capture.steps, strict=True):
        error = max(error, relative_error(got, written_step(want, step, over)))
        if moved:
            move_biases(want, step)
    assert moved == biases(want), f"biases {moved} instead of {biases(want)}"
    assert bool(moved) == (cell["preset"] == "smora")
    return error


def run_cell(cell: dict[str, Any], base_dir: str, world: int) -> float:
    """The largest relative error of any gradient in any step."""
    accumulation, checkpointing = cell["accumulation"], cell["checkpointing"]
    placement, pool, zero_B = cell["placement"], cell["pool"], cell["zero_B"]
    batches = micro_batches(accumulation * world, cell["padding"])
    want = hand_written(mixture(placement, zero_B, pool), batches, token_weights(batches), pool)
    with tempfile.TemporaryDirectory() as folder:
        options = training_options(accumulation, checkpointing, 2, folder)
        options |= engine_options(cell["stage"], cell.get("fitted", False))
        capture = capture_for(cell["stage"])

        def make_model() -> torch.nn.Module:
            base = None
            if cell["from_pretrained"]:  # arrives partitioned at stage 3
                base = LlamaForCausalLM.from_pretrained(base_dir)
            model = mixture(placement, zero_B, pool, base)
            if checkpointing == "reentrant":
                model.enable_input_require_grads()
            return model

        trainer = make_trainer(cell["trainer"], make_model, batches, options, AtomicTrainer, callbacks=[capture])
        capture.trainer = trainer
        trainer.train()
    assert len(capture.steps) == 2
    hooked = [m for m in trainer.model.modules() if isinstance(m, MoloraLayer) and is_hooked(m)]
    gathers = {m.molora_runtime.gathers for m in trainer.model.modules() if isinstance(m, MoloraLayer)}
    assert gathers == {cell["stage"] == 3} and not hooked, "blocks gather under ZeRO-3, and nowhere else"
    if cell["stage"] == 3:
        whole = {p.ds_persist for p in trainer.model.parameters() if p.requires_grad}
        assert whole == {cell.get("fitted", False)} and not all(p.ds_persist for p in trainer.model.parameters())
    return max(relative_error(got, want) for got in capture.steps)


def run_optimizer(cell: dict[str, Any], world: int) -> float:
    """One step of SGD with LoRA+ on preconditioned gradients: the error of the gradients, and of what they moved."""
    batches = micro_batches(cell["accumulation"] * world, cell["padding"])
    alone, ratio = mixture(cell["placement"]), 4.0
    plain = hand_written(alone, batches, token_weights(batches), True)
    want = preconditioned_by_hand(alone, plain)

    def make_model() -> torch.nn.Module:
        model = mixture(cell["placement"], riemannian=True)
        if cell["checkpointing"] == "reentrant":
            model.enable_input_require_grads()
        return model

    capture = capture_for(cell["stage"])
    with tempfile.TemporaryDirectory() as folder:
        options = training_options(cell["accumulation"], cell["checkpointing"], 1, folder)
        options |= engine_options(cell["stage"]) | {"learning_rate": 1.0}
        trainer: Any = make_trainer("trainer", make_model, batches, options, AtomicTrainer, callbacks=[capture])
        trainer.loraplus_lr_ratio = ratio
        capture.trainer = trainer
        trainer.train()
    before, moved, steps = dict(alone.named_parameters()), {}, {}
    for name, parameter in trainer.model.named_parameters():
        if name in want:
            with deepspeed.zero.GatheredParameters([parameter], enabled=cell["stage"] == 3):
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                moved[name] = before[name].detach() - whole.detach()
            steps[name] = want[name] * (ratio if "lora_B" in name else 1.0)
    return max(relative_error(capture.steps[0], want), relative_error(moved, steps))


def run_saved(cell: dict[str, Any]) -> float:
    """Trains one step and saves: how far the frozen tensors of the adapter's file are from those it began with."""

    def base() -> LlamaForCausalLM:
        shape = tiny_llama().config
        shape.vocab_size = 160  # the first of two processes has 64 rows and more
        return LlamaForCausalLM(shape)

    def make_model() -> torch.nn.Module:
        torch.manual_seed(0)
        return get_peft_model(base(), config("linear", freeze_experts=True, init_lora_weights=False))

    want = get_peft_model_state_dict(make_model())
    with tempfile.TemporaryDirectory() as folder:
        options = training_options(1, cell["checkpointing"], 1, folder) | engine_options(cell["stage"])
        trainer = make_trainer("trainer", make_model, micro_batches(2, "right"), options, AtomicTrainer)
        trainer.train()
        trainer.save_model(folder)
        torch.distributed.barrier()
        saved = load_file(Path(folder) / "adapter_model.safetensors") if trainer.args.should_save else want
        written = json.loads((Path(folder) / "adapter_config.json").read_text())["base_fingerprint"]
        assert len(written["embedding"]) == 16
        assert written == base_fingerprint(base()), "the base is told from others by its embedding"
    assert saved.keys() == want.keys(), f"{sorted(saved.keys() ^ want.keys())[:3]} of {len(want)}"
    frozen = {n: v for n, v in want.items() if "molora_A" in n or "molora_B" in n}
    assert frozen and len(frozen) < len(want)
    return relative_error({n: saved[n] for n in frozen}, frozen)


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Layers ask, as on a GPU, whether their kernels may read parameters early; of partitioned ones they may not."""
    with patch.object(selection, "reads_first", lambda x: True), patch.object(selection, "fuses_ffn", lambda *a: True):
        yield


def main() -> None:
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for cell in json.loads(sys.argv[1]):
        start = time.perf_counter()
        result: dict[str, Any] = {"cell": cell}
        try:
            with as_on_gpu() if cell.get("as_on_gpu") else contextlib.nullcontext():
                if cell.get("saved"):
                    result["error"] = run_saved(cell)
                elif cell.get("optimizer"):
                    result["error"] = run_optimizer(cell, world)
                else:
                    preset = cell.get("preset")
                    result["error"] = run_preset(cell, world) if preset else run_cell(cell, sys.argv[2], world)
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
