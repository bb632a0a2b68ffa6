"""LoRA files: what PEFT saved is read as PEFT computes it, what is written loads in PEFT, and the rest is refused."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import base_model, logits
from torch import Tensor, nn

from molora.lora_files import LoraPair, read_lora, write_lora
from molora.lora_match import base_modules, match_lora

DATA = Path(os.environ.get("MOLORA_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")).resolve()
Q = "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
WEIGHTS = "adapter_model.safetensors"


def peft_model(family: str = "llama", **options: Any) -> PeftModel:
    """A model with a LoRA by PEFT that changes its outputs."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[family], "init_lora_weights": False} | options
    if family == "gpt2":
        options["fan_in_fan_out"] = True
    base = base_model(family)
    torch.manual_seed(7)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options)).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT saves of a tiny Llama's LoRA."""
    path = tmp_path_factory.mktemp("saved")
    peft_model().save_pretrained(path)
    return path


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    copy = tmp_path / "adapter"
    copy.mkdir()
    for name in ("adapter_config.json", WEIGHTS):
        (copy / name).write_bytes((saved / name).read_bytes())
    return copy


def edit_config(path: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    file = path / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def edit_weights(path: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Saves the tensors that `edit` returns, or that it leaves in the dict it gets."""
    tensors = load_file(path / WEIGHTS)
    edited = edit(tensors)
    tensors = edited if isinstance(edited, dict) else tensors
    save_file({key: value.clone() for key, value in tensors.items()}, path / WEIGHTS, metadata={"format": "pt"})


def refused(path: Path, sentence: str) -> None:
    """Reading raises one sentence that names the adapter and matches."""
    with pytest.raises(ValueError, match=sentence) as error:
        read_lora(path)
    assert str(error.value).startswith(f"adapter {path}: ") and "\n" not in str(error.value)


def same(first: dict[str, LoraPair], second: dict[str, LoraPair]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(a.A, b.A) and torch.equal(a.B, b.B) and a.A.dtype == b.A.dtype and a.scaling == b.scaling
        for a, b in ((first[name], second[name]) for name in first)
    )


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
        (LoraPair(A, B, float("nan")), "finite number above 0"),
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
    refused(tmp_path / "raw", "init_lora_weights='pissa'.*path_initial_model_for_weight_conversion")
    model.save_pretrained(tmp_path / "done", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    lora = read_lora(tmp_path / "done")
    assert lora.pairs[Q].A.shape[0] == 8
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "done")
    assert torch.allclose(logits(loaded), want, atol=1e-4)
    assert all(loaded.get_submodule(PREFIX + n).scaling["default"] == p.scaling for n, p in lora.pairs.items())


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"peft_type": "VERA"}, "peft_type='VERA'.*train a LoRA"),
        ({"peft_type": None}, "peft_type=None"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS'.*causal LMs"),
        ({"use_dora": True}, "use_dora=True.*DoRA.*use_dora=False"),
        ({"use_dora": "false"}, "use_dora='false'"),
        ({"use_qalora": True}, "use_qalora=True.*QA-LoRA"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens.*activated"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora=.*may compute more"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config="),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config="),
        ({"velora_config": {"scale": 1.0}}, "velora_config="),
        ({"monteclora_config": {"num_samples": 1}}, "monteclora_config="),
        ({"megatron_config": {"a": 1}}, "megatron_config="),
        ({"use_something_new": True}, "use_something_new=True.*train without use_something_new"),
        ({"alpha": 7}, "alpha=7"),
        ({"bias": "lora_only"}, "bias='lora_only'.*trained biases"),
        ({"lora_bias": True}, "lora_bias=True.*no place"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*whole trained modules"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=.*trained tokens"),
        ({"target_parameters": ["experts.w"]}, "target_parameters=.*target_modules"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=.*other layers"),
        *[
            ({"init_lora_weights": init}, f"init_lora_weights='{init}'.*path_initial_model_for_weight_conversion")
            for init in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq")
        ],
        ({"init_lora_weights": "magic"}, "'magic' is not known.*wanted one of True"),
        ({"r": "8"}, "r='8' must be an integer"),
        ({"r": 0}, "r=0 must be an integer of at least 1"),
        ({"r": -1}, "r=-1"),
        ({"r": True}, "r=True"),
        ({"r": 4.0}, "r=4.0"),
        ({"r": 10**9}, "rank 1000000000"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan must be a finite number above 0"),
        ({"lora_alpha": 1e30}, r"lora_alpha=1e\+30 must be at most"),
        ({"lora_alpha": 10**400}, "correct adapter_config.json"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"use_rslora": "no"}, "use_rslora='no'"),
        ({"rank_pattern": [1]}, "rank_pattern=.*must be an object"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.*at least 1"),
        ({"rank_pattern": {"q_proj": 5}}, "rank 5 that adapter_config.json gives"),
        ({"rank_pattern": {"(": 5}}, "no regular expression"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha_pattern.*finite"),
        ({"target_modules": None}, "target_modules is missing or empty"),
        ({"target_modules": {"q": 1}}, "target_modules=.*list of names"),
        ({"target_modules": "("}, "no regular expression"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform='1'"),
        ({"layers_pattern": "h"}, "layers_pattern without"),
        ({"target_modules": ".*", "layers_to_transform": 1}, "need a list"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path=3 must be text"),
    ],
    ids=str,
)
def test_a_config_that_no_expert_computes_is_refused(adapter: Path, change: dict[str, Any], sentence: str):
    read_lora(adapter)
    edit_config(adapter, **change)
    refused(adapter, sentence)


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 6},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"loftq_config": {"loftq_bits": 4}},
        {"use_something_new": False},
        {"rank_pattern": None, "alpha_pattern": None},
        {"qalora_group_size": 4, "lora_dropout": 0.3, "inference_mode": False, "fan_in_fan_out": True},
    ],
    ids=str,
)
def test_settings_of_training_do_not_matter(saved: Path, adapter: Path, change: dict[str, Any]):
    edit_config(adapter, **change)
    assert same(read_lora(adapter).pairs, read_lora(saved).pairs)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "peft_type", "target_modules"])
def test_a_config_without_its_keys_is_refused(adapter: Path, key: str):
    edit_config(adapter, drop=(key,))
    refused(adapter, key)


A, B = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda t: t.pop(A), f"'{Q}' has lora_B but no lora_A"),
        (lambda t: t.pop(B), f"'{Q}' has lora_A but no lora_B"),
        (lambda t: t | {A: t[B], B: t[A]}, r"swapped or transposed: wanted A \(4, D\) and B \(O, 4\)"),
        (lambda t: t | {A: t[A].t().contiguous(), B: t[B].t().contiguous()}, "swapped or transposed"),
        (lambda t: t | {A: t[A][:3].clone()}, "do not have the rank 4"),
        (lambda t: t | {A: t[A].double()}, "lora_A.*torch.float64; convert"),
        (lambda t: t | {B: t[B].int()}, "lora_B.*torch.int32"),
        (lambda t: t | {B: t[B].to(torch.float8_e4m3fn)}, "float8_e4m3fn"),
        (lambda t: t | {A: t[A][None]}, "no matrices"),
        (lambda t: t | {A: t[A][:0]}, "empty.*gather"),
        (lambda t: t[A].fill_(float("nan")), "lora_A.*NaN or infinity"),
        (lambda t: t[B][0, :1].fill_(float("-inf")), "lora_B.*NaN or infinity"),
        (lambda t: {"a": t[A][:0]}, "'a' is no key of a LoRA"),
        (lambda t: {}, "no lora_A and lora_B"),
        (lambda t: t | {f"{PREFIX}model.embed_tokens.lora_embedding_A": t[A]}, "LoRA of an embedding"),
        (lambda t: t | {f"{PREFIX}{Q}.lora_magnitude_vector.weight": t[A][0]}, "DoRA's magnitudes"),
        (lambda t: t | {f"{PREFIX}{Q}.lora_magnitude_vector": t[A][0]}, "DoRA's magnitudes"),
        (lambda t: t | {f"{PREFIX}{Q}.lora_B.bias": t[A][0]}, "a bias of the LoRA"),
        (lambda t: t | {f"{PREFIX}{Q}.lora_diag": t[A][0]}, "no A or B of a plain LoRA"),
        (lambda t: t | {f"{PREFIX}{Q}.base_layer.bias": t[A][0]}, "a trained bias"),
        (lambda t: t | {f"{PREFIX}lm_head.weight": t[A]}, "whole trained module"),
        (lambda t: t | {f"{PREFIX}lm_head.modules_to_save.weight": t[A]}, "whole trained module"),
        (lambda t: t | {f"{PREFIX}model.embed_tokens.trainable_tokens_delta": t[A]}, "trained tokens"),
        (lambda t: {k.removesuffix(".weight"): v for k, v in t.items()}, "layout from before PEFT 0.4"),
        (lambda t: {"lora_unet_x.lora_down.weight": t[A]}, "no A or B of a plain LoRA"),
        (lambda t: t | {A.replace(".weight", ".b.weight"): t[A]}, "belongs to another adapter"),
        (lambda t: t | {A.removeprefix(PREFIX): t[A]}, "is there twice"),
    ],
)
def test_weights_that_are_no_plain_lora_are_refused(adapter: Path, edit: Callable[..., Any], sentence: str):
    edit_weights(adapter, edit)
    refused(adapter, sentence)


def test_files_that_are_not_there_or_not_whole_are_refused(adapter: Path, tmp_path: Path):
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[:-1])
    refused(adapter, "safetensors is damaged.*download or save it again")
    (adapter / WEIGHTS).write_bytes((2**60).to_bytes(8, "little") + whole[8:])
    refused(adapter, "safetensors is damaged")
    huge = whole.replace(b'"shape":[4,32]', b'"shape":[4,99]', 1)
    assert huge != whole
    (adapter / WEIGHTS).write_bytes(huge)
    refused(adapter, "safetensors is damaged")
    (adapter / WEIGHTS).unlink()
    refused(adapter, "wanted adapter_model.safetensors or adapter_model.bin; download")
    (adapter / WEIGHTS).symlink_to(tmp_path / "nowhere")
    refused(adapter, "broken link")
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).mkdir()
    refused(adapter, "is a directory")
    for text in ("", "{", "[1]", "\x00", "[" * 100_000, '"r"'):
        (adapter / "adapter_config.json").write_text(text)
        refused(adapter, "adapter_config.json is ")
    (adapter / "adapter_config.json").write_bytes(b"\xff\xfe{}")
    refused(adapter, "not JSON")
    (adapter / "adapter_config.json").unlink()
    refused(adapter, "adapter_config.json is missing.*give a directory")


def test_paths_that_are_no_directory_are_refused(adapter: Path, tmp_path: Path):
    refused(adapter / WEIGHTS, "not a directory; give the directory")
    refused(tmp_path / "nowhere", "no such directory, and no such repository.*correct the path")
    with pytest.raises(ValueError, match="adapter someone/something: no such directory.*correct the path or id"):
        read_lora("someone/something")


def test_a_hub_id_is_resolved(saved: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(adapter)

    monkeypatch.setattr("molora.lora_files.snapshot_download", download)
    lora = read_lora("someone/something")
    assert asked == [("someone/something", ["adapter_config.json", WEIGHTS])]
    assert same(lora.pairs, read_lora(saved).pairs) and lora.path == "someone/something"


class Payload:
    """A pickle of this makes a file when it is loaded without care."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def test_a_pickle_that_wants_to_run_code_runs_nothing(adapter: Path, tmp_path: Path):
    marker, file = tmp_path / "marker", adapter / "adapter_model.bin"
    tensors = load_file(adapter / WEIGHTS)
    (adapter / WEIGHTS).unlink()
    torch.save(tensors | {A: Payload(str(marker))}, file)
    refused(adapter, "would run code.*nothing was run, ask for adapter_model.safetensors")
    file.write_bytes(pickle.dumps(Payload(str(marker))))
    refused(adapter, "nothing was run")
    assert not marker.exists()
    with pytest.raises(FileExistsError):  # what the payload would have done
        pickle.loads(file.read_bytes())
        pickle.loads(file.read_bytes())


def test_a_pickle_of_something_else_is_refused(adapter: Path):
    (adapter / WEIGHTS).unlink()
    file = adapter / "adapter_model.bin"
    for value, sentence in (
        ([torch.ones(1)], "holds a list"),
        ({A: 3}, "is no plain tensor"),
        ({A: torch.ones(2, 2).to_sparse()}, "is no plain tensor"),
        ({A: torch.ones(1).expand(2**40)}, "larger than the file"),
    ):
        torch.save(value, file)
        refused(adapter, sentence)
    torch.save({A: torch.randn(500)}, file, _use_new_zipfile_serialization=False)
    refused(adapter, "adapter_model.bin is damaged")


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
