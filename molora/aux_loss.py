"""The router losses as a gradient: ``L = sum_m w_m (CE_m + aux_m)`` over the micro-batches of a step.

Nothing is added to the loss the trainer sees, so no trainer can drop it, rescale it twice or lose it to a checkpoint:

- `attach` is the identity on the gates; its backward adds ``w_m * d aux / d stats`` to the statistics' gradient. On the
  gates and not on a layer's output, because code after the layer may work in place.
- `observe` is the identity on the loss; its backward reads off the incoming gradient the weight w_m that the trainer
  itself gave the micro-batch's mean loss: accumulation, token counts, world size and loss scaling are all inside it.

They are opaque operators, so that `torch.compile` keeps them in place. Their backwards are operators too and take the
incoming gradient as an argument, or AOTAutograd would hoist them into the forward, where no weight is known yet. The
`ticket` carries the number of the forward, so that a backward finds its own statistics among several forwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from molora.context import RUNTIMES, Runtime

_TAGS = (torch.Tag.cudagraph_unsafe,)


def _ticket(number: int) -> Tensor:
    return torch.tensor(number, dtype=torch.int64)


@torch.library.custom_op("molora::attach", mutates_args=(), tags=_TAGS)
def _attach(gates: Tensor, stats: Tensor, handle: int, site: int) -> tuple[Tensor, Tensor]:
    record = RUNTIMES[handle].record(site, stats.detach().clone())
    return gates.clone(), _ticket(record.number)


@_attach.register_fake
def _(gates: Tensor, stats: Tensor, handle: int, site: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gates), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("molora::attach_backward", mutates_args=(), tags=_TAGS)
def _attach_backward(grad: Tensor, stats: Tensor, ticket: Tensor, handle: int, site: int) -> Tensor:
    return RUNTIMES[handle].gradient(int(ticket), site).to(stats).clone()


@_attach_backward.register_fake
def _(grad: Tensor, stats: Tensor, ticket: Tensor, handle: int, site: int) -> Tensor:
    return torch.empty_like(stats)


def _attach_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.handle, ctx.site = inputs[2:]
    ctx.save_for_backward(inputs[1], output[1])


def _attach_grad(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return grad, _attach_backward(grad, *ctx.saved_tensors, ctx.handle, ctx.site), None, None


_attach.register_autograd(_attach_grad, setup_context=_attach_setup)


def attach(runtime: Runtime, site: int, gates: Tensor, stats: Tensor) -> Tensor:
    """The gates, with the router losses hanging on them.

    Args:
        site: number of the router in `runtime.sites`.
        gates: (T, G).
        stats: (S,) statistics of this layer, differentiable.
    """
    return _attach(gates, stats, runtime.handle, site)[0]


@torch.library.custom_op("molora::observe", mutates_args=(), tags=_TAGS)
def _observe(loss: Tensor, factor: Tensor, handle: int) -> tuple[Tensor, Tensor]:
    runtime = RUNTIMES[handle]
    record, runtime.opened = runtime.opened, None
    return loss.clone(), _ticket(-1 if record is None else record.number)


@_observe.register_fake
def _(loss: Tensor, factor: Tensor, handle: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(loss), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("molora::observe_backward", mutates_args=(), tags=_TAGS)
def _observe_backward(grad: Tensor, factor: Tensor, ticket: Tensor, handle: int) -> Tensor:
    weight = grad.float().sum() * factor
    RUNTIMES[handle].enter_backward(int(ticket), weight)
    return grad.clone()


@_observe_backward.register_fake
def _(grad: Tensor, factor: Tensor, ticket: Tensor, handle: int) -> Tensor:
    return torch.empty_like(grad)


def _observe_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.handle = inputs[2]
    ctx.save_for_backward(inputs[1], output[1])


def _observe_grad(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return _observe_backward(grad, *ctx.saved_tensors, ctx.handle), None, None


_observe.register_autograd(_observe_grad, setup_context=_observe_setup)


def observe_output(runtime: Runtime, output: Any, labels: Any, kwargs: Mapping[str, Any]) -> Any:
    """The output of the base model with its loss observed.

    The weight of the micro-batch's mean loss is ``d L / d loss``, times ``labels / num_items_in_batch`` where the trainer
    passed that divisor; for TRL's per-token `log_probs` it is the sum of ``- d L / d log_probs``.
    """
    if isinstance(output, tuple):
        # return_dict=False: a scalar in front of the logits is the loss.
        if output and isinstance(output[0], Tensor) and output[0].dim() == 0:
            return (_observed(runtime, output[0], _label_share(output[0], labels, kwargs)), *output[1:])
        return output
    observed = False
    for name, sign in (("loss", 1.0), ("log_probs", -1.0)):
        value = getattr(output, name, None)
        if isinstance(value, Tensor) and value.requires_grad:
            share = _label_share(value, labels, kwargs) if name == "loss" else value.new_tensor(sign, dtype=torch.float32)
            setattr(output, name, _observed(runtime, value, share))
            observed = True
    logits = getattr(output, "logits", None)
    if not observed and runtime.opened is not None and isinstance(logits, Tensor) and logits.requires_grad:
        number = runtime.opened.number  # recomputation must find this forward, though its loss is made elsewhere
        logits.register_hook(lambda grad: runtime.enter_backward(number))
    return output


def _observed(runtime: Runtime, loss: Tensor, factor: Tensor) -> Tensor:
    return _observe(loss, factor, runtime.handle)[0]


def _label_share(loss: Tensor, labels: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """The label tokens of this micro-batch over the trainer's divisor, 0-dim fp32; 1 where there is no divisor."""
    items = kwargs.get("num_items_in_batch")
    shifted = kwargs.get("shift_labels")
    if items is None or (labels is None and shifted is None):
        return loss.new_ones((), dtype=torch.float32)
    targets = shifted if shifted is not None else labels[..., 1:]
    return (targets != -100).sum().to(loss.device, torch.float32) / items
