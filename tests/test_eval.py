"""Evaluation: likelihoods by hand, batched generation as single rows, intervals, what is skipped and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lm import save_tiny, tiny_llama, tiny_tokenizer, write_jsonl

from molora.eval.encode import encode_example
from molora.eval.generate import stream
from molora.eval.models import load_base, load_model, resolve
from molora.eval.results import parameters, wilson
from molora.eval.score import choice_log_likelihoods, context_length, score_task
from molora.eval.suite import Suite, merge_suites, run_suite
from molora.eval.tasks import EvalConfig, TaskConfig

QUESTIONS = ["a", "some longer question", "is it so", "one, two, three", "what?", "Yes", "0123456789", "mm"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def task(path: Path, answers: list[str], **changes: Any) -> TaskConfig:
    rows = [{"q": q, "a": a} for q, a in zip(QUESTIONS, answers, strict=True)]
    data = write_jsonl(path / "rows.jsonl", rows)
    keys: dict[str, Any] = {"name": "t", "data": data, "prompt": "{q}:", "answer": "{a}", "eval": EvalConfig()}
    return TaskConfig(**keys | changes)


def test_choice_likelihoods_by_hand(model: Any, tokenizer: Any) -> None:
    """One forward per token, each on the unpadded text before it."""
    pairs = [(tokenizer(p)["input_ids"], tokenizer(c, add_special_tokens=False)["input_ids"] + [2]) for p, c in PAIRS]
    expected = []
    for prompt, choice in pairs:
        total = 0.0
        for i, token in enumerate(choice):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + choice[:i]])).logits[0, -1]
            total += float(torch.log_softmax(logits.double(), -1)[token])
        expected.append(total)
    torch.testing.assert_close(
        choice_log_likelihoods(model, pairs), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )


PAIRS = [
    ("is it good?", " yes"),
    ("is it good?", " no"),
    ("x", " a far longer continuation"),
    ("a longer prompt here", "b"),
]


def test_choice_scoring_takes_the_most_likely(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    choices = ["yes", "no", "perhaps"]
    scored = task(tmp_path, ["yes"] * 5 + ["no"] * 3, choices=choices)
    entry, predictions = score_task(model, tokenizer, scored, max_length=None, batch_size=3)
    best = []
    for question in QUESTIONS:
        example = encode_example({"q": question, "a": "yes"}, scored, tokenizer)
        values = choice_log_likelihoods(model, [(example.prompt_ids, ids) for ids in example.choice_ids])
        best.append(choices[int(values.argmax())])
    assert [p["prediction"] for p in predictions] == best
    correct = sum(b == a for b, a in zip(best, ["yes"] * 5 + ["no"] * 3, strict=True))
    assert (entry["metric"], entry["n"], entry["value"], entry["ties"]) == ("choice", 8, correct / 8, 0)
    assert entry["majority"] == 5 / 8


def test_a_tie_is_counted_and_wrong(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    scored = task(tmp_path, ["1"] * 8, choices={"1": "same", "2": "same"})
    entry, predictions = score_task(model, tokenizer, scored, max_length=None, batch_size=8)
    assert (entry["value"], entry["ties"]) == (0.0, 8)
    assert all(p["tie"] and not p["correct"] for p in predictions)


def test_exact_match_in_a_batch_is_the_row_alone(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """The references are what the model itself writes for each row alone; half of them are then spoilt."""
    own = []
    for question in QUESTIONS:
        ids = torch.tensor([tokenizer(f"{question}:")["input_ids"]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=2
        )
        own.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    references = [text if i % 2 else text + "x" for i, text in enumerate(own)]
    scored = task(tmp_path, references, eval=EvalConfig(max_new_tokens=12))
    entry, predictions = score_task(model, tokenizer, scored, max_length=None, batch_size=5)
    assert [p["prediction"] for p in predictions] == [text.strip() for text in own]
    assert [p["correct"] for p in predictions] == [bool(i % 2) for i in range(8)]
    assert (entry["metric"], entry["value"], entry["interval"]) == ("exact_match", 0.5, wilson(4, 8))


def test_rows_that_do_not_fit_are_skipped_and_counted(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    scored = task(tmp_path, ["x"] * 8)
    # "<s>some longer question:" + "x</s>" has 24 tokens, "one, two, three" 19, "0123456789" 14.
    entry, predictions = score_task(model, tokenizer, scored, max_length=14, batch_size=8)
    assert (entry["n"], entry["skipped_too_long"], len(predictions)) == (6, 2, 6)
    with pytest.raises(ValueError, match="evaluation of task 't' is empty: none of its 8 rows fits in 3 tokens"):
        score_task(model, tokenizer, scored, max_length=3, batch_size=8)
    with pytest.raises(ValueError, match="max_length=65 exceeds the model's context of 64 tokens"):
        context_length(model, 65)


def test_a_long_prompt_does_not_cut_the_answers_of_its_batch(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """A prompt of 60 tokens and an answer of 40 fit in 64 positions one by one, and must not meet in one batch."""
    rows = [{"q": "a" * 57, "a": "b"}, {"q": "c", "a": "d" * 40}]
    scored = task(tmp_path, ["x"] * 8)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    _, predictions = score_task(model, tokenizer, scored, max_length=None, batch_size=8)
    ids = torch.tensor([tokenizer("c:")["input_ids"]])
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=49, pad_token_id=2)
    assert predictions[1]["prediction"] == tokenizer.decode(alone[0, 3:], skip_special_tokens=True).strip()


def test_wilson_intervals() -> None:
    """Both ends p solve the score equation (observed - p)^2 = z^2 p (1 - p) / n."""
    for correct, n in ((8, 10), (1, 7), (435, 872)):
        for p in wilson(correct, n):
            assert (correct / n - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / n)
    assert wilson(0, 10) == pytest.approx([0.0, 0.2775328])
    assert wilson(10, 10) == pytest.approx([0.7224672, 1.0])
    assert wilson(0, 0) == [0.0, 1.0]


def test_the_results_say_everything(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    scored = task(tmp_path, ["x"] * 8, choices=["x", "y"])
    told: list[tuple[str, int, int]] = []
    results = run_suite(
        model,
        tokenizer,
        Suite(tasks=[scored], batch_size=5),
        name="tiny",
        predictions_path=tmp_path / "p.jsonl",
        seed=3,
        progress=lambda *step: told.append(step),
    )
    assert json.loads(json.dumps(results)) == results
    assert results["schema"] == "molora.results/1"
    assert results["versions"].keys() >= {"python", "torch", "transformers", "peft", "molora"}
    assert results.keys() >= {"command", "commit", "device", "seconds", "peak_memory_bytes"}
    assert results["seed"] == 3
    count = sum(p.numel() for p in model.parameters())
    assert results["model"]["parameters"] == {"trainable": 0, "base": count, "total": count}
    assert results["average"] == results["tasks"]["t"]["value"]
    assert told == [("t", 5, 8), ("t", 3, 8)]
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [f"{q}:" for q in QUESTIONS]


def test_parameters_of_an_adapter_are_counted_when_frozen() -> None:
    from peft import LoraConfig, get_peft_model

    base = sum(p.numel() for p in tiny_llama().parameters())
    peft_model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    # r * (16 in + 16 out) in each of two layers
    assert parameters(peft_model) == {"trainable": 128, "base": base, "total": base + 128}
    for parameter in peft_model.parameters():
        parameter.requires_grad_(False)
    assert parameters(peft_model)["trainable"] == 128


def test_suites_merge_only_if_they_agree(tmp_path: Path) -> None:
    one = Suite(tasks=[task(tmp_path, ["x"] * 8)])
    two = Suite(tasks=[task(tmp_path, ["x"] * 8, name="u")])
    assert [t.name for t in merge_suites([one, two]).tasks] == ["t", "u"]
    with pytest.raises(ValueError, match="two tasks have the same name"):
        merge_suites([one, one])
    with pytest.raises(ValueError, match="the suites differ in max_length or batch_size"):
        merge_suites([one, Suite(tasks=two.tasks, max_length=9)])


def test_stream_writes_what_it_returns(model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = stream(model, tokenizer, "one and", max_new_tokens=9)
    assert capsys.readouterr().out.rstrip("\n") == text.rstrip("\n")
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= 9
    assert stream(model, tokenizer, "one", max_new_tokens=9, temperature=1.0, seed=1) == stream(
        model, tokenizer, "one", max_new_tokens=9, temperature=1.0, seed=1
    )
    with pytest.raises(ValueError, match="the prompt has 71 tokens and the model's context is 64"):
        stream(model, tokenizer, "x" * 70, max_new_tokens=1)


def test_stream_says_what_the_text_does_not_show(model: Any, tokenizer: Any) -> None:
    notes: list[str] = []
    stream(model, tokenizer, "one and", max_new_tokens=3, note=notes.append)
    assert notes == []
    stream(model, tokenizer, "a_b" + "c" * 50 + "#_", max_new_tokens=100, note=notes.append)
    assert notes[0] == "the tokenizer does not know '_', '#'; the model reads its unknown symbol instead"
    assert notes[1:] == ["stopped at the end of the model's context of 64 tokens"]


def test_models_that_are_not_there_are_named(tmp_path: Path) -> None:
    for name in ("./nothing", "nothing/", "a/b/c", "~/nothing/here"):
        with pytest.raises(FileNotFoundError, match=f"no such directory '{name}'"):
            resolve(name)
    with pytest.raises(FileNotFoundError, match="has no config.json and no adapter_config.json, so no model"):
        resolve(str(tmp_path))
    assert resolve("owner/name") == "owner/name"
    base = save_tiny(tmp_path / "base")
    with pytest.raises(ValueError, match="--base is for adapter directories"):
        load_model(base, base=base)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json is not the config of an adapter .JSONDecodeError"):
        load_model(str(adapter))
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    with pytest.raises(ValueError, match="adapter_config.json names no base; write"):
        load_model(str(adapter))
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(
        ValueError, match="is an adapter, and a new one on it would leave it out; give its base, '.*gone'"
    ):
        load_base(str(adapter))
    with pytest.raises(FileNotFoundError, match="is for the base .*gone', which is not here; give --base"):
        load_model(str(adapter))
