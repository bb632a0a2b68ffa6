"""What the files of a run held when it began: a run does not go on with other rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from molora.eval.results import write_json
from molora.eval.rows import local_files
from molora.eval.tasks import TaskConfig

DATA_FILE = "data_files.json"


def digest(file: Path) -> str:
    """64 hex digits of the content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def data_files(tasks: Sequence[TaskConfig]) -> dict[str, list[str]]:
    """The digest of each local file of each task, in their order; a hub repository has none."""
    return {task.name: [digest(Path(file)) for file in local_files(task)] for task in tasks}


def write_data_files(folder: Path, tasks: Sequence[TaskConfig]) -> None:
    """Notes what a run began with; a run that goes on leaves the note as it is."""
    if not (folder / DATA_FILE).is_file():
        write_json(folder / DATA_FILE, data_files(tasks))


def check_data_files(folder: Path, tasks: Sequence[TaskConfig]) -> None:
    """Compares the files of the tasks with those that the run in a directory began with.

    Raises:
        ValueError: a file was changed, added or taken away, or the note is damaged.
    """
    file = folder / DATA_FILE
    if not file.is_file():
        return  # a run from before such notes
    now = data_files(tasks)
    try:
        began = json.loads(file.read_text(encoding="utf-8"))
        changed = [task for task in tasks if began[task.name] != now[task.name]]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); delete it if the data is that of the run") from error
    if changed:
        named = ", ".join(f"{task.name} ({task.data})" for task in changed[:5])
        raise ValueError(
            f"--resume goes on with the rows that the run began with, but the data of {named} changed since; put the "
            "files back or start anew in another training.output_dir"
        )
