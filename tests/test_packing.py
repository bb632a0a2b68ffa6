"""Packed rows: the losses, gradients and counts of the same rows padded; no row sees another; refusals; resume."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from gradients import VOCAB, mixture, relative_error, take_gradients, tiny_llama
from peft import get_peft_model
from test_cli import losses, molora, write_recipe
from test_resume import error
from test_streaming import numbers, stream, task
from tiny_lm import CONTEXT, save_tiny
from tiny_models import base_model
from torch.nn import functional

from molora import MoloraConfig
from molora.context import runtime_of
from molora.eval.encode import IGNORED, collate
from molora.routers import Retrieval
from molora.train.packable import check_packable
from molora.train.packing import PackedStream, best_fit, collate_packed, pack_in_windows
from molora.train.task_loss import TaskLosses


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base"))


def rows_of(lengths: tuple[int, ...] = (7, 4, 9, 1, 5), learned: str = "answers") -> list[dict[str, Any]]:
    """Rows of several tasks; without loss on the first tokens, or (``loss: all``) with loss on all."""
    generator = np.random.default_rng(3)
    rows = []
    for i, length in enumerate(lengths):
        ids = generator.integers(3, VOCAB, length)
        labels = ids.copy()
        if learned == "answers":
            labels[: length // 2] = IGNORED
        rows.append({"input_ids": ids, "labels": labels, "task": i % 2, "task_label": i % 2})
    return rows


SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32}
ROUTERS: dict[str, dict[str, Any]] = {
    "balance and z-loss": {"top_k": 2, "router_z_loss_coef": 0.1},
    "balance by sample": {"balance_over": "sample"},
    "balance over the window": {"balance_over": "window"},
    "task loss of the next token": {"task_loss_coef": 0.1, "top_k": 1},
    "capacity by row": {"expert_capacity": 3},
    "tsallis entropy": {"name": "tsallis", "entropy_threshold": 0.6},
    "localized balance": {"name": "softmax", "localized_balance_coef": 0.1},
    "counts of ranks": {"name": "rank_wise", "active_ranks": 2},
}


def router_model(kind: str, attention: str, base: Any = None) -> Any:
    base = tiny_llama() if base is None else base
    base.set_attn_implementation(attention)
    router = {"name": "top_k", "router_aux_loss_coef": 0.1, "init_std": 0.2} | ROUTERS[kind]
    if router["name"] == "rank_wise":
        router = ROUTERS[kind]
    options = {"num_experts": 1, "r": 8} if router["name"] == "rank_wise" else {"num_experts": 4, "r": 4}
    torch.manual_seed(1)
    return get_peft_model(base, MoloraConfig(**options, lora_alpha=4, router=router, init_lora_weights=False)).train()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_packed_rows_have_the_gradients_of_padded_rows(kind: str, attention: str) -> None:
    rows = rows_of(learned="all" if kind == "tsallis entropy" else "answers")
    batches = [collate(rows, with_task_labels=True), collate_packed([rows[:2], rows[2:]], with_task_labels=True)]
    found = []
    for batch in batches:
        model = router_model(kind, attention)
        batch.pop("task")
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        runtime = runtime_of(model)
        counts = {site: count.tolist() for site, count in runtime.window.counts.items()}
        found.append((loss.item(), take_gradients(model), counts, {k: float(v) for k, v in runtime.losses.items()}))
    (loss, grads, counts, aux), (packed_loss, packed_grads, packed_counts, packed_aux) = found
    # Of rank-wise gates the rounding of fp32 is 3.3e-5; the next test leaves rounding out.
    exact = 1e-4 if kind == "counts of ranks" else 1e-5
    assert packed_loss == pytest.approx(loss, rel=exact) and packed_counts == counts
    assert packed_aux == pytest.approx(aux, rel=exact) and (bool(counts) == (kind == "counts of ranks"))
    assert any("router" in name and grad.abs().max() > 0 for name, grad in grads.items())
    assert relative_error(packed_grads, grads) < exact


@pytest.mark.parametrize("kind", ROUTERS)
def test_packed_rows_have_the_gradients_of_padded_rows_in_fp64(kind: str) -> None:
    """On a base that computes in fp64 throughout; loss on every token."""
    rows = rows_of(learned="all")
    found = []
    for batch in (collate(rows, with_task_labels=True), collate_packed([rows[:2], rows[2:]], with_task_labels=True)):
        base = base_model("gpt2").double()
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model, labels = router_model(kind, "eager", base).double(), batch["labels"]
        with model.aux_weight(1.0):
            given = {key: batch.get(key) for key in ("input_ids", "attention_mask", "position_ids", "task_labels")}
            logits = model(**given, use_cache=False).logits
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        found.append(take_gradients(model))
    assert relative_error(found[1], found[0]) < 1e-12


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_no_row_sees_another(family: str, attention: str) -> None:
    """The gradient of a row's loss with respect to what goes in is exactly zero at every other row."""
    base = base_model(family)
    base.set_attn_implementation(attention)
    model = mixture(base=base, router={"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0})
    rows = rows_of((7, 4, 9, 5))
    batch = collate_packed([rows])
    starts = np.cumsum([0, *(len(row["input_ids"]) for row in rows)])
    for number in range(len(rows)):
        inside = torch.zeros(int(starts[-1]), dtype=torch.bool)
        inside[starts[number] : starts[number + 1]] = True
        embeds = base.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        labels = batch["labels"].masked_fill(~inside, IGNORED)
        model(inputs_embeds=embeds, position_ids=batch["position_ids"], labels=labels, use_cache=False).loss.backward()
        assert embeds.grad is not None
        moved = embeds.grad[0].abs().amax(1) > 0
        assert not (moved & ~inside).any() and moved[starts[number] : starts[number + 1] - 1].all()


def test_a_packed_line_has_each_row_whole_and_no_label_at_its_start() -> None:
    rows = rows_of((3, 1, 2), learned="all")
    batch = collate_packed([rows[:1], rows[1:]], with_task_labels=True)
    assert "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["input_ids"][0].tolist() == [int(t) for row in rows for t in row["input_ids"]]
    ignored = [True, False, False, True, True, False]
    assert [label == IGNORED for label in batch["labels"][0].tolist()] == ignored
    assert batch["task"].tolist() == batch["task_labels"].tolist() == [[0, 0, 0, 1, 0, 0]]


def test_the_losses_by_task_are_those_of_padded_rows() -> None:
    rows, tables = rows_of(), []
    torch.manual_seed(0)
    logits = torch.randn(sum(len(row["input_ids"]) for row in rows), VOCAB)
    for batch in (collate(rows), collate_packed([rows])):
        losses = TaskLosses(["a", "b"])
        mask = batch.get("attention_mask", torch.ones_like(batch["labels"])).bool()
        given = torch.zeros(*mask.shape, VOCAB)
        given[mask] = logits
        losses.add(given, batch["labels"], batch["task"])
        tables.append(losses.collect())
    assert tables[0].keys() == {"loss/a", "loss/b"} and tables[1] == pytest.approx(tables[0], rel=1e-6)


def test_packs_hold_each_row_once_and_are_nearly_full() -> None:
    assert best_fit([5, 3, 8, 2, 4], 8) == [[0, 1], [2], [3, 4]]
    lengths = np.random.default_rng(0).integers(1, 120, 9000)
    packs = pack_in_windows(lengths, 256, seed=1)
    assert sorted(np.concatenate(packs).tolist()) == list(range(9000))
    sizes = [int(lengths[pack].sum()) for pack in packs]
    assert max(sizes) <= 256 and sum(sizes) / (256 * len(sizes)) > 0.97
    again, other = pack_in_windows(lengths, 256, seed=1), pack_in_windows(lengths, 256, seed=2)
    assert [p.tolist() for p in packs] == [p.tolist() for p in again] != [p.tolist() for p in other]


def test_a_stream_is_packed_as_it_comes(tmp_path: Path) -> None:
    mixed, _ = stream([task(numbers(tmp_path / "a.jsonl", 40))])
    packs = list(islice(PackedStream(mixed, CONTEXT), 100))
    taken = [len(pack) for pack in packs]
    assert sum(taken) >= 100 and all(sum(len(row["input_ids"]) for row in pack) <= CONTEXT for pack in packs)
    assert [len(pack) for pack in islice(PackedStream(mixed, CONTEXT), 100)] == taken


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: base_model("opt"), "OPTForCausalLM looks from one packed row into another"),
        (lambda: hf.BloomForCausalLM(hf.BloomConfig(**SMALL, n_layer=1, n_head=4)), "takes no position ids"),
        (lambda: hf.MambaForCausalLM(hf.MambaConfig(**SMALL, num_hidden_layers=1)), "has recurrent layers"),
    ],
    ids=["cross-talk", "no positions", "recurrent"],
)
def test_a_base_that_mixes_rows_is_refused(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"sequence.packing: .*{message}.*; set packing: false"):
        check_packable(model(), 64)


