"""Reads the rows of a task: all of them into a table, or one after another as a stream."""

from __future__ import annotations

import csv
import glob
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molora.eval.tasks import TaskConfig, needed_columns
from molora.eval.unreadable import why_unreadable

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text"}
BROKEN_ARCHIVE = (OSError, EOFError, zlib.error)
"""What reading a broken or truncated archive raises."""
CONVERSATION_KEYS = ("role", "from", "type")
"""Keys of a turn, and of a part of its content, that name what it is."""


def load_rows(task: TaskConfig) -> Dataset:
    """Reads the rows of a task, checks that the columns its templates name exist, and draws ``limit`` of them.

    Raises:
        FileNotFoundError: no local file matches.
        ValueError: no rows, a line that ``parse`` does not match, or a column that is not there.
    """
    with reading(task):
        rows = _read(task, streaming=False)
        if _reader(task) is not None:
            # The json reader takes bytes that are not UTF-8; without this they would fail at the row, with no name.
            rows.data.validate(full=True)
    if task.parse is not None:
        rows = _parse(rows, task)
    if len(rows) == 0:
        raise empty(task)
    _check_columns(task, rows.column_names)
    if task.limit is not None and task.limit < len(rows):
        rows = rows.shuffle(seed=0).select(range(task.limit))
    if task.replace:
        rows = rows.map(_replaced, fn_kwargs={"task": task}, load_from_cache_file=False)
    return rows


def stream_rows(task: TaskConfig) -> IterableDataset:
    """The rows of a task one after another, the first ``limit`` of them; only the first one is read and checked here.

    Raises:
        FileNotFoundError: no local file matches.
        ValueError: no rows, or a column that the first row does not have.
    """
    with reading(task):
        rows = _read(task, streaming=True)
        first = next(iter(rows), None)
    if first is None:
        raise empty(task)
    if task.parse is not None:
        _check_parse(task, list(first))
        rows = rows.map(_parsed, fn_kwargs={"pattern": task.parse, "name": task.name}, remove_columns=["text"])
        first = _parsed(first, task.parse, task.name)
    _check_columns(task, list(first))
    if task.limit is not None:
        rows = rows.take(task.limit)
    if task.replace:
        rows = rows.map(_replaced, fn_kwargs={"task": task})
    return rows


@contextmanager
def reading(task: TaskConfig) -> Iterator[None]:
    """What a reader raises becomes one sentence that names the task, the file and the row."""
    import datasets

    try:
        yield
    except FileNotFoundError:
        raise
    # datasets lets StopIteration and RuntimeError out for an empty file, and the others for a broken archive.
    except (ValueError, RuntimeError, StopIteration, datasets.exceptions.DatasetsError, *BROKEN_ARCHIVE) as error:
        if type(error) is ValueError and str(error).startswith(f"task {task.name!r}"):
            raise
        reason = why_unreadable(local_files(task)) or _root_cause(error)
        if task.field is not None and "Trailing data" in reason:
            reason = "field is for a file that holds one JSON object, and this one holds more; remove field"
        raise ValueError(
            f"task {task.name!r} cannot be read from {task.data!r} (split {task.split!r}): {reason}"
        ) from error


def local_files(task: TaskConfig) -> list[str]:
    """The files that ``data`` names; none for a hub id."""
    return sorted(glob.glob(str(Path(task.data).expanduser()), recursive=True))


def empty(task: TaskConfig) -> ValueError:
    """The error of a task without rows."""
    return ValueError(f"task {task.name!r} is empty: {task.data!r} has no rows; check data and split")


def _check_columns(task: TaskConfig, names: Sequence[str]) -> None:
    for needed in needed_columns(task):
        if needed not in names:
            raise ValueError(
                f"task {task.name!r} needs the column {needed!r}, but {task.data!r} has {', '.join(names)}"
            )


def _root_cause(error: BaseException) -> str:
    """The text of the error that came first: datasets wraps it in one that says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def _reader(task: TaskConfig) -> str | None:
    """The suffix that says how a file is read; ``None`` for a hub id."""
    return next((part for part in reversed(Path(task.data).suffixes) if part in READERS), None)


def _read(task: TaskConfig, *, streaming: bool) -> Any:
    import datasets

    if Path(task.data).expanduser().is_dir():
        example = Path(task.data) / "*.jsonl"
        raise ValueError(
            f"task {task.name!r}: data={task.data!r} is a directory; give a file or a glob such as {example}"
        )
    suffix = _reader(task)
    if suffix is None:
        return datasets.load_dataset(task.data, task.subset, split=task.split, streaming=streaming)
    files = local_files(task)
    if not files:
        raise FileNotFoundError(f"task {task.name!r}: no file matches {task.data!r}; check the path")
    options: dict[str, Any] = {}
    if READERS[suffix] == "csv":
        # Text stays text: "NA" and "" are answers here, not missing numbers; tab-separated files have no quoting.
        options = {"keep_default_na": False, "column_names": task.columns}
        if suffix == ".tsv":
            options |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
    elif task.columns is not None:
        raise ValueError(
            f"task {task.name!r}: columns names the columns of csv and tsv files; remove it for {task.data!r}"
        )
    if suffix == ".json" and task.field is not None:
        options = {"field": task.field}
    elif task.field is not None:
        raise ValueError(
            f"task {task.name!r}: field is for a .json file that holds one object; remove it for {task.data!r}"
        )
    return datasets.load_dataset(READERS[suffix], data_files=files, split=task.split, streaming=streaming, **options)


def _check_parse(task: TaskConfig, columns: Sequence[str]) -> None:
    if not re.compile(task.parse or "").groupindex or columns != ["text"]:
        raise ValueError(f"task {task.name!r}: parse needs named groups such as (?P<question>.*) and a txt file")


def _parse(rows: Dataset, task: TaskConfig) -> Dataset:
    assert task.parse is not None
    _check_parse(task, rows.column_names)
    bad = [line for line in rows["text"] if not re.fullmatch(task.parse, line)]
    if bad:
        raise ValueError(
            f"task {task.name!r}: {len(bad)} of {len(rows)} lines do not match parse, the first is {bad[0]!r}"
        )
    options = {"pattern": task.parse, "name": task.name}
    return rows.map(_parsed, fn_kwargs=options, remove_columns="text", load_from_cache_file=False)


def _parsed(row: dict[str, Any], pattern: str, name: str) -> dict[str, str]:
    match = re.fullmatch(pattern, row["text"])
    if match is None:
        raise ValueError(f"task {name!r}: the line {row['text']!r} does not match parse")
    return match.groupdict()


def _replaced(row: dict[str, Any], task: TaskConfig) -> dict[str, Any]:
    """Every text column, and the texts inside the columns that the task reads; who speaks in a conversation stays."""
    pairs = list((task.replace or {}).items())
    nested = needed_columns(task)
    kept = CONVERSATION_KEYS if isinstance(task.messages, str) else ()
    return {
        key: _replaced_in(value, pairs, kept) if isinstance(value, str) or key in nested else value
        for key, value in row.items()
    }


def _replaced_in(value: Any, pairs: list[tuple[str, str]], kept: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_replaced_in(item, pairs, kept) for item in value]
    if isinstance(value, dict):
        return {key: item if key in kept else _replaced_in(item, pairs, kept) for key, item in value.items()}
    if isinstance(value, str):
        for old, new in pairs:
            value = value.replace(old, new)
    return value
