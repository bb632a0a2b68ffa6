"""Every preset's gradients against its loss written by hand: checkpointing, trainers, windows of micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from gradients import (
    CHECKPOINTING,
    Batch,
    Gradients,
    hand_written,
    micro_batches,
    relative_error,
    router_inputs,
    take_gradients,
    tiny_llama,
    token_weights,
    trainer_gradients,
    use_checkpointing,
)
from router_formulas import bias_step, chosen_counts
from tiny_models import preset_config, preset_model
from torch import Tensor, nn

from molora.presets import PRESETS
from molora.routers import RankWise

EXACT = 1e-5  # relative, per parameter, fp32

pytestmark = pytest.mark.filterwarnings("error:.*not the model's own")


def num_tasks(name: str) -> int:
    """How many task labels this preset's losses tell apart; 0: they need none."""
    return preset_config(name).router.task_labels(4)


def task_batches(name: str, count: int, by_token: bool = False, seed: int = 5) -> list[Batch]:
    """Micro-batches, with the tasks of rows or of tokens where the preset wants them; presets take turns in padding."""
    batches = micro_batches(count, ("left", "right")[list(PRESETS).index(name) % 2], seed)
    tasks = num_tasks(name)
    generator = torch.Generator().manual_seed(seed)
    for batch in batches if tasks else []:
        rows, length = batch["input_ids"].shape
        labels = torch.randint(tasks, (rows,), generator=generator)
        if by_token:
            labels = labels.unsqueeze(1).repeat(1, length)
            if tasks > 2:  # tasks meet within a row, and some tokens have none
                labels[:, length // 2 :] = (labels[:, :1] + 1) % tasks
                labels[:, length - 2] = -100
        batch["task_labels"] = labels
    return batches


def rank_counts(model: nn.Module, batches: Sequence[Batch]) -> list[tuple[Any, Tensor]]:
    """(router, how many tokens without padding choose each of its ranks) over the micro-batches."""
    counts: dict[int, tuple[Any, Tensor]] = {}
    model.eval()
    for batch in batches:
        with torch.no_grad(), router_inputs(model, hooks=True) as inputs:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for router, x, _ in inputs:
            found = chosen_counts(router, x, batch["attention_mask"])
            counts[id(router)] = (router, found + counts[id(router)][1] if id(router) in counts else found)
    model.train()
    return list(counts.values())


@cache
def oracle(name: str, by_token: bool) -> list[Gradients]:
    """The gradients of two steps over the same two micro-batches, written by hand; only a rank-wise bias moves in
    between."""
    batches = task_batches(name, 2, by_token)
    model = preset_model(name, tiny_llama())
    steps = [hand_written(model, batches, token_weights(batches))]
    if isinstance(preset_config(name).router, RankWise):
        for router, counts in rank_counts(model, batches):
            router.bias_steps += bias_step(counts)
    return [*steps, hand_written(model, batches, token_weights(batches))]


_KINDS = list(CHECKPOINTING)
MATRIX = [(name, "loop", kind) for name in PRESETS for kind in CHECKPOINTING]
MATRIX += [(name, "trainer", _KINDS[i % 3]) for i, name in enumerate(PRESETS)]
MATRIX += [(name, "sft", _KINDS[(i + 1) % 3]) for i, name in enumerate(PRESETS)]


@pytest.mark.parametrize("name, trainer, checkpointing", MATRIX)
def test_gradients_equal_the_hand_written_loss(
    name: str, trainer: str, checkpointing: str, record_property: pytest.RecordProperty
) -> None:
    by_token = trainer == "trainer" or checkpointing == "reentrant"
    want = oracle(name, by_token)
    batches = task_batches(name, 2, by_token)
    model = preset_model(name, tiny_llama())
    if trainer == "loop":
        use_checkpointing(model, checkpointing)
        steps = []
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        for _ in range(2):
            for batch, weight in zip(batches, token_weights(batches), strict=True):
                (model(**batch).loss * weight).backward()
            optimizer.step()
            steps.append(take_gradients(model))
    else:
        if trainer == "sft":
            pytest.importorskip("trl")
        steps = trainer_gradients(trainer, model, batches, checkpointing)
    errors = [relative_error(got, expected) for got, expected in zip(steps, want, strict=True)]
    record_property("error", max(errors))
    print(f"{name} {trainer} {checkpointing}: {max(errors):.1e}")
    assert max(errors) <= EXACT
