"""Directories to write into, and one sentence when the disk is full."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# safetensors and torch.save raise errors of their own, which carry no errno.
_FULL = (
    "No space left",
    "Disk quota",
    "os error 28",
    "os error 122",
    "PytorchStreamWriter failed",
    "unexpected pos ",
    "iostream error",
)


def check_directory(path: Path, what: str) -> None:
    """Refuses a directory that cannot be made because it, or a folder above it, is a file.

    Raises:
        ValueError: names the file.
    """
    taken = next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), None)
    if taken is not None:
        where = f"is below {taken}, which is a file" if taken != path else "is a file"
        raise ValueError(f"{what}: {path} {where}; choose a directory")


@contextmanager
def writing(what: str, advice: str) -> Iterator[None]:
    """Turns the errors of a full disk into one sentence.

    Args:
        what: what is being written, for instance ``"checkpoint-10"``.
        advice: what is whole nevertheless, and what to do.

    Raises:
        OSError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not disk_is_full(error):
            raise
        raise OSError(f"{what} could not be written, the disk is full; {advice}") from error


def disk_is_full(error: BaseException) -> bool:
    """Whether an error of Python, torch or safetensors says that the disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(text in str(error) for text in _FULL)
