"""Checks of single values that a user wrote, each with one sentence that names the key."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from molora.suggest import nearest


def check_bool(key: str, value: Any) -> None:
    """Raises ValueError unless value is True or False; a word such as "no" would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r} must be true or false")


def check_int(key: str, value: Any, at_least: int = 1) -> None:
    """Raises ValueError unless value is a whole number of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{key}={value!r} must be an integer of at least {at_least}")


def check_number(key: str, value: Any, *, above: float | None = None, at_least: float | None = None) -> None:
    """Raises ValueError unless value is a finite number within its bounds."""
    bound = f" above {above:g}" if above is not None else "" if at_least is None else f" of at least {at_least:g}"
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (above is not None and value <= above) or (at_least is not None and value < at_least):
        raise ValueError(f"{key}={value!r} must be a finite number{bound}")


def check_fraction(key: str, value: Any) -> None:
    """Raises ValueError unless 0 <= value < 1."""
    check_number(key, value, at_least=0)
    if value >= 1:
        raise ValueError(f"{key}={value!r} must be at least 0 and below 1")


def check_choice(key: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises ValueError unless value is one of the choices; names the nearest."""
    choices = list(choices)
    if not any(type(value) is type(c) and value == c for c in choices):
        raise ValueError(f"{key}={value!r}: {nearest(str(value), map(str, choices))}choose one of {choices}")


def check_names(key: str, value: Any) -> None:
    """Raises ValueError unless value is a list of texts."""
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key}={value!r} must be a list of names")
