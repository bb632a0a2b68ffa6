"""The modules that `get_peft_model` makes against inputs, outputs and gradients of the authors' own code.

The recorded runs are data that the repository does not carry; MOLORA_SHARED names the directory above them. Each holds
x, y, the weights, the gates, and the gradients of sum(y * grad_y).

Legend: E experts, r rank of one expert, D input features, O output features, T tokens, G gates.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlamaConfig, Phi3Config, PhiConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi.modeling_phi import PhiMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from molora import MoloraConfig, record_routing
from molora.layers import MoloraLayer
from molora.linear import MixedLinear
from molora.routers import Centroid
from molora.routers.centroid import cosine_similarities, largest_similarity_weights
from molora.routers.tsallis import renyi_entropy, tsallis_entropy

SHARED = Path(os.environ.get("MOLORA_SHARED") or Path(__file__).resolve().parents[2] / "shared")
KERNELS = ["reference", "dense_masked"]
# Errors as `error` measures them, the largest over all tensors and both kernels:
EXACT = 1e-14  # of fp64 runs 2.6e-15 (allowed: 1e-10)
ROUNDED = 1e-6  # of fp64 runs whose official router has an fp32 softmax 5.1e-7 (allowed: 3e-6 and 5e-6)
SINGLE = 2e-6  # of fp32 runs 1.3e-6 (allowed: 2e-5 to 1e-4)
ROUTER_NAMES = {
    "weight": "router",
    "bias": "router_bias",
    "threshold_weight": "thr_weight",
    "threshold_bias": "thr_bias",
}


def recorded(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the hyper-parameters of a recorded run; skips the test where the file is not there."""
    path = SHARED / "oracles" / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"no recorded run {name}: set MOLORA_SHARED to the directory that holds oracles/")
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["hyper"])  # noqa: SIM118


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference over the largest entry; over one where that is rounding of zero.

    For entries below one stricter than the measure of the recorded files, which then divides by one.
    """
    assert got.shape == want.shape
    largest = float(want.abs().max())
    return float((got.detach().double() - want.double()).abs().max()) / (largest if largest > 1e-6 else 1.0)


def assert_recorded(got: Tensor, want: Tensor, tolerance: float, what: str = "") -> None:
    assert error(got, want) <= tolerance, f"{what}: {error(got, want):.2e} > {tolerance:.0e}"


class OneModule(nn.Module):
    """A base model that is one module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"target": module})])

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layers[0]["target"](x)


class Case(NamedTuple):
    """How to configure a recorded run.

    Attributes:
        router: its options, from the hyper-parameters.
        tolerance: of y, the gates and all gradients, never above what the recorded files allow.
        options: further keys of MoloraConfig.
        training: whether the recorded forward is one of training.
    """

    router: Callable[[dict[str, Any]], dict[str, Any]]
    tolerance: float
    options: dict[str, Any] = {}
    training: bool = True


def _tsallis(hyper: dict[str, Any]) -> dict[str, Any]:
    keys = ("q", "top_p", "keep_top_k")
    own = {"entropy_threshold": hyper["threshold"], "entropy_eps": hyper["eps"], "entropy": hyper["entropy"]}
    return {"name": "tsallis", **{key: hyper[key] for key in keys}, **own}


def _rank_wise(hyper: dict[str, Any]) -> dict[str, Any]:
    own = {"active_ranks": hyper["activate_r"], "rank_partition": hyper["rank_partition"], "bias_update": "forward"}
    return {"name": "rank_wise", **own, "bias_update_rate": hyper["bias_update_rate"]}


def _top_k(hyper: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"top_k": hyper["top_k"], "router_temperature": hyper.get("T", 1) or 1, **options}


def _threshold(hyper: dict[str, Any], adaptive: bool) -> dict[str, Any]:
    return {"name": "threshold", "adaptive": adaptive, "max_threshold": hyper["max_threshold"], "count_padding": True}


def _fixed(hyper: dict[str, Any], **options: Any) -> dict[str, Any]:
    return options


