"""Every router written out once more from its published description: gates, losses and decision margins.

Selections are made token by token in Python floats, values are plain torch in fp64 with plain autograd; nothing here
calls a router's own code. A loss takes F as constant where a router counts choices, and live where it sums gates
(Tsallis).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molora.routers import Arrow, Centroid, RankWise, Router, RouterConfig, Softmax, Threshold, TopK, TopP, Tsallis

RouterInput = tuple[Router, Tensor, int | None]  # a router, its input (T, D), the number of its decoder layer
Earlier = list[tuple[float, Tensor]]  # for each router the tokens of earlier micro-batches and the sum of their F


class Decision(NamedTuple):
    """What a router makes of T tokens, in fp64.

    Attributes:
        gates: (T, G).
        load: (T, G), what F is the mean of.
        probability: (T, G), what P is the mean of.
        logits: (T, G).
        input_weight: (T, 1), how much of its own input an FFN mixture returns beside its experts.
        entropy: (T,), what the entropy loss is the mean of.
    """

    gates: Tensor
    load: Tensor
    probability: Tensor
    logits: Tensor
    input_weight: Tensor | None = None
    entropy: Tensor | None = None


def gates(router: Router, x: Tensor, rows: int, mask: Tensor | None, training: bool) -> Tensor:
    """(T, G) gates of x (T, D); `mask` (T,) bool, True where a token counts."""
    return decide(router, x, rows, mask, training).gates


def decide(router: Router, x: Tensor, rows: int, mask: Tensor | None, training: bool) -> Decision:
    """Everything a router makes of x (T, D)."""
    return _RULES[type(router.config)](router, router.config, x.double(), rows, mask, training)


# -- the rules, one for each router ----------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x @ weight.double().T
    return out if bias is None else out + bias.double()


def _softmax(logits: Tensor) -> Tensor:
    exp = (logits - logits.detach().amax(1, keepdim=True)).exp()
    return exp / exp.sum(1, keepdim=True)


def _falling(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])


def _mark(values: Tensor, choose: Callable[[list[float]], Iterable[int]]) -> Tensor:
    """(T, G), one where `choose` takes an entry of a token's values."""
    marks = []
    for token in values.detach().tolist():
        chosen = set(choose(token))
        marks.append([float(i in chosen) for i in range(len(token))])
    return torch.tensor(marks, dtype=torch.float64)


def _probability_mass(values: list[float], top_p: float, keep: int, crossing: bool) -> list[int]:
    kept, mass = [], 0.0
    for position, i in enumerate(_falling(values)):
        before, mass = mass, mass + values[i]
        if position < keep or (before if crossing else mass) <= top_p:
            kept.append(i)
    return kept


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(1, keepdim=True)


