"""One sentence for an unknown key: what was given, where, and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, valid: Iterable[str]) -> str:
    """``did you mean 'x'? `` with the closest valid word, or nothing where none is close."""
    close = difflib.get_close_matches(word, sorted(valid), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}? " if close else ""


def unknown_key_message(where: str, key: str, valid: Iterable[str]) -> str:
    """Names an unknown key and the closest valid one.

    Args:
        where: what holds the key, for instance ``"MoloraConfig.router"``.
        key: the key that came.
        valid: the keys that exist there.

    Returns:
        One sentence: the wrong key, the nearest valid key if any is close, and all valid keys.
    """
    valid = sorted(valid)
    return f"unknown key {key!r} in {where}: {nearest(key, valid)}Valid keys: {', '.join(valid)}"
