"""Texts of tokens as they stream, and the policy under which the page that shows them runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from molora.assets import MOLORA_TINY
from molora.serve.events import _event
from molora.serve.page import page_response
from molora.serve.text import TextStream

TOKENIZER = AutoTokenizer.from_pretrained(MOLORA_TINY)
TEXTS = [
    "a plain sentence, and another one.\n",
    "naïve 日本語 🙂🙃 text",
    "stop and sto stop and stopping STOP",
    "aaaaab",
]
STOPS: list[list[str]] = [[], ["stop"], ["stopping", " one"], ["ab"], ["aab", "本語 "], ["🙃"]]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stops", STOPS)
def test_texts_add_up_to_the_answer_however_the_tokens_come(text: str, stops: list[str]) -> None:
    """Against the plain way: decode the whole, cut at the first stop string."""
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    whole = TOKENIZER.decode(ids)
    expected = whole[: min([at for stop in stops if (at := whole.find(stop)) >= 0], default=len(whole))]
    for seed in range(5):
        stream, texts, left = TextStream(TOKENIZER, [], stops), list[str](), list(ids)
        draw = random.Random(seed)
        while left and not stream.stopped:
            count = draw.randint(1, 4) if seed else 1
            given, left = left[:count], left[count:]
            texts += stream.push(given)
            assert expected.startswith("".join(texts))  # nothing that is taken back
        texts += stream.finish()
        assert "".join(texts) == expected and len(texts) == len(ids) - len(left)
        assert stream.stopped == (expected != whole)


def test_a_character_of_several_tokens_belongs_to_the_last() -> None:
    ids = TOKENIZER("🙂", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    assert TextStream(TOKENIZER, [], []).push(ids) == [""] * (len(ids) - 1) + [TOKENIZER.decode(ids)]


def test_nothing_of_a_prompt_that_ends_within_a_character_is_given_out() -> None:
    broken = TOKENIZER("some text 🙂", add_special_tokens=False)["input_ids"][:-1]
    ids = TOKENIZER(" and more", add_special_tokens=False)["input_ids"]
    stream = TextStream(TOKENIZER, broken, [])
    assert "".join(stream.push(ids) + stream.finish()) == " and more"


def test_a_token_is_held_back_whole_where_a_stop_string_may_begin() -> None:
    first, second = ([token] for token in TOKENIZER("AB", add_special_tokens=False)["input_ids"])
    stream = TextStream(TOKENIZER, [], ["BC"])
    assert [stream.push(first), stream.push(second), stream.push(first)] == [["A"], [], ["B", "A"]]


def test_an_event_is_one_line_for_whoever_splits_lines() -> None:
    text = "a\u2028b\u2029c\x85d\u00e9\n"
    line, *rest = _event({"text": text}).splitlines()
    assert json.loads(line.removeprefix("data: ")) == {"text": text} and rest == [""]


def test_the_policy_lets_only_the_page_itself_run(tmp_path: Path) -> None:
    policy = page_response().headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and policy.count("'sha256-") == 2
    twice = tmp_path / "page.html"
    twice.write_text("<style></style><script>1</script><script>2</script>")
    with pytest.raises(ValueError, match="one <script> without attributes"):
        page_response(twice)
