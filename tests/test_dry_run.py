"""What the dry run says, against what training then does."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_cli import molora, write_recipe
from tiny_lm import save_tiny
from tiny_models import base_model, config
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainingArguments

from molora.equal_lora import active_parameters
from molora.eval.dry_run_output import sample_text
from molora.eval.encode import collate
from molora.quantization import weight_bytes
from molora.train.checkpoint import AtomicTrainer
from molora.train.dry_run import dry_run
from molora.train.memory_estimate import MemoryEstimate, estimate_memory
from molora.train.prepare import prepare
from molora.train.recipe import read_recipe
from molora.train.step_peaks import END, at_length, stretch_peaks

LINES, LENGTH = 2, 64


def trainer_of(folder: Path, adapter: Any, **options: Any) -> AtomicTrainer:
    rows = [{"input_ids": [5] * (LENGTH - (i == 1)), "labels": [5] * (LENGTH - (i == 1))} for i in range(LINES)]
    arguments = {"output_dir": str(folder), "report_to": "none", "save_strategy": "no", "max_steps": 2, "use_cpu": True}
    arguments |= {"per_device_train_batch_size": LINES, "remove_unused_columns": False, "disable_tqdm": True}
    model = get_peft_model(base_model(), adapter)
    args = TrainingArguments(**arguments | options)  # type: ignore[arg-type]
    return AtomicTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), data_collator=collate)


def allocated(trainer: AtomicTrainer) -> int:
    """The most that training holds, by the allocations that the profiler sees."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        trainer.train()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most + weight_bytes(trainer.model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        (config("linear", r=32), {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
        (config("ffn"), {"optim": "sgd", "gradient_checkpointing": True}),
        (config("block", r=16), {"bf16": True, "optim": "adafactor"}),
        (LoraConfig(r=8, target_modules="all-linear"), {"optim": "adamw_torch", "attn": "eager"}),
    ],
    ids=["linear, accumulated", "ffn, sgd", "block, autocast", "lora, eager attention"],
)
def test_memory_is_what_training_takes(tmp_path: Path, adapter: Any, options: dict[str, Any]) -> None:
    """Within 15 %, the bar of the benchmark on a GPU (benchmarks/memory_estimate.py)."""
    attention = options.pop("attn", "sdpa")
    made = []
    for _ in range(2):
        made.append(trainer_of(tmp_path, adapter, **options))
        made[-1].model.base_model.model.set_attn_implementation(attention)
    estimate = estimate_memory(made[0], LINES, LENGTH)
    assert abs(estimate.total / allocated(made[1]) - 1) < 0.15, estimate
    trained = sum(p.numel() for p in made[1].model.parameters() if p.requires_grad)
    states = [t for s in made[1].optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    known = sum(t.nbytes for t in states)
    assert estimate.optimizer_states is not None and abs(estimate.optimizer_states - known) <= 0.5 * trained


def test_an_optimizer_that_cannot_be_tried_is_not_known(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, config())
    trainer.get_optimizer_cls_and_kwargs = lambda *_: (object, {})  # type: ignore[method-assign]
    assert estimate_memory(trainer, LINES, LENGTH).optimizer_states is None


@pytest.mark.parametrize("threshold", ["auto", "0"])
def test_at_stage_3_a_process_holds_its_part_of_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: Any
) -> None:
    trainer = trainer_of(tmp_path, config("linear"))
    base = [p for p in trainer.model.parameters() if not p.requires_grad]
    trained = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    buffers = sum(b.nbytes for b in trainer.model.buffers())
    for parameter in base:
        parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
        parameter.ds_tensor = parameter.data.flatten()[: -(-parameter.numel() // 2)]
        parameter.data = torch.empty(0)
    zero = {"stage": 3, "stage3_param_persistence_threshold": threshold}
    trainer.args.hf_deepspeed_config = SimpleNamespace(config={"zero_optimization": zero})
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    estimate = estimate_memory(trainer, LINES, LENGTH)
    whole = trained // 2 + (trained if threshold == "auto" else 0)  # the adapters, beside their parts
    assert abs(estimate.weights - sum(p.ds_tensor.nbytes for p in base) - whole) <= buffers
    assert (estimate.optimizer_states, estimate.gradients, estimate.activations) == (trained, trained // 2, None)


def test_stretches_and_their_extrapolation() -> None:
    """Two products, whose tensors are known: the input is there before; 4 bytes an entry."""
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def peaks(tokens: int) -> dict[str, int]:
        x = torch.randn(tokens, 8)
        return stretch_peaks(lambda: model(x).sum().backward(), dict(model.named_parameters()), torch.device("cpu"))

    found = [peaks(n) for n in (32, 48, 64)]
    assert list(found[0]) == ["1.weight", "0.weight", END]
    # hidden (T, 16), its gradient, the output (T, 4) and the gradient of the second weight (4, 16) lie between.
    assert 4 * 32 * (16 + 4) <= found[0]["1.weight"] <= 4 * (32 * (16 + 4 + 4 + 16) + 64) + 64
    for name, measured in peaks(256).items():
        assert at_length((32, 48, 64), [f[name] for f in found], 256) == pytest.approx(measured, rel=0.02)
    assert at_length((2, 3, 4), [7 + 5 * n + 3 * n**2 for n in (2, 3, 4)], 10) == pytest.approx(7 + 50 + 300)
    assert at_length((2, 3, 4), [107, 110.01, 113], 10) == pytest.approx(131)


def test_schedule_is_that_of_the_run(tmp_path: Path) -> None:
    options = {"max_steps": -1, "num_train_epochs": 3, "warmup_steps": 2, "lr_scheduler_type": "cosine"}
    options |= {"save_strategy": "no", "gradient_accumulation_steps": 2}
    recipe = read_recipe(
        write_recipe(tmp_path, save_tiny(tmp_path / "base"), **options), ["tasks.0.limit=8", "tasks.1.limit=8"]
    )
    prepared = prepare(recipe)
    found = dry_run(recipe, prepared)
    rates: dict[int, float] = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rates[state.global_step + 1] = kwargs["lr_scheduler"].get_last_lr()[0]

    from molora.train.prepare import training_arguments
    from molora.train.run import make_trainer

    trainer = make_trainer(recipe, training_arguments(recipe), *prepared[:3], [Watch()], print)
    trainer.train()
    schedule = found.schedule
    assert schedule.max_steps == trainer.state.global_step == len(rates) and schedule.steps_per_epoch == len(rates) / 3
    assert schedule.rows_per_step == 8 and schedule.warmup_steps == 2
    assert schedule.learning_rates == pytest.approx({step: rates[step] for step in schedule.learning_rates})
    lengths = [len(ids) for ids in prepared[2]["input_ids"]]
    assert schedule.tokens_per_step == round(8 * sum(lengths) / len(lengths))
    assert isinstance(found.memory, MemoryEstimate) and found.memory.length == max(lengths)


def test_samples_mark_the_tokens_with_loss() -> None:
    tokens = [("a", False), (" b", False), ("\n", True), ("c", True)]
    assert sample_text("t", tokens).plain == "t: 4 tokens, [2] with loss\na| b[\\n][c]\n"
    long = [("x", False)] * 100 + [("y", True)] * 100
    assert sample_text("t", long).plain.endswith("[y] (40 tokens)\n")
    assert "\n(76 tokens) x|" in sample_text("t", long).plain


def test_the_command_line_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, save_tiny(tmp_path / "base"))
    for streaming in ([], ["mixing.streaming=true", "tasks.0.size=9", "tasks.1.size=9"]):
        assert molora("train", recipe, "--dry-run", *streaming) == 0
        shown = capsys.readouterr().out
        for text in (
            "sums: ",
            "odd: ",
            "] with loss",
            "active for a token",
            "steps in all",
            "learning rate at step 1 ",
            "peak",
        ):
            assert text in shown, text
    assert "a stream has no end" in shown
    assert not (tmp_path / "out").exists()


def test_active_parameters() -> None:
    model = get_peft_model(base_model(), config("linear"))
    count = {part: sum(p.numel() for n, p in model.named_parameters() if part in n) for part in ("_A", "_B", "_router")}
    assert active_parameters(model) == count["_A"] / 2 + count["_B"] / 2 + count["_router"]
    assert active_parameters(get_peft_model(base_model(), config("linear", router="tsallis"))) is None
    assert active_parameters(get_peft_model(base_model(), LoraConfig(r=2, target_modules="all-linear"))) is None
