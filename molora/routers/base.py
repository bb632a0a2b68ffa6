"""What a router is: hidden states in, gates out. A router knows no kernel and no model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

_SCALARS = ("tokens", "positions", "entropy_before", "entropy_after", "top1_share")


class Tokens(NamedTuple):
    """What is known of the T tokens of a forward beside their hidden states.

    Attributes:
        rows: lines of the batch; T = rows * length, line by line.
        mask: (T,) bool, True where a token counts; None means all count.
        task_labels: (T,) int64, the task of each token, negative where it has none; None without labels.
        embedding: (N, D') what a router reads instead of its own input, N dividing T; None: its own input.
        logits: (T, G) fp32, the product of the router's input with its weight, where it was computed already.
        sequence: (T,) int64, rising, the number of the sequence of each token where several are packed into one line;
            None: each line is one sequence.
    """

    rows: int = 1
    mask: Tensor | None = None
    task_labels: Tensor | None = None
    embedding: Tensor | None = None
    logits: Tensor | None = None
    sequence: Tensor | None = None

    def sequences(self, values: Tensor) -> Tensor:
        """(T,) int64, the number of the sequence of each token of `values` (T, ...), packed or not."""
        if self.sequence is not None:
            return self.sequence
        return torch.arange(self.rows, device=values.device).repeat_interleave(len(values) // self.rows)

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """The sum over the tokens of each sequence: (T, n) to (sequences, n); packed, it waits for the device once."""
        if self.sequence is None:
            return values.unflatten(0, (self.rows, -1)).sum(1)
        sums = values.new_zeros(int(self.sequence[-1]) + 1, values.shape[1])
        return sums.index_add(0, self.sequence, values)


class Routing(NamedTuple):
    """What a router decides for T tokens.

    Attributes:
        gates: (T, G) fp32 (fp64 for fp64 input), zero where an expert is not chosen. G = E, or a divisor of the ranks
            of one expert for rank-wise routing.
        topk_ids: (T, K) int64, the chosen experts where each token has exactly K of them, else None.
        stats: (S,) statistics of the tokens that count: the common ones, then what the router's own losses are made
            of. Differentiable where a loss needs it. None unless they were asked for.
        sums_to_one: whether every token's gates sum to one by construction.
        input_weight: (T, 1) multiple of the block's own input that an FFN mixture returns beside its experts, or None.
        fuses: whether the gates average the experts' matrices, and not their outputs.
    """

    gates: Tensor
    topk_ids: Tensor | None
    stats: Tensor | None
    sums_to_one: bool
    input_weight: Tensor | None = None
    fuses: bool = False


class SiteStats(NamedTuple):
    """The statistics of one router in one forward, as its losses see them.

    Attributes:
        own: what `Router.statistics` was given as `own`, detached, flat.
        num_gates: G.
        layer: number of the decoder layer, None where the module's name has none.
        pooled: (E,) the `pooled_own` part, averaged over more tokens than this micro-batch's; None: over these.
        share: 0-dim, the share that this micro-batch has in the tokens of `pooled`.
    """

    own: Tensor
    num_gates: int
    layer: int | None = None
    pooled: Tensor | None = None
    share: Tensor | None = None


class RouterLosses(NamedTuple):
    """The router losses of one forward.

    Attributes:
        value: 0-dim, the sum of all losses, each times its coefficient.
        grads: for each router the gradient of `value` with respect to its own statistics, in their shape.
    """

    value: Tensor
    grads: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Base of the typed router configs; `name` is the word that stands for the class in JSON and YAML."""

    name: ClassVar[str]

    def check(self, num_experts: int, r: int, placement: str) -> None:
        """Raises ValueError where this config cannot route among `num_experts` experts of rank r at that placement."""

    def num_gates(self, num_experts: int, r: int) -> int:
        """G, the gates of one token."""
        return num_experts

    def num_chosen(self, num_experts: int, r: int) -> int | None:
        """How many of the gates of a token are not zero; None where that varies from token to token."""
        return None

    def scaling_rank(self, r: int) -> int:
        """The rank that lora_alpha is divided by: that of one expert, or the number of active ranks."""
        return r

    def build(self, in_features: int, num_experts: int, r: int) -> Router:
        """A new router for inputs of size `in_features`, on the default device, in fp32."""
        raise NotImplementedError

    def losses(self, sites: Sequence[SiteStats]) -> RouterLosses:
        """The losses as a function of the statistics of all routers, with its gradient in closed form.

        In closed form because it is computed inside an opaque operator, during a backward, where autograd is off.
        """
        zero = sites[0].own.new_zeros(())
        return RouterLosses(zero, [torch.zeros_like(site.own) for site in sites])

    def describe_own(self, own: Tensor, num_gates: int) -> dict[str, Tensor]:
        """Names the parts of one router's own statistics, for reports."""
        return {}

    @property
    def pool_over(self) -> str:
        """The tokens over which `pooled_own` is averaged: "micro", "ranks" or "window"."""
        return "micro"

    @property
    def counts_padding(self) -> bool:
        """Whether `pooled_own` is a mean over padding too."""
        return False

    def pooled_own(self, own: Tensor, num_gates: int) -> Tensor:
        """The part of a router's own statistics that is averaged over `pool_over`."""
        raise NotImplementedError

    def task_labels(self, num_experts: int) -> int:
        """How many different task labels a loss of this router tells apart; 0: it needs none."""
        return 0

    @property
    def reads_embedding(self) -> bool:
        """Whether the router reads `Tokens.embedding` instead of its module's own input."""
        return False

    @property
    def has_centroids(self) -> bool:
        """Whether example prompts of each expert set its state (`model.set_centroids`)."""
        return False

    @property
    def moves_in_forward(self) -> bool:
        """Whether a training forward changes state, so that no forward may be run twice for one backward."""
        return False

    @property
    def moves_at_step(self) -> bool:
        """Whether `Router.move` wants the choices of each optimiser step."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that `molora.routers.router_config` turns back into an equal config."""
        return {"name": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}}


