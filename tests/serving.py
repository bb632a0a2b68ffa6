"""An engine that runs inside a test, the offline answers that it must give."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import torch

from molora import record_routing
from molora.serve.engine import Engine, Request
from molora.serve.limits import Limits
from molora.serve.tracing import TokenRouting

Value = TypeVar("Value")


def small_engine(model: Any, eos: Sequence[int] = (), **limits: Any) -> Engine:
    return Engine(model, list(eos), Limits(**{"max_model_len": 64, "cache_tokens": 2048, **limits}))


def prompts_of(lengths: Sequence[int], vocab: int = 97, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]


def greedy(prompt: Sequence[int], max_tokens: int = 8, **options: Any) -> Request:
    return Request(prompt_ids=list(prompt), max_tokens=max_tokens, temperature=0.0, **options)


@torch.no_grad()
def offline(model: Any, prompt: Sequence[int], max_tokens: int = 8, eos: Sequence[int] = ()) -> list[int]:
    """The greedy answer by transformers' own `generate`, alone in its batch, without the end token."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=list(eos) or -1,
        pad_token_id=0,
    )
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer[:-1] if answer and answer[-1] in eos else answer


@torch.no_grad()
def offline_gates(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> list[torch.Tensor]:
    """For each token of an answer the gates (routers, G) at the position that produced it, in one forward of all."""
    with record_routing(model) as routing:
        model(input_ids=torch.tensor([[*prompt, *answer]]))
    gates = torch.stack([found.gates.float() for found in routing.values()], 1)
    return list(gates[len(prompt) - 1 : len(prompt) + len(answer) - 1])


async def collected(engine: Engine, request: Request) -> tuple[list[int], list[TokenRouting], str | None]:
    tokens, routing, reason = list[int](), list[TokenRouting](), None
    with engine.places(1):
        async for step in engine.stream(request):
            tokens += step.tokens
            routing += step.routing
            reason = step.finish_reason
    return tokens, routing, reason


@asynccontextmanager
async def started(engine: Engine) -> AsyncIterator[Engine]:
    engine.start()
    try:
        yield engine
    finally:
        await engine.stop(0.0)


def with_engine(engine: Engine, work: Callable[[Engine], Awaitable[Value]]) -> Value:
    """What a coroutine returns that is given the running engine."""

    async def run() -> Value:
        async with started(engine):
            return await work(engine)

    return asyncio.run(run())


def answers(engine: Engine, requests: Sequence[Request]) -> list[tuple[list[int], list[TokenRouting], str | None]]:
    """All at once."""

    async def work(engine: Engine) -> Any:
        return await asyncio.gather(*(collected(engine, request) for request in requests))

    return with_engine(engine, work)
