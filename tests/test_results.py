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
    for name in ("tables", "learned", "speed_tables", "training_tables", "composite_serving", "imported_experts"):
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


def test_composite_prompts_have_different_tasks_and_use_every_row_before_one_comes_again() -> None:
    from composite_serving import compose

    rows = {task: [f"{task}{n}" for n in range(10)] for task in "abcd"}
    texts = compose(rows, 40, seed=0)
    assert texts == compose(rows, 40, seed=0) != compose(rows, 40, seed=1)
    assert {len(text) for text in texts} == {2, 3, 4}
    assert all(len({task for task, _ in text}) == len(text) for text in texts)
    assert {text[0][0] for text in texts} == set(rows)
    for task, own in rows.items():
        used = [row for text in texts for name, row in text if name == task]
        assert all(row[0] == task for row in used)
        assert len(used) > 10
        assert sorted(used[:10]) == sorted(own) == sorted(set(used))


def test_the_expert_with_the_largest_sum_of_shares_predicts_the_task() -> None:
    from composite_serving import predicted

    # b is ahead at two tokens of three, a in the sum.
    shares = [[0.9, 0.1], [0.4, 0.6], [0.45, 0.55]]
    assert predicted({"experts": ["a", "b"], "shares": shares}) == "a"
    assert predicted({"experts": ["b", "a"], "shares": shares}) == "b"
    assert predicted({"experts": [], "shares": []}) is None


def test_shuffled_labels_are_met_as_often_as_there_are_tasks() -> None:
    from composite_serving import rates, shuffled, summary

    right = [{"task": task, "predicted": task} for task in ("clinc150", "agnews", "scan", "geography") * 25]
    assert shuffled(right) == pytest.approx(0.25, abs=0.01)
    # What always says the same is as good with true labels as with shuffled ones.
    same = [one | {"predicted": "scan"} for one in right]
    assert shuffled(same) == 0.25
    found = rates(same, lambda one: one["predicted"] == one["task"])
    assert [found[key]["value"] for key in ("all", "agnews", "scan")] == [0.25, 0.0, 1.0]
    assert found["all"]["n"] == 100 and found["scan"]["n"] == 25
    # The first segment of a text has nothing before it, and is left out of those behind others.
    segments = [one | {"behind": one["task"] != "scan", "right": False} for one in same]
    told = summary("arrow", {"alone": segments, "segments": segments})
    assert told["segments"]["predicted"]["all"]["value"] == 0.25
    assert told["behind"]["predicted"]["all"] == {
        "value": 0.0,
        "interval": told["behind"]["right"]["all"]["interval"],
        "n": 75,
    }
    assert "predicted" not in summary("ties", {"alone": segments, "segments": segments})["behind"]
