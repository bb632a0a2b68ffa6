"""WatchedTrainer on two CPU ranks under DDP, ZeRO-2 and ZeRO-3: what is not finite on one rank stops both at the same
line of the log, and the log is of both ranks. One launch runs every cell, because starting takes longer than a cell."""

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
sys.path.insert(0, str(Path(__file__).parent))

from gradients import label_tokens, mixture

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

WORKER = Path(__file__).with_name("watched_worker.py")
SPOILED = ((0, "logits"), (0, "gradient"), (2, "gradient"), (3, "logits"), (3, "gradient"))
WHOLE = (0, 2)


def name(cell: dict[str, Any]) -> tuple[int, str | None]:
    return cell["stage"], cell["how"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str | None], list[dict[str, Any]]]:
    """For each cell the result of each rank."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("runs")
    every = (*SPOILED, *((stage, None) for stage in WHOLE))
    cells = [{"stage": stage, "how": how, "folder": str(folder / f"{stage}-{how}")} for stage, how in every]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MOLORA_PEAK_TFLOPS": "1e-6"}  # a share of some size
    done = subprocess.run(
        [*command, json.dumps(cells)], capture_output=True, text=True, env=environment, timeout=550, check=False
    )
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found = {name(both[0]["cell"]): both for both in map(json.loads, lines)}
    missing = [name(cell) for cell in cells if name(cell) not in found]
    assert not missing, f"no result of {missing[0]}:\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
    return found


@pytest.mark.parametrize(("stage", "how"), SPOILED)
def test_all_ranks_stop_together(stage: int, how: str, results: Any) -> None:
    both = results[stage, how]
    assert all("failure" not in result for result in both), both[0].get("failure") or both[1].get("failure")
    sentences = {(result["stopped"], result["step"]) for result in both}
    ((sentence, step),) = sentences
    assert step == 4  # the line of the log behind step 3
    if how == "logits":
        assert "at step 3 the logits gave rows of task 'a' a loss that is not finite" in sentence
    else:
        assert "at step 3 the gradient of model.layers.0.self_attn.o_proj.molora_" in sentence
    assert "checkpoint-2 is the last checkpoint and is from before" in sentence
    assert [path.name for path in Path(both[0]["cell"]["folder"]).glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("stage", WHOLE)
def test_the_log_is_of_all_ranks(stage: int, results: Any) -> None:
    """Against one process: tokens and operations counted by hand, the losses of the first steps by its own forward."""
    import torch
    from watched_worker import batches_with_tasks

    both = results[stage, None]
    assert all("failure" not in result for result in both), both[0].get("failure") or both[1].get("failure")
    assert both[0]["damage"] is None and both[0]["files"] > 5
    first, second = (result["log"] for result in both)
    batches = batches_with_tasks()
    lengths = [int(n) for batch in batches for n in batch["attention_mask"].sum(1)]
    # 4 steps of 2 ranks see each of the 8 micro-batches once. The clock gives the first line one second; the second has
    # one more, in which the save behind the first line was paused and resumed.
    assert first[0]["tokens_per_second"] + 2 * first[1]["tokens_per_second"] == sum(lengths)
    keys = ("loss", "loss/a", "loss/b", "tokens_per_second", "mfu", "router_loss", "peak_memory_gib")
    # The first process rounds what it logs.
    assert all(first[i][key] == pytest.approx(second[i][key], rel=1e-5) for i in range(2) for key in keys)
    assert first[0]["peak_memory_gib"] > 0.05 and first[0]["mfu"] > 0

    model = mixture("linear").train()
    sums, counts = torch.zeros(len(batches), 2), torch.zeros(len(batches), 2)
    with torch.no_grad():
        for number, batch in enumerate(batches):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            for row, labels, task in zip(logits, batch["labels"], batch["task"], strict=True):
                sums[number, task] += torch.nn.functional.cross_entropy(row[:-1], labels[1:], reduction="sum")
                counts[number, task] += int((labels[1:] != -100).sum())
    assert counts.sum() == sum(map(label_tokens, batches))
    logged = torch.tensor([[line["loss/a"], line["loss/b"]] for line in first])
    # Each line is of half of the micro-batches, whichever the sampler drew; nothing moves them, as the rate is 0.
    halves = [list(half) for half in itertools.combinations(range(len(batches)), len(batches) // 2)]
    means = [
        torch.stack([sums[h].sum(0) / counts[h].sum(0) for h in pair])
        for pair in zip(halves, halves[::-1], strict=True)
    ]
    assert min(float((mean - logged).abs().max()) for mean in means) < 1e-5
