"""What one forward of the base model knows: which tokens count, every layer's routing statistics, the loss's weight.

Everything hangs on two hooks of the base model, so that it works however the model is called (PeftModel, transformers'
native adapters, any trainer), and on the four operators of `aux_loss.py`, so that it survives every kind of activation
checkpointing and `torch.compile(fullgraph=True)`.

    begin        a forward pre-hook reads the padding mask and opens a `ForwardRecord`
    attach       each layer hands its gates and statistics through; the record keeps the statistics
    observe      a forward hook hands the loss through; its backward gives the record the weight of the loss
    gradients    in the backward of each `attach`: the losses of the whole record, times that weight
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from molora.routers import RouterConfig

_MAX_RECORDS = 256  # forwards that wait for their backward
_MAX_DONE = 8  # forwards whose backward has run, kept for a second one (retain_graph)
_handles = itertools.count()

# Operators take tensors and numbers only, so they find the runtime of a model by number. Weak: a model takes its own
# with it.
RUNTIMES: WeakValueDictionary[int, Runtime] = WeakValueDictionary()


@dataclass(frozen=True)
class Site:
    """One router in the model: where it sits, whose it is, and how its losses are made."""

    name: str
    adapter: str
    router: RouterConfig


@dataclass(eq=False)
class ForwardRecord:
    """One forward of the base model, until its backward.

    Attributes:
        number: counts forwards; the ticket that operators carry.
        token_mask: (T,) bool, or None: every token counts.
        explicit: whether the base model's hooks opened it; a compiled forward opens its own at the first statistics.
        stats: for each site the (S,) statistics, detached.
        weights: what each observed output adds to the weight the trainer gives this forward's mean LM loss, 0-dim; None
            where the loss is no multiple of it. Filled as a backward begins, anew in each.
        backward: the backward that filled `weights`.
        given_weight: the weight set by `aux_weight`, which then holds.
        grads: for each site the gradient of the losses; made at the first backward, when all layers have recorded.
        losses: for each adapter the value of its router losses, 0-dim.
    """

    number: int
    token_mask: Tensor | None = None
    explicit: bool = True
    stats: dict[int, Tensor] = field(default_factory=dict)
    weights: list[Tensor | None] = field(default_factory=list)
    backward: int = -1
    given_weight: float | None = None
    grads: dict[int, Tensor] | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)


def in_backward() -> bool:
    """Whether autograd is running a backward on this thread: a forward in there is a recomputation."""
    return torch._C._current_graph_task_id() != -1


class Runtime:
    """The forwards of one base model; every mixture layer of the model holds the same one."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.kernel: str | None = None
        self.unverified: set[str] = set()
        self.shared: list[Any] = []  # the routings that linears of one block share within a forward
        self.given_weight: float | None = None
        self.warned = False
        self._reset()

    def _reset(self) -> None:
        self.handle = next(_handles)
        self.token_mask: Tensor | None = None
        self.opened: ForwardRecord | None = None
        self.last: ForwardRecord | None = None
        self.in_backward_of: ForwardRecord | None = None
        self.losses: dict[str, Tensor] = {}
        self.records: OrderedDict[int, ForwardRecord] = OrderedDict()
        self._numbers = itertools.count()
        RUNTIMES[self.handle] = self

    def __getstate__(self) -> dict[str, Any]:
        transient = ("handle", "token_mask", "opened", "last", "in_backward_of", "losses", "records", "_numbers")
        return {k: v for k, v in self.__dict__.items() if k not in transient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    # -- forward ---------------------------------------------------------------------------------------------------

    def install(
        self, model: nn.Module, observe: Callable[..., Any], verify: Callable[[nn.Module, Runtime], None]
    ) -> None:
        """Hooks itself onto the base model and names itself there.

        Args:
            observe: gets (runtime, output, labels, kwargs) of a training forward and returns the output.
            verify: gets the model before the first forward after adapters were loaded past PEFT's own functions.
        """
        self._observe, self._verify = observe, verify
        model.molora_runtime = self  # type: ignore[assignment]
        parameters = list(inspect.signature(type(model).forward).parameters)[1:]
        self._positions = {name: i for i, name in enumerate(parameters)}
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def remove(self, model: nn.Module) -> None:
        """Undoes `install`."""
        for hook in self._hooks:
            hook.remove()
        del model.molora_runtime

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        position = self._positions.get(name, len(args))
        return kwargs.get(name, args[position] if position < len(args) else None)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.token_mask = token_mask(self._argument("attention_mask", args, kwargs)) if model.training else None
        for routing in self.shared:
            routing.clear()
        if torch.compiler.is_compiling():
            return
        if self.unverified:
            self._verify(model, self)
        self.opened = self._open(explicit=True) if model.training else None

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        for routing in self.shared:
            routing.clear()
        self.token_mask = None
        if not model.training or not torch.is_grad_enabled():
            self.opened = None
            return None
        output = self._observe(self, output, self._argument("labels", args, kwargs), kwargs)
        self.opened = None
        return output

    def _open(self, explicit: bool) -> ForwardRecord:
        record = ForwardRecord(next(self._numbers), self.token_mask, explicit, given_weight=self.given_weight)
        if explicit and not torch.is_grad_enabled():
            return record  # no backward will ask for it
        self.records[record.number] = self.last = record
        self.in_backward_of = None
        done = [number for number, old in self.records.items() if old.grads is not None]
        for number in done[:-_MAX_DONE]:
            del self.records[number]
        if len(self.records) > _MAX_RECORDS:
            self.records.popitem(last=False)
        return record

    def current_mask(self) -> Tensor | None:
        """The token mask of the forward that is running, or that is being recomputed."""
        if torch.compiler.is_compiling() or not in_backward():
            return self.token_mask
        record = self.in_backward_of or self.last
        return record.token_mask if record else None

    def record(self, site: int, stats: Tensor) -> ForwardRecord:
        """The record a layer's statistics belong to; keeps them, unless this is a recomputation."""
        if in_backward():
            record = self.in_backward_of or self.last
            if record is not None:
                return record
        record = self.opened
        if record is not None and record.explicit and site in record.stats:
            raise RuntimeError(
                f"{self.sites[site].name} ran twice in one training forward; router losses need one run for each "
                "forward"
            )
        if record is None or site in record.stats:
            record = self.opened = self._open(explicit=False)
        record.stats[site] = stats
        return record

    # -- backward --------------------------------------------------------------------------------------------------

    def enter_backward(self, number: int) -> ForwardRecord | None:
        """Called as the backward enters forward `number` through one of its outputs."""
        record = self.records.get(number)
        if record is not None:
            self.in_backward_of = record
            task = torch._C._current_graph_task_id()
            if record.backward != task:
                record.backward, record.weights = task, []
        return record

    def add_weight(self, number: int, weight: Tensor | None) -> None:
        """Called with the weight that an output of forward `number` gives its mean LM loss; None: no multiple of it."""
        record = self.enter_backward(number)
        if record is not None:
            record.weights.append(weight)

    def gradient(self, number: int, site: int) -> Tensor:
        """weight * d losses / d statistics of one site, (S,), for the forward with this number."""
        record = self.records.get(number)
        if record is None or site not in record.stats:
            raise RuntimeError(
                f"no statistics of {self.sites[site].name} for this backward: more than {_MAX_RECORDS} forwards came "
                f"in between, or {_MAX_DONE} backwards since its first one, or its forward ran outside training"
            )
        if record.grads is None:
            self._compute_losses(record)
        assert record.grads is not None
        return self._weight(record, record.grads[site]) * record.grads[site]

    def _compute_losses(self, record: ForwardRecord) -> None:
        record.grads = {}
        for adapter in {self.sites[site].adapter for site in record.stats}:
            sites = [site for site in record.stats if self.sites[site].adapter == adapter]
            device = record.stats[sites[0]].device  # a model may lie on several
            losses = self.sites[sites[0]].router.losses([record.stats[site].to(device) for site in sites])
            record.losses[adapter] = losses.value
            record.grads.update(zip(sites, losses.grads, strict=True))
        self.losses = record.losses

    def _weight(self, record: ForwardRecord, like: Tensor) -> Tensor:
        if record.given_weight is not None:
            return torch.full_like(like[0], record.given_weight)
        weights = [weight for weight in record.weights if weight is not None]
        if weights and len(weights) == len(record.weights):
            return torch.stack(weights).sum().to(like)
        if not self.warned:
            self.warned = True
            warnings.warn(
                "the loss of this backward was not the model's own, so molora cannot read its weight and gives the "
                "router losses weight 1; set it with `with model.aux_weight(w):` around the forward",
                stacklevel=2,
            )
        return torch.ones_like(like[0])


def token_mask(attention_mask: Any) -> Tensor | None:
    """Which tokens count, from an attention mask as transformers has them.

    Args:
        attention_mask: None, (B, T) with 0 for padding, (B, 1, T, T) bool or additive, or a dict of those (Gemma-3).

    Returns:
        (B*T,) bool. In a 4-D mask a token counts if it may attend to itself. None if every token counts.
    """
    if isinstance(attention_mask, Mapping):
        attention_mask = next((m for m in attention_mask.values() if m is not None), None)
    if not isinstance(attention_mask, Tensor):
        return None
    if attention_mask.dim() == 4:
        queries, keys = attention_mask.shape[-2:]
        diagonal = attention_mask[:, 0].diagonal(keys - queries, -2, -1)
        return (diagonal if diagonal.dtype == torch.bool else diagonal == 0).flatten()
    return attention_mask.bool().flatten() if attention_mask.dim() == 2 else None


def runtime_of(model: nn.Module) -> Runtime:
    """The runtime of a model with mixtures, however it is wrapped.

    Raises:
        ValueError: the model has no mixture.
    """
    for module in model.modules():
        runtime = getattr(module, "__dict__", {}).get("molora_runtime")
        if isinstance(runtime, Runtime):
            return runtime
    raise ValueError("this model has no mixture of LoRA experts; convert it with get_peft_model(model, MoloraConfig())")


@contextlib.contextmanager
def aux_weight(model: nn.Module, weight: float) -> Iterator[None]:
    """Gives the router losses of the forwards inside a weight of your own, for losses that the model does not compute.

    The total is ``L = sum_m w_m (CE_m + aux_m)`` over the micro-batches m of a step, with w_m the weight of the mean
    loss of micro-batch m: 1 / accumulation steps for an average of equal micro-batches. With an fp16 loss scale, times
    that scale. Without this, the weight is read off the gradient of the model's own `loss`.
    """
    runtime = runtime_of(model)
    before, runtime.given_weight = runtime.given_weight, float(weight)
    try:
        yield
    finally:
        runtime.given_weight = before


def routing_statistics(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The statistics of the last training forward: for each router ``load`` (E,), ``mean_probability`` (E,) and more.

    Tensors on the model's device, not synchronised. Empty before the first training forward.
    """
    runtime = runtime_of(model)
    record = runtime.last
    if record is None:
        return {}
    return {runtime.sites[i].name: runtime.sites[i].router.describe(stats) for i, stats in record.stats.items()}


def router_losses(model: nn.Module) -> dict[str, Tensor]:
    """For each adapter the value of its router losses (0-dim) in the last forward whose backward has run."""
    return dict(runtime_of(model).losses)
