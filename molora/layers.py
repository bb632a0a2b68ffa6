"""What a mixed linear and a mixed FFN have in common: adapters by name, routing, PEFT's bookkeeping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from molora.aux_loss import attach
from molora.context import Runtime
from molora.experts import make_experts, scaling_factor
from molora.kernel_routing import fast_route
from molora.kernels import selection
from molora.kernels.reference import Projection
from molora.partitioned import is_hooked
from molora.preconditioning import preconditioned
from molora.quantization import is_linear_4bit
from molora.record import Site
from molora.routers import RouterConfig, Routing, Tokens
from molora.shared import SharedRouting
from molora.steering import steered

NOT_MERGEABLE = (
    "a mixture cannot be merged into the base, because its gates differ from token to token; export the adapter itself "
    "with save_pretrained(), or call unload() to get the untouched base back"
)


@dataclass(frozen=True, kw_only=True)
class MixtureSpec:
    """What one adapter puts on one module.

    Attributes:
        router: None for an ungated LoRA, which has one expert.
        freeze_experts: whether only the router trains.
    """

    num_experts: int
    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    share_A: bool
    init_lora_weights: bool | str
    router: RouterConfig | None
    freeze_experts: bool = False
    shared_basis: bool = False
    riemannian: bool | str = False

    @property
    def scaling(self) -> float:
        rank = self.r if self.router is None else self.router.scaling_rank(self.r)
        return scaling_factor(self.lora_alpha, rank, self.use_rslora)

    @cached_property
    def experts_per_token(self) -> int | None:
        """How many experts each token has; None where that varies, or where ranks are gated one by one."""
        if self.router is None or self.router.num_gates(self.num_experts, self.r) != self.num_experts:
            return None
        return self.router.num_chosen(self.num_experts, self.r)


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear that can carry experts, seen through adapters; None for anything else."""
    while isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else None


def is_plain_linear(base: nn.Module) -> bool:
    """Whether a frozen linear is nothing but a matrix product: of its kind exactly, unhooked, not replaced.

    Its output is then a fresh tensor, and so is the gradient of its input. Subclasses (8-bit linears) may return views,
    hooks may keep what they see. A 4-bit linear counts as plain (`is_linear_4bit`).
    """
    known = type(base) in (nn.Linear, Conv1D) or is_linear_4bit(base)
    return known and not is_hooked(base) and "forward" not in vars(base)


def is_fresh(out: Tensor, x: Tensor) -> bool:
    """Whether the output of a plain linear is a tensor of its own, which may be added into."""
    return out is not x and out._base is None and out.is_contiguous() and not (out.is_leaf and out.requires_grad)


@dataclass(frozen=True)
class RouterPlace:
    """Where a router sits.

    Attributes:
        name: what reports call it.
        layer: number of its decoder layer, None where its name has none.
        features: size of what it reads, None: the input of its module.
        early: whether the module runs before what the router reads is there.
    """

    name: str
    layer: int | None = None
    features: int | None = None
    early: bool = False


