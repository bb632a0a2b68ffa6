"""LoRA files: what PEFT saved is read as PEFT computes it, what is written loads in PEFT, in every layout."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from lora_adapters import (
    PREFIX,
    TARGETS,
    WEIGHTS,
    A,
    B,
    Q,
    copy_lora,
    edit_config,
    edit_weights,
    peft_model,
    same,
)
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import base_model, logits
from torch import nn

from molora.adapters.lora_files import LoraPair, read_lora, write_lora
from molora.adapters.lora_match import base_modules, match_lora

DATA = Path(os.environ.get("MOLORA_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")).resolve()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT saves of a tiny Llama's LoRA."""
    path = tmp_path_factory.mktemp("saved")
    peft_model().save_pretrained(path)
    return path


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    return copy_lora(saved, tmp_path / "adapter")


# -- what PEFT saved, and what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "r": 6, "lora_alpha": 5},
        {"rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 7}, "alpha_pattern": {"down_proj": 11}},
        {"rank_pattern": {"^model.layers.0.mlp.down_proj": 3, ".*q_proj": 5}, "use_rslora": True},
        {"alpha_pattern": {r"layers\.(0|1)\.self_attn\.v_proj": 1, "q_proj": 0.3}},
        {"layers_to_transform": [1]},
        {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.self_attn\.[qk]_proj"},
    ],
    ids=str,
)
def test_rank_and_scaling_are_those_of_peft(tmp_path: Path, options: dict[str, Any]):
    model = peft_model(**options)
    model.save_pretrained(tmp_path)
    pairs, missing = match_lora(read_lora(tmp_path), base_model())
    layers = {
        name.removeprefix(PREFIX): module for name, module in model.named_modules() if hasattr(module, "lora_alpha")
    }
    assert pairs.keys() == layers.keys() and not missing
    for name, pair in pairs.items():
        layer: Any = layers[name]
        assert pair.scaling == layer.scaling["default"] and pair.A.shape[0] == layer.r["default"]
        assert torch.equal(pair.A, layer.lora_A["default"].weight)
        assert torch.equal(pair.B, layer.lora_B["default"].weight)


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"c_proj": 2, "v_proj": 3}, "alpha_pattern": {"c_attn": 9}}])
@pytest.mark.parametrize("leaves", [True, False])
def test_peft_computes_the_same_with_what_is_written(tmp_path: Path, family: str, options: Any, leaves: bool):
    model = peft_model(family, **options)
    model.save_pretrained(tmp_path / "peft")
    lora = read_lora(tmp_path / "peft")
    model_for_names = base_model(family) if leaves else None
    write_lora(tmp_path / "ours", lora.pairs, "some/base", fan_in_fan_out=family == "gpt2", model=model_for_names)
    again = read_lora(tmp_path / "ours")
    assert same(again.pairs, lora.pairs) and again.base == "some/base"
    assert (again.config["target_modules"] == sorted(TARGETS[family])) == leaves
    match_lora(again, base_model(family))
    loaded = PeftModel.from_pretrained(base_model(family), tmp_path / "ours")
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(base_model(family)))
    native = base_model(family)
    native.load_adapter(str(tmp_path / "ours"))
    assert torch.equal(logits(native), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_any_scaling_come_back(tmp_path: Path, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)

    def pair(r: int, scaling: float, D: int = 32, O: int = 32) -> LoraPair:
        A, B = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((r, D), (O, r)))
        return LoraPair(nn.Parameter(A), B.t().contiguous().t(), scaling)

    scalings = [2.0, 0.25, 1 / 3, 16 / 8**0.5, 7.1, 1e-3]
    pairs = {
        f"model.layers.{i}.q_proj": pair(r, s)
        for i, (r, s) in enumerate(zip((8, 3, 6, 8, 5, 1), scalings, strict=True))
    }
    write_lora(tmp_path / "a", pairs, None)
    again = read_lora(tmp_path / "a").pairs
    for name in pairs:
        assert again[name].A.dtype == dtype and again[name].scaling == pytest.approx(pairs[name].scaling, rel=1e-15)
        assert torch.equal(again[name].A, pairs[name].A) and torch.equal(again[name].B, pairs[name].B)


