"""Losses of the routers, their gradients, entropies and bias updates against the authors' own code.

Most recorded runs start from logits. Here they enter as the input of linears whose router weight is the unit matrix, so
that the losses run through everything a trained model has: statistics, pooling over routers, the backward of `attach`.

Legend: E experts, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_oracles import CASES, Mixture, assert_recorded, error, recorded
from torch import Tensor, nn

from molora import MoloraConfig, router_losses
from molora.context import runtime_of
from molora.routers import TopP, router_config
from molora.routers.base import split_statistics
from molora.routers.tsallis import renyi_entropy, tsallis_entropy

# Largest errors of a value, and of gradients over their largest entry. The recorded files allow 1e-7 to 1e-5 for fp64
# runs, whose official counts are fp32, and 1e-5 to 2e-5 for fp32 runs, over one instead of over an entry below it.
FP64 = {"value": 1e-7, "grad": 1e-6}  # measured 6.9e-8 and 3.7e-7
FP32 = {"value": 1e-6, "grad": 4e-6}  # measured 1.4e-7 and 1.5e-6
EXACT = 1e-14  # fp64 runs without an official fp32: measured 2.2e-16
ENTROPY = 2e-7  # of fp32 entropies; measured 6.7e-8, allowed 2e-5
BIAS = 1e-7  # the official update is fp32: measured 2.5e-8 of a bias of 1e-5, allowed 1e-8 over one


class RoutedLogits(nn.Module):
    """A base model whose linears each read logits of their own: `layers` holds how many experts each linear has."""

    def __init__(self, layers: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({f"proj{i}": nn.Linear(E, 1) for i, E in enumerate(layer)}) for layer in layers
        )

    def forward(self, logits: Sequence[Tensor], attention_mask: Tensor | None = None) -> Tensor:
        linears = [linear for layer in self.layers for linear in layer.values()]
        return sum(linear(x).sum() for linear, x in zip(linears, logits, strict=True))


def mixture(layers: Sequence[Sequence[int]], router: dict[str, Any], dtype: torch.dtype) -> PeftModel:
    counts = [layer[0] for layer in layers]
    experts = counts[0] if len(set(counts)) == 1 else counts
    config = MoloraConfig(task_type=None, num_experts=experts, r=1, target_modules="all-linear", router=router)
    model = get_peft_model(RoutedLogits(layers), config).to(dtype).train()
    with torch.no_grad():
        for site in runtime_of(model).sites:
            site.router.weight.copy_(torch.eye(site.router.num_gates))
    return model


def losses(
    logits: Sequence[Tensor], router: dict[str, Any], layers: Sequence[Sequence[int]] | None = None, **inputs: Any
) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients of the router losses of a model whose routers have these logits, each (rows, length, E)."""
    logits = [x.clone().requires_grad_() for x in logits]
    model = mixture(layers or [[x.shape[-1]] for x in logits], router, logits[0].dtype)
    with model.aux_weight(1.0):
        out = model(logits, **inputs)
    grads = torch.autograd.grad(0 * out, logits)
    return router_losses(model)["default"], list(grads)


def by_layer(logits: Tensor, mask: Tensor, layers: int) -> list[Tensor]:
    """Recorded rows are layer-major, then batch, then position."""
    return list(logits.view(layers, *mask.shape, -1))


# -- balance, entropy and z-losses of logits --------------------------------------------------------------------------

_BALANCE = {"router_aux_loss_coef": 1.0}
_SWITCH = {"top_k": 1, "norm_topk_prob": False, "count_padding": True}
MIXLORA = {
    "balance_mask": _BALANCE,
    "balance_nomask": _BALANCE | {"count_padding": True},
    "dynamic_topp0.8": _BALANCE | {"name": "top_p", "top_p": 0.8, "count_padding": True},
    "switch_balance": _BALANCE | _SWITCH,
    "switch_z": _SWITCH | {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 1.0},
}


@pytest.mark.parametrize("loss", MIXLORA)
def test_mixlora_losses(loss: str) -> None:
    """Only the top-k loss leaves padding out; the others get the mask and ignore it, which `count_padding` is for."""
    run, hyper = recorded("mixlora_aux_loss")
    logits = by_layer(run["logits"], run["attn_mask"], hyper["layers"])
    value, grads = losses(logits, MIXLORA[loss], attention_mask=run["attn_mask"])
    assert_recorded(value, run[f"loss_{loss}"], FP64["value"])
    assert_recorded(torch.cat(grads).view(-1, hyper["E"]), run[f"grad_loss_{loss}"], FP64["grad"])
    if loss != "balance_nomask":
        without, _ = losses(logits, MIXLORA[loss])
        assert (error(without, value) == 0) == (loss != "balance_mask")


