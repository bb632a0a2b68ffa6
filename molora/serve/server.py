"""What a server knows: its model and names, and how a checked request becomes an answer."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from molora.serve.answers import Piece
from molora.serve.engine import Engine, EngineError, Request
from molora.serve.metrics import Metrics
from molora.serve.pool import ExpertPool
from molora.serve.protocol import ApiError, ChatRequest, CompletionRequest
from molora.serve.steering import Steering, parse_steering
from molora.serve.text import TextStream
from molora.serve.tracing import TokenRouting

Body = ChatRequest | CompletionRequest


@dataclass(kw_only=True)
class Server:
    """One model behind an endpoint.

    Attributes:
        name: by which requests ask for the mixture; each expert's name asks for that expert alone.
        base_name: by which they ask for the base without experts; None where that cannot be had.
        api_key: what requests to /v1 must bear; None: nothing.
    """

    engine: Engine
    tokenizer: Any
    name: str
    pool: ExpertPool
    base_name: str | None = None
    api_key: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(lambda: self.engine.open)

    @property
    def model_names(self) -> list[str]:
        steerable = self.engine.tracer.available
        own = [self.name, *([self.base_name] if self.base_name and steerable else [])]
        return own + ([name for name in self.engine.tracer.expert_names if name not in own] if steerable else [])

    def kind(self, name: str) -> str:
        """What the model of that name is: "mixture", "expert" (one alone) or "base" (none)."""
        if name == self.name:
            return "base" if self.engine.tracer.runtime is None else "mixture"
        return "base" if name == self.base_name else "expert"

    def card(self, name: str) -> dict[str, Any]:
        """A model as /v1/models shows it."""
        engine = self.engine
        owned = {"object": "model", "created": self.created, "owned_by": "molora", "root": self.name}
        # molora's own: what a client may ask of it, so that nobody has to try.
        offers = {"chat": bool(self.tokenizer.chat_template), "routed_experts": engine.tracer.available}
        return {"id": name, **owned, "max_model_len": engine.limits.max_model_len, "kind": self.kind(name), **offers}

    def check_model(self, name: str) -> None:
        """Raises ApiError where no model has that name."""
        if name not in self.model_names:
            known = ", ".join(self.model_names[:10])
            raise ApiError(404, f"there is no model {name[:100]!r}; there are {known}", "model", "model_not_found")

    def check_count(self, body: Body) -> None:
        """Raises ApiError for more prompts than ever have room, before thousands of them are tokenized."""
        prompt = body.prompt if isinstance(body, CompletionRequest) else ""
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            try:
                self.engine.check_count(len(prompt))
            except EngineError as error:
                raise ApiError(error.status, str(error), "prompt") from error

    def prompts(self, body: Body) -> list[list[int]]:
        """Token ids of each prompt of a request.

        Raises:
            ApiError: a prompt that is empty, too long, or no conversation that the chat template takes.
        """
        if isinstance(body, ChatRequest):
            return [self._chat_ids(body)]
        prompt: Any = body.prompt
        several = bool(prompt) and isinstance(prompt, list) and not isinstance(prompt[0], int)
        found = []
        for one in prompt if several else [prompt]:
            found.append(self.tokenizer(one, verbose=False)["input_ids"] if isinstance(one, str) else list(one))
        vocab = self.engine.model.config.vocab_size
        for ids in found:
            if not ids:
                raise ApiError(400, "prompt is empty; give some text or token ids", "prompt")
            if max(ids) >= vocab:
                raise ApiError(400, f"prompt: token id {max(ids)} is outside the vocabulary of {vocab}", "prompt")
        if not found:
            raise ApiError(400, "prompt is empty; give some text or token ids", "prompt")
        return found

    def _chat_ids(self, body: ChatRequest) -> list[int]:
        if not self.tokenizer.chat_template:
            raise ApiError(400, "this model's tokenizer has no chat template; use /v1/completions", "messages")
        turns = [{"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in body.messages]
        try:
            out = self.tokenizer.apply_chat_template(
                turns, tokenize=True, return_dict=True, add_generation_prompt=True, tokenizer_kwargs={"verbose": False}
            )
        except Exception as error:  # templates raise what they like
            raise ApiError(400, f"the chat template does not take these messages: {error}", "messages") from error
        return list(out["input_ids"])

    def request(self, body: Body, prompt_ids: list[int]) -> Request:
        """A request for the engine.

        Raises:
            ApiError: an unknown model, too many tokens, or a wish about experts that cannot be met.
        """
        steering = self._steering(body)
        longest, field_name = (
            self.engine.limits.max_model_len,
            "messages" if isinstance(body, ChatRequest) else "prompt",
        )
        if len(prompt_ids) >= longest:
            raise ApiError(
                400,
                f"the prompt has {len(prompt_ids)} tokens, and prompt and answer may have {longest} together",
                field_name,
                "context_length_exceeded",
            )
        wanted, room = body.wanted_tokens, longest - len(prompt_ids)
        if wanted is not None and wanted > room:
            own = getattr(body, "max_completion_tokens", None) is not None
            limit = "max_completion_tokens" if own else "max_tokens"
            raise ApiError(
                400,
                f"{limit}={wanted}, but after the prompt of {len(prompt_ids)} tokens there is room for {room} "
                f"of {longest}",
                limit,
                "context_length_exceeded",
            )
        return Request(
            prompt_ids=prompt_ids,
            max_tokens=room if wanted is None else wanted,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            traced=bool(body.routed_experts),
            steering=steering,
        )

    def _steering(self, body: Body) -> Steering | None:
        tracer = self.engine.tracer
        self.check_model(body.model)
        for name in ("routed_experts", "experts"):
            if getattr(body, name) and not tracer.available:
                raise ApiError(400, f"{name} is not offered, because this model is no mixture", name)
        if body.model == self.base_name:
            chosen: Steering | None = Steering(bare=True)
        else:
            chosen = None if body.model == self.name else Steering(favour={body.model: 1.0})
        if not body.experts:
            return chosen
        if chosen is not None:
            raise ApiError(400, f"experts goes with the model {self.name!r}, not with {body.model!r}", "experts")
        try:
            return parse_steering(body.experts, tracer.expert_names)
        except ValueError as error:
            raise ApiError(400, str(error), "experts") from error

    async def answer(self, request: Request, stops: list[str]) -> AsyncGenerator[Piece]:
        """The pieces of one answer as they come; at least one, of which the last has a finish reason.

        Raises:
            ApiError: the engine refused or failed.
        """
        text = TextStream(self.tokenizer, request.prompt_ids, stops)
        self.metrics.prompt_tokens.inc(len(request.prompt_ids))
        last, routing = time.perf_counter(), list[TokenRouting]()
        timer = self.metrics.first_token
        try:
            async with aclosing(self.engine.stream(request)) as steps:
                async for step in steps:
                    now = time.perf_counter()
                    timer.observe(now - last)
                    last, timer = now, self.metrics.between_tokens
                    self.metrics.tokens.inc(len(step.tokens))
                    self.metrics.count_shares(step.routing)
                    routing += step.routing
                    texts = text.push(step.tokens)
                    reason = "stop" if text.stopped else step.finish_reason
                    if step.finish_reason:
                        texts += text.finish()
                    yield Piece(texts, routing[: len(texts)], reason)
                    del routing[: len(texts)]
                    if reason:
                        return
        except EngineError as error:
            raise ApiError(error.status, str(error)) from error