_FFN = {"placement": "ffn"}
_DOWN_ONLY = _FFN | {"exclude_modules": ["gate_proj", "up_proj"]}
_TOP_P = partial(_fixed, name="top_p", top_p=0.8)
_SWITCH = partial(_fixed, top_k=1, norm_topk_prob=False, expert_capacity=2, dropped_tokens="input")
_SOFTMAX = partial(_fixed, name="softmax")

CASES: dict[str, Case] = {
    "dynmole_tsallis_q1.1": Case(_tsallis, SINGLE),
    "dynmole_tsallis_q1.1_keep1_topp0.6": Case(_tsallis, SINGLE),
    "dynmole_tsallis_bypass_thr1": Case(_tsallis, SINGLE),
    "dynmole_shannon_q1": Case(_tsallis, SINGLE),
    "dynmole_renyi_q2": Case(_tsallis, SINGLE),
    "smora_dense_eval": Case(_rank_wise, EXACT, training=False),
    "smora_sparse_eval": Case(_rank_wise, EXACT, training=False),
    "smora_dense_train_bias_update": Case(_rank_wise, EXACT),
    "smora_dense_train_bias_update_nonzero": Case(_rank_wise, EXACT),
    "smora_dense_train_partition2": Case(_rank_wise, EXACT),
    "meteora_bmm_eval_k1": Case(_top_k, SINGLE, training=False),
    "meteora_bmm_eval_k2_T1": Case(_top_k, SINGLE, training=False),
    "meteora_bmm_eval_k2_T20": Case(_top_k, SINGLE, training=False),
    "meteora_accel_loop_eval_k3_T15": Case(_top_k, ROUNDED, training=False),
    "meteora_loop_train_k1": Case(_top_k, ROUNDED),
    "meteora_loop_train_k2": Case(_top_k, ROUNDED),
    "mola_top2": Case(_top_k, ROUNDED),
    "adamole_adaptive": Case(partial(_threshold, adaptive=True), EXACT),
    "adamole_threshold": Case(partial(_threshold, adaptive=False), EXACT),
    "adamole_topk2": Case(_top_k, EXACT),
    "hydralora_dense": Case(_SOFTMAX, ROUNDED, {"share_A": True}),
    "loramoe_dense": Case(_SOFTMAX, ROUNDED),
    "llavamole_sparse": Case(partial(_fixed, top_k=1, bias=True), EXACT, _FFN),
    "llavamole_dense": Case(partial(_SOFTMAX, bias=True), EXACT, {"placement": "ffn_linear"}),
    "mixlora_llama_top2_f64": Case(_top_k, EXACT, _FFN),
    "mixlora_llama_top2_f32": Case(_top_k, SINGLE, _FFN),
    "mixlora_llama_top1_f64": Case(_top_k, EXACT, _FFN),
    "mixlora_llama_top2_downonly_f64": Case(_top_k, EXACT, _DOWN_ONLY),
    "mixlora_phi_top2_f64": Case(_top_k, EXACT, _FFN),
    "mixlora_phi3_top2_f64": Case(_top_k, EXACT, _FFN),
    "mixlora_topk_efficient_train": Case(_top_k, SINGLE, _FFN),
    "mixlora_dynamic_efficient_train": Case(_TOP_P, SINGLE, _FFN),
    "mixlora_dynamic_vanilla_train": Case(_TOP_P, SINGLE, _FFN),
    "mixlora_switch_vanilla_train": Case(_SWITCH, SINGLE, _FFN),
}


