"""A traced request whose client hangs up while its forward runs takes nobody with it."""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from peft import get_peft_model
from tiny_models import base_model, config

from molora.serve.engine import Engine, Request
from molora.serve.limits import Limits


def test_a_request_that_leaves_during_a_forward_ends_only_itself() -> None:
    torch.manual_seed(0)
    engine = Engine(get_peft_model(base_model(), config()), [], Limits(max_model_len=32, cache_tokens=256))
    after = engine.tracer._after
    left: list[str] = []

    def leaving(module: Any, args: Any, output: Any) -> None:
        """The first of two traced requests leaves when its routing is recorded and not yet handed out."""
        if len(engine.tracer._wants) == 2 and not left:
            left.append(next(iter(engine.tracer._wants)))
            engine.tracer.end(left[0])
        after(module, args, output)

    engine.tracer._hooks[1].remove()
    engine.tracer._hooks[1] = engine.manager.model.register_forward_hook(leaving)

    async def answers() -> list[Any]:
        async def one(prompt: list[int]) -> int:
            request = Request(prompt_ids=prompt, max_tokens=8, temperature=0.0, traced=True)
            return sum([len(step.routing) async for step in engine.stream(request)])

        engine.start()
        found = await asyncio.gather(one([5, 6, 7]), one([8, 9]), return_exceptions=True)
        error = engine.error
        await engine.stop(0.0)
        return [*found, error]

    first, second, error = asyncio.run(answers())
    assert left == ["r0"] and isinstance(first, KeyError)  # it was taken from the tracer under its feet
    assert second == 8 and error is None
