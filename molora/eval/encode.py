"""Rows to token ids: what the model reads, which tokens carry loss, what is unknown or too long.

Training and generation see the same boundary: the prompt is always tokenized alone, and the answer is what follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from molora.eval.chat import conversation, encode_conversation, encode_last_reply
from molora.eval.tasks import NullFieldError, TaskConfig, fill

IGNORED = -100
"""Label of a token without loss, as in torch's cross entropy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row to score: ``choices`` is empty unless the task has choices; ``answer`` is then one of them.

    ``end_ids``: tokens that end the answer beside the model's own, the end of a turn in the chat template.
    """

    prompt: str
    prompt_ids: list[int]
    answer: str
    answer_ids: list[int]
    choices: tuple[str, ...] = ()
    choice_ids: tuple[list[int], ...] = ()
    end_ids: tuple[int, ...] = ()


def encode_row(row: dict[str, Any], task: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Encodes one row for training. An answer without text carries no loss: it would teach to say nothing; a row with a
    null where a template wants text becomes no tokens at all, so that it is left out and counted.

    Returns:
        ``input_ids`` and ``labels`` (the same length, tokens; -100 where no loss is taken) and ``num_unknown``, the
        tokens that are the tokenizer's unknown symbol.
    """
    try:
        input_ids, kept = _tokens_with_loss(row, task, tokenizer)
    except NullFieldError:
        input_ids, kept = [], []
    labels = [token if keep else IGNORED for token, keep in zip(input_ids, kept, strict=True)]
    if task.loss == "all":
        labels = list(input_ids)
    return {"input_ids": input_ids, "labels": labels, "num_unknown": _num_unknown(input_ids, tokenizer)}


def _tokens_with_loss(
    row: dict[str, Any], task: TaskConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """The tokens of a row, and which of them carry loss."""
    if task.messages is not None:
        return encode_conversation(conversation(row, task), task, tokenizer)
    example = encode_example(row, task, tokenizer, with_choices=False)
    has_text = bool(example.answer.strip()) or bool(task.choices)
    kept = [False] * len(example.prompt_ids) + [has_text] * len(example.answer_ids)
    return example.prompt_ids + example.answer_ids, kept


def encode_example(
    row: dict[str, Any], task: TaskConfig, tokenizer: PreTrainedTokenizerBase, *, with_choices: bool = True
) -> Example:
    """Encodes one row as a prompt and the answer that should follow, the end-of-sequence token included.

    Args:
        row: one row of the task.
        task: the task.
        tokenizer: the model's.
        with_choices: encode the task's choices too; training needs only the answer.

    Raises:
        ValueError: the answer is none of the task's choices, or a conversation without a reply of the assistant.
    """
    if task.messages is not None:
        prompt_ids, answer, answer_ids, end_ids = encode_last_reply(conversation(row, task), task, tokenizer)
        return Example(
            prompt=tokenizer.decode(prompt_ids),
            prompt_ids=prompt_ids,
            answer=answer,
            answer_ids=answer_ids,
            end_ids=end_ids,
        )
    assert task.prompt is not None and task.answer is not None
    prompt, answer = fill(task.prompt, row), fill(task.answer, row)
    prompt_ids = encode_prompt(prompt, tokenizer)
    choices = {key: fill(text, row) for key, text in task.choice_map.items()}
    if choices:
        if answer not in choices:
            raise ValueError(
                f"task {task.name!r}: the answer {answer!r} is none of the choices {', '.join(map(repr, choices))}; "
                "add it to choices, or change the answer's template (a leading space counts)"
            )
        answer = choices[answer]
    texts = tuple(choices.values()) if with_choices else ()
    return Example(
        prompt=prompt,
        prompt_ids=prompt_ids,
        answer=answer,
        answer_ids=_continuation(prompt, prompt_ids, answer, tokenizer),
        choices=texts,
        choice_ids=tuple(_continuation(prompt, prompt_ids, choice, tokenizer) for choice in texts),
    )


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text to continue, begin token included where the tokenizer adds one."""
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    # A post-processor that closes every text with the end token would close the prompt before its answer.
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def num_unknown(example: Example, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of prompt and answer that are the tokenizer's unknown symbol."""
    return _num_unknown(example.prompt_ids + example.answer_ids, tokenizer)


def unknown_characters(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The characters of ``text`` that the tokenizer lacks, quoted; empty if its ``ids`` hold no unknown symbol."""
    if not _num_unknown(ids, tokenizer):
        return ""
    alone = {c: tokenizer(c, add_special_tokens=False)["input_ids"] for c in dict.fromkeys(text) if not c.isspace()}
    found = [repr(c) for c, tokens in alone.items() if _num_unknown(tokens, tokenizer)]
    return ", ".join(found) or "a part of the prompt"


def _num_unknown(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    unknown = tokenizer.unk_token_id
    # Tokenizers without an unknown symbol reuse the end token for it (GPT-2); those cannot meet an unknown character.
    return 0 if unknown is None or unknown == tokenizer.eos_token_id else ids.count(unknown)


def _continuation(prompt: str, prompt_ids: list[int], answer: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of ``answer`` after ``prompt``, closed by the end token.

    The whole text is tokenized where the prompt's tokens are a prefix of it; where the tokenizer would merge across
    the boundary, the answer is tokenized alone, because generation starts from the prompt's own tokens.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no end-of-sequence token, so an answer cannot end; set tokenizer.eos_token")
    whole = tokenizer(prompt + answer, verbose=False)["input_ids"]
    if whole[: len(prompt_ids)] == prompt_ids:
        ids = whole[len(prompt_ids) :]
    else:
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return ids if ids and ids[-1] == eos else [*ids, eos]


def pad(rows: Sequence[Sequence[int] | np.ndarray], value: int, *, left: bool = False) -> torch.Tensor:
    """Pads to the longest row: (rows, longest) int64 on the CPU."""
    longest = max(map(len, rows))
    padded = np.full((len(rows), longest), value)
    for line, row in zip(padded, rows, strict=True):
        start = longest - len(row) if left else 0
        line[start : start + len(row)] = row
    return torch.from_numpy(padded)


def collate(rows: Sequence[dict[str, Any]], *, with_task_labels: bool = False) -> dict[str, torch.Tensor]:
    """Training rows to a batch, padded on the right to the longest row.

    The value of padded ids is 0: the mask hides them and their label is -100, so no pad token is needed.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels``: (B, S) int64 on the CPU; ``task`` (B,) where rows have one;
        ``task_labels`` (B,) if asked for.
    """
    batch = {
        "input_ids": pad([row["input_ids"] for row in rows], 0),
        "attention_mask": pad([np.ones(len(row["input_ids"]), np.int64) for row in rows], 0),
        "labels": pad([row["labels"] for row in rows], IGNORED),
    }
    if "task" in rows[0]:
        batch["task"] = torch.tensor([int(row["task"]) for row in rows])
    return batch | ({"task_labels": torch.tensor([int(row["task_label"]) for row in rows])} if with_task_labels else {})
