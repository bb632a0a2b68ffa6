"""molora as a PEFT method: every way in which PEFT and transformers make, save, load and switch adapters."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from tiny_models import CELLS, FAMILIES, PLACEMENTS, base_model, config, logits, train, trained

import molora
from molora import MoloraConfig
from molora.layers import MoloraLayer
from molora.linear import MixedLinear


def adapter_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if "molora_" in n}


# -- a fresh mixture is the base ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "placement"), CELLS)
def test_a_fresh_mixture_is_the_base_bit_for_bit(family: str, placement: str):
    want = logits(base_model(family))
    model = get_peft_model(base_model(family), config(placement))
    assert torch.equal(logits(model), want)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_tensors(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_fresh_mixture_is_a_half_precision_base(placement: str, dtype: torch.dtype):
    want = logits(base_model(dtype=dtype))
    model = get_peft_model(base_model(dtype=dtype), config(placement))
    assert torch.equal(logits(model), want)
    assert {p.dtype for p in adapter_tensors(model).values()} == {torch.float32}
    half = get_peft_model(base_model(dtype=dtype), config(placement), autocast_adapter_dtype=False)
    assert torch.equal(logits(half), want)
    assert {p.dtype for p in adapter_tensors(half).values()} == {dtype}


# -- switching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_second_mixture_and_switching(tmp_path: Path, placement: str):
    model = trained(placement=placement)
    first = logits(model)
    model.add_adapter("second", config(placement, num_experts=3, r=2))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(base_model()))
    train(model)
    second = logits(model.eval())
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(), tmp_path)
    again.load_adapter(tmp_path / "second", "renamed")
    assert torch.equal(logits(again), first)
    again.set_adapter("renamed")
    assert torch.equal(logits(again.eval()), second)
    again.delete_adapter("renamed")
    assert torch.equal(logits(again), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_model()))
    assert torch.equal(logits(model), first)


def test_two_placements_in_one_model():
    model = trained(placement="linear", target_modules=["q_proj", "gate_proj"])
    first = logits(model)
    model.add_adapter("ffn", config("ffn", plain_lora=None))
    model.set_adapter("ffn")
    train(model)
    assert not torch.equal(logits(model.eval()), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_unload_gives_the_untouched_base_back(placement: str):
    model = trained(placement=placement)
    base = model.unload()
    assert torch.equal(logits(base), logits(base_model()))
    assert not any(isinstance(m, MoloraLayer) for m in base.modules())
    assert not base._forward_hooks and not base._forward_pre_hooks and not hasattr(base, "molora_runtime")
    assert base.state_dict().keys() == base_model().state_dict().keys()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_merging_is_refused_and_says_what_can_be_exported(placement: str):
    model = trained(placement=placement)
    want = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter, model.base_model.model.model.layers[0].mlp.modules):
        if merge.__name__ == "modules":
            layer = next(m for m in merge() if isinstance(m, MoloraLayer)) if placement != "ffn" else None
            merge = layer.merge if layer else model.merge_adapter
        with pytest.raises(NotImplementedError, match=r"cannot be merged .* save_pretrained\(\), or call unload\(\)"):
            merge()
    assert torch.equal(logits(model), want)


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_deepcopy_and_pickle(placement: str):
    model = trained(placement=placement)
    want = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), want)
        assert train(twin, 2) == train(copy.deepcopy(model), 2)
        assert molora.routing_statistics(twin)
    assert torch.equal(logits(model), want)
    assert not molora.routing_statistics(copy.deepcopy(model))


# -- other things in the same adapter ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_modules_to_save_trainable_tokens_and_tied_embeddings(tmp_path: Path, family: str):
    for options in ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 6]}):
        if family == "qwen3" and "modules_to_save" in options:
            options["ensure_weight_tying"] = True
        model = get_peft_model(base_model(family), config("block", **options))
        train(model)
        want = logits(model.eval())
        assert not torch.equal(want, logits(base_model(family)))
        path = tmp_path / "_".join(options)
        model.save_pretrained(path)
        assert torch.equal(logits(PeftModel.from_pretrained(base_model(family), path)), want)


@pytest.mark.parametrize("bias", ["all", "molora_only"])
def test_biases_train_and_reload(tmp_path: Path, bias: str):
    model = get_peft_model(base_model("gpt2"), config("linear", bias=bias))
    train(model)
    want = logits(model.eval())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_model("gpt2"), tmp_path)), want)


def test_plain_lora_beside_a_mixture_is_pefts_lora():
    torch.manual_seed(1)
    plain = {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 8}
    ours = get_peft_model(base_model(), config("linear", target_modules=["o_proj"], plain_lora=plain))
    theirs = get_peft_model(base_model(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    for ours_layer, their_layer in zip(ours.model.model.layers, theirs.model.model.layers, strict=True):
        mixed, lora = ours_layer.self_attn.q_proj, their_layer.self_attn.q_proj
        assert "default" not in mixed.molora_router
        torch.nn.init.normal_(lora.lora_B.default.weight)
        mixed.molora_A.default.weight.data = lora.lora_A.default.weight.data[None].clone()
        mixed.molora_B.default.weight.data = lora.lora_B.default.weight.data.T[None].clone()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def test_rank_and_alpha_patterns_layers_and_exclusion():
    options = {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "exclude_modules": ["v_proj"],
        "layers_to_transform": [1],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"down_proj": 16},
        "use_rslora": True,
    }
    model = get_peft_model(base_model(), config("linear", **options))
    found = {n: m for n, m in model.named_modules() if isinstance(m, MixedLinear)}
    assert {n.split("layers.")[1] for n in found} == {"1.self_attn.q_proj", "1.mlp.down_proj"}
    q, down = sorted(found.values(), key=lambda m: m.molora_A.default.weight.shape[1])
    assert q.molora_A.default.weight.shape == (4, 2, 32)
    assert q.molora_specs["default"][""].scaling == pytest.approx(8 / 2**0.5)
    assert down.molora_B.default.weight.shape == (4, 4, 32)
    assert down.molora_specs["default"][""].scaling == pytest.approx(8.0)


@pytest.mark.parametrize("named", ["all-linear", "regex", "list"])
@pytest.mark.parametrize(("placement", "leaf"), [("linear", "q_proj"), ("ffn", "mlp")])
def test_layers_to_transform_holds_however_the_targets_are_named(named: str, placement: str, leaf: str):
    targets = {"all-linear": "all-linear", "regex": rf".*\.{leaf}", "list": [leaf]}[named]
    options = {"target_modules": targets, "layers_to_transform": 1, "plain_lora": None}
    model = get_peft_model(base_model(), config(placement, **options))
    names = [n for n, m in model.named_modules() if isinstance(m, MoloraLayer)]
    assert names and all(".layers.1." in n for n in names)


def test_a_second_adapter_leaves_pefts_own_wrappers_alone():
    for options in ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 6]}):
        model = get_peft_model(base_model("qwen3"), config(ensure_weight_tying="modules_to_save" in options, **options))
        model.add_adapter("second", config())
        model.set_adapter("second")
        assert not any("lm_head" in n or "embed" in n for n, m in model.named_modules() if isinstance(m, MoloraLayer))
        train(model, 1)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_inference_mode_converts_and_runs(placement: str):
    want = logits(base_model())
    with torch.inference_mode():
        model = get_peft_model(base_model(), config(placement)).eval()
        assert torch.equal(logits(model), want)


def test_what_other_code_reads_off_a_layer_is_there():
    model = get_peft_model(base_model("gpt2"), config())
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (32, 96)
    with disable_input_dtype_casting(model):
        logits(model)
    assert model.get_model_status().peft_types == {"default": "MOLORA"}


def test_shared_A_has_one_A_and_trains():
    model = trained(share_A=True)
    layer = model.model.model.layers[0].self_attn.q_proj
    assert layer.molora_A.default.weight.shape == (1, 4, 32)
    assert layer.molora_B.default.weight.abs().sum() > 0


def test_block_placement_shares_one_router_among_linears_of_one_input():
    model = get_peft_model(base_model(), config("block"))
    routers = [n for n, _ in model.named_parameters() if "molora_router" in n]
    assert [n.split("layers.")[1].split(".molora")[0] for n in routers] == [
        f"{layer}.{module}"
        for layer in (0, 1)
        for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    train(model, 1)
    assert "model.layers.0.self_attn.q_proj+k_proj+v_proj" in molora.routing_statistics(model)


def test_status_reports_of_peft():
    model = get_peft_model(base_model(), config("ffn"))
    status = model.get_layer_status()
    assert {s.module_type for s in status} == {"MixedFFN", "MixedLinear"}
    assert all(s.requires_grad == {"default": True} for s in status)
    assert model.get_model_status().trainable_params == sum(p.numel() for p in adapter_tensors(model).values())


# -- importing ---------------------------------------------------------------------------------------------------------


def test_registration_leaves_pefts_enum_alone_and_is_idempotent():
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from molora.integrations.peft import register

    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    register()
    assert before == PEFT_TYPE_TO_CONFIG_MAPPING
    assert "MOLORA" not in [t.value for t in peft.PeftType]
    assert pickle.loads(pickle.dumps(MoloraConfig())) == MoloraConfig()


def test_importing_molora_imports_nothing_but_molora_beyond_peft():
    code = (
        "import sys, peft; before = set(sys.modules); import molora;"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['molora']"


def test_a_config_survives_its_file(tmp_path: Path):
    made = config("block", router={"top_k": 1, "pool_layers": False}, expert_names=list("abcd"))
    made.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == made
    assert MoloraConfig.from_pretrained(tmp_path).router == made.router


def test_nothing_warns_in_ordinary_use(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        model = trained()
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(base_model(), tmp_path)


def test_families_are_all_here():
    assert set(FAMILIES) == {"llama", "qwen3", "mistral", "gemma3", "phi3", "gpt2", "gpt_neox"}
    assert AutoPeftModelForCausalLM is not None
