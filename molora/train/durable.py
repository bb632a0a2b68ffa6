"""Checkpoints that survive a kill or a power loss at any moment, and the check that says whether one did."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from pathlib import Path

CHECKSUMS = "checksums.json"
"""In each checkpoint: for every other file, by its relative path, ``[bytes, CRC-32]``. Written last."""


def publish(written: Path, target: Path) -> None:
    """Renames a finished directory to ``target``, durably: its files, and the name, are on the disk when it returns.

    A directory that has the name already is moved out of the way as a whole first, so that no half of it ever bears it.

    Args:
        written: a directory on the same file system.
    """
    sync(written)
    discard(target, written.parent)
    written.rename(target)
    sync_directory(target.parent)


def discard(folder: Path, aside: Path) -> None:
    """Deletes a directory whose name must not stand for half of it: it is renamed into ``aside`` first."""
    if folder.exists():
        doomed = aside / f"deleted-{folder.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def keep_newest(run_dir: Path, count: int | None, step: int, aside: Path) -> None:
    """Deletes all but the newest ``count`` checkpoints up to ``step``, and those behind it.

    A checkpoint behind the one that was just written is of before a resume that found it damaged.

    Args:
        count: ``None``: all up to ``step`` are kept.
        aside: a directory of the same file system, for what is being deleted.
    """
    found = checkpoints(run_dir)
    upto = [path for path in found if _step(path) <= step]
    kept = set(upto if count is None else upto[-count:])
    for path in found:
        if path not in kept:
            discard(path, aside)


def checkpoints(run_dir: Path) -> list[Path]:
    """The directories ``checkpoint-N`` of a run by their step, whole or not."""
    found = run_dir.glob("checkpoint-*") if run_dir.is_dir() else ()
    return sorted((path for path in found if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()), key=_step)


def last_whole_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint without damage, and what is wrong with those that are newer, a sentence for each."""
    damaged: list[str] = []
    for path in reversed(checkpoints(run_dir)):
        wrong = damage(path)
        if wrong is None:
            return path, damaged
        damaged.append(wrong)
    return None, damaged


def write_checksums(folder: Path) -> None:
    """Writes :data:`CHECKSUMS` of all files below a directory."""
    sums = {path.relative_to(folder).as_posix(): [path.stat().st_size, crc32(path)] for path in _files(folder)}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What differs from the directory's checksums, with its name in front; ``None``: nothing. Other files may be there.

    Raises:
        OSError: a file cannot be read.
    """
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{folder} has no {CHECKSUMS}"
    except ValueError:
        return f"{folder / CHECKSUMS} is not JSON"
    if not isinstance(sums, dict) or not all(isinstance(v, list) and len(v) == 2 for v in sums.values()):
        return f"{folder / CHECKSUMS} holds no checksums"
    for name, (size, crc) in sums.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes instead of {size}"
        if crc32(path) != crc:
            return f"{path} holds other bytes than were written"
    return None


def crc32(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def sync(folder: Path) -> None:
    """Waits until all files below a directory, and their names, are on the disk."""
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync_directory(path)


def sync_directory(folder: Path) -> None:
    """Waits until the names in a directory are on the disk, where the system can tell (Windows opens no directory)."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