def test_what_else_cannot_be_packed_is_one_sentence(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_packable(base_model("gemma3"), 64)
    with pytest.raises(ValueError, match="router 'retrieval' chooses by the prompt"):
        check_packable(base_model(), 64, Retrieval())
    with pytest.raises(ValueError, match="set sequence.max_length"):
        check_packable(base_model(), None)
    recipe = write_recipe(tmp_path, base, accelerator_config={"dispatch_batches": True})
    assert molora("train", recipe, "sequence.packing=true") == 2
    assert "dispatch_batches=true would join packed batches" in error(capsys)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_packed_run_resumes_bit_for_bit(
    streaming: bool, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the second epoch where there is one; grouped by length where there are lengths."""
    options = ["sequence.packing=true", "evaluation.before=false", "evaluation.after=false"]
    options.append("mixing.streaming=true" if streaming else "training.train_sampling_strategy=group_by_length")
    recipe, out = (
        write_recipe(tmp_path, base, max_steps=8, per_device_train_batch_size=2, save_steps=6),
        tmp_path / "out",
    )
    assert molora("train", recipe, *options) == 0
    shown = capsys.readouterr().out
    assert "packed into" in shown and f"sequences of at most {CONTEXT} tokens" in shown
    whole, results = losses(out), json.loads((out / "results.json").read_text())
    report = results["training"]["packing"]
    tokens = sum(entry["tokens"] or 0 for entry in results["training"]["data"])
    assert report["max_length"] == CONTEXT and (report["fill"] is None) == streaming == (tokens == 0)
    assert streaming or 0.8 < report["fill"] <= 1
    for path in (*out.glob("*.json"), out / "adapter_model.safetensors"):
        path.unlink()
    shutil.rmtree(out / "checkpoint-8")
    assert molora("train", recipe, "--resume", *options) == 0
    assert losses(out) == whole
    lines = json.loads((out / "loss_curve.json").read_text())
    assert {key for line in lines for key in line if key.startswith("loss/")} == {"loss/sums", "loss/odd"}
