"""A task: where its rows come from, how a row becomes text, how it is scored."""

from __future__ import annotations

import csv
import glob
import re
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal

from molora.eval.unreadable import why_unreadable

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text"}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """How one task is scored. What is ``None`` is taken from the task."""

    data: str | None = None
    """Rows to score: a hub id, a local file or a glob."""
    split: str | None = None
    """Split of ``data``."""
    limit: int | None = None
    """Score this many rows, drawn with seed 0; ``None``: all."""
    metric: Literal["exact_match", "choice"] | None = None
    """``None``: ``choice`` if the task has choices, else ``exact_match``."""
    max_new_tokens: int | None = None
    """Tokens generated per row for ``exact_match``; ``None``: those of the longest reference answer, plus 8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """One task of a recipe or a suite.

    A row becomes text by ``prompt`` and ``answer`` (templates such as ``"{question}"``), or by the tokenizer's chat
    template applied to the column ``messages``.
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
    """Literal replacements in every text column, in the order written; for symbols that the tokenizer lacks."""
    weight: float = 1.0
    limit: int | None = None
    """Train on this many rows, drawn with seed 0; ``None``: all."""
    prompt: str | None = None
    answer: str | None = None
    messages: str | None = None
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
        if self.weight <= 0:
            fail(f"weight={self.weight} must be above 0; remove the task to leave it out")
        if self.task_label is not None and self.task_label < 0:
            fail(f"task_label={self.task_label} must be at least 0")
        if self.limit is not None and self.limit <= 0:
            fail(f"limit={self.limit} must be above 0")
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
        for key, template in (("prompt", self.prompt), ("answer", self.answer), *self._choice_templates()):
            try:
                list(Formatter().parse(template or ""))
            except ValueError as error:
                fail(f"{key}={template!r} is not a template ({error}); write {{{{ and }}}} for braces")

    def _choice_templates(self) -> list[tuple[str, str]]:
        return [(f"choices[{key!r}]", template) for key, template in self.choice_map.items()]

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


def load_rows(task: TaskConfig) -> Dataset:
    """Reads the rows of a task, checks that the columns its templates name exist, and draws ``limit`` of them.

    Raises:
        FileNotFoundError: no local file matches.
        ValueError: no rows, a line that ``parse`` does not match, or a column that is not there.
    """
    import datasets

    try:
        rows = _read(task)
    except FileNotFoundError:
        raise
    # datasets lets StopIteration and RuntimeError out for an empty file, and OSError for a broken archive.
    except (ValueError, OSError, RuntimeError, StopIteration, datasets.exceptions.DatasetsError) as error:
        reason = why_unreadable(glob.glob(str(Path(task.data).expanduser()), recursive=True)) or _root_cause(error)
        raise ValueError(
            f"task {task.name!r} cannot be read from {task.data!r} (split {task.split!r}): {reason}"
        ) from error
    if task.parse is not None:
        rows = _parse(rows, task)
    if len(rows) == 0:
        raise ValueError(f"task {task.name!r} is empty: {task.data!r} has no rows; check data and split")
    for needed in sorted(_needed_columns(task)):
        if needed not in rows.column_names:
            raise ValueError(
                f"task {task.name!r} needs the column {needed!r}, but {task.data!r} has {', '.join(rows.column_names)}"
            )
    if task.limit is not None and task.limit < len(rows):
        rows = rows.shuffle(seed=0).select(range(task.limit))
    if task.replace:
        rows = rows.map(_replaced, fn_kwargs={"pairs": list(task.replace.items())}, load_from_cache_file=False)
    return rows


def fill(template: str, row: dict[str, Any]) -> str:
    """Renders ``"{field}"`` templates; the fields were checked by :func:`load_rows`.

    Raises:
        ValueError: the template does not fit the row.
    """
    try:
        return template.format(**row)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"the template {template!r} does not fit the row {str(row)[:200]}: {error}") from error


def _root_cause(error: BaseException) -> str:
    """The text of the error that came first: datasets wraps it in one that says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def _needed_columns(task: TaskConfig) -> set[str]:
    if task.messages is not None:
        return {task.messages}
    assert task.prompt is not None and task.answer is not None
    templates = [task.prompt, task.answer, *task.choice_map.values()]
    names = [name for template in templates for _, name, _, _ in Formatter().parse(template) if name is not None]
    if any(not re.match(r"[^.\[\]]", name) for name in names):
        raise ValueError(
            f"task {task.name!r}: an empty {{}} in a template; name a column, or write {{{{}}}} for braces"
        )
    return {re.split(r"[.\[]", name)[0] for name in names}


def _read(task: TaskConfig) -> Dataset:
    import datasets

    suffix = next((part for part in reversed(Path(task.data).suffixes) if part in READERS), None)
    if suffix is None:
        return datasets.load_dataset(task.data, task.subset, split=task.split)
    files = sorted(glob.glob(str(Path(task.data).expanduser()), recursive=True))
    if not files:
        raise FileNotFoundError(f"task {task.name!r}: no file matches {task.data!r}; check the path")
    options: dict[str, Any] = {}
    if READERS[suffix] == "csv":
        # Text stays text: "NA" and "" are answers here, not missing numbers; tab-separated files have no quoting.
        options = {"keep_default_na": False, "column_names": task.columns}
        if suffix == ".tsv":
            options |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
    elif task.columns is not None:
        raise ValueError(
            f"task {task.name!r}: columns names the columns of csv and tsv files; remove it for {task.data!r}"
        )
    if READERS[suffix] == "json" and task.field is not None:
        options = {"field": task.field}
    elif task.field is not None:
        raise ValueError(f"field is for json files; remove it for {task.data!r}")
    rows = datasets.load_dataset(READERS[suffix], data_files=files, split=task.split, **options)
    # The json reader takes bytes that are not UTF-8; without this they would fail at the row, with no name.
    rows.data.validate(full=True)
    return rows


def _parse(rows: Dataset, task: TaskConfig) -> Dataset:
    assert task.parse is not None
    pattern = re.compile(task.parse)
    if not pattern.groupindex or rows.column_names != ["text"]:
        raise ValueError(f"task {task.name!r}: parse needs named groups such as (?P<question>.*) and a txt file")
    bad = [line for line in rows["text"] if not pattern.fullmatch(line)]
    if bad:
        raise ValueError(
            f"task {task.name!r}: {len(bad)} of {len(rows)} lines do not match parse, the first is {bad[0]!r}"
        )
    return rows.map(_parsed, fn_kwargs={"pattern": task.parse}, remove_columns="text", load_from_cache_file=False)


def _parsed(row: dict[str, Any], pattern: str) -> dict[str, str]:
    match = re.fullmatch(pattern, row["text"])
    assert match is not None
    return match.groupdict()


def _replaced(row: dict[str, Any], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    for old, new in pairs:
        row = {key: value.replace(old, new) if isinstance(value, str) else value for key, value in row.items()}
    return row
