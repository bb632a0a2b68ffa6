"""Instruction data, streamed, through the command line: killed after a checkpoint, resumed, the same run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("MOLORA_DATA", ROOT.parent / "shared" / "data")).resolve()
TASKS = {"gsm8k", "codegen", "t0"}
STEPS, SAVE = 12, 5
SHORT = [
    f"training.max_steps={STEPS}",
    f"training.save_steps={SAVE}",
    "training.logging_steps=1",
    "training.per_device_train_batch_size=3",
    "evaluation.before=false",
    *(f"tasks.{name}.eval.{limit}" for name in ("gsm8k", "codegen") for limit in ("limit=4", "max_new_tokens=16")),
]

pytestmark = [
    pytest.mark.recipe,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not (DATA / "tasks").is_dir(), reason=f"no data folder {DATA}; set MOLORA_DATA"),
]


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-m", "molora_cli", "train", "recipes/instruct_local.yaml", *SHORT, *options]
    return subprocess.Popen(
        [*command, f"training.output_dir={out}"],
        cwd=ROOT,
        # Threads that wait by spinning make this ten times slower as soon as something else uses the cores.
        env={"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"MOLORA_DATA": str(DATA)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(run: subprocess.Popen[str]) -> None:
    _, errors = run.communicate()
    assert run.returncode == 0, errors[-3000:]


def log(out: Path) -> list[dict[str, Any]]:
    lines = json.loads((out / "loss_curve.json").read_text())
    return [{key: line[key] for key in line if key == "step" or "loss" in key} for line in lines if "loss" in line]


def test_a_killed_run_on_streamed_instructions_is_the_same_run(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole))
    with start(killed) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if line.startswith(f"step {SAVE + 2}/"):
                os.kill(run.pid, signal.SIGKILL)
                break
    assert run.returncode == -signal.SIGKILL
    saved = max(int(path.name.split("-")[1]) for path in killed.glob("checkpoint-*"))
    assert SAVE <= saved < STEPS and not (killed / "results.json").exists()
    finish(start(killed, "--resume"))

    print([line["loss"] for line in log(whole)])
    assert [line["step"] for line in log(whole)] == list(range(1, STEPS + 1))
    assert log(killed) == log(whole)
    losses = {"step", "loss", "router_loss", *(f"loss/{name}" for name in TASKS)}
    assert {key for line in log(whole) for key in line} == losses

    results, again = (json.loads((out / "results.json").read_text()) for out in (whole, killed))
    assert again["tasks"] == results["tasks"]
    assert {name: entry["metric"] for name, entry in results["tasks"].items()} == {
        "gsm8k": "number",
        "codegen": "rouge_l",
    }
    for entry in results["tasks"].values():
        assert entry["n"] + entry["skipped_too_long"] == 4 and 0 <= entry["interval"][0] <= entry["value"] <= 1
    data = {report["name"]: report for report in results["training"]["data"]}
    assert {name: report["rows"] for name, report in data.items()} == {"gsm8k": 7473, "codegen": 4400, "t0": 55185}
    assert all(report["used"] is None for report in data.values())
