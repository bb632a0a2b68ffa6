"""Blocks that gather for all inside them under ZeRO-3: what is registered, and whose hooks run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny_models import base_model, batch, config
from torch import Tensor, nn

from molora.layers import MoloraLayer
from molora.linear import MixedLinear
from molora.partitioned import gather_by_block, is_hooked


def engines_hook(module: nn.Module, *args: Any) -> None:
    raise AssertionError(f"a hook of the engine ran for {type(module).__name__}")


def blocks_hook(module: nn.Module, *args: Any) -> None:
    pass


engines_hook.__module__ = blocks_hook.__module__ = "deepspeed.runtime.zero.parameter_offload"


@pytest.fixture
def gathered() -> dict[nn.Module, list[nn.Parameter]]:
    return {}


@pytest.fixture
def zero(gathered: dict[nn.Module, list[nn.Parameter]], monkeypatch: pytest.MonkeyPatch) -> Any:
    """DeepSpeed, told of parameters that a module uses beside its own."""
    zero = pytest.importorskip("deepspeed").zero
    monkeypatch.setattr(zero, "register_external_parameter", lambda m, p: gathered.setdefault(m, []).append(p))
    return zero


@pytest.fixture
def model(zero: Any) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(base_model("llama"), config("block", init_lora_weights=False)).train()


def hold(model: nn.Module) -> None:
    for number, module in enumerate(model.modules()):
        module.ds_id = number  # type: ignore[assignment]
        module.register_forward_pre_hook(engines_hook if inside_a_block(model, module) else blocks_hook)


def inside_a_block(model: nn.Module, module: nn.Module) -> bool:
    return any(module is part for block in blocks(model) for part in block.modules() if part is not block)


def blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.get_base_model().model.layers)  # type: ignore[operator]


def test_blocks_gather_for_all_inside_them(model: nn.Module, gathered: dict[nn.Module, list[nn.Parameter]]) -> None:
    want = model(**batch()).logits
    assert not gathered
    hold(model)
    assert torch.equal(model(**batch()).logits, want)
    assert set(gathered) == set(blocks(model))
    for block, own in gathered.items():
        assert set(map(id, own)) == set(map(id, block.parameters()))
    counts = {block: len(own) for block, own in gathered.items()}
    model(**batch())
    assert counts == {block: len(own) for block, own in gathered.items()}, "registered once"
    assert all(m.base_is_plain for m in model.modules() if isinstance(m, MixedLinear))


def test_hooks_that_are_put_back_go_again(model: nn.Module) -> None:
    hold(model)
    model(**batch())
    for module in model.modules():
        if inside_a_block(model, module):
            module.register_forward_pre_hook(engines_hook)
    model(**batch())


def test_each_backward_waits_for_the_inputs_of_its_own_forward(model: nn.Module) -> None:
    hold(model)
    block = blocks(model)[1]
    counted: list[int] = []
    # As DeepSpeed does: counted anew before each forward, read behind each backward.
    block.register_forward_pre_hook(lambda module, args: setattr(module, "ds_grads_remaining", len(counted) + 1))
    block.register_full_backward_hook(lambda module, *grads: counted.append(module.ds_grads_remaining))
    early = model(**batch()).loss
    counted.append(0)
    with torch.no_grad():
        model(**batch())
    assert block.ds_grads_remaining == 2
    early.backward()
    assert counted == [0, 1]
    model(**batch())
    assert sum("_keep_count" in str(hook) for hook in block._forward_hooks.values()) == 1


def test_hooks_of_others_stay(model: nn.Module) -> None:
    seen: list[nn.Module] = []

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        seen.append(module)

    layer = next(m for m in model.modules() if isinstance(m, MixedLinear) and m.molora_router)
    parts = [layer.base_layer, layer.molora_router["default"], layer.molora_A["default"]]
    for part in parts:
        part.register_forward_hook(look)
    hold(model)
    model(**batch())
    assert set(seen) == set(parts)
    assert is_hooked(layer.base_layer) and not layer.base_is_plain


def test_hooks_that_reduce_gradients_of_leaf_modules_stay(model: nn.Module) -> None:
    """And a hook that is a method of C, which is of no module."""

    def reduces(module: nn.Module, *args: Any) -> None:
        pass

    reduces.__module__ = "deepspeed.runtime.zero.stage3"
    mlp = blocks(model)[0].mlp
    mlp.register_full_backward_hook(reduces)
    mlp.register_forward_pre_hook({}.setdefault)
    hold(model)
    model(**batch())
    assert reduces in mlp._backward_hooks.values() and len(mlp._forward_pre_hooks) == 1


def test_layers_outside_every_block_gather_for_themselves(model: nn.Module, gathered: dict[nn.Module, Any]) -> None:
    attention = blocks(model)[0].self_attn
    for number, module in enumerate(attention.modules()):
        module.ds_id = number  # type: ignore[assignment]
    layers = [m for m in attention.modules() if isinstance(m, MixedLinear)]
    for part in (part for layer in layers for part in layer.modules() if part is not layer):
        part.register_forward_pre_hook(engines_hook)
    assert gather_by_block(attention, MoloraLayer)
    assert set(gathered) == set(layers)
    for layer, own in gathered.items():
        shared = layer.molora_shared.get("default")
        routers = [] if shared is None or shared.owner is None else list(shared.owner.molora_router.parameters())
        assert {*map(id, layer.parameters()), *map(id, routers)} == set(map(id, own))
        assert layer.molora_reads["default"].apart
    model(**batch())


def test_models_without_an_engine_are_left_alone(model: nn.Module, gathered: dict[nn.Module, Any]) -> None:
    assert not gather_by_block(model, MoloraLayer)
    assert not gathered