class MoloraLayer(nn.Module, BaseTunerLayer):
    """What a mixed linear and a mixed FFN have in common: adapters by name, routing, PEFT's bookkeeping."""

    cast_input_dtype_enabled = True  # PEFT's switch; no input is cast here but to the dtype of the frozen output
    other_param_names: tuple[str, ...] = ("molora_specs",)
    if TYPE_CHECKING:  # BaseTunerLayer's, which nn.Module's __getattr__ hides from type checkers
        active_adapters: list[str]
        get_base_layer: Callable[[], nn.Module]
        set_adapter: Callable[..., None]
        frozen_peft_weight_names: dict[str, tuple[str, ...]]
        _get_base_layer_device_and_dtype: Callable[[nn.Module], tuple[torch.device | None, torch.dtype | None]]

    def __init__(self, base_layer: nn.Module, runtime: Runtime, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.molora_runtime = runtime
        self.molora_specs: dict[str, dict[str, MixtureSpec]] = {}
        self.molora_sites: dict[str, int] = {}
        self.molora_shared: dict[str, SharedRouting] = {}
        self.molora_early: set[str] = set()
        self.molora_router = nn.ModuleDict()
        self.parts = parts
        for part in parts:
            for matrix in "AB":
                setattr(self, f"molora_{matrix}{part}", nn.ModuleDict())
        self.molora_U = nn.ModuleDict()  # of linears whose experts share a basis: (1, R, O)
        self.adapter_layer_names = (*(f"molora_{m}{p}" for p in parts for m in "AB"), "molora_U", "molora_router")
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def add_part(self, adapter: str, part: str, features: tuple[int, int], spec: MixtureSpec) -> None:
        """Puts new experts of `adapter` on one projection."""
        inputs, outputs = features
        if spec.shared_basis:
            self.molora_U[adapter] = make_experts(1, spec.r, inputs, outputs, False, False)[1]
            outputs = spec.r
        A, B = make_experts(spec.num_experts, spec.r, inputs, outputs, spec.share_A, spec.init_lora_weights)
        getattr(self, f"molora_A{part}")[adapter] = A
        getattr(self, f"molora_B{part}")[adapter] = B
        self.molora_specs.setdefault(adapter, {})[part] = spec
        if spec.freeze_experts:
            frozen = (*self.frozen_peft_weight_names.get(adapter, ()), f"molora_A{part}", f"molora_B{part}", "molora_U")
            self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter: frozen}

    def add_router(
        self, adapter: str, in_features: int, spec: MixtureSpec, place: RouterPlace, shared: SharedRouting | None
    ) -> None:
        """Gives `adapter` a router here, unless it uses that of another member of `shared`."""
        assert spec.router is not None
        if shared is not None:
            self.molora_shared[adapter] = shared
            if place.early:
                self.molora_early.add(adapter)
            shared.members += not place.early
            if shared.owner is not None:
                return
            shared.owner = self
        router = spec.router.build(place.features or in_features, spec.num_experts, spec.r)
        self.molora_router[adapter] = router
        self.molora_sites[adapter] = len(self.molora_runtime.sites)
        self.molora_runtime.sites.append(Site(place.name, adapter, router, place.layer, self))

    def finish(self, adapter: str, inference_mode: bool) -> None:
        """After the parts of an adapter are in place: device, dtype, trainability."""
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Without PEFT's cast to the base's dtype: it would round the fp32 tensors of a checkpoint while loading.
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        for container in self.adapter_layer_names:
            entries = getattr(self, container)
            if adapter_name not in entries or device is None:
                continue
            if not any(p.is_meta for p in entries[adapter_name].parameters()):
                entries[adapter_name].to(device)

    def to_base_dtype(self, adapter: str) -> None:
        """Rounds an adapter to the dtype the base linear computes in."""
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        for container in self.adapter_layer_names:
            entries = getattr(self, container)
            if adapter in entries and dtype is not None and dtype.is_floating_point:
                entries[adapter].to(dtype)

    def routing(self, adapter: str, x: Tensor, logits: Tensor | None = None) -> Routing:
        """The routing of x (..., D) by this layer's router, or by the one it shares; with the router's logits, if they
        are known."""
        shared = self.molora_shared.get(adapter)
        if shared is None:
            return self.route(adapter, x, logits)
        assert shared.owner is not None
        if adapter in self.molora_early:
            alike: Routing = shared.owner.molora_router[adapter](x.flatten(0, -2))
            return steered(alike, self.molora_runtime.current_inputs().steering)
        name = self.molora_runtime.sites[shared.owner.molora_sites[adapter]].name
        return shared.get(adapter, x, self.molora_runtime.current_inputs().embeddings.get(name, x), logits)

    def route(self, adapter: str, x: Tensor, logits: Tensor | None = None) -> Routing:
        """The routing of x (..., D) by this layer's own router; in training with the router losses on its gates."""
        runtime = self.molora_runtime
        router: Any = self.molora_router[adapter]
        site = runtime.sites[self.molora_sites[adapter]]
        inputs, hidden = runtime.current_inputs(), x.flatten(0, -2)
        # Some models (OPT) flatten their tokens first; then the model's own input knows the rows.
        rows = x.shape[:-2].numel() if x.dim() > 2 else inputs.rows or 1
        mask = self._of_tokens(adapter, inputs.token_mask, rows, hidden)
        labels = self._of_tokens(adapter, inputs.task_labels, rows, hidden)
        if self.training and labels is None and router.config.task_labels(router.num_gates):
            raise ValueError(
                f"{site.name}: the loss of this router is made of task labels, and this training batch has none; pass "
                "task_labels, (rows,) or (rows, length), with each batch (a Trainer drops columns that it does not "
                "know unless remove_unused_columns=False)"
            )
        sequence = None if inputs.sequence is None else inputs.sequence.to(hidden.device)
        tokens = Tokens(rows, mask, labels, inputs.embeddings.get(site.name), logits, sequence)
        by = None if selection.requested(runtime.kernel) == "reference" else fast_route
        routing: Routing = router(hidden, tokens, self.training, by)
        if routing.stats is not None:
            gates = attach(runtime, self.molora_sites[adapter], routing.gates, routing.stats)
            routing = routing._replace(gates=gates)
        routing = steered(routing, inputs.steering)
        if runtime.recorder is not None:
            runtime.record_routing(self.molora_sites[adapter], routing, rows)
        return routing

    def _of_tokens(self, adapter: str, values: Tensor | None, rows: int, hidden: Tensor) -> Tensor | None:
        """One value for each token (T,), of values given for each token or, for labels, for each row."""
        if values is None:
            return None
        name, tokens = self.molora_runtime.sites[self.molora_sites[adapter]].name, hidden.shape[0]
        if values.dtype != torch.bool:
            shape, length = tuple(values.shape), tokens // max(rows, 1)
            if shape == (rows,):
                return values.to(hidden.device).repeat_interleave(length)
            if shape != (rows, length):
                raise ValueError(
                    f"{name}: task_labels has shape {shape}; give one number for each row, {(rows,)}, or for each "
                    f"token, {(rows, length)}"
                )
        values = values.to(hidden.device).flatten()
        if len(values) != tokens:
            raise ValueError(
                f"{name} got {tokens} tokens but the attention mask has {len(values)}; pass the mask of these tokens, "
                "or none if all of them count"
            )
        return values

    def experts(self, adapter: str, part: str) -> Projection | None:
        """The expert parameters of one projection, or None where the adapter leaves it alone."""
        spec = self.molora_specs[adapter].get(part)
        if spec is None:
            return None
        A: Tensor = getattr(self, f"molora_A{part}")[adapter]()
        B: Tensor = getattr(self, f"molora_B{part}")[adapter]()
        experts = Projection(A, B, spec.scaling)
        return preconditioned(experts) if spec.riemannian and self._learns else experts

    @property
    def _learns(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def rescales_gates(self, adapter: str, part: str) -> bool:
        """Whether the experts of this pass learn by the square roots of their gates."""
        return self.molora_specs[adapter][part].riemannian == "gate_rescaled" and self._learns

    def router_beside(self, adapter: str) -> Any:
        """This layer's own router, if its logits are a product of the layer's input that others may compute."""
        router: Any = self.molora_router._modules.get(adapter)
        return None if router is None or router.reads_by_itself else router

    def reads_experts(self, adapter: str, part: str) -> bool:
        """Whether this layer's forward can read the expert parameters at any time."""
        return self.molora_runtime.gathers or self.has_whole_experts(adapter, part)

    def has_whole_experts(self, adapter: str, part: str) -> bool:
        """Whether the expert parameters can be read outside of this layer's forward: not offloaded nor partitioned."""
        # Not by its name: ZeRO-3 gathers a parameter whose name is asked for, and lets go of it behind the next module.
        A = next(iter(getattr(self, f"molora_A{part}")[adapter]._parameters.values()), None)
        return A is not None and not (A.is_meta or A.numel() == 0 or hasattr(A, "ds_id"))

    def drop(self, adapter: str, part: str, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The experts' input with dropout, or the input and what makes a kernel drop: probability and seed.

        The seed comes from torch's own CPU generator, which activation checkpointing restores, so that a recomputation
        makes the same mask. A compiler draws its own random numbers and cannot read a seed.
        """
        p = self.molora_specs[adapter][part].lora_dropout
        if not (self.training and p):
            return x, {}
        if torch.compiler.is_compiling():
            return functional.dropout(x, p), {}
        return x, {"dropout": p, "seed": int(torch.randint(2**62, (), dtype=torch.int64))}

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        site = self.molora_sites.pop(adapter_name, None)
        if site is not None:
            self.molora_runtime.forget(site)
        self.molora_shared.pop(adapter_name, None)
        self.molora_early.discard(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(NOT_MERGEABLE)

    def unmerge(self) -> None:
        raise NotImplementedError(NOT_MERGEABLE)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False
