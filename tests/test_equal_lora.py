"""The one LoRA that a mixture is compared with: as many parameters, on the same linears."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tiny_models import CELLS, base_model, batch, config, preset_config
from torch import nn
from transformers.pytorch_utils import Conv1D

from molora import MoloraConfig, equal_lora
from molora.eval.results import parameters
from molora.presets import PRESETS
from molora.routers import Centroid, RankWise, Threshold, TopK


def check(family: str, cfg: MoloraConfig) -> None:
    base = base_model(family)
    flags = [p.requires_grad for p in base.parameters()]
    logits = base(**batch()).logits
    lora = equal_lora(base, cfg)
    assert flags == [p.requires_grad for p in base.parameters()] and torch.equal(base(**batch()).logits, logits)
    one = parameters(get_peft_model(base, lora))["trainable"]
    mixture = get_peft_model(base_model(family), cfg)
    counts = parameters(mixture)
    wanted = counts["total"] - counts["base"]  # frozen experts count too
    assert wanted <= one < wanted + one / lora.r
    linears = {n for n, m in base_model(family).named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    assert set(lora.target_modules) <= linears


@pytest.mark.parametrize(("family", "placement"), CELLS)
def test_every_family_and_placement(family: str, placement: str) -> None:
    check(family, config(placement))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(name: str) -> None:
    check("llama", preset_config(name, **({"num_experts": [2, 3]} if name == "mola" else {})))


@pytest.mark.parametrize(
    "options",
    [
        {"share_A": True},
        {"num_experts": [2, 3], "router": {"top_k": 1, "balance_pool": "layer"}},
        {"placement": "ffn", "exclude_modules": ["gate_proj"], "plain_lora": {"target_modules": "all-linear", "r": 3}},
        {"placement": "ffn", "exclude_modules": ["gate_proj", "up_proj"]},
        {"rank_pattern": {"q_proj": 7}},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
    ],
    ids=["shared A", "by layer", "beside plain LoRA", "down only", "rank pattern", "saved module", "tokens"],
)
def test_parameters_are_counted_to_the_last(options: dict[str, object]) -> None:
    check("llama", config(**options))


def test_active_parameters() -> None:
    base = base_model()
    sides = {n: m.in_features + m.out_features for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    sides.pop("lm_head")
    inputs = sum(m.in_features for n, m in base.named_modules() if n in sides)

    def rank(cfg: MoloraConfig) -> int:
        return equal_lora(base, cfg, "active").r

    def wanted(gates: int, active_ranks: int) -> int:
        return -(-(gates * inputs + active_ranks * sum(sides.values())) // sum(sides.values()))

    assert rank(config(num_experts=4, r=8, router=TopK(top_k=2))) == wanted(4, 16)
    assert rank(config(num_experts=1, r=16, router=RankWise(active_ranks=4, rank_partition=2))) == wanted(8, 4)
    assert rank(config(num_experts=4, r=8, router=Centroid(top_k=1))) == wanted(0, 8)
    # 25 * 4 * 7/25 ranks: in floating point a little more than 28.
    exact = config(num_experts=25, r=4, router=Centroid(top_k=7), target_modules=["q_proj", "v_proj"])
    assert rank(exact) == 28
    with pytest.raises(ValueError, match="'threshold' chooses varies from token to token"):
        rank(config(num_experts=4, router=Threshold()))
    with pytest.raises(ValueError, match="count"):
        equal_lora(base, config(), "all")


def test_options_go_to_the_lora() -> None:
    lora = equal_lora(base_model(), config(lora_dropout=0.1), use_rslora=True, lora_alpha=5)
    for options, said in (
        ({"r": 5}, "r follows from the mixture"),
        ({"target_modules": ["q_proj"]}, "target_modules follows from the mixture"),
        ({"lora_alfa": 5}, "did you mean 'lora_alpha'"),
    ):
        with pytest.raises(ValueError, match=said):
            equal_lora(base_model(), config(), **options)
    with pytest.raises(ValueError, match="must be the MoloraConfig of a mixture, got 'mixlora'"):
        equal_lora(base_model(), "mixlora")
    assert (lora.use_rslora, lora.lora_alpha, lora.lora_dropout, lora.task_type) == (True, 5, 0.1, "CAUSAL_LM")
