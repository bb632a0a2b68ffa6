"""What a mixture of a linear costs by each way of computing it: the model by which a kernel is chosen.

Legend: T tokens, D input features, O output features, E experts, R rank of one expert, K experts of a token.

A pass is one read or one write of a (T, D) or (T, O) tensor. Both ways make four passes over each, forward and backward
together (x for the ranks and for the gradient of A, the gradient of x read and written; y read and written, its
gradient for the ranks and for that of B), and a dispatched token makes them K times:

    dense    max(passes / its share of bandwidth, products of E*R ranks / arithmetic + what does not overlap with them)
    grouped  K * passes, more for ranks that fill no tile and for blocks of tokens that experts leave half empty

The numbers are fitted to `benchmarks/results/crossover-*.json` (an H100), where the choice is within a quarter of the
better one everywhere.
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
GROUPED_SECONDS = 4.5e-5  # to put tokens in order
BLOCK = 64  # tokens of a block of the grouped kernel


def device_rates(device: torch.device) -> Device:
    """The rates of a device; an unknown one is taken for the nearest older generation."""
    if device.type != "cuda":
        return Device(device.type, 5e10, 1e12)
    major = torch.cuda.get_device_capability(device)[0] if torch.version.hip is None else 9
    known = [m for m in _BY_CAPABILITY if m <= major]
    return _BY_CAPABILITY[max(known) if known else 8]


def _passes(rates: Device, T: int, D: int, O: int, size: int) -> float:
    return 4 * T * (D + O) * size / rates.bandwidth


def dense_seconds(rates: Device, T: int, D: int, O: int, E: int, R: int, size: int) -> float:
    """Of the dense-masked kernel, forward and backward, beside the frozen linear; `size` bytes an element."""
    passes, products = _passes(rates, T, D, O, size), 3 * T * E * R * (D + O) / rates.arithmetic
    return max(1.6 * passes, products + 0.8 * passes)


def grouped_seconds(rates: Device, T: int, D: int, O: int, E: int, R: int, K: int, size: int) -> float:
    """Of the grouped kernel, forward and backward, beside the frozen linear."""
    rank = 1.4 if R < 16 else 1 + 0.6 * (R - 16) / 48
    padding = 0.26 * E * BLOCK / T * max(1.0, R / 32)
    return K * _passes(rates, T, D, O, size) * (1.03 * rank + padding) + GROUPED_SECONDS
