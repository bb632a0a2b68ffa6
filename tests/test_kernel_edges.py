"""Edges of the kernels that were wrong once: few tokens, no tokens, odd strides, backwards that stop early."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import transformers as hf
from peft import get_peft_model
from tiny_models import config

from molora.kernels import decode, dense_masked, fused_ffn, gates, launch, ranks, reference, selection
from molora.kernels.fused_ffn import Plan
from molora.kernels.reference import Projection
from molora.kernels.shrink import Input, shrink


@pytest.mark.usefixtures("triton_on_cpu")
def test_an_ffn_mixture_of_few_tokens_adds_all_parts_of_the_ranks(monkeypatch):
    monkeypatch.setattr(selection, "reads_first", lambda x: True)
    sizes = {**tiny_models._SIZES, "hidden_size": 600, "num_hidden_layers": 1}
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval()
    model = get_peft_model(base, config("ffn", plain_lora=None, init_lora_weights=False)).eval()
    mlp, x = model.base_model.model.model.layers[0].mlp, torch.randn(1, 3, 600)
    with torch.no_grad():
        few = mlp(x)
    torch.testing.assert_close(few, mlp(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_backward_that_skips_x_leaves_nothing_behind():
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    W, A = torch.randn(7, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    entered = Input(x, True)
    loss = (entered.x @ W.T).square().sum() + shrink(entered, [A]).ranks[0].square().sum()
    torch.autograd.grad(loss, [A], retain_graph=True)
    (got,) = torch.autograd.grad(loss, [x])
    (want,) = torch.autograd.grad((x @ W.T).square().sum() + (x @ A.T).square().sum(), [x])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("in_place", [True, False])
def test_no_tokens_through_an_input(in_place):
    x, A = torch.randn(0, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    entered = Input(x, in_place)
    (entered.x.sum() + shrink(entered, [A]).ranks[0].sum()).backward()


@pytest.mark.usefixtures("triton_on_cpu")
def test_fp64_without_gradients_is_fp64():
    x, out, g = (torch.randn(3, n, dtype=torch.float64) for n in (6, 5, 2))
    experts = Projection(torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64), 1.7)
    want = reference.mixture_linear(x, g, experts, out)
    with torch.no_grad():
        torch.testing.assert_close(dense_masked.mixture_linear(x, g, experts, out), want)


@pytest.mark.parametrize("what", ["gates", "ids", "ranks"])
def test_expand_few_takes_any_strides(what):
    S, B, ids = torch.randn(3, 16), torch.randn(16, 5), torch.tensor([[0, 1], [2, 3], [1, 3]])
    g = torch.zeros(3, 4).scatter(1, ids, torch.rand(3, 2))
    want = reference.gate_ranks(S, g, False) @ B
    turn = lambda t: t.T.contiguous().T  # noqa: E731
    S, g, ids = (turn(t) if n == what else t for n, t in (("ranks", S), ("gates", g), ("ids", ids)))
    torch.testing.assert_close(decode.expand_few_(torch.zeros(3, 5), S, g, ids, B, 1.0), want)


def test_a_strided_A_of_the_down_projection():
    p0, p1, g, half = torch.randn(5, 20), torch.randn(5, 20), torch.rand(5, 2), torch.randn(2, 3, 40).chunk(2, 2)[1]
    plan = Plan("silu", False, (0.0, 0.0, 1.0))
    run = lambda A: fused_ffn.fused_ffn([p0, p1], [None] * 2, [None] * 2, A, g, None, plan)[1]  # noqa: E731
    torch.testing.assert_close(run(half), run(half.contiguous()))


def test_a_transposed_gradient_of_ranks():
    dr, s, g = torch.randn(5, 6), torch.randn(5, 6), torch.rand(5, 3)
    want = ranks.gate_ranks_backward_triton(dr, s, g, 1.7, torch.float32)[0]
    torch.testing.assert_close(ranks.gate_ranks_backward_triton(dr.T.contiguous().T, s, g, 1.7, torch.float32)[0], want)


def test_experts_of_several_dtypes_keep_their_precision():
    x, up = torch.randn(50, 6), torch.randn(50, 3)
    A = [torch.randn(3, 6).to(d).requires_grad_() for d in (torch.bfloat16, torch.float32, torch.bfloat16)]
    grad = torch.autograd.grad(shrink(x, A).ranks, A, [up] * 3)[1]
    torch.testing.assert_close(grad, up.T @ x)


@pytest.mark.gpu
def test_ids_of_nan_logits_name_experts():
    logits = torch.full((9, 6), float("nan"), device="cuda")
    ids = gates.top_k_gates(logits, None, top_k=2).topk_ids
    assert int(ids.min()) >= 0 and int(ids.max()) < 6


def test_an_ffn_of_no_tokens():
    p0, p1, g = torch.randn(0, 20, requires_grad=True), torch.randn(0, 20), torch.rand(0, 2)
    A = torch.randn(2, 3, 20, requires_grad=True)
    hidden, found = fused_ffn.fused_ffn(
        [p0, p1], [None] * 2, [None] * 2, A, g, None, Plan("silu", True, (0.0, 0.0, 1.0))
    )
    assert hidden.shape == (0, 20) and found.shape == (0, 6)
    hidden.sum().backward()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("torch.version.hip", "6.4", "nobody has run them on ROCm"),
        ("torch.cuda.get_device_capability", lambda device: (7, 5), "has no bf16 matrix units"),
        ("molora.kernels.ranks.gate_ranks_triton", lambda *args: 1 / 0, "division by zero"),
    ],
    ids=["rocm", "turing", "broken-triton"],
)
def test_a_gpu_without_a_path_falls_back_and_says_so_once(name, value, said, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "ones", lambda *size, device, **options: torch.full(size, 1.0, **options))
    monkeypatch.setattr(name, value)
    launch._works.cache_clear()
    try:
        assert not launch.ready(torch.device("cuda", 0)) and not launch.ready(torch.device("cuda", 0))
    finally:
        launch._works.cache_clear()
    (message,) = [record.getMessage() for record in caplog.records]
    assert said in message and "plain PyTorch runs instead" in message
