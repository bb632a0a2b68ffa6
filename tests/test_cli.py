"""The command line: instant help, one clear sentence for what a user can mend, and a whole small run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_lm import save_tiny, write_jsonl

import molora_cli

ROOT = Path(molora_cli.__file__).parents[1]
COMMANDS = ("convert", "train", "eval", "generate")


def molora(*arguments: str) -> int:
    """Runs the command line in this process; returns the exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["molora", *arguments])
        patch.setenv("TERMINAL_WIDTH", "200")
        molora_cli.main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base"))


def write_recipe(folder: Path, base: str, **training: Any) -> str:
    rows = [{"q": f"{i} and {i}", "a": str(2 * i), "y": i % 2} for i in range(40)]
    data = write_jsonl(folder / "rows.jsonl", rows)
    recipe = {
        "schema": "molora.recipe/1",
        "base": {"model": base},
        "mixture": {
            "num_experts": 2,
            "r": 2,
            "lora_alpha": 4,
            "lora_dropout": 0.1,
            "router": {"name": "top_k", "top_k": 1, "router_jitter_noise": 0.1},
        },
        "tasks": [
            {"name": "sums", "data": data, "prompt": "{q}:", "answer": " {a}", "eval": {"limit": 6}},
            {
                "name": "odd",
                "data": data,
                "prompt": "odd {q}:",
                "answer": "{y}",
                "choices": {"0": " no", "1": " yes"},
                "eval": {"limit": 6},
            },
        ],
        "mixing": {"strategy": "weights"},
        "training": {
            "output_dir": str(folder / "out"),
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 2,
            "save_total_limit": 2,
        }
        | training,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return str(folder / "recipe.yaml")


def losses(out: Path) -> list[tuple[int, float, float]]:
    log = json.loads((out / "loss_curve.json").read_text())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in log if "loss" in line]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, molora_cli\n"
        "sys.argv = ['molora', '--help']\n"
        "try: molora_cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'molora'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_two_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert molora(command, "--help") == 0
    text = capsys.readouterr().out
    assert len(re.findall(rf"^ *molora {command} ", text[text.index("Examples") :], flags=re.MULTILINE)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nothing.yaml"], "no file 'nothing.yaml'"),
        (["eval", "nothing"], "'nothing' is no directory with a recipe.yaml that names its tasks; pass --suite FILE"),
        (["eval", "docs"], "holds no recipe.yaml that names its tasks; pass --suite FILE"),
        (["generate", "./nothing", "x"], "no such directory './nothing'"),
        (["generate", "nothing", "x"], "no such directory 'nothing', and it cannot be loaded from the hub either"),
        (["generate", "docs", "x"], "directory 'docs' has no config.json and no adapter_config.json"),
        (["generate", "README.md", "x"], "'README.md' is a file; give the directory of a model"),
        (["convert", "./nothing", "out", "num_expert=2"], "did you mean 'num_experts'"),
        (["convert", "./nothing", "out", "--preset", "mixlra"], "did you mean 'mixlora'"),
        (["convert", "./nothing", "out", "--preset", "mixlora", "router.topk=1"], "did you mean 'top_k'"),
        (["presets", "dynmol"], "did you mean 'dynmole'"),
        (["convert", "./nothing", "."], "is not empty; pass --overwrite"),
        (["convert", "./nothing", "README.md", "--overwrite"], "README.md is a file; choose a directory"),
        (["convert", "./nothing", "README.md/a/b"], "is below README.md, which is a file; choose a directory"),
        (["eval", "x", "--suite", "recipes/two_tasks.yaml", "--out", "docs"], "--out docs is a directory; give a file"),
        (["convert", "./nothing", "out", "router=null"], "router=None must be"),
        (["convert", "./nothing", "out", "target_modules=5"], "target_modules=5 must be"),
        (["convert", "./nothing", "out", "plain_lora=5"], "plain_lora=5 must be"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert molora(*arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(FileNotFoundError, match="nothing.yaml"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["molora", "--debug", "train", "nothing.yaml"])
        molora_cli.main()


def test_our_own_bugs_keep_their_traceback() -> None:
    def broken() -> None:
        raise ValueError("a bug of another library")

    try:
        broken()
    except ValueError as error:
        assert not molora_cli._is_for_user(error)


def test_a_warning_of_peft_that_nobody_can_mend_is_silent() -> None:
    from molora.eval import terminal

    with warnings.catch_warnings(record=True) as caught:
        terminal.quiet()
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
        warnings.warn("another", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["another"]


def test_convert_then_generate(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "adapter"
    assert molora("convert", base, str(out), "num_experts=3", "r=2", "router.top_k=1") == 0
    shown = capsys.readouterr().out
    assert "num_experts" in shown and "sites" in shown
    assert json.loads((out / "adapter_config.json").read_text())["num_experts"] == 3
    assert molora("generate", str(out), "one and", "--max-new-tokens", "5") == 0
    mixed = capsys.readouterr().out
    assert molora("generate", base, "one and", "--max-new-tokens", "5") == 0
    assert mixed == capsys.readouterr().out


def test_train_eval_and_resume_refusals(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = write_recipe(tmp_path, base), tmp_path / "out"
    assert molora("train", recipe, "--dry-run") == 0
    assert not out.exists()
    assert "sums" in capsys.readouterr().out

    assert molora("train", recipe, "tasks.sums.data=nothing.jsonl") == 2
    assert not out.exists()
    assert molora("train", recipe) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["schema"] == "molora.results/1"
    assert results["tasks"].keys() == results["before"]["tasks"].keys() == {"sums", "odd"}
    assert results["training"]["steps"] == 8 == len(losses(out))
    assert [report["used"] for report in results["training"]["data"]] == [40, 40]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert not (out / ".partial").exists()
    assert yaml.safe_load((out / "recipe.yaml").read_text())["training"]["max_steps"] == 8
    log = json.loads((out / "loss_curve.json").read_text())
    assert 0.5 <= log[0]["largest_load"] <= 1.0
    assert all({"loss/sums", "loss/odd"} & line.keys() for line in log if "loss" in line)
    shared = [line for line in log if {"loss/sums", "loss/odd"} <= line.keys()]
    assert all(min(line["loss/sums"], line["loss/odd"]) - 1e-3 <= line["loss"] for line in shared)
    assert all(line["loss"] <= max(line["loss/sums"], line["loss/odd"]) + 1e-3 for line in shared)

    # The saved adapter, loaded again, scores as the model did in the trainer.
    assert molora("eval", str(out), "--out", str(tmp_path / "again.json")) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["tasks"] == results["tasks"]
    trained, scored = out / "predictions_after.jsonl", tmp_path / "again.jsonl"
    pairs = zip(trained.read_text().splitlines(), scored.read_text().splitlines(), strict=True)
    assert all(json.loads(a)["prediction"] == json.loads(b)["prediction"] for a, b in pairs)

    capsys.readouterr()
    assert molora("train", recipe) == 2
    assert "already holds a run; pass --resume" in capsys.readouterr().err
    assert molora("train", recipe, "--resume", "training.learning_rate=0.5") == 2
    assert "the recipe changed (training.learning_rate: 0.01 -> 0.5)" in capsys.readouterr().err


KILLED_RUN = """
import os, signal, sys
from transformers import Trainer, TrainerCallback
from molora.train.recipe import read_recipe
from molora.train.run import train

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

class KillAtStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if sys.argv[2] == "step" and state.global_step == 9:
            kill()

def save_half(self, output_dir, _original=Trainer._save_optimizer_and_scheduler):
    if sys.argv[2] == "save" and self.state.global_step == 10:
        kill()
    _original(self, output_dir)

Trainer._save_optimizer_and_scheduler = save_half
train(read_recipe(sys.argv[1]), callbacks=[KillAtStep()])
"""


@pytest.mark.parametrize(
    ("when", "order"),
    [("step", "group_by_length"), ("save", "random")],
    ids=["at a step, rows grouped by length", "during a save, rows in random order"],
)
def test_a_killed_run_resumes_bit_for_bit(when: str, order: str, base: str, tmp_path: Path) -> None:
    """Killed in the second epoch; dropout and router jitter are on."""

    def recipe(name: str) -> str:
        (tmp_path / name).mkdir()
        path = Path(write_recipe(tmp_path / name, base, max_steps=14, train_sampling_strategy=order))
        data = yaml.safe_load(path.read_text())
        for task in data["tasks"]:
            task["limit"] = 8
        path.write_text(yaml.safe_dump(data | {"evaluation": {"before": False, "after": False}}))
        return str(path)

    assert molora("train", recipe("whole")) == 0
    log = json.loads((tmp_path / "whole" / "out" / "loss_curve.json").read_text())
    assert next(line["epoch"] for line in log if line["step"] == 8) > 1

    killed, out = recipe("killed"), tmp_path / "killed" / "out"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED_RUN, killed, when]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert (out / ".partial").exists() == (when == "save")
    assert max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*")) == 8

    assert molora("train", killed, "--resume") == 0
    assert losses(out) == losses(tmp_path / "whole" / "out")
    assert not (out / ".partial").exists()
    assert json.loads((out / "results.json").read_text())["training"]["resumed_from"].endswith("checkpoint-8")