def test_rank_stabilised_scalings_of_an_odd_rank_come_back_exactly(tmp_path: Path):
    tensors = (torch.randn(6, 8), torch.randn(4, 6))
    pairs = {f"layers.{i}.q": LoraPair(*tensors, scaling=(5 + i) / 6**0.5) for i in range(9)}
    write_lora(tmp_path / "a", pairs, None)
    assert same(read_lora(tmp_path / "a").pairs, pairs)


def test_names_that_end_like_others_keep_their_own_rank(tmp_path: Path):
    pairs = {
        "q": LoraPair(torch.randn(2, 8), torch.randn(4, 2), 1.0),
        "more.q": LoraPair(torch.randn(3, 8), torch.randn(4, 3), 1.0),
        "still.more.q": LoraPair(torch.randn(5, 8), torch.randn(4, 5), 2.0),
    }
    write_lora(tmp_path / "a", pairs, None)
    assert same(read_lora(tmp_path / "a").pairs, pairs)


def test_last_parts_of_names_stand_only_for_all_modules_that_have_them(tmp_path: Path, saved: Path):
    pairs = dict(read_lora(saved).pairs)
    del pairs[Q]
    write_lora(tmp_path / "a", pairs, None, model=base_model())
    lora = read_lora(tmp_path / "a")
    assert lora.config["target_modules"] == sorted(pairs)
    assert match_lora(lora, base_model())[1] == []


def test_one_scaling_stands_in_the_config_for_all_ranks(tmp_path: Path):
    """vLLM reads lora_alpha / r alone and allots the largest rank."""
    pairs = {f"layers.{i}.q": LoraPair(torch.randn(r, 8), torch.randn(4, r), 2.0) for i, r in enumerate((2, 2, 8))}
    write_lora(tmp_path / "a", pairs, None)
    config = read_lora(tmp_path / "a").config
    assert (config["r"], config["lora_alpha"], config["bias"], config["use_rslora"]) == (8, 16, "none", False)
    assert config["rank_pattern"] == {"layers.0.q": 2, "layers.1.q": 2}


def test_writing_is_whole_or_not_at_all(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch):
    pairs = dict(read_lora(saved).pairs)
    A, B, scaling = pairs[Q]
    for bad, sentence in (
        (LoraPair(A * float("inf"), B, 1.0), "NaN or infinity"),
        (LoraPair(A, B[:, :2], 1.0), "rank 4"),
        (LoraPair(A.int(), B, 1.0), "torch.int32"),
        (LoraPair(A.to("meta"), B, 1.0), "has no values here; load it"),
        (LoraPair(torch.tensor(1.0), B, 1.0), "no matrices"),
        (LoraPair(A, B, float("nan")), "finite number above 0"),
        (LoraPair(A, B, 1e9), "lora_alpha.*must be at most|alpha_pattern.*must be at most"),
    ):
        with pytest.raises(ValueError, match=sentence):
            write_lora(tmp_path / "a", pairs | {Q: bad}, None)
    with pytest.raises(ValueError, match="at least one module"):
        write_lora(tmp_path / "a", {}, None)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(LoraConfig, "save_pretrained", broken)
    with pytest.raises(OSError, match="disk full"):
        write_lora(tmp_path / "a", pairs, None)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    write_lora(tmp_path / "a", pairs, None)
    assert sorted(os.listdir(tmp_path)) == ["a"] and len(os.listdir(tmp_path / "a")) == 2
    with pytest.raises(ValueError, match="there already.*new directory"):
        write_lora(tmp_path / "a", pairs, None)
    assert same(read_lora(tmp_path / "a").pairs, pairs)


def test_what_was_read_outlives_its_file(saved: Path, adapter: Path):
    lora = read_lora(adapter)
    write_lora(adapter.parent / "other", {name: pair._replace(A=pair.A * 2) for name, pair in lora.pairs.items()}, None)
    shutil.rmtree(adapter)
    (adapter.parent / "other").rename(adapter)
    assert same(lora.pairs, read_lora(saved).pairs)


