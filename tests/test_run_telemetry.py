"""What a run tells of itself: speed, memory, operations and losses in the log, in TensorBoard's and in W&B's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_cli import molora, write_recipe
from tiny_lm import save_tiny, tiny_llama
from tiny_models import base_model, config
from torch.utils.flop_counter import FlopCounterMode

from molora.context import runtime_of
from molora.telemetry import routing_report
from molora.train import throughput
from molora.train.flops import PEAK_TFLOPS, peak_flops, step_flops
from molora.train.throughput import Throughput

FIGURES = {"tokens_per_second", "peak_memory_gib", "mfu", "router_loss", "loss/sums", "loss/odd", "largest_load"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLORA_PEAK_TFLOPS", "0.001")


def lines(out: Path) -> list[dict[str, Any]]:
    return [line for line in json.loads((out / "loss_curve.json").read_text()) if "loss" in line]


def test_tensorboard_has_what_the_log_has(base: str, tmp_path: Path, peak: None) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    recipe = write_recipe(tmp_path, base, max_steps=4, save_steps=4, logging_steps=2, report_to="tensorboard")
    assert molora("train", recipe, "evaluation={before: false, after: false}") == 0
    (events,) = (out / "runs").rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events)).Reload()
    log = lines(out)
    assert [line["step"] for line in log] == [1, 2, 4]
    scalars = {key for line in log for key in line if isinstance(line[key], int | float)} - {"step"}
    assert scalars >= FIGURES | {"loss", "grad_norm"}
    assert any(key.startswith("routing/") and key.endswith("/entropy_after") for key in scalars)
    for key in scalars - {"epoch"}:  # which the end of training has, too
        want = [(line["step"], line[key]) for line in log if key in line]
        got = [(event.step, event.value) for event in read.Scalars(f"train/{key}")]
        assert [step for step, _ in got] == [step for step, _ in want], key
        assert [value for _, value in got] == pytest.approx([value for _, value in want], rel=1e-5), key


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """The rows of a run's own file: a log of LevelDB's format (7 bytes of header, blocks of 32 KiB, records in pieces)
    of protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, message, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        piece, at = content[at + 7 : at + 7 + length], at + 7 + length
        message = piece if kind in (1, 2) else message + piece
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(message)
            items = record.history.item
            rows += [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}] if items else []
    return rows


