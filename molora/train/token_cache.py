"""Tokenized rows on disk, found again by everything that they were made of."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

import molora
from molora.eval.disk import writing
from molora.eval.rows import local_files, reading
from molora.eval.tasks import TaskConfig
from molora.train.data_note import digest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

COUNTS = "counts.json"
ENCODER = ("eval/chat.py", "eval/encode.py", "eval/rows.py", "eval/tasks.py", "train/mixing.py", "train/token_cache.py")
"""The code that turns a row into tokens; a cache does not outlive a change of it."""
LIBRARIES = ("datasets", "jinja2", "tokenizers", "transformers")
OF_MIXING = ("name", "data", "weight", "size", "task_label", "eval")
"""Keys of a task that change none of its tokens."""


def cache_key(task: TaskConfig, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> str:
    """64 hex digits of all that the tokens of a task are a function of.

    These are the content of its files, or the revision of its hub repository; its definition; the tokenizer with its
    chat template, as it saves itself; the source of molora's encoder and the versions of the libraries below it; the
    settings; and the day, where a chat template writes it.

    Raises:
        ValueError: a hub id that cannot be loaded.
    """
    made_of = {
        "data": [(Path(file).suffixes, _digest([Path(file)])) for file in local_files(task)] or _revision(task),
        "task": {key: value for key, value in asdict(task).items() if key not in OF_MIXING},
        "tokenizer": (type(tokenizer).__name__, _tokenizer_digest(tokenizer)),
        "encoder": _digest(Path(molora.__file__).parent / file for file in ENCODER),
        "libraries": {name: version(name) for name in LIBRARIES},
        "settings": settings,
        "day": date.today().isoformat() if "strftime_now" in str(tokenizer.chat_template) else None,
    }
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def cached(key: str, make: Callable[[], tuple[Dataset, dict[str, Any]]]) -> tuple[Dataset, dict[str, Any]]:
    """The rows and counts of `key`, read from datasets' cache directory or made and stored there.

    One process makes them while the others wait. They are written beside and renamed, so a killed process leaves
    nothing that would be read; what was damaged later is made again.
    """
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "molora" / key
    advice = "make room, or set sequence.cache: false"
    with writing(str(folder), advice):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        counts = _read_counts(folder)
        if counts is None:
            rows, counts = make()
            with writing(str(folder), advice):
                _store(folder, rows, counts)
        return datasets.load_from_disk(str(folder)), counts


def _store(folder: Path, rows: Dataset, counts: dict[str, Any]) -> None:
    partial = folder.with_suffix(".partial")
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    rows.save_to_disk(str(partial))
    files = {file.name: _digest([file]) for file in partial.iterdir()}
    (partial / COUNTS).write_text(json.dumps({"counts": counts, "files": files}), encoding="utf-8")
    partial.rename(folder)


def _read_counts(folder: Path) -> dict[str, Any] | None:
    """The counts, if every file is there as it was written."""
    try:
        stored = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
        whole = all(_digest([folder / name]) == digest for name, digest in stored["files"].items())
        return stored["counts"] if whole else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _digest(files: Iterable[Path]) -> str:
    """Of the contents, in their order."""
    found = hashlib.sha256()
    for file in files:
        found.update(bytes.fromhex(digest(file)))
    return found.hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _digest(sorted(path for path in Path(folder).rglob("*") if path.is_file()))


def _revision(task: TaskConfig) -> tuple[str, str]:
    import datasets

    with reading(task):
        builder = datasets.load_dataset_builder(task.data, task.subset)
    return task.data, str(builder.cache_dir)
