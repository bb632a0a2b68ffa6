"""A frozen FFN with one router: a mixture of whole FFN experts, or of the LoRAs on each projection by itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from molora.context import Runtime
from molora.ffn_structure import FFNStructure
from molora.kernels import selection
from molora.kernels.dense_masked import expand
from molora.kernels.fused_ffn import Plan, fused_ffn
from molora.kernels.reference import Projection, combine
from molora.kernels.shrink import Input, shrink
from molora.layers import MixtureSpec, MoloraLayer, RouterPlace, is_fresh, is_plain_linear, linear_features
from molora.preconditioning import Mix, gate_rescaled
from molora.routers import Routing
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
        if self._fuses(adapter, x):
            return self._finished(x, *self._fused(adapter, x))
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
        return self._finished(x, routing, hidden, ranks, experts["down"])

    def _fuses(self, adapter: str, x: Tensor) -> bool:
        """Whether what lies between the frozen linears runs as one kernel."""
        spec = next(iter(self.molora_specs[adapter].values()))
        assert spec.router is not None
        if self.by_projection[adapter] or self.structure.act_name is None or (spec.share_A and spec.num_experts > 1):
            return False
        steering = self.molora_runtime.current_inputs().steering  # may give a token any expert
        top_k = spec.num_experts if steering else spec.router.num_chosen(spec.num_experts, spec.r) or spec.num_experts
        return selection.fuses_ffn(self.molora_runtime.kernel, x, spec.num_experts, top_k, spec.r) and all(
            self.reads_experts(adapter, part) for part in self.molora_specs[adapter]
        )

    def _fused(self, adapter: str, x: Tensor) -> tuple[Routing, Tensor, Tensor | None, Projection | None]:
        """Routing, hidden states, ranks and experts of the down-projection; x is read once for router and experts."""
        structure, base = self.structure, self.base_layer
        experts = {part: self.experts(adapter, f"_{part}") for part in structure.names}
        ups = [part for part in structure.names if part != "down"]
        adapted = [e for part in ups if (e := experts[part]) is not None]
        dropped = self._dropped(adapter, x)
        router = None if dropped is not x else self.router_beside(adapter)
        entered = Input(x, all(is_plain_linear(getattr(base, structure.names[part])) for part in ups))
        # Before all else: a device busy with these does not wait for the many small launches that follow.
        pre = unsplit = [p.flatten(0, -2) for p in structure.pre_activations(base, entered.x)]
        logits: Tensor | None = None
        ranks: Iterator[Tensor] = iter(())
        if adapted or router is not None:
            read = shrink(
                entered if dropped is x else dropped,
                [e.A for e in adapted],
                [] if router is None else [router.product_weight],
            )
            logits = read.logits[0] if router is not None else None
            ranks = iter(r if r.dim() == 2 else r.sum(0) for r in read.ranks)
        routing = self.routing(adapter, entered.x, logits)
        shrunk = [None if experts[part] is None else next(ranks) for part in ups]
        B = [None if (e := experts[part]) is None else e.B for part in ups]
        scales = [0.0 if (e := experts[part]) is None else e.scaling for part in ups]
        if "gate_up" in structure.names:  # halves of one linear
            pre = list(pre[0].chunk(2, 1))
            B = [None, None] if B[0] is None else list(B[0].chunk(2, 2))
            shrunk, scales = shrunk * 2, scales * 2
            if structure.up_first:
                pre, B = pre[::-1], B[::-1]
        down = experts["down"]
        assert structure.act_name is not None
        plan = Plan(
            structure.act_name,
            routing.sums_to_one,
            (scales[0], scales[-1] if len(pre) == 2 else 0.0, 0.0 if down is None else down.scaling),
        )
        down_A, frozen = None if down is None else down.A, None
        if plan.residual and not structure.is_silu:
            with torch.no_grad():
                frozen = combine(unsplit, structure.activation(base))
        hidden, down_ranks = fused_ffn(pre, shrunk, B, down_A, routing.gates, routing.topk_ids, plan, frozen)
        return routing, hidden, down_ranks, down

    def _finished(
        self, x: Tensor, routing: Routing, hidden: Tensor, ranks: Tensor | None, experts: Projection | None
    ) -> Tensor:
        """The output of the FFN: the frozen down-projection, its experts, and what is left of the frozen FFN."""
        structure, base = self.structure, self.base_layer
        down = getattr(base, structure.names["down"])
        hidden = hidden.view(*x.shape[:-1], hidden.shape[-1])
        out: Tensor = down(hidden)
        excess = not routing.sums_to_one and getattr(down, "bias", None) is not None
        if excess:
            # The frozen FFN is scaled by the sum of the gates, and its bias with it.
            scale = (routing.gates.sum(1) - 1).view(*x.shape[:-1], 1)
            out = out + (scale * down.bias).to(out.dtype)
        if experts is not None and ranks is not None:
            inplace = not excess and is_plain_linear(down) and is_fresh(out, hidden)
            out = expand(ranks.to(out.dtype), None, experts.B, 1.0, out, inplace)
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
            add: Mix = partial(selection.mixture_linear, self.molora_runtime.kernel, **dropout)
            if self.rescales_gates(adapter, f"_{part}"):
                return gate_rescaled(add, inputs, gates, experts, out)
            return add(inputs, gates, experts, out)

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
