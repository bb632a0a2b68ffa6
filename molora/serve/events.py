"""Answers as server-sent events, as their tokens come."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import ExitStack, aclosing
from typing import Any

from fastapi.responses import StreamingResponse

from molora.serve.answers import Format, Piece
from molora.serve.protocol import ApiError


class EventStream(StreamingResponse):
    """The events of one request; however it ends, the answers are closed and their places given back.

    Args:
        answers: those that `form` gives a shape.
        prompt_tokens: of the usage; None: no usage is told.
        places: what the request holds.
        longest_s: who has not read the events by then is cut off.
    """

    def __init__(
        self,
        form: Format,
        answers: Sequence[AsyncGenerator[Piece]],
        prompt_tokens: int | None,
        places: ExitStack,
        longest_s: float,
    ) -> None:
        self.form, self.answers, self.prompt_tokens = form, answers, prompt_tokens
        self.places, self.longest_s, self.outcome = places, longest_s, 499
        self.events = self._events()
        super().__init__(self.events, media_type="text/event-stream")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self.places:
            try:
                async with asyncio.timeout(self.longest_s), aclosing(self.events):
                    await super().__call__(scope, receive, send)
            except TimeoutError:  # nobody reads: there is no use in telling it
                self.outcome = 504
            finally:
                scope["outcome"] = self.outcome

    async def _events(self) -> AsyncGenerator[str]:
        """An error behind the first byte becomes an event of its own."""
        made, form = 0, self.form
        extra: dict[str, Any] = {} if self.prompt_tokens is None else {"usage": None}
        first = form.first()
        if first is not None:
            yield _event(first | extra)
        try:
            async with aclosing(_merged(self.answers)) as pieces:
                async for index, piece in pieces:
                    made += piece.tokens
                    if piece.text or piece.routing or piece.finish_reason:
                        yield _event(form.chunk(index, piece) | extra)
        except ApiError as error:
            self.outcome = error.status
            yield _event(error.body)
            return
        if self.prompt_tokens is not None:
            yield _event(form.last(self.prompt_tokens, made))
        self.outcome = 200
        yield "data: [DONE]\n\n"


async def _merged(answers: Sequence[AsyncGenerator[Piece]]) -> AsyncGenerator[tuple[int, Piece]]:
    """The pieces of several answers as they come, each with its number."""
    if len(answers) == 1:
        async with aclosing(answers[0]) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    queue: asyncio.Queue[Any] = asyncio.Queue()

    async def pump(index: int, answer: AsyncIterator[Piece]) -> None:
        try:
            async for piece in answer:
                queue.put_nowait((index, piece))
        except ApiError as error:
            queue.put_nowait(error)
        finally:
            queue.put_nowait(None)

    tasks = [asyncio.ensure_future(pump(index, answer)) for index, answer in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, ApiError):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _event(data: dict[str, Any]) -> str:
    # ASCII: clients split lines at U+0085, U+2028 and U+2029 too.
    return f"data: {json.dumps(data)}\n\n"
