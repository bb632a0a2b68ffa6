"""What a preset is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One published system.

    Attributes:
        title: the system in a line.
        arxiv: number of the paper.
        code: repository of the released code; empty where none was released.
        options: the keys of MoloraConfig that differ from its defaults.
        notes: for a key, where its default comes from, and what the paper or the released code has instead.
    """

    title: str
    arxiv: str
    code: str
    options: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return f"arXiv {self.arxiv}; {self.code or 'no code was released'}"

    @property
    def router(self) -> str:
        return str(self.options["router"].get("name", "top_k"))

    @property
    def placement(self) -> str:
        return str(self.options.get("placement", "linear"))
