"""The figures of README.md and docs/results.md are those of the files in benchmarks/results."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("tables", "learned", "speed_tables", "training_tables"):
        sys.modules.pop(name, None)


def test_every_marked_table_is_written_from_its_file() -> None:
    import tables

    used = ""
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.filled(text) == text, "run: python benchmarks/tables.py"
        used += text
    assert all(f"<!-- table: {name} -->" in used for name in tables.TABLES)


def test_a_system_has_learned_what_neither_luck_nor_the_commonest_answer_gives() -> None:
    from learned import learned

    entry = {"interval": [0.4, 0.6], "majority": 0.3}
    assert learned(entry, {"interval": [0.1, 0.3]})
    assert not learned(entry, {"interval": [0.3, 0.45]})
    assert not learned(entry | {"majority": 0.5}, {"interval": [0.1, 0.3]})