def base_module(run: dict[str, Tensor], hyper: dict[str, Any]) -> nn.Module:
    """The frozen module with the recorded weights: a linear, or an FFN of transformers."""
    if "W" in run:
        module: nn.Module = nn.Linear(run["W"].shape[1], run["W"].shape[0], bias="bias_W" in run)
        weights = {"weight": run["W"]} | ({"bias": run["bias_W"]} if "bias_W" in run else {})
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "hidden_act": hyper["act"]}
        kinds = {"llama": (LlamaMLP, LlamaConfig), "phi": (PhiMLP, PhiConfig), "phi3": (Phi3MLP, Phi3Config)}
        mlp, config = kinds[hyper.get("model_type", "llama")]
        module = mlp(config(**sizes, num_hidden_layers=1, pad_token_id=0))
        weights = {key: torch.zeros_like(value) for key, value in module.state_dict().items()}  # Phi's biases
        weights |= {f"{key[2:]}.weight": value for key, value in run.items() if key.startswith("W_")}
    module = module.to(run["x"].dtype)
    module.load_state_dict(weights)
    return module


class Mixture:
    """A recorded run as a PEFT model.

    Attributes:
        x: a copy of the recorded input, which takes a gradient.
        leaves: the trained parameters, and x, by their recorded names.
        factors: (E, 1, 1) what B is multiplied with, where the recorded experts have a scaling each; else one.
    """

    def __init__(self, run: dict[str, Tensor], hyper: dict[str, Any], case: Case, **router: Any) -> None:
        self.run = run
        experts = {
            "num_experts": 1 if "R" in hyper else hyper.get("E", hyper.get("L")),
            "r": hyper.get("R", hyper.get("r")),
        }
        config = MoloraConfig(
            task_type=None,
            target_modules=["target"],
            lora_alpha=hyper["alphas"][0] if "alphas" in hyper else hyper["alpha"],
            router=case.router(hyper) | router,
            **experts,
            **case.options,
        )
        self.model: PeftModel = get_peft_model(OneModule(base_module(run, hyper)), config).to(run["x"].dtype)
        self.model.train(case.training)
        self.layer = next(m for m in self.model.modules() if isinstance(m, MoloraLayer))
        self.router = self.layer.molora_router["default"]
        self.factors = run["scaling"].view(-1, 1, 1) / run["scaling"][0] if "scaling" in run else torch.ones(1)
        self.x = run["x"].clone().requires_grad_()
        self.leaves = {"x": self.x} | dict(self._experts())
        self.leaves |= {ROUTER_NAMES[name]: p for name, p in self.router.named_parameters()}
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                value = run[name]
                if name[0] == "B":  # recorded as (E, O, r)
                    value = (value * self.factors.to(value.dtype)).transpose(-1, -2)
                leaf.copy_(value.reshape(leaf.shape))
            if "route_bias_before" in run:
                steps = run["route_bias_before"][:: hyper["rank_partition"]] / hyper["bias_update_rate"]
                # Recorded biases that no update made are no multiple of the rate: a float stands in for the counter.
                self.router.bias_steps = steps if steps.any() else steps.to(torch.int32)
                assert error(self.bias(), run["route_bias_before"]) < 1e-15

    def _experts(self) -> Iterator[tuple[str, Tensor]]:
        children = {"": ""}
        if not isinstance(self.layer, MixedLinear):
            adapted = self.layer.molora_specs["default"]
            children = {f"_{part}": f"_{child}" for part, child in self.layer.structure.parts if f"_{part}" in adapted}
        for part, child in children.items():
            for matrix in "AB":
                yield f"{matrix}{child}", getattr(self.layer, f"molora_{matrix}{part}")["default"].weight

    def bias(self) -> Tensor:
        """The balancing bias of each rank, as it is recorded."""
        config = self.router.config
        return (config.bias_update_rate * self.router.bias_steps.double()).repeat_interleave(config.rank_partition)

    def grads(self, loss: Tensor) -> dict[str, Tensor]:
        """The gradients of `loss` in the recorded layout, zero where it does not depend on a leaf."""
        grads = torch.autograd.grad(loss, list(self.leaves.values()), materialize_grads=True)
        named = dict(zip(self.leaves, grads, strict=True))
        for name in named:
            if name[0] == "B":
                named[name] = named[name].transpose(-1, -2) * self.factors.to(grads[0].dtype)
            named[name] = named[name].reshape(self.run[name].shape)
        return named