class Router(nn.Module):
    """Base of the routers: a linear to one logit for each gate, computed in fp32 outside autocast.

    Args:
        init_std: standard deviation of the initial weights; None: uniform in ±1/sqrt(D), nn.Linear's own.
        bias: whether the linear has one; it starts at zero.
    """

    def __init__(
        self,
        config: RouterConfig,
        in_features: int,
        num_gates: int,
        init_std: float | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_gates = num_gates
        self.weight = new_weight(num_gates, in_features, init_std)
        self.bias = nn.Parameter(torch.zeros(num_gates, dtype=torch.float32)) if bias else None

    def forward(
        self,
        x: Tensor,
        tokens: Tokens | None = None,
        with_stats: bool = False,
        route: Callable[[Router, Tensor, Tokens, bool], Routing] | None = None,
    ) -> Routing:
        """Routes each token by itself.

        Args:
            x: (T, D), any floating dtype.
            tokens: what else is known of them; None: one row, all of it counts.
            with_stats: whether to compute the statistics.
            route: what computes faster what `Router.route` does. Run in here, where ZeRO-3 has put the weight together.
        """
        with no_autocast(x.device):
            return (route or type(self).route)(self, x, tokens or Tokens(), with_stats)

    def route(self, x: Tensor, tokens: Tokens, with_stats: bool) -> Routing:
        raise NotImplementedError

    @property
    def reads_by_itself(self) -> bool:
        """Whether `logits` is no product of the module's input with `product_weight`, which others may compute."""
        return False

    @property
    def product_weight(self) -> Tensor:
        """(G, D) what the module's input is multiplied with."""
        return self.weight

    def logits(self, x: Tensor, tokens: Tokens | None = None) -> Tensor:
        """``x W^T + b`` with W the `product_weight`, (T, G): as given, or by `exact_linear`."""
        if tokens is None or tokens.logits is None:
            return exact_linear(x, self.product_weight, self.bias)
        return tokens.logits if self.bias is None else tokens.logits + self.bias

    def move(self, counts: Tensor) -> None:
        """Changes non-gradient state at an optimiser step.

        Args:
            counts: (G,) int64, how many tokens chose each gate since the last step, on all ranks.
        """

    @staticmethod
    def statistics(probs: Tensor, gates: Tensor, chosen: Tensor, mask: Tensor | None, own: Tensor) -> Tensor:
        """The statistics (S,): the common ones, detached, then the router's own.

        Args:
            probs: (T, G) the distribution before selection (normalised here).
            chosen: (T, G) one where a token chose a gate.
            own: the router's own statistics, any shape; differentiable.
        """
        with torch.no_grad():
            total = gates.sum(1, keepdim=True)
            share = gates / total.clamp(min=1e-20)
            scalars = torch.cat([entropy(probs), entropy(gates), share.amax(1, keepdim=True)], 1)
            means = masked_mean(torch.cat([scalars, chosen, gates], 1), mask)
            positions = means.new_full((1,), probs.shape[0])
            count = positions if mask is None else mask.sum().to(means.dtype).view(1)
        return torch.cat([count, positions, means, own.flatten().to(means.dtype)])


def common_size(num_gates: int) -> int:
    """How many of a router's statistics are the common ones."""
    return len(_SCALARS) + 2 * num_gates


def split_statistics(stats: Tensor, num_gates: int) -> tuple[dict[str, Tensor], Tensor]:
    """The common statistics by name, and the router's own, of `Router.statistics`.

    tokens: how many counted; positions: all of them, with padding. entropy_before, entropy_after: mean entropy of a
    token's probabilities and of its gates (both normalised to sum one), over ln G, so within [0, 1]. top1_share: mean
    share of the largest gate in the sum of a token's gates. load (G,): how often a token chose each gate, on average;
    mean_gate (G,): the mean of each gate.
    """
    size = common_size(num_gates)
    scalars, load, gate, own = stats.split([len(_SCALARS), num_gates, num_gates, stats.shape[0] - size])
    return dict(zip(_SCALARS, scalars.unbind(), strict=True)) | {"load": load, "mean_gate": gate}, own


def entropy(values: Tensor) -> Tensor:
    """Shannon entropy of each row after normalisation, over ln G: (T, G) to (T, 1) in [0, 1]; 0 for a row of zeros."""
    p = values / values.sum(1, keepdim=True).clamp(min=1e-20)
    return -torch.special.xlogy(p, p).sum(1, keepdim=True) / math.log(max(values.shape[1], 2))


def new_weight(outputs: int, inputs: int, init_std: float | None) -> nn.Parameter:
    """A new fp32 weight (outputs, inputs)."""
    weight = nn.Parameter(torch.empty(outputs, inputs, dtype=torch.float32))
    if init_std is None:
        nn.init.uniform_(weight, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))
    else:
        nn.init.normal_(weight, std=init_std)
    return weight


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, accumulated in fp64 and rounded once to fp32 (fp64 input stays fp64).

    An fp32 GEMM gives a row other last bits alone than in a batch, and a selection turns one such bit into another
    expert; the rounding of an fp64 sum does not depend on the batch. Devices without fp64 accumulate in fp32.
    """
    accumulate = widest(x)
    result = torch.float64 if x.dtype == torch.float64 else torch.float32
    bias = None if bias is None else bias.to(accumulate)
    return functional.linear(x.to(accumulate), weight.to(accumulate), bias).to(result)


def exact_sigmoid(logits: Tensor) -> Tensor:
    """The sigmoid, computed in fp64 and rounded once: in fp32 its last bits depend on the place in the batch."""
    return logits.to(widest(logits)).sigmoid().to(logits.dtype)


def widest(x: Tensor) -> torch.dtype:
    """fp64, or fp32 on devices without it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Autocast off for `device`: a cast to fp32 alone is undone by an enclosing autocast."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def masked_mean(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """The mean over tokens that count: (T, n) to (n,); zero where none counts. No host sync."""
    if token_mask is None:
        return values.sum(0) / max(values.shape[0], 1)
    weight = token_mask.to(values.dtype).unsqueeze(1)
    return (values * weight).sum(0) / weight.sum().clamp(min=1)
