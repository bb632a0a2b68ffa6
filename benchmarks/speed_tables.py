"""The tables of kernels and speed, written from the files of `molora bench`; `tables.py` puts them into the pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
GPU = "nvidia-h100-80gb-hbm3"
# Bars in the order of the pages: (file, bar, what is compared).
BARS = (
    ("linear_all", "linear_all", "train step, seven linears, 8 x r16 top-2, over PEFT LoRA r32 with bf16 adapters"),
    ("linear_all", "linear_all_default", "the same over PEFT LoRA r32 as PEFT makes it by default"),
    ("linear_all", "linear_all_memory", "its peak activation memory over PEFT's bf16 LoRA"),
    ("ffn", "ffn", "one MLP, FFN experts, forward and backward, over one LoRA r32 on it"),
    ("ffn", "ffn_memory", "its extra peak memory over that LoRA's"),
    ("ffn", "ffn_peer", "the same over the released `mixlora` block"),
    ("smora", "smora", "train step, rank-wise 8 of 64, over PEFT LoRA r64"),
    ("many", "many", "train step, 64 x r16 top-2, over PEFT LoRA r32"),
    ("xlora", "xlora", "train step, 8 x r16, over PEFT X-LoRA's"),
    ("decode", "decode, batch 1", "32 layers, a router per block, CUDA graph, over the bare base"),
    ("decode", "decode, batch 8", "the same, 8 rows"),
    ("decode", "decode_linear, batch 1", "a router per linear"),
    ("decode", "decode_linear, batch 8", "the same, 8 rows"),
    ("one_linear", "one_linear", "one linear 4096 x 4096, forward and backward, CUDA graph, over the frozen linear"),
    ("one_linear", "one_linear, launched eagerly", "the same, launched eagerly"),
)


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}-{GPU}.json").read_text(encoding="utf-8"))
    return found


def rows(*lines: list[str]) -> str:
    """A Markdown table; the first line is its head."""
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def bar(file: str, name: str) -> dict[str, Any]:
    return next(b for b in read(file)["bars"] if b["name"] == name)


def bars() -> str:
    body = []
    for file, name, what in BARS:
        found = bar(file, name)
        state = "yes" if found["holds"] else "**no**"
        body.append([name, what, f"{found['value']:.3f}", f"{found['limit']:.2f}", state])
    return rows(["bar", "what", "measured", "limit", "holds"], *body)


def bars_short() -> str:
    chosen = ("linear_all", "many", "smora", "ffn", "xlora", "decode, batch 1")
    body = [[what, f"{bar(file, name)['value']:.2f}"] for file, name, what in BARS if name in chosen]
    return rows(["time of the mixture over that of its peer, in the same run", "one H100"], *body)


def speeds() -> str:
    body = []
    for file in ("linear_all", "smora", "many", "xlora", "ffn", "one_linear", "decode"):
        for row in read(file)["rows"]:
            spread = f"{row['p20_ms']:.2f} to {row['p80_ms']:.2f}"
            peak = f"{row['peak_bytes'] / 2**30:.2f}" if row["peak_bytes"] else ""
            body.append([file, row["name"], f"{row['median_ms']:.2f}", spread, peak])
    return rows(["table", "what", "median ms", "20 to 80 %", "peak GiB"], *body)


def crossover() -> str:
    times: dict[tuple[int, int], dict[int, dict[str, float]]] = {}
    chosen: dict[tuple[int, int, int], str] = {}
    for row in read("crossover")["rows"]:
        key = row["num_experts"], row["r"]
        times.setdefault(key, {}).setdefault(row["top_k"], {})[row["kernel"]] = row["median_ms"]
        chosen[*key, row["top_k"]] = row["chosen"]
    body = []
    for (experts, r), by_k in times.items():
        cells = []
        for k, ms in by_k.items():
            pair = [f"{ms[kernel]:.2f}" for kernel in ("dense_masked", "grouped")]
            at = ("dense_masked", "grouped").index(chosen[experts, r, k])
            pair[at] = f"**{pair[at]}**"
            cells.append(" / ".join(pair))
        body.append([f"{experts} x r{r}", str(experts * r), *cells])
    return rows(["experts", "ranks in all", *(f"top-{k}" for k in next(iter(times.values())))], *body)


def where_time_goes() -> str:
    found = {row["name"]: row for row in read("where_time_goes")["rows"]}
    kinds = list(dict.fromkeys(kind for row in found.values() for kind in row["by_kind_ms"]))
    body = [
        [kind, *(f"{ms:.2f}" if (ms := row["by_kind_ms"].get(kind)) else "-" for row in found.values())]
        for kind in kinds
        if any(row["by_kind_ms"].get(kind) for row in found.values())
    ]
    step = ["**the step**", *(f"**{row['median_ms']:.2f}**" for row in found.values())]
    return rows(["ms", *found], *body, step)


def backends() -> str:
    body = []
    for row in read("backends")["rows"]:
        body.append([row["name"], f"{row['median_ms']:.2f}", f"{row['error']:.1e}", f"{row['peak_bytes'] / 2**20:.0f}"])
    return rows(["kernel", "median ms", "error", "peak MiB"], *body)


def vllm() -> str:
    cases = json.loads((RESULTS / "vllm_spike.json").read_text(encoding="utf-8"))["rows"]
    base = next(row for row in cases if row["case"] == "native-base")
    body = []
    for row in (row for row in cases if row["graph_ms_b1"]):
        over = [f"{row[f'graph_ms_{b}'] / base[f'graph_ms_{b}']:.2f}" for b in ("b1", "b8")]
        kernels = f"{row['kernels_per_step']:.0f}" if row["kernels_per_step"] else "-"
        body.append([row["case"], f"{row['graph_ms_b1']:.2f}", over[0], f"{row['graph_ms_b8']:.2f}", over[1], kernels])
    head = ["case", "graph, batch 1, ms", "over base", "graph, batch 8, ms", "over base", "kernels a step"]
    return rows(head, *body)


def serve() -> str:
    body = []
    for row in read("serve")["rows"]:
        times = [f"{row[key]:.1f}" for key in ("median_ms", "p99_ms", "first_token_ms")]
        body.append([row["name"], *times, f"{row['tokens_per_second']:,.0f}"])
    return rows(["", "ms between tokens", "99 %", "ms to the first", "tokens/s"], *body)


TABLES: dict[str, Callable[[], str]] = {
    "bars": bars,
    "bars-short": bars_short,
    "speeds": speeds,
    "crossover": crossover,
    "where-time-goes": where_time_goes,
    "backends": backends,
    "vllm": vllm,
    "serve": serve,
}
