"""Pools of experts made smaller, through a model: what it computes, keeps, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_pools import save_pool
from peft import PeftModel, get_peft_model
from tiny_models import base_model, config, logits, train, trained
from torch import Tensor

import molora
from molora.adapters.from_adapters import linears_of
from molora.adapters.joint_compression import joint_basis
from molora.adapters.to_adapters import expert_pairs
from molora.context import runtime_of


@pytest.fixture
def pool(tmp_path: Path) -> dict[str, Path]:
    return save_pool(tmp_path / "loras")


def products(model: Any) -> dict[str, Tensor]:
    """The (O, D) product of each expert on each linear, by LoRA pairs."""
    pairs = expert_pairs(model)
    return {
        f"{expert}.{linear}": (pair.B.double() @ pair.A.double()) * pair.scaling
        for expert, linears in pairs.items()
        for linear, pair in linears.items()
    }


@pytest.mark.parametrize("router", ["arrow", "softmax"])
@pytest.mark.parametrize("placement", ["linear", "block"])
def test_a_basis_of_full_rank_changes_nothing(pool: dict[str, Path], placement: str, router: str) -> None:
    model = molora.from_adapters(base_model(), pool, router, placement=placement)
    want, before = logits(model), products(model)
    errors = molora.compress_experts(model, 32)
    assert max(errors.values()) < 1e-6
    assert (logits(model) - want).abs().max() < 1e-5
    for name, product in products(model).items():
        assert (product - before[name]).norm() < 1e-5 * before[name].norm()
    kept = model.peft_config["default"].compression
    assert kept["method"] == "joint_basis" and kept["rank"] == 32 and kept["error"] < 1e-6


def test_a_small_basis_is_the_one_of_the_tensors(pool: dict[str, Path], tmp_path: Path) -> None:
    """Errors and products are those of `joint_basis`; the checkpoint computes the same and says what was lost."""
    model = molora.from_adapters(base_model(), pool, "arrow")
    name, layer = next(iter(linears_of(runtime_of(model), "default").items()))
    experts = layer.experts("default", "")
    want = joint_basis(experts.A, experts.B, 5)
    before = products(model)
    errors = molora.compress_experts(model, 5)
    assert errors[name] == pytest.approx(float(want.total_error), rel=1e-6)
    lost = sum(float((p - before[n]).square().sum()) for n, p in products(model).items())
    whole = sum(float(p.square().sum()) for p in before.values())
    stored = model.peft_config["default"].compression
    assert 0.05 < stored["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert stored["largest_error"] == pytest.approx(max(errors.values()))
    for e, expert in enumerate(pool):
        product = want.U @ want.Sigma[e] @ want.V.T
        assert (products(model)[f"{expert}.{name}"] - product).norm() < 1e-5 * product.norm()
    model.save_pretrained(tmp_path / "small")
    again = PeftModel.from_pretrained(base_model(), tmp_path / "small").eval()
    assert torch.equal(logits(again), logits(model))
    written = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert written["compression"] == stored and written["shared_basis"] is True
    paths = molora.to_adapters(again, tmp_path / "out")
    one = molora.from_adapters(base_model(), {"sql": paths["sql"]}, "arrow")
    assert one.peft_config["default"].r <= 5


def test_a_shared_basis_trains() -> None:
    """Gradients of U, V and the small matrices are those of plain autograd through the same equation."""
    torch.manual_seed(1)
    options = {"shared_basis": True, "init_lora_weights": False, "target_modules": ["q_proj", "down_proj"]}
    model = get_peft_model(base_model(), config("linear", **options))
    name, layer = next(iter(linears_of(runtime_of(model), "default").items()))
    model.eval()
    x = torch.randn(2, 20, layer.in_features, requires_grad=True)
    up = torch.randn(2, 20, layer.out_features)
    V, S, U = (getattr(layer, c)["default"].weight for c in ("molora_A", "molora_B", "molora_U"))
    assert V.shape == (1, 4, 32) and S.shape == (4, 4, 4) and U.shape == (1, 4, layer.out_features)
    got = torch.autograd.grad((layer(x) * up).sum(), [x, V, S, U])
    gates = layer.molora_router["default"](x.flatten(0, 1)).gates.view(2, 20, 4)
    z = x @ V[0].T
    mixed = torch.einsum("bte,btk,ekj->btj", gates, z, S) * layer.molora_specs["default"][""].scaling
    want = torch.autograd.grad(((layer.base_layer(x) + mixed @ U[0]) * up).sum(), [x, V, S, U])
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()
    losses = train(model, 5)
    assert losses[-1] < losses[0] and name


def test_clusters_are_one_lora(pool: dict[str, Path], tmp_path: Path) -> None:
    model = molora.from_adapters(base_model(), pool, "arrow")
    errors = molora.merge_experts(model, 4, tmp_path / "one")
    assert len(errors) == 6 and all(0 < error < 2 for error in errors.values())
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "one").eval()
    assert loaded.peft_config["default"].r == 4
    assert (logits(loaded) - logits(base_model())).abs().max() > 1e-3
    alone = molora.from_adapters(base_model(), {"sql": pool["sql"]}, "arrow")
    molora.merge_experts(alone, 4, tmp_path / "same")
    same = PeftModel.from_pretrained(base_model(), tmp_path / "same").eval()
    assert (logits(same) - logits(alone)).abs().max() < 1e-5


def test_what_cannot_be_made_smaller(pool: dict[str, Path], tmp_path: Path) -> None:
    model = molora.from_adapters(base_model(), pool, "arrow")
    with pytest.raises(ValueError, match="rank=0 must be an integer of at least 1"):
        molora.compress_experts(model, 0)
    molora.compress_experts(model, 3)
    for again in (lambda: molora.compress_experts(model, 3), lambda: molora.merge_experts(model, 3, tmp_path / "x")):
        with pytest.raises(ValueError, match="share a basis already"):
            again()
    with pytest.raises(ValueError, match="change the pool, then compress it again"):
        molora.delete_expert(model, "sql")
    for kind in (trained("llama", "ffn"), trained("llama", num_experts=1, r=8, router={"name": "rank_wise"})):
        with pytest.raises(ValueError, match="has no experts of single linears"):
            molora.compress_experts(kind, 3)
    with pytest.raises(ValueError, match="shared_basis is for experts of linears"):
        config("ffn", shared_basis=True)