def check(name: str, case: Case, kernel: str) -> dict[str, float]:
    """Compares a run with what was recorded, choices exactly; the error of each tensor."""
    run, hyper = recorded(name)
    mixture = Mixture(run, hyper, case)
    mixture.model.set_kernel(kernel)
    with record_routing(mixture.model) as routings, mixture.model.aux_weight(0.0):  # the gradients are those of y alone
        y = mixture.model(mixture.x)
    grads = mixture.grads((y * run["grad_y"]).sum())
    assert y.dtype == run["y"].dtype and all(grad.dtype == run["x"].dtype for grad in grads.values())
    # Every recorded gradient of y is compared; those of losses have a second part in their name.
    assert {f"grad_{leaf}" for leaf in grads} == {
        key for key in run if key.startswith("grad_") and key[5:] in run and key not in ("grad_y", "grad_balance_probs")
    }
    errors = {"y": error(y, run["y"])} | {leaf: error(grad, run[f"grad_{leaf}"]) for leaf, grad in grads.items()}
    (routing,) = routings.values()
    if "gates" in run:
        gates = routing.gates.repeat_interleave(hyper.get("rank_partition", 1), 1)
        assert torch.equal(gates != 0, run["gates"] != 0)
        errors["gates"] = error(gates, run["gates"])
    for key in ("topk_idx", "choice_idx"):
        if key in run and routing.topk_ids is not None:
            parts = hyper.get("rank_partition", 1)
            want = [{i // parts for i in ids} for ids in run[key].view(len(routing.gates), -1).tolist()]
            assert [set(ids) for ids in routing.topk_ids.tolist()] == want
    with torch.no_grad():
        logits = mixture.router.logits(run["x"].flatten(0, 1))
        probs, config = logits.softmax(1), mixture.router.config
        made = {"logits": logits, "probs": probs}
        if "scores" in run:
            made["scores"] = logits.sigmoid().repeat_interleave(config.rank_partition, 1)
        if "entropy" in run:
            entropy = {"tsallis": tsallis_entropy, "renyi": renyi_entropy}[config.entropy]
            made["entropy"] = entropy(probs, config.q, config.entropy_eps)
        errors |= {key: error(value, run[key]) for key, value in made.items() if key in run}
    for key in ("mask", "active"):
        if key in run:
            assert torch.equal(routing.gates != 0, run[key].bool())
    if "dense_token" in run:
        assert torch.equal((routing.gates != 0).all(1), run["dense_token"].bool())
    return errors


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_module_equals_the_official_code(name: str, kernel: str) -> None:
    for what, value in check(name, CASES[name], kernel).items():
        assert value <= CASES[name].tolerance, f"{what}: {value:.2e}"


@pytest.mark.parametrize(
    "name", ["meteora_bmm_eval_k1", "meteora_loop_train_k1", "mixlora_llama_top1_f64", "llavamole_sparse"]
)
def test_a_single_expert_gives_the_router_no_gradient(name: str) -> None:
    """Its gate is the constant 1. Of p / p autograd leaves rounding: 1.3e-6 in fp32, 2.2e-15 in fp64."""
    run, hyper = recorded(name)
    mixture = Mixture(run, hyper, CASES[name])
    with mixture.model.aux_weight(0.0):
        grads = mixture.grads((mixture.model(mixture.x) * run["grad_y"]).sum())
    assert grads["router"].abs().max() < (SINGLE if run["x"].dtype == torch.float32 else EXACT)
    assert run["grad_router"].abs().max() < ROUNDED


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_expert_for_each_token_mixes_projections_or_ffns_alike(kernel: str) -> None:
    case = CASES["llavamole_sparse"]._replace(options={"placement": "ffn_linear"})
    for what, value in check("llavamole_sparse", case, kernel).items():
        assert value <= case.tolerance, f"{what}: {value:.2e}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_broken_switch_evaluation_is_not_imitated(kernel: str) -> None:
    """The released code returns its input outside training; here every token gets p_max times its expert's FFN."""
    run, hyper = recorded("mixlora_switch_vanilla_infer")
    assert torch.equal(run["y"], run["x"]) and not run["grad_router"].any() and not run["grad_A_down_proj"].any()
    mixture = Mixture(run, hyper, CASES["mixlora_switch_vanilla_train"]._replace(training=False))
    mixture.model.set_kernel(kernel)
    y = mixture.model(mixture.x).flatten(0, 1)

    def expert(part: str, x: Tensor, e: int) -> Tensor:
        return x @ (run[f"W_{part}"] + hyper["scaling"] * run[f"B_{part}"][e] @ run[f"A_{part}"][e]).T

    want = torch.empty_like(y)
    for t, token in enumerate(run["x"].flatten(0, 1)):
        probs = (run["router"] @ token).softmax(0)
        e = int(probs.argmax())
        hidden = nn.functional.silu(expert("gate_proj", token, e)) * expert("up_proj", token, e)
        want[t] = probs[e] * expert("down_proj", hidden, e)
    assert_recorded(y, want, SINGLE)  # measured 2.6e-7
    assert (y - run["x"].flatten(0, 1)).abs().max() > 0.1


# -- LoRA-TLE: weights from similarities ------------------------------------------------------------------------------

_TLE = 1e-6  # measured 2.6e-7 (allowed: 1e-5)


def test_similarities_and_weights_equal_the_official_code() -> None:
    run, hyper = recorded("tle_weights_merge")
    weights = largest_similarity_weights(run["similarities"], hyper["temperature"])
    assert_recorded(weights, run["weights"], _TLE)
    # Row 3 has negative similarities only: the best expert is pushed below two others.
    assert int(run["similarities"][3].argmax()) == 0 and int((weights[3] > weights[3, 0]).sum()) == 2
    centroids = run["centroids"]
    router = Centroid(temperature=hyper["temperature"]).build(centroids.shape[1], len(centroids))
    router.set_vectors(centroids)
    assert_recorded(cosine_similarities(run["query"], router.vectors), run["similarities"], _TLE)
    assert_recorded(router(run["query"]).gates, run["weights"], _TLE)


def test_weights_of_the_specification() -> None:
    weights = largest_similarity_weights(torch.tensor([[0.6, 0.3, 0.2, 0.1]]), 4.0)
    assert torch.allclose(weights, torch.tensor([[0.750, 0.092, 0.083, 0.075]]), atol=5e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mixed_outputs_are_the_exact_merge_and_not_the_published_one(kernel: str) -> None:
    """sum_i w_i s_i B_i A_i is PEFT's "cat". Its other merges add the cross terms B_j A_i; they are not offered."""
    run, hyper = recorded("tle_weights_merge")
    w, s, A, B = run["weights"][0], run["scaling"], run["A"], run["B"]
    # Gates that are w for every token, through a router's bias; the input picks out the columns of the weight.
    run |= {"x": torch.eye(16).view(2, 8, 16), "W": torch.zeros(24, 16)}
    run |= {"router": torch.zeros(4, 16), "router_bias": w.log()}
    mixture = Mixture(run, hyper | {"E": 4}, Case(partial(_SOFTMAX, bias=True), _TLE, training=False))
    mixture.model.set_kernel(kernel)
    delta = mixture.model(mixture.x).flatten(0, 1).T
    assert_recorded(delta, run["delta_cat"], _TLE)
    assert_recorded(torch.einsum("e,eor,erd->od", w * s, B, A), run["delta_cat"], _TLE)
    # PEFT 0.4.0, which the published code pins: B is not weighted.
    merged = B.sum(0) @ torch.einsum("e,erd->rd", w * s, A)
    assert_recorded(merged, run["delta_040"], _TLE)
    root = (w * s).sqrt()  # current PEFT
    linear = torch.einsum("e,eor->or", root, B) @ torch.einsum("e,erd->rd", root, A)
    assert_recorded(linear, run["delta_linear"], _TLE)
    for other in ("delta_040", "delta_linear"):
        assert error(delta, run[other]) > 0.1
