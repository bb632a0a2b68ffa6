"""The router losses as a gradient: ``L = sum_m w_m (CE_m + aux_m)`` over the micro-batches of a step.

Nothing is added to the loss the trainer sees, so no trainer can drop it, rescale it twice or lose it to a checkpoint:

- `attach` is the identity on the gates; its backward adds ``w_m * d aux / d stats`` to the statistics' gradient. On the
  gates and not on a layer's output, because code after the layer may work in place.
- `observe` is the identity on the loss; its backward reads off the incoming gradient the weight w_m that the trainer
  itself gave the micro-batch's mean loss: accumulation, token counts, world size and loss scaling are all inside it.

Compiled, they are opaque operators, so that `torch.compile` keeps them in place. Their backwards are operators too and
take the incoming gradient as an argument, or AOTAutograd would hoist them into the forward, where no weight is known
yet. The `ticket` carries the number of the forward, so that a backward finds its own statistics among several forwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

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


class _EagerAttach(torch.autograd.Function):
    """`_attach` without a dispatcher's price, which a forward of hundreds of routers pays hundreds of times."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, stats: Tensor, runtime: Runtime, site: int) -> Tensor:
        ctx.runtime, ctx.site = runtime, site
        ctx.number = runtime.record(site, stats.detach()).number
        return gates.view_as(gates)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return grad, ctx.runtime.gradient(ctx.number, ctx.site), None, None


def attach(runtime: Runtime, site: int, gates: Tensor, stats: Tensor) -> Tensor:
    """The gates, with the router losses hanging on them.

    Args:
        site: number of the router in `runtime.sites`.
        gates: (T, G).
        stats: (S,) statistics of this layer, differentiable.
    """
    if torch.compiler.is_compiling():
        return _attach(gates, stats, runtime.handle, site)[0]
    return _EagerAttach.apply(gates, stats, runtime, site)


@torch.library.custom_op("molora::observe", mutates_args=(), tags=_TAGS)
def _observe(loss: Tensor, factor: Tensor, handle: int) -> tuple[Tensor, Tensor]:
    runtime = RUNTIMES[handle]
    runtime.opened = None
    return loss.clone(), _ticket(-1 if runtime.last is None else runtime.last.number)


@_observe.register_fake
def _(loss: Tensor, factor: Tensor, handle: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(loss), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("molora::observe_backward", mutates_args=(), tags=_TAGS)
def _observe_backward(grad: Tensor, factor: Tensor, ticket: Tensor, handle: int) -> Tensor:
    RUNTIMES[handle].add_weight(int(ticket), _mean_loss_weight(grad.float(), factor))
    return grad.clone()


@_observe_backward.register_fake
def _(grad: Tensor, factor: Tensor, ticket: Tensor, handle: int) -> Tensor:
    return torch.empty_like(grad)


def _observe_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.handle = inputs[2]
    ctx.save_for_backward(inputs[1], output[1])
    ctx.set_materialize_grads(False)


def _observe_grad(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None]:
    if grad is None:  # an output nobody used; DDP connects it all the same
        return None, None, None
    return _observe_backward(grad, *ctx.saved_tensors, ctx.handle), None, None


_observe.register_autograd(_observe_grad, setup_context=_observe_setup)


def _mean_loss_weight(grad: Tensor, factor: Tensor) -> Tensor | None:
    """The weight of the mean LM loss, 0-dim, from the gradient of what was observed.

    None where that is no multiple of the mean LM loss: preference and policy losses push the tokens unequally.
    """
    if factor.dim():
        counted = grad[factor != 0]
        if counted.numel() and not bool((counted == counted[0]).all() & (counted[0] <= 0)):
            return None
    return (grad * factor).sum()


def observe_output(runtime: Runtime, output: Any, labels: Any, kwargs: Mapping[str, Any]) -> Any:
    """The output of the base model with its loss observed.

    The weight of the micro-batch's mean loss is ``d L / d loss``, times ``labels / num_items_in_batch`` where the
    trainer passed that divisor; for TRL's per-token `log_probs` the sum of ``- d L / d log_probs`` over label tokens.
    """
    if not torch.compiler.is_compiling() and runtime.opened is not None:
        # Whatever the loss is made of, its recomputations must find this forward.
        number = runtime.opened.number
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(lambda grad: runtime.enter_backward(number) and None)
    if isinstance(output, tuple):
        # return_dict=False: a scalar in front of the logits is the loss.
        if output and isinstance(output[0], Tensor) and output[0].dim() == 0:
            return (_observed(runtime, output[0], _label_share(output[0], labels, kwargs)), *output[1:])
        return output
    for name, factor in (("loss", _label_share), ("log_probs", _label_tokens)):
        value = getattr(output, name, None)
        if isinstance(value, Tensor) and value.requires_grad:
            setattr(output, name, _observed(runtime, value, factor(value, labels, kwargs)))
    return output


def _observed(runtime: Runtime, loss: Tensor, factor: Tensor) -> Tensor:
    return _observe(loss, factor, runtime.handle)[0]


def _targets(labels: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The label of each prediction, or None without labels."""
    shifted: Tensor | None = kwargs.get("shift_labels")
    return shifted if shifted is not None or labels is None else labels[..., 1:]


def _label_share(loss: Tensor, labels: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """The label tokens of this micro-batch over the trainer's divisor, 0-dim fp32; 1 where there is no divisor."""
    items, targets = kwargs.get("num_items_in_batch"), _targets(labels, kwargs)
    if items is None or targets is None:
        return loss.new_ones((), dtype=torch.float32)
    return (targets != -100).sum().to(loss.device, torch.float32) / items


def _label_tokens(log_probs: Tensor, labels: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """-1 at label tokens and 0 elsewhere: trainers also sum the zeros that stand for the other tokens."""
    targets = _targets(labels, kwargs)
    if targets is None or targets.shape != log_probs.shape:
        return -torch.ones_like(log_probs, dtype=torch.float32)
    return -(targets != -100).to(log_probs.device, torch.float32)
