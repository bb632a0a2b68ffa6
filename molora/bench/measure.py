"""Times and peak memory of several subjects, taken in turn so that a drifting clock meets them all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20
"""More than the L2 cache of any GPU."""


@dataclass(frozen=True)
class Timing:
    """What one subject took.

    Attributes:
        median_ms, p20_ms, p80_ms: over the repeats, milliseconds.
        peak_bytes: the most that was allocated beyond what was there before the call; 0 on a CPU.
        repeats: how often it was timed.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_bytes: int
    repeats: int


def measure(
    subjects: Mapping[str, Callable[[], Any]], *, warmup: int = 3, repeats: int = 20, flush: bool = False
) -> dict[str, Timing]:
    """Runs each subject `warmup` times, then all of them in turn `repeats` times.

    Args:
        subjects: functions without arguments; what they return is dropped.
        flush: empties the L2 cache before each call, as a step of a whole model would.
    """
    on_gpu = torch.cuda.is_available()
    peaks = dict.fromkeys(subjects, 0)
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    for name, subject in subjects.items():
        for _ in range(warmup):
            subject()
        if on_gpu:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            subject()
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated() - before
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if flush and on_gpu else None
    for _ in range(repeats):
        for name, subject in subjects.items():
            if scratch is not None:
                scratch.zero_()
            samples[name].append(_milliseconds(subject, on_gpu))
    return {name: _timing(samples[name], peaks[name]) for name in subjects}


def _milliseconds(subject: Callable[[], Any], on_gpu: bool) -> float:
    if not on_gpu:
        began = time.perf_counter()
        subject()
        return 1e3 * (time.perf_counter() - began)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    subject()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _timing(samples: list[float], peak: int) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], peak, 1)
    cuts = quantiles(samples, n=10, method="inclusive")
    return Timing(median_ms=cuts[4], p20_ms=cuts[1], p80_ms=cuts[7], peak_bytes=peak, repeats=len(samples))


def captured(subject: Callable[[], Any]) -> Callable[[], Any]:
    """The subject as a CUDA graph, so that the time of its launches does not count; itself without a GPU."""
    if not torch.cuda.is_available():
        return subject
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            subject()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        subject()
    return graph.replay
