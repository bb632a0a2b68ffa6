"""The skills, the embedded base, and `molora quickstart` in a short run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_cli import molora
from transformers import AutoModelForCausalLM, AutoTokenizer

from molora import equal_lora
from molora.assets import MOLORA_TINY
from molora.eval.models import load_base
from molora.train import quickstart
from molora.train.recipe import mixture_config
from molora.train.skills import CHAINS, SKILLS, skill


def test_skills_have_one_answer() -> None:
    answers = {
        "plus one": ("4799", "5800"),
        "backwards": ("4719", "9174"),
        "sorted": ("47190", "01479"),
        "in words": ("4719", "four seven one nine"),
        "largest": ("4719", "9"),
        "capitals": ("k d z a", "K D Z A"),
        "next letters": ("k d z a", "l e a b"),
        "last": ("k d z a", "a"),
    }
    assert answers.keys() == {one.name for one in SKILLS}
    for name, (subject, answer) in answers.items():
        row = skill(name).row(subject)
        assert row.answer == answer and subject in row.prompt
    beginnings = [one.prompt.split("{x}")[0] for one in SKILLS]
    assert max(map(beginnings.count, beginnings)) >= 3
    for chain in CHAINS:
        kinds = [skill(name).kind for name in chain]
        assert len(chain) in (2, 3) and len(set(kinds)) == 1


def test_rows_are_reproducible_and_disjoint(tmp_path: Path) -> None:
    for one in SKILLS:
        rows = one.rows(200, 0)
        assert rows == one.rows(200, 0) != one.rows(200, 1)
        subjects = frozenset(row.subject for row in rows)
        assert len(subjects) == 200
        assert not subjects & {row.subject for row in one.rows(300, 0, subjects)}
    tasks = quickstart.write_tasks(tmp_path, 0)
    for task, one in zip(tasks, SKILLS, strict=True):
        parts = [Path(path).read_text().splitlines() for path in (task["data"], task["eval"]["data"])]
        assert [len(part) for part in parts] == [quickstart.TRAIN_ROWS, quickstart.TEST_ROWS]
        train, test = ([json.loads(line)["prompt"].rpartition("\n")[2] for line in part] for part in parts)
        assert not set(train) & set(test)
        assert sum("\n" in json.loads(line)["prompt"] for line in parts[0]) == quickstart.TRAIN_ROWS // 3
        assert all(
            json.loads(line)["answer"] == one.row(_subject(one.prompt, p)).answer
            for line, p in zip(parts[1], test, strict=True)
        )


def _subject(prompt: str, text: str) -> str:
    before, after = prompt.split("{x}")
    return text[len(before) : -len(after)]


def test_the_embedded_base_is_a_trained_model() -> None:
    size = sum(path.stat().st_size for path in MOLORA_TINY.iterdir())
    assert size <= 8e6
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MOLORA_TINY), AutoTokenizer.from_pretrained(MOLORA_TINY)
    text = "The old man looked at the sea, and the wind was cold upon his face."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 4.0  # an untrained one has ln 2048 = 7.6
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    out = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    kept = [token for token, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(kept) == "good day<|eos|>"
    with pytest.raises(Exception, match="unknown role robot: use system, user or assistant"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "x"}], tokenize=False)
    card = (MOLORA_TINY / "README.md").read_text()
    assert all(word in card for word in ("tokens seen", "bits per byte", "BLiMP accuracy", "seed"))
    assert f"{model.num_parameters()}" in card


def test_both_sides_have_as_many_parameters() -> None:
    rank = equal_lora(load_base(str(MOLORA_TINY)), mixture_config(quickstart.MIXTURE)).r
    counts = []
    for config in (mixture_config(quickstart.MIXTURE), LoraConfig(r=rank, target_modules="all-linear")):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(MOLORA_TINY), config)
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    mixture, lora = counts
    assert mixture <= lora < mixture * (1 + 1 / (rank - 1))


@pytest.mark.slow
def test_quickstart_through_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "STEPS", 12)
    monkeypatch.setattr(quickstart, "TEST_ROWS", 4)
    monkeypatch.setattr(quickstart, "CHAIN_ROWS", 2)
    out = tmp_path / "quick"
    assert molora("quickstart", "--out", str(out)) == 0
    shown = capsys.readouterr().out
    assert all(one.name in shown for one in SKILLS) and "by expert" in shown and "molora generate" in shown
    results = json.loads((out / "results.json").read_text())
    assert results["tasks"].keys() == {one.name for one in SKILLS}
    assert all(row.keys() == {"base", "lora", "mixture"} for row in results["tasks"].values())
    for column in ("base", "lora", "mixture"):
        mean = sum(row[column] for row in results["tasks"].values()) / len(SKILLS)
        assert results["average"][column] == pytest.approx(mean)
    assert results["composite"].keys() == {" + ".join(chain) for chain in CHAINS} | {"average"}
    text = "".join(token for token, _ in results["tokens"]["tokens"])
    assert text.startswith("Take 4719, plus one:")
    assert re.search(r"(^|\n)next: +molora generate", shown)
    assert molora("generate", str(out / "mixture"), "Take 31415, in words:", "--max-new-tokens", "3") == 0
    capsys.readouterr()
    assert molora("quickstart", "--out", str(out)) == 2
    assert "exists and is not empty; choose another directory with --out" in capsys.readouterr().err
