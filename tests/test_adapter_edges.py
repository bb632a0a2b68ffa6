"""Imported experts where users stumbled: copies, averages of unlike adapters, names, linears that nobody adapts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import _tokenizer as word_tokenizer
from lora_pools import save_lora, save_pool
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import base_model, config, logits
from torch import Tensor

import molora
from molora.adapters.lora_files import read_lora


def products(path: Path) -> dict[str, Tensor]:
    return {n: p.scaling * p.B.double() @ p.A.double() for n, p in read_lora(str(path)).pairs.items()}


def assert_weighted_sum(out: Path, paths: list[Path], weights: list[float]) -> None:
    got, parts = products(out), [products(path) for path in paths]
    assert got.keys() == set().union(*parts)
    for name, product in got.items():
        want = sum(w * p[name] for w, p in zip(weights, parts, strict=True) if name in p)
        assert (product - want).norm() < 1e-5 * want.norm(), name  # type: ignore[union-attr]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "odd",
    [
        {"use_rslora": True, "r": 5},
        {"layers_to_transform": [1]},
        {"exclude_modules": ["down_proj"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"r": 7, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ],
    ids=lambda o: next(iter(o)),
)
def test_cat_is_the_weighted_sum_whatever_the_configs(odd: dict[str, Any], first: bool, tmp_path: Path) -> None:
    paths = [save_lora(tmp_path / "odd", seed=1, **odd), save_lora(tmp_path / "plain", seed=2)]
    paths = paths if first else paths[::-1]
    base = base_model().to(torch.bfloat16)
    named = dict(zip("ab", paths, strict=True))
    molora.average_adapters(base, named, tmp_path / "out", weights={"a": 0.7, "b": 0.4}, combination="cat")
    assert_weighted_sum(tmp_path / "out", paths, [0.7, 0.4])
    with pytest.raises(ValueError, match="is there already"):
        molora.average_adapters(base, named, tmp_path / "out", combination="cat")
    molora.average_adapters(base, named, tmp_path / "out", combination="cat", overwrite=True)
    assert_weighted_sum(tmp_path / "out", paths, [0.5, 0.5])
    assert not any("lora" in name for name, _ in base.named_modules())


def test_an_average_of_unequal_ranks_says_what_takes_them(tmp_path: Path) -> None:
    paths = {"a": save_lora(tmp_path / "a", r=2), "b": save_lora(tmp_path / "b", r=3)}
    with pytest.raises(ValueError, match=r"combination='linear' needs adapters of one rank, these have \[2, 3\]"):
        molora.average_adapters(base_model(), paths, tmp_path / "out")
    with pytest.raises(ValueError, match="density=1.5 is the share"):
        molora.average_adapters(base_model(), paths, tmp_path / "out", combination="cat", density=1.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["pool", "fresh"])
def test_a_copy_knows_its_base_before_its_first_forward(kind: str, tmp_path: Path) -> None:
    pool = save_pool(tmp_path / "loras")
    if kind == "pool":
        model = molora.from_adapters(base_model(), pool, "arrow")
    else:
        model = get_peft_model(base_model(), config("linear", init_lora_weights=False, plain_lora=None)).eval()
    again = copy.deepcopy(model)
    for name, path in molora.to_adapters(again, tmp_path / "out").items():
        loaded = PeftModel.from_pretrained(base_model(), path).eval()
        assert (logits(loaded) - logits(base_model())).abs().max() > 1e-3, name
    if kind == "pool":
        other = copy.deepcopy(model)
        molora.delete_expert(other, next(iter(pool)))
        molora.add_expert(copy.deepcopy(model), "new", next(iter(pool.values())))
        molora.compress_experts(copy.deepcopy(model), 4)
        assert other.peft_config["default"].num_experts == len(pool) - 1


def test_names_that_would_be_lost(tmp_path: Path) -> None:
    path = save_lora(tmp_path / "a")
    for name in ("plain_lora", "a\nb", "a\0b", "x" * 300):
        with pytest.raises(ValueError, match="must be a word without slashes"):
            molora.from_adapters(base_model(), {name: path})
    texts = {"sql": ["t3 t4"], "math": ["t5 t6"], "code": ["t7"]}
    model = molora.from_adapters(base_model(), save_pool(tmp_path / "loras"), "retrieval")
    model.set_centroids(texts, word_tokenizer())
    with pytest.raises(ValueError, match="give these, in their order"):
        model.set_centroids({"math": texts["math"], "sq1": texts["sql"], "code": texts["code"]}, word_tokenizer())
    assert model.peft_config["default"].expert_names == ["sql", "math", "code"]


def test_a_linear_whose_experts_are_gone_adds_nothing(tmp_path: Path) -> None:
    attention = save_lora(tmp_path / "a", seed=1, target_modules=["q_proj"])
    mlp = save_lora(tmp_path / "b", seed=2, target_modules=["down_proj"])
    model = molora.from_adapters(base_model(), {"attention": attention, "mlp": mlp}, "arrow")
    model.delete_expert("mlp")
    want = logits(PeftModel.from_pretrained(base_model(), attention).eval())
    assert (logits(model) - want).abs().max() < 1e-5
    model.save_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(base_model(), tmp_path / "out").eval()
    assert torch.equal(logits(again), logits(model))
    untrained = get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    untrained.save_pretrained(str(tmp_path / "zero"))
    nothing = molora.from_adapters(base_model(), {"zero": tmp_path / "zero"}, "arrow")
    assert torch.equal(logits(nothing), logits(base_model()))
    unset = get_peft_model(base_model(), molora.MoloraConfig.from_preset("arrow", num_experts=2, r=2)).eval()
    with pytest.raises(ValueError, match="has no prototypes yet"):
        logits(unset)


def test_a_gate_that_was_not_trained_chooses_nothing(tmp_path: Path) -> None:
    model = molora.from_adapters(base_model(), save_pool(tmp_path / "loras"), "phatgoose")
    from molora.context import runtime_of

    for site in runtime_of(model).sites:
        with torch.no_grad():
            site.router.weight[:2].normal_()
    with molora.record_routing(model) as routing:
        logits(model)
    assert all(float(routing[name].gates[:, 2].abs().max()) == 0 for name in routing)


def test_what_from_adapters_does_not_take(tmp_path: Path) -> None:
    path = save_lora(tmp_path / "a")
    lora = PeftModel.from_pretrained(base_model(), path)
    before = logits(lora.eval())
    with pytest.raises(ValueError, match="takes the base itself, not a PeftModel"):
        molora.from_adapters(lora, {"a": path})
    assert torch.equal(logits(lora), before)
    for options in ({"shared_basis": True}, {"compression": {}}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}):
        with pytest.raises(ValueError, match="follows from the adapters; leave it out"):
            molora.from_adapters(base_model(), {"a": path}, **options)
    with pytest.raises(ValueError, match="must be a list of adapters"):
        molora.from_adapters(base_model(), {"a": path}, general=str(path))
    with pytest.raises(ValueError, match="must be the directory or hub id"):
        molora.from_adapters(base_model(), {"a": None})  # type: ignore[dict-item]


def test_frozen_experts_are_not_counted_as_trainable(tmp_path: Path) -> None:
    from molora.eval.results import parameters

    pool = save_pool(tmp_path / "loras")
    for router in ("arrow", "phatgoose"):
        model = molora.from_adapters(base_model(), pool, router)
        assert parameters(model)["trainable"] == model.get_nb_trainable_parameters()[0]
        base = sum(p.numel() for p in base_model().parameters())
        assert parameters(model)["base"] == base
