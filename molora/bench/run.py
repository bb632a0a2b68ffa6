"""Runs tables of `molora bench` and writes what they found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from molora.bench.backends import backends, crossover
from molora.bench.modules import decode, ffn, one_linear
from molora.bench.serving import serve
from molora.bench.subjects import LLAMA_8B, TINY
from molora.bench.tables import MODEL_TABLES, Table
from molora.bench.where_time_goes import where_time_goes
from molora.checks import check_choice
from molora.eval.results import environment, write_json

TABLES: dict[str, Table] = {
    **MODEL_TABLES,
    "one_linear": one_linear,
    "ffn": ffn,
    "decode": decode,
    "serve": serve,
    "backends": backends,
    "crossover": crossover,
    "where_time_goes": where_time_goes,
}


def check_tables(names: Sequence[str], tiny: bool) -> None:
    """Raises ValueError for a table that does not exist, or where there is nothing to measure on."""
    for name in names:
        check_choice("TABLE", name, tuple(TABLES))
    if not tiny and not torch.cuda.is_available():
        raise ValueError("no CUDA device to measure on; --tiny runs the same code on a toy model, for a look at it")


def run_table(name: str, folder: Path, *, tiny: bool = False, repeats: int = 20) -> tuple[Path, dict[str, Any]]:
    """Runs one table.

    Args:
        name: one of TABLES.
        folder: gets ``<name>-<gpu>.json``: command, gpu, versions, commit, rows, bars.
        tiny: a model of toy size, for a look at the code without a GPU.

    Returns:
        The file and its content.

    Raises:
        ValueError: a gradient differs from the reference kernel's.
    """
    result = TABLES[name](TINY if tiny else LLAMA_8B, repeats)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    command = ["molora", "bench", name, *(["--tiny"] if tiny else [])]
    found = {"command": command, "gpu": gpu, **environment(), **result.to_dict()}
    path = folder / f"{name}-{gpu.replace(' ', '-').lower()}.json"
    write_json(path, found)
    return path, found
