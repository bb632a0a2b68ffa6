"""The choice of an engine, and the rows of a step: what cannot work is one sentence before anything is loaded."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import mixture, tiny_llama
from test_cli import molora, write_recipe

from molora.integrations.deepspeed import fit_stage3
from molora.train import engine, global_batch
from molora.train.engine import CONFIGS, check_engine, engine_arguments
from molora.train.global_batch import check_global_batch, write_global_batch


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3-offload"])
def test_a_shipped_configuration_fits_every_recipe(name: str) -> None:
    pytest.importorskip("deepspeed")
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    config = json.loads(CONFIGS[name].read_text(encoding="utf-8"))
    assert config["zero_optimization"]["stage"] == int(name[4])
    assert ("offload_optimizer" in config["zero_optimization"]) == name.endswith("offload")
    assert {config[k] for k in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")} == {"auto"}
    # The optimizer is torch's or that of LoRA+, on CPUs too.
    assert config["zero_allow_untested_optimizer"] and not config["zero_force_ds_cpu_optimizer"]
    assert "optimizer" not in config and "scheduler" not in config
    assert HfTrainerDeepSpeedConfig(config).is_zero3() == (name[4] == "3")
    unset_hf_deepspeed_config()


SIZES = {"stage3_param_persistence_threshold": "auto", "stage3_prefetch_bucket_size": "auto"}


def partitioned(model: torch.nn.Module) -> torch.nn.Module:
    """As DeepSpeed leaves parameters: empty, their shape and size beside them."""
    for parameter in model.parameters():
        parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
        parameter.data = torch.empty(0)
    return model


def test_at_stage_3_adapters_stay_whole_and_a_layer_is_fetched_ahead() -> None:
    model = mixture("linear")
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    layer = model.get_base_model().model.layers[0]
    for found in (model, partitioned(mixture("linear"))):
        config: dict[str, Any] = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", **SIZES}}
        fit_stage3(config, found)
        zero = config["zero_optimization"]
        whole = zero["stage3_param_persistence_threshold"]
        assert whole == max(trained) and zero["reduce_bucket_size"] == "auto"
        in_parts = [p.numel() for p in layer.parameters() if p.numel() > whole]
        assert zero["stage3_prefetch_bucket_size"] == sum(in_parts) > 0


def test_a_model_without_frozen_weights_is_not_kept_whole() -> None:
    config: dict[str, Any] = {"zero_optimization": {"stage": 3, **SIZES}}
    fit_stage3(config, tiny_llama())
    assert config["zero_optimization"] == {"stage": 3, **SIZES}


def test_a_trained_embedding_keeps_no_base_whole() -> None:
    model = mixture("ffn")
    embedding = model.get_input_embeddings().weight.requires_grad_()
    config: dict[str, Any] = {"zero_optimization": {"stage": 3, **SIZES}}
    fit_stage3(config, model)
    assert embedding.numel() == max(p.numel() for p in model.parameters())
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == "auto"
    layer = model.get_base_model().model.layers[0]
    assert config["zero_optimization"]["stage3_prefetch_bucket_size"] == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 3, **dict.fromkeys(SIZES, 7)},
        {"stage": 3, "offload_param": {"device": "cpu"}, **SIZES},
        {"stage": 2, **SIZES},
        {},
        2,
    ],
)
def test_what_a_configuration_says_of_stage_3_stays(zero: Any) -> None:
    config = {"zero_optimization": copy.deepcopy(zero)}
    fit_stage3(config, mixture("linear"))
    assert config == {"zero_optimization": zero}


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"deepspeed": "zero4"}, r"'zero4' is neither .*\(zero1, zero2, zero3, zero3-offload\) nor a file"),
        ({"deepspeed": "zero2", "fsdp": True}, "both deepspeed and fsdp; a run has one engine"),
        ({"deepspeed": {"zero_optimization": {"stage": 9}}}, "zero_optimization.stage=9 must be 0, 1, 2 or 3"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "version=1 flattens parameters.*set it to 2"),
        ({"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}, "saves pieces and no adapter"),
        ({"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}}, "use --deepspeed zero3"),
        ({"fsdp": True, "fsdp_config": "none.json"}, "fsdp_config: none.json cannot be read as JSON"),
    ],
)
def test_an_engine_that_cannot_work_is_refused(training: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_engine(training)


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, got a list"):
        check_engine({"deepspeed": str(file)})
    file.write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        check_engine({"deepspeed": str(file)})


def test_the_command_names_the_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, "molora-tiny", deepspeed="zero2")
    for options, message in [
        (["--deepspeed", "zero1"], "--deepspeed zero1 and recipe.training.deepspeed='zero2' both choose the engine"),
        (["training.deepspeed=zero9"], "deepspeed: 'zero9' is neither a configuration that comes with molora (zero1,"),
    ]:
        assert molora("train", recipe, *options) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("run pip install 'molora[deepspeed]'")):
        engine_arguments({"deepspeed": "zero2"})
    assert engine_arguments({}) == {}


BEGAN = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize(
    ("ranks", "rows", "steps", "message"),
    [
        (2, 2, 4, None),
        (1, 2, 8, None),
        (4, 4, 1, None),
        (
            1,
            2,
            4,
            "began with 2 processes x 2 rows x 4 accumulation steps = 16 rows, and this is 1 process x 2",
        ),
        (1, 2, 4, r"; set training.gradient_accumulation_steps=8$"),
        (8, 4, 1, "set training.per_device_train_batch_size=1 training.gradient_accumulation_steps=2 or "),
        (3, 2, 4, "16 rows cannot be shared by 3 processes; start 1, 2, 4, 8, 16 of them"),
    ],
)
def test_another_number_of_processes_keeps_the_rows_of_a_step(
    ranks: int, rows: int, steps: int, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(global_batch, "world_size", lambda: 2)
    write_global_batch(tmp_path, BEGAN)
    monkeypatch.setattr(global_batch, "world_size", lambda: ranks)
    now = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
    write_global_batch(tmp_path, now)  # changes nothing
    if message is None:
        check_global_batch(tmp_path, BEGAN, now)
    else:
        with pytest.raises(ValueError, match=message):
            check_global_batch(tmp_path, BEGAN, now)


def test_an_order_made_of_batches_keeps_their_size(tmp_path: Path) -> None:
    write_global_batch(tmp_path, BEGAN)
    now = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    check_global_batch(tmp_path, BEGAN, now)
    with pytest.raises(ValueError, match="would change the order of the rows, which group_by_length makes of batches"):
        check_global_batch(tmp_path, BEGAN, now | {"train_sampling_strategy": "group_by_length"})
