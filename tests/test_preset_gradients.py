"""Every preset's gradients against its loss written by hand: checkpointing, trainers, windows of micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from gradients import (
    CHECKPOINTING,
    VOCAB,
    Batch,
    Gradients,
    assert_gates,
    hand_written,
    micro_batches,
    relative_error,
    router_inputs,
    take_gradients,
    tiny_llama,
    token_weights,
    trainer_gradients,
    use_checkpointing,
)
from router_formulas import RouterInput, bias_step, chosen_counts
from router_formulas import loss as written_loss
from tiny_models import PRESETS_THAT_TRAIN, preset_config, preset_model
from torch import Tensor, nn

from molora import end_step
from molora.context import runtime_of
from molora.routers import RankWise, SiteStats, Tokens, router_config
from molora.routers.base import split_statistics

EXACT = 1e-5  # relative, per parameter, fp32

pytestmark = pytest.mark.filterwarnings("error:.*not the model's own")


def num_tasks(name: str) -> int:
    """How many task labels this preset's losses tell apart; 0: they need none."""
    return preset_config(name).router.task_labels(4)


def task_batches(name: str, count: int, by_token: bool = False, seed: int = 5) -> list[Batch]:
    """Micro-batches, padded on the right `by_token`, else on the left; with the tasks of tokens or of rows, where the
    preset wants them. Padding holds tokens like any other, because the embedding of the padding token is zero, and a
    zero ties all experts; so does the attention of a token that may attend to nothing, hence right padding where it
    counts."""
    batches = micro_batches(count, "right" if by_token else "left", seed)
    tasks = num_tasks(name)
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        rows, length = batch["input_ids"].shape
        other = torch.randint(3, VOCAB, (rows, length), generator=generator)
        batch["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], other)
        if not tasks:
            continue
        labels = torch.randint(tasks, (rows,), generator=generator)
        if by_token:
            labels = labels.unsqueeze(1).repeat(1, length)
            if tasks > 2:  # tasks meet within a row, and some tokens have none
                labels[:, length // 2 :] = (labels[:, :1] + 1) % tasks
                labels[:, length - 2] = -100
        batch["task_labels"] = labels
    return batches


def rank_counts(model: nn.Module, batches: Sequence[Batch]) -> list[tuple[Any, Tensor]]:
    """(router, how many tokens without padding choose each of its ranks) over the micro-batches."""
    counts: dict[int, tuple[Any, Tensor]] = {}
    model.eval()
    for batch in batches:
        with torch.no_grad(), router_inputs(model, hooks=True) as inputs:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for router, x, _ in inputs:
            found = chosen_counts(router, x, batch["attention_mask"])
            counts[id(router)] = (router, found + counts[id(router)][1] if id(router) in counts else found)
    model.train()
    return list(counts.values())


@cache
def oracle(name: str, by_token: bool) -> list[Gradients]:
    """The gradients of two steps over the same two micro-batches, written by hand; only a rank-wise bias moves in
    between."""
    batches = task_batches(name, 2, by_token)
    model = preset_model(name, tiny_llama())
    steps = [hand_written(model, batches, token_weights(batches))]
    if isinstance(preset_config(name).router, RankWise):
        for router, counts in rank_counts(model, batches):
            router.bias_steps += bias_step(counts)
    return [*steps, hand_written(model, batches, token_weights(batches))]


def numbers_together(grads: Gradients) -> Gradients:
    """Parameters of one number (a threshold's bias, a temperature) are compared over all routers at once: alone, one of
    them may be a sum that cancels, in which fp32 has no digits left."""
    single = [name for name in sorted(grads) if grads[name].numel() == 1]
    together = {name: grad for name, grad in grads.items() if name not in single}
    if single:
        together[single[0].rpartition(".")[2]] = torch.stack([grads[name].flatten() for name in single])
    return together


_KINDS = list(CHECKPOINTING)
MATRIX = [(name, "loop", kind) for name in PRESETS_THAT_TRAIN for kind in CHECKPOINTING]
MATRIX += [(name, "trainer", _KINDS[i % 3]) for i, name in enumerate(PRESETS_THAT_TRAIN)]
MATRIX += [(name, "sft", _KINDS[(i + 1) % 3]) for i, name in enumerate(PRESETS_THAT_TRAIN)]


@pytest.mark.parametrize("name, trainer, checkpointing", MATRIX)
def test_gradients_equal_the_hand_written_loss(
    name: str, trainer: str, checkpointing: str, record_property: pytest.RecordProperty
) -> None:
    by_token = trainer == "trainer" or checkpointing == "reentrant"
    want = oracle(name, by_token)
    batches = task_batches(name, 2, by_token)
    model = preset_model(name, tiny_llama())
    if trainer == "loop":
        use_checkpointing(model, checkpointing)
        steps = []
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        for _ in range(2):
            for batch, weight in zip(batches, token_weights(batches), strict=True):
                (model(**batch).loss * weight).backward()
            optimizer.step()
            steps.append(take_gradients(model))
    else:
        if trainer == "sft":
            pytest.importorskip("trl")
        steps = trainer_gradients(trainer, model, batches, checkpointing)
    errors = [relative_error(numbers_together(g), numbers_together(w)) for g, w in zip(steps, want, strict=True)]
    record_property("error", max(errors))
    print(f"{name} {trainer} {checkpointing}: {max(errors):.1e}")
    assert max(errors) <= EXACT


@pytest.mark.parametrize("name", PRESETS_THAT_TRAIN)
def test_the_oracle_sees_each_loss(name: str) -> None:
    """Without any one of them the matrix would fail by far."""
    batches = task_batches(name, 1)
    want = hand_written(preset_model(name, tiny_llama()), batches, [1.0])
    for key in [key for key, value in vars(preset_config(name).router).items() if key.endswith("_coef") and value]:
        without = hand_written(preset_model(name, tiny_llama(), router={key: 0.0}), batches, [1.0])
        assert relative_error(without, want, "router") > 1e-2, key


def exact_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over label tokens in the dtype of the logits; transformers' own rounds to fp32."""
    log_probs = logits[:, :-1].log_softmax(-1)
    keep = labels[:, 1:] != -100
    picked = log_probs.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(picked * keep).sum() / keep.sum()


@pytest.mark.parametrize("name", PRESETS_THAT_TRAIN)
def test_gradients_in_fp64(name: str) -> None:
    """With nothing lost to rounding: the router losses of the model and its own cross entropy, written out."""
    batches = task_batches(name, 2, seed=11)
    weights = [0.25, 0.75]
    want = hand_written(preset_model(name, tiny_llama()).double(), batches, weights, lm_loss=exact_cross_entropy)
    model = preset_model(name, tiny_llama()).double()
    for batch, weight in zip(batches, weights, strict=True):
        with model.aux_weight(weight):
            logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        (weight * exact_cross_entropy(logits, batch["labels"])).backward()
    error = relative_error(take_gradients(model), want)
    print(f"{name} fp64: {error:.1e}")
    assert error <= 1e-10


# -- single routers ----------------------------------------------------------------------------------------------------

# Points on the switches that no preset takes.
OPTIONS: dict[str, dict[str, Any]] = {
    "temperature of top-k": {"name": "top_k", "router_temperature": 15.0},
    "capacity factor": {"name": "top_k", "capacity_factor": 0.5, "count_padding": True},
    "one of one": {"name": "top_k", "top_k": 1, "bias": True, "balance_over": "sample"},
    "unshifted tasks": {"name": "top_k", "task_loss_coef": 2.0, "shift_task_labels": False},
    "nucleus": {"name": "top_p", "top_p": 0.5, "norm_topk_prob": True, "balance_pool": "layer"},
    "without the crossing expert": {"name": "top_p", "include_crossing": False, "balance_reduction": "sum"},
    "temperature of top-p": {"name": "top_p", "temperature": 1.5, "balance_pool": "router"},
    "Shannon": {"name": "tsallis", "q": 1.0, "entropy_loss_coef": 0.1, "entropy_over_padding": True},
    "Renyi": {"name": "tsallis", "entropy": "renyi", "q": 0.5, "include_crossing": True, "balance_over": "sample"},
    "always sparse": {"name": "tsallis", "entropy_threshold": 1.0, "top_p": None, "norm_topk_prob": True, "q": 2.0},
    "blocks of ranks": {"name": "rank_wise", "active_ranks": 4, "rank_partition": 2, "bias_update_rate": 0.01},
    "bias outside the gates": {"name": "rank_wise", "active_ranks": 3, "bias_in_gates": False},
    "fixed threshold": {"name": "threshold", "adaptive": False, "max_threshold": 0.3, "count_padding": True},
    "wide threshold": {"name": "threshold", "max_threshold": 0.9},
    "all dense losses": {
        "name": "softmax",
        "temperature": 2.0,
        "bias": True,
        "router_aux_loss_coef": 0.1,
        "log_balance_coef": 0.2,
        "localized_balance_coef": 0.3,
        "localized_balance_delta": 0.4,
        "count_padding": True,
    },
    "nearest centroids": {"name": "centroid", "top_k": 2, "temperature": 0.5},
}


def random_routers(options: dict[str, Any], count: int = 3) -> list[Any]:
    """Routers in fp64 for inputs of size 6, with four experts or eight ranks, none of their tensors at its start."""
    config = router_config(options if options["name"] in ("centroid", "arrow") else {"init_std": 0.7, **options})
    made: list[Any] = [config.build(6, 1 if options["name"] == "rank_wise" else 4, 8).double() for _ in range(count)]
    for router in made:
        for parameter in router.parameters():
            nn.init.normal_(parameter, std=0.7)
        if hasattr(router, "set_vectors"):
            router.set_vectors(torch.randn(4, 6))
        if hasattr(router, "bias_steps"):
            router.bias_steps.copy_(torch.randint(-9, 9, router.bias_steps.shape))
    return made


def losses(made: list[Any], inputs: list[RouterInput], tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
    """The value of the losses by the routers' own statistics, and its gradient for all their parameters."""
    stats = [split_statistics(r(x, tokens, True).stats, r.num_gates)[1] for r, x, _ in inputs]
    sites = [SiteStats(own.detach(), r.num_gates, layer) for own, (r, _, layer) in zip(stats, inputs, strict=True)]
    result = made[0].config.losses(sites)
    with_grad = [(s, g) for s, g in zip(stats, result.grads, strict=True) if s.requires_grad and s.numel()]
    parameters = [p for r in made for p in r.parameters()]
    if not with_grad:
        return result.value, [torch.zeros_like(p) for p in parameters]
    stats_, grads = zip(*with_grad, strict=True)
    found = torch.autograd.grad(stats_, parameters, grads, allow_unused=True)
    return result.value, [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.mark.parametrize("masked", [True, False], ids=["padding", "no padding"])
@pytest.mark.parametrize("what", OPTIONS)
def test_options_equal_the_formula(what: str, masked: bool) -> None:
    """Gates and losses of single routers, two in one decoder layer and one in another."""
    made = random_routers(OPTIONS[what])
    inputs: list[RouterInput] = [
        (r, torch.randn(14, 6, dtype=torch.float64), n) for r, n in zip(made, (0, 0, 1), strict=True)
    ]
    mask = torch.tensor([1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1]).bool() if masked else None
    rows_of = torch.tensor([1, 0]).repeat_interleave(7)
    labels = torch.randint(4, (14,)) if OPTIONS[what]["name"] == "top_k" else rows_of
    tokens = Tokens(2, mask, labels)
    for training in (True, False):
        for router, x, _ in inputs:
            assert_gates(router.train(training), x, tokens)
    value, grads = losses([r.train() for r in made], inputs, tokens)
    want = written_loss(made[0].config, inputs, mask, 2, labels.view(2, 7))
    assert abs(float(value - want)) < 1e-12 * max(1.0, abs(float(want)))
    parameters = [p for r in made for p in r.parameters()]
    expected = torch.autograd.grad(want, parameters, allow_unused=True) if want.requires_grad else [None] * len(grads)
    for got, written in zip(grads, expected, strict=True):
        assert torch.allclose(got, torch.zeros_like(got) if written is None else written, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PRESETS_THAT_TRAIN)
def test_gradcheck_of_gates_and_statistics(name: str) -> None:
    """In fp64, of the gates and of what the losses are made of, against finite differences."""
    config = preset_config(name).router
    (router,) = random_routers(config.to_dict(), 1)
    x = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 1, 1, 1, 1, 0, 1, 1, 1, 1]).bool()
    tokens = Tokens(2, mask, torch.tensor([1, 0]).repeat_interleave(5))
    names = [n for n, _ in router.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        routing = torch.func.functional_call(router, dict(zip(names, parameters, strict=True)), (x, tokens, True))
        own = split_statistics(routing.stats, router.num_gates)[1]
        return (routing.gates, own) if own.numel() else (routing.gates,)

    if name == "lora-tle":  # centroids are compared without a gradient
        assert not run(x)[0].requires_grad
        return
    assert torch.autograd.gradcheck(run, (x, *router.parameters()))


# -- balance_over: which tokens F is counted over ----------------------------------------------------------------------

BALANCED = [name for name in PRESETS_THAT_TRAIN if getattr(preset_config(name).router, "router_aux_loss_coef", 0)]


@pytest.mark.parametrize("count_padding", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant"])
@pytest.mark.parametrize("name", BALANCED)
def test_window_balance(name: str, checkpointing: str, count_padding: bool) -> None:
    """F over the micro-batches of the step so far, forgotten by the optimiser's step; P that of each micro-batch."""
    batches = task_batches(name, 3, by_token=count_padding, seed=7)
    router = {"balance_over": "window", "count_padding": count_padding}
    weights = token_weights(batches)
    want = hand_written(preset_model(name, tiny_llama(), router=router), batches, weights)
    alone = {**router, "balance_over": "micro"}
    micro = hand_written(preset_model(name, tiny_llama(), router=alone), batches, weights)
    assert relative_error(micro, want, "router") > 1e-4  # or the test would see nothing
    model = preset_model(name, tiny_llama(), router=router)
    use_checkpointing(model, checkpointing)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for _ in range(2):
        for batch, weight in zip(batches, weights, strict=True):
            (model(**batch).loss * weight).backward()
        optimizer.step()
        assert relative_error(numbers_together(take_gradients(model)), numbers_together(want)) <= EXACT


@pytest.mark.parametrize("name", BALANCED)
def test_balance_over_the_ranks_of_one_process_is_that_of_the_micro_batch(name: str) -> None:
    batches = task_batches(name, 2)
    micro = hand_written(preset_model(name, tiny_llama(), router={"balance_over": "micro"}), batches, [0.5, 0.5])
    model = preset_model(name, tiny_llama(), router={"balance_over": "ranks"})
    for batch in batches:
        (model(**batch).loss * 0.5).backward()
    assert relative_error(numbers_together(take_gradients(model)), numbers_together(micro)) <= EXACT


# -- the bias of rank-wise routing, which no gradient moves ------------------------------------------------------------


def bias_steps(model: nn.Module) -> list[Tensor]:
    return [site.router.bias_steps.clone() for site in runtime_of(model).sites]


def expected_bias(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """Where the biases must be after one optimiser step over these micro-batches."""
    return [router.bias_steps + bias_step(counts) for router, counts in rank_counts(model, batches)]


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_the_bias_moves_once_for_each_optimiser_step(checkpointing: str, optimizer: str) -> None:
    """By the choices of all its micro-batches, without padding, however often a forward is recomputed."""
    model = preset_model("smora", tiny_llama())
    use_checkpointing(model, checkpointing)
    trained = [p for p in model.parameters() if p.requires_grad]
    own = getattr(torch.optim, optimizer)(trained, lr=1e-2)
    other = torch.optim.SGD([nn.Parameter(torch.ones(1, requires_grad=True))], lr=1.0)
    other.param_groups[0]["params"][0].grad = torch.ones(1)
    for step in range(2):
        batches = task_batches("smora", 2, by_token=bool(step), seed=step)
        before, want = bias_steps(model), expected_bias(model, batches)
        for batch in batches:
            (model(**batch).loss * 0.5).backward()
            other.step()
            assert all(map(torch.equal, bias_steps(model), before))
        own.step()
        own.zero_grad()
        assert all(map(torch.equal, bias_steps(model), want))
        assert not all(map(torch.equal, want, before))
        own.step()  # a step without a micro-batch has nothing to move by
        assert all(map(torch.equal, bias_steps(model), want))


@pytest.mark.parametrize("how", [lambda model: None, end_step], ids=["nothing", "end_step"])
def test_a_step_by_hand(how: Any) -> None:
    model = preset_model("smora", tiny_llama())
    batches = task_batches("smora", 2)
    before, want = bias_steps(model), expected_bias(model, batches)
    for batch in batches:
        model(**batch).loss.backward()
    how(model)
    assert all(map(torch.equal, bias_steps(model), want if how is end_step else before))


def test_evaluation_and_forwards_without_backward_move_no_bias() -> None:
    model = preset_model("smora", tiny_llama())
    before = bias_steps(model)
    (batch,) = task_batches("smora", 1)
    model(**batch)
    with torch.no_grad():
        model(**batch)
        model.eval()(**batch)
    end_step(model)
    assert all(map(torch.equal, bias_steps(model), before))


def test_a_bias_that_moves_in_each_forward() -> None:
    """As released: padding counts, the forward uses the bias from before, and activation checkpointing is refused."""
    model = preset_model("smora", tiny_llama(), router={"bias_update": "forward"})
    (batch,) = task_batches("smora", 1, by_token=True)
    before = bias_steps(model)
    with torch.no_grad(), router_inputs(model, hooks=True) as inputs:
        model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    want = [router.bias_steps + bias_step(chosen_counts(router, x, None)) for router, x, _ in inputs]
    model.train()
    model(**batch).loss.backward()
    assert all(map(torch.equal, bias_steps(model), want)) and not all(map(torch.equal, want, before))
    end_step(model)
    assert all(map(torch.equal, bias_steps(model), want))
    use_checkpointing(model, "non-reentrant")
    message = (
        "bias_update='forward' moves the router's bias in each forward, and activation checkpointing runs forwards"
    )
    with pytest.raises(ValueError, match=message):
        model(**batch)
    assert all(map(torch.equal, bias_steps(model), want))