# -- layouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace(".weight", ".my_adapter.weight"),
        lambda key: key.removeprefix(PREFIX),
        lambda key: PREFIX + key,
        lambda key: key.replace(PREFIX, "_orig_mod." + PREFIX),
        lambda key: key.replace(PREFIX, PREFIX + "_orig_mod."),
        lambda key: key.replace(".self_attn.", "._orig_mod._checkpoint_wrapped_module.self_attn."),
        lambda key: "_fsdp_wrapped_module." + key.replace(".weight", ".default.weight"),
    ],
    ids=["default", "named", "no prefix", "nested", "compiled", "compiled base", "compiled layer", "fsdp"],
)
def test_every_layout_gives_the_same_names(saved: Path, adapter: Path, rename: Callable[[str], str]):
    edit_weights(adapter, lambda tensors: {rename(key): tensor for key, tensor in tensors.items()})
    lora = read_lora(adapter)
    assert Q in lora.pairs and same(lora.pairs, read_lora(saved).pairs)


def test_a_native_save_of_transformers_is_read(tmp_path: Path, saved: Path):
    native = base_model()
    native.load_adapter(str(saved))
    native.save_pretrained(tmp_path)
    assert same(read_lora(tmp_path).pairs, read_lora(saved).pairs)


def test_a_pickle_is_read_and_a_safetensors_file_comes_first(saved: Path, adapter: Path):
    tensors = load_file(adapter / WEIGHTS)
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    assert same(read_lora(adapter).pairs, read_lora(saved).pairs)
    save_file({key: tensor * 2 for key, tensor in tensors.items()}, adapter / WEIGHTS)
    assert torch.equal(read_lora(adapter).pairs[Q].A, read_lora(saved).pairs[Q].A * 2)


def test_a_config_of_peft_04_is_read(saved: Path, adapter: Path):
    keep = "base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights layers_pattern r lora_alpha"
    keep += " layers_to_transform lora_dropout modules_to_save peft_type revision target_modules task_type auto_mapping"
    config = json.loads((adapter / "adapter_config.json").read_text())
    edit_config(adapter, drop=tuple(set(config) - set(keep.split())))
    assert same(read_lora(adapter).pairs, read_lora(saved).pairs)


def test_a_converted_pissa_is_an_ordinary_lora(tmp_path: Path):
    model = peft_model(init_lora_weights="pissa")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(0.1)
    want = logits(model)
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(ValueError, match="init_lora_weights='pissa'.*path_initial_model_for_weight_conversion"):
        read_lora(tmp_path / "raw")
    model.save_pretrained(tmp_path / "done", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    lora = read_lora(tmp_path / "done")
    assert lora.pairs[Q].A.shape[0] == 8
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "done")
    assert torch.allclose(logits(loaded), want, atol=1e-4)
    assert all(loaded.get_submodule(PREFIX + n).scaling["default"] == p.scaling for n, p in lora.pairs.items())


# -- the base ----------------------------------------------------------------------------------------------------------


def match_refused(path: Path, base: nn.Module, sentence: str, allow_partial: bool = True) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        match_lora(read_lora(path), base, allow_partial)
    assert str(error.value).startswith(f"adapter {path}: ") and "\n" not in str(error.value)


def test_another_base_is_refused_and_another_name_is_not(adapter: Path):
    match_refused(adapter, base_model("gpt2"), "weights for '.*_proj', which this base lacks; .*another base")
    wide = hf.LlamaForCausalLM(hf.LlamaConfig(**{**base_model().config.to_dict(), "hidden_size": 64, "head_dim": 8}))
    match_refused(adapter, wide, "takes 56 features and gives 32 there, 56 and 64 in this base; it belongs to another")
    edit_config(adapter, base_model_name_or_path="renamed/folder")
    pairs, missing = match_lora(read_lora(adapter), base_model())
    assert len(pairs) == 6 and missing == []
    edit_config(adapter, target_modules=["q_proj"])
    match_refused(adapter, base_model(), "4 modules that its config does not select, first .*down_proj|v_proj")


