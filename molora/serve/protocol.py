"""The bodies that OpenAI's clients send, checked; what one request cannot have is refused by the name of its field."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

INT64 = 2**63 - 1

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
"""Lists stop at their first mistake: a body of a million of them would hold up every other request."""


class ApiError(Exception):
    """An answer in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """`ApiError.body`, for the schema of the API."""

    error: ErrorDetail


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None
    """Accepted and without effect: a padding against observers of the line's timing."""


class _Sampling(_Strict):
    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64, le=INT64)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Accepted and without effect, as are `metadata` and `safety_identifier`."""
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    routed_experts: bool | Literal["layers"] | None = None
    """molora: true adds each token's shares of the experts, averaged over routers; "layers" all gates too."""
    experts: dict[str, Any] | None = None
    """molora: ``{"force": NAME}`` or ``{"forbid": [NAME], "hint": {NAME: PART}}``."""

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def wanted_tokens(self) -> int | None:
        raise NotImplementedError


class CompletionRequest(_Sampling):
    prompt: Annotated[
        str | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True)], Field(union_mode="left_to_right")
    ]
    max_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # as OpenAI has it


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None
    refusal: None = None
    """This and what follows stands in an answer that a client gives back as it got it."""
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Sampling):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class LoadRequest(_Strict):
    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: str
    examples: Annotated[Texts, Field(max_length=1000)] | None = None
    """molora: prompts of the expert, for routers that know experts by them; others wait while they are read."""


class UnloadRequest(_Strict):
    lora_name: str
    lora_int_id: int | None = None
    """vLLM's; accepted and without effect."""


# Fields of OpenAI's whose other values would change the answer in ways that are not offered.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "prompt_cache_key": (None,),
}

# What a field that may be one of several things may be; pydantic would name the first of them.
_SEVERAL = {
    "prompt": "prompt must be text, a list of token ids (0 or more), or a list of either",
    "stop": "stop must be a string or a list of at most 16 strings",
    "routed_experts": 'routed_experts must be true, false or "layers"',
}

Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], raw: bytes) -> Body:
    """A request's body.

    Raises:
        ApiError: 400, with the field as its param.
    """
    try:
        data = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(data).__name__}")
    for field, neutral in _NEUTRAL.items():
        if field in kind.model_fields or field not in data:
            continue
        value = data.pop(field)
        if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in neutral):
            raise ApiError(400, f"{field}={repr(value)[:100]} is not offered by this server; leave it out", field)
    if not _encodable(data):
        raise ApiError(400, "the body holds a lone surrogate, which is no character")
    for field in data:  # before pydantic, which would make an error of each
        if field not in kind.model_fields:
            raise ApiError(400, f"unknown field {field[:100]!r}", field[:100])
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = [str(part)[:100] for part in first["loc"]]
        name = where[0] if where else None
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"unknown field {'.'.join(where)!r}", name) from error
        got = "" if first["type"] == "missing" else f", got {_short(first['input'])}"
        several = _SEVERAL.get(name or "") if got else None
        if several:
            raise ApiError(400, f"{several}, got {_short(data[name])}", name) from error
        raise ApiError(400, f"{'.'.join(where)}: {first['msg'].lower()}{got}", name) from error


def _short(value: Any) -> str:
    part = value[:50] if isinstance(value, (str, list)) else value
    return repr(part)[:100]


def _encodable(data: Any) -> bool:
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, RecursionError):
        return False
    return True
