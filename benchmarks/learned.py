"""What do several systems learn from one recipe, at equal trainable parameters?

    python benchmarks/learned.py recipes/separable.yaml [--systems lora mixlora ...] [--jobs 4] [key.sub=value ...]

Trains one LoRA of rank 32 on every linear, and each preset with the largest rank at which it has no more trainable
parameters: the same data, order, steps and learning rate. Each again with the training answers of every task permuted
among its rows. A system has learned a task if its 95 % interval lies above the share of the commonest answer and above
the interval of its own run on permuted answers. Runs share the GPUs round robin; what is done is kept under --out, so
that another call of the same recipe does the rest. Prints the table; --keep writes results/<name of the recipe>.json
beside itself, which README and docs quote.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

SYSTEMS = ("lora", "mixlora", "dynmole", "smora")
RANK = 32
PERMUTED = "-permuted"
KEPT = ("commit", "versions", "device", "seed", "parameters", "section", "tasks", "average", "run")


def adapter(system: str, base: str) -> dict[str, Any]:
    """The recipe's section for a system, its rank fitted to the LoRA's parameters."""
    from peft import LoraConfig, get_peft_model

    from molora.eval.models import load_base
    from molora.eval.results import parameters
    from molora.presets import PRESETS
    from molora.train.recipe import mixture_config

    def trainable(config: Any) -> int:
        return parameters(get_peft_model(copy.deepcopy(model), config))["trainable"]

    def mixture(r: int) -> dict[str, Any]:
        if system == "smora":  # its alpha belongs to the active ranks
            return {"preset": system, "r": r}
        section = {"preset": system, "r": r, "lora_alpha": 2 * r}
        if "plain_lora" in PRESETS[system].options:
            section["plain_lora"] = {"target_modules": "all-linear", "r": r, "lora_alpha": 2 * r}
        return section

    lora = {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.05, "target_modules": "all-linear"}
    if system == "lora":
        return {"lora": lora, "mixture": None}
    model = load_base(base)
    budget, r = trainable(LoraConfig(**lora)), 8 if system == "smora" else 1
    while trainable(mixture_config(mixture(r + 1))) <= budget:
        r += 1
    return {"mixture": mixture(r), "lora": None}


def permuted(task: Any, folder: Path) -> Any:
    """The task with the answers of its training rows permuted among them."""
    from molora.eval.rows import load_rows
    from molora.eval.tasks import fill

    rows = load_rows(task).to_list()
    prompts, answers = ([fill(template, row) for row in rows] for template in (task.prompt, task.answer))
    random.Random(0).shuffle(answers)
    path = folder / f"{task.name}.jsonl"
    pairs = zip(prompts, answers, strict=True)
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in pairs), encoding="utf-8")
    plain = {"columns": None, "parse": None, "replace": None, "field": None, "split": "train", "eval": None}
    return replace(task, data=str(path), prompt="{prompt}", answer="{answer}", **plain)


def run(recipe_path: str, overrides: list[str], name: str, out: Path) -> None:
    """Trains one system, scores it on the recipe's own rows, and writes both into ``out/results.json``."""
    from molora.eval.models import load_model
    from molora.eval.results import write_json
    from molora.eval.suite import run_suite
    from molora.train.recipe import read_recipe
    from molora.train.run import train

    recipe = read_recipe(recipe_path, overrides)
    model, training, section = recipe.base.model, {}, {}
    if name != "base":
        out.mkdir(parents=True, exist_ok=True)
        section = adapter(name.removesuffix(PERMUTED), recipe.base.model)
        model = str(out / "run")
        trained = replace(
            recipe,
            **section,
            tasks=[permuted(task, out) for task in recipe.tasks] if name.endswith(PERMUTED) else recipe.tasks,
            training={**recipe.training, "output_dir": model},
            evaluation=replace(recipe.evaluation, before=False, after=False),
        )
        results = train(trained)
        training = {key: results[key] for key in ("training", "seconds", "peak_memory_bytes")}
    scored = run_suite(*load_model(model), recipe.suite, name=name, predictions_path=out / "predictions.jsonl")
    write_json(out / "results.json", scored | {"section": section, "run": training})


def learned(entry: dict[str, Any], control: dict[str, Any]) -> bool:
    return bool(entry["interval"][0] > max(entry["majority"], control["interval"][1]))


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Tasks by systems in percent; a star where a system has learned the task."""
    systems = [name for name in runs if not name.endswith(PERMUTED)]
    lines = ["| | majority | " + " | ".join(systems) + " |", "|---|" + "---|" * (len(systems) + 1)]
    for task, base in runs["base"]["tasks"].items():
        cells = [f"{base['majority']:.1%}"]
        for name in systems:
            entry, control = runs[name]["tasks"][task], runs.get(name + PERMUTED)
            star = "*" if control and learned(entry, control["tasks"][task]) else ""
            cells.append(
                f"{entry['value']:.1%}{star}" + (f" ({control['tasks'][task]['value']:.1%})" if control else "")
            )
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    count = (f"{runs[name]['parameters']['trainable']:,}" for name in systems)
    return "\n".join([*lines, "| trainable parameters | - | " + " | ".join(count) + " |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS))
    parser.add_argument("--out", type=Path, default=Path("runs/learned"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--keep", action="store_true", help="write the file that the docs are made from")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    out = options.out / Path(options.recipe).stem
    if options.one:
        run(options.recipe, options.overrides, options.one, out / options.one)
        return
    settings = json.dumps([Path(options.recipe).read_text(encoding="utf-8"), sorted(options.overrides)])
    out.mkdir(parents=True, exist_ok=True)
    began = out / "settings.json"
    if began.is_file() and began.read_text(encoding="utf-8") != settings:
        sys.exit(f"{out} holds runs of another recipe or of other overrides; choose another --out")
    began.write_text(settings, encoding="utf-8")
    names = ["base", *options.systems, *(system + PERMUTED for system in options.systems)]

    def start(number: int) -> None:
        name, devices = names[number], os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if (out / name / "results.json").is_file():
            return
        command = [
            sys.executable,
            __file__,
            options.recipe,
            *options.overrides,
            "--out",
            str(options.out),
            "--one",
            name,
        ]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]} if devices[0] else {})
        (out / name).mkdir(parents=True, exist_ok=True)
        with (out / name / "log.txt").open("w") as log:
            code = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
        print(f"{name}: {'done' if code == 0 else f'failed, see {log.name}'}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(start, range(len(names))))
    files = {name: out / name / "results.json" for name in names}
    runs = {name: json.loads(path.read_text()) for name, path in files.items() if path.is_file()}
    missing = sorted(files.keys() - runs.keys())
    if missing:
        sys.exit(f"no results of {', '.join(missing)}; call again for the rest")
    for entry in runs.values():
        entry["parameters"] = entry.pop("model")["parameters"]
    kept = {name: {key: entry[key] for key in KEPT} for name, entry in runs.items()}
    if options.keep:
        command = ["benchmarks/learned.py", options.recipe, *options.overrides]
        result = Path(__file__).parent / "results" / f"{Path(options.recipe).stem}.json"
        result.write_text(json.dumps({"command": command, "runs": kept}, indent=1) + "\n", encoding="utf-8")
    print(table(kept))


if __name__ == "__main__":
    main()
