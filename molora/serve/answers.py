"""Answers in OpenAI's words: whole objects, or chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from molora.serve.tracing import TokenRouting


@dataclass(slots=True)
class Piece:
    """A part of one answer: the text of each of its tokens, where asked for their routing, and at last why it ends."""

    texts: list[str]
    routing: list[TokenRouting] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def tokens(self) -> int:
        return len(self.texts)


def joined(pieces: Sequence[Piece]) -> Piece:
    """The pieces of an answer as one."""
    routing = [token for piece in pieces for token in piece.routing]
    reason = pieces[-1].finish_reason if pieces else "length"
    return Piece([text for piece in pieces for text in piece.texts], routing, reason)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


class Format:
    """The objects of one request.

    Args:
        chat: chat completions, else plain ones.
        routed: None, "mean" or "layers": how much of the routing is told.
        tracer: knows the names of the routers.
    """

    def __init__(self, model: str, chat: bool, routed: str | None, tracer: Any) -> None:
        self.model, self.chat, self.routed, self.tracer = model, chat, routed, tracer
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self, answers: Sequence[Piece], prompt_tokens: int) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        choices = []
        for index, answer in enumerate(answers):
            said: dict[str, Any] = {"text": answer.text}
            if self.chat:
                said = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
            choices.append(self._choice(index, answer) | said)
        total = usage(prompt_tokens, sum(answer.tokens for answer in answers))
        return self._object("") | {"choices": choices, "usage": total}

    def first(self) -> dict[str, Any] | None:
        """A chat's first chunk, which says who speaks."""
        if not self.chat:
            return None
        return self._object(".chunk") | {
            "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
        }

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """A later chunk."""
        said: dict[str, Any] = {"delta": {"content": piece.text} if piece.text else {}} if self.chat else {}
        return self._object(".chunk") | {"choices": [self._choice(index, piece) | (said or {"text": piece.text})]}

    def last(self, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        """The chunk that tells the usage."""
        return self._object(".chunk") | {"choices": [], "usage": usage(prompt_tokens, completion_tokens)}

    def _object(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": piece.finish_reason, "logprobs": None}
        if self.routed is not None:
            choice["routed_experts"] = self._routed(piece)
        return choice

    def _routed(self, piece: Piece) -> dict[str, Any]:
        """``experts`` the names, ``texts`` (tokens,) that add up to the piece's, ``shares`` (tokens, experts); and by
        layer ``routers`` and ``gates`` (tokens, routers, experts), shares and gates rounded to four digits. An expert
        that was not there when a token was made has 0."""
        names = list(dict.fromkeys(name for token in piece.routing for name in token.experts))
        found: dict[str, Any] = {"experts": names, "texts": piece.texts}
        found["shares"] = [_by_name(names, token, token.share) for token in piece.routing]
        if self.routed == "layers":
            found["routers"] = list(self.tracer.router_names)
            found["gates"] = [[_by_name(names, token, gates) for gates in token.gates] for token in piece.routing]
        return found


def _by_name(names: Sequence[str], token: TokenRouting, values: Tensor) -> list[float]:
    found = dict(zip(token.experts, values.tolist(), strict=True))
    return [round(found.get(name, 0.0), 4) for name in names]
