"""A task: where its rows come from, how a row becomes text, how it is scored; :mod:`molora.eval.rows` reads it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any, Literal

from molora.suggest import unknown_key_message

ROLES = ("system", "user", "assistant", "tool")
"""Who may speak in a conversation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """How one task is scored. What is ``None`` is taken from the task."""

    data: str | None = None
    """Rows to score: a hub id, a local file or a glob."""
    split: str | None = None
    """Split of ``data``."""
    limit: int | None = None
    """Score this many rows, drawn with seed 0; ``None``: all."""
    metric: Literal["exact_match", "number", "rouge_l", "choice"] | None = None
    """``None``: ``choice`` if the task has choices, else ``exact_match``. ``number``: the last number is the same.
    ``rouge_l``: the F-measure of the longest common subsequence of words."""
    max_new_tokens: int | None = None
    """Tokens generated per row, unless the metric is ``choice``; ``None``: those of the longest reference, plus 8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """One task of a recipe or a suite.

    A row becomes text by ``prompt`` and ``answer`` (templates such as ``"{question}"``), or by the tokenizer's chat
    template applied to ``messages``.
    """

    name: str
    data: str
    """Hub id, or a local file or glob: json, jsonl, csv, tsv or txt, optionally ``.gz``."""
    subset: str | None = None
    split: str = "train"
    field: str | None = None
    """Key that holds the list of rows inside a JSON file."""
    columns: list[str] | None = None
    """Column names of a csv or tsv file without a header line."""
    parse: str | None = None
    """Regular expression with named groups; each line of a txt file must match, and its groups become the columns."""
    replace: dict[str, str] | None = None
    """Literal replacements in every text column and in the contents of ``messages``, in the order written; for symbols
    that the tokenizer lacks."""
    weight: float = 1.0
    limit: int | None = None
    """Train on this many rows, drawn with seed 0 (the first ones of a stream); ``None``: all."""
    size: int | None = None
    """Rows of the task, for mixing by size when it is streamed; ``None``: what the hub's card says."""
    prompt: str | None = None
    answer: str | None = None
    messages: str | list[dict[str, str]] | None = None
    """The column that holds a conversation, or the turns ``{role, content}`` with templates as contents."""
    loss: Literal["answer", "assistant", "all"] | None = None
    """Tokens that carry loss; ``None``: ``answer`` for templates, ``assistant`` for ``messages``."""
    choices: list[str] | dict[str, str] | None = None
    """The possible answers, each a template. A mapping: from the text that ``answer`` renders to the answer itself."""
    task_label: int | None = None
    """Number of the task in router losses that learn tasks (MeteoRA: its expert; LoRAMoE: 1 or 0); ``None``: its
    position."""
    eval: EvalConfig | None = None

    def __post_init__(self) -> None:
        def fail(text: str) -> None:
            raise ValueError(f"task {self.name!r}: {text}")

        if (self.messages is None) == (self.prompt is None and self.answer is None):
            fail("give either prompt and answer, or messages")
        if self.messages is None and (self.prompt is None or self.answer is None):
            fail("prompt and answer belong together; add the missing one")
        if self.loss is not None and self.loss != "all" and (self.loss == "assistant") != (self.messages is not None):
            fail(f"loss={self.loss!r} does not fit; use 'answer' with a prompt, 'assistant' with messages, or 'all'")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            fail(f"weight={self.weight} must be above 0 and finite; remove the task to leave it out")
        if self.task_label is not None and self.task_label < 0:
            fail(f"task_label={self.task_label} must be at least 0")
        if self.limit is not None and self.limit <= 0:
            fail(f"limit={self.limit} must be above 0")
        if self.size is not None and self.size <= 0:
            fail(f"size={self.size} must be above 0")
        for key in ("limit", "max_new_tokens"):
            value = getattr(self.eval, key, None)
            if value is not None and value < 1:
                fail(f"eval.{key}={value} must be at least 1")
        if self.choices is not None and (len(self.choices) < 2 or self.messages is not None):
            fail("choices needs at least two entries and a prompt template")
        if self.metric == "choice" and self.choices is None:
            fail("metric 'choice' needs choices")
        try:
            re.compile(self.parse or "")
        except re.error as error:
            fail(f"parse={self.parse!r} is not a regular expression: {error}")
        for turn in self.turns:
            for key in turn:
                if key not in ("role", "content"):
                    fail(unknown_key_message("messages", key, ["role", "content"]))
            if turn.keys() != {"role", "content"}:
                fail(f"every turn of messages has a role and a content, got {turn}")
            check_role(turn["role"], self)
        if self.messages is not None and self.turns and "assistant" not in [turn["role"] for turn in self.turns]:
            fail("messages has no turn of the role 'assistant', so nothing would be learned; add one")
        if self.messages in ("", []):
            fail("messages is empty; name a column, or write the turns as {role, content}")
        for key, template in self.templates().items():
            try:
                list(Formatter().parse(template))
            except ValueError as error:
                fail(f"{key}={template!r} is not a template ({error}); write {{{{ and }}}} for braces")

    def templates(self) -> dict[str, str]:
        """Every template of the task, by its key."""
        found = {"prompt": self.prompt, "answer": self.answer}
        found |= {f"choices[{key!r}]": template for key, template in self.choice_map.items()}
        found |= {f"messages[{index}]": turn["content"] for index, turn in enumerate(self.turns)}
        return {key: template for key, template in found.items() if template is not None}

    @property
    def turns(self) -> list[dict[str, str]]:
        """The turns of ``messages`` with templates as contents; empty where ``messages`` is a column or absent."""
        return self.messages if isinstance(self.messages, list) else []

    @property
    def metric(self) -> str:
        """The metric of this task: its own, or the one that fits it."""
        chosen = self.eval.metric if self.eval else None
        return chosen or ("choice" if self.choices else "exact_match")

    @property
    def choice_map(self) -> dict[str, str]:
        """From the text that ``answer`` renders to the answer's template; empty without choices."""
        choices = self.choices or {}
        return choices if isinstance(choices, dict) else {choice: choice for choice in choices}


