"""What a mixture of a linear costs by each way of computing it: the model by which a kernel is chosen.

Legend: T tokens, D input features, O output features, E experts, R rank of one expert, K experts of a token.

A pass is one read or one write of a (T, D) or (T, O) tensor. Both ways make four passes over each, forward and backward
together (x for the ranks and for the gradient of A, the gradient of x read and written; y read and written, its
gradient for the ranks and for that of B), and a dispatched token makes them K times:

    dense    max(8 passes / bandwidth, products of E*R ranks / arithmetic)
    grouped  K * 8 passes / bandwidth / efficiency + a fixed time for its launches

The two efficiencies and the fixed time are fitted to `benchmarks/results/crossover-*.json` (an H100).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Rates of a GPU: bandwidth in bytes/s, arithmetic in multiply-adds/s of 16-bit matrix units."""

    name: str
    bandwidth: float
    arithmetic: float


# By compute capability: what a large copy and a large matrix product reach, not the datasheet.
_BY_CAPABILITY = {
    8: Device("Ampere or Ada", 1.4e12, 1.2e14),
    9: Device("Hopper", 2.9e12, 3.6e14),
    10: Device("Blackwell", 6.5e12, 8.0e14),
    12: Device("Blackwell, consumer", 1.5e12, 1.6e14),
}
DENSE_EFFICIENCY = 0.70  # of bandwidth, and of arithmetic once that is the bound
GROUPED_EFFICIENCY = 0.45
GROUPED_SECONDS = 2e-4


def device_rates(device: torch.device) -> Device:
    """The rates of a device; an unknown one is taken for the nearest older generation."""
    if device.type != "cuda":
        return Device(device.type, 5e10, 1e12)
    major = torch.cuda.get_device_capability(device)[0] if torch.version.hip is None else 9
    known = [m for m in _BY_CAPABILITY if m <= major]
    return _BY_CAPABILITY[max(known) if known else 8]


def dense_seconds(rates: Device, T: int, D: int, O: int, E: int, R: int, size: int) -> float:
    """Of the dense-masked kernel, forward and backward, beside the frozen linear; `size` bytes an element."""
    passes = 4 * T * (D + O) * size / rates.bandwidth
    products = 3 * T * E * R * (D + O) / rates.arithmetic
    ranks = 12 * T * E * R * size / rates.bandwidth
    return (max(passes, products) + ranks) / DENSE_EFFICIENCY


def grouped_seconds(rates: Device, T: int, D: int, O: int, R: int, K: int, size: int) -> float:
    """Of the grouped kernel, forward and backward, beside the frozen linear."""
    passes = 4 * K * T * (D + O) * size / rates.bandwidth
    products = 3 * T * K * max(16, R) * (D + O) / rates.arithmetic
    return max(passes, products) / GROUPED_EFFICIENCY + GROUPED_SECONDS
