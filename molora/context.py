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
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from molora.record import (
    ForwardInputs,
    ForwardRecord,
    Site,
    count_choices,
    in_backward,
    packed_sequences,
    router_gradients,
    token_mask,
)
from molora.window import Window, on_optimizer_step, steps_parameters

_MAX_RECORDS = 256  # forwards that wait for their backward
_MAX_DONE = 8  # forwards whose backward has run, kept for a second one (retain_graph)
# What belongs to a process or a forward, and is not copied with a model.
_TRANSIENT = {"handle", "inputs", "standing", "window", "use", "model", "recorder", "_numbers"}
_TRANSIENT |= {"opened", "last", "in_backward_of", "losses", "records"}
_handles = itertools.count()

# Operators take tensors and numbers only, so they find the runtime of a model by number. Weak: a model takes its own
# with it.
RUNTIMES: WeakValueDictionary[int, Runtime] = WeakValueDictionary()


class Runtime:
    """The forwards of one base model; every mixture layer of the model holds the same one."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.kernel: str | None = None
        self.unverified: set[str] = set()
        self.shared: list[Any] = []  # the routings that linears of one block share within a forward
        self.given_weight: float | None = None
        self.warned = False
        self.read_labels = False
        self.gathers = False  # whether ZeRO-3 holds the model, whose blocks then gather what is used inside them
        self.recorder: Any = None
        self._reset()

    def _reset(self) -> None:
        self.handle = next(_handles)
        self.inputs = ForwardInputs()
        self.standing: dict[str, Tensor] = {}  # embeddings that hold for more than one forward
        self.window = Window()
        self.use: dict[int, Tensor] = {}  # for each site tokens, and tokens times each common statistic
        self.model: Callable[[], nn.Module | None] = lambda: None  # a copy learns its model at the first forward
        on_optimizer_step(self, Runtime.after_step)
        self.opened: ForwardRecord | None = None
        self.last: ForwardRecord | None = None
        self.in_backward_of: ForwardRecord | None = None
        self.losses: dict[str, Tensor] = {}
        self.records: OrderedDict[int, ForwardRecord] = OrderedDict()
        self._numbers = itertools.count()
        RUNTIMES[self.handle] = self

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _TRANSIENT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, recorder=None)
        self._reset()

    # -- forward ---------------------------------------------------------------------------------------------------

    def install(
        self,
        model: nn.Module,
        observe: Callable[..., Any],
        verify: Callable[[nn.Module, Runtime], None],
        gather: Callable[[nn.Module], bool],
    ) -> None:
        """Hooks itself onto the base model and names itself there.

        Args:
            observe: gets (runtime, output, labels, kwargs) of a training forward and returns the output.
            verify: gets the model before the first forward after adapters were loaded past PEFT's own functions.
            gather: gets the model before each forward, and says whether ZeRO-3 holds it.
        """
        self._observe, self._verify, self._gather = observe, verify, gather
        self.model = weakref.ref(model)
        model.molora_runtime = self  # type: ignore[assignment]
        parameters = list(inspect.signature(type(model).forward).parameters)[1:]
        self._positions = {name: i for i, name in enumerate(parameters)}
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def add_hook(self, handle: Any) -> None:
        """Keeps the handle of one more hook, to be removed with the others."""
        self._hooks.append(handle)

    def remove(self, model: nn.Module) -> None:
        """Undoes `install`."""
        for hook in self._hooks:
            hook.remove()
        del model.molora_runtime

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        position = self._positions.get(name, len(args))
        return kwargs.get(name, args[position] if position < len(args) else None)

    def _before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        task_labels = kwargs.pop("task_labels", None)  # ours; no base model knows it
        ids = self._argument("input_ids", args, kwargs)
        ids = self._argument("inputs_embeds", args, kwargs) if ids is None else ids
        embeddings = {**self.standing, **self.inputs.embeddings}
        self.inputs = ForwardInputs(None if ids is None else ids.shape[0], embeddings=embeddings)
        if model.training:
            mask = self._argument("attention_mask", args, kwargs)
            self.inputs.token_mask = token_mask(mask)
            self.inputs.sequence = packed_sequences(
                self._argument("position_ids", args, kwargs), mask, self.inputs.rows
            )
            self.inputs.task_labels = self._checked_labels(task_labels)
        for routing in self.shared:
            routing.clear()
        if not torch.compiler.is_compiling():
            if self.unverified:
                self._verify(model, self)
            self.gathers = self._gather(model)
            if model.training:
                self._refuse_checkpointing(model)
            self.model = weakref.ref(model)
            self.opened = self._open(explicit=True) if model.training else None
        return args, kwargs

    def _checked_labels(self, labels: Tensor | None) -> Tensor | None:
        """The task labels, which must be numbers of tasks; read on the host where that costs nothing, and once where
        it does."""
        if labels is None or torch.compiler.is_compiling():
            return labels if labels is None else labels.long()
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
            kind = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"task_labels must be a tensor of integers, (rows,) or (rows, length), got {kind}")
        known = [n for n in (s.router.config.task_labels(s.router.num_gates) for s in self.sites if s.live) if n]
        labels = labels.long()
        if not known:
            return labels
        if (labels.device.type == "cpu" or not self.read_labels) and labels.numel() and int(labels.max()) >= min(known):
            raise ValueError(
                f"task_labels holds {int(labels.max())}, but this router tells {min(known)} tasks apart; give numbers "
                f"from 0 to {min(known) - 1}, or a negative one for no task"
            )
        self.read_labels = True
        return labels

    def _refuse_checkpointing(self, model: nn.Module) -> None:
        for site in self.sites:
            if (
                site.live
                and site.router.config.moves_in_forward
                and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
            ):
                raise ValueError(
                    f"{site.name}: bias_update='forward' moves the router's bias in each forward, and activation "
                    "checkpointing runs forwards twice; use bias_update='step' or switch checkpointing off"
                )

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        for routing in self.shared:
            routing.clear()
        self.inputs = ForwardInputs()
        if not model.training or not torch.is_grad_enabled():
            self.opened = None
            return None
        output = self._observe(self, output, self._argument("labels", args, kwargs), kwargs)
        self.opened = None
        return output

    def _open(self, explicit: bool) -> ForwardRecord:
        record = ForwardRecord(next(self._numbers), self.inputs, explicit, given_weight=self.given_weight)
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

    def current_inputs(self) -> ForwardInputs:
        """What is known of the tokens of the forward that is running, or that is being recomputed."""
        if torch.compiler.is_compiling() or not in_backward():
            return self.inputs
        record = self.in_backward_of or self.last
        return record.inputs if record else self.inputs

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
            self._count(record)
            task = torch._C._current_graph_task_id()
            if record.backward != task:
                record.backward, record.weights, record.weighted = task, [], None
        return record

    def add_weight(self, number: int, weight: Tensor | None) -> None:
        """Called with the weight that an output of forward `number` gives its mean LM loss; None: no multiple of it."""
        record = self.enter_backward(number)
        if record is not None:
            record.weights.append(weight)
            record.weighted = None

    def gradient(self, number: int, site: int) -> Tensor:
        """weight * d losses / d statistics of one site, (S,), for the forward with this number."""
        record = self.records.get(number)
        if record is None or site not in record.stats:
            raise RuntimeError(
                f"no statistics of {self.sites[site].name} for this backward: more than {_MAX_RECORDS} forwards came "
                f"in between, or {_MAX_DONE} backwards since its first one, or its forward ran outside training"
            )
        self._count(record)
        if record.grads is None:
            self._compute_losses(record)
        assert record.grads is not None
        if record.weighted is None:
            rows = list(record.grads.values())
            weight = self._weight(record, rows[0])
            if len({(row.shape, row.device) for row in rows}) == 1:
                rows = list((weight * torch.stack(rows)).unbind())
            else:
                rows = [weight.to(row) * row for row in rows]
            record.weighted = dict(zip(record.grads, rows, strict=True))
        return record.weighted[site]

    def _count(self, record: ForwardRecord) -> None:
        """Adds the choices of a forward to the window and to the telemetry, once, as its backward begins."""
        if not record.counted:
            record.counted = True
            count_choices(record.stats, self.sites, self.window, self.use)

    def _compute_losses(self, record: ForwardRecord) -> None:
        record.grads, record.losses = router_gradients(record.stats, self.sites, self.window)
        self.losses = record.losses

    def record_routing(self, site: int, routing: Any, rows: int) -> None:
        """Hands a routing to `record_routing`, unless this is a recomputation."""
        if torch.compiler.is_compiling():
            raise ValueError("record_routing needs the model as it is, not compiled; record the uncompiled one")
        if not in_backward():
            self.recorder.add(self.sites[site], routing, rows)

    # -- optimiser step --------------------------------------------------------------------------------------------

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after a step of any optimizer of the process."""
        if self.window:
            model = self.model()
            modules: list[nn.Module] = [site.router for site in self.sites if site.owner is not None]
            modules += [] if model is None else [model]
            if steps_parameters(optimizer, itertools.chain(*(module.parameters() for module in modules))):
                self.end_step()

    def forget(self, site: int) -> None:
        """Lets go of a router whose adapter was deleted; its number is not given again."""
        self.sites[site] = replace(self.sites[site], owner=None, router=None)  # type: ignore[arg-type]
        self.use.pop(site, None)
        self.window.counts.pop(site, None)

    def end_step(self) -> None:
        """Ends the window of micro-batches: routers with state of their own move it."""
        self.window.close(lambda site: self.sites[site].router)

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


