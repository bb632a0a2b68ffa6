"""Router losses under DDP, ZeRO-2 and ZeRO-3 on two CPU ranks, each with its own data: against one process with the
same partition into micro-batches. One launch runs every cell, because starting takes longer than a cell."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gradients import tiny_llama

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

WORKER = Path(__file__).with_name("zero_worker.py")
EXACT = 1e-5

_TURNS = itertools.cycle(
    [
        ("linear", True, False, "left"),
        ("block", False, False, "right"),
        ("ffn", True, False, "left"),
        ("block", True, True, "right"),
        ("ffn", False, False, "right"),
    ]
)


def _cell(
    stage: int, trainer: str, checkpointing: str, accumulation: int, from_pretrained: bool = False, placement: str = ""
) -> dict[str, Any]:
    turn, pool, zero_B, padding = next(_TURNS)
    return {
        "stage": stage,
        "trainer": trainer,
        "checkpointing": checkpointing,
        "accumulation": accumulation,
        "placement": placement or turn,
        "pool": pool,
        "zero_B": zero_B,
        "padding": padding,
        "from_pretrained": from_pretrained,
    }


# DDP first: once DeepSpeed is configured in a process, accelerate keeps using it. DDP itself refuses reentrant
# checkpointing here, because PEFT models run with find_unused_parameters.
CELLS = (
    [
        _cell(0, "trainer", "none", 4),
        _cell(0, "trainer", "non-reentrant", 1),
        _cell(0, "sft", "non-reentrant", 4),
    ]
    + [
        _cell(stage, "trainer", checkpointing, accumulation)
        for stage in (2, 3)
        for checkpointing in ("none", "non-reentrant", "reentrant")
        for accumulation in (1, 4)
    ]
    + [
        _cell(3, "sft", "reentrant", 4),
        _cell(2, "sft", "non-reentrant", 4),
        # Under these arguments from_pretrained partitions the base before it is converted.
        _cell(3, "trainer", "reentrant", 4, True, "linear"),
        _cell(3, "trainer", "non-reentrant", 1, True, "block"),
        _cell(3, "trainer", "none", 1, True, "ffn"),
    ]
)


def _name(cell: dict[str, Any]) -> str:
    engine = f"zero{cell['stage']}" if cell["stage"] else "ddp"
    loaded = "-from_pretrained" if cell["from_pretrained"] else ""
    return f"{engine}-" + "{trainer}-{checkpointing}-acc{accumulation}-{placement}".format(**cell) + loaded


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    pytest.importorskip("deepspeed")
    pytest.importorskip("trl")
    base = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(base)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, json.dumps(CELLS), str(base)], capture_output=True, text=True, env=environment, timeout=850
    )
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found = {_name(result["cell"]): result for result in map(json.loads, lines)}
    missing = [_name(cell) for cell in CELLS if _name(cell) not in found]
    assert not missing, f"no result of {missing[0]}:\n{done.stderr[-6000:]}"
    return found


@pytest.mark.parametrize("name", [_name(cell) for cell in CELLS])
def test_gradients_equal_one_process(name: str, results: dict[str, dict[str, Any]]) -> None:
    result = results[name]
    assert "failure" not in result, result["failure"]
    print(f"{name}: {result['error']:.1e} in {result['seconds']} s")
    assert result["error"] <= EXACT
