"""PEFT: registration of the method. The only file that touches PEFT's tables."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from molora.config import MOLORA, MoloraConfig
from molora.model import MoloraModel


def register() -> None:
    """Enters the method in PEFT's tables under a string key; twice does nothing.

    `peft.utils.register_peft_method` takes members of PEFT's own enum only. Yields to a member of this name, should
    PEFT ever have one.
    """
    PEFT_TYPE_TO_PREFIX_MAPPING.setdefault(MOLORA, MoloraModel.prefix)
    PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(MOLORA, MoloraConfig)
    PEFT_TYPE_TO_TUNER_MAPPING.setdefault(MOLORA, MoloraModel)