def test_weights_of_an_embedding_are_refused(adapter: Path):
    name = f"{PREFIX}model.embed_tokens."
    edit_weights(adapter, lambda t: t | {f"{name}lora_A.weight": t[A], f"{name}lora_B.weight": t[B]})
    match_refused(
        adapter, base_model(), "embed_tokens is of type Embedding in this base, and experts sit on linears only"
    )


def test_selected_modules_without_weights_are_named(adapter: Path):
    edit_weights(adapter, lambda t: {key: value for key, value in t.items() if "layers.1.mlp" not in key})
    sentence = "selects 6 modules.* 1 of them have no weights, first model.layers.1.mlp.down_proj; .*allow_partial=True"
    match_refused(adapter, base_model(), sentence, allow_partial=False)
    pairs, missing = match_lora(read_lora(adapter), base_model(), allow_partial=True)
    assert len(pairs) == 5 and missing == ["model.layers.1.mlp.down_proj"]


def test_a_selected_embedding_counts_as_without_weights(adapter: Path):
    edit_config(adapter, target_modules=[*TARGETS["llama"], "embed_tokens"])
    match_refused(adapter, base_model(), "first model.embed_tokens", allow_partial=False)


def test_a_base_that_carries_adapters_has_the_names_of_the_base(adapter: Path):
    lora = read_lora(adapter)
    want = list(match_lora(lora, base_model())[0])
    wrapped = peft_model(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    assert list(match_lora(lora, wrapped)[0]) == want == [n for n, _ in base_model().named_modules() if n in want]
    native = base_model()
    native.add_adapter(LoraConfig(target_modules="all-linear"))
    assert list(match_lora(lora, native)[0]) == want
    assert base_modules(wrapped).keys() == {name for name, _ in base_model().named_modules() if name}


# -- real adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "modules", "r", "scaling", "dtype"),
    [
        ("BK7195__deltacompression-poc__adapter", 24, 1, 32.0, torch.float16),
        ("abrhaleyarefaine1997__gpt2-tigrinya-lora", 36, 8, 4.0, torch.float32),
        ("shibbir24__Smart-Review-AI__lora_adapter", 12, 8, 2.0, torch.float32),
        ("johntnanney__gradience__examples_adapters_tiny_lora", 12, 8, 2.0, torch.float32),
    ],
)
@pytest.mark.skipif(not (DATA / "adapters").is_dir(), reason="needs the adapters of the shared data")
def test_real_adapters(name: str, modules: int, r: int, scaling: float, dtype: torch.dtype, tmp_path: Path):
    lora = read_lora(DATA / "adapters" / name)
    assert len(lora.pairs) == modules
    assert {(p.A.shape[0], p.scaling, p.A.dtype, p.B.dtype) for p in lora.pairs.values()} == {
        (r, scaling, dtype, dtype)
    }
    with torch.device("meta"):
        if "deltacompression" in name:
            sizes = {"hidden_size": 2048, "intermediate_size": 64, "num_hidden_layers": 24, "vocab_size": 9}
            base = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**sizes, bos_token_id=1, eos_token_id=2))
        else:
            base = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=9, bos_token_id=1, eos_token_id=2))
    if "tiny_lora" in name:
        sentence = (
            "selects 36 modules.* 24 of them have no weights, first transformer.h.0.mlp.c_proj; .*--allow-partial"
        )
        with pytest.raises(ValueError, match=re.escape(lora.path) + ".*" + sentence):
            match_lora(lora, base)
        pairs, missing = match_lora(lora, base, allow_partial=True)
        assert len(pairs) == 12 and len(missing) == 24
    else:
        pairs, missing = match_lora(lora, base)
        assert same(pairs, lora.pairs) and not missing
    write_lora(tmp_path / "again", pairs, lora.base, fan_in_fan_out=lora.config["fan_in_fan_out"])
    assert same(read_lora(tmp_path / "again").pairs, lora.pairs)
