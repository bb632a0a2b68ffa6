"""Presets through the command line: listing, converting, training with the tasks as labels or as experts, resuming."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_cli import ROOT, molora
from tiny_lm import save_tiny, write_jsonl

from molora import MoloraConfig
from molora.eval.preset_page import markdown
from molora.presets import PRESETS

WORDS = ("and", "plus", "minus")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base"))


def write_recipe(folder: Path, base: str, mixture: dict[str, Any], **labels: int) -> str:
    """Three tasks that differ by a word."""
    tasks = []
    for i, word in enumerate(WORDS):
        rows = [{"q": f"{n} {word} {n}", "a": str(n + i)} for n in range(20)]
        data = write_jsonl(folder / f"{word}.jsonl", rows)
        task = {"name": word, "data": data, "prompt": "{q}:", "answer": " {a}", "eval": {"limit": 4}}
        tasks.append(task | ({"task_label": labels[word]} if word in labels else {}))
    recipe = {
        "schema": "molora.recipe/1",
        "base": {"model": base},
        "mixture": mixture,
        "tasks": tasks,
        "training": {
            "output_dir": str(folder / "out"),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 2,
        },
        "evaluation": {"before": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return str(path)


SMALL: dict[str, dict[str, Any]] = {
    "smora": {"r": 8, "router": {"active_ranks": 2, "bias_update_rate": 1e-2}},
    "meteora": {"num_experts": 3, "r": 2},
    "loramoe": {"num_experts": 4, "r": 2, "router": {"localized_balance_coef": 0.1, "localized_balance_delta": 0.2}},
    "lora-tle": {"num_experts": 3, "r": 2, "target_modules": "all-linear"},
    "dynmole": {"num_experts": 4, "r": 2},
}
LABELS = {"loramoe": {"and": 1, "plus": 0, "minus": 0}}


@pytest.mark.parametrize("name", SMALL)
def test_a_preset_trains_and_resumes_exactly(name: str, base: str, tmp_path: Path) -> None:
    """Weights, biases and centroids of a resumed run are those of the run that was never interrupted."""
    recipe = write_recipe(tmp_path, base, {"preset": name, **SMALL[name]}, **LABELS.get(name, {}))
    out = tmp_path / "out"
    assert molora("train", recipe) == 0
    whole = load_file(out / "adapter_model.safetensors")
    log = [line for line in json.loads((out / "loss_curve.json").read_text()) if "loss" in line]
    assert len(log) == 4 and any(key.startswith("routing/") for key in log[0]) and "largest_load" in log[0]
    assert yaml.safe_load((out / "recipe.yaml").read_text())["mixture"]["preset"] == name
    if name == "smora":
        steps = [value for key, value in whole.items() if key.endswith("bias_steps")]
        assert steps and max(int(value.abs().max()) for value in steps) >= 2
    if name == "lora-tle":
        assert json.loads((out / "adapter_config.json").read_text())["expert_names"] == list(WORDS)
    for left in ("results.json", "adapter_model.safetensors", "loss_curve.json"):
        (out / left).unlink()
    shutil.rmtree(out / "checkpoint-4")
    assert molora("train", recipe, "--resume") == 0
    resumed = load_file(out / "adapter_model.safetensors")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


@pytest.mark.parametrize(
    ("mixture", "labels", "message"),
    [
        (
            {"preset": "meteora", "num_experts": 2, "r": 2},
            {},
            "task 'minus' has task label 2, but the router's loss tel",
        ),
        (
            {"preset": "lora-tle", "num_experts": 2, "r": 2, "target_modules": "all-linear"},
            {},
            "num_experts=2 does not fit a centroid router",
        ),
        ({"preset": "loramoe", **SMALL["loramoe"]}, {}, "tells 2 tasks apart (0 to 1); set its task_label"),
        ({"preset": "smora", "r": 4}, {}, "active_ranks=8 exceeds r=4; lower router.active_ranks or raise r"),
        ({"preset": "mola", "num_experts": [2, 2, 2]}, {}, "has 3 numbers; give one for each of the"),
        ({"preset": "mixlora", "router": {"name": "top_p", "top_p": 0}}, {}, "top_p=0 must be a finite number above 0"),
        ({"preset": "meteora", "num_experts": 3}, {"and": -1}, "task_label=-1 must be at least 0"),
    ],
    ids=lambda value: value.get("preset", "") if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_said_before_training(
    mixture: dict[str, Any],
    labels: dict[str, int],
    message: str,
    base: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert molora("train", write_recipe(tmp_path, base, mixture, **labels), "--dry-run") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_presets_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert molora("presets") == 0
    listed = capsys.readouterr().out
    for name, preset in PRESETS.items():
        assert name in listed and preset.arxiv in listed
        assert molora("presets", name) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"{name} - ") and preset.arxiv in shown and "router:" in shown
        assert all(key in shown for key in preset.notes)


def test_the_page_is_made_of_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "presets.md"
    if not page.exists():
        pytest.skip("docs/ is not part of this installation")
    assert page.read_text(encoding="utf-8") == markdown(), "run: molora presets --markdown > docs/presets.md"
    assert molora("presets", "--markdown") == 0
    assert capsys.readouterr().out == markdown()


def test_notes_name_options_that_exist() -> None:
    for name, preset in PRESETS.items():
        config = MoloraConfig.from_preset(name)
        for key in preset.notes:
            owner = config.router if key.startswith("router.") else config
            assert hasattr(owner, key.removeprefix("router.")), (name, key)


def test_convert_takes_a_preset(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "adapter"
    assert molora("convert", base, str(out), "--preset", "dynmole", "r=2", "router.entropy_threshold=0.8") == 0
    assert "placement" in capsys.readouterr().out
    saved = json.loads((out / "adapter_config.json").read_text())
    assert (saved["num_experts"], saved["r"], saved["target_modules"]) == (6, 2, "ffn-linear")
    assert saved["router"]["entropy_threshold"] == 0.8 and saved["router"]["top_p"] == 0.75


BENCHMARK = ROOT / "benchmarks" / "specialisation.py"


@pytest.mark.skipif(not BENCHMARK.exists(), reason="benchmarks/ is not part of this installation")
def test_routers_learn_planted_tasks() -> None:
    """Stored: every preset that claims it. Run here, briefly: supervised gates and centroids."""
    spec = importlib.util.spec_from_file_location("specialisation", BENCHMARK)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    stored = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    assert stored["schema"] == "molora.results/1" and stored["presets"].keys() == benchmark.SUBJECTS
    assert {bar["name"] for bar in stored["bars"]} == benchmark.SUBJECTS - benchmark.NO_CLAIM.keys()
    assert all(bar["holds"] and bar["value"] >= bar["limit"] == 0.9 for bar in stored["bars"])
    meteora = benchmark.run("meteora", steps=40, seed=1)
    assert meteora["before"]["mean"] < 0.8 and meteora["after"]["highest"] >= 0.9
    centroids = benchmark.run("lora-tle", steps=1, seed=1)
    assert centroids["before"]["highest"] >= 0.9
