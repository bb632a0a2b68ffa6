"""Router losses under DDP, FSDP2 and ZeRO-1, 2, 3 on two CPU ranks, each with its own data: against one process with
the same partition into micro-batches. One launch runs every cell, because starting takes longer than a cell."""

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
# Of gradients of A whose rounding is magnified by (B B^T)^-1, measured 1.3e-5.
PRECONDITIONED = 1e-4

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
    stage: int | str,
    trainer: str,
    checkpointing: str,
    accumulation: int,
    from_pretrained: bool = False,
    placement: str = "",
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
def _preset(stage: int | str, checkpointing: str, accumulation: int, preset: str, over: str = "") -> dict[str, Any]:
    return _cell(stage, "trainer", checkpointing, accumulation) | {"preset": preset, "over": over}


CELLS = (
    [
        _preset(0, "non-reentrant", 4, "smora"),
        _preset(0, "none", 2, "mixlora", "ranks"),
        _preset(0, "non-reentrant", 2, "dynmole", "window"),
        _cell(0, "trainer", "none", 4),
        _cell(0, "trainer", "non-reentrant", 1),
        _cell(0, "sft", "non-reentrant", 4),
        _preset("fsdp", "non-reentrant", 4, "smora"),
        _preset("fsdp", "none", 2, "mixlora", "window"),
        _cell("fsdp", "trainer", "none", 4, placement="ffn"),
        _cell("fsdp", "trainer", "non-reentrant", 2, placement="block"),
        _cell("fsdp", "trainer", "none", 2, placement="linear") | {"optimizer": "riemannian-loraplus"},
        _preset(1, "non-reentrant", 4, "smora"),
        _preset(1, "none", 2, "mixlora", "ranks"),
        _cell(1, "trainer", "reentrant", 4),
        _cell(1, "trainer", "none", 2, placement="linear") | {"optimizer": "riemannian-loraplus"},
    ]
    + [
        _cell(stage, "trainer", checkpointing, accumulation)
        for stage in (2, 3)
        for checkpointing in ("none", "non-reentrant", "reentrant")
        for accumulation in (1, 4)
    ]
    + [
        _preset(2, "non-reentrant", 4, "smora"),
        _preset(3, "reentrant", 2, "smora"),
        _preset(2, "reentrant", 2, "mixlora", "window"),
        _preset(3, "non-reentrant", 2, "dynmole", "ranks"),
        _cell(3, "sft", "reentrant", 4),
        _cell(2, "sft", "non-reentrant", 4),
        # Under these arguments from_pretrained partitions the base before it is converted.
        _cell(3, "trainer", "reentrant", 4, True, "linear"),
        _cell(3, "trainer", "non-reentrant", 1, True, "block"),
        _cell(3, "trainer", "none", 1, True, "ffn"),
        _cell(3, "trainer", "non-reentrant", 2, placement="linear") | {"as_on_gpu": True},
        _cell(3, "trainer", "none", 2, placement="ffn") | {"as_on_gpu": True},
        _cell(3, "trainer", "non-reentrant", 2, placement="ffn") | {"as_on_gpu": True},
        _cell(3, "trainer", "non-reentrant", 4, placement="linear") | {"fitted": True},
        _cell(3, "trainer", "none", 4, placement="block") | {"fitted": True},
    ]
    + [
        _cell(2, "trainer", "non-reentrant", 2, placement="block") | {"optimizer": "riemannian-loraplus"},
        _cell(3, "trainer", "reentrant", 2, placement="linear") | {"optimizer": "riemannian-loraplus"},
        _cell(3, "trainer", "none", 1, placement="linear") | {"saved": True},
    ]
)


def _name(cell: dict[str, Any]) -> str:
    engine = cell["stage"] if cell["stage"] == "fsdp" else f"zero{cell['stage']}" if cell["stage"] else "ddp"
    loaded = "-from_pretrained" if cell["from_pretrained"] else ""
    what = "{preset}-{over}".format(**cell).rstrip("-") if "preset" in cell else cell["placement"]
    what += f"-{cell['optimizer']}" if "optimizer" in cell else ""
    what += "-saved" if "saved" in cell else ""
    what += "-as_on_gpu" if "as_on_gpu" in cell else ""
    what += "-fitted" if "fitted" in cell else ""
    return f"{engine}-" + "{trainer}-{checkpointing}-acc{accumulation}-".format(**cell) + what + loaded


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
    assert result["error"] <= (PRECONDITIONED if "optimizer" in result["cell"] else EXACT)
