"""Loss curves of one recipe under Trainer, SFTTrainer, DeepSpeed ZeRO-2 and ZeRO-3: they are one curve.

    python benchmarks/engine_curves.py [--steps 30]

Teaches molora-tiny the quickstart's skills with the preset smora, eight rows in a step: one process with eight
micro-batches under Trainer (`molora train`) and TRL's SFTTrainer, two processes with four each under DeepSpeed. CPU,
fp32. Writes results/engine_curves.json beside itself and docs/engine_curves.svg; needs the extras trl, deepspeed, dev.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
RESULT, PICTURE = ROOT / "benchmarks" / "results" / "engine_curves.json", ROOT / "docs" / "engine_curves.svg"
COMMAND = ("-m", "molora_cli", "train")
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
RUNS: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    "Trainer, 1 process": (COMMAND, 8, ()),
    "SFTTrainer, 1 process": ((__file__, "--sft"), 8, ()),
    "ZeRO-2, 2 processes": ((*TWO, *COMMAND), 4, ("training.deepspeed=zero2",)),
    "ZeRO-3, 2 processes": ((*TWO, *COMMAND), 4, ("training.deepspeed=zero3",)),
}
"""For each curve how it is started, its accumulation steps, and its changes of the recipe."""


def write_recipe(folder: Path, steps: int) -> Path:
    from molora.train.quickstart import write_tasks

    recipe = {
        "schema": "molora.recipe/1",
        "base": {"model": "molora-tiny", "dtype": "float32"},
        "mixture": {"preset": "smora"},
        "tasks": write_tasks(folder, 0),
        "training": {
            "output_dir": str(folder),
            "max_steps": steps,
            "per_device_train_batch_size": 1,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
        },
        "evaluation": {"before": False, "after": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def train_with_sft(recipe_file: str, overrides: list[str]) -> None:
    """What `molora train` does, by TRL's trainer."""
    from trl import SFTConfig, SFTTrainer

    import molora  # noqa: F401  (registers the PEFT method)
    from molora.eval.encode import collate
    from molora.train.prepare import prepare
    from molora.train.recipe import read_recipe

    recipe = read_recipe(recipe_file, overrides)
    model, tokenizer, rows, _ = prepare(recipe)
    options = {"bf16": False, "use_cpu": True, "report_to": "none", "remove_unused_columns": False}
    arguments = SFTConfig(**recipe.training, **options, dataset_kwargs={"skip_prepare_dataset": True})
    rows = rows.select_columns(["input_ids", "labels"])
    trainer = SFTTrainer(model, arguments, train_dataset=rows, data_collator=collate, processing_class=tokenizer)
    trainer.train()
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    (recipe.output_dir / "loss_curve.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")


def curve(folder: Path, name: str, recipe: Path) -> list[float]:
    start, accumulation, changes = RUNS[name]
    out = folder / f"run{list(RUNS).index(name)}"
    settings = [f"training.output_dir={out}", f"training.gradient_accumulation_steps={accumulation}", *changes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *start, str(recipe), *settings], check=True, env=environment)
    log = json.loads((out / "loss_curve.json").read_text(encoding="utf-8"))
    return [line["loss"] for line in log if "loss" in line]


def draw(curves: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "molora"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for (name, losses), width, style in zip(curves.items(), (7, 4.5, 2.5, 1.2), ("-", "-", "-", ":"), strict=True):
        axes.plot(range(1, len(losses) + 1), losses, linewidth=width, linestyle=style, label=name)
    axes.set(xlabel="optimiser step", ylabel="loss", title="one recipe (smora on molora-tiny), four engines")
    axes.legend()
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    if sys.argv[1:2] == ["--sft"]:
        return train_with_sft(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    from molora.eval.results import SCHEMA, environment, write_json

    with tempfile.TemporaryDirectory() as name:
        recipe = write_recipe(Path(name), options.steps)
        curves = {run: curve(Path(name), run, recipe) for run in RUNS}
    first = curves["Trainer, 1 process"]
    differences = {
        run: max(abs(a - b) / b for a, b in zip(losses, first, strict=True)) for run, losses in curves.items()
    }
    limit = 5e-5  # the log rounds losses to four digits
    bars = [{"name": run, "value": d, "limit": limit, "holds": d <= limit} for run, d in differences.items()]
    described = {"schema": SCHEMA, "command": sys.argv, **environment(), "seed": 42}
    write_json(RESULT, described | {"losses": curves, "largest_relative_difference": differences, "bars": bars})
    draw(curves)
    print("\n".join(f"{run}: {difference:.1e}" for run, difference in differences.items()))


if __name__ == "__main__":
    main()
