"""Why is a mixture of the quickstart's layout behind one LoRA, or not? Routers and lengths of training, compared.

    python benchmarks/quickstart_variants.py [--seeds 10 11 12] [--jobs 8]

Trains the skills of `molora quickstart` with its data, sizes and learning rate, on seeds that the quickstart's own
results do not use. Every mixture has four FFN experts of rank 4 beside plain LoRA, scaled so that gates of equal size
make it the LoRA it is compared with. Jobs share the GPUs round robin; without one they share the cores. Writes
results/quickstart_variants.json beside itself and prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "quickstart_variants.json"
VARIANTS: dict[str, dict[str, Any]] = {
    "one LoRA": {},
    "top-2": {"router": {"name": "top_k", "top_k": 2}, "lora_alpha": 16},
    "top-2, no balance loss": {
        "router": {"name": "top_k", "top_k": 2, "router_aux_loss_coef": 0.0},
        "lora_alpha": 16,
    },
    "dense": {"router": {"name": "top_k", "top_k": 4, "init_std": 1e-3}, "lora_alpha": 32},
    "tsallis": {"router": {"name": "tsallis", "norm_topk_prob": True, "init_std": 1e-3}, "lora_alpha": 32},
    "one LoRA, twice the steps": {"steps": 500},
    "top-2, twice the steps": {"router": {"name": "top_k", "top_k": 2}, "lora_alpha": 16, "steps": 500},
    "tsallis, twice the steps": {
        "router": {"name": "tsallis", "norm_topk_prob": True, "init_std": 1e-3},
        "lora_alpha": 32,
        "steps": 500,
    },
}


def run(name: str, seed: int) -> dict[str, Any]:
    """One training run of a variant, scored on the skills."""
    import torch

    from molora import equal_lora
    from molora.assets import MOLORA_TINY
    from molora.eval.models import load_base
    from molora.train import quickstart
    from molora.train.recipe import mixture_config
    from molora.train.run import train

    torch.set_num_threads(1)
    options = dict(VARIANTS[name])
    steps = options.pop("steps", quickstart.STEPS)
    if options:
        section = {"mixture": {**quickstart.MIXTURE, **options}}
    else:
        rank = equal_lora(load_base(str(MOLORA_TINY)), mixture_config(quickstart.MIXTURE)).r
        section = {"lora": {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}}
    with tempfile.TemporaryDirectory() as folder:
        tasks = quickstart.write_tasks(Path(folder), seed)
        results = train(quickstart._recipe(Path(folder) / "run", tasks, section, seed, steps, before=False))
        curve = json.loads((Path(folder) / "run" / "loss_curve.json").read_text())
    return {
        "variant": name,
        "seed": seed,
        "steps": steps,
        "average": results["average"],
        "tasks": {task: entry["value"] for task, entry in results["tasks"].items()},
        "last_loss": [line["loss"] for line in curve if "loss" in line][-1],
        **{key: results[key] for key in ("commit", "versions", "device")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.one[0], int(options.one[1]))))
        return
    runs = [(name, seed) for name in VARIANTS for seed in options.seeds]
    runs.sort(key=lambda run: -VARIANTS[run[0]].get("steps", 0))  # the longest first

    def start(number: int) -> dict[str, Any]:
        name, seed = runs[number]
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]} if devices[0] else {})
        command = [sys.executable, __file__, "--one", name, str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row

    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(start, range(len(runs))))
    RESULT.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print("| | steps | average, by seed | mean | loss of the last steps, mean |\n|---|---|---|---|---|")
    for name in VARIANTS:
        own = sorted((row for row in rows if row["variant"] == name), key=lambda row: row["seed"])
        averages = [row["average"] for row in own]
        cells = ", ".join(f"{average:.1%}" for average in averages)
        loss = statistics.mean(row["last_loss"] for row in own)
        print(f"| {name} | {own[0]['steps']} | {cells} | {statistics.mean(averages):.1%} | {loss:.3f} |")


if __name__ == "__main__":
    main()