@pytest.mark.slow
def test_wandb_offline_has_what_the_log_has(
    base: str, tmp_path: Path, peak: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    for key, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    recipe = write_recipe(tmp_path, base, max_steps=4, save_steps=4, logging_steps=2, report_to="wandb")
    try:
        assert molora("train", recipe, "evaluation={before: false, after: false}") == 0
    finally:
        wandb.teardown()  # its service is a process of its own
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    own = [row for row in wandb_history(file) if "train/loss" in row]
    log = lines(tmp_path / "out")
    assert [row["train/global_step"] for row in own] == [line["step"] for line in log] == [1, 2, 4]
    for row, line in zip(own, log, strict=True):
        scalars = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"}
        assert scalars.keys() >= FIGURES - {"loss/sums", "loss/odd"}
        assert {key: row[f"train/{key}"] for key in scalars} == pytest.approx(scalars)


def test_a_service_that_is_not_there_is_named_first(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from molora.train import settings

    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    recipe = write_recipe(tmp_path, base, report_to=["tensorboard"])
    for options in ([], ["--dry-run"]):
        assert molora("train", recipe, *options) == 2
        shown = capsys.readouterr().err
        assert "recipe.training.report_to names 'tensorboard', which is not installed; pip install" in shown
    assert not (tmp_path / "out").exists()


def padded(model: Any, lengths: list[int]) -> dict[str, torch.Tensor]:
    mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
    ids = torch.randint(3, model.config.vocab_size, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_figures_equal_plain_counts(monkeypatch: pytest.MonkeyPatch, peak: None) -> None:
    """Two micro-batches in half a second, a second of saving not counted; packed rows as their sequences."""
    clock = iter([100.0, 100.1, 101.1, 101.5, 200.0, 200.25, 300.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    model = get_peft_model(base_model(), config("linear")).train()
    figures, router_losses = Throughput(model, "cpu"), []
    for lengths in ([5, 2], [4, 4]):
        batch = padded(model, lengths)
        model(**batch).loss.backward()
        router_losses.append(float(runtime_of(model).losses["default"]))
        figures.add(batch)
    active = sum(use.active / len(use.load) for use in routing_report(model).values()) / len(runtime_of(model).sites)
    # Read by the figures before the log's callback takes it; here it was taken, so it is given back.
    monkeypatch.setattr(throughput, "active_share", lambda runtime: active)
    with figures.paused():
        pass
    logs = figures.collect()
    assert logs["tokens_per_second"] == pytest.approx(15 / 0.5)
    assert logs["router_loss"] == pytest.approx(sum(router_losses) / 2) and logs["router_loss"] > 0
    assert logs["mfu"] == pytest.approx(step_flops(model).count(15, 25 + 4 + 16 + 16, active) / 0.5 / 1e9)
    assert 0.05 < logs["peak_memory_gib"] < 64
    assert figures.collect() == {}

    packed = {"input_ids": torch.zeros(1, 7), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 0]])}
    figures.add(packed)
    assert figures.sums.tolist() == [7, 16 + 4 + 1]
    assert figures.collect()["tokens_per_second"] == pytest.approx(7 / 0.25)


@pytest.mark.parametrize("kind", ["mixture", "lora", "full"])
def test_operations_equal_those_that_torch_counts(kind: str) -> None:
    """Against torch's counter of matrix products, of a model with eager attention, which computes the whole square.

    torch counts what runs. In a mixture whose gates are soft all experts work. What is left is named: the lowest
    layers need no gradient of their input, and with three layers that is less than a tenth.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=80, attn_implementation="eager", **shape))
    if kind == "mixture":
        soft = config("linear", num_experts=4, r=4, router={"name": "softmax"}, plain_lora=None)
        model: Any = get_peft_model(base, soft)
    elif kind == "lora":
        model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    else:
        model = base
    model.train()
    ids = torch.randint(3, 80, (2, 24))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    flops = step_flops(model)
    # Twice the causal half.
    want = flops.count(48, 2 * 24**2, 1.0) + 6 * flops.attention * 2 * 24**2
    assert counter.get_total_flops() == pytest.approx(want, rel=0.1)
    assert flops.attention == 3 * 64
    if kind == "full":
        assert flops.frozen == flops.experts == 0
    if kind == "mixture":
        assert flops.experts == sum(
            p.numel() for n, p in model.named_parameters() if "molora_A" in n or "molora_B" in n
        )


def test_frozen_weights_count_once_and_by_their_sizes() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    linears = {n: m for n, m in tiny_llama().named_modules() if isinstance(m, torch.nn.Linear)}
    flops = step_flops(model)
    assert flops.frozen == sum(m.weight.numel() for m in linears.values())
    assert flops.trained == sum(2 * sum(m.weight.shape) for n, m in linears.items() if n != "lm_head")


def test_the_peak_is_that_of_the_device_or_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOLORA_PEAK_TFLOPS", raising=False)
    assert peak_flops(torch.device("cpu")) is None
    names = {
        "NVIDIA H100 80GB HBM3": 989.4,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA A100-SXM4-80GB": 311.9,
        "NVIDIA A10G": 70.0,
        "NVIDIA L40S": 362.0,
        "NVIDIA L4": 121.0,
        "Quadro of nobody": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", 0)) == (None if peak is None else peak * 1e12), name
    parts = list(PEAK_TFLOPS)
    assert not any(a in b for i, a in enumerate(parts) for b in parts[i + 1 :]), "a name hides a longer one behind it"
    for given in ("fast", "0", "-3", "nan", "inf"):
        monkeypatch.setenv("MOLORA_PEAK_TFLOPS", given)
        with pytest.raises(ValueError, match=f"MOLORA_PEAK_TFLOPS='{given}' must be a number above 0"):
            peak_flops(torch.device("cpu"))
