"""The recipe of two real tasks through the command line: train, evaluate before and after, load again, generate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("MOLORA_DATA", ROOT.parent / "shared" / "data")).resolve()

pytestmark = [
    pytest.mark.recipe,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (DATA / "models").is_dir(), reason=f"no data folder {DATA}; set MOLORA_DATA"),
]


def molora(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "molora_cli", *arguments],
        cwd=ROOT,
        # Threads that wait by spinning make this ten times slower as soon as something else uses the cores.
        env={"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"MOLORA_DATA": str(DATA)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_tasks_are_learned_saved_and_used(tmp_path: Path) -> None:
    out = tmp_path / "two_tasks"
    molora("train", "recipes/two_tasks.yaml", f"training.output_dir={out}")
    results = json.loads((out / "results.json").read_text())
    after, before = results["tasks"], results["before"]["tasks"]
    print({name: (before[name]["value"], entry["value"], entry["interval"]) for name, entry in after.items()})

    # Nothing vanishes: every row read is used or counted.
    for report in results["training"]["data"]:
        assert report["used"] + report["too_long"] + report["no_label"] == report["rows"]
    assert (after["scan"]["n"] + after["scan"]["skipped_too_long"], after["scan"]["metric"]) == (128, "exact_match")
    assert (after["agnews"]["n"] + after["agnews"]["skipped_too_long"], after["agnews"]["metric"]) == (128, "choice")

    # Learned: better than always giving the commonest answer, and better than before, by more than chance.
    for name, entry in after.items():
        assert entry["interval"][0] > max(entry["majority"], before[name]["value"]), (name, entry)

    # A new process that loads the adapter scores the same.
    molora("eval", str(out), "--out", str(tmp_path / "again.json"))
    assert json.loads((tmp_path / "again.json").read_text())["tasks"] == after

    written = molora("generate", str(out), "jump twice and look left:", "--max-new-tokens", "40").strip()
    assert written and set(written) <= set("RLJNWK")
