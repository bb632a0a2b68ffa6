"""A frozen FFN with one router: a mixture of whole FFN experts, or of the LoRAs on each projection by itself."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from molora.context import Runtime
from molora.ffn_structure import FFNStructure
from molora.kernels import selection
from molora.kernels.reference import combine
from molora.layers import MixtureSpec, MoloraLayer, RouterPlace, linear_features
from molora.shared import SharedRouting


class MixedFFN(MoloraLayer):
    """A frozen FFN with a mixture of FFN experts, each a LoRA on every adapted projection.

    Placement "ffn": the hidden states of whole FFN experts are mixed, with one down-projection (MixLoRA, arXiv
    2404.15159, section 3.2). Placement "ffn_linear": each projection adds its own mixture of LoRAs, by the same gates
    (LLaVA-MoLE, arXiv 2401.16160).

    Args:
        base_layer: the FFN module; it stays whole and runs as it is while adapters are disabled.
        structure: how to take it apart, from `probe_ffn`.
    """

    def __init__(self, base_layer: nn.Module, structure: FFNStructure, runtime: Runtime) -> None:
        super().__init__(base_layer, runtime, tuple(f"_{part}" for part, _ in structure.parts))
        self.structure = structure
        self.by_projection: dict[str, bool] = {}

    def update_layer(
        self,
        adapter: str,
        specs: dict[str, MixtureSpec],
        place: RouterPlace,
        shared: SharedRouting | None,
        by_projection: bool,
        inference_mode: bool,
    ) -> None:
        """Adds an adapter; `specs` holds the projections it takes, by the name of their module."""
        self.by_projection[adapter] = by_projection
        for part, child in self.structure.parts:
            features = linear_features(getattr(self.get_base_layer(), child))
            assert features is not None
            if part != "down":
                hidden_size = features[0]
            if child in specs:
                self.add_part(adapter, f"_{part}", features, specs[child])
        self.add_router(adapter, hidden_size, next(iter(specs.values())), place, shared)
        self.finish(adapter, inference_mode)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        return super()._get_base_layer_device_and_dtype(_innermost(getattr(base_layer, self.structure.parts[0][1])))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [a for a in self.active_adapters if a in self.molora_specs]
        if self._disable_adapters or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) > 1:
            raise ValueError(f"an FFN mixture takes one active adapter, got {active}; activate one with set_adapter()")
        adapter = active[0]
        structure, base = self.structure, self.base_layer
        routing = self.routing(adapter, x)
        if self.by_projection[adapter]:
            return self._mixed_by_projection(adapter, x, routing.gates)
        pre = [p.flatten(0, -2) for p in structure.pre_activations(base, x)]
        experts = {part: self.experts(adapter, f"_{part}") for part in structure.names}
        ups = [experts[part] for part in structure.names if part != "down"]
        hidden, ranks = selection.mixture_ffn(
            self.molora_runtime.kernel,
            self._dropped(adapter, x.flatten(0, -2)),
            pre,
            routing.gates,
            routing.topk_ids,
            ups,
            experts["down"],
            structure.activation(base),
            residual=routing.sums_to_one,
        )
        down = getattr(base, structure.names["down"])
        hidden = hidden.view(*x.shape[:-1], -1)
        out: Tensor = down(hidden)
        if not routing.sums_to_one and getattr(down, "bias", None) is not None:
            # The frozen FFN is scaled by the sum of the gates, and its bias with it.
            excess = (routing.gates.sum(1) - 1).view(*x.shape[:-1], 1)
            out = out + (excess * down.bias).to(out.dtype)
        if (p := experts["down"]) is not None and ranks is not None:
            out = torch.addmm(out.flatten(0, -2), ranks.to(out.dtype), p.cat(out.dtype)[1]).view_as(out)
        if routing.input_weight is not None:
            out = out + (routing.input_weight.view(*x.shape[:-1], 1) * x).to(out.dtype)
        return getattr(base, structure.dropout)(out) if structure.dropout else out

    def _mixed_by_projection(self, adapter: str, x: Tensor, gates: Tensor) -> Tensor:
        structure, base = self.structure, self.base_layer

        def mixed(part: str, inputs: Tensor, out: Tensor) -> Tensor:
            experts = self.experts(adapter, f"_{part}")
            if experts is None:
                return out
            inputs, dropout = self.drop(adapter, f"_{part}", inputs)
            return selection.mixture_linear(self.molora_runtime.kernel, inputs, gates, experts, out, **dropout)

        ups = [part for part in structure.names if part != "down"]
        pre = [mixed(part, x, p) for part, p in zip(ups, structure.pre_activations(base, x), strict=True)]
        hidden = combine(pre, structure.activation(base))
        out = mixed("down", hidden, getattr(base, structure.names["down"])(hidden))
        return getattr(base, structure.dropout)(out) if structure.dropout else out

    def _dropped(self, adapter: str, tokens: Tensor) -> Tensor:
        p = max(spec.lora_dropout for spec in self.molora_specs[adapter].values())
        return functional.dropout(tokens, p, self.training) if p else tokens


def _innermost(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
