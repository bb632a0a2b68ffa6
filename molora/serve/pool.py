"""Experts that come and go while the model is served."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molora.adapters.places import vacate_expert
from molora.serve.engine import Engine
from molora.serve.protocol import ApiError


@dataclass(kw_only=True)
class ExpertPool:
    """Adds and removes experts between two forwards.

    Attributes:
        allowed: directories below which adapters may lie; none: no expert is added.
        max_bytes: of an adapter's weights.
        room: places for experts that are made where there is none, with all CUDA graphs captured anew.
        taken: names that no expert may have.
    """

    engine: Engine
    tokenizer: Any
    allowed: tuple[Path, ...] = ()
    max_bytes: int = 2 * 2**30
    room: int = 1
    taken: tuple[str, ...] = ()
    _one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def load(self, name: str, path: str, examples: Sequence[str] | None) -> None:
        """Adds an expert; requests that run go on with one expert more.

        Raises:
            ApiError: a name or a path that is not allowed, or an adapter that is refused.
        """
        from molora.adapters.expert_pool import prepare_expert

        self._check_changeable()
        if name in self.taken:
            raise ApiError(400, f"{name!r} names a model of this server; choose another name", "lora_name")
        folder = self._checked(path)

        def add() -> None:
            new = prepare_expert(self.engine.model, name, folder, examples=examples, tokenizer=self.tokenizer)
            new.add(self.engine.paused, self.room)

        await self._change(add)

    async def unload(self, name: str) -> None:
        """Removes an expert; requests that run go on without it.

        Raises:
            ApiError: an unknown name, the last expert, or a router that is trained for its experts.
        """
        self._check_changeable()

        def delete() -> None:
            there = self.engine.tracer.expert_names
            if name not in there:
                raise ApiError(404, f"there is no expert {name!r}", "lora_name", "model_not_found")
            if there == [name]:
                raise ApiError(400, f"{name!r} is the last expert; load another one first", "lora_name")
            vacate_expert(self.engine.model, name, self.engine.paused)

        await self._change(delete)

    async def _change(self, change: Any) -> None:
        async with self._one_at_a_time:
            try:
                await asyncio.to_thread(change)
            except (ValueError, OSError, RuntimeError) as error:
                raise ApiError(400, " ".join(str(error).split()), "lora_name") from error

    def _check_changeable(self) -> None:
        if self.engine.error:
            raise ApiError(503, f"the engine failed: {self.engine.error}")
        if not self.engine.tracer.available:
            raise ApiError(400, "experts cannot change here, because this model is no mixture")

    def _checked(self, path: str) -> Path:
        """The directory of an adapter, links resolved."""
        try:
            folder = Path(path).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a null byte, links in a circle
            raise ApiError(400, f"lora_path {path[:100]!r} is no path: {error}", "lora_path") from error
        if not any(folder.is_relative_to(allowed.resolve()) for allowed in self.allowed):
            where = ", ".join(map(str, self.allowed)) or "nowhere: start the server with --adapter-dir"
            raise ApiError(403, f"lora_path {path[:100]!r} is not allowed; adapters may lie below {where}", "lora_path")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            file = folder / name
            if not os.path.isfile(file):  # unlike Path's, this takes names that are too long
                raise ApiError(
                    400,
                    f"{path[:100]!r} has no {name}; adapter_config.json and adapter_model.safetensors are read, and "
                    "nothing else",
                    "lora_path",
                )
            if not file.resolve().is_relative_to(folder):
                raise ApiError(403, f"{name} is a link that leads out of its directory", "lora_path")
            if (size := file.stat().st_size) > self.max_bytes:
                raise ApiError(413, f"{name} has {size:,} bytes, and {self.max_bytes:,} are allowed", "lora_path")
        return folder
