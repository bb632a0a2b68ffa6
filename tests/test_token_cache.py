"""Tokens are found again by everything they were made of, and by nothing else; damage and races do no harm."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from test_cli import molora, write_recipe
from test_data import MARKED, task
from tiny_lm import CONTEXT, save_tiny, tiny_tokenizer, write_jsonl

from molora.eval.tasks import EvalConfig
from molora.train import mixing, token_cache
from molora.train.mixing import encode_task
from molora.train.recipe import SequenceConfig
from molora.train.token_cache import cache_key, cached

PAIRS = [("1", "2"), ("2", "3")]
ROWS = [{"q": f"{i} and {i}", "a": str(2 * i)} for i in range(30)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "molora"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tasks that were tokenized."""
    names: list[str] = []
    original = mixing._encode_rows

    def counted(task: Any, *args: Any) -> Any:
        names.append(task.name)
        return original(task, *args)

    monkeypatch.setattr(mixing, "_encode_rows", counted)
    return names


def test_the_second_run_reads_what_the_first_one_made(cache: Path, encoded: list[str], tmp_path: Path) -> None:
    own = task(write_jsonl(tmp_path / "a.jsonl", ROWS))
    plain, counts = encode_task(own, tiny_tokenizer(), SequenceConfig(cache=False), 16)
    assert not cache.exists()
    for _ in range(2):
        rows, report = encode_task(own, tiny_tokenizer(), SequenceConfig(), 16)
        assert rows.to_list() == plain.to_list() and report == counts and report.too_long == 0 < report.tokens
    assert encoded == ["sums"] * 2
    assert [path.name for path in cache.iterdir() if not path.suffix] == [path.stem for path in cache.glob("*.lock")]


def test_the_key_is_all_that_tokens_are_a_function_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, file = tiny_tokenizer(), write_jsonl(tmp_path / "a.jsonl", ROWS)
    chat = tiny_tokenizer()
    chat.chat_template = MARKED
    longer = tiny_tokenizer()
    longer.add_tokens(["and"])
    base, settings = task(file), {"limit": 16, "too_long": "report"}
    key = cache_key(base, tokenizer, settings)
    copied = write_jsonl(tmp_path / "b.jsonl", ROWS)
    same = [(replace(base, name="x", weight=2.0, task_label=3, eval=EvalConfig()), tokenizer, settings)]
    same += [(base, tiny_tokenizer(), dict(settings)), (replace(base, data=copied), tokenizer, settings)]
    assert {cache_key(*given) for given in same} == {key}
    others = [(replace(base, **change), tokenizer, settings) for change in ({"prompt": "{q}"}, {"limit": 3})]
    others += [(replace(base, data=write_jsonl(tmp_path / "c.jsonl", ROWS[:-1])), tokenizer, settings)]
    others += [(replace(base, replace=dict(order)), tokenizer, settings) for order in (PAIRS, PAIRS[::-1])]
    others += [(base, chat, settings), (base, longer, settings), (base, tokenizer, settings | {"limit": 15})]
    keys = {cache_key(*given) for given in others}
    assert len(keys) == len(others) and key not in keys
    write_jsonl(tmp_path / "a.jsonl", ROWS[::-1])
    assert cache_key(base, tokenizer, settings) not in {key, *keys}
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert cache_key(base, tokenizer, settings) == key
    monkeypatch.setattr(token_cache, "version", lambda name: "0")
    assert cache_key(base, tokenizer, settings) != key


def test_a_template_that_writes_the_day_is_known_for_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, own = tiny_tokenizer(), task(write_jsonl(tmp_path / "a.jsonl", ROWS))
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + MARKED
    today = cache_key(own, tokenizer, {})

    class Tomorrow(token_cache.date):
        def isoformat(self) -> str:
            return "tomorrow"

    monkeypatch.setattr(token_cache, "date", Tomorrow)
    assert cache_key(own, tokenizer, {}) != today


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no counts", "half written"])
def test_damage_is_made_again(damage: str, cache: Path, encoded: list[str], tmp_path: Path) -> None:
    own = task(write_jsonl(tmp_path / "a.jsonl", ROWS))
    first, report = encode_task(own, tiny_tokenizer(), SequenceConfig(), CONTEXT)
    first = first.to_list()
    folder = next(path for path in cache.iterdir() if path.is_dir())
    arrow = next(folder.glob("*.arrow"))
    data = arrow.read_bytes()
    if damage == "truncated":
        arrow.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        arrow.write_bytes(data[:-400] + bytes([data[-400] ^ 1]) + data[-399:])
    elif damage == "no counts":
        (folder / "counts.json").write_text("{")
    else:
        folder.rename(folder.with_suffix(".partial"))
    rows, again = encode_task(own, tiny_tokenizer(), SequenceConfig(), CONTEXT)
    assert rows.to_list() == first and again == report and encoded == ["sums"] * 2
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]
    encode_task(own, tiny_tokenizer(), SequenceConfig(), CONTEXT)
    assert encoded == ["sums"] * 2


def test_of_several_at_once_one_makes_the_rows(cache: Path) -> None:
    made, got = [], []

    def make() -> tuple[datasets.Dataset, dict[str, Any]]:
        made.append(1)
        time.sleep(0.2)
        return datasets.Dataset.from_dict({"input_ids": [[1, 2]]}), {"rows": 1}

    threads = [threading.Thread(target=lambda: got.append(cached("key", make))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and [(rows["input_ids"][:], counts) for rows, counts in got] == [([[1, 2]], {"rows": 1})] * 4


def test_what_cannot_be_encoded_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    own = task(write_jsonl(tmp_path / "a.jsonl", ROWS))
    with pytest.raises(ValueError, match="30 of 30 rows exceed 5 tokens"):
        encode_task(own, tiny_tokenizer(), SequenceConfig(too_long="error"), 5)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_many_rows_are_tokenized_by_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    own = task(write_jsonl(tmp_path / "a.jsonl", ROWS))
    alone, _ = encode_task(own, tiny_tokenizer(), SequenceConfig(cache=False), CONTEXT)
    monkeypatch.setattr(mixing, "ROWS_PER_PROCESS", 15)
    monkeypatch.setattr(mixing.os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert mixing._processes(30) == 2 and mixing._processes(29) is None and mixing._processes(900) == 3
    both, _ = encode_task(own, tiny_tokenizer(), SequenceConfig(cache=False), CONTEXT)
    assert both.to_list() == alone.to_list()


def test_the_command_line_finds_its_tokens(cache: Path, encoded: list[str], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, save_tiny(tmp_path / "base"))
    for _ in range(2):
        assert molora("train", recipe, "--dry-run") == 0
    assert encoded == ["sums", "odd"]
    assert molora("train", recipe, "--dry-run", "sequence.cache=false") == 0
    assert encoded == ["sums", "odd"] * 2
    stored = [json.loads(path.read_text()) for path in cache.glob("*/counts.json")]
    assert [entry["counts"]["rows"] for entry in stored] == [40, 40]
