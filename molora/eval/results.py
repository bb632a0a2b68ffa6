"""The results file ``molora.results/1``: what was run, on what, with which outcome."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from molora.assets import MOLORA_TINY
from molora.quantization import num_weights

SCHEMA = "molora.results/1"
PACKAGES = ("molora", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "triton")


def wilson(correct: int, n: int) -> list[float]:
    """The 95 % Wilson score interval of a proportion, in [0, 1]; ``[0, 1]`` without data.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if n == 0:
        return [0.0, 1.0]
    z, p = 1.959963984540054, correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # The ends are exact where rounding is not.
    return [0.0 if correct == 0 else centre - half, 1.0 if correct == n else centre + half]


def header(model: torch.nn.Module, name: str, seed: int) -> dict[str, Any]:
    """What every results file begins with: schema, command, environment, seed, model."""
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    base = MOLORA_TINY.name if base == str(MOLORA_TINY) else base  # not where it is installed
    described = {"name": name, "base": base, "parameters": parameters(model)}
    return {"schema": SCHEMA, "command": sys.argv, **environment(), "seed": seed, "model": described}


def environment() -> dict[str, Any]:
    """Commit of this code (``None`` outside a checkout, ``-dirty`` with local changes), package versions, machine."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": _commit(),
        "versions": versions,
        "device": accelerator or f"{platform.machine()} cpu, {torch.get_num_threads()} threads",
    }


def _commit() -> str | None:
    if named := os.environ.get("MOLORA_COMMIT"):
        return named  # a copy without its history, on a machine that measures

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A molora that lies inside site-packages of somebody's checkout is not at that checkout's commit.
    if not git("ls-files", "--", Path(__file__).name):
        return None
    return f"{git('rev-parse', 'HEAD')}{'-dirty' if git('status', '--porcelain', '-uno') else ''}"


def peak_memory_bytes() -> int:
    """Peak of the accelerator's allocated memory, or of this process's resident memory on a CPU; bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def parameters(model: torch.nn.Module) -> dict[str, int]:
    """Counts ``trainable`` parameters (those of the adapter, but for frozen experts), those of the ``base``, and the
    ``total``."""
    total = sum(num_weights(p) for p in model.parameters())
    own = {n: p for n, p in model.named_parameters() if p.requires_grad or "molora_" in n or "lora_" in n}
    own = own if hasattr(model, "peft_config") else {}
    frozen = {
        f"{name}.{container}.{adapter}."
        for name, module in model.named_modules()
        for adapter, containers in getattr(module, "frozen_peft_weight_names", {}).items()
        for container in containers
    }
    trainable = sum(num_weights(p) for n, p in own.items() if n.rpartition(".")[0] + "." not in frozen)
    return {"trainable": trainable, "base": total - sum(num_weights(p) for p in own.values()), "total": total}


def write_json(path: str | Path, data: Any) -> None:
    """Writes JSON as :func:`write_text` does."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes through a temporary file, so that neither a reader nor the disk after a power loss has half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
