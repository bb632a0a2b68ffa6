"""FFN blocks: recognised by structure, confirmed by numbers, and mixed as whole experts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from tiny_models import FAMILIES, base_model, config, trained
from torch import Tensor, nn
from torch.nn import functional

from molora.ffn import MixedFFN
from molora.ffn_structure import probe_ffn

D, F = 12, 20


class Renamed(nn.Module):
    """A gated FFN under names nobody has seen, the activation a bare function."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.b, self.a = nn.Linear(F, D), nn.Linear(D, F), nn.Linear(D, F, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.out(self.b(states) * functional.silu(self.a(states)))


class UpFirst(nn.Module):
    """A fused gate-up whose first half is up."""

    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo, self.nonlinearity = nn.Linear(D, 2 * F), nn.Linear(F, D), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.wi(x).chunk(2, -1)
        return self.wo(up * self.nonlinearity(gate))


class TwoLayer(nn.Module):
    def __init__(self, act: nn.Module | None = None, p: float = 0.1) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act, self.drop = nn.Linear(D, F), nn.Linear(F, D), act or nn.Tanh(), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.act(self.fc1(x))))


class DropoutInside(TwoLayer):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act(self.fc1(x))))


class ExtraNorm(Renamed):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(F)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.b(x) * functional.silu(self.a(x))))


class Clamped(Renamed):
    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.b(x) * functional.silu(self.a(x))).clamp(-50, 50))


class Scaled(Renamed):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(x) * functional.silu(self.a(x))) * 1.001


class TakesResidual(TwoLayer):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return residual + super().forward(x)


class Host(nn.Module):
    """Two layers of a custom FFN: not a transformers model at all."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("block", [Renamed, UpFirst, TwoLayer, lambda: TwoLayer(nn.ReLU(inplace=True), 0.0)])
def test_a_renamed_custom_module_converts(block: Callable[[], nn.Module]):
    torch.manual_seed(0)
    model = Host(block).eval()
    x = torch.randn(2, 3, D)
    want = model(x)
    mixed = get_peft_model(model, config("ffn", plain_lora=None, task_type=None))
    assert sum(isinstance(m, MixedFFN) for m in mixed.modules()) == 2
    assert torch.equal(mixed(x), want)
    for name, parameter in mixed.named_parameters():
        if "molora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    assert not torch.allclose(mixed(x), want)
    # An expert by hand, from the module's own forward with its weights changed.
    layer = next(m for m in mixed.modules() if isinstance(m, MixedFFN))
    torch.testing.assert_close(layer(x), _by_experts(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [DropoutInside, ExtraNorm, Clamped, Scaled])
def test_a_look_alike_is_refused_by_name(block: Callable[[], nn.Module]):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=rf"cannot convert blocks.0 \({block.__name__}\): its output is not down"):
        get_peft_model(Host(block), config("ffn", plain_lora=None, task_type=None))


def test_a_module_that_takes_more_than_a_hidden_state_is_refused():
    with pytest.raises(ValueError, match=r"blocks.0 \(TakesResidual\): its forward does not work on one hidden state"):
        get_peft_model(Host(TakesResidual), config("ffn", plain_lora=None, task_type=None))


def test_a_module_without_data_is_probed_by_its_code():
    with torch.device("meta"):
        renamed, clamped = Renamed(), Clamped()
    assert probe_ffn(renamed).names == {"gate": "a", "up": "b", "down": "out"}
    with pytest.raises(ValueError, match="its output is not"):
        probe_ffn(clamped)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ffns_of_every_family_are_found(family: str):
    model = get_peft_model(base_model(family), config("ffn"))
    layers = [m for m in model.modules() if isinstance(m, MixedFFN)]
    parts = {"phi3": {"gate_up", "down"}, "gpt2": {"up", "down"}, "gpt_neox": {"up", "down"}}
    assert len(layers) == 2
    assert set(layers[0].structure.names) == parts.get(family, {"gate", "up", "down"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_wide_half_precision_ffn_is_recognised_and_a_clamped_one_refused(dtype: torch.dtype):
    class Wide(Renamed):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.out, self.b, self.a = nn.Linear(96, 512), nn.Linear(512, 96), nn.Linear(512, 96)
            for linear in (self.out, self.b, self.a):
                nn.init.normal_(linear.weight, std=0.5)

    class WideClamped(Wide):
        def forward(self, x: Tensor) -> Tensor:
            return self.out((self.b(x) * functional.silu(self.a(x))).clamp(-50, 50))

    assert probe_ffn(Wide().to(dtype)).names == {"gate": "a", "up": "b", "down": "out"}
    with pytest.raises(ValueError, match="its output is not"):
        probe_ffn(WideClamped().to(dtype))


@torch.no_grad()
def _by_experts(layer: MixedFFN, x: Tensor) -> Tensor:
    """The published form: the module itself with each expert's weights merged in, mixed by the gates. Eval mode."""
    routing = layer.molora_router.default(x.flatten(0, -2))
    base, total = layer.get_base_layer(), 0
    for e in range(routing.gates.shape[1]):
        before = {}
        for part, child in layer.structure.parts:
            experts = layer.experts("default", f"_{part}")
            if experts is None:
                continue
            weight = getattr(base, child).weight
            before[child] = weight.detach().clone()
            delta = experts.scaling * experts.B[e].T @ experts.A[e]
            weight += delta if delta.shape == weight.shape and not hasattr(getattr(base, child), "nx") else delta.T
        gate = routing.gates[:, e].view(*x.shape[:-1], 1)
        total = total + gate * base(x)
        for child, weight in before.items():
            getattr(base, child).weight.copy_(weight)
    return total


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_equals_its_experts_run_whole(family: str, norm: bool):
    model = trained(family, "ffn", router={"top_k": 2, "norm_topk_prob": norm, "init_std": 0.5}, plain_lora=None)
    x = torch.randn(2, 5, 32)
    for layer in (m for m in model.modules() if isinstance(m, MixedFFN)):
        torch.testing.assert_close(layer(x), _by_experts(layer, x), rtol=1e-4, atol=1e-5)


def test_single_projections_can_be_left_out():
    model = trained("llama", "ffn", exclude_modules=["gate_proj", "up_proj"], plain_lora=None)
    layer = next(m for m in model.modules() if isinstance(m, MixedFFN))
    assert not layer.molora_A_gate and not layer.molora_A_up and len(layer.molora_A_down) == 1
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(layer(x), _by_experts(layer, x), rtol=1e-4, atol=1e-5)


def test_dropout_drops_in_training_only():
    model = trained("llama", "ffn", lora_dropout=0.5, plain_lora=None)
    layer = next(m for m in model.modules() if isinstance(m, MixedFFN))
    x = torch.randn(2, 5, 32)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_two_active_ffn_mixtures_are_refused():
    model = trained("llama", "ffn", plain_lora=None)
    model.add_adapter("second", config("ffn", plain_lora=None))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"an FFN mixture takes one active adapter, got \['default', 'second'\]"):
        model(torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize("shape", [(2, 0, 32), (0, 32), (0, 4, 32)])
@pytest.mark.parametrize("kernel", ["reference", None])
def test_no_tokens(shape: tuple[int, ...], kernel: str | None) -> None:
    model = trained("llama", "ffn")
    model.set_kernel(kernel)
    assert model.get_base_model().model.layers[0].mlp(torch.zeros(shape)).shape == shape
