"""Conversations to token ids, by the tokenizer's chat template: where the replies are, and what ends them."""

from __future__ import annotations

import re
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from molora.eval.tasks import NullFieldError, TaskConfig, check_role, fill

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def conversation(row: dict[str, Any], task: TaskConfig) -> list[dict[str, Any]]:
    """The turns of a row: its column ``messages`` (ShareGPT's ``from`` and ``value`` too), or the filled templates.

    Raises:
        NullFieldError: the content of a turn is null.
        ValueError: no list of turns, an unknown role, no reply of the assistant, or a content that is not text.
    """
    if not isinstance(task.messages, str):
        return [{"role": turn["role"], "content": fill(turn["content"], row)} for turn in task.turns]
    value = row[task.messages]
    turns = [_turn(turn) for turn in value] if isinstance(value, list) else [None]
    found = [turn for turn in turns if turn is not None]
    for turn in found:
        check_role(turn["role"], task)
    if len(found) < len(turns) or not any(turn["role"] == "assistant" for turn in found):
        raise ValueError(
            f"task {task.name!r}: column {task.messages!r} must hold a list of {{role, content}} with at least one "
            f"reply of the role 'assistant', got {str(value)[:200]}"
        )
    return [turn | {"content": _text(turn, number, task)} for number, turn in enumerate(found, start=1)]


def _text(turn: dict[str, Any], number: int, task: TaskConfig) -> str:
    """The content of a turn, its parts joined."""
    content = turn["content"]
    if isinstance(content, str):
        return content
    where = f"turn {number} ({turn['role']}) of the column {task.messages!r}"
    if content is None:
        raise NullFieldError(f"{where} has null as its content")
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"task {task.name!r}: {where} must be a text, or a list of parts {{type: text, text: ...}}, got "
            f"{str(content)[:200]}; leave out such rows"
        )
    return "".join(map(str, texts))


