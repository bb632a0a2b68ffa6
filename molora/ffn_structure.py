"""FFN blocks: recognised by the shapes of their linears, confirmed by a numeric probe."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from molora.kernels.reference import combine
from molora.layers import linear_features
from molora.shared import write_count

KNOWN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}
"""The activations that kernels compute by themselves."""

_BARE_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (functional.silu, functional.gelu, functional.relu)


@dataclass(frozen=True)
class FFNStructure:
    """How to take an FFN module apart; the strings are names of its attributes.

    ``down(act(gate(x)) * up(x))`` (gated), the same with one linear for gate and up (fused), or ``down(act(up(x)))``.

    Attributes:
        parts: the linears, each with the part it plays: "gate", "up", "gate_up" or "down".
        act: attribute name of the activation, or the function itself where the module calls it by name.
        up_first: in a fused gate-up, whether the first half of the output is up.
        dropout: the dropout after the down-projection, if there is one.
        act_name: which of `KNOWN_ACTIVATIONS` the activation is, if it is one.
        is_silu: whether it is torch's silu to the last bit, in 16-bit too.
    """

    parts: tuple[tuple[str, str], ...]
    act: str | Callable[[Tensor], Tensor]
    up_first: bool = False
    dropout: str | None = None
    act_name: str | None = None
    is_silu: bool = False

    @property
    def names(self) -> dict[str, str]:
        return dict(self.parts)

    def activation(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The activation; for a fused gate-up the map of its whole output (..., 2F) to act(gate) * up (..., F), so that
        the halves keep the memory layout they have in the module, and with it the last bit of the activation."""
        act = getattr(module, self.act) if isinstance(self.act, str) else self.act
        if getattr(act, "inplace", False):
            in_place, act = act, lambda x: in_place(x.clone())  # the pre-activations are read again for each expert
        if "gate_up" not in self.names:
            return act

        def fused(gate_up: Tensor) -> Tensor:
            first, second = gate_up.chunk(2, dim=-1)
            return act(second) * first if self.up_first else act(first) * second

        return fused

    def pre_activations(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        """The outputs of the linears before the activation: [gate, up], [gate_up] or [up]."""
        return [getattr(module, name)(x) for part, name in self.parts if part != "down"]

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """The FFN by its parts; equals ``module(x)`` where the structure is right.

        Raises:
            ValueError: the activation works in place, and nothing says so.
        """
        pre = self.pre_activations(module, x)
        versions = [write_count(p) for p in pre]
        hidden = combine(pre, self.activation(module))
        if versions != [write_count(p) for p in pre]:
            raise ValueError("its activation works in place, which would overwrite what the other experts read")
        out: Tensor = getattr(module, self.names["down"])(hidden)
        return getattr(module, self.dropout)(out) if self.dropout else out


def _candidates(module: nn.Module) -> Iterator[FFNStructure]:
    """Every way in which the direct children of `module` could be an FFN, by the shapes of its linears."""
    linears = {n: f for n, m in module.named_children() if (f := linear_features(m)) is not None}
    if len(linears) not in (2, 3) or "Attention" in type(module).__name__:
        return
    others = {n: m for n, m in module.named_children() if n not in linears}
    dropouts = [n for n, m in others.items() if isinstance(m, nn.Dropout)]
    acts: list[str | Callable[[Tensor], Tensor]] = [
        n for n, m in others.items() if n not in dropouts and not any(True for _ in m.parameters())
    ]
    acts += [n for n, v in vars(module).items() if callable(v) and not n.startswith("_") and n != "forward"]
    acts += _BARE_ACTIVATIONS
    # Guesses in the order of forward's own reading: gate before up, dropout last.
    for order in itertools.permutations(linears):
        (d_in, width), (f_in, d_out) = linears[order[0]], linears[order[-1]]
        if d_in != d_out or linears[order[-2]] != (d_in, width):
            continue
        if len(order) == 3 and f_in == width:
            layouts = [(tuple(zip(("gate", "up", "down"), order, strict=True)), False)]
        elif len(order) == 2 and width == 2 * f_in:
            layouts = [((("gate_up", order[0]), ("down", order[1])), up_first) for up_first in (False, True)]
        elif len(order) == 2 and width == f_in:
            layouts = [((("up", order[0]), ("down", order[1])), False)]
        else:
            continue
        for (parts, up_first), act in itertools.product(layouts, acts):
            yield FFNStructure(parts, act, up_first, dropouts[-1] if dropouts else None)


def looks_like_ffn(module: nn.Module) -> bool:
    """Whether the linears among the direct children have the shapes of an FFN."""
    return not isinstance(module, BaseTunerLayer) and next(_candidates(module), None) is not None


@torch.no_grad()
def probe_ffn(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> FFNStructure:
    """Finds the structure whose decomposition equals the module's own output on random inputs.

    The inputs span magnitudes, so that a clamp shows; dropout is on with the same random numbers on both sides, so that
    its place is checked too. A module without data (meta device) is probed as a copy with random weights.

    Args:
        module: it is run, and left as it was.
        dtype: of the hidden states, where the module has no floating weights to tell (a quantised base).

    Raises:
        ValueError: it has the linears of an FFN but computes something else; says what was tried.
    """
    with _gathered(module):
        return _probe(_with_data(module), dtype)


def _probe(module: nn.Module, dtype: torch.dtype) -> FFNStructure:
    candidates = list(_candidates(module))
    x = _probe_input(module, candidates[0].parts[0][1], dtype)
    training = module.training
    adapters = [m for m in module.modules() if isinstance(m, BaseTunerLayer) and not m._disable_adapters]
    try:
        module.train()
        for layer in adapters:  # another adapter's experts are no part of the FFN, and must not see these inputs
            layer._disable_adapters = True
        try:
            want = _seeded(module, x)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(f"its forward does not work on one hidden state alone ({error})") from None
        if isinstance(want, Tensor):
            for structure in candidates:
                try:
                    got = _seeded(partial(structure.run, module), x)
                except (TypeError, RuntimeError, AttributeError):
                    continue  # what this guess takes for the activation is something else
                if got.shape == want.shape and _equal(got, want, 32 * torch.finfo(want.dtype).eps):
                    name, is_silu = _known_activation(structure, module)
                    return replace(structure, act_name=name, is_silu=is_silu)
    finally:
        module.train(training)
        for layer in adapters:
            layer._disable_adapters = False
    raise ValueError("its output is not down(act(gate(x)) * up(x)) nor down(act(up(x))) of its own parts")


def _known_activation(structure: FFNStructure, module: nn.Module) -> tuple[str | None, bool]:
    """(the known activation that agrees with this one to fp32's rounding, whether it is silu to the last bit)."""
    act = getattr(module, structure.act) if isinstance(structure.act, str) else structure.act
    x = torch.linspace(-12, 12, 4001, device=next(module.parameters()).device)
    try:
        found, half = act(x.clone()), act(x.bfloat16())
    except (TypeError, RuntimeError):  # it takes no tensor of this dtype or shape
        return None, False
    name = next((n for n, f in KNOWN_ACTIVATIONS.items() if torch.allclose(found, f(x), rtol=1e-5, atol=1e-6)), None)
    return name, name == "silu" and torch.equal(half, functional.silu(x.bfloat16()))


def _probe_input(module: nn.Module, first_linear: str, dtype: torch.dtype) -> Tensor:
    """(1, 6, D) on the device and in the dtype of the module, or `dtype`; two rows of each magnitude."""
    features = linear_features(getattr(module, first_linear))
    assert features is not None
    weights = list(module.parameters())
    dtype = next((p.dtype for p in weights if p.is_floating_point()), dtype)
    scales = torch.tensor([1.0, 16.0, 256.0] if dtype == torch.float16 else [1.0, 100.0, 1e4]).repeat(2)
    # On the CPU whatever the default device is, so that a seed gives the same numbers everywhere.
    x = torch.randn(1, 6, features[0], generator=torch.Generator().manual_seed(0), device="cpu")
    x *= scales.cpu()[None, :, None]
    device = weights[0].device if not weights[0].is_meta else "cpu"
    return x.to(device, dtype)


def _equal(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Row by row, since the rows differ in magnitude by orders: within rounding of the row's largest entry.

    A row of large inputs may overflow in half precision and says nothing then; the first row, of scale one, may not.
    """
    got, want = got.double().flatten(0, -2), want.double().flatten(0, -2)
    finite = want.isfinite().all(-1)
    error = (got - want).abs().amax(-1)[finite]
    return bool(finite[0]) and bool((error <= tolerance * want.abs().amax(-1)[finite]).all())


def _seeded(run: Callable[[Tensor], Any], x: Tensor) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return run(x)


def _gathered(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """The module's whole weights, where DeepSpeed ZeRO-3 has partitioned them over the ranks."""
    weights = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not weights:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(weights)


def _with_data(module: nn.Module) -> nn.Module:
    weights = list(module.parameters())
    if not any(p.is_meta for p in weights) or any(hasattr(m, "_hf_hook") for m in module.modules()):
        return module
    module = copy.deepcopy(module).to_empty(device="cpu")
    for p in module.parameters():
        nn.init.normal_(p, std=0.02)
    return module
