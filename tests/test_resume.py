"""A run that stops: at its end, while it scores, on a full disk, by Ctrl-C; and what --resume makes of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_cli import losses, molora, write_recipe
from tiny_lm import save_tiny
from transformers import Trainer

from molora.eval import terminal
from molora.train import run
from molora.train.output import claim, mean_loss
from molora.train.recipe import read_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base"))


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_complete_run_is_left_as_it_is(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = write_recipe(tmp_path, base, max_steps=3), tmp_path / "out"
    assert molora("train", recipe, "--resume") == 2
    assert "holds no run to resume; check training.output_dir" in error(capsys)
    assert not out.exists()
    assert molora("train", recipe) == 0
    before = contents(out)
    capsys.readouterr()
    assert molora("train", recipe, "--resume") == 0
    shown = capsys.readouterr()
    assert "is complete; nothing is left to do" in shown.err and "sums" in shown.out
    assert contents(out) == before


def test_a_run_killed_while_scoring_after_training_ends_exactly(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = write_recipe(tmp_path, base, max_steps=5), tmp_path / "out"
    assert molora("train", recipe) == 0
    whole, results, curve = contents(out), json.loads((out / "results.json").read_text()), losses(out)
    for name in ("results.json", "loss_curve.json", "predictions_after.jsonl", "adapter_model.safetensors"):
        (out / name).unlink()

    def no_training(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(Trainer, "train", no_training)
    assert molora("train", recipe, "--resume") == 0
    again = json.loads((out / "results.json").read_text())
    assert contents(out).keys() == whole.keys()
    same = ("adapter_model.safetensors", "predictions_after.jsonl", "checkpoint-5/adapter_model.safetensors")
    assert all(contents(out)[name] == whole[name] for name in same)
    assert (again["tasks"], again["before"], losses(out)) == (results["tasks"], results["before"], curve)
    assert again["training"] | {"resumed_from": None} == results["training"]
    assert again["training"]["loss"] == pytest.approx(sum(loss for _, loss, _ in curve) / 5)


def test_the_mean_loss_weighs_each_line_by_its_steps() -> None:
    assert mean_loss([{"step": 1, "loss": 4.0}, {"step": 4, "loss": 2.0}, {"step": 4, "train_loss": 9.0}]) == 2.5
    assert mean_loss([]) is None


FULL = [
    OSError(28, "No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
    RuntimeError("basic_ios::clear: iostream error"),
    Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("full", FULL, ids=["python", "torch position", "torch write", "torch stream", "safetensors"])
def test_a_full_disk_ends_in_one_sentence(
    full: Exception, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = write_recipe(tmp_path, base), tmp_path / "out"
    original = Trainer._save_optimizer_and_scheduler

    def save(self: Trainer, folder: str) -> None:
        if self.state.global_step == 4:
            raise full
        original(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", save)
        assert molora("train", recipe, "evaluation.before=false") == 2
    sentence = error(capsys)
    assert "checkpoint-4 could not be written, the disk is full" in sentence
    assert "checkpoint-2 is whole; make room and continue with --resume" in sentence
    assert not (out / ".partial").exists() and (out / "checkpoint-2").is_dir()


def test_a_full_disk_at_the_end_leaves_a_run_that_resumes(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = write_recipe(tmp_path, base, max_steps=2), tmp_path / "out"
    original = run.write_json

    def write(path: Path, data: Any) -> None:
        if path.name == "results.json":
            raise FULL[0]
        original(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_json", write)
        assert molora("train", recipe) == 2
    assert "the adapter is whole; make room and continue with --resume" in error(capsys)
    assert molora("train", recipe, "--resume") == 0
    assert json.loads((out / "results.json").read_text())["training"]["steps"] == 2


def test_an_interrupt_names_the_last_checkpoint(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, base)

    def press(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(terminal.TrainingBar, "on_step_begin", press, raising=False)
    assert molora("train", recipe, "evaluation.before=false") == 130
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == f"interrupted; continue with --resume, from {tmp_path / 'out' / 'checkpoint-4'}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.sums.eval.data=none.jsonl", "task 'sums': no file matches 'none.jsonl'"),
        ("tasks.odd.eval.split=nope", "task 'odd' cannot be read .* Unknown split"),
        ("tasks.sums.answer='{'", "task 'sums': answer='{' is not a template"),
        ("training.lr_scheduler_type=nope", "recipe.training: nope is not a valid SchedulerType"),
        ("training.report_to=nope", "recipe.training: nope is not supported"),
        ("training.output_dir={recipe}", "recipe.yaml is a file; choose a directory"),
        ("training.output_dir={recipe}/out", "is below .*recipe.yaml, which is a file; choose a directory"),
    ],
)
def test_what_would_stop_the_run_later_stops_it_first(
    override: str, message: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first step, before the directory is claimed, and with nothing above the one sentence."""
    recipe = write_recipe(tmp_path, base)
    for options in ([], ["--dry-run"]) if "report_to" not in override else ([],):
        assert molora("train", recipe, override.replace("{recipe}", recipe), "evaluation.before=false", *options) == 2
        shown = capsys.readouterr().err
        assert re.search(message, shown)
        assert "schema:" not in shown or "report_to" in override
        assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_an_adapter_is_no_base(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = str(tmp_path / "adapter")
    assert molora("convert", base, adapter, "num_experts=2", "r=2") == 0
    assert "Loading weights" not in capsys.readouterr().err
    assert molora("convert", adapter, str(tmp_path / "second")) == 2
    assert f"is an adapter, and a new one on it would leave it out; give its base, '{base}'" in error(capsys)
    assert molora("train", write_recipe(tmp_path, base), f"base.model={adapter}", "--dry-run") == 2
    assert f"give its base, '{base}'" in error(capsys)
    assert not (tmp_path / "second").exists() and not (tmp_path / "out").exists()


def test_no_line_of_the_log_reaches_over_a_save(base: str, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, base, max_steps=7, logging_steps=4, save_steps=3), tmp_path / "out"
    assert molora("train", recipe) == 0
    whole, mean = losses(out), json.loads((out / "results.json").read_text())["training"]["loss"]
    assert [step for step, *_ in whole] == [1, 3, 4, 6, 7]
    for path in (*out.glob("*.json"), out / "adapter_model.safetensors"):
        path.unlink()
    shutil.rmtree(out / "checkpoint-7")
    assert molora("train", recipe, "--resume") == 0
    assert losses(out) == whole and json.loads((out / "results.json").read_text())["training"]["loss"] == mean


def test_two_runs_cannot_begin_in_one_directory(base: str, tmp_path: Path) -> None:
    """Whoever claims it first has it; a check before a claim would let both in."""
    recipe = read_recipe(write_recipe(tmp_path, base))
    claim(recipe, resume=False)
    with pytest.raises(ValueError, match="another run has just begun in .*; choose another training.output_dir"):
        claim(recipe, resume=False)
    claim(recipe, resume=True)
    assert read_recipe(tmp_path / "out" / "recipe.yaml") == recipe


def test_what_may_change_and_what_is_damaged(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = write_recipe(tmp_path, base, max_steps=4, gradient_accumulation_steps=2), tmp_path / "out"
    assert molora("train", recipe, "evaluation.before=false") == 0
    (out / "results.json").write_text("{")
    assert molora("train", recipe, "evaluation.before=false", "--resume") == 2
    assert "results.json is not JSON" in error(capsys)
    (out / "results.json").unlink()
    rows = tmp_path / "rows.jsonl"
    before = rows.read_bytes()
    rows.write_bytes(before.replace(b"3 and 3", b"3 and 4"))
    assert molora("train", recipe, "evaluation.before=false", "--resume") == 2
    assert f"the data of sums ({rows}), odd ({rows}) changed since" in error(capsys)
    rows.write_bytes(before)
    (out / "data_files.json").write_text("[]")
    assert molora("train", recipe, "evaluation.before=false", "--resume") == 2
    assert "data_files.json is damaged" in error(capsys)
    (out / "data_files.json").unlink()
    out.rename(tmp_path / "moved")
    split = [f"training.output_dir={tmp_path / 'moved'}", "training.gradient_accumulation_steps=1"]
    assert molora("train", recipe, "evaluation.before=false", *split, "--resume") == 2
    assert "--resume keeps the rows of a step" in error(capsys)
    (tmp_path / "moved" / "checkpoint-4" / "checksums.json").write_text("[]")
    (tmp_path / "moved" / "global_batch.json").write_text("[]")
    moved = [f"training.output_dir={tmp_path / 'moved'}"]
    assert molora("train", recipe, "evaluation.before=false", *moved, "--resume") == 2
    assert "global_batch.json is damaged" in error(capsys)
