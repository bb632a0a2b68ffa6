"""Memory that does not suffice ends in one sentence with what to change; errors that are no such thing stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import molora, write_recipe
from tiny_lm import save_tiny

from molora.eval.memory import enough_memory, is_exhausted
from molora.train import prepare, run
from molora.train.watched import WatchedTrainer

TOO_MUCH = 2**52  # bytes that no machine has


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base"))


def error(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr().err
    (line,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in shown
    return line


def allocate(*args: Any, **kwargs: Any) -> None:
    torch.empty(TOO_MUCH, dtype=torch.uint8)


def test_a_step_that_is_too_large(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator's own error, at step 4."""
    original = WatchedTrainer.compute_loss

    def compute_loss(self: WatchedTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            allocate()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(WatchedTrainer, "compute_loss", compute_loss)
    recipe, out = write_recipe(tmp_path, base), tmp_path / "out"
    assert molora("train", recipe, "evaluation.before=false") == 2
    line = error(capsys)
    assert "the memory of this machine does not suffice for a training step; " in line
    assert "lower training.per_device_train_batch_size (4) and raise training.gradient_accumulation_steps (1)" in line
    assert "checkpointing: true, or lower sequence.max_length, or set base.quantization: nf4" in line
    assert f"start anew in another training.output_dir ({out / 'checkpoint-2'} is whole, but" in line
    capsys.readouterr()
    smaller = ["per_device_train_batch_size=1", "gradient_checkpointing=true", f"output_dir={tmp_path / 'other'}"]
    changed = [f"training.{change}" for change in smaller]
    assert molora("train", recipe, "evaluation.before=false", "training.save_steps=8", *changed) == 2
    line = error(capsys)
    assert "batch_size" not in line and "checkpointing: true" not in line and "(no checkpoint was written)" in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("load_base", "does not suffice for loading the base; set base.dtype to bfloat16, or base.quantization to nf4"),
        ("run_suite", r"does not suffice for scoring; lower evaluation.batch_size (32) and start anew"),
    ],
)
def test_a_base_or_a_batch_that_is_too_large(
    name: str,
    message: str,
    base: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepare if name == "load_base" else run, name, allocate)
    assert molora("train", write_recipe(tmp_path, base)) == 2
    assert message in error(capsys)


def test_a_batch_of_eval_that_is_too_large(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from molora.eval import suite

    monkeypatch.setattr(suite, "score_task", allocate)
    assert molora("eval", base, "--suite", write_recipe(tmp_path, base), "--batch-size", "7") == 2
    assert "does not suffice for scoring; lower --batch-size (7)" in error(capsys)


def test_what_counts() -> None:
    exhausted = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ]
    with pytest.raises(RuntimeError) as real:
        allocate()
    assert all(is_exhausted(e) for e in [*exhausted, real.value])
    assert not any(is_exhausted(e) for e in [RuntimeError("mat1 and mat2 shapes"), ValueError("not enough memory")])
    with pytest.raises(MemoryError, match="the memory of the accelerator does not suffice for this; less"):
        with enough_memory("this", lambda: "less"):
            raise exhausted[0]
    with pytest.raises(RuntimeError, match="mat1"), enough_memory("this", lambda: "less"):
        raise RuntimeError("mat1 and mat2 shapes")


@pytest.mark.gpu
def test_a_gpu_that_is_too_small(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CUDA's own error: the process may use a few megabytes only, and a batch of 40 rows takes more."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 24 * 2**20) / total)
    try:
        recipe = write_recipe(tmp_path, base, per_device_train_batch_size=4096, num_train_epochs=2)
        assert molora("train", recipe, "evaluation={before: false, after: false}", "tasks.sums.weight=1000") == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "the memory of the accelerator does not suffice for a training step" in error(capsys)
