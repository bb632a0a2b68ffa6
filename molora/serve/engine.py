"""The engine: requests in, tokens out, over transformers' continuous batching; all requests share one model."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from molora.integrations.continuous_batching import (
    drop_graphs,
    fatal_error,
    forget,
    make_manager,
    sampling_arguments,
)
from molora.serve.limits import Limits
from molora.serve.reading import reader_of
from molora.serve.steering import Steering
from molora.serve.tracing import TokenRouting, Tracer

LOOK_S = 1.0
"""A request that waits looks so often whether the engine runs: one that was being handed over when it ended is in no
list of the manager's, which tells the others."""


class EngineError(Exception):
    """What ends a request from inside.

    Attributes:
        status: as an HTTP status.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One answer to one prompt.

    Attributes:
        prompt_ids: at least one token.
        temperature: 0 is greedy.
        seed: of the sampling; None: a new one.
        traced: whether the routing of each token is wanted.
        steering: what the routers are told of its tokens; None: nothing.
    """

    prompt_ids: list[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    traced: bool = False
    steering: Steering | None = None


@dataclass(slots=True)
class Step:
    """New tokens of a request.

    Attributes:
        routing: of each token, where it was asked for.
        finish_reason: "stop" or "length" with the last tokens, else None.
    """

    tokens: list[int]
    routing: list[TokenRouting] = field(default_factory=list)
    finish_reason: str | None = None


class Engine:
    """Runs a model for many requests at once, in a thread of its own.

    Args:
        model: a causal LM in eval mode, with or without adapters; this engine alone uses it from now on.
        eos_token_ids: tokens that end an answer; they are not part of it.
        limits: what is taken at once.
        cuda_graph: None: on a GPU; a router that reads prompts runs without.
        tokenizer: for a router that reads prompts as text.

    Raises:
        ValueError: CUDA graphs with a router that reads prompts.
    """

    def __init__(
        self,
        model: Any,
        eos_token_ids: list[int],
        limits: Limits,
        cuda_graph: bool | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.model, self.eos_token_ids, self.limits = model.eval(), list(eos_token_ids), limits
        self.reader = reader_of(model, tokenizer)  # before the manager changes the model's attention
        if self.reader is not None:
            if cuda_graph:
                raise ValueError(
                    f"router {self.reader.config.name!r} is told each request's prompt before a forward, which CUDA "
                    "graphs do not see; leave cuda_graph out"
                )
            cuda_graph = False
        self.manager = make_manager(
            model,
            num_blocks=math.ceil(limits.cache_tokens / limits.page_size),
            page_size=limits.page_size,
            max_model_len=limits.max_model_len,
            max_batch_tokens=limits.max_batch_tokens,
            max_requests=limits.max_running,
            cuda_graph=cuda_graph,
        )
        self.tracer = Tracer(model, self.manager, self.reader)
        self.open = 0
        """Requests that run or wait."""
        self._closes = math.inf
        """Monotonic seconds at which all requests end."""
        self._ended = False
        self._numbers = itertools.count()

    def start(self) -> None:
        self.manager.start()

    @property
    def error(self) -> str | None:
        """Why no request can be served any more."""
        return fatal_error(self.manager) or (None if self.manager.is_running() else "the engine does not run")

    def close(self, drain_s: float) -> None:
        """From now on no request is taken; those there are get an error if they run for longer than this."""
        self._closes = min(self._closes, time.monotonic() + drain_s)

    async def stop(self, drain_s: float) -> None:
        """Closes, waits for the requests there are, and ends."""
        self.close(drain_s)
        while self.open and time.monotonic() < self._closes:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self.end)

    def end(self) -> None:
        """Ends at once, however often it is called; without it the engine's thread keeps the process alive."""
        self.close(0.0)
        if not self._ended:
            self._ended = True
            self.manager.stop(block=True, timeout=10.0, hard_stop=True)
            self.tracer.remove()
            if self.reader is not None:
                self.reader.close()

    @contextmanager
    def paused(self, moves: bool) -> Iterator[None]:
        """No forward runs inside, so that the model may change; requests keep their caches and go on behind it.

        For a thread, not an event loop.

        Args:
            moves: whether tensors of the model are replaced: CUDA graphs that read the old ones are captured anew.
        """
        with self.manager.pause():
            try:
                yield
            finally:  # a change that failed half-way may have left other tensors too
                if moves:
                    drop_graphs(self.manager)
                if self.model.device.type == "cuda":
                    torch.cuda.synchronize(self.model.device)  # the engine's stream does not wait for this thread's

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Room for so many requests, from before their first byte to behind their last.

        Raises:
            EngineError: there is not so much, now or ever.
        """
        self._check()
        self.check_count(count)
        most = self.limits.max_running + self.limits.max_waiting
        if self.open + count > most:
            raise EngineError(429, f"{self.open} requests run or wait, and {most} may; try again later")
        self.open += count
        try:
            yield
        finally:
            self.open -= count

    def check_count(self, count: int) -> None:
        """Raises EngineError for more requests at once than ever have room."""
        most = self.limits.max_running + self.limits.max_waiting
        if count > most:
            raise EngineError(400, f"{count} prompts in one request, and {most} may run or wait; send fewer at a time")

    def _check(self) -> None:
        if self._closes < math.inf:
            raise EngineError(503, "the server is shutting down")
        if self.error:
            raise EngineError(503, f"the engine failed: {self.error}")

    async def stream(self, request: Request) -> AsyncGenerator[Step]:
        """The answer's tokens as they come, for who has a place. Leaving the iteration cancels the request.

        Raises:
            EngineError: the engine failed, the time limit is over, or the expert that was forced has gone.
        """
        name = f"r{next(self._numbers)}"
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        finished, ends = False, time.monotonic() + self.limits.timeout_s
        self.tracer.begin(name, request.traced, request.steering)
        try:
            await self._read(name, request, ends)
            self.manager.register_result_handler(name, outputs.put_nowait)
            accepted = self.manager.add_request(
                request.prompt_ids,
                request_id=name,
                max_new_tokens=request.max_tokens,
                streaming=True,
                eos_token_id=self.eos_token_ids,
                **sampling_arguments(request.temperature, request.top_p, request.seed),
            )
            if accepted is None:
                raise EngineError(503, f"the engine takes no request: {self.error or 'it is stopping'}")
            seen = 0
            while not finished:
                now = time.monotonic()
                if now >= self._closes:
                    raise EngineError(503, "the server is shutting down")
                if now >= ends:
                    raise self._too_slow()
                try:
                    output = await asyncio.wait_for(outputs.get(), min(LOOK_S, ends - now, self._closes - now))
                except TimeoutError:
                    if self.error:
                        raise EngineError(503, f"the engine failed: {self.error}") from None
                    continue
                finished = output.is_finished()
                if output.error is not None:
                    raise EngineError(503, f"the engine failed: {output.error}")
                forced = request.steering and request.steering.forced
                if forced and forced not in self.tracer.expert_names:
                    raise EngineError(404, f"expert {forced!r} was unloaded while it answered")
                tokens = output.generated_tokens[seen:]
                seen += len(tokens)
                routing = self.tracer.take(name, len(tokens)) if request.traced else []
                ended = bool(finished and tokens and tokens[-1] in self.eos_token_ids)
                if ended:
                    tokens, routing = tokens[:-1], routing[: len(tokens) - 1]
                yield Step(tokens, routing, ("stop" if ended else "length") if finished else None)
        finally:
            self.tracer.end(name)
            if not finished:
                forget(self.manager, name)

    async def _read(self, name: str, request: Request, ends: float) -> None:
        """Has the prompt read where the router chooses by it; the bare base needs no choice."""
        if self.reader is None or (request.steering is not None and request.steering.bare):
            return
        try:
            await asyncio.wait_for(self.reader.read(name, request.prompt_ids), ends - time.monotonic())
        except TimeoutError:
            raise self._too_slow() from None
        except RuntimeError as error:  # out of memory, or the thread has ended
            raise EngineError(503, f"the prompt could not be read: {error}") from error

    def _too_slow(self) -> EngineError:
        return EngineError(504, f"the answer took more than {self.limits.timeout_s:g} seconds")
