"""One sentence for an unknown key: what was given, where, and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown key {key!r} in {where}: {hint}Valid keys: {', '.join(valid)}"
