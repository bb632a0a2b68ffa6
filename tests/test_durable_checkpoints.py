"""Checkpoints after a power loss, after damage, and after kills at random moments."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cli import losses, molora, write_recipe
from tiny_lm import save_tiny

from molora.train.durable import CHECKSUMS, damage, keep_newest, last_whole_checkpoint, write_checksums

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "kill_resume.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base"))


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def checkpoint(run_dir: Path, step: int) -> Path:
    path = run_dir / f"checkpoint-{step}"
    (path / "global_step").mkdir(parents=True)
    (path / "a.bin").write_bytes(bytes(range(200)))
    (path / "global_step" / "shard.pt").write_bytes(b"shard")
    write_checksums(path)
    return path


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: os.truncate(path / "a.bin", 100), "a.bin has 100 bytes instead of 200"),
        (lambda path: os.truncate(path / "a.bin", 0), "a.bin has 0 bytes instead of 200"),
        (lambda path: _flip(path / "a.bin"), "a.bin holds other bytes than were written"),
        (lambda path: (path / "global_step" / "shard.pt").unlink(), "global_step/shard.pt is missing"),
        (lambda path: (path / CHECKSUMS).unlink(), f"checkpoint-2 has no {CHECKSUMS}"),
        (lambda path: os.truncate(path / CHECKSUMS, 30), f"{CHECKSUMS} is not JSON"),
        (lambda path: (path / "more.txt").write_text("beside"), None),
    ],
)
def test_damage_is_named(spoil: Callable[[Path], Any], message: str | None, tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    assert damage(second) is None and last_whole_checkpoint(tmp_path) == (second, [])
    spoil(second)
    found = damage(second)
    assert found is None if message is None else str(found).endswith(message)
    assert last_whole_checkpoint(tmp_path) == ((second, []) if message is None else (first, [found]))


def test_the_newest_are_kept_and_those_of_before_a_resume_are_not(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "aside").mkdir()
    keep_newest(tmp_path, 2, 10, tmp_path / "aside")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "aside",
        "checkpoint-10",
        "checkpoint-4",
        "checkpoint-best",
    ]
    assert not list((tmp_path / "aside").iterdir())


def test_a_run_passes_over_a_damaged_checkpoint_and_names_it(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write_recipe(tmp_path, base, save_total_limit=3), tmp_path / "out"
    plain = "evaluation={before: false, after: false}"
    assert molora("train", recipe, plain) == 0
    want, adapter = losses(out), (out / "adapter_model.safetensors").read_bytes()
    for name in ("results.json", "loss_curve.json", "adapter_model.safetensors"):
        (out / name).unlink()
    os.truncate(out / "checkpoint-8" / "optimizer.pt", 50)
    _flip(out / "checkpoint-6" / "adapter_model.safetensors")
    capsys.readouterr()
    assert molora("train", recipe, plain, "--resume") == 0
    shown = " ".join(errors(capsys).split())
    assert "checkpoint is damaged and is not used:" in shown and f"going on from {out / 'checkpoint-4'}" in shown
    assert "checkpoint-8/optimizer.pt has 50 bytes instead of" in shown
    assert "checkpoint-6/adapter_model.safetensors holds other bytes than were written" in shown
    assert losses(out) == want and (out / "adapter_model.safetensors").read_bytes() == adapter
    assert all(damage(path) is None for path in out.glob("checkpoint-*"))

    (out / "results.json").unlink()
    for path in out.glob("checkpoint-*"):
        (path / CHECKSUMS).unlink()
    assert molora("train", recipe, plain, "--resume") == 2
    assert f"no checkpoint in {out} is whole (" in errors(capsys)
    for path in out.glob("checkpoint-*"):
        shutil.rmtree(path)
    assert molora("train", recipe, plain, "--resume") == 0
    assert losses(out) == want


@pytest.mark.skipif(sys.platform != "linux", reason="finds names in /proc")
def test_everything_is_on_the_disk_before_it_has_its_name(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of calls: a checkpoint is renamed when all files and directories in it were synced and have not changed
    since; its name is synced before an older checkpoint goes."""
    recipe, out = write_recipe(tmp_path, base, max_steps=6, save_total_limit=1), tmp_path / "out"
    synced: dict[str, tuple[int, int]] = {}
    unsynced_names: set[Path] = set()
    published: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def on_fsync(opened: int) -> None:
        fsync(opened)
        path, stat = os.readlink(f"/proc/self/fd/{opened}"), os.fstat(opened)
        synced[path] = (stat.st_size, stat.st_mtime_ns)
        unsynced_names.discard(Path(path))

    def on_rename(self: Path, target: Path) -> Path:
        assert not unsynced_names, "a name that is not on the disk yet, and something else is renamed"
        if target.parent == out:
            for path in (self, *self.rglob("*")):
                stat = path.stat()
                assert synced[str(path)] == (stat.st_size, stat.st_mtime_ns), path
            unsynced_names.add(out)
            published.append(target.name)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", on_fsync)
    monkeypatch.setattr(Path, "rename", on_rename)
    assert molora("train", recipe, "evaluation={before: false, after: false}") == 0
    assert published == ["checkpoint-2", "checkpoint-4", "checkpoint-6"] and not unsynced_names
    assert {str(out / name) for name in ("adapter_model.safetensors", "checkpoint-6")} <= {
        path.replace("/.partial", "") for path in synced
    }
    assert str(out / ".results.json.partial") in synced


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_run_that_is_killed_again_and_again_ends_as_the_one_left_alone(tmp_path: Path) -> None:
    """Some kills of the benchmark, in a process of its own that can fork."""
    if not BENCHMARK.is_file():
        pytest.skip("benchmarks/ is not part of this installation")

    command = [sys.executable, str(BENCHMARK), "--kills", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["kills"] == 3 and found["different"] == []


def test_the_recorded_kills_hold() -> None:
    result = BENCHMARK.parent / "results" / "kill_resume.json"
    if not result.is_file():
        pytest.skip("benchmarks/ is not part of this installation")
    found = json.loads(result.read_text())
    assert found["kills"] >= 50 and found["different"] == [] and found["bars"][0]["holds"]
    assert found["while_saving"] >= 10 and {hit["streaming"] for hit in found["hits"]} == {False, True}
