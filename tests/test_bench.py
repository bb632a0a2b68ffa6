"""`molora bench`: every table on toy sizes, what a red kernel gets, and the figures that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_cli import molora

from molora.bench import measure, run
from molora.bench.tables import Bar
from molora.kernels import dense_masked


@pytest.mark.slow
def test_every_table_runs_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert molora("bench", "--tiny", "--repeats", "1", "--out", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    for name in run.TABLES:
        (path,) = tmp_path.glob(f"{name}-*.json")
        found = json.loads(path.read_text())
        assert {"command", "gpu", "versions", "commit", "rows", "bars"} <= found.keys()
        assert found["rows"] and all(row["median_ms"] > 0 for row in found["rows"])
        assert all(bar["holds"] == (bar["value"] <= bar["limit"]) for bar in found["bars"])
        errors = [row["error"] for row in found["rows"] if row["error"] is not None]
        assert errors or name in ("decode", "serve", "where_time_goes")
        assert all(bar["name"] in shown for bar in found["bars"])
    assert "tokens/s" in shown and "ms a token" in shown


def test_a_wrong_kernel_is_not_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = dense_masked.mixture_linear
    monkeypatch.setattr(dense_masked, "mixture_linear", lambda *args, **kwargs: right(*args, **kwargs) * 1.05)
    assert molora("bench", "linear_all", "--tiny", "--repeats", "1", "--out", str(tmp_path)) == 2
    assert "differs from the reference kernel's by" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["linear_al", "--tiny"], "linear_all"),
        (["linear_all"], "no CUDA device to measure on; --tiny runs the same code on a toy model"),
    ],
)
def test_what_cannot_be_measured_is_said(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert molora("bench", *arguments) == 2
    assert said in capsys.readouterr().err


def test_subjects_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    order: list[str] = []
    timings = measure.measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, warmup=1, repeats=3)
    assert "".join(order) == "ab" + "ab" * 3
    assert all(t.repeats == 3 and t.p20_ms <= t.median_ms <= t.p80_ms for t in timings.values())
    assert measure._timing([5.0, 1.0, 2.0, 3.0, 4.0], 7) == measure.Timing(3.0, 1.8, 4.2, 7, 5)
    assert Bar("x", 1.0, 1.0).holds and not Bar("x", 1.01, 1.0).holds and not Bar("x", float("nan"), 1.0).holds
