"""Streams: the rows of the table, in an order that is the seed's alone; refusals; a killed run resumes exactly."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.data_loader import prepare_data_loader
from test_cli import ROOT, losses, molora, write_recipe
from test_resume import error
from tiny_lm import CONTEXT, save_tiny, tiny_tokenizer, write_jsonl
from torch.utils.data import DataLoader

from molora.eval.encode import collate
from molora.eval.tasks import TaskConfig
from molora.train import streaming
from molora.train.mixing import encode_task
from molora.train.prepare import training_arguments
from molora.train.recipe import MixingConfig, SequenceConfig, read_recipe
from molora.train.streaming import MixedStream, mixed_stream

STREAMED: dict[str, Any] = {"streaming": True, "buffer_size": 16}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base"))


def task(data: str, **changes: Any) -> TaskConfig:
    return TaskConfig(**{"name": "sums", "data": data, "prompt": "{q}:", "answer": " {a}"} | changes)


def stream(
    tasks: list[TaskConfig], limit: int | None = CONTEXT, too_long: Any = "report", **mixing: Any
) -> tuple[MixedStream, list[Any]]:
    config = MixingConfig(**{"strategy": "weights"} | STREAMED | mixing)
    sequence = SequenceConfig(too_long=too_long)
    return mixed_stream(tasks, tiny_tokenizer(), config, sequence, limit, [4, 7][: len(tasks)])


def numbers(path: Path, count: int, answer: str = "x") -> str:
    return write_jsonl(path, [{"q": str(i), "a": answer} for i in range(count)])


def test_tasks_are_encoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets fetches from all tasks at once, in threads; a chat template does not bear that."""
    inside, original = threading.Lock(), streaming.encode_row

    def encode(*args: Any) -> Any:
        assert inside.acquire(blocking=False), "two rows are encoded at once"
        time.sleep(0.002)
        inside.release()
        return original(*args)

    monkeypatch.setattr(streaming, "encode_row", encode)
    mixed, _ = stream([task(numbers(tmp_path / f"{name}.jsonl", 40), name=name) for name in "ab"])
    assert len(list(islice(mixed, 60))) == 60


def test_a_pass_has_every_row_and_the_next_pass_another_order(tmp_path: Path) -> None:
    mixed, reports = stream([task(numbers(tmp_path / "a.jsonl", 40))])
    texts = [tiny_tokenizer().decode(row["input_ids"]) for row in islice(mixed, 80)]
    assert len(set(texts[:40])) == len(set(texts[40:])) == 40
    assert texts[:40] != texts[40:] and texts[:40] != sorted(texts[:40])
    assert (reports[0].rows, reports[0].used, reports[0].tokens, reports[0].probability) == (None, None, None, 1.0)
    again = [tiny_tokenizer().decode(row["input_ids"]) for row in islice(mixed, 80)]
    other, _ = stream([task(numbers(tmp_path / "a.jsonl", 40))], seed=1)
    assert again == texts != [tiny_tokenizer().decode(row["input_ids"]) for row in islice(other, 80)]


@pytest.mark.parametrize("too_long", ["report", "truncate"])
def test_a_stream_has_the_rows_that_a_table_has(too_long: Any, tmp_path: Path) -> None:
    """Too long ones left out or cut, those without an answer left out, replacements made."""
    pairs = [("one and one", "two"), ("is_it", "no"), ("so", ""), ("a" * 30, "b")]
    data = write_jsonl(tmp_path / "rows.jsonl", [{"q": q, "a": a} for q, a in pairs])
    own = task(data, replace={"_": " "})
    table, report = encode_task(own, tiny_tokenizer(), SequenceConfig(too_long=too_long), 16)
    assert (report.rows, report.too_long, report.no_label) == (4, 2, 1 if too_long == "report" else 2)
    mixed, _ = stream([own], limit=16, too_long=too_long)
    expected = {(tuple(row["input_ids"]), tuple(row["labels"])) for row in table}
    assert {(tuple(row["input_ids"]), tuple(row["labels"])) for row in islice(mixed, 3 * len(expected))} == expected
    assert [row["input_ids"] for row in mixed.first(64)] == table["input_ids"]


