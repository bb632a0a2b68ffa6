"""Gate rescaling and preconditioned steps against recorded runs of the authors' code (arXiv 2502.15828).

Legend: E experts, R rank of one expert, D input features, O output features.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from test_oracles import OneModule, assert_recorded, recorded
from torch import Tensor, nn

from molora import MoloraConfig
from molora.kernels.reference import Projection
from molora.layers import MoloraLayer
from molora.preconditioning import DELTA, preconditioned


@pytest.mark.parametrize("kernel", ["reference", "dense_masked"])
@pytest.mark.parametrize("rescale", [False, True])
def test_recorded_gate_rescaling(rescale: bool, kernel: str) -> None:
    want, hyper = recorded("riemannian_gate_rescale")
    base = OneModule(nn.Linear(16, 24, bias=False).double())
    config = MoloraConfig(
        num_experts=hyper["E"], r=hyper["r"], lora_alpha=hyper["alpha"], target_modules=["target"],
        router={"top_k": hyper["top_k"], "router_aux_loss_coef": 0.0},
        riemannian="gate_rescaled" if rescale else False, task_type=None,
    )  # fmt: skip
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    model.set_kernel(kernel)
    layer: Any = next(m for m in model.modules() if isinstance(m, MoloraLayer))
    layer.base_layer.weight.data = want["W"]
    A, B = layer.molora_A["default"].weight, layer.molora_B["default"].weight
    router = layer.molora_router["default"]
    A.data, B.data, router.weight.data = want["A"].clone(), want["B"].mT.contiguous(), want["router"].clone()
    model.train()
    x = want["x"].clone().requires_grad_()
    y = model(x)
    (y * want["grad_y"]).sum().backward()
    kind = "rescale" if rescale else "plain"
    assert_recorded(y, want[f"y_{kind}"], 1e-10)
    assert_recorded(x.grad, want[f"grad_x_{kind}"], 1e-10)
    assert_recorded(router.weight.grad, want[f"grad_router_{kind}"], 1e-10)
    if not rescale:
        assert_recorded(A.grad, want["grad_A_plain"], 1e-10)
        assert_recorded(B.grad.mT, want["grad_B_plain"], 1e-10)
        return
    # The recorded gradients are those before the optimiser preconditions them.
    undone_A = (B @ B.mT + DELTA * torch.eye(3)) @ A.grad
    undone_B = (A @ A.mT + DELTA * torch.eye(3)) @ B.grad
    assert_recorded(undone_A, want["grad_A_rescale"], 1e-10)
    assert_recorded(undone_B.mT, want["grad_B_rescale"], 1e-10)


def transformed(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """What the layer's backward makes of recorded gradients; B and its gradient are (E, O, R) as recorded."""
    leaves = A.clone().requires_grad_(), B.mT.clone().requires_grad_()
    new = preconditioned(Projection(*leaves, 1.0), delta)
    new_A, new_B = torch.autograd.grad([new.A, new.B], leaves, [grad_A, grad_B.mT.contiguous()])
    return new_A, new_B.mT


def walk(optimiser: Any, riemannian: bool, steps: int = 3) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A, B after each step from the recorded gradients, and the A and B of the recorded run to compare with."""
    want, hyper = recorded("riemannian_optimizers")
    name = optimiser.__name__
    A = nn.Parameter(want["A0"].flatten(0, 1).clone())
    B = nn.Parameter(want["B0"].flatten(0, 1).clone())
    step = optimiser([A, B], hyper)
    found = []
    for i in range(steps):
        A.grad, B.grad = want["grad_A"][i].flatten(0, 1), want["grad_B"][i].flatten(0, 1)
        if riemannian:
            A.grad, B.grad = transformed(A.detach(), B.detach(), A.grad, B.grad, hyper["delta"])
        step()
        recorded_A, recorded_B = (want[f"{name}_{m}_step{i + 1}"].flatten(0, 1) for m in "AB")
        found.append((A.detach().clone(), B.detach().clone(), recorded_A, recorded_B))
    return found


def sgd(parameters: list[nn.Parameter], hyper: dict[str, Any]) -> Any:
    return torch.optim.SGD(parameters, lr=hyper["lr"]).step


def sgdr(parameters: list[nn.Parameter], hyper: dict[str, Any]) -> Any:
    return sgd(parameters, hyper)


def adamw(parameters: list[nn.Parameter], hyper: dict[str, Any], corrects_bias: bool = False) -> Any:
    """Of transformers as it was: bias correction is an option, and eps is added before it, unlike torch's."""
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    (b1, b2), lr, eps = hyper["betas"], hyper["lr"], hyper["eps"]
    steps = 0

    @torch.no_grad()
    def step() -> None:
        nonlocal steps
        steps += 1
        size = lr * (1 - b2**steps) ** 0.5 / (1 - b1**steps) if corrects_bias else lr
        for p, (m, v) in zip(parameters, moments, strict=True):
            m.lerp_(p.grad, 1 - b1)
            v.lerp_(p.grad**2, 1 - b2)
            p -= size * m / (v.sqrt() + eps)

    return step


def adamwr_bc(parameters: list[nn.Parameter], hyper: dict[str, Any]) -> Any:
    return adamw(parameters, hyper, corrects_bias=True)


def adamwr(parameters: list[nn.Parameter], hyper: dict[str, Any]) -> Any:
    return adamw(parameters, hyper)


@pytest.mark.parametrize(("optimiser", "riemannian"), [(sgd, False), (sgdr, True), (adamw, False)])
def test_recorded_trajectories(optimiser: Any, riemannian: bool) -> None:
    for A, B, want_A, want_B in walk(optimiser, riemannian):
        assert_recorded(A, want_A, 1e-6)
        assert_recorded(B, want_B, 1e-6)


@pytest.mark.parametrize("optimiser", [adamwr, adamwr_bc])
def test_recorded_adamw_up_to_the_named_deviation(optimiser: Any) -> None:
    """The authors' class preconditions B by A after A's step: A's first step is the same, B's is not."""
    A, B, want_A, want_B = walk(optimiser, True, steps=1)[0]
    assert_recorded(A, want_A, 1e-6)
    assert float((B - want_B).abs().max()) > 1e-6
    # With the A of the next step in the place of this one, B is theirs too.
    want, hyper = recorded("riemannian_optimizers")
    B0 = nn.Parameter(want["B0"].flatten(0, 1).clone())
    _, B0.grad = transformed(
        want_A, B0.detach(), want["grad_A"][0].flatten(0, 1), want["grad_B"][0].flatten(0, 1), hyper["delta"]
    )
    optimiser([B0], hyper)()
    assert_recorded(B0, want_B, 1e-6)