def _turn(turn: Any) -> dict[str, Any] | None:
    """A turn with role and content; ``None`` if it is none."""
    if not isinstance(turn, dict):
        return None
    if turn.get("role") is not None and "content" in turn:
        return turn
    if turn.get("from") is not None and "value" in turn:
        return {"role": SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
    return None


def encode_conversation(
    messages: list[dict[str, Any]], task: TaskConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """A conversation by the chat template, and which of its tokens are the assistant's replies.

    The replies come from the template's own ``{% generation %}`` mask. A template without one is rendered turn by turn;
    every shorter rendering must then be a prefix of the whole, or the replies cannot be located.

    Raises:
        ValueError: no chat template, one that refuses the conversation, or replies that cannot be located.
    """
    template = _template(task, tokenizer)
    if task.loss == "all" or not any(m["role"] == "assistant" and _has_text(m) for m in messages):
        # All tokens carry loss, or none: there is no reply to locate.
        ids = _render(messages, task, tokenizer, prompt=False)["input_ids"]
        return ids, [False] * len(ids)
    if re.search(r"\{%-?\s*generation", template):
        return _by_marks(messages, task, tokenizer)
    input_ids = _render(messages, task, tokenizer, prompt=False)["input_ids"]
    kept = [False] * len(input_ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or not _has_text(message):
            continue
        start = _render(messages[:turn], task, tokenizer, prompt=True)["input_ids"]
        stop = _render(messages[: turn + 1], task, tokenizer, prompt=False)["input_ids"]
        if input_ids[: len(stop)] != stop or stop[: len(start)] != start:
            raise ValueError(
                f"task {task.name!r}: the chat template has no {{% generation %}} marks, and it rewrites earlier turns "
                "or joins turns by plain text that the tokenizer merges with what follows, so the assistant's tokens "
                "cannot be located; add the marks to the template or set loss: all"
            )
        # What the template writes behind the end of the turn is never generated.
        end = _end_of_turn(stop, tokenizer)
        stops = len(stop) if end is None or end < len(start) else end + 1
        kept[len(start) : stops] = [True] * (stops - len(start))
    return input_ids, kept


def _by_marks(
    messages: list[dict[str, Any]], task: TaskConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """What the template marks, but for replies without text."""

    def marked(turns: list[dict[str, Any]]) -> tuple[list[int], list[bool], list[tuple[int, int]]]:
        if not turns:
            return [], [], []
        out = _render(turns, task, tokenizer, prompt=False, return_assistant_tokens_mask=True)
        mask = [bool(kept) for kept in out["assistant_masks"]]
        edges = [i for i in range(len(mask) + 1) if (i > 0 and mask[i - 1]) != (i < len(mask) and mask[i])]
        return out["input_ids"], mask, list(zip(edges[::2], edges[1::2], strict=True))

    input_ids, kept, spans = marked(messages)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and not _has_text(message):
            # A template may write earlier turns differently, but it marks as many.
            for start, stop in spans[len(marked(messages[:turn])[2]) : len(marked(messages[: turn + 1])[2])]:
                kept[start:stop] = [False] * (stop - start)
    return input_ids, kept


def encode_last_reply(
    messages: list[dict[str, Any]], task: TaskConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], str, list[int], tuple[int, ...]]:
    """The conversation up to the assistant's last reply, and that reply.

    Returns:
        Token ids of the prompt, the reply, its token ids as the template writes it, and the token that ends the turn
        (empty where the template closes a reply with no special token).

    Raises:
        ValueError: as :func:`encode_conversation`.
    """
    _template(task, tokenizer)
    last = max(turn for turn, message in enumerate(messages) if message["role"] == "assistant")
    prompt_ids = _render(messages[:last], task, tokenizer, prompt=True)["input_ids"]
    whole = _render(messages[: last + 1], task, tokenizer, prompt=False)["input_ids"]
    answer = messages[last]["content"]
    alone = tokenizer(answer, add_special_tokens=False)["input_ids"]
    # What follows the prompt is the reply; a template whose two renderings differ shows its end all the same.
    answer_ids = whole[len(prompt_ids) :] if whole[: len(prompt_ids)] == prompt_ids else alone
    end = _end_of_turn(whole, tokenizer)
    return prompt_ids, answer, answer_ids, () if end is None else (whole[end],)


def _end_of_turn(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Position of the special token that closes the last turn: the last one, if only white space follows it."""
    special = set(tokenizer.all_special_ids)
    for position in reversed(range(len(ids))):
        token, text = ids[position], tokenizer.decode([ids[position]])
        # Added special tokens are those that decoding skips; a list of all of them would be built for every row.
        if token in special or (text and not tokenizer.decode([token], skip_special_tokens=True)):
            return position
        if text.strip():
            return None
    return None


def _has_text(message: dict[str, Any]) -> bool:
    # A reply may be a tool call without text.
    return bool(message["content"].strip() or message.get("tool_calls"))


def _template(task: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict) and template:
        if "default" not in template:
            raise ValueError(
                f"task {task.name!r}: the tokenizer has the chat templates {', '.join(sorted(template))}, none of them "
                "default; set tokenizer.chat_template to one of them and save the tokenizer"
            )
        template = template["default"]
    if not isinstance(template, str):
        raise ValueError(
            f"task {task.name!r} uses messages, but the tokenizer has no chat template; use prompt and answer"
        )
    return template


def _render(
    messages: list[dict[str, Any]],
    task: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: bool,
    **options: Any,
) -> dict[str, Any]:
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=prompt,
            # What is too long is counted and told by molora.
            tokenizer_kwargs={"verbose": False},
            **options,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"task {task.name!r}: the chat template does not take the conversation: {error}") from error
    except ValueError as error:
        if messages:
            raise
        raise ValueError(
            f"task {task.name!r}: a conversation begins with the reply to be located, and no empty conversation "
            "can be rendered before it; put a turn of the user first, or leave out such rows"
        ) from error