def eval_task(task: TaskConfig) -> TaskConfig:
    """The same task reading its evaluation rows."""
    assert task.eval is not None
    return replace(
        task,
        data=task.eval.data or task.data,
        split=task.eval.split or ("train" if task.eval.data else task.split),
        limit=task.eval.limit,
    )


class NullFieldError(ValueError):
    """A field of the row holds nothing, which a template would write as the word None."""


class _Filler(Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            raise NullFieldError("a field is null")
        return str(super().format_field(value, format_spec))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if value is None:
            raise NullFieldError("a field is null")
        return super().convert_field(value, conversion)

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            return super().get_field(field_name, args, kwargs)
        except (TypeError, AttributeError):
            # {q[x]} where q is null.
            for cut in re.finditer(r"[.\[]", field_name):
                outer = field_name[: cut.start()]
                if outer.count("[") == outer.count("]") and super().get_field(outer, args, kwargs)[0] is None:
                    raise NullFieldError("a field is null") from None
            raise


def fill(template: str, row: dict[str, Any]) -> str:
    """Renders ``"{field}"`` templates; the fields were checked when the rows were read.

    Raises:
        NullFieldError: a field of the row is null.
        ValueError: the template does not fit the row.
    """
    try:
        return _Filler().vformat(template, (), row)
    except NullFieldError:
        raise NullFieldError(f"the template {template!r} meets a null in the row {str(row)[:200]}") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"the template {template!r} does not fit the row {str(row)[:200]}: {error}") from error


def needed_columns(task: TaskConfig) -> list[str]:
    """The columns that the task's templates name, sorted.

    Raises:
        ValueError: a template with an empty ``{}``.
    """
    if isinstance(task.messages, str):
        return [task.messages]
    templates = task.templates().values()
    names = [name for template in templates for _, name, _, _ in Formatter().parse(template) if name is not None]
    if any(not re.match(r"[^.\[\]]", name) for name in names):
        raise ValueError(
            f"task {task.name!r}: an empty {{}} in a template; name a column, or write {{{{}}}} for braces"
        )
    return sorted({re.split(r"[.\[]", name)[0] for name in names})


def check_role(role: Any, task: TaskConfig) -> None:
    """Refuses a role that no conversation has.

    Raises:
        ValueError: it is none of ``ROLES``.
    """
    if role not in ROLES:
        raise ValueError(f"task {task.name!r}: messages has the role {role!r}; the roles are {', '.join(ROLES)}")
