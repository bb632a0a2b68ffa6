"""Every mistake gets one sentence that names the thing and the fix, and leaves model and checkpoint as they were."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from tiny_models import base_model, config, logits, trained

from molora import MoloraConfig
from molora.layers import MoloraLayer
from molora.routers import TopK

# -- configs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_expert": 4}, r"unknown key 'num_expert' in MoloraConfig: did you mean 'num_experts'\?"),
        ({"router": {"topk": 2}}, r"unknown key 'topk' in router 'top_k': did you mean 'top_k'\?"),
        ({"router": "topk"}, r"router='topk': did you mean 'top_k'\?"),
        ({"router": {"name": "tpo_k"}}, r"did you mean 'top_k'\?"),
        ({"plain_lora": {"target_module": ["q_proj"]}}, r"'target_module' in MoloraConfig.plain_lora: did you mean"),
        ({"plain_lora": {"r": 4}}, r"plain_lora needs target_modules"),
        ({"plain_lora": {"target_modules": ["q_proj"], "r": 0}}, r"plain_lora.r=0 must be an integer of at least 1"),
        ({"num_experts": 2, "router": {"top_k": 3}}, r"top_k=3 exceeds num_experts=2; lower router.top_k or raise"),
        ({"router": {"top_k": 0}}, r"top_k=0 must be an integer of at least 1"),
        (
            {"router": {"router_aux_loss_coef": -1.0}},
            r"router_aux_loss_coef=-1.0 must be a finite number of at least 0",
        ),
        ({"router": {"router_jitter_noise": 1.0}}, r"router_jitter_noise=1.0 must be at least 0 and below 1"),
        ({"r": 0}, r"r=0 must be an integer of at least 1"),
        ({"r": 2.5}, r"r=2.5 must be an integer"),
        ({"num_experts": 0}, r"num_experts=0 must be"),
        ({"num_experts": True}, r"num_experts=True must be"),
        ({"lora_alpha": 0}, r"lora_alpha=0 must be a finite number above 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0 must be at least 0 and below 1"),
        ({"placement": "ffns"}, r"placement='ffns': did you mean 'ffn'\?"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' starts from experts whose product is subtracted"),
        ({"bias": "lora_only"}, r"did you mean 'molora_only'\?"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0"),
        ({"placement": "ffn", "rank_pattern": {"mlp": 2}}, r"rank_pattern and alpha_pattern .* placement 'ffn'"),
        ({"layers_pattern": "layers"}, r"layers_pattern needs layers_to_transform"),
        ({"target_modules": []}, r"target_modules must name at least one module"),
        ({"expert_names": ["a"]}, r"expert_names has 1 names for num_experts=8"),
        ({"lora_alpha": float("nan")}, r"lora_alpha=nan must be a finite number above 0"),
        ({"lora_alpha": "16"}, r"lora_alpha='16' must be a finite number"),
        ({"use_rslora": "no"}, r"use_rslora='no' must be true or false"),
        ({"router": {"norm_topk_prob": "no"}}, r"norm_topk_prob='no' must be true or false"),
        ({"router": {"router_aux_loss_coef": float("nan")}}, r"router_aux_loss_coef=nan must be a finite number"),
        ({"router": None}, r"router=None must be a router config, a dict or a name"),
        ({"plain_lora": "all-linear"}, r"plain_lora='all-linear' must be a dict with target_modules"),
        ({"target_modules": 5}, r"target_modules=5 must be a list of names"),
        ({"target_modules": "((("}, r"target_modules='\(\(\(' is no regular expression"),
        ({"exclude_modules": [1]}, r"exclude_modules=\[1\] must be a list of names"),
        ({"modules_to_save": "lm_head"}, r"modules_to_save='lm_head' must be a list of names"),
        ({"layers_to_transform": [-1]}, r"layers_to_transform=-1 must be an integer of at least 0"),
        ({"alpha_pattern": {"q_proj": "2"}}, r"alpha_pattern\['q_proj'\]='2' must be a finite number"),
        ({"rank_pattern": None}, r"rank_pattern=None must map names of modules to numbers"),
        ({"expert_names": ["a"] * 8}, r"expert_names has 8 names .* one of its own"),
        ({"task_type": "SEQ_CLS"}, r"task_type='SEQ_CLS': .*choose one of"),
        ({"base_fingerprint": 5}, r"base_fingerprint=5 must be what molora saved"),
        ({"format_version": 99}, r"format_version=99, this molora reads up to 1; upgrade molora"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_configs(options: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message) as error:
        MoloraConfig(**options)
    assert "\n" not in str(error.value)
    # The same through a file: PEFT itself would only warn, or recurse without end.
    good = {**MoloraConfig().to_dict(), **options}
    (tmp_path / "adapter_config.json").write_text(json.dumps(good, default=list))
    with pytest.raises(ValueError, match=message):
        PeftConfig.from_pretrained(tmp_path)


def test_a_router_of_another_type():
    with pytest.raises(ValueError, match="router=3 must be a router config, a dict or a name"):
        MoloraConfig(router=3)  # type: ignore[arg-type]
    assert MoloraConfig(router=TopK(top_k=1)).router == TopK(top_k=1)


# -- models ------------------------------------------------------------------------------------------------------------


def _is_untouched(model: torch.nn.Module) -> bool:
    layers = any(isinstance(m, MoloraLayer) for m in model.modules())
    return not layers and not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_porj"]}, r"'q_porj' matches no linear of this model; its linears are: .*q_proj"),
        ({"target_modules": ["q_proj", "w9"]}, r"'w9' matches no linear"),
        ({"target_modules": ["self_attn"]}, r"matches model.layers.0.self_attn \(LlamaAttention\), which is no linear"),
        ({"target_modules": ".*nothing"}, r"'.\*nothing' matches no linear"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, r"leaves no linear to convert"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [7]},
            r"layers_to_transform=7 .* their layers are \[0, 1\]",
        ),
        ({"layers_to_transform": [0, 9]}, r"layers_to_transform=9 .* their layers are \[0, 1\]"),
        (
            {"target_modules": "q_proj"},
            r"'q_proj' as text is a regular expression .* write \['q_proj'\] .*'\.\*q_proj'",
        ),
        ({"exclude_modules": ["q_porj"]}, r"exclude_modules='q_porj' matches no module .*; did you mean 'q_proj'\?"),
        ({"modules_to_save": ["lm_haed"]}, r"modules_to_save='lm_haed' matches no module .*; did you mean 'lm_head'\?"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]},
            r"modules_to_save=\['q_proj'\] .* leaves no linear to convert",
        ),
        ({"plain_lora": {"target_modules": ["q_porj"]}}, r"plain_lora.target_modules='q_porj' matches no linear"),
        ({"plain_lora": {"target_modules": "all-linear"}}, r"plain_lora.target_modules=all-linear .* leaves no linear"),
        (
            {"placement": "ffn", "target_modules": ["gate_proj"]},
            r"gate_proj \(Linear\), which is no FFN module; .*: mlp",
        ),
        ({"placement": "ffn", "exclude_modules": ["gate_proj", "up_proj", "down_proj"]}, r"leaves no projection of"),
        (
            {"target_modules": ["q_proj"], "plain_lora": {"target_modules": ["q_proj"]}},
            r"plain_lora and the mixture both want model.layers.0.self_attn.q_proj",
        ),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_targets(options: dict[str, Any], message: str):
    base = base_model()
    with pytest.raises(ValueError, match=message) as error:
        get_peft_model(base, MoloraConfig(**options))
    assert "\n" not in str(error.value)
    assert _is_untouched(base)


@pytest.mark.parametrize(
    ("name", "message"),
    [("0", "'0' is a number"), ("my.adapter", "'my.adapter' must be a word without dots"), ("", "word")],
)
def test_adapter_names(name: str, message: str):
    base = base_model()
    with pytest.raises(ValueError, match=f"adapter name .*{message}"):
        get_peft_model(base, config(), adapter_name=name)
    assert _is_untouched(base)


def test_what_a_mixture_cannot_do_is_said():
    model = trained(steps=1)
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"one mixture for a whole batch; choose it with set_adapter\(\)"):
        model(input_ids=ids, adapter_names=["default", "default"])
    with pytest.raises(NotImplementedError, match="mixtures cannot be averaged"):
        model.add_weighted_adapter(["default"], [1.0], "new")


@pytest.mark.parametrize("key", ["router", "placement", "lora_alpha"])
def test_a_saved_config_must_hold_what_defines_the_function(key: str, tmp_path: Path):
    saved = config().to_dict()
    del saved[key]
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=f"the saved config lacks '{key}', without which the adapter computes"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_state_dict_for_other_modules_is_refused():
    state_dict = {"model.layers.0.self_attn.q_proj.molora_A.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"tensors for model.layers.0.self_attn.q_proj, which this config does not"):
        inject_adapter_in_model(config(target_modules=["v_proj"]), base_model(), state_dict=state_dict)


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_ffns_of_another_shape_are_refused_by_name(family: str):
    torch.manual_seed(0)
    if family == "opt":
        base, name = base_model("opt"), r"model.decoder.layers.0 \(OPTDecoderLayer\)"
    else:
        base = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
        name = r"transformer.h.0.mlp \(BloomMLP\)"
    with pytest.raises(
        ValueError, match=rf"placement='ffn' cannot convert {name}: .*; leave it out .* or use placement"
    ):
        get_peft_model(base, config("ffn"))
    assert _is_untouched(base)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_base_that_is_a_mixture_of_experts(family: str):
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "mixtral":
        base = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, num_local_experts=2, num_key_value_heads=2))
    else:
        base = hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**sizes, num_experts=2, num_key_value_heads=2))
    with pytest.raises(ValueError, match=r"itself a mixture of experts \(model.layers.0.mlp.experts, .*, and 1 more\)"):
        get_peft_model(base, config())
    assert _is_untouched(base)


# -- checkpoints -------------------------------------------------------------------------------------------------------

TENSOR = "base_model.model.model.layers.0.self_attn.q_proj.molora_A.weight"
Tensors = dict[str, torch.Tensor]


def _without(tensors: Tensors) -> Tensors:
    return {k: v for k, v in tensors.items() if k != TENSOR}


def _with_extra(tensors: Tensors) -> Tensors:
    return {**tensors, TENSOR.replace("layers.0", "layers.9"): tensors[TENSOR].clone()}


def _with_stranger(tensors: Tensors) -> Tensors:
    return {**tensors, "base_model.model.model.layers.0.self_attn.q_proj.other.weight": tensors[TENSOR].clone()}


def _misshaped(tensors: Tensors) -> Tensors:
    return {**tensors, TENSOR: tensors[TENSOR][:, :, 1:].clone()}


def _with_nan(tensors: Tensors) -> Tensors:
    damaged = tensors[TENSOR].clone()
    damaged[0, 0, 0] = float("nan")
    return {**tensors, TENSOR: damaged}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trained().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without, r"lacks 1 of 42 tensors, first .*layers.0.self_attn.q_proj.molora_A.default.weight"),
        (_with_extra, r"has 1 tensors that this base with this config has no place for, first .*layers.9"),
        (
            _with_stranger,
            r"has 1 tensors that this base with this config has no place for, first .*q_proj.other.weight",
        ),
        (_misshaped, r"q_proj.molora_A.default.weight has shape \(4, 4, 31\) in the checkpoint and \(4, 4, 32\)"),
        (_with_nan, r"q_proj.molora_A.default.weight holds NaN or infinity"),
    ],
)
def test_a_damaged_checkpoint_is_refused(saved: Path, damage: Callable[[Tensors], Tensors], message: str):
    file = saved / "adapter_model.safetensors"
    save_file(damage(load_file(file)), file)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base_model(), saved)


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_without, ValueError, r"lacks 1 of 42 tensors, first .*layers.0.self_attn.q_proj.molora_A"),
        (_misshaped, RuntimeError, r"above report"),
        (_with_nan, ValueError, r"holds NaN or infinity"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_the_native_route(
    saved: Path, damage: Callable[[Tensors], Tensors], error: type[Exception], message: str, is_trainable: bool
):
    file = saved / "adapter_model.safetensors"
    save_file(damage(load_file(file)), file)
    base = base_model()
    with pytest.raises(error, match=message):
        base.load_adapter(str(saved), is_trainable=is_trainable)
        logits(base)  # transformers loads without calling the method; its first forward looks


def test_a_truncated_file_is_refused(saved: Path):
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"incomplete metadata|InvalidHeader|not fully covered|Metadata"):
        PeftModel.from_pretrained(base_model(), saved)


def test_an_adapter_of_another_base_is_refused(saved: Path):
    message = "trained on another base .*its input embedding has other values.* base_fingerprint=None"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base_model(seed=1), saved)
    other = base_model(seed=1)
    other.load_adapter(str(saved))
    with pytest.raises(ValueError, match=message):
        logits(other)
    with pytest.raises(ValueError, match="model_type llama there, mistral here"):
        PeftModel.from_pretrained(base_model("mistral"), saved)
    # On purpose it works, and another dtype is the same base.
    own = PeftConfig.from_pretrained(saved)
    own.base_fingerprint = None
    PeftModel.from_pretrained(base_model(seed=1), saved, config=own)
    PeftModel.from_pretrained(base_model(dtype=torch.bfloat16), saved)


def test_a_resized_vocabulary_is_the_same_base(saved: Path):
    base = base_model()
    base.resize_token_embeddings(128, mean_resizing=False)
    PeftModel.from_pretrained(base, saved)


def test_a_model_without_a_mixture():
    import molora

    with pytest.raises(ValueError, match="this model has no mixture of LoRA experts; convert it with get_peft_model"):
        molora.routing_statistics(base_model())


def test_an_unknown_kernel(monkeypatch: pytest.MonkeyPatch):
    model = trained(steps=1)
    with pytest.raises(ValueError, match="unknown kernel 'fast'; choose one of reference, dense_masked"):
        model.set_kernel("fast")
    want = logits(model)
    model.set_kernel("reference")
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-6)
    model.set_kernel(None)
    monkeypatch.setenv("MOLORA_KERNEL", "dense-masked")
    with pytest.raises(ValueError, match="unknown kernel 'dense-masked'"):
        logits(model)


_SAVE_FOREVER = """
import sys
sys.path.insert(0, {tests!r})
from tiny_models import trained
model = trained(num_experts=64, r=16, steps=1)
print("ready", flush=True)
while True:
    model.save_pretrained({path!r})
    print("saved", flush=True)
"""


@pytest.mark.slow
def test_a_killed_save_leaves_a_whole_checkpoint(tmp_path: Path):
    script = _SAVE_FOREVER.format(tests=str(Path(__file__).parent), path=str(tmp_path / "a"))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "saved" not in process.stdout.readline():
        pass
    time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    PeftModel.from_pretrained(base_model(), tmp_path / "a")
