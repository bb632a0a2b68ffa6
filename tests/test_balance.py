"""From a collapsed start the balance loss spreads the load, and without it nothing does: benchmarks/balance.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "balance.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    if not BENCHMARK.exists():
        pytest.skip("benchmarks/ is not part of this installation")
    spec = importlib.util.spec_from_file_location("balance", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(result: dict[str, Any]) -> None:
    """Collapsed at the start; spread after 200 steps and staying so with the loss; collapsed throughout without it."""
    bar = 2 / result["settings"]["num_experts"]
    with_loss, without = result["curves"]["largest_load_with_loss"], result["curves"]["largest_load_without"]
    assert len(with_loss) == len(without) == 201
    assert with_loss[0] > 0.9 and without[0] > 0.9
    assert with_loss[200] < bar and sum(with_loss[-20:]) / 20 < bar
    assert result["first_step_below_bar"] <= 200
    assert min(without) > 0.9


def test_the_loss_balances_a_collapsed_router(benchmark: ModuleType) -> None:
    check(benchmark.run())


def test_stored_curves(benchmark: ModuleType) -> None:
    result = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    assert result["schema"] == "molora.results/1"
    assert result["command"] == "python benchmarks/balance.py"
    check(result)
