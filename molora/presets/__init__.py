"""Published systems as configs: each is a point on the axes router, placement and losses.

Paper names live here, in docs and in tests, and nowhere else. `molora presets --markdown` makes docs/presets.md of it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from molora.checks import check_choice
from molora.presets.imported import IMPORTED
from molora.presets.preset import Preset
from molora.presets.trained import TRAINED

PRESETS: dict[str, Preset] = TRAINED | IMPORTED


def preset_options(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of MoloraConfig for a preset, with overrides merged in.

    `router` and `plain_lora` merge key by key; a router of another name, and None, replace the preset's.

    Raises:
        ValueError: an unknown preset, with the nearest one.
    """
    check_choice("preset", name, PRESETS)
    options = copy.deepcopy(PRESETS[name].options)
    for key, value in overrides.items():
        own = options.get(key)
        if key == "router" and isinstance(value, str):
            value = {"name": value}
        if isinstance(own, dict) and isinstance(value, Mapping):
            same = key != "router" or value.get("name", own["name"]) == own["name"]
            options[key] = {**(own if same else {}), **value}
        else:
            options[key] = value
    return options
