"""A frozen linear with a mixture of LoRA experts (or one ungated LoRA) added to its output."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from molora.context import Runtime
from molora.kernels import selection
from molora.kernels.dense_masked import expand
from molora.layers import MixtureSpec, MoloraLayer, RouterPlace, is_fresh, is_plain_linear, linear_features
from molora.shared import Read, SharedRead, SharedRouting


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
        out: Tensor = self.base_layer(x, *args, **kwargs)
        for adapter in active:
            experts = self.experts(adapter, "")
            assert experts is not None
            read = self.molora_reads[adapter].part(self, adapter) if adapter in first else None
            routing = None
            if self.molora_specs[adapter][""].router is not None:
                routing = self.routing(adapter, x, self._logits(adapter, read))
            gates = None if routing is None else routing.gates
            inplace = self._owns_output(x, out)
            if read is not None:
                out = expand(read.ranks, gates, experts.B, experts.scaling, out, inplace)
                continue
            inputs, dropout = self.drop(adapter, "", x)
            out = selection.mixture_linear(
                self.molora_runtime.kernel,
                inputs,
                gates,
                experts,
                out,
                topk_ids=None if routing is None else routing.topk_ids,
                inplace=inplace,
                **dropout,
            )
        return out

    def _reads_first(self, adapter: str, x: Tensor) -> bool:
        """Whether the experts' input is read before the frozen linear, together with others."""
        spec = self.molora_specs[adapter][""]
        if self.training and spec.lora_dropout:
            return False
        A = self.molora_A[adapter].weight
        partitioned = A.numel() == 0 or A.is_meta or hasattr(A, "ds_id")
        return not partitioned and selection.reads_first(self.molora_runtime.kernel, x, spec.num_experts * spec.r)

    def _logits(self, adapter: str, read: Read | None) -> Tensor | None:
        if read is None:
            return None
        shared = self.molora_shared.get(adapter)
        owner = self if shared is None else shared.owner
        return read.logits.get(owner)  # type: ignore[arg-type]

    def _owns_output(self, x: Tensor, out: Tensor) -> bool:
        """Whether `out` is provably a fresh tensor that nobody else holds, so that the expand may add into it."""
        return self.base_is_plain and is_fresh(out, x)
