"""The tables of `molora bench`: subjects side by side, and the bars that a mixture is held to.

A bar is a ratio of ours to a peer's in the same run. Conditions: training step on random weights, placement `linear`
unless the table says otherwise, router losses and telemetry on, dropout 0, no checkpointing, no torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from molora.bench.correct import module_error
from molora.bench.measure import Timing, measure
from molora.bench.subjects import Shape, base, batch, lora, mixture, train_step, xlora
from molora.routers import RankWise, TopK

TOP_2 = TopK(top_k=2)


@dataclass(frozen=True)
class Bar:
    """``value`` is at most ``limit``, or the bar does not hold."""

    name: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True)
class Result:
    """A table: one row for each subject, errors of ours against the reference kernel, bars, and what else is known of
    a row or of the table."""

    rows: dict[str, Timing]
    errors: dict[str, float]
    bars: list[Bar] = field(default_factory=list)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {"name": name, **asdict(timing), "error": self.errors.get(name), **self.details.get(name, {})}
            for name, timing in self.rows.items()
        ]
        return {"rows": rows, "bars": [asdict(bar) | {"holds": bar.holds} for bar in self.bars], **self.notes}


Table = Callable[[Shape, int], Result]
"""Measures a shape, so many repeats."""


def memory_bar(name: str, mine: Timing, peer: Timing, limit: float) -> list[Bar]:
    """The bar of two peaks, or none where they were not measured."""
    return [Bar(name, mine.peak_bytes / peer.peak_bytes, limit)] if peer.peak_bytes else []


def compared(
    shape: Shape, ours: Mapping[str, dict[str, Any]], peers: Mapping[str, Callable[[Any], nn.Module]], repeats: int
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Train steps of mixtures and of peers on copies of one base."""
    model, inputs = base(shape), batch(shape)
    subjects, errors = {}, {}
    for name, options in ours.items():
        adapted = mixture(model, **options)
        errors[name] = module_error(adapted, name, min(256, shape.length))
        subjects[name] = train_step(adapted, inputs)
    for name, make in peers.items():
        subjects[name] = train_step(make(model), inputs)
    return measure(subjects, repeats=repeats), errors


def linear_all(shape: Shape, repeats: int) -> Result:
    """Seven linears of four layers, 8 x r16 top-2, against PEFT's LoRA of rank 32."""
    ours = {"molora 8 x r16 top-2": {"num_experts": 8, "r": 16, "lora_alpha": 32, "router": TOP_2}}
    peers = {
        "peft lora r32, bf16 adapters": lambda model: lora(model, 32, fp32=False),
        "peft lora r32, default": lambda model: lora(model, 32, fp32=True),
    }
    rows, errors = compared(shape, ours, peers, repeats)
    mine, bf16, default = rows.values()
    bars = [
        Bar("linear_all", mine.median_ms / bf16.median_ms, 1.0),
        Bar("linear_all_default", mine.median_ms / default.median_ms, 0.75),
        *memory_bar("linear_all_memory", mine, bf16, 1.02),
    ]
    return Result(rows, errors, bars)


def against(bar: str, limit: float, ours: dict[str, Any], peer: str, make: Callable[[Any], nn.Module]) -> Table:
    """A table of one mixture, one peer and one bar on their times."""

    def table(shape: Shape, repeats: int) -> Result:
        rows, errors = compared(shape, {f"molora {bar}": ours}, {peer: make}, repeats)
        mine, theirs = rows.values()
        return Result(rows, errors, [Bar(bar, mine.median_ms / theirs.median_ms, limit)])

    return table


MODEL_TABLES: dict[str, Table] = {
    "linear_all": linear_all,
    "smora": against(  # 8 of 64 ranks
        "smora",
        1.0,
        {"num_experts": 1, "r": 64, "lora_alpha": 16, "router": RankWise()},
        "peft lora r64, bf16 adapters",
        lambda model: lora(model, 64, fp32=False),
    ),
    "many": against(
        "many",
        1.3,
        {"num_experts": 64, "r": 16, "lora_alpha": 32, "router": TOP_2},
        "peft lora r32, bf16 adapters",
        lambda model: lora(model, 32, fp32=False),
    ),
    "xlora": against(
        "xlora",
        0.15,
        {"num_experts": 8, "r": 16, "lora_alpha": 32, "router": TOP_2},
        "peft x-lora 8 x r16",
        lambda model: xlora(model, 8, 16),
    ),
}
