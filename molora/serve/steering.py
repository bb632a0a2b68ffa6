"""A request's wish about experts: force one, forbid some, favour some, or answer as the bare base would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Steering:
    """What holds for every token of one request, by the names of experts, so that it outlives their renumbering.

    Attributes:
        forbid: experts that get no gate; the others share what these had.
        favour: parts of the gates' sum of 1 that experts get whatever the router says; one with 1 is forced.
        bare: no expert at all.
    """

    forbid: tuple[str, ...] = ()
    favour: Mapping[str, float] = field(default_factory=dict)
    bare: bool = False

    @property
    def forced(self) -> str | None:
        """The expert that has every gate, if there is one."""
        return next((name for name, part in self.favour.items() if part == 1), None)

    def rows(self, names: Sequence[str], gates: int) -> tuple[Tensor, Tensor]:
        """(keep, add), each (gates,) fp32, for the experts there are now; an expert that is gone counts for nothing."""
        keep, add = torch.ones(gates), torch.zeros(gates)
        if self.bare:
            return keep.zero_(), add
        for number, name in enumerate(names):
            keep[number] = float(name not in self.forbid)
            add[number] = self.favour.get(name, 0.0)
        return keep, add


def parse_steering(wish: Mapping[str, object], names: Sequence[str]) -> Steering:
    """What a request's ``experts`` field says: ``{"force": NAME}``, or ``{"forbid": [NAME], "hint": {NAME: PART}}``.

    Raises:
        ValueError: one sentence that names the key.
    """
    unknown = set(wish) - {"force", "forbid", "hint"}
    if unknown:
        raise ValueError(f"experts has no key {min(unknown)!r}; it takes force, forbid and hint")
    if not names:
        raise ValueError("experts: the experts of this model have no names and cannot be steered")
    force, forbid, hint = wish.get("force"), wish.get("forbid", []), wish.get("hint", {})
    if force is not None and (forbid or hint):
        raise ValueError("experts.force leaves nothing to forbid or to hint at; give it alone")
    if not isinstance(forbid, list) or not isinstance(hint, dict):
        raise ValueError("experts.forbid must be a list of names, and experts.hint an object of names and numbers")
    for name in ([force] if force is not None else []) + forbid + list(hint):
        if name not in names:
            raise ValueError(f"there is no expert {name!r}; there are {', '.join(names)}")
    if force is not None:
        return Steering(favour={str(force): 1.0})
    if len(set(forbid)) == len(names):
        raise ValueError("experts.forbid leaves no expert; ask for the base model instead")
    for name, part in hint.items():
        number = isinstance(part, (int, float)) and not isinstance(part, bool)
        if not number or not 0 < part <= 1 or name in forbid:
            raise ValueError(
                f"experts.hint.{name}={part!r} must be a number above 0 and at most 1, of an expert not forbidden"
            )
    if sum(hint.values()) > 1:
        raise ValueError(f"experts.hint adds up to {sum(hint.values()):g}; its parts may add up to 1")
    return Steering(forbid=tuple(forbid), favour=hint)
