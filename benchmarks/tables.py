"""Writes the tables of README.md and docs/results.md from the files in results/, so that no figure is typed.

    python benchmarks/tables.py

A page names a table by the comment ``<!-- table: NAME -->``; what follows, up to ``<!-- end -->``, is written anew. A
test holds the pages to what this writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from learned import table as learned_table
from speed_tables import TABLES as SPEED_TABLES
from speed_tables import rows
from training_tables import TABLES as TRAINING_TABLES

ROOT = Path(__file__).resolve().parents[1]
_PAGES = ("results", "kernels", "decisions/vllm", "multi-node", "recipes", "serving")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in _PAGES))
SEEDS = (0, 1, 2)
COLUMNS = {"base": "base", "lora": "one LoRA", "mixture": "mixture"}


def read(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def quickstart_seed(results: dict[str, Any]) -> list[list[str]]:
    """The columns of one run: tasks, their average, chains."""
    average = results["average"]
    tasks = [[f"{row[column]:.0%}" for column in COLUMNS] for row in results["tasks"].values()]
    chains = ["-", *(f"{results['composite']['average'][column]:.1%}" for column in ("lora", "mixture"))]
    return [*tasks, [f"**{average[column]:.1%}**" for column in COLUMNS], chains]


def quickstart_names(results: dict[str, Any]) -> list[list[str]]:
    return [[name] for name in (*results["tasks"], "**average**", "skills in a row, average of six chains")]


def over_seeds(runs: list[dict[str, Any]], key: str, column: str) -> str:
    values = [run["average"] if key == "tasks" else run["composite"]["average"] for run in runs]
    return f"{mean(value[column] for value in values):.1%}"


def quickstart_short() -> str:
    runs = [read(f"quickstart_seed{seed}") for seed in SEEDS]
    body = [name + cells for name, cells in zip(quickstart_names(runs[0]), quickstart_seed(runs[0]), strict=True)]
    all_seeds = ["average over seeds 0, 1 and 2", *(over_seeds(runs, "tasks", column) for column in COLUMNS)]
    chains = ["their skills in a row", "-", *(over_seeds(runs, "chains", c) for c in ("lora", "mixture"))]
    return rows(["seed 0", *COLUMNS.values()], *body, all_seeds, chains)


def quickstart() -> str:
    runs = [read(f"quickstart_seed{seed}") for seed in SEEDS]
    head = ["", *(f"seed {seed}: {name}" for seed in SEEDS for name in COLUMNS.values())]
    parts = [quickstart_names(runs[0]), *map(quickstart_seed, runs)]
    body = [[cell for part in line for cell in part] for line in zip(*parts, strict=True)]
    seconds = ["seconds", *(cell for run in runs for cell in (f"{run['seconds']:.0f}", "", ""))]
    sizes = [["-", *(f"{run['parameters'][column]:,}" for column in ("lora", "mixture"))] for run in runs]
    parameters = ["trainable parameters", *(cell for size in sizes for cell in size)]
    return rows(head, *body, parameters, seconds)


def quickstart_means() -> str:
    runs = [read(f"quickstart_seed{seed}") for seed in SEEDS]
    tasks = ["eight skills", *(over_seeds(runs, "tasks", column) for column in COLUMNS)]
    chains = ["skills in a row", "-", *(over_seeds(runs, "chains", c) for c in ("lora", "mixture"))]
    return rows(["mean of three seeds", *COLUMNS.values()], tasks, chains)


def quickstart_variants() -> str:
    body, results = [], read("quickstart_variants")["rows"]
    for name in sorted({row["variant"] for row in results}, key=lambda n: ("twice" in n, "LoRA" not in n, n)):
        own = sorted((row for row in results if row["variant"] == name), key=lambda row: row["seed"])
        averages = [row["average"] for row in own]
        cells = [name, str(own[0]["steps"]), ", ".join(f"{average:.1%}" for average in averages)]
        body.append([*cells, f"{mean(averages):.1%}", f"{mean(row['last_loss'] for row in own):.3f}"])
    return rows(["", "steps", "average of a seed", "mean", "loss of the last steps, mean"], *body)


def imported_experts() -> str:
    """Each system: its score on the rows of each task, alone / behind another task, their means, seconds to make it."""
    systems = read("imported_experts")["systems"]
    tasks = list(systems["oracle choice"]["alone"])
    written = [task for task in tasks if task != "agnews"]  # every system can score these

    def cell(row: dict[str, Any], own: list[str], digits: int = 1) -> str:
        if any(task not in row["alone"] for task in own):
            return "-"
        return " / ".join(f"{mean(row[kind][task]['value'] for task in own):.{digits}%}" for kind in ("alone", "mixed"))

    body = []
    for name, row in systems.items():
        means = [cell(row, tasks), cell(row, written)]
        body.append([name, *(cell(row, [task], 0) for task in tasks), *means, f"{row['prepared']:.1f}"])
    return rows(["alone / behind another task", *tasks, "mean", "mean without agnews", "seconds to make"], *body)


def composite(key: str) -> str:
    """Each system of composite_serving that has it, as "alone / segment" by task, and of all also behind others."""
    systems = {name: row for name, row in read("composite_serving")["systems"].items() if key in row["alone"]}
    tasks = [task for task in next(iter(systems.values()))["alone"][key] if task != "all"]

    def cell(row: dict[str, Any], task: str, *kinds: str) -> str:
        return " / ".join(f"{row[kind][key][task]['value']:.0%}" for kind in kinds)

    body = []
    for name, row in systems.items():
        low, high = row["segments"][key]["all"]["interval"]
        cells = [*(cell(row, task, "alone", "segments") for task in tasks), cell(row, "all", "alone", "segments")]
        cells += [f"{low:.0%} to {high:.0%}", cell(row, "all", "behind")]
        cells += [f"{row['segments']['shuffled']:.0%}"] if key == "predicted" else []
        body.append([name, *cells])
    head = [f"{key}: alone / as a segment", *tasks, "all", "all segments, 95 %", "only those behind others"]
    return rows(head + (["labels shuffled"] if key == "predicted" else []), *body)


def arrow_peer() -> str:
    found = read("arrow_peer")
    by = {(row["kind"], row["experts"]): row for row in found["rows"]}
    body = []
    for count in sorted({row["experts"] for row in found["rows"]}):
        cells = [f"{by[kind, count]['seconds']:.2f}" for kind in ("base", "molora", "peft")]
        peaks = [f"{by[kind, count]['peak_bytes'] / 2**20:.0f}" for kind in ("base", "molora", "peft")]
        made = [f"{by[kind, count]['made']:.1f}" for kind in ("molora", "peft")]
        agreement = next(bar["value"] for bar in found["bars"] if bar["name"] == f"agreement_{count}")
        body.append([str(count), " / ".join(cells), " / ".join(peaks), " / ".join(made), f"{agreement:.0e}"])
    head = ["experts", "forward, s: base / molora / PEFT", "its peak, MiB: base / molora / PEFT"]
    return rows([*head, "made in s: molora / PEFT", "logits differ by"], *body)


def import_cost() -> str:
    found = read("import_cost")
    row, bars = found["rows"][0], {bar["name"]: bar for bar in found["bars"]}
    head = ["adapters onto Llama-3.2-1B's shape, bf16, CPU", "ranks", "seconds", "peak memory over their bytes"]
    cells = [f"{bars[name]['value']:.{digits}f}" for name, digits in (("seconds", 0), ("memory", 2))]
    return rows(head, [f"{row['adapters']}, {row['bytes'] / 1e9:.1f} GB", ", ".join(map(str, row["ranks"])), *cells])


TABLES: dict[str, Callable[[], str]] = {
    "import-cost": import_cost,
    "imported-experts": imported_experts,
    "composite-right": lambda: composite("right"),
    "composite-predicted": lambda: composite("predicted"),
    "arrow-peer": arrow_peer,
    "quickstart-short": quickstart_short,
    "quickstart": quickstart,
    "quickstart-means": quickstart_means,
    "quickstart-variants": quickstart_variants,
    "separable": lambda: learned_table(read("separable")["runs"]),
    "commonsense": lambda: learned_table(read("commonsense")["runs"]),
    **SPEED_TABLES,
    **TRAINING_TABLES,
}


def filled(page: str) -> str:
    """The page with its tables written anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