def test_tasks_are_drawn_by_weight_and_size(tmp_path: Path) -> None:
    tasks = [
        task(numbers(tmp_path / "a.jsonl", 30), name="a", size=900),
        task(numbers(tmp_path / "b.jsonl", 30, "y"), name="b", size=100, weight=3.0),
    ]
    for mixing, shares in (
        ({"strategy": "weights"}, [0.25, 0.75]),
        ({"strategy": "proportional"}, [900 / 1200, 300 / 1200]),
        ({"strategy": "temperature", "temperature": 2.0}, [0.5, 0.5]),
    ):
        mixed, reports = stream(tasks, **mixing)
        assert [report.probability for report in reports] == pytest.approx(shares)
        drawn = Counter((row["task"], row["task_label"]) for row in islice(mixed, 400))
        assert drawn.keys() == {(0, 4), (1, 7)}
        # 5 standard deviations of a binomial share.
        assert abs(drawn[1, 7] / 400 - shares[1]) < 5 * (shares[0] * shares[1] / 400) ** 0.5


def test_a_limit_takes_the_first_rows_and_bounds_the_size(tmp_path: Path) -> None:
    mixed, reports = stream([task(numbers(tmp_path / "a.jsonl", 30), limit=5, size=30)], strategy="proportional")
    assert {tiny_tokenizer().decode(row["input_ids"]) for row in islice(mixed, 20)} == {
        f"<s>{i}: x</s>" for i in range(5)
    }
    assert reports[0].rows == 5


@pytest.mark.parametrize(
    ("changes", "mixing", "message"),
    [
        ({"data": "none.jsonl"}, {}, "task 'sums': no file matches 'none.jsonl'"),
        ({"split": "test"}, {}, "task 'sums' cannot be read from .* .split 'test'.: Bad split: test"),
        ({"prompt": "{question}:"}, {}, "task 'sums' needs the column 'question', but .* has q, a"),
        ({"prompt": None, "answer": None, "messages": "m"}, {}, "task 'sums' needs the column 'm', but .* has q, a"),
        ({"parse": "(?P<q>.*)"}, {}, "parse needs named groups .* and a txt file"),
        (
            {"prompt": "a" * 70},
            {},
            "task 'sums' is empty: each of its rows exceeds 64 tokens or has no token",
        ),
        ({}, {"strategy": "proportional"}, "'sums': .* does not tell them; set the task's size, or mixing.strategy to"),
        ({}, {"too_long": "error", "limit": 5}, "task 'sums': a row of 6 tokens exceeds 5; raise sequence.max_length"),
    ],
)
def test_what_the_first_row_shows_is_refused_first(
    changes: dict[str, Any], mixing: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        stream([task(**{"data": numbers(tmp_path / "a.jsonl", 3)} | changes)], **mixing)


@pytest.mark.parametrize(("name", "data"), [("z.jsonl", b""), ("z.tsv", b"q\ta\n"), ("z.txt", b"")])
def test_an_empty_stream_is_named(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="task 'sums' (is empty: .* has no rows; check|cannot be read .* 0 bytes)"):
        stream([task(str(tmp_path / name))])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("u.jsonl", b'{"q":"a","a":"b"}\n{"q":"\xff","a":"b"}\n', "task 'sums' .*u.jsonl, row 2: not UTF-8 text"),
        (
            "b.csv",
            b"q,a\n" + b"x,y\n" * 10_500 + b"x,y,z\n",
            "a row of one of the tasks sums .* 2 fields in line 10502",
        ),
        ("l.txt", b"1=2\n3\n", "task 'sums': the line '3' does not match parse"),
    ],
)
def test_a_later_row_that_cannot_be_read_is_named(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    parse = {"parse": "(?P<q>.)=(?P<a>.)"} if name == "l.txt" else {}
    mixed, _ = stream([task(str(tmp_path / name), **parse)], buffer_size=1)
    with pytest.raises(ValueError, match=message):
        list(islice(mixed, 20_000))


@pytest.mark.parametrize("rows", [99, 30_000])
def test_a_truncated_archive_is_named(rows: int, tmp_path: Path) -> None:
    lines = b"".join(b'{"q":"%d","a":"b"}\n' % i for i in range(rows))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines)[:-12])
    with pytest.raises(ValueError, match="task 'sums' cannot be read from .*c.jsonl.gz: Compressed file ended before"):
        list(islice(stream([task(str(tmp_path / "c.jsonl.gz"))])[0], rows + 1))


