"""A table of where the time of a train step goes: device time by what it is spent on, ours beside a LoRA's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from molora.bench.measure import measure
from molora.bench.subjects import Shape, base, batch, lora, mixture, train_step
from molora.bench.tables import TOP_2, Result

SKINNY = 600
"""A product whose smallest dimension is below this is of adapters."""
_BY_NAME = (
    (r"add_product", "expands, added in one pass"),
    (r"^gate_(fwd|bwd)_kernel", "gates times ranks"),
    (r"top_k_|rank_wise_|means_kernel", "gates and statistics"),
    (r"scaled_dot_product|flash", "attention"),
    (r"log_softmax|nll_loss|cross_entropy", "loss"),
)


def where_time_goes(shape: Shape, repeats: int) -> Result:
    """Seven linears of four layers, 8 x r16 top-2, and PEFT's LoRA of rank 32 in bf16: ms of device time by kind.

    Device time from torch's profiler, by the operator that launched it and the shapes it had; `idle` is the measured
    step without it.
    """
    model, inputs = base(shape), batch(shape)
    steps = {
        "molora 8 x r16 top-2": train_step(mixture(model, num_experts=8, r=16, lora_alpha=32, router=TOP_2), inputs),
        "peft lora r32, bf16 adapters": train_step(lora(model, 32, fp32=False), inputs),
    }
    rows = measure(steps, repeats=repeats)
    return Result(rows, {}, details={n: _by_kind(step, rows[n].median_ms) for n, step in steps.items()})


def _by_kind(step: Callable[[], Any], median_ms: float) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"by_kind_ms": {}}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as recorded:
        step()
        torch.cuda.synchronize()
    kinds: dict[str, float] = {}
    launched = 0.0
    for event in recorded.key_averages(group_by_input_shape=True):
        milliseconds = event.self_device_time_total / 1e3
        if milliseconds > 0 and event.device_type == torch.autograd.DeviceType.CPU:
            kind = _kind(event.key, event.input_shapes)
            kinds[kind] = kinds.get(kind, 0) + milliseconds
            launched += milliseconds
    on_device = 0.0
    for event in recorded.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            on_device += event.self_device_time_total / 1e3
            if event.key.endswith("_kernel") and (kind := _kind(event.key, [])) != "other":
                kinds[kind] = kinds.get(kind, 0) + event.self_device_time_total / 1e3
                launched += event.self_device_time_total / 1e3
    kinds["not attributed"] = max(0.0, on_device - launched)
    kinds["idle"] = max(0.0, median_ms - on_device)
    return {"by_kind_ms": {kind: round(ms, 3) for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])}}


def _kind(name: str, shapes: list[Any]) -> str:
    for pattern, kind in _BY_NAME:
        if re.search(pattern, name):
            return kind
    if re.search(r"aten::(mm|addmm|bmm|addmm_)", name):
        sizes = [size for shape in shapes for size in shape if shape]
        return "adapters' products" if sizes and min(sizes) < SKINNY else "frozen products"
    return "element-wise, norms, copies"
