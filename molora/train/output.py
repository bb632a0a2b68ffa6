"""What ``output_dir`` holds: whether a run may start or continue there, and where it would continue."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerState

from molora.eval.disk import check_directory
from molora.eval.results import write_text
from molora.eval.strict import parse_yaml
from molora.train.durable import checkpoints, last_whole_checkpoint
from molora.train.global_batch import ROWS, STEPS, check_global_batch
from molora.train.recipe import Recipe, recipe_yaml

RECIPE_FILE, RESULTS_FILE, BEFORE_FILE, CURVE_FILE = "recipe.yaml", "results.json", "before.json", "loss_curve.json"

NOT_THE_RUN = {"sequence.cache", "training.output_dir", f"training.{ROWS}", f"training.{STEPS}"}
"""Keys of a recipe that a resumed run may change; the last two as `check_global_batch` allows."""


def find_checkpoint(recipe: Recipe, *, resume: bool, warn: Callable[[str], Any] = warnings.warn) -> str | None:
    """Checks that ``output_dir`` is free or, with ``resume``, holds a run of the same recipe.

    Args:
        warn: told a sentence about a checkpoint that is damaged, and that the one before it is used instead.

    Returns:
        The checkpoint to resume from, ``None`` to start from the first step.

    Raises:
        ValueError: the directory holds another run or, with ``resume``, none, or the recipe differs from the one that
            began here, or ``output_dir`` is or lies below a file, or every checkpoint is damaged.
    """
    check_directory(recipe.output_dir, "training.output_dir")
    saved, found = recipe.output_dir / RECIPE_FILE, checkpoints(recipe.output_dir)
    if not resume:
        if saved.exists() or found:
            raise ValueError(
                f"{recipe.output_dir} already holds a run; pass --resume to continue it, "
                "or choose another training.output_dir"
            )
        return None
    if not saved.is_file() and not found:
        raise ValueError(
            f"{recipe.output_dir} holds no run to resume; check training.output_dir, or start one without --resume"
        )
    if saved.is_file():
        stored = parse_yaml(saved.read_text(encoding="utf-8"))
        began, now = _flat(stored), _flat(parse_yaml(recipe_yaml(recipe)))
        keys = (began.keys() | now.keys()) - NOT_THE_RUN
        changed = sorted(key for key in keys if began.get(key) != now.get(key))
        if changed:
            shown = ", ".join(f"{key}: {began.get(key)!r} -> {now.get(key)!r}" for key in changed[:5])
            raise ValueError(
                f"--resume continues the run exactly as it began, but the recipe changed ({shown}); "
                "undo that or start anew"
            )
        check_global_batch(recipe.output_dir, stored["training"], recipe.training)
    last, damaged = last_whole_checkpoint(recipe.output_dir)
    if damaged and last is None:
        raise ValueError(
            f"no checkpoint in {recipe.output_dir} is whole ({'; '.join(damaged)}); delete the directories "
            "checkpoint-* to begin again at the first step with --resume"
        )
    for wrong in damaged:
        warn(f"a checkpoint is damaged and is not used: {wrong}; going on from {last}")
    return None if last is None else str(last)


def last_checkpoint(folder: Path) -> str | None:
    """The last whole checkpoint of a run."""
    last, _ = last_whole_checkpoint(folder)
    return None if last is None else str(last)


def stored_results(recipe: Recipe) -> dict[str, Any] | None:
    """The results of a run that is complete; they are the last file that a run writes."""
    path = recipe.output_dir / RESULTS_FILE
    return read_json(path) if path.is_file() else None


def read_json(path: Path) -> Any:
    """A JSON file of a run.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it, and what it held is made again") from error


def claim(recipe: Recipe, *, resume: bool) -> None:
    """Makes ``output_dir`` this run's, before any other that starts at the same time.

    Raises:
        ValueError: another run was first.
    """
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        (recipe.output_dir / RECIPE_FILE).touch(exist_ok=resume)
    except FileExistsError as error:
        raise ValueError(
            f"another run has just begun in {recipe.output_dir}; choose another training.output_dir"
        ) from error
    write_text(recipe.output_dir / RECIPE_FILE, recipe_yaml(recipe))


def finished_state(checkpoint: str | None) -> TrainerState | None:
    """The trainer's state if the checkpoint was written at the last step, so that nothing is left to train."""
    path = Path(checkpoint or "") / "trainer_state.json"
    if checkpoint is None or not path.is_file():
        return None
    state = TrainerState.load_from_json(str(path))
    return state if 0 < state.max_steps <= state.global_step else None


def mean_loss(log: list[dict[str, Any]]) -> float | None:
    """Mean over the steps of a log, each line's loss being that of the steps since the line before."""
    lines = [(line["step"], line["loss"]) for line in log if "loss" in line]
    steps = [step - before for (step, _), before in zip(lines, [0, *(step for step, _ in lines)], strict=False)]
    return sum(n * loss for n, (_, loss) in zip(steps, lines, strict=True)) / sum(steps) if lines else None


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if path.endswith(".replace") and isinstance(value, dict):  # its order counts
        value = [list(pair) for pair in value.items()]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {path: value}
    return {k: v for key, item in items for k, v in _flat(item, f"{path}.{key}" if path else str(key)).items()}
