"""Training through the trainers people use, unchanged, and under autocast."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import PLACEMENTS, base_model, batch, config, logits, train, trained
from transformers import Trainer, TrainingArguments

import molora
from molora.layers import MoloraLayer


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_autocast_trains_and_routes_as_without(placement: str):
    model = trained(placement=placement)
    plain, under = {}, {}
    for seen, enabled in ((plain, False), (under, True)):
        handles = [
            m.molora_router.default.register_forward_hook(
                lambda _m, args, out, n=n, seen=seen: seen.__setitem__(n, (args[0], out))
            )
            for n, m in model.named_modules()
            if isinstance(m, MoloraLayer) and "default" in m.molora_router
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits(model)
        for handle in handles:
            handle.remove()
    for name, (x, routing) in under.items():
        router = dict(model.named_modules())[name].molora_router.default
        assert torch.equal(router(x).gates, routing.gates), name
        assert routing.gates.dtype == torch.float32
    first = next(iter(plain))
    assert torch.equal(plain[first][1].topk_ids, under[first][1].topk_ids)
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(model, 4)
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_compiled_model_drops_and_trains(placement: str):
    few: dict = {"plain_lora": None} if placement == "ffn" else {"target_modules": ["q_proj", "k_proj", "down_proj"]}
    model = get_peft_model(base_model(), config(placement, lora_dropout=0.5, **few)).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = [compiled(**batch()).loss for _ in range(2)]
    losses[0].backward()
    fresh = {n: p.grad for n, p in model.named_parameters() if "molora_B" in n}
    assert fresh and all(grad is not None and grad.abs().sum() > 0 for grad in fresh.values())
    train(model, 2)
    assert compiled(**batch()).loss != compiled(**batch()).loss


def _arguments(tmp_path: Path, **options: object) -> dict[str, object]:
    return {
        "output_dir": str(tmp_path),
        "max_steps": 3,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        **options,
    }


def _rows() -> list[dict[str, list[int]]]:
    return [{k: v[i].tolist() for k, v in batch(4).items()} for i in range(4)]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_trainer_trains_and_saves(tmp_path: Path, placement: str):
    model = get_peft_model(base_model(), config(placement))
    Trainer(model, TrainingArguments(**_arguments(tmp_path)), train_dataset=_rows()).train()
    model.save_pretrained(tmp_path)
    want = logits(model.eval())
    assert not torch.equal(want, logits(base_model()))
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path)), want)


def test_sft_trainer_takes_the_config(tmp_path: Path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tiny_lm import tiny_tokenizer

    rows = Dataset.from_list([{k: r[k] for k in ("input_ids", "labels")} for r in _rows()])
    arguments = trl.SFTConfig(**_arguments(tmp_path, bf16=False, max_length=None))
    trainer = trl.SFTTrainer(
        base_model(), arguments, train_dataset=rows, peft_config=config(), processing_class=tiny_tokenizer()
    )
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    assert all(p.abs().sum() > 0 for n, p in trainer.model.named_parameters() if "molora_B" in n)
    assert molora.routing_statistics(trainer.model)


def test_task_losses_are_token_means() -> None:
    """Against cross entropy of each task's tokens alone; a task without a token has no line."""
    from molora.train.task_loss import TaskLosses

    losses, logits, labels = TaskLosses(["a", "b", "c"]), [], []
    tasks = [torch.tensor([0, 2, 0]), torch.tensor([2, 2])]
    for rows in tasks:
        logits.append(torch.randn(len(rows), 6, 11))
        labels.append(torch.randint(11, (len(rows), 6)).masked_fill(torch.rand(len(rows), 6) < 0.4, -100))
        losses.add(logits[-1].bfloat16(), labels[-1], rows)
    got = losses.collect()
    assert got.keys() == {"loss/a", "loss/c"} and losses.collect() == {}
    for name, number in (("a", 0), ("c", 2)):
        picked = [(x[rows == number], y[rows == number]) for x, y, rows in zip(logits, labels, tasks, strict=True)]
        flat = torch.cat([x.bfloat16().float()[:, :-1].flatten(0, 1) for x, _ in picked])
        want = torch.nn.functional.cross_entropy(flat, torch.cat([y[:, 1:].flatten() for _, y in picked]))
        assert math.isclose(got[f"loss/{name}"], float(want), rel_tol=1e-6)
