"""Why a data file cannot be read: its name, the row and the reason, looked for only once reading has failed."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable
from pathlib import Path


def why_unreadable(files: Iterable[str]) -> str | None:
    """The first thing that is wrong with the files, as ``"FILE, row 3: ..."``; ``None`` if nothing is seen."""
    for file in sorted(files):
        try:
            reason = _what_is_wrong(Path(file))
        except (OSError, EOFError, zlib.error) as error:
            reason = f": {error}"
        if reason:
            return file + reason
    return None


def _what_is_wrong(path: Path) -> str | None:
    if path.stat().st_size == 0:
        return " has 0 bytes"
    jsonl = ".jsonl" in path.suffixes or (".json" in path.suffixes and _is_lines(path))
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8")
                row = json.loads(text) if jsonl and text.strip() else {}
            except UnicodeDecodeError as error:
                return f", row {number}: not UTF-8 text ({error.reason} 0x{line[error.start]:02x})"
            except json.JSONDecodeError as error:
                return f", row {number}: not valid JSON ({error})"
            if not isinstance(row, dict):
                return f", row {number}: a row must be a JSON object, got {text.strip()[:80]}"
    return None


def _is_lines(path: Path) -> bool:
    """Whether a .json file holds one object per line: its first line is a whole JSON value and not its last."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        first, more = lines.readline(), lines.readline()
    try:
        return bool(more) and isinstance(json.loads(first), dict)
    except ValueError:
        return False