def test_a_stream_trains_a_centroid_router_on_its_first_rows(base: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base, max_steps=2)
    overrides = ["mixture.router={name: centroid}", "mixing.streaming=true", "evaluation.before=false"]
    assert molora("train", recipe, *overrides) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["training"]["data"][0]["used"] is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.max_steps=-1"], "mixing.streaming needs recipe.training.max_steps"),
        (["training.train_sampling_strategy=group_by_length"], "needs all rows at once"),
        (["training.dataloader_num_workers=2"], "each worker would read the same stream"),
        (["training.accelerator_config={dispatch_batches: true}"], "would join batches of different lengths"),
        (["tasks.sums.split='train[:10]'"], "task 'sums': mixing.streaming reads a whole split, not 'train[:10]'"),
        (["mixing.streaming=false", "tasks.odd.size=9"], "task 'odd': size=9 is for mixing.streaming; remove it"),
        (["mixing.buffer_size=0"], "mixing: buffer_size=0 must be at least 1"),
        (["tasks.odd.size=0"], "task 'odd': size=0 must be above 0"),
        (["mixing.strategy=proportional"], "task 'sums': mixing.strategy needs the rows of a streamed task"),
        (["mixing.bufer_size=9"], "unknown key 'bufer_size' in recipe.mixing: did you mean 'buffer_size'"),
        (["tasks.odd.prompt='{nothing}'"], "task 'odd' needs the column 'nothing'"),
    ],
)
def test_what_a_stream_cannot_do_is_one_sentence(
    overrides: list[str], message: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, base)
    assert molora("train", recipe, "mixing.streaming=true", "evaluation.before=false", *overrides) == 2
    assert message in error(capsys)
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_the_table_before_training_shows_no_zeros(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert molora("train", write_recipe(tmp_path, base), "mixing.streaming=true", "--dry-run") == 0
    shown = capsys.readouterr().out
    table = shown[shown.index("training data") : shown.index("-: streamed, so not counted before training")]
    assert "sums" in table and " 0 " not in table


def test_each_process_keeps_its_own_rows_of_the_one_stream(base: str, tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(tmp_path, base), ["mixing.streaming=true"])
    assert training_arguments(recipe).accelerator_config.dispatch_batches is False
    mixed, _ = stream([task(numbers(tmp_path / "a.jsonl", 40))])

    def ids(loader: Any) -> list[list[int]]:
        return [row for batch in islice(loader, 6) for row in batch["input_ids"].tolist()]

    alone = DataLoader(mixed, batch_size=4, collate_fn=collate)
    shares = [
        prepare_data_loader(
            DataLoader(mixed, batch_size=2, collate_fn=collate),
            num_processes=2,
            process_index=i,
            dispatch_batches=False,
            put_on_device=False,
        )
        for i in range(2)
    ]
    both = zip(*(ids(share) for share in shares), strict=True)
    assert sorted(row[:3] for pair in both for row in pair) == sorted(row[:3] for row in ids(alone))


def task_losses(out: Path, after: int) -> list[dict[str, float]]:
    log = json.loads((out / "loss_curve.json").read_text())
    own = [{key: line[key] for key in line if key.startswith("loss/")} for line in log if line["step"] > after]
    return [line for line in own if line]


@pytest.mark.slow
@pytest.mark.parametrize("mixing", [{"strategy": "weights"}, {"strategy": "temperature", "temperature": 3.0}])
def test_a_streamed_run_killed_from_outside_resumes_bit_for_bit(
    mixing: dict[str, Any], base: str, tmp_path: Path
) -> None:
    """Killed in the second pass over the rows, after a checkpoint and further steps; dropout and jitter are on."""

    def recipe(name: str) -> str:
        (tmp_path / name).mkdir()
        path = Path(write_recipe(tmp_path / name, base, max_steps=36, save_steps=15))
        data = yaml.safe_load(path.read_text())
        for i, own in enumerate(data["tasks"]):
            own |= {"size": 40 + 100 * i, "weight": 1.0 + i, "limit": 16}
        settings = {"mixing": mixing | STREAMED, "evaluation": {"before": False, "after": False}}
        path.write_text(yaml.safe_dump(data | settings))
        return str(path)

    assert molora("train", recipe("whole")) == 0
    killed, out = recipe("killed"), tmp_path / "killed" / "out"
    command = [sys.executable, "-u", "-m", "molora_cli", "train", killed]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        for line in run.stderr:
            step = int(line.split("/")[0].removeprefix("step ")) if line.startswith("step ") else 0
            if step >= 18:
                os.kill(run.pid, signal.SIGKILL)
                break
    assert run.returncode == -signal.SIGKILL
    saved = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    assert saved >= 15 and not (out / "results.json").exists()

    assert molora("train", killed, "--resume") == 0
    whole = tmp_path / "whole" / "out"
    assert losses(out) == losses(whole) and len(losses(out)) == 36
    assert task_losses(out, saved) == task_losses(whole, saved)
    assert {key for line in task_losses(out, 0) for key in line} == {"loss/sums", "loss/odd"}
    resumed = json.loads((out / "results.json").read_text())["training"]
    assert resumed["resumed_from"].endswith(f"checkpoint-{saved}") and resumed["steps"] == 36