@pytest.mark.parametrize("key", ["topp", "topp_T05"])
def test_mixlora_top_p_selection(key: str) -> None:
    run, hyper = recorded("mixlora_aux_loss")
    router = TopP(top_p=hyper["top_p"], temperature=0.5 if key == "topp_T05" else None).build(4, hyper["E"]).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
        gates = router(run["logits"]).gates
    ids, values = run[f"{key}_sorted_idx"], run[f"{key}_sorted_gate"]
    want = torch.zeros(24, 5, dtype=torch.float64).scatter(1, ids % 5, values)[:, :4]  # -1, not chosen, goes to the end
    assert torch.equal(gates != 0, want != 0)
    assert_recorded(gates, want, 1e-15)


DYNMOLE = {
    f"{kind}_{mask}": {"entropy_loss_coef": c_dyn, "router_aux_loss_coef": c_aux, "entropy": entropy}
    for kind, c_dyn, c_aux, entropy in (
        ("entropy", 1.0, 0.0, "tsallis"),
        ("balance", 0.0, 1.0, "tsallis"),
        ("total", 1e-2, 1e-3, "tsallis"),
        ("total_renyi", 1e-2, 1e-3, "renyi"),
    )
    for mask in ("mask", "nomask")
    if kind != "total_renyi" or mask == "mask"
}


@pytest.mark.parametrize("loss", DYNMOLE)
def test_dynmole_losses(loss: str) -> None:
    """As released, the entropy is that of all tokens, padding included, while F and P leave padding out."""
    run, hyper = recorded("dynmole_loss")
    own = {"q": hyper["q"], "entropy_threshold": hyper["threshold"], "top_p": hyper["top_p"]}
    own |= {"keep_top_k": hyper["keep_top_k"], "entropy_eps": hyper["eps"], "entropy_over_padding": True}
    inputs = {} if loss.endswith("nomask") else {"attention_mask": run["attn_mask"]}
    logits = by_layer(run["logits"], run["attn_mask"], hyper["layers"])
    options = {"name": "tsallis", **own, **DYNMOLE[loss]}
    value, grads = losses(logits, options, **inputs)
    assert_recorded(value, run[f"loss_{loss}"], FP32["value"])
    assert_recorded(torch.cat(grads).view(-1, hyper["E"]), run[f"grad_loss_{loss}"], FP32["grad"])
    if loss == "entropy_mask":
        without, _ = losses(logits, options | {"entropy_over_padding": False}, **inputs)
        keep = run["attn_mask"].bool().repeat(hyper["layers"], 1).flatten()
        assert_recorded(without, run["entropy"][keep].mean(), FP32["value"])
        assert error(without, value) > 1e-3


def test_dynmole_gates_and_entropies_of_the_loss_run() -> None:
    run, hyper = recorded("dynmole_loss")
    options = {"q": hyper["q"], "entropy_threshold": hyper["threshold"], "top_p": hyper["top_p"]}
    router = router_config({"name": "tsallis", **options}).build(hyper["E"], hyper["E"], 1)
    with torch.no_grad():
        router.weight.copy_(torch.eye(hyper["E"]))
        gates = router(run["logits"]).gates
    assert torch.equal(gates != 0, run["gates"] != 0)
    assert_recorded(gates, run["gates"], ENTROPY)  # measured 0
    assert_recorded(tsallis_entropy(run["logits"].softmax(1), hyper["q"], hyper["eps"]), run["entropy"], ENTROPY)


@pytest.mark.parametrize("E", [4, 6, 8])
@pytest.mark.parametrize("q", [0.5, 1.0, 1.1, 1.5, 2.0])
def test_entropies_equal_the_official_code(q: float, E: int) -> None:
    run, hyper = recorded("dynmole_entropy")
    probs = run[f"probs_N{E}"]
    for kind, entropy in (("tsallis", tsallis_entropy), ("renyi", renyi_entropy)):
        for scale in ("norm", "raw"):
            got = entropy(probs, q, hyper["eps"], normalize=scale == "norm")
            assert_recorded(got, run[f"{kind}_q{q}_N{E}_{scale}"], ENTROPY, f"{kind} {scale}")
    if q == 1:
        assert_recorded(tsallis_entropy(probs, 1, hyper["eps"]), run[f"shannon_N{E}_norm"], ENTROPY)


