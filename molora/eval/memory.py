"""One sentence when the memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# A CPU's allocator and CUDA's libraries raise plain RuntimeErrors.
_EXHAUSTED = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "_ALLOC_FAILED")


@contextmanager
def enough_memory(what: str, advice: Callable[[], str]) -> Iterator[None]:
    """Turns the errors of exhausted memory into one sentence.

    Args:
        what: what is being done, for instance ``"scoring"``.
        advice: gives what to change, and what is whole nevertheless.

    Raises:
        MemoryError: the memory of the device, or of the machine, does not suffice.
    """
    try:
        yield
    except Exception as error:
        if not is_exhausted(error):
            raise
        where = "the accelerator" if isinstance(error, torch.OutOfMemoryError) else "this machine"
        raise MemoryError(f"the memory of {where} does not suffice for {what}; {advice()}") from error


def is_exhausted(error: BaseException) -> bool:
    """Whether an error of Python or torch says that no memory is left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _EXHAUSTED)
