"""Mixture layers that gather for their parts under ZeRO-3: what is registered, and whose hooks run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny_models import base_model, batch, config
from torch import Tensor, nn

from molora.layers import MoloraLayer
from molora.linear import MixedLinear
from molora.partitioned import gather_with_layers, is_hooked


def engines_hook(module: nn.Module, *args: Any) -> None:
    raise AssertionError(f"a hook of the engine ran for {type(module).__name__}")


engines_hook.__module__ = "deepspeed.runtime"


@pytest.fixture
def gathered() -> dict[nn.Module, list[nn.Parameter]]:
    return {}


@pytest.fixture
def model(gathered: dict[nn.Module, list[nn.Parameter]], monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A mixture as an engine leaves it: numbers and hooks on modules."""
    zero = pytest.importorskip("deepspeed").zero
    monkeypatch.setattr(zero, "register_external_parameter", lambda m, p: gathered.setdefault(m, []).append(p))
    torch.manual_seed(0)
    return get_peft_model(base_model("llama"), config("block", init_lora_weights=False)).train()


def as_held(model: nn.Module) -> None:
    for number, module in enumerate(model.modules()):
        module.ds_id = number  # type: ignore[assignment]
    for layer in model.modules():
        if isinstance(layer, MixedLinear):
            for part in layer.modules():
                if part is not layer:
                    part.register_forward_pre_hook(engines_hook)


def test_layers_gather_for_their_parts(model: nn.Module, gathered: dict[nn.Module, list[nn.Parameter]]) -> None:
    want = model(**batch()).logits
    assert not gathered and not any(m.molora_gathers for m in model.modules() if isinstance(m, MoloraLayer))
    as_held(model)
    assert torch.equal(model(**batch()).logits, want)
    layers = [m for m in model.modules() if isinstance(m, MixedLinear)]
    assert set(gathered) == set(layers)
    for layer in layers:
        shared = layer.molora_shared.get("default")
        routers = [] if shared is None or shared.owner is None else list(shared.owner.molora_router.parameters())
        assert {*map(id, layer.parameters()), *map(id, routers)} == set(map(id, gathered[layer]))
    counts = {layer: len(own) for layer, own in gathered.items()}
    model(**batch())
    assert counts == {layer: len(own) for layer, own in gathered.items()}, "registered once"


def test_hooks_of_others_run(model: nn.Module) -> None:
    as_held(model)
    layer = next(m for m in model.modules() if isinstance(m, MixedLinear) and m.molora_router)
    seen: list[type[nn.Module]] = []

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        seen.append(type(module))

    for part in (layer.base_layer, layer.molora_router["default"], layer.molora_A["default"]):
        part._forward_pre_hooks.clear()  # the engine's, which would run with them
        part.register_forward_hook(look)
    model(**batch())
    assert len(seen) == 3
    assert is_hooked(layer.base_layer, True) and not layer.base_is_plain


def test_models_without_an_engine_are_left_alone(model: nn.Module, gathered: dict[nn.Module, Any]) -> None:
    assert not gather_with_layers(model, MoloraLayer)
    assert not gathered