@pytest.mark.parametrize(
    ("E", "uniform", "two", "peaked", "largest", "one_hot"),
    [(6, 0.9997, 0.408, 0.255, 1.6404, -1.6e-4), (8, 0.9996, 0.356, 0.234, 1.8775, -1.8e-4)],
)
def test_entropies_of_the_specification(
    E: int, uniform: float, two: float, peaked: float, largest: float, one_hot: float
) -> None:
    """Of a uniform p, of two equal experts, of p_1 = .9 with the rest equal, and the maximum; q = 1.1, eps = 1e-5."""
    p = torch.zeros(4, E, dtype=torch.float64)
    p[0], p[1, :2], p[2], p[3, 0] = 1 / E, 0.5, 0.1 / (E - 1), 1.0
    p[2, 0] = 0.9
    normal = tsallis_entropy(p, 1.1)
    for got, want, digits in zip(normal, (uniform, two, peaked, one_hot), (4, 3, 3, 5), strict=True):
        assert round(float(got), digits) == want
    assert round(float(tsallis_entropy(p[:1], 1.1, eps=0.0, normalize=False)), 4) == largest
    assert abs(float(tsallis_entropy(p[:1], 1.1, eps=0.0)) - 1) < 1e-14


# -- MoLA, MeteoRA, LLaVA-MoLE ---------------------------------------------------------------------------------------


def test_mola_balances_each_decoder_layer() -> None:
    """One pool for the seven projections of a layer, summed over layers; the official F is divided by k, which is the
    coefficient here. The recorded layers differ in k, so those of one k are one model."""
    run, hyper = recorded("mola_balance_loss")
    total = torch.zeros((), dtype=torch.float64)
    for k in (1, 2):
        numbers = [i for i, own in enumerate(hyper["top_k"]) if own == k]
        layers = [[hyper["experts"][i]] * 7 for i in numbers]
        logits = [x for i in numbers for x in run[f"logits_{i}"].view(7, 2, 6, -1)]
        pool = {"balance_pool": "layer", "balance_reduction": "sum", "count_padding": True}
        router = {"top_k": k, "router_aux_loss_coef": 1 / k, **pool}
        value, grads = losses(logits, router, layers, attention_mask=torch.ones(2, 6))
        total += value
        for i, grad in zip(numbers, (grads[7 * n : 7 * n + 7] for n in range(len(numbers))), strict=True):
            assert_recorded(torch.stack(grad).view_as(run[f"logits_{i}"]), run[f"grad_logits_{i}"], FP64["grad"])
    assert_recorded(total, run["loss_balance"], FP64["value"])


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_meteora_gate_loss(scale: float) -> None:
    """The gate at t learns the task of token t + 1; padding and the last position have none."""
    run, _ = recorded("meteora_gate_loss")
    router = {"top_k": 2, "router_aux_loss_coef": 0.0, "task_loss_coef": scale}
    inputs = {"attention_mask": run["attn_mask"], "task_labels": run["task_label"]}
    value, grads = losses(list(run["logits"]), router, [[5] * 7] * 2, **inputs)
    assert_recorded(value, scale * run["loss_gate"], FP32["value"])
    assert_recorded(torch.stack(grads), scale * run["grad_loss_gate"], FP32["grad"])
    unshifted, _ = losses(list(run["logits"]), router | {"shift_task_labels": False}, [[5] * 7] * 2, **inputs)
    assert error(unshifted, value) > 1e-3  # the recorded rows change their task within


@pytest.mark.parametrize(
    ("name", "router"),
    [("llavamole_sparse", {"top_k": 1, "bias": True}), ("llavamole_dense", {"name": "softmax", "bias": True})],
)
def test_llava_mole_balances_each_sample(name: str, router: dict[str, Any]) -> None:
    """Recorded from probabilities p, which are the softmax of ln p; the official loss has no factor E."""
    run, hyper = recorded(name)
    probs = run["balance_probs"]
    own = {"router_aux_loss_coef": 1 / hyper["E"], "balance_over": "sample", "balance_pool": "model"}
    value, grads = losses(list(probs.log()), router | own, attention_mask=run["attn_mask"])
    assert_recorded(value, run["loss_balance"], EXACT)
    outer = run["grad_balance_probs"]
    want = probs * (outer - (probs * outer).sum(-1, keepdim=True))  # d loss / d ln p
    assert_recorded(torch.stack(grads), want, EXACT)
    if name == "llavamole_sparse":  # F is that of all tokens together: another loss
        pooled, _ = losses(list(probs.log()), router | own | {"balance_over": "micro"}, attention_mask=run["attn_mask"])
        assert error(pooled, value) > 1e-3


# -- losses of whole modules, and biases -----------------------------------------------------------------------------

_SUMMED = {"balance_pool": "router", "balance_reduction": "sum", "count_padding": True}


