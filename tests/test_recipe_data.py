"""What recipes/separable_data.py makes of nested files, and its sums."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from molora.eval.rows import load_rows
from molora.eval.tasks import TaskConfig

SCRIPT = Path(__file__).resolve().parents[1] / "recipes" / "separable_data.py"


def test_nested_files_become_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("clinc150/data", "text2sql/data"):
        (tmp_path / folder).mkdir(parents=True)
    intents = {part: [["where is my card", "card_lost"]] for part in ("train", "test", "oos_test")}
    (tmp_path / "clinc150/data/data_full.json").write_text(json.dumps(intents))
    sentences = [{"text": f"q{i}", "question-split": part} for i, part in enumerate(("train", "dev", "test"))]
    queries = [{"sql": ["SELECT a", "SELECT b"], "sentences": sentences}]
    (tmp_path / "text2sql/data/geography.json").write_text(json.dumps(queries))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path), str(tmp_path / "out")])
    runpy.run_path(str(SCRIPT), run_name="__main__")

    def read(name: str) -> list[dict[str, str]]:
        data = str(tmp_path / "out" / f"{name}.jsonl")
        return list(load_rows(TaskConfig(name="x", data=data, prompt="{prompt}", answer="{answer}")))

    assert read("clinc150.test") == [{"prompt": "where is my card", "answer": "card lost"}]
    assert [row["prompt"] for row in read("geography.train")] == ["q0", "q1"]
    assert read("geography.test") == [{"prompt": "q2", "answer": "SELECT a"}]
    train, test = read("arithmetic.train"), read("arithmetic.test")
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    for row in train[:50] + test:
        a, sign, b, _ = row["prompt"].split()
        assert int(row["answer"]) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
