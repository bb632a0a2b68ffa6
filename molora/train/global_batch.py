"""The rows of one optimiser step over all processes: another number of processes resumes a run if they stay equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from molora.eval.ranks import world_size
from molora.eval.results import write_json

BATCH_FILE = "global_batch.json"
ROWS, STEPS = "per_device_train_batch_size", "gradient_accumulation_steps"
_DEFAULTS = {ROWS: 8, STEPS: 1}  # those of transformers.TrainingArguments


def global_batch(training: dict[str, Any]) -> dict[str, int]:
    """``ranks``, rows of one forward and forwards of one step, of this launch with a recipe's training section."""
    return {"ranks": world_size()} | {key: training.get(key) or value for key, value in _DEFAULTS.items()}


def write_global_batch(folder: Path, training: dict[str, Any]) -> None:
    """Notes how a run began; a run that goes on differently leaves the note as it is."""
    if not (folder / BATCH_FILE).is_file():
        write_json(folder / BATCH_FILE, global_batch(training))


def check_global_batch(folder: Path, began: dict[str, Any], training: dict[str, Any]) -> None:
    """Compares the rows of a step with those of the run in a directory.

    Args:
        folder: the run's.
        began: the training section that it was begun with.
        training: the one to resume with.

    Raises:
        ValueError: other rows in a step, or in an order that hangs on the rows of a forward.
    """
    file, now = folder / BATCH_FILE, global_batch(training)
    if file.is_file():
        try:
            then = {key: int(json.loads(file.read_text(encoding="utf-8"))[key]) for key in now}
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}); write into it how the run began: {now}") from error
    else:
        then = global_batch(began) | {"ranks": 1}  # a run from before such notes
    if now == then:
        return
    wanted, got = _rows(then), _rows(now)
    if wanted != got:
        raise ValueError(
            f"--resume keeps the rows of a step: the run began with {_told(then)}, and this is {_told(now)}; "
            + _what_fits(wanted, now)
        )
    if now[ROWS] != then[ROWS] and training.get("train_sampling_strategy") == "group_by_length":
        raise ValueError(
            f"--resume with training.{ROWS}={now[ROWS]} instead of {then[ROWS]} would change the order of the rows, "
            f"which group_by_length makes of batches; keep it, and change training.{STEPS}"
        )


def _rows(batch: dict[str, int]) -> int:
    return batch["ranks"] * batch[ROWS] * batch[STEPS]


def _told(batch: dict[str, int]) -> str:
    ranks = f"{batch['ranks']} process" + ("es" if batch["ranks"] > 1 else "")
    return f"{ranks} x {batch[ROWS]} rows x {batch[STEPS]} accumulation steps = {_rows(batch)} rows"


def _what_fits(rows: int, now: dict[str, int]) -> str:
    """The settings that keep so many rows with this number of processes."""
    ranks = now["ranks"]
    if rows % ranks:
        fitting = [n for n in range(1, rows + 1) if rows % n == 0]
        return f"{rows} rows cannot be shared by {ranks} processes; start {', '.join(map(str, fitting))} of them"
    share = rows // ranks
    if share % now[ROWS] == 0:
        return f"set training.{STEPS}={share // now[ROWS]}"
    pairs = [(n, share // n) for n in range(1, share + 1) if share % n == 0]
    return "set " + " or ".join(f"training.{ROWS}={n} training.{STEPS}={steps}" for n, steps in pairs)