def _top_k(router: Any, config: TopK, x: Tensor, rows: int, mask: Tensor | None, training: bool) -> Decision:
    logits = _linear(x, router.weight, router.bias)
    p = _softmax(logits)
    chosen = _mark(p, lambda values: _falling(values)[: config.top_k])
    full = _normalised(p * chosen) if config.norm_topk_prob else p * chosen
    if config.router_temperature != 1 and not training:
        full = _softmax((logits / config.router_temperature).masked_fill(chosen == 0, -math.inf))
    tokens, E = p.shape
    capacity = config.expert_capacity
    if config.capacity_factor is not None:
        capacity = math.ceil(config.capacity_factor * config.top_k * (tokens // rows) / E)
    if capacity is None or not training:
        return Decision(full, chosen, p, logits)
    kept = chosen.clone()
    for row in range(rows):
        taken = [0] * E
        for t in range(row * tokens // rows, (row + 1) * tokens // rows):
            counts = mask is None or config.count_padding or bool(mask[t])
            for e in range(E):
                if chosen[t, e] and taken[e] >= capacity:
                    kept[t, e] = 0
                taken[e] += int(counts and bool(chosen[t, e]))
    dropped = (full * (chosen - kept)).sum(1, keepdim=True) if config.dropped_tokens == "input" else None
    return Decision(full * kept, chosen, p, logits, dropped)


def _top_p(router: Any, config: TopP, x: Tensor, rows: int, mask: Tensor | None, training: bool) -> Decision:
    logits = _linear(x, router.weight, None)
    p = _softmax(logits)
    scaled = p / (config.temperature or 1.0)
    kept = _mark(scaled, lambda values: _probability_mass(values, config.top_p, 1, config.include_crossing))
    weights = scaled * kept
    return Decision(_normalised(weights) if config.norm_topk_prob else weights, kept, p, logits)


def _normalised_entropy(p: Tensor, config: Tsallis) -> Tensor:
    smoothed, q, E = p + config.entropy_eps, config.q, p.shape[1]
    if q == 1:
        return -(smoothed * smoothed.log()).sum(1) / math.log(E)
    if config.entropy == "renyi":
        return ((smoothed**q).sum(1) + 1e-10).log() / (1 - q) / math.log(E)
    largest = (1 - E ** (1 - q)) / (q - 1)
    return (1 - (smoothed**q).sum(1)) / (q - 1) / largest


def _tsallis(router: Any, config: Tsallis, x: Tensor, rows: int, mask: Tensor | None, training: bool) -> Decision:
    logits = _linear(x, router.weight, None)
    p = _softmax(logits)
    H = _normalised_entropy(p, config)
    sparse = _mark(
        p, lambda values: _probability_mass(values, config.top_p or 0.0, config.keep_top_k, config.include_crossing)
    )
    uncertain = (H.detach() > config.entropy_threshold) & (config.entropy_threshold < 1)
    soft = p * torch.where(uncertain.unsqueeze(1), 1.0, sparse)
    return Decision(_normalised(soft) if config.norm_topk_prob else soft, soft, p, logits, entropy=H)


def _rank_wise(router: Any, config: RankWise, x: Tensor, rows: int, mask: Tensor | None, training: bool) -> Decision:
    logits = _linear(x, router.weight, None)
    u = 1 / (1 + (-logits).exp())
    v = u + config.bias_update_rate * router.bias_steps.double()
    k = config.active_ranks // config.rank_partition
    chosen = _mark(v, lambda values: _falling(values)[:k])
    return Decision(k * _normalised((v if config.bias_in_gates else u) * chosen), chosen, u, logits)


def _threshold(router: Any, config: Threshold, x: Tensor, rows: int, mask: Tensor | None, training: bool) -> Decision:
    logits = _linear(x, router.weight, None)
    p = _softmax(logits)
    largest = config.max_threshold or 1 / p.shape[1]
    if config.adaptive:
        tau = largest / (1 + (-_linear(x, router.threshold_weight, router.threshold_bias)).exp())
        above = p - tau
        active = _mark(above, lambda values: [i for i, value in enumerate(values) if value >= 0])
    else:
        above = p
        active = _mark(p, lambda values: [i for i, value in enumerate(values) if value >= largest])
    weights = above * active
    total = weights.sum(1, keepdim=True)
    return Decision(weights / total.masked_fill(total == 0, 1.0), active, above, logits)


def _dense(router: Any, config: Softmax, x: Tensor, rows: int, mask: Tensor | None, training: bool) -> Decision:
    logits = _linear(x, router.weight, router.bias)
    temperature = router.log_temperature.double().exp() if config.learned_temperature else config.temperature
    p = _softmax(logits / temperature)
    return Decision(p, _mark(p, lambda values: _falling(values)[:1]), p, logits)


def _centroid(router: Any, config: Centroid, x: Tensor, rows: int, mask: Tensor | None, training: bool) -> Decision:
    x, centroids = x.detach(), router.centroids.double()
    similarity = torch.stack(
        [torch.stack([(q @ c) / (q.norm() * c.norm()).clamp(min=1e-6) for c in centroids]) for q in x]
    )
    scaled = similarity.clone()
    for t in range(len(x)):
        scaled[t, int(similarity[t].argmax())] *= config.temperature
    weights = _softmax(scaled)
    if config.top_k is not None:
        weights = _normalised(weights * _mark(weights, lambda values: _falling(values)[: config.top_k]))
    return Decision(weights, (weights > 0).double(), _softmax(similarity), similarity)


def _arrow(router: Any, config: Arrow, x: Tensor, rows: int, mask: Tensor | None, training: bool) -> Decision:
    scores = (x @ router.vectors.double().T).abs() / config.router_temperature
    chosen = _mark(scores, lambda values: _falling(values)[: config.top_k])
    return Decision(_normalised(_softmax(scores) * chosen), chosen, _softmax(scores), scores)


_RULES: dict[type[RouterConfig], Callable[..., Decision]] = {
    TopK: _top_k,
    TopP: _top_p,
    Tsallis: _tsallis,
    RankWise: _rank_wise,
    Threshold: _threshold,
    Softmax: _dense,
    Centroid: _centroid,
    Arrow: _arrow,
}


# -- the losses ------------------------------------------------------------------------------------------------------


def loss(
    config: Any,
    inputs: Sequence[RouterInput],
    mask: Tensor | None,
    rows: int,
    task_labels: Tensor | None = None,
    earlier: Earlier | None = None,
) -> Tensor:
    """All router losses of one micro-batch, 0-dim.

    Args:
        mask: (rows, length) or (T,), nonzero where a token counts; None: all do.
        task_labels: (rows,) or (rows, length), negative where there is none.
        earlier: what `loads` gave for the micro-batches of this step before this one; F is then over all of them.
    """
    counted = None if mask is None else mask.flatten().bool()
    if isinstance(config, (RankWise, Centroid, Arrow)):
        return torch.zeros((), dtype=torch.float64)
    made = [decide(router, x, rows, counted, True) for router, x, _ in inputs]
    over = None if config.count_padding else counted
    total = config.router_aux_loss_coef * _balance(config, inputs, made, over, rows, earlier)
    if isinstance(config, TopK):
        total = total + config.router_z_loss_coef * _mean([_tokens(d.logits.logsumexp(1) ** 2, over) for d in made])
        if config.task_loss_coef:
            labels = _each_token(task_labels, rows, len(inputs[0][1]))
            total = total + config.task_loss_coef * _mean([_task_loss(config, d, labels, counted, rows) for d in made])
    if isinstance(config, Tsallis):
        entropy_over = None if config.entropy_over_padding else over
        total = total + config.entropy_loss_coef * _mean([_tokens(d.entropy, entropy_over) for d in made])
    if isinstance(config, Softmax):
        if config.log_balance_coef:
            P = _mean([_tokens(d.gates, over) for d in made])
            total = total - config.log_balance_coef * P.log().sum()
        if config.localized_balance_coef:
            labels = _each_token(task_labels, rows, len(inputs[0][1])).view(rows, -1)
            types = [next(n for n in row if n >= 0) for row in labels.tolist()]
            for d in made:
                total = total + config.localized_balance_coef * _localised(config, d, types, over, rows)
    return total


def loads(
    config: Any, inputs: Sequence[RouterInput], mask: Tensor | None, rows: int, earlier: Earlier | None
) -> Earlier:
    """For each router the tokens of this micro-batch and of `earlier`, and the sum of what F is the mean of."""
    counted = None if mask is None or config.count_padding else mask.flatten().bool()
    found = []
    for i, (router, x, _) in enumerate(inputs):
        load = decide(router, x, rows, None if mask is None else mask.flatten().bool(), True).load.detach()
        load = load if counted is None else load[counted]
        tokens, total = earlier[i] if earlier else (0.0, 0.0)
        found.append((tokens + len(load), total + load.sum(0)))
    return found


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)


def _tokens(values: Tensor | None, over: Tensor | None) -> Tensor:
    """The mean over tokens that count."""
    assert values is not None
    return values.mean(0) if over is None else values[over].mean(0)


def _each_token(labels: Tensor | None, rows: int, tokens: int) -> Tensor:
    assert labels is not None
    return labels.repeat_interleave(tokens // rows) if labels.dim() == 1 else labels.flatten()


def _balance(
    config: Any,
    inputs: Sequence[RouterInput],
    made: Sequence[Decision],
    over: Tensor | None,
    rows: int,
    earlier: Earlier | None,
) -> Tensor:
    """The balance loss without its coefficient: E sum_i F_i P_i for each pool of routers."""
    pools: dict[object, list[int]] = {}
    for i, (_, _, layer) in enumerate(inputs):
        pools.setdefault({"model": 0, "layer": layer, "router": i}[config.balance_pool], []).append(i)
    length = len(inputs[0][1]) // rows
    samples = [slice(b * length, (b + 1) * length) for b in range(rows)]
    if config.balance_over != "sample":
        samples = [slice(None)]
    terms = []
    for members in pools.values():
        values = []
        for sample in samples:
            part = None if over is None else over[sample]
            P = _mean([_tokens(made[i].probability[sample], part) for i in members])
            F = _mean([_load(config, made[i], sample, part, earlier[i] if earlier else None) for i in members])
            values.append(P.shape[0] * (F * P).sum())
        terms.append(_mean(values))
    return _mean(terms) if config.balance_reduction == "mean" else torch.stack(terms).sum()


def _load(
    config: Any, made: Decision, sample: slice, part: Tensor | None, earlier: tuple[float, Tensor] | None
) -> Tensor:
    load = made.load[sample] if part is None else made.load[sample][part]
    load = load if isinstance(config, Tsallis) else load.detach()
    tokens, total = earlier or (0.0, 0.0)
    return (total + load.sum(0)) / (tokens + len(load))


def _task_loss(config: TopK, made: Decision, labels: Tensor, counted: Tensor | None, rows: int) -> Tensor:
    """The gate of each token that counts learns its task or, shifted, that of the token after it in its row."""
    log_p = made.logits - made.logits.logsumexp(1, keepdim=True)
    counts = [True] * len(labels) if counted is None else counted.tolist()
    length = len(labels) // rows
    terms = []
    for t in range(len(labels)):
        target = t + 1 if config.shift_task_labels else t
        if counts[t] and target // length == t // length and counts[target] and labels[target] >= 0:
            terms.append(-log_p[t, labels[target]])
    return torch.stack(terms).mean()


def _localised(config: Softmax, made: Decision, types: list[int], over: Tensor | None, rows: int) -> Tensor:
    """The variance of Q' over rows and experts, over its squared mean."""
    E = made.gates.shape[1]
    gates = made.gates if over is None else made.gates * over.unsqueeze(1)
    Q = []
    for row, task_type in zip(gates.unflatten(0, (rows, -1)), types, strict=True):
        own = range(E // 2) if task_type == 1 else range(E // 2, E)
        for e in range(E):
            delta = config.localized_balance_delta * (1 if e in own else -1)
            Q.append(row[:, e].sum() * (1 + delta))
    values = torch.stack(Q)
    mean = values.sum() / len(Q)
    return ((values - mean) ** 2).sum() / (len(Q) - 1) / (mean**2 + 1e-10)


# -- what moves without a gradient, and what a rounding error can flip -------------------------------------------------


def chosen_counts(router: Router, x: Tensor, mask: Tensor | None) -> Tensor:
    """(G,) int64, how many tokens that count choose each gate."""
    chosen = decide(router, x, 1, None, False).load
    return (chosen if mask is None else chosen[mask.flatten().bool()]).sum(0).long()


def bias_step(counts: Tensor) -> Tensor:
    """(G,) the signs by which rank-wise routing moves its bias: up where a rank was chosen less than the mean."""
    mean = float(counts.sum()) / len(counts)
    return torch.tensor([(mean > c) - (mean < c) for c in counts.tolist()], dtype=torch.int32)


def margin(router: Any, x: Tensor) -> Tensor:
    """(T,) how far each token is from another selection, in the values that are compared; inf where nothing is."""
    config, made = router.config, decide(router, x, 1, None, False)
    if isinstance(config, TopK):
        return _gap(made.logits, config.top_k)
    if isinstance(config, RankWise):
        v = made.probability + config.bias_update_rate * router.bias_steps.double()
        return _gap(v, config.active_ranks // config.rank_partition)
    if isinstance(config, Arrow):
        return _gap(made.logits, config.top_k)
    if isinstance(config, Centroid):
        return _gap(made.logits, 1)
    if isinstance(config, Threshold):
        total = (made.probability * made.load).sum(1)  # near zero its normalisation blows rounding up
        return torch.minimum(total, torch.full_like(total, math.inf) if config.adaptive else _edge(made, config))
    if isinstance(config, (TopP, Tsallis)):
        p = made.probability.sort(1, descending=True).values
        edges = [(p.cumsum(1)[:, :-1] - (config.top_p or 0.0)).abs().amin(1), (p[:, :-1] - p[:, 1:]).amin(1)]
        if isinstance(config, Tsallis):
            assert made.entropy is not None
            edges.append((made.entropy - config.entropy_threshold).abs())
        return torch.stack(edges).amin(0)
    return torch.full((len(x),), math.inf, dtype=torch.float64)


def _gap(values: Tensor, k: int) -> Tensor:
    if k >= values.shape[1]:
        return torch.full(values.shape[:1], math.inf, dtype=values.dtype)
    top = values.sort(1, descending=True).values
    return top[:, k - 1] - top[:, k]


def _edge(made: Decision, config: Threshold) -> Tensor:
    return (made.probability - (config.max_threshold or 1 / made.gates.shape[1])).abs().amin(1)