def runtime_of(model: nn.Module) -> Runtime:
    """The runtime of a model with mixtures, however it is wrapped.

    Raises:
        ValueError: the model has no mixture.
    """
    for module in model.modules():
        runtime = getattr(module, "__dict__", {}).get("molora_runtime")
        if isinstance(runtime, Runtime):
            if runtime.model() is None and not hasattr(module, "molora_specs"):  # a copy; the base comes first
                runtime.model = weakref.ref(module)
            return runtime
    raise ValueError("this model has no mixture of LoRA experts; convert it with get_peft_model(model, MoloraConfig())")


def adapter_of(model: Any, adapter_name: str | None, purpose: str) -> tuple[Runtime, str, Any]:
    """The runtime of a model, the name of an adapter (the active one if None), and its config.

    Args:
        purpose: what messages say the adapter is wanted for, for instance "to export".

    Raises:
        ValueError: the model has no mixture, or no adapter of that name.
    """
    runtime = runtime_of(model)
    adapter = adapter_name or next((site.adapter for site in runtime.sites if site.live), "")
    config = model.peft_config.get(adapter)
    if config is None:
        raise ValueError(f"there is no adapter {adapter!r} {purpose}; there are {', '.join(model.peft_config)}")
    return runtime, adapter, config


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


def end_step(model: nn.Module) -> None:
    """Tells the routers that an optimiser step was taken, where nothing else does.

    Steps of torch optimizers, DeepSpeed's among them, are seen without this; it is for updates written by hand.
    """
    runtime_of(model).end_step()
