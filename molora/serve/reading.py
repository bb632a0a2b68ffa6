"""Prompts of a served retrieval router: each is read once, beside the batch that runs, and holds for its answer."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from molora.context import runtime_of
from molora.layers import MoloraLayer
from molora.prompts import embed_prompts, embed_texts, retrieval_site


def reader_of(model: Any, tokenizer: Any) -> PromptReader | None:
    """What reads the prompts of this model's requests; None where no router chooses by the prompt."""
    try:
        found = retrieval_site(runtime_of(model))
    except ValueError:  # no mixture
        return None
    return None if found is None else PromptReader(model, tokenizer)


class PromptReader:
    """Embeds prompts as `generate` does, in a thread of its own, and tells a batch whose tokens answer which.

    The router then chooses for each token by the prompt of its request, in the forward, among the experts that there
    are; nothing of its choice is written twice. Prompts are read by a second trunk of the base without adapters, which
    shares the weights and ends at the layer that is read: a forward of the engine sees nothing of it.

    Args:
        model: with a retrieval router; its attention as it is when no engine has changed it yet.
        tokenizer: for a router whose embedder reads text.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        runtime = runtime_of(model)
        found, base = retrieval_site(runtime), runtime.model()
        assert found is not None and base is not None
        self.router, self.config = found
        """The router's name among `ForwardInputs.embeddings`, and its config."""
        router: Any = next(site.router for site in runtime.sites if site.live and site.name == self.router)
        self._unread = torch.zeros(router.vectors.shape[1], dtype=torch.float64)
        self.tokenizer, self.device = tokenizer, model.device
        if not self.config.reads_text:
            self._trunk, self._layer = trunk_until(base, self.router)
        self._thread, self._closed = ThreadPoolExecutor(1, "molora-prompts"), False
        self._vectors: dict[str, Tensor] = {}
        self._last: tuple[tuple[str, ...], Tensor] | None = None

    async def read(self, request: str, prompt_ids: Sequence[int]) -> None:
        """Embeds the prompt of a request, before the first forward that has tokens of it; `forget` belongs to it."""
        loop = asyncio.get_running_loop()
        self._vectors[request] = await loop.run_in_executor(self._thread, self.embed, prompt_ids)

    def embed(self, prompt_ids: Sequence[int]) -> Tensor:
        """The vector of one prompt: (D',) fp64 on the CPU, whence every stream of a device may take it.

        Raises:
            RuntimeError: the reader is closed.
        """
        if self._closed:
            raise RuntimeError("the server is shutting down")
        ids = torch.tensor([list(prompt_ids)], device=self.device)
        if self.config.reads_text:
            return embed_texts(self.config, ids, None, self.tokenizer)[0].double().cpu()
        return embed_prompts(self._trunk, self._layer, ids)[0].cpu()

    def forget(self, request: str) -> None:
        self._vectors.pop(request, None)

    def of_batch(self, batch: Sequence[tuple[str, int]], positions: int) -> Tensor:
        """For each position of a packed batch the vector of its request's prompt: (positions, D') fp64.

        Args:
            batch: each request and how many positions it has; those behind them are padding.

        Returns:
            Zeros for padding, for requests that are leaving and for those whose prompt was not read.
        """
        names = tuple(name for name, _ in batch)
        if self._last is None or self._last[0] != names:  # from one token to the next they mostly are the same
            rows = [self._vectors.get(name, self._unread) for name in names]
            self._last = names, torch.stack([*rows, self._unread]).to(self.device)
        lengths = [length for _, length in batch]
        lengths.append(positions - sum(lengths))
        owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        return self._last[1][owner.to(self.device)]

    def close(self) -> None:
        """Reads no more prompts; those that wait get the error."""
        self._closed = True
        self._thread.shutdown(wait=False)


def trunk_until(base: Any, layer: str) -> tuple[nn.Module, str]:
    """A model of the decoder layers up to one, without adapters and head, and the layer's name in it.

    Its modules are new, its weights and the linears below mixtures are those of `base`.
    """
    trunk: nn.Module = base.base_model
    name = next(name for name, module in trunk.named_modules() if module is base.get_submodule(layer))
    mixed = {id(module): module.get_base_layer() for module in trunk.modules() if isinstance(module, MoloraLayer)}
    weights = {id(tensor): tensor for tensor in itertools.chain(trunk.parameters(), trunk.buffers())}
    trunk = copy.deepcopy(trunk, {**weights, **mixed})
    stack, _, number = name.rpartition(".")
    del trunk.get_submodule(stack)[int(number) + 1 :]  # type: ignore[operator]
    return trunk, name
