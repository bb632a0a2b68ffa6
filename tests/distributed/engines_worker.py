"""Run by test_engines.py, alone or under torch.distributed.run: recipes through `molora.train.run.train`, one by one.

Argument: a JSON list of ``{"recipe": path, "overrides": [...], "resumes": path or null}``. Each run leaves one more
file in its output_dir, ``gradients.json``: for every step the norm of each expert's gradient, by parameter name.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import molora  # noqa: F401  (registers the PEFT method)
from molora.eval.ranks import is_first, wait_for_all
from molora.train import run
from molora.train.recipe import read_recipe


class Norms(TrainerCallback):
    """Norms of whole gradients before each step, of every expert where the first dimension is that of experts."""

    def __init__(self) -> None:
        self.steps: list[dict[str, list[float]]] = []
        self.trainer: Any = None

    def add(self, gradients: dict[str, Tensor]) -> None:
        flat = {
            name: g.flatten(1 if ".molora_A" in name or ".molora_B" in name else 0) for name, g in gradients.items()
        }
        self.steps.append({name: g.double().norm(dim=-1).reshape(-1).tolist() for name, g in flat.items()})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.deepspeed:
            return
        from deepspeed.utils import safe_get_full_grad

        # accelerate runs DeepSpeed's step inside its backward, so the engine's step is where gradients are whole.
        engine = self.trainer.model_wrapped
        step = engine.step

        def watched(*args: Any, **kwargs: Any) -> None:
            if engine.is_gradient_accumulation_boundary():
                self.add({n: safe_get_full_grad(p) for n, p in engine.module.named_parameters() if p.requires_grad})
            step(*args, **kwargs)

        engine.step = watched

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if args.deepspeed:
            return
        found = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}
        self.add({n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()})


def begin_as(run_dir: Path, other: Path) -> None:
    """A copy of a run as it was after its first checkpoint."""
    shutil.copytree(other, run_dir)
    last = max(run_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    shutil.rmtree(last)
    for name in ("adapter_model.safetensors", "results.json", "loss_curve.json", "gradients.json"):
        (run_dir / name).unlink()
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(other), str(run_dir)))


def dtypes(trainer: Any) -> dict[str, list[str]]:
    """Of trained and frozen parameters, of what the optimizer steps on and keeps, and of the routers' counters."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    named = list(trainer.model.named_parameters())
    found = {
        "experts": [p.dtype for n, p in named if p.requires_grad and "molora_router" not in n],
        "routers": [p.dtype for n, p in named if p.requires_grad and "molora_router" in n],
        "base": [p.dtype for _, p in named if not p.requires_grad],
        "stepped": [p.dtype for p in optimizer.state],
        "moments": [v.dtype for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()],
        "bias": [b.dtype for n, b in trainer.model.named_buffers() if "bias_steps" in n],
    }
    return {what: sorted({str(dtype).removeprefix("torch.") for dtype in kinds}) for what, kinds in found.items()}


def run_cell(cell: dict[str, Any]) -> None:
    recipe = read_recipe(cell["recipe"], cell["overrides"])
    if cell["resumes"] and is_first():
        begin_as(recipe.output_dir, Path(cell["resumes"]))
    wait_for_all()
    norms = Norms()
    make = run.make_trainer

    def watched(*args: Any) -> Any:
        norms.trainer = make(*args)
        return norms.trainer

    run.make_trainer = watched
    try:
        run.train(recipe, resume=bool(cell["resumes"]), callbacks=[norms], warn=lambda text: None)
    finally:
        run.make_trainer = make
    if is_first():
        (recipe.output_dir / "gradients.json").write_text(json.dumps(norms.steps))
        (recipe.output_dir / "dtypes.json").write_text(json.dumps(dtypes(norms.trainer)))


def main() -> None:
    for cell in json.loads(sys.argv[1]):
        try:
            run_cell(cell)
        except Exception:
            print(f"FAILED {cell}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            sys.exit(1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
