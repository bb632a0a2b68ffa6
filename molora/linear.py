"""A frozen linear with a mixture of LoRA experts (or one ungated LoRA) added to its output."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from molora.context import Runtime
from molora.kernels import decode, selection
from molora.kernels.dense_masked import expand
from molora.kernels.reference import Projection
from molora.kernels.shrink import shrink
from molora.layers import MixtureSpec, MoloraLayer, RouterPlace, is_fresh, is_plain_linear, linear_features
from molora.preconditioning import gate_rescaled
from molora.routers import Routing
from molora.shared import NOTHING_READ, SharedRead, SharedRouting


class _Decided(NamedTuple):
    """What one pass adds to the frozen linear's output.

    Attributes:
        experts: those of the adapter.
        ranks: of the input, where it was read for them; of a few tokens the parts of a sum.
        routing: None for an ungated LoRA.
        gated: `ranks` times their gates, where `decode.gated_few` has run.
    """

    experts: Projection
    ranks: Tensor | None
    routing: Routing | None
    gated: Tensor | None


class MixedLinear(MoloraLayer):
    """``y = W x + scaling * (G(x) . (x Acat^T)) Bcat`` for each active adapter (design section 1).

    Args:
        base_layer: nn.Linear, transformers' Conv1D, or a quantised subclass of nn.Linear.
    """

    def __init__(self, base_layer: nn.Module, runtime: Runtime) -> None:
        super().__init__(base_layer, runtime, ("",))
        self.molora_reads: dict[str, SharedRead] = {}

    @property
    def in_features(self) -> int:
        return linear_features(self.base_layer)[0]  # type: ignore[index]

    @property
    def out_features(self) -> int:
        return linear_features(self.base_layer)[1]  # type: ignore[index]

    def update_layer(
        self,
        adapter: str,
        spec: MixtureSpec,
        place: RouterPlace,
        shared: SharedRouting | None,
        read: SharedRead,
        inference_mode: bool,
    ) -> None:
        """Adds an adapter; `shared` where the linear uses a router together with others, `read` with those that read
        the same input."""
        features = linear_features(self.base_layer)
        assert features is not None
        self.add_part(adapter, "", features, spec)
        if spec.router is not None:
            self.add_router(adapter, features[0], spec, place, shared)
        self.molora_reads[adapter] = read
        read.members.append(self)
        self.finish(adapter, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if (read := self.molora_reads.pop(adapter_name, None)) is not None:
            read.members.remove(self)

    @property
    def base_is_plain(self) -> bool:
        """See `is_plain_linear`."""
        return is_plain_linear(self.base_layer)

    def takes_part(self, adapter: str) -> bool:
        """Whether this layer's experts run now, so that another may read the input for them."""
        return not self._disable_adapters and adapter in self.active_adapters

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [] if self._disable_adapters else [a for a in self.active_adapters if a in self.molora_specs]
        first = [a for a in active if self._reads_first(a, x)]
        for adapter in first:
            x = self.molora_reads[adapter].enter(self, adapter, x)
        decided: dict[str, _Decided] = {}
        if aside := decode.captures(x):
            with decode.beside(x):
                decided = {a: self._decide(a, x, a in first, True) for a in active}
        plain = self.base_is_plain
        out: Tensor = (self.base_layer.forward if plain else self.base_layer)(x, *args, **kwargs)
        if aside:
            decode.join(x)
        for adapter in active:
            what = decided.get(adapter) or self._decide(adapter, x, adapter in first)
            if adapter not in self.molora_U:
                out = self._add(adapter, x, what, out, plain and is_fresh(out, x))
                continue
            onto = out.new_zeros(*out.shape[:-1], what.experts.B.shape[2])
            mixed = self._add(adapter, x, what, onto, True)
            basis: Tensor = self.molora_U[adapter]()
            out = out + mixed @ basis[0].to(out.dtype)
        return out

    def _add(self, adapter: str, x: Tensor, decided: _Decided, out: Tensor, inplace: bool) -> Tensor:
        """`out` with an adapter's mixture added to it."""
        experts, ranks, routing, gated = decided
        gates, topk_ids = (None, None) if routing is None else (routing.gates, routing.topk_ids)
        if gates is not None and self.rescales_gates(adapter, ""):
            return self._rescaled(adapter, x, ranks, gates, topk_ids, experts, out)
        if routing is not None and routing.fuses:
            ranks = self._fused_ranks(adapter, x, ranks, routing.gates, experts)
            return expand(ranks, gates, experts.B, experts.scaling, out, inplace, topk_ids)
        if ranks is not None:
            return expand(ranks, gates, experts.B, experts.scaling, out, inplace, topk_ids, gated)
        inputs, dropout = self.drop(adapter, "", x)
        kernel = self.molora_runtime.kernel
        return selection.mixture_linear(
            kernel, inputs, gates, experts, out, topk_ids=topk_ids, inplace=inplace, **dropout
        )

    def _rescaled(
        self,
        adapter: str,
        x: Tensor,
        ranks: Tensor | None,
        gates: Tensor,
        topk_ids: Tensor | None,
        experts: Projection,
        out: Tensor,
    ) -> Tensor:
        """The mixture by `gate_rescaled`, of the ranks where another has read the input."""
        if ranks is not None:

            def of_ranks(ranks: Tensor, gates: Tensor, experts: Projection, out: Tensor) -> Tensor:
                return expand(ranks, gates, experts.B, experts.scaling, out, topk_ids=topk_ids)

            return gate_rescaled(of_ranks, ranks, gates, experts, out)
        inputs, dropout = self.drop(adapter, "", x)

        def of_inputs(x: Tensor, gates: Tensor, experts: Projection, out: Tensor) -> Tensor:
            kernel = self.molora_runtime.kernel
            return selection.mixture_linear(kernel, x, gates, experts, out, topk_ids=topk_ids, **dropout)

        return gate_rescaled(of_inputs, inputs, gates, experts, out)

    def _decide(self, adapter: str, x: Tensor, reads_first: bool, gates_too: bool = False) -> _Decided:
        """What this linear adds, by its part of the pass over its input; with `gates_too` the gated ranks as well."""
        read = self.molora_reads[adapter].part(self, adapter) if reads_first else NOTHING_READ
        routing, gated = None, None
        if self.molora_specs[adapter][""].router is not None:
            owner = self if (shared := self.molora_shared.get(adapter)) is None else shared.owner
            routing = self.routing(adapter, x, read.logits.get(owner))  # type: ignore[arg-type]
        experts = read.experts or self.experts(adapter, "")
        assert experts is not None
        if gates_too and read.ranks is not None and not (routing is not None and routing.fuses):
            num_ranks, gates = experts.num_experts * experts.B.shape[1], None if routing is None else routing.gates
            if num_ranks <= decode.MAX_RANKS:
                gated = decode.gated_few(read.ranks, gates, num_ranks, experts.scaling, x.dtype)
        return _Decided(experts, read.ranks, routing, gated)

    def _fused_ranks(self, adapter: str, x: Tensor, ranks: Tensor | None, gates: Tensor, experts: Projection) -> Tensor:
        """``sum_e gate_e (A_e x)``, (T, R): the ranks of experts whose matrices are averaged, as of one shared A."""
        if ranks is None:
            inputs, dropout = self.drop(adapter, "", x)
            (ranks,) = shrink(inputs, [experts.A], dtype=x.dtype, **dropout).ranks
        if ranks.dim() == 3:  # parts of a sum
            ranks = ranks.sum(0)
        return ranks if experts.shares_A else (ranks.unflatten(1, (gates.shape[1], -1)) * gates.unsqueeze(-1)).sum(1)

    def _reads_first(self, adapter: str, x: Tensor) -> bool:
        """Whether the input is read for experts and routers before the frozen linear runs, together with others."""
        if not selection.reads_first(x) or selection.requested(self.molora_runtime.kernel) == "reference":
            return False
        if not self.reads_experts(adapter, ""):
            return False
        return not self._drops(adapter) or any(m.router_beside(adapter) for m in self.molora_reads[adapter].members)

    def _drops(self, adapter: str) -> bool:
        return self.training and self.molora_specs[adapter][""].lora_dropout > 0

    def shrinks_first(self, adapter: str, x: Tensor) -> bool:
        """Whether that read gives the ranks too: with a kernel that dispatches, and where the experts of each linear
        have a dropout mask of their own, it is for the routers alone."""
        if self._drops(adapter):
            return False
        spec, features = self.molora_specs[adapter][""], linear_features(self.base_layer)
        assert features is not None
        shape = selection.Shape(
            x.shape[:-1].numel(),
            *features,
            spec.num_experts,
            spec.r,
            spec.experts_per_token,
            spec.share_A and spec.num_experts > 1,
            x.dtype,
            x.device,
        )
        return selection.choose(self.molora_runtime.kernel, shape).kernel == "dense_masked"
