"""LoRA files that no expert can compute, or that are damaged, are refused in one sentence; nothing in them runs."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_adapters import (
    PREFIX,
    WEIGHTS,
    A,
    B,
    Payload,
    Q,
    copy_lora,
    edit_config,
    edit_weights,
    peft_model,
    same,
)
from safetensors.torch import load_file

from molora.adapters.lora_files import read_lora


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT saves of a tiny Llama's LoRA."""
    path = tmp_path_factory.mktemp("saved")
    peft_model().save_pretrained(path)
    return path


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    return copy_lora(saved, tmp_path / "adapter")


def refused(path: Path, sentence: str) -> None:
    """Reading raises one sentence that names the adapter and matches."""
    with pytest.raises(ValueError, match=sentence) as error:
        read_lora(path)
    assert str(error.value).startswith(f"adapter {path}: ") and "\n" not in str(error.value)


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


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True, "init_lora_weights": True}, "lora_bias=True"),
        ({"bias": "all", "base": "gpt2"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices="),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.*(LoRA of an embedding|whole trained module)"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication="),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
    ids=str,
)
def test_what_peft_saves_of_other_kinds_is_refused_by_config_and_by_keys(
    tmp_path: Path, options: dict[str, Any], sentence: str
):
    path = tmp_path / "adapter"
    options = dict(options)
    peft_model(options.pop("base", "llama"), **options).save_pretrained(path)
    refused(path, sentence)
    edit_config(path, drop=tuple(options.keys() - {"target_modules"}))
    if "layer_replication" not in options and options.get("init_lora_weights") != "olora":  # no key shows these two
        refused(path, "no expert|no place in an expert")


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

    monkeypatch.setattr("molora.adapters.lora_files.snapshot_download", download)
    lora = read_lora("someone/something")
    assert asked == [("someone/something", ["adapter_config.json", WEIGHTS])]
    assert same(lora.pairs, read_lora(saved).pairs) and lora.path == "someone/something"


def test_a_pickle_that_wants_to_run_code_runs_nothing(adapter: Path, tmp_path: Path):
    marker, file = tmp_path / "marker", adapter / "adapter_model.bin"
    tensors = load_file(adapter / WEIGHTS)
    (adapter / WEIGHTS).unlink()
    torch.save(tensors | {A: Payload(str(marker))}, file)
    refused(adapter, "would run code .it asks for .*mkdir.; nothing was run, ask for adapter_model.safetensors")
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
