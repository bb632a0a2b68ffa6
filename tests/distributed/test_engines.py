"""One recipe under DDP, FSDP2 and ZeRO-1, 2, 3 on two CPU processes against one process, and resumed on one, on two.

All processes see other rows, four micro-batches of them in a step; one process sees the same eight. Losses of router
and language model, adapter, router state, gradient of every expert and scores have to be those of one process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_lm import save_tiny, write_jsonl

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

WORKER = Path(__file__).with_name("engines_worker.py")
EXACT = 1e-5
STEPS, SAVED = 20, 10
MIXTURES = {
    "smora": {"preset": "smora", "r": 8, "router": {"active_ranks": 2, "bias_update_rate": 0.01}},
    "mixlora": {"preset": "mixlora", "num_experts": 4, "r": 2, "lora_dropout": 0.0},
}
ENGINES: dict[str, list[str]] = {
    "ddp": [],
    "fsdp": ["training.fsdp=true"],
    "zero1": ["training.deepspeed=zero1"],
    "zero2": ["training.deepspeed=zero2"],
    "zero3": ["training.deepspeed=zero3"],
}
FULL = [(engine, mixture) for engine in ENGINES for mixture in MIXTURES]
SHRUNK, GROWN, SAME = ("ddp", "fsdp", "zero2", "zero3"), ("ddp", "zero1", "zero3"), ("fsdp", "zero2", "zero3")


DTYPES = {"ddp": "float32", "fsdp": "float32", "zero2": "bfloat16", "zero3": "float32"}
"""Of trained parameters with base.dtype and training.bf16 in bf16, as docs/dtypes.md has it."""


def write_recipes(folder: Path) -> None:
    base = save_tiny(folder / "base")
    rows = [{"q": f"{i} and {i}", "a": str(2 * i), "y": i % 2} for i in range(160)]
    data = write_jsonl(folder / "rows.jsonl", rows)
    odd = {"prompt": "odd {q}:", "answer": "{y}", "choices": {"0": " no", "1": " yes"}}
    for name, mixture in MIXTURES.items():
        recipe = {
            "schema": "molora.recipe/1",
            "base": {"model": base},
            "mixture": mixture,
            "tasks": [
                {"name": "sums", "data": data, "prompt": "{q}:", "answer": " {a}", "eval": {"limit": 5}},
                {"name": "odd", "data": data, "eval": {"limit": 5}, **odd},
            ],
            "training": {
                "output_dir": "",
                "max_steps": STEPS,
                "per_device_train_batch_size": 1,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "max_grad_norm": 1e9,  # measured, never reached: ZeRO clips after its gradients are read here
                "save_steps": SAVED,
            },
            "evaluation": {"batch_size": 2, "before": name == "mixlora", "after": name == "mixlora"},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def cell(folder: Path, name: str, mixture: str, engine: str, ranks: int, resumes: str = "") -> dict[str, Any]:
    """A run; one that `resumes` another begins as a copy of what that one was at its first checkpoint."""
    settings = [f"training.output_dir={folder / name}", f"training.gradient_accumulation_steps={8 // ranks}"]
    return {
        "recipe": str(folder / f"{mixture}.yaml"),
        "overrides": settings + ENGINES[engine],
        "resumes": str(folder / resumes) if resumes else None,
    }


def launch(cells: list[dict[str, Any]], ranks: int) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), json.dumps(cells)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[done.stderr.find("FAILED") :][:6000]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("engines")
    write_recipes(folder)
    alone = [("ddp", mixture) for mixture in MIXTURES] + [(engine, "smora") for engine in GROWN if engine != "ddp"]
    launch([cell(folder, f"{engine}-{mixture}-1", mixture, engine, 1) for engine, mixture in alone], 1)
    full = [cell(folder, f"{engine}-{mixture}-2", mixture, engine, 2) for engine, mixture in FULL]
    grown = [cell(folder, f"{e}-smora-1-on-2", "smora", e, 2, f"{e}-smora-1") for e in GROWN]
    same = [cell(folder, f"{e}-smora-2-on-2", "smora", e, 2, f"{e}-smora-2") for e in SAME]
    for engine in DTYPES:
        full.append(cell(folder, f"{engine}-bf16-2", "smora", engine, 2))
        full[-1]["overrides"] += ["base.dtype=bfloat16", "training.bf16=true", "training.max_steps=2"]
    # Once DeepSpeed is configured in a process, accelerate keeps using it: the other engines come first.
    launch(sorted(full + grown + same, key=lambda c: any("deepspeed" in word for word in c["overrides"])), 2)
    launch([cell(folder, f"{e}-smora-2-on-1", "smora", e, 1, f"{e}-smora-2") for e in SHRUNK], 1)
    return folder


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in json.loads((folder / "loss_curve.json").read_text()) if "loss" in line]


def assert_equal_runs(got: Path, want: Path, gradients: bool = True) -> None:
    pairs = list(zip(losses(got), losses(want), strict=True))
    assert len(pairs) == STEPS
    assert max(abs(a - b) / b for a, b in pairs) < EXACT
    assert losses(got, "grad_norm") == pytest.approx(losses(want, "grad_norm"), rel=1e-4)
    if gradients:
        steps = [json.loads((run / "gradients.json").read_text()) for run in (got, want)]
        for step, (a, b) in enumerate(zip(*steps, strict=True)):
            assert a.keys() == b.keys()
            for name, norms in b.items():
                assert a[name] == pytest.approx(norms, rel=1e-4, abs=1e-9), f"step {step}: {name}"
    a, b = (load_file(run / "adapter_model.safetensors") for run in (got, want))
    assert a.keys() == b.keys()
    for name, value in b.items():
        if value.is_floating_point():
            assert a[name].dtype == torch.float32
            assert float((a[name] - value).norm()) <= 1e-4 * float(value.norm()) + 1e-7, name
        else:
            assert torch.equal(a[name], value), name


@pytest.mark.parametrize(("engine", "mixture"), FULL)
def test_two_processes_train_what_one_does(engine: str, mixture: str, runs: Path) -> None:
    got, want = runs / f"{engine}-{mixture}-2", runs / f"ddp-{mixture}-1"
    assert_equal_runs(got, want)
    a, b = (json.loads((run / "results.json").read_text()) for run in (got, want))
    assert a["model"]["parameters"] == b["model"]["parameters"]
    assert a["tasks"] == b["tasks"]
    if mixture == "mixlora":
        assert a["tasks"] and a["before"]["tasks"] == b["before"]["tasks"]
    else:
        biases = [value for name, value in load_file(got / "adapter_model.safetensors").items() if "bias_steps" in name]
        assert biases and any(bias.any() for bias in biases)


@pytest.mark.parametrize("run", [f"{engine}-smora-2-on-1" for engine in SHRUNK] + [f"{e}-smora-1-on-2" for e in GROWN])
def test_another_number_of_processes_goes_on(run: str, runs: Path) -> None:
    assert json.loads((runs / run / "results.json").read_text())["training"]["resumed_from"]
    assert_equal_runs(runs / run, runs / "ddp-smora-1", gradients=False)


@pytest.mark.parametrize("engine", SAME)
def test_as_many_processes_go_on_exactly(engine: str, runs: Path) -> None:
    got, want = runs / f"{engine}-smora-2-on-2", runs / f"{engine}-smora-2"
    assert losses(got) == losses(want)
    assert (got / "adapter_model.safetensors").read_bytes() == (want / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_the_gathered_adapter_is_what_scored(engine: str, runs: Path) -> None:
    """The loud loading check passes, and one process scores as the partitioned model did."""
    import molora  # noqa: F401
    from molora.eval.models import load_model
    from molora.eval.suite import read_suite, run_suite

    folder = runs / f"{engine}-mixlora-2"
    model, tokenizer = load_model(str(folder))
    again = run_suite(model, tokenizer, read_suite(folder / "recipe.yaml"), name="again")
    assert again["tasks"] == json.loads((folder / "results.json").read_text())["tasks"]
    saved = load_file(folder / "adapter_model.safetensors")
    state = {name.replace(".default", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(state[name], value) for name, value in saved.items())


@pytest.mark.parametrize("engine", DTYPES)
def test_what_is_fp32_and_what_bf16(engine: str, runs: Path) -> None:
    found = json.loads((runs / f"{engine}-bf16-2" / "dtypes.json").read_text())
    trained = [DTYPES[engine]]
    assert found == {
        "experts": trained,
        "routers": trained,
        "base": ["bfloat16"],
        "stepped": ["float32"],
        "moments": ["float32"],
        "bias": ["int32"],
    }
    saved = load_file(runs / f"{engine}-bf16-2" / "adapter_model.safetensors").values()
    assert {str(t.dtype) for t in saved if t.is_floating_point()} == {f"torch.{DTYPES[engine]}"}
