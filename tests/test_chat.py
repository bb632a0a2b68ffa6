"""Conversations: templates and columns, roles, where the loss is, what a scored model reads and where it stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_data import CHAT, MARKED, UNMARKED
from tiny_lm import CONTEXT, tiny_llama, tiny_tokenizer, write_jsonl

from molora.eval.encode import IGNORED, Example, encode_example, encode_row
from molora.eval.models import load_tokenizer
from molora.eval.rows import load_rows
from molora.eval.score import load_examples, score_task
from molora.eval.tasks import EvalConfig, TaskConfig
from molora.train.mixing import encode_task
from molora.train.recipe import SequenceConfig

TURNS = [
    {"role": "system", "content": "be {tone}"},
    {"role": "user", "content": "{q}"},
    {"role": "assistant", "content": "{a}"},
    {"role": "user", "content": "and {q}?"},
    {"role": "assistant", "content": "no"},
]
ROW = {"q": "one", "a": "two", "tone": "short"}


def chat(messages: Any = "m", data: str = "x.jsonl", **changes: Any) -> TaskConfig:
    return TaskConfig(**{"name": "talk", "data": data, "messages": messages} | changes)


def tokenizer(template: str = MARKED) -> Any:
    own = tiny_tokenizer()
    own.chat_template = template
    return own


def shown(row: dict[str, Any], own: Any) -> tuple[str, str]:
    """The whole text, and the text of the tokens with loss."""
    return own.decode(row["input_ids"]), own.decode([token for token in row["labels"] if token != IGNORED])


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["generation marks", "prefixes"])
def test_turns_are_templates(template: str) -> None:
    own = tokenizer(template)
    text, answers = shown(encode_row(ROW, chat(TURNS), own), own)
    assert text.endswith("system:be short</s>|user:one</s>|assistant:two</s>|user:and one?</s>|assistant:no</s>")
    assert answers == "two</s>no</s>"
    everything = encode_row(ROW, chat(TURNS, loss="all"), own)
    assert everything["labels"] == everything["input_ids"]
    column = {"m": [{"role": turn["role"], "content": turn["content"].format(**ROW)} for turn in TURNS]}
    assert encode_row(column, chat(), own) == encode_row(ROW, chat(TURNS), own)


def test_sharegpt_is_the_same_conversation() -> None:
    own = tokenizer()
    names = {"user": "human", "assistant": "gpt"}
    column = [{"from": names[turn["role"]], "value": turn["content"]} for turn in CHAT]
    system = [{"from": "system", "value": "be short"}, *column]
    assert encode_row({"m": column}, chat(), own) == encode_row({"m": CHAT}, chat(), own)
    assert "|system:be short</s>" in shown(encode_row({"m": system}, chat(), own), own)[0].replace("<unk>", "|")
    # A table whose rows have both layouts fills the missing keys with nothing.
    filled = [{"role": None, "content": None, **turn} for turn in column]
    assert encode_row({"m": filled}, chat(), own) == encode_row({"m": CHAT}, chat(), own)


def test_an_unknown_role_is_named_with_the_roles_there_are() -> None:
    message = "task 'talk': messages has the role '{}'; the roles are system, user, assistant, tool$"
    with pytest.raises(ValueError, match=message.format("bot")):
        chat([{"role": "bot", "content": "x"}, TURNS[2]])
    with pytest.raises(ValueError, match=message.format("critic")):
        encode_row({"m": [*CHAT, {"role": "critic", "content": "x"}]}, chat(), tokenizer())
    with pytest.raises(ValueError, match=message.format("observer")):
        encode_row({"m": [{"from": "observer", "value": "x"}]}, chat(), tokenizer())


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"rol": "user", "content": "x"}], "unknown key 'rol' in messages: did you mean 'role'"),
        ([{"role": "user"}], "every turn of messages has a role and a content, got {'role': 'user'}"),
        (TURNS[:2], "messages has no turn of the role 'assistant'"),
        ([], "messages is empty; name a column, or write the turns"),
        ("", "messages is empty; name a column, or write the turns"),
        ([TURNS[1], {"role": "assistant", "content": "{a"}], r"messages\[1\]='{a' is not a template"),
    ],
)
def test_turns_that_make_no_conversation_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"task 'talk': {message}"):
        chat(messages)


def test_a_template_with_an_absent_field_is_refused(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [ROW])
    absent = [TURNS[1], {"role": "assistant", "content": "{b}"}]
    with pytest.raises(ValueError, match="task 'talk' needs the column 'b', but .* has q, a, tone"):
        load_rows(chat(absent, data))


def test_what_the_template_refuses_is_one_sentence() -> None:
    own = load_tokenizer("molora-tiny")
    tool = [CHAT[0], {"role": "tool", "content": "4"}, CHAT[1]]
    with pytest.raises(ValueError, match="task 'talk': the chat template does not take the conversation: unknown role"):
        encode_row({"m": tool}, chat(), own)


def test_an_answer_without_text_carries_no_loss(tmp_path: Path) -> None:
    rows = [{"q": "one", "a": "two"}, {"q": "two", "a": " "}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    _, report = encode_task(chat(TURNS[1:3], data), tokenizer(), SequenceConfig(), CONTEXT)
    assert (report.rows, report.used, report.no_label) == (2, 1, 1)
    plain = TaskConfig(name="plain", data=data, prompt="{q}", answer="{a}")
    _, report = encode_task(plain, tokenizer(), SequenceConfig(), CONTEXT)
    assert (report.rows, report.used, report.no_label) == (2, 1, 1)


EMPTY = [CHAT[0], {"role": "assistant", "content": ""}, *CHAT[2:]]


@pytest.mark.parametrize("template", [MARKED, UNMARKED, None], ids=["generation marks", "prefixes", "molora-tiny"])
def test_an_empty_reply_among_others_carries_no_loss(template: str | None) -> None:
    own = tokenizer(template) if template else load_tokenizer("molora-tiny")
    for turns in (EMPTY, [*EMPTY, *EMPTY[:2]], [*EMPTY[:2], *EMPTY]):
        answers = shown(encode_row({"m": turns}, chat(), own), own)[1]
        assert answers == "so long" + own.eos_token
    assert set(encode_row({"m": EMPTY[:2]}, chat(), own)["labels"]) == {IGNORED}


def test_a_null_content_is_left_out_and_named_where_it_is_scored(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    rows: list[dict[str, Any]] = [
        {"m": CHAT},
        {"m": [CHAT[0], call, CHAT[1]]},
        {"m": [{"role": "user", "content": None}, CHAT[1]]},
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    _, report = encode_task(chat(data=data), tokenizer(), SequenceConfig(), CONTEXT)
    assert (report.rows, report.used, report.no_label) == (3, 1, 2)
    message = r"^task 'talk': turn 2 \(assistant\) of the column 'm' has null as its content; .* so remove it from"
    with pytest.raises(ValueError, match=message):
        load_examples(chat(data=data), tokenizer(), CONTEXT)


def test_text_in_parts_is_joined(tmp_path: Path) -> None:
    parts = [{"role": t["role"], "content": [{"type": "text", "text": c} for c in t["content"]]} for t in CHAT]
    own = tokenizer()
    assert encode_row({"m": parts}, chat(), own) == encode_row({"m": CHAT}, chat(), own)
    assert encode_example({"m": parts}, chat(), own) == encode_example({"m": CHAT}, chat(), own)
    (row,) = load_rows(chat(data=write_jsonl(tmp_path / "p.jsonl", [{"m": parts}])))
    assert encode_row(row, chat(), own) == encode_row({"m": CHAT}, chat(), own)


@pytest.mark.parametrize("content", [4, {"a": 1}, [{"type": "image", "url": "x"}], [{"type": "text", "text": None}]])
def test_a_content_that_is_not_text_is_named(content: Any) -> None:
    message = (
        r"^task 'talk': turn 3 \(user\) of the column 'm' must be a text, or a list of parts .*; leave out such rows$"
    )
    with pytest.raises(ValueError, match=message):
        encode_row({"m": [*CHAT[:2], {"role": "user", "content": content}, CHAT[3]]}, chat(), tokenizer())


def test_a_type_error_of_the_template_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="task 'talk': the chat template does not take the conversation: .*int"):
        encode_row({"m": CHAT}, chat(), tokenizer("{{ 1 + messages[0]['content'] }}"))


def test_a_reply_with_nothing_before_it_is_one_sentence() -> None:
    assert shown(encode_row({"m": CHAT[1:]}, chat(), tokenizer()), tokenizer())[1] == "hello</s>so long</s>"
    for encode in (encode_row, encode_example):
        with pytest.raises(ValueError, match="task 'talk': a conversation begins with the reply to be located"):
            encode({"m": CHAT[1:2]}, chat(), tokenizer(UNMARKED))


def test_of_several_templates_the_default_is_taken() -> None:
    several = {"default": UNMARKED, "tool_use": "{{ nothing }}"}
    own = tokenizer(several)  # type: ignore[arg-type]
    assert encode_row({"m": CHAT}, chat(), own) == encode_row({"m": CHAT}, chat(), tokenizer(UNMARKED))
    own.chat_template = {"rag": UNMARKED, "plain": UNMARKED}
    with pytest.raises(
        ValueError, match="'talk': the tokenizer has the chat templates plain, rag, none of them default"
    ):
        encode_row({"m": CHAT}, chat(), own)


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["generation marks", "prefixes"])
def test_scoring_asks_for_the_last_reply_of_both_kinds(template: str) -> None:
    own = tokenizer(template)
    column = {"m": [{"role": turn["role"], "content": turn["content"].format(**ROW)} for turn in TURNS]}
    example = encode_example(ROW, chat(TURNS), own)
    assert example == encode_example(column, chat(), own)
    assert example.prompt.endswith("|assistant:two</s>|user:and one?</s>|assistant:")
    assert (example.answer, own.decode(example.answer_ids), example.end_ids) == ("no", "no</s>", (2,))
    # Training reads the same tokens.
    assert example.prompt_ids + example.answer_ids == encode_row(ROW, chat(TURNS), own)["input_ids"]


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chatml() -> Any:
    """Its end of turn is not the tokenizer's end token, as in the base models of several families."""
    own = tokenizer(CHATML)
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return own


