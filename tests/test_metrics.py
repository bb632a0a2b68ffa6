"""Metrics against values by hand, and what a results file says of them."""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path

import pytest
from tiny_lm import tiny_llama, tiny_tokenizer, write_jsonl

from molora.eval.metrics import exact_match, last_number, majority, mean_interval, number, rouge_l
from molora.eval.results import wilson
from molora.eval.score import score_task
from molora.eval.suite import Suite, check_suite
from molora.eval.tasks import EvalConfig, TaskConfig


@pytest.mark.parametrize(
    ("prediction", "answer", "by_hand"),
    [
        # Lin 2004, section 3.1: the subsequences are "police the gunman" of 4 words each, and "the gunman".
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        # Three of five and three of four words: 2 * 3 / 9.
        ("a b c d e", "a c x e", 6 / 9),
        ("The CAT, sat!", "the cat sat", 1.0),
        ("x_1", "x 1", 1.0),
        ("one two", "three", 0.0),
        ("\u043a\u043e\u0442 \u0441\u043f\u0438\u0442", "\u041a\u043e\u0442 \u0441\u043f\u0438\u0442.", 1.0),
        ("\u732b", "\u732b", 1.0),
        # One word each, an accent composed or not: two of two and two of three words.
        ("caf\u00e9 noir", "cafe\u0301 noir fort", 4 / 5),
        ("Stra\u00dfe", "STRASSE", 1.0),
        ("", "three", 0.0),
        ("?", "!", 0.0),
    ],
)
def test_rouge_l_by_hand(prediction: str, answer: str, by_hand: float) -> None:
    assert rouge_l(prediction, answer) == pytest.approx(by_hand)
    assert rouge_l(answer, prediction) == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so 3 + 4 = 7 apples.", "7"),
        ("#### 1,234", "1234"),
        ("$1,234.50!", "1234.50"),
        ("x = -5", "-5"),
        ("10-5", "5"),
        ("#### -3.", "-3"),
        ("half is .5", ".5"),
        ("x = \u22125", "-5"),
        ("10\u22125", "5"),
        ("- 5", "5"),
        ("(3,4)", "4"),
        ("12,34", "34"),
        ("1234,567", "567"),
        ("1,234,567.8", "1234567.8"),
        ("5e3", "5000"),
        ("about 1.5E-2 m", "0.015"),
        ("1e\u22122", "0.01"),
        ("4 eggs", "4"),
        ("5, or so", "5"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text: str, found: str | None) -> None:
    assert last_number(text) == (None if found is None else Decimal(found))


def test_numbers_are_compared_as_numbers() -> None:
    assert number("it is 72.00", "= <<48+24=72>>72 clips.\n#### 72") == 1.0
    assert number("72, then 73", "#### 72") == number("nothing", "#### 72") == 0.0
    assert number("1e99999999999999999999", "#### 72") == 0.0
    assert exact_match(" a  b\n", "a b") == 1.0 != exact_match("a B", "a b")


def test_the_majority_and_the_interval_fit_the_metric() -> None:
    assert majority("exact_match", ["a", "b", "a"]) == majority("choice", ["a", "b", "a"]) == 2 / 3
    assert majority("number", ["1 is 5", "5.0", "6"]) == 2 / 3
    # Always "a b": 1, 1 and 2 * 1 / 3.
    assert majority("rouge_l", ["a b", "a b", "b"]) == pytest.approx((1 + 1 + 2 / 3) / 3)
    # Mean 0.5, sd = sqrt(2 * 0.25^2 / 2) = 0.25, so 1.96 * 0.25 / sqrt(3).
    half = 1.959963984540054 * 0.25 / math.sqrt(3)
    assert mean_interval([0.25, 0.5, 0.75]) == pytest.approx([0.5 - half, 0.5 + half])
    assert mean_interval([0.0, 1.0]) == [0.0, 1.0] == mean_interval([0.4])


def task(path: Path, answers: list[str], metric: str) -> TaskConfig:
    data = write_jsonl(path / "rows.jsonl", [{"q": f"say {i}", "a": a} for i, a in enumerate(answers)])
    config = EvalConfig(metric=metric, max_new_tokens=4)  # type: ignore[arg-type]
    return TaskConfig(name="t", data=data, prompt="{q}:", answer="{a}", eval=config)


def test_results_of_rouge_l_are_means_of_the_predictions(tmp_path: Path) -> None:
    entry, predictions = score_task(
        tiny_llama(), tiny_tokenizer(), task(tmp_path, ["a b c", "d"], "rouge_l"), max_length=None, batch_size=2
    )
    scores = [rouge_l(row["prediction"], row["answer"]) for row in predictions]
    assert [row["score"] for row in predictions] == scores
    assert entry["value"] == pytest.approx(sum(scores) / 2) and entry["interval"] == mean_interval(scores)
    assert all(isinstance(row["correct"], bool) for row in predictions)


def test_results_of_number_are_a_share(tmp_path: Path) -> None:
    scored = task(tmp_path, ["is 1", "is 1.0", "is 2"], "number")
    entry, predictions = score_task(tiny_llama(), tiny_tokenizer(), scored, max_length=None, batch_size=2)
    correct = sum(row["correct"] for row in predictions)
    assert (entry["value"], entry["interval"], entry["majority"]) == (correct / 3, wilson(correct, 3), 2 / 3)
    assert "score" not in predictions[0]


def test_a_reference_without_a_number_is_refused_before_training(tmp_path: Path) -> None:
    suite = Suite(tasks=[task(tmp_path, ["1", "none"], "number")])
    with pytest.raises(ValueError, match="task 't': metric 'number' needs a number in every answer, got 'none'; use"):
        check_suite(suite, tiny_tokenizer(), 64)
