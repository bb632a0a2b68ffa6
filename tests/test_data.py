"""Data: what a row becomes, where the loss is, and that nothing disappears without being counted."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from accelerate.data_loader import prepare_data_loader
from tiny_lm import CONTEXT, tiny_tokenizer, write_jsonl
from torch.utils.data import DataLoader

from molora.eval.encode import IGNORED, collate, encode_example, encode_row
from molora.eval.rows import load_rows, stream_rows
from molora.eval.score import load_examples
from molora.eval.tasks import EvalConfig, TaskConfig, eval_task
from molora.train.mixing import encode_task, mixed_dataset, probabilities
from molora.train.recipe import MixingConfig, SequenceConfig
from molora.train.sampling import LengthGroupedSampler

ROWS = [{"q": "one and one", "a": "two"}, {"q": "two and two", "a": "four"}, {"q": "is it", "a": "no"}]

CHATML = (
    "{% for m in messages %}{{ '|' + m['role'] + ':' }}"
    "{% if m['role'] == 'assistant' %}MARK{{ m['content'] + '</s>' }}END"
    "{% else %}{{ m['content'] + '</s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '|assistant:' }}{% endif %}"
)
MARKED = CHATML.replace("MARK", "{% generation %}").replace("END", "{% endgeneration %}")
UNMARKED = CHATML.replace("MARK", "").replace("END", "")
# Like templates that drop earlier thoughts: what a turn looks like depends on whether it is the last.
REWRITING = UNMARKED.replace("m['content'] +", "(m['content'] if loop.last else 'x') +")
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]


def task(data: str = "x.jsonl", **changes: Any) -> TaskConfig:
    keys: dict[str, Any] = {"name": "sums", "data": data, "prompt": "{q}:", "answer": " {a}"}
    return TaskConfig(**{key: value for key, value in (keys | changes).items() if value is not None})


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def test_loss_is_on_the_answer_and_the_end_token_only() -> None:
    tokenizer = tiny_tokenizer()
    row = encode_row(ROWS[0], task(), tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "<s>one and one: two</s>"
    assert tokenizer.decode([token for token in row["labels"] if token != IGNORED]) == " two</s>"
    assert [a for a, b in zip(row["input_ids"], row["labels"], strict=True) if b != IGNORED] == row["labels"][-5:]
    everything = encode_row(ROWS[0], task(loss="all"), tokenizer)
    assert everything["labels"] == everything["input_ids"] == row["input_ids"]


def test_training_and_scoring_see_the_same_tokens() -> None:
    tokenizer = tiny_tokenizer()
    example = encode_example(ROWS[0], task(), tokenizer)
    assert example.prompt_ids + example.answer_ids == encode_row(ROWS[0], task(), tokenizer)["input_ids"]
    assert example.prompt_ids == tokenizer("one and one:")["input_ids"]


def test_the_collator_pads_to_the_longest_row_without_loss() -> None:
    batch = collate([{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["generation marks", "prefixes"])
def test_chat_loss_is_on_every_reply_of_the_assistant(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    chat = task(prompt=None, answer=None, messages="m")
    row = encode_row({"m": CHAT}, chat, tokenizer)
    assert tokenizer.decode(row["input_ids"]).endswith(
        "|user:hi</s>|assistant:hello</s>|user:bye</s>|assistant:so long</s>"
    )
    assert tokenizer.decode([token for token in row["labels"] if token != IGNORED]) == "hello</s>so long</s>"
    example = encode_example({"m": CHAT}, chat, tokenizer)
    assert example.prompt.endswith("|user:bye</s>|assistant:")
    assert example.answer == "so long"


def test_a_chat_template_that_rewrites_history_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = REWRITING
    with pytest.raises(ValueError, match="rewrites earlier turns or joins turns by plain text .* cannot be located"):
        encode_row({"m": CHAT}, task(prompt=None, answer=None, messages="m"), tokenizer)


def test_chat_needs_a_template_and_replies() -> None:
    tokenizer = tiny_tokenizer()
    chat = task(prompt=None, answer=None, messages="m")
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        encode_row({"m": CHAT}, chat, tokenizer)
    with pytest.raises(ValueError, match="at least one reply of the role 'assistant'"):
        encode_row({"m": CHAT[:1]}, chat, tokenizer)


def test_choices_map_labels_to_answers() -> None:
    tokenizer = tiny_tokenizer()
    labelled = task(answer="{y}", choices={"0": " bad {q}", "1": " good"})
    example = encode_example({"q": "it", "y": 0}, labelled, tokenizer)
    assert (example.answer, example.choices) == (" bad it", (" bad it", " good"))
    assert tokenizer.decode(example.choice_ids[1]) == " good</s>"
    with pytest.raises(ValueError, match="task 'sums': the answer '2' is none of the choices '0', '1'; add it"):
        encode_example({"q": "it", "y": 2}, labelled, tokenizer)


def test_a_null_field_is_left_out_and_counted_never_written_as_a_word(tmp_path: Path) -> None:
    rows = [{"q": "one", "a": "1"}, {"q": "two", "a": None}, {"q": None, "a": "3"}, {"q": "four"}]
    data = write_jsonl(tmp_path / "n.jsonl", rows)
    encoded, report = encode_task(task(data), tiny_tokenizer(), SequenceConfig(), CONTEXT)
    assert (report.rows, report.used, report.no_label, len(encoded)) == (4, 1, 3, 1)
    turns = [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{a}"}]
    chat = task(data, prompt=None, answer=None, messages=turns)
    assert encode_row(rows[1], chat, tiny_tokenizer())["input_ids"] == []
    with pytest.raises(ValueError, match=r"the template ' \{a\}' meets a null in the row"):
        encode_example(rows[1], task(data), tiny_tokenizer())


@pytest.mark.parametrize("template", ["{q!s}", "{q!r}", "{q[x]}", "{q.x}", "{q[x][y]}"])
def test_a_null_is_a_null_however_the_template_reads_it(template: str) -> None:
    row = {"q": {"x": None} if template == "{q[x][y]}" else None, "a": "1"}
    assert encode_row(row, task(prompt=template), tiny_tokenizer())["input_ids"] == []
    with pytest.raises(ValueError, match="does not fit the row"):
        encode_row({"q": "text", "a": "1"}, task(prompt="{q[x]}"), tiny_tokenizer())


def test_a_null_in_a_row_to_score_names_the_task_and_the_fix(tmp_path: Path) -> None:
    scored = task(write_jsonl(tmp_path / "n.jsonl", [{"q": "one", "a": None}, *ROWS]))
    with pytest.raises(
        ValueError, match=r"^task 'sums': the template .* meets a null .* so remove it from '.*n.jsonl'"
    ):
        load_examples(scored, tiny_tokenizer(), CONTEXT)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_is_a_finite_number_above_zero(weight: float) -> None:
    with pytest.raises(ValueError, match=f"task 'sums': weight={weight} must be above 0 and finite; remove"):
        task(weight=weight)


@pytest.mark.parametrize("name", ["folder", "owner/name", "rows.jsonl"])
def test_a_directory_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)
    for read in (load_rows, stream_rows):
        with pytest.raises(ValueError, match=f"^task 'sums': data='{name}' is a directory; .* {name}/[*].jsonl$"):
            read(task(name))


def test_a_field_of_a_file_of_lines_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text('{"q": "x", "a": "y"}\n{"q": "x", "a": "y"}\n')
    with pytest.raises(ValueError, match="task 'sums' cannot be read .* holds one JSON object, .* remove field"):
        load_rows(task(str(tmp_path / "d.json"), field="rows"))


def test_replacements_reach_into_the_column_that_is_read(tmp_path: Path) -> None:
    rows = [{"m": [{"role": "user", "content": "a_user"}, {"role": "assistant", "content": "b_c"}], "d": {"x": "a_b"}}]
    data = write_jsonl(tmp_path / "r.jsonl", rows)
    chat = task(data, prompt=None, answer=None, messages="m", replace={"_": " ", "user": "you"})
    templates = task(data, prompt="{d[x]}", answer="{d[x]}", replace={"_": " "})
    for read in (load_rows, stream_rows):
        (row,) = read(chat)
        assert [(turn["role"], turn["content"]) for turn in row["m"]] == [("user", "a you"), ("assistant", "b c")]
        assert row["d"] == {"x": "a_b"}
        assert next(iter(read(templates)))["d"] == {"x": "a b"}


def test_unknown_characters_are_counted(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "u.jsonl", [{"q": "a_b#", "a": "c"}, {"q": "ab", "a": "_"}])
    _, report = encode_task(task(data), tiny_tokenizer(), SequenceConfig(), CONTEXT)
    assert report.unknown_tokens == 3
    _, report = encode_task(task(data, replace={"_": " ", "#": ""}), tiny_tokenizer(), SequenceConfig(), CONTEXT)
    assert report.unknown_tokens == 0


def test_too_long_rows_are_counted_cut_or_refused(file: str) -> None:
    tokenizer = tiny_tokenizer()
    rows, report = encode_task(task(file), tokenizer, SequenceConfig(), 16)
    # "<s>one and one: two</s>" has 18 tokens, "<s>two and two: four</s>" 19, "<s>is it: no</s>" 11.
    assert (report.rows, report.used, report.too_long, report.no_label, len(rows)) == (3, 1, 2, 0, 1)
    assert (report.tokens, report.label_tokens) == (11, 4)
    rows, report = encode_task(task(file), tokenizer, SequenceConfig(too_long="truncate"), 14)
    assert (report.used, report.too_long, report.no_label) == (3, 2, 0)
    assert [len(ids) for ids in rows["input_ids"]] == [14, 14, 11]
    _, report = encode_task(task(file), tokenizer, SequenceConfig(too_long="truncate"), 13)
    assert (report.used, report.too_long, report.no_label) == (1, 2, 2)
    with pytest.raises(ValueError, match="task 'sums': 2 of 3 rows exceed 16 tokens, the longest has 19; raise"):
        encode_task(task(file), tokenizer, SequenceConfig(too_long="error"), 16)
    with pytest.raises(ValueError, match="task 'sums' is empty: of 3 rows, 3 exceed 5 tokens"):
        encode_task(task(file), tokenizer, SequenceConfig(), 5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": "none.jsonl"}, FileNotFoundError, "task 'sums': no file matches 'none.jsonl'"),
        ({"prompt": "{question}:"}, ValueError, "task 'sums' needs the column 'question', but .* has q, a"),
        ({"choices": ["{x}", "{y}"]}, ValueError, "needs the column 'x'"),
        ({"split": "train[:0]"}, ValueError, r"'sums' cannot be read .* .split 'train\[:0\]'.: .* no data"),
        ({"prompt": "{}:"}, ValueError, "an empty {} in a template"),
        ({"columns": ["q"]}, ValueError, "^task 'sums': columns names the columns of csv and tsv files"),
        ({"field": "rows"}, ValueError, "^task 'sums': field is for a .json file that holds one object; remove it for"),
        ({"parse": "(?P<q>.*)"}, ValueError, "parse needs named groups .* and a txt file"),
    ],
)
def test_data_that_does_not_fit_is_named(
    file: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_rows(task(**{"data": file} | changes))


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.tsv").write_text("q\ta\n")
    with pytest.raises(ValueError, match="task 'sums' cannot be read from '.*empty.tsv' .split 'train'.: .* no data"):
        load_rows(task(str(tmp_path / "empty.tsv")))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("z.jsonl", b"", "z.jsonl has 0 bytes"),
        ("z.csv", b"", "z.csv has 0 bytes"),
        ("z.txt", b"", "z.txt has 0 bytes"),
        ("u.jsonl", b'{"q":"a","a":"b"}\n{"q":"\xff","a":"b"}\n', r"u.jsonl, row 2: not UTF-8 text .*0xff"),
        ("u.csv", b"q,a\nx,\xff\n", r"u.csv, row 2: not UTF-8 text .*0xff"),
        ("u.txt", b"\xff\n", r"u.txt, row 1: not UTF-8 text .*0xff"),
        ("b.jsonl", b'{"q":"a","a":"b"}\n{"q":"x", \n', r"b.jsonl, row 2: not valid JSON"),
        ("b.json", b'{"q":"a","a":"b"}\n{"q":"x", \n', r"b.json, row 2: not valid JSON"),
        ("l.jsonl", b"[1]\n[2]\n", r"l.jsonl, row 1: a row must be a JSON object, got \[1\]"),
        ("b.csv", b"q,a\nx,y\nx,y,z\n", "b.csv.*Expected 2 fields in line 3, saw 3"),
        ("b.jsonl.gz", b"abc", r"b.jsonl.gz: Not a gzipped file"),
        (
            "c.jsonl.gz",
            gzip.compress(b'{"q":"a","a":"b"}\n' * 99, mtime=0)[:-12],
            r"c.jsonl.gz: Compressed file ended before",
        ),
        ("c.txt.gz", gzip.compress(b"a=b\n" * 99, mtime=0)[:-12], r"c.txt.gz: Compressed file ended before"),
        ("c.csv.gz", gzip.compress(b"q,a\n" * 99, mtime=0)[:-12], r"c.csv.gz: Compressed file ended before"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_row(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"task 'sums' cannot be read from .*{message}"):
        load_rows(task(str(tmp_path / name)))


def test_a_template_that_does_not_fit_a_row_is_shown(file: str) -> None:
    with pytest.raises(ValueError, match="the template '{q:d}' does not fit the row .*one and one"):
        encode_task(task(file, prompt="{q:d}"), tiny_tokenizer(), SequenceConfig(), CONTEXT)


def test_tab_separated_text_stays_text(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text('he said "no\tNA\nx\t\n')
    rows = load_rows(task(str(tmp_path / "t.tsv"), columns=["q", "a"]))
    assert rows.to_list() == [{"q": 'he said "no', "a": "NA"}, {"q": "x", "a": ""}]


def test_lines_are_parsed_by_named_groups(tmp_path: Path) -> None:
    path = tmp_path / "scan.txt.gz"
    path.write_bytes(gzip.compress(b"IN: jump twice OUT: I_JUMP I_JUMP\nIN: look OUT: I_LOOK\n", mtime=0))
    parsed = task(str(path), parse="IN: (?P<q>.*) OUT: (?P<a>.*)", replace={"I_JUMP": "J", "I_LOOK": "K"})
    assert load_rows(parsed).to_list() == [{"q": "jump twice", "a": "J J"}, {"q": "look", "a": "K"}]
    path.write_bytes(gzip.compress(b"IN: look OUT: I_LOOK\nOUT\n", mtime=0))
    with pytest.raises(ValueError, match="1 of 2 lines do not match parse, the first is 'OUT'"):
        load_rows(parsed)


def test_rows_inside_a_json_document(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text('{"examples": [{"q": "x", "a": "y"}]}')
    assert load_rows(task(str(tmp_path / "d.json"), field="examples")).to_list() == [{"q": "x", "a": "y"}]


def test_evaluation_rows_have_their_own_file_and_limit(file: str) -> None:
    scored = eval_task(task("train.jsonl", limit=5, split="train[:1]", eval=EvalConfig(data=file, limit=2)))
    assert (scored.data, scored.limit, scored.split) == (file, 2, "train")
    assert len(load_rows(scored)) == 2


def test_probabilities_by_hand() -> None:
    sizes, weights = [900, 100], [1.0, 3.0]
    assert probabilities(sizes, weights, MixingConfig()) == pytest.approx([900 / 1200, 300 / 1200])
    assert probabilities(sizes, weights, MixingConfig(strategy="weights")) == pytest.approx([0.25, 0.75])
    softened = MixingConfig(strategy="temperature", temperature=2.0)
    assert probabilities(sizes, weights, softened) == pytest.approx([30 / 60, 30 / 60])


def test_mixing_draws_by_weight_keeps_every_row_and_repeats_by_seed(tmp_path: Path) -> None:
    tasks = [
        task(write_jsonl(tmp_path / "a.jsonl", [{"q": f"{i}", "a": "x"} for i in range(300)]), name="a", weight=1.0),
        task(write_jsonl(tmp_path / "b.jsonl", [{"q": f"{i}", "a": "y"} for i in range(300)]), name="b", weight=3.0),
    ]
    tokenizer = tiny_tokenizer()

    def mixed(seed: int) -> list[str]:
        rows, reports = mixed_dataset(
            tasks, tokenizer, MixingConfig(strategy="weights", seed=seed), SequenceConfig(), CONTEXT, [4, 7]
        )
        assert all((label == 7) == (row == 1) for label, row in zip(rows["task_label"], rows["task"], strict=True))
        assert {row == 1 for row in rows["task"]} == {True, False}
        assert [report.probability for report in reports] == [0.25, 0.75]
        return [tokenizer.decode(ids) for ids in rows["input_ids"]]

    texts = mixed(0)
    assert len(set(texts)) == 600
    share = sum(text.endswith("y</s>") for text in texts) / len(texts)
    # 5 standard deviations of a binomial share.
    assert abs(share - 0.75) < 5 * (0.75 * 0.25 / len(texts)) ** 0.5
    assert texts == mixed(0) != mixed(1)


def test_proportional_mixing_of_equal_weights_has_each_row_once(file: str) -> None:
    rows, reports = mixed_dataset(
        [task(file, name="a"), task(file, name="b", limit=1)],
        tiny_tokenizer(),
        MixingConfig(),
        SequenceConfig(),
        CONTEXT,
        [0, 1],
    )
    assert (rows["task"], rows["task_label"]) == ([0, 0, 0, 1], [0, 0, 0, 1])
    assert (len(rows), [report.probability for report in reports]) == (4, [0.75, 0.25])


def test_batches_grouped_by_length_have_each_row_once_and_depend_on_seed_and_epoch_alone() -> None:
    lengths = [(7 * i) % 101 for i in range(1003)]
    sampler = LengthGroupedSampler(lengths, 8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(1003))
    assert list(sampler) == first == list(LengthGroupedSampler(lengths, 8, seed=3))
    sampler.set_epoch(1)
    assert sorted(sampler) == sorted(first) and list(sampler) != first
    assert list(LengthGroupedSampler(lengths, 8, seed=4)) != first
    spreads = [max(b) - min(b) for b in ([lengths[i] for i in first[k : k + 8]] for k in range(0, 1000, 8))]
    # A pool of 400 rows covers lengths 0 to 100, so a batch of 8 covers about 2; unsorted it would cover about 79.
    assert sum(spreads) / len(spreads) < 8


def test_processes_read_rows_of_like_length_at_the_same_time() -> None:
    """Each its own rows, all of them, anew in each epoch."""
    lengths = [(7 * i) % 101 for i in range(800)]
    loaders = []
    for rank in range(2):
        sampler = LengthGroupedSampler(lengths, 2 * 4, seed=3)
        loader = DataLoader(list(range(800)), batch_size=4, sampler=sampler, collate_fn=list)
        loaders.append(prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False))
    epochs = []
    for epoch in range(2):
        for loader in loaders:
            loader.set_epoch(epoch)
        pairs = list(zip(*loaders, strict=True))
        assert sorted(row for pair in pairs for batch in pair for row in batch) == list(range(800))
        longest = [[max(lengths[row] for row in batch) for batch in pair] for pair in pairs]
        assert sum(abs(a - b) for a, b in longest) / len(longest) < 4
        epochs.append(pairs)
    assert epochs[0] != epochs[1]
