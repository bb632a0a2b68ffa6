"""Initial values of experts by PEFT's routines: the base stays exact, experts differ, and what cannot be is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
from test_cli import molora as command
from test_cli import write_recipe
from tiny_lm import save_tiny
from tiny_models import PLACEMENTS, VOCAB, base_model, config, logits, train

import molora
from molora import MoloraConfig
from molora.layers import MoloraLayer


def batches(count: int = 3, rows: int = 4, length: int = 24) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(count):
        ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return found


def parts(model: torch.nn.Module) -> Any:
    for name, module in model.named_modules():
        if isinstance(module, MoloraLayer):
            for part in module.molora_specs["default"]:
                A = getattr(module, f"molora_A{part}")["default"].weight
                yield f"{name}{part}", A, getattr(module, f"molora_B{part}")["default"].weight


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_orthogonal_experts_are_no_change_by_products_of_zero(placement: str) -> None:
    plain_lora = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8} if placement == "ffn" else None
    model = get_peft_model(base_model(), config(placement, init_lora_weights="orthogonal", plain_lora=plain_lora))
    for name, A, B in parts(model):
        assert A.any() and B.any(), name
        assert torch.einsum("erd,ero->edo", A, B).abs().max() < 1e-5, name
        assert len(A) == 1 or not torch.allclose(A[0], A[1]), name
    torch.testing.assert_close(logits(model.eval()), logits(base_model()), rtol=1e-4, atol=1e-5)
    assert train(model, 4)[-1] < train(model, 1)[0] + 1


@pytest.mark.parametrize("placement", [*PLACEMENTS, "ffn_linear"])
def test_eva_deals_out_the_directions_of_the_inputs(placement: str) -> None:
    """Two experts of rank 4 share the 8 leading ones; the base stays as it is."""
    options: dict[str, Any] = {"num_experts": 2, "init_lora_weights": "eva"}
    if placement == "ffn":
        options["plain_lora"] = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8}
    model = get_peft_model(base_model(), config(placement, **options))
    before = {name: A.detach().clone() for name, A, _ in parts(model)}
    training = model.training
    molora.initialize_eva_weights(model, batches(), tau=0.9)
    assert model.training == training
    for name, A, B in parts(model):
        assert not torch.allclose(A, before[name]), name
        assert not B.any(), name
        flat = A.detach().transpose(0, 1).flatten(0, 1)  # in the order of the directions
        torch.testing.assert_close(flat @ flat.T, torch.eye(len(flat)), rtol=0, atol=1e-3)
    torch.testing.assert_close(logits(model.eval()), logits(base_model()))


def test_eva_of_one_expert_is_what_peft_gives_a_lora() -> None:
    targets = ["q_proj", "v_proj", "down_proj"]
    eva = {"init_lora_weights": "eva", "r": 4, "target_modules": targets}
    model = get_peft_model(base_model(), MoloraConfig(num_experts=1, router={"top_k": 1}, **eva))
    molora.initialize_eva_weights(model, batches(), tau=0.9)
    from peft import EvaConfig

    lora = get_peft_model(base_model(), LoraConfig(**eva, eva_config=EvaConfig(rho=1.0, tau=0.9)))
    initialize_lora_eva_weights(lora, batches(), show_progress_bar=False)
    want = dict(lora.named_parameters())
    for name, A, _ in parts(model):
        torch.testing.assert_close(A[0], want[f"{name}.lora_A.default.weight"], rtol=1e-4, atol=1e-5)


def test_eva_with_one_A_for_all_experts_takes_the_first_directions() -> None:
    found = []
    for share_A in (True, False):
        options = {"num_experts": 2, "init_lora_weights": "eva", "share_A": share_A, "target_modules": ["q_proj"]}
        model = get_peft_model(base_model(), config("linear", **options))
        molora.initialize_eva_weights(model, batches(), tau=0.9)
        found.append([A for _, A, _ in parts(model)])
    for shared, own in zip(*found, strict=True):
        assert shared.shape[0] == 1
        # Numbers 0 and 1 of all: the first ranks of experts 0 and 1.
        similarity = (shared[0, :2] * own[:, 0]).sum(-1).abs()
        assert similarity[0] > 0.95 and similarity[1] > 0.7  # PEFT stops before they have converged


def test_eva_that_cannot_be_is_refused() -> None:
    model = get_peft_model(base_model(), config("linear"))
    with pytest.raises(ValueError, match="needs a mixture 'default' with init_lora_weights='eva'"):
        molora.initialize_eva_weights(model, batches())
    model = get_peft_model(base_model(), config("linear", init_lora_weights="eva", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"no batch has the 16 tokens that count .* the largest has 5"):
        molora.initialize_eva_weights(model, batches(rows=1, length=5))
    model = get_peft_model(base_model(), config("linear", init_lora_weights="eva", r=64, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="reads 32 features, which have no 256 directions"):
        molora.initialize_eva_weights(model, batches())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"init_lora_weights": init}, f"init_lora_weights='{init}' starts from experts whose product is subtracted")
          for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")),
        ({"init_lora_weights": "mica"}, "'mica' trains A alone"),
        ({"init_lora_weights": "gausian"}, "did you mean 'gaussian'"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "r=3 must be even"),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"q_proj": 5}}, "r=5 must be even"),
        ({"init_lora_weights": "orthogonal", "share_A": True}, "share_A gives it the A of others"),
        ({"init_lora_weights": "orthogonal", "num_experts": 1, "router": "rank_wise"}, "gates its ranks one by one"),
    ],
)  # fmt: skip
def test_routines_that_a_mixture_cannot_have_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoloraConfig(**options)


@pytest.mark.parametrize("section", ["mixture", "lora"])
def test_a_recipe_initialises_from_its_own_rows(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from molora.train import prepare

    seen: list[Any] = []
    name = "initialize_eva_weights" if section == "mixture" else "initialize_lora_eva_weights"
    monkeypatch.setattr(prepare, name, lambda model, loader, **options: seen.append(next(iter(loader))))
    recipe = write_recipe(tmp_path, save_tiny(tmp_path / "base"), max_steps=1)
    overrides = ["mixture.init_lora_weights=eva"]
    if section == "lora":
        overrides = ["mixture=null", "lora.r=4", "lora.init_lora_weights=eva"]
    assert command("train", recipe, *overrides) == 0
    assert len(seen) == 1 and seen[0].keys() == {"input_ids", "attention_mask", "labels"}


def test_a_recipe_trains_from_eva(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, save_tiny(tmp_path / "base"), max_steps=2)
    overrides = ["mixture.init_lora_weights=eva", "mixture.num_experts=2", "mixture.r=2", "optimizer.riemannian=true"]
    assert command("train", recipe, *overrides) == 0


def test_rank_stabilised_scaling_is_the_square_root() -> None:
    layers = [
        next(m for m in get_peft_model(base_model(), config(use_rslora=on)).modules() if isinstance(m, MoloraLayer))
        for on in (False, True)
    ]
    assert [layer.molora_specs["default"][""].scaling for layer in layers] == [8 / 4, 8 / 2]