def module_losses(name: str, **router: Any) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """(the recorded run, value, gradients) of the router losses of a recorded module."""
    run, hyper = recorded(name)
    mixture = Mixture(run, hyper, CASES[name], **router)
    inputs: dict[str, Any] = {"attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    if "task_types" in run:
        inputs["task_labels"] = run["task_types"]
    with mixture.model.aux_weight(1.0):
        y = mixture.model(mixture.x, **inputs)
    grads = mixture.grads(0 * y.sum())
    return run, router_losses(mixture.model)["default"], grads


def assert_module_losses(run: dict[str, Tensor], loss: str, value: Tensor, grads: dict[str, Tensor]) -> None:
    assert_recorded(value, run[f"loss_{loss}"], FP64["value"])
    for name, grad in grads.items():
        want = run.get(f"grad_{loss}_{name}")
        assert (want is None) == (name in "AB")
        assert_recorded(grad, torch.zeros_like(grad) if want is None else want, FP64["grad"], name)


@pytest.mark.parametrize("name", ["adamole_adaptive", "adamole_threshold", "adamole_topk2"])
def test_adamole_losses(name: str) -> None:
    """For each router by itself, summed, padding counted, with p - tau for P where the threshold is learned."""
    run, value, grads = module_losses(name, router_aux_loss_coef=1.0, **_SUMMED)
    assert_module_losses(run, "aux", value, grads)
    _, masked, _ = module_losses(name, router_aux_loss_coef=1.0, **_SUMMED | {"count_padding": False})
    assert error(masked, value) > 1e-4


def test_loramoe_localized_balance() -> None:
    run, hyper = recorded("loramoe_dense")
    own = {"localized_balance_coef": hyper["blc_weight"], "localized_balance_delta": hyper["blc_alpha"]}
    run, value, grads = module_losses("loramoe_dense", **own, count_padding=True)
    assert_module_losses(run, "balance", value, grads)


SMORA = [
    "smora_dense_eval",
    "smora_sparse_eval",
    "smora_dense_train_bias_update",
    "smora_dense_train_bias_update_nonzero",
    "smora_dense_train_partition2",
]


@pytest.mark.parametrize("name", SMORA)
def test_smora_moves_its_bias_in_each_training_forward(name: str) -> None:
    """After its use in that forward, by the counts of all tokens; not outside training."""
    run, hyper = recorded(name)
    mixture = Mixture(run, hyper, CASES[name])
    mixture.model(mixture.x, attention_mask=torch.zeros(2, 6))  # padding counts
    assert_recorded(mixture.bias(), run["route_bias_after"], BIAS)
    steps = (run["route_bias_after"] - run["route_bias_before"]) / hyper["bias_update_rate"]
    assert bool(steps.any()) == hyper["training"]
    if hyper["training"]:
        assert torch.equal(steps.round(), torch.sign(run["counts"].mean() - run["counts"]))


@pytest.mark.parametrize(("micro_batches", "padding"), [(1, 0), (3, 0), (2, 5)])
@pytest.mark.parametrize("name", [name for name in SMORA if "train" in name])
def test_smora_moves_its_bias_once_for_each_step(name: str, micro_batches: int, padding: int) -> None:
    """The counter takes the official sign rule once for all micro-batches of an optimiser step, without padding."""
    run, hyper = recorded(name)
    mixture = Mixture(run, hyper, CASES[name], bias_update="step")
    before = mixture.router.bias_steps.clone()
    mask = torch.ones(2, 6)
    mask[1, 6 - padding :] = 0
    for _ in range(micro_batches):
        with mixture.model.aux_weight(1.0):
            mixture.model(mixture.x, attention_mask=mask).sum().backward()
        assert torch.equal(mixture.router.bias_steps, before)
    torch.optim.SGD([p for p in mixture.model.parameters() if p.requires_grad], lr=0.0).step()
    chosen = run["topk_idx"][mask.flatten().bool()]
    counts = torch.bincount(chosen.flatten(), minlength=hyper["R"])[:: hyper["rank_partition"]].double()
    moved = (mixture.router.bias_steps - before).double()
    assert moved.any() and (moved - torch.sign(counts.mean() - counts)).abs().max() < 1e-9
    common, _ = split_statistics(runtime_of(mixture.model).last.stats[0], mixture.router.num_gates)
    assert torch.equal((common["load"] * common["tokens"]).round(), counts)
    if not padding:
        assert torch.equal(counts, run["counts"][:: hyper["rank_partition"]])
        assert_recorded(mixture.bias(), run["route_bias_after"], BIAS)
