"""The tables of training on several GPUs and on quantised bases; `tables.py` puts them into the pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speed_tables import rows

RESULTS = Path(__file__).resolve().parent / "results"
_H200 = ("zero2", "zero3_lora", "zero3_leaf_modules", "zero3_mixlora", "zero3_dynmole")  # one machine, cell by cell
SCALE = ("scale_four_gpus", "scale", *(f"scale_h200_{cell}" for cell in _H200))


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _run(run: dict[str, Any]) -> str:
    return f"{run['device'].split()[1]}, {run['commit'][:7]}"


def scale() -> str:
    """Every cell, with the commit of its run."""
    body = []
    for run in map(read, SCALE):
        for row in sorted(run["rows"], key=lambda row: (row["stage"], row["gpus"])):
            step = f"{row['median_ms']:.0f} ({row['p20_ms']:.0f} to {row['p80_ms']:.0f})"
            speed = [f"{row['tokens_per_second_per_gpu']:.0f}", f"{row['mfu']:.1%}"]
            leaf = ", leaf modules" if any(word.startswith("leaf_module=") for word in run["command"]) else ""
            cells = [row["subject"] + leaf, f"ZeRO-{row['stage']}", str(row["gpus"]), str(row["rows"]), step, *speed]
            body.append([*cells, f"{row['peak_bytes'] / 2**30:.1f}", _run(run)])
    head = ["", "engine", "GPUs", "rows a GPU", "step, ms (20 to 80 %)", "tokens/s a GPU", "MFU", "peak GiB", "run"]
    return rows(head, *body)


def scale_bars() -> str:
    body = []
    for run in map(read, SCALE):
        for bar in run["bars"]:
            state = "yes" if bar["holds"] else "**no**"
            lines = str(run["rows"][0]["rows"])
            body.append([bar["name"], lines, f"{bar['value']:.3f}", f"{bar['limit']:.2f}", state, _run(run)])
    return rows(["", "rows a GPU", "measured", "limit", "holds", "run"], *body)


def quantized() -> str:
    found = read("quantized-nvidia-h100-80gb-hbm3")
    peer = found["rows"][0]
    body = []
    for row in found["rows"]:
        step = f"{row['median_ms']:.0f} ({row['p20_ms']:.0f} to {row['p80_ms']:.0f})"
        over = [f"{row['median_ms'] / peer['median_ms']:.3f}", f"{row['total_bytes'] / 2**30:.1f}"]
        total = f"{row['total_bytes'] / peer['total_bytes']:.3f}"
        body.append([row["name"], f"{row['parameters']['trainable'] / 1e6:.0f} M", step, *over, total])
    head = ["", "trained", "step, ms (20 to 80 %)", "over `peft`", "peak GiB", "over `peft`"]
    return rows(head, *body)


def memory_estimate() -> str:
    body = []
    for row in read("memory_estimate-nvidia-h100-80gb-hbm3")["rows"]:
        estimated, measured = row["estimated_bytes"], row["measured_bytes"]
        sizes = [f"{size / 2**20:,.0f}" for size in (estimated, measured)]
        body.append([row["name"], *sizes, f"{estimated / measured - 1:+.1%}"])
    return rows(["mixture, layers x width, lines x tokens", "estimated MiB", "measured MiB", "error"], *body)


TABLES: dict[str, Callable[[], str]] = {
    "scale": scale,
    "scale-bars": scale_bars,
    "quantized": quantized,
    "memory-estimate": memory_estimate,
}
