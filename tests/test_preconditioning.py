"""Riemannian preconditioning: gradients against plain formulas on what the unpreconditioned layer learns, and against
recorded runs of the authors' code.

Legend: E experts, R rank of one expert, D input features, O output features.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import (
    CHECKPOINTING,
    Gradients,
    micro_batches,
    mixture,
    preconditioned_by_hand,
    relative_error,
    take_gradients,
    tiny_llama,
    use_checkpointing,
)
from peft import get_peft_model
from test_oracles import OneModule
from torch import Tensor, nn

from molora import MoloraConfig, aux_weight
from molora.kernels.reference import Projection
from molora.preconditioning import DELTA, preconditioned

PLACEMENTS = ("linear", "block", "ffn", "ffn_linear")
# Of fp32 gradients and solves, the largest measured 1.8e-6.
SOLVED = 2e-5


def gradients(model: nn.Module, count: int = 1) -> Gradients:
    """Of the loss summed over micro-batches."""
    for batch in micro_batches(count):
        model(**batch).loss.backward()
    return take_gradients(model)


def assert_preconditioned(placement: str, checkpointing: str = "none", count: int = 1, **options: Any) -> None:
    want_model = mixture(placement, **options)
    model = mixture(placement, riemannian=True, **options)
    model.load_state_dict(want_model.state_dict())
    use_checkpointing(model, checkpointing)
    plain = gradients(want_model, count)
    got = gradients(model, count)
    want = preconditioned_by_hand(model, plain)
    assert relative_error(want, plain, "molora_A") > 0.5  # it does something
    assert relative_error(got, want) < SOLVED
    assert relative_error(got, plain, "router") < 1e-6


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradients_are_those_of_the_formula(placement: str, checkpointing: str) -> None:
    assert_preconditioned(placement, checkpointing)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_experts_with_one_A_share_the_sum_of_their_metrics(placement: str) -> None:
    assert_preconditioned(placement, share_A=True)


def test_micro_batches_add_up() -> None:
    assert_preconditioned("block", count=3)


def test_plain_lora_beside_the_mixture_is_one_expert() -> None:
    assert_preconditioned("ffn", plain_lora={"target_modules": "all-linear", "r": 3, "lora_alpha": 6})


def test_dropout_and_the_kernel_that_is_asked_for() -> None:
    for kernel in ("reference", "dense_masked"):
        models = [mixture("linear", lora_dropout=0.3, riemannian=r) for r in (False, True)]
        found = []
        for model in models:
            model.set_kernel(kernel)
            torch.manual_seed(7)
            found.append(gradients(model))
        assert relative_error(found[1], preconditioned_by_hand(models[0], found[0])) < SOLVED


def test_bf16_parameters_are_solved_in_fp32() -> None:
    torch.manual_seed(0)
    A = torch.randn(3, 4, 24).bfloat16().requires_grad_()
    B = (torch.randn(3, 4, 16) / 10).bfloat16().requires_grad_()
    dA, dB = torch.randn(3, 4, 24).bfloat16(), torch.randn(3, 4, 16).bfloat16()
    new = preconditioned(Projection(A, B, 1.0))
    assert torch.equal(new.A, A) and torch.equal(new.B, B)
    torch.autograd.backward([new.A, new.B], [dA, dB])
    eye = DELTA * torch.eye(4)
    want = torch.linalg.inv(B.detach().float() @ B.detach().float().mT + eye) @ dA.float()
    assert A.grad.dtype == torch.bfloat16
    torch.testing.assert_close(A.grad.float(), want, rtol=2**-8, atol=1e-3 * float(want.abs().max()))
    want = torch.linalg.inv(A.detach().float() @ A.detach().float().mT + eye) @ dB.float()
    torch.testing.assert_close(B.grad.float(), want, rtol=2**-8, atol=1e-3 * float(want.abs().max()))


def test_autocast_does_not_reach_the_matrices() -> None:
    model, plain = mixture("linear", riemannian=True), mixture("linear")
    found = []
    for m in (plain, model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = m(**micro_batches(1)[0]).loss
        loss.backward()
        found.append(take_gradients(m))
    assert relative_error(found[1], preconditioned_by_hand(model, found[0])) < SOLVED


def test_a_fresh_mixture_takes_its_first_steps_without_breaking() -> None:
    """B zero: the first step moves B alone; the second moves A by the order of 1 / B. All of it is finite."""
    model = mixture("linear", zero_B=True, riemannian=True)
    first = gradients(model)
    assert all(g.isfinite().all() for g in first.values())
    for name, grad in first.items():
        assert bool(grad.any()) != (".molora_A" in name), name
    lr = 1e-3
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in first:
                p -= lr * first[name]
    twin = mixture("linear", zero_B=True)
    twin.load_state_dict(model.state_dict())
    second, plain = gradients(model), gradients(twin)
    assert all(g.isfinite().all() for g in second.values())
    sizes = {}
    for name in second:
        if ".molora_A" in name and bool(plain[name].any()):
            B = dict(model.named_parameters())[name.replace("molora_A", "molora_B")]
            # |(B B^T + delta)^-1 B v| <= |v| / (2 sqrt(delta)), whatever B.
            sizes[name] = float(second[name].norm() / plain[name].norm() * B.detach().norm(dim=-1).max())
    assert max(sizes.values()) > 1, sizes  # magnified, far beyond the size of B
    for _ in range(5):
        steps = gradients(model)
        assert all(g.isfinite().all() for g in steps.values())
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in steps:
                    p -= lr * steps[name]


def test_a_singular_system_leaves_the_gradient_and_an_overflow_stays_visible() -> None:
    A = torch.randn(2, 3, 8, requires_grad=True)
    B = torch.randn(2, 3, 8)
    B[0] = 0
    new = preconditioned(Projection(A, B.requires_grad_(), 1.0), delta=0.0)
    upstream = torch.randn_like(A)
    (grad,) = torch.autograd.grad(new.A, A, upstream, retain_graph=True)
    assert torch.equal(grad[0], upstream[0]) and not torch.equal(grad[1], upstream[1])
    upstream[1, 0, 0] = torch.inf  # what a loss scale looks for
    (grad,) = torch.autograd.grad(new.A, A, upstream)
    assert not grad[1].isfinite().all()


def test_nothing_happens_outside_of_training() -> None:
    model = mixture("block", riemannian="gate_rescaled").eval()
    plain = mixture("block").eval()
    assert relative_error(gradients(model), gradients(plain)) == 0


@pytest.mark.parametrize("riemannian", [True, "gate_rescaled"])
def test_two_adapters_each_by_their_own_config(riemannian: bool | str) -> None:
    """On one linear, both active: one preconditioned, the other not."""
    model, twin = mixture("linear"), mixture("linear")
    for m, r in ((model, riemannian), (twin, False)):
        torch.manual_seed(4)
        m.add_adapter("other", MoloraConfig(num_experts=3, r=2, init_lora_weights=False, riemannian=r, router={}))
        m.base_model.set_adapter(["default", "other"])
        m.train()
    got, plain = gradients(model), gradients(twin)
    others = {n for n in plain if ".other." in n}
    assert others and others < plain.keys()
    if riemannian is True:
        want = preconditioned_by_hand(model, {n: plain[n] for n in others})
        assert relative_error({n: got[n] for n in others}, want) < SOLVED
        rest = {n: g for n, g in plain.items() if n not in others}
        assert relative_error({n: got[n] for n in rest}, rest) < 1e-5
    else:
        assert relative_error(got, plain, "molora_B") > 0.1


def test_compiled_gradients_are_the_same() -> None:
    for riemannian in (True, "gate_rescaled"):
        found = []
        for compiled in (False, True):
            torch.manual_seed(0)
            base = OneModule(nn.Linear(16, 24))
            router = {"top_k": 2, "init_std": 0.5}
            options = {"init_lora_weights": False, "target_modules": ["target"], "router": router, "task_type": None}
            model = get_peft_model(base, MoloraConfig(num_experts=3, r=4, riemannian=riemannian, **options)).train()
            run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
            with aux_weight(model, 0.0):
                run(torch.randn(2, 5, 16)).pow(2).sum().backward()
            found.append(take_gradients(model))
        assert relative_error(found[1], found[0]) < SOLVED


# -- gates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["linear", "block", "ffn_linear"])
def test_rescaled_gates_leave_the_output_as_it_is(placement: str) -> None:
    batch = micro_batches(1)[0]
    logits = [mixture(placement, riemannian=r)(**batch).logits for r in (False, "gate_rescaled")]
    assert torch.equal(*logits)


@pytest.mark.parametrize("placement", ["linear", "block", "ffn_linear"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_rescaled_gradients_are_those_of_the_formula(placement: str, checkpointing: str, monkeypatch: Any) -> None:
    """Against the published sum over experts, with stop-gradients where it has them, in every layer."""
    options = {"riemannian": "gate_rescaled", "lora_dropout": 0.0}
    model = mixture(placement, **options)
    use_checkpointing(model, checkpointing)
    torch.manual_seed(7)
    got = gradients(model)

    def published(mix: Any, x: Tensor, gates: Tensor, experts: Projection, out: Tensor) -> Tensor:
        for e in range(experts.num_experts):
            one = x.flatten(0, -2) @ experts.A[e].T @ experts.B[e] * experts.scaling
            g = gates[:, e : e + 1]
            root = g.sqrt().detach()
            out = out + (root * one + (g - root) * one.detach()).view_as(out)
        return out

    monkeypatch.setattr("molora.linear.gate_rescaled", published)
    monkeypatch.setattr("molora.ffn.gate_rescaled", published)
    want_model = mixture(placement, **options)
    torch.manual_seed(7)
    assert relative_error(got, gradients(want_model)) < SOLVED


def test_dropout_is_the_same_in_both_halves() -> None:
    models = [mixture("linear", lora_dropout=0.4, riemannian=r) for r in (False, "gate_rescaled")]
    found = []
    for model in models:
        torch.manual_seed(7)
        out = model(**micro_batches(1)[0])
        out.loss.backward()
        found.append((out.logits, take_gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    last = "layers.2.mlp.down_proj.molora_router"  # nothing rescaled lies behind it
    assert relative_error(found[1][1], found[0][1], last) < 1e-5


@pytest.mark.parametrize("reads_first", [False, True])
def test_a_read_shared_by_siblings_is_rescaled_too(reads_first: bool, triton_on_cpu: None, monkeypatch: Any) -> None:
    """On a GPU the first of q/k/v reads the input for all; the mixture then starts from ranks."""
    calls: list[int] = []
    from molora import linear

    def counted(mix: Any, x: Tensor, *args: Any) -> Tensor:
        calls.append(x.shape[-1])
        return original(mix, x, *args)

    original = linear.gate_rescaled
    monkeypatch.setattr("molora.linear.gate_rescaled", counted)
    model = mixture("block", base=tiny_llama().bfloat16(), riemannian="gate_rescaled")
    if not reads_first:
        model.set_kernel("reference")
    batch = micro_batches(1)[0]
    found = gradients(model)
    assert batch and all(g.isfinite().all() for g in found.values())
    assert bool(set(calls) <= {16}) == reads_first  # E * R ranks, or the features


# -- configs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"riemannian": "gate"}, r"riemannian='gate': choose one of \[True, False, 'gate_rescaled'\]"),
        ({"riemannian": 1}, "riemannian=1"),
        ({"riemannian": "gate_rescaled", "placement": "ffn"}, "placement 'ffn' mixes the hidden states"),
        (
            {"riemannian": "gate_rescaled", "num_experts": 1, "r": 16, "router": "rank_wise"},
            "those of router 'rank_wise' can be negative",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoloraConfig(**options)


def test_a_saved_config_without_the_key_loads(tmp_path: Any) -> None:
    import json

    config = MoloraConfig(riemannian="gate_rescaled")
    config.save_pretrained(tmp_path)
    assert MoloraConfig.from_pretrained(tmp_path).riemannian == "gate_rescaled"
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    del saved["riemannian"]
    path.write_text(json.dumps(saved))
    assert MoloraConfig.from_pretrained(tmp_path).riemannian is False