def test_the_end_of_a_turn_is_the_templates() -> None:
    own = chatml()
    example = encode_example(ROW, chat(TURNS[1:3]), own)
    assert own.convert_ids_to_tokens(list(example.end_ids)) == ["<|im_end|>"]
    assert own.decode(example.answer_ids) == "two<|im_end|>\n"
    # The newline behind it is never generated, so it carries no loss; the tokens are the same.
    row = encode_row(ROW, chat(TURNS[1:]), own)
    assert shown(row, own)[1] == "two<|im_end|>no<|im_end|>" and own.decode(row["input_ids"]).endswith("<|im_end|>\n")
    open_ended = tokenizer("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}")
    assert encode_example(ROW, chat(TURNS[1:3]), open_ended).end_ids == ()


class Speaker(torch.nn.Module):
    """Stands in for a model that writes a given text: ``generate`` stops at the end tokens as generation does."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__()
        self.ids, self.config, self.generation_config = ids, tiny_llama().config, None
        self.device = torch.device("cpu")

    def generate(self, input_ids: torch.Tensor, generation_config: Any, **kwargs: Any) -> torch.Tensor:
        ends = generation_config.eos_token_id
        stop = next((i + 1 for i, token in enumerate(self.ids) if token in ends), len(self.ids))
        said = torch.tensor([self.ids[:stop]] * len(input_ids))
        return torch.cat([input_ids, said], dim=1)


def test_generation_stops_at_the_end_of_the_turn(tmp_path: Path) -> None:
    own = chatml()
    said = own("two<|im_end|>\n<|im_start|>user\nmore", add_special_tokens=False)["input_ids"]
    data = write_jsonl(tmp_path / "rows.jsonl", [ROW])
    task = chat(TURNS[1:3], data, eval=EvalConfig())
    entry, predictions = score_task(Speaker(said), own, task, max_length=None, batch_size=1)
    assert (entry["value"], predictions[0]["prediction"]) == (1.0, "two")


def test_an_example_without_a_conversation_ends_by_the_model_alone() -> None:
    plain = TaskConfig(name="plain", data="x.jsonl", prompt="{q}:", answer="{a}")
    example = encode_example(ROW, plain, tiny_tokenizer())
    assert isinstance(example, Example) and example.end_ids == ()
