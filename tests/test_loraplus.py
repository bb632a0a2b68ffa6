"""LoRA+ by PEFT's own optimizer: who learns at which rate, through the Trainer and through a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from test_cli import molora, write_recipe
from test_recipe_config import MINIMAL, build_recipe
from tiny_lm import save_tiny
from tiny_models import base_model, config
from transformers import TrainingArguments

from molora.eval.strict import build
from molora.train import prepare, run
from molora.train.checkpoint import AtomicTrainer
from molora.train.optimizer import OptimizerConfig, loraplus_optimizer
from molora.train.recipe import Recipe, adapter_config, recipe_yaml


def rates(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """The learning rate and the weight decay of every parameter by its name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("placement", ["linear", "block", "ffn", "ffn_linear"])
@pytest.mark.parametrize("router", [{"top_k": 2}, {"name": "softmax", "bias": True}, {"name": "threshold"}])
def test_only_the_experts_B_learns_faster(placement: str, router: dict[str, Any]) -> None:
    model = get_peft_model(base_model(), config(placement, router=router))
    made = loraplus_optimizer(model, torch.optim.AdamW, {"lr": 1e-3, "eps": 1e-7}, 16.0, 0.1)
    found = rates(model, made)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, (lr, decay) in found.items():
        assert lr == (1.6e-2 if ".molora_B" in name else 1e-3), name
        assert decay == (0.1 if dict(model.named_parameters())[name].dim() > 1 else 0.0), name
    assert all(group["params"] and group["eps"] == 1e-7 for group in made.param_groups)


def test_a_ratio_of_one_is_the_plain_optimizer() -> None:
    steps = []
    for ratio in (None, 1.0):
        torch.manual_seed(0)
        model = get_peft_model(base_model(), config("block"))
        plain = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        made = plain if ratio is None else loraplus_optimizer(model, torch.optim.AdamW, {"lr": 1e-2}, ratio, 0.0)
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        made.step()
        steps.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(steps[0][name], steps[1][name]) for name in steps[0])


@pytest.mark.parametrize("adapter", [config("linear"), LoraConfig(r=4, target_modules=["q_proj"])])
def test_the_trainer_makes_it_and_schedules_each_rate(adapter: Any, tmp_path: Path) -> None:
    model = get_peft_model(base_model(), adapter)
    args = TrainingArguments(
        str(tmp_path), learning_rate=1e-3, weight_decay=0.1, lr_scheduler_type="linear", use_cpu=True, report_to="none"
    )
    trainer = AtomicTrainer(model, args)
    trainer.loraplus_lr_ratio = 8.0
    trainer.create_optimizer_and_scheduler(10)
    assert {lr for lr, _ in rates(model, trainer.optimizer).values()} == {1e-3, 8e-3}
    for _ in range(5):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    for name, (lr, _) in rates(model, trainer.optimizer).items():
        assert lr == pytest.approx(4e-3 if "lora_B" in name else 5e-4), name


def test_an_optimizer_without_groups_is_refused() -> None:
    model = get_peft_model(base_model(), config())
    with pytest.raises(ValueError, match="needs an optimizer that takes parameter groups"):
        loraplus_optimizer(model, torch.optim.AdamW, {"lr": 1e-3, "optimizer_dict": {}}, 2.0, 0.0)


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loraplus_lr_ratio": 0.5}, "optimizer.loraplus_lr_ratio=0.5 must be a finite number of at least 1"),
        ({"loraplus_lr_ratio": float("nan")}, "optimizer.loraplus_lr_ratio=nan must be a finite number of at least 1"),
        ({"loraplus_lr_ratio": "16x"}, "recipe.optimizer.loraplus_lr_ratio must be of type float, got '16x'"),
        ({"loraplus_ratio": 2}, "unknown key 'loraplus_ratio' in recipe.optimizer: did you mean 'loraplus_lr_ratio'"),
        ({"riemannian": "rescaled"}, "optimizer.riemannian='rescaled': .*choose one of"),
        ({"riemannian": 3}, "recipe.optimizer.riemannian must be of type bool, got 3"),
    ],
)
def test_a_bad_optimizer_section_gets_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_recipe(optimizer=options)


def test_riemannian_is_for_mixtures_and_said_once() -> None:
    lora = {key: value for key, value in MINIMAL.items() if key != "mixture"} | {"lora": {"r": 4}}
    with pytest.raises(ValueError, match="optimizer.riemannian=True is for a mixture"):
        build(Recipe, lora | {"optimizer": {"riemannian": True}}, "recipe")
    assert build(Recipe, lora | {"optimizer": {"loraplus_lr_ratio": 16}}, "recipe").optimizer.loraplus_lr_ratio == 16.0
    with pytest.raises(ValueError, match="optimizer.riemannian=True and mixture.riemannian='gate_rescaled' differ"):
        build_recipe(mixture__riemannian="gate_rescaled", optimizer={"riemannian": True})
    with pytest.raises(ValueError, match="placement 'ffn' mixes"):
        build_recipe(mixture__placement="ffn", optimizer={"riemannian": "gate_rescaled"})


def test_the_section_reaches_the_config_and_reads_back() -> None:
    recipe = build_recipe(optimizer={"riemannian": "gate_rescaled", "loraplus_lr_ratio": 4})
    assert adapter_config(recipe).riemannian == "gate_rescaled"
    assert build(Recipe, yaml.safe_load(recipe_yaml(recipe)), "recipe") == recipe
    assert build_recipe().optimizer == OptimizerConfig()
    assert adapter_config(build_recipe(mixture__riemannian=True)).riemannian is True


@pytest.mark.parametrize("section", ["mixture", "lora"])
def test_a_recipe_trains_with_it_and_resumes(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainers: list[AtomicTrainer] = []
    original = run.make_trainer
    monkeypatch.setattr(run, "make_trainer", lambda *args: trainers.append(original(*args)) or trainers[-1])
    recipe = write_recipe(tmp_path, save_tiny(tmp_path / "base"), max_steps=2)
    overrides = ["optimizer.loraplus_lr_ratio=4", "training.save_steps=1"]
    overrides += ["optimizer.riemannian=gate_rescaled"] if section == "mixture" else ["mixture=null", "lora.r=4"]
    assert molora("train", recipe, *overrides) == 0
    model: Any = trainers[0].model
    groups = {name: lr for name, (lr, _) in rates(model, trainers[0].optimizer).items()}
    assert {"lora_B" in name for name in groups} == {True, False}
    start = trainers[0].optimizer.param_groups
    assert max(g["initial_lr"] for g in start) == pytest.approx(4 * min(g["initial_lr"] for g in start))
    if section == "mixture":
        assert model.active_peft_config.riemannian == "gate_rescaled"
    (tmp_path / "out" / "results.json").unlink()
    assert molora("train", recipe, *overrides, "--resume") == 0


def test_a_dry_run_shows_the_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, save_tiny(tmp_path / "base"), max_steps=2)
    assert molora("train", recipe, "optimizer.loraplus_lr_ratio=4", "--dry-run") == 0
    shown = capsys.readouterr().err
    assert "loraplus_lr_ratio: 4.0" in shown and "riemannian: false" in shown


def test_deepspeeds_own_optimizer_is_refused() -> None:
    from types import SimpleNamespace

    recipe = build_recipe(optimizer={"loraplus_lr_ratio": 4})
    args = SimpleNamespace(hf_deepspeed_config=SimpleNamespace(config={"optimizer": {"type": "AdamW"}}))
    with pytest.raises(ValueError, match="so does the section optimizer of recipe.training.deepspeed"):
        prepare.check_optimizer(recipe, args)
