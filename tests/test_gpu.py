"""The same truths on a GPU: kernels against fp64, fresh mixtures, gradients, checkpointing, compile, generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import CASES, Case, assert_close, double, gradients
from peft import PeftModel, get_peft_model
from test_kernels import linear, linear_leaves
from test_kernels_ffn import FFN_CASES, FFN_SHAPES, ffn, ffn_leaves
from tiny_models import PLACEMENTS, base_model, batch, config, train
from torch import Tensor

from molora import MoloraConfig
from molora.context import runtime_of
from molora.kernels import dense_masked, dense_masked_ffn, reference
from molora.steering import TokenSteering

pytestmark = pytest.mark.gpu

# RMS(error) / RMS(oracle); fp32 GEMMs without TF32.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def no_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def on_gpu(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().cuda().requires_grad_() for n, t in leaves.items()}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", [reference.mixture_linear, dense_masked.mixture_linear])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_linear_kernels(case: Case, dtype: torch.dtype, kernel: Callable):
    leaves = linear_leaves(case, dtype)
    upstream = torch.randn(case.T, case.O, dtype=torch.float64)
    exact, here = double(leaves), on_gpu(leaves)
    want = {"out": linear(reference.mixture_linear, exact)}
    want |= gradients([want["out"]], exact, [upstream])
    got = {"out": linear(kernel, here)}
    got |= gradients([got["out"]], here, [upstream.cuda()])
    assert_close({n: t.cpu() for n, t in got.items()}, want, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", [reference.mixture_ffn, dense_masked_ffn.mixture_ffn])
@pytest.mark.parametrize("shape", FFN_SHAPES)
def test_ffn_kernels(shape: str, dtype: torch.dtype, kernel: Callable):
    case, layout = FFN_CASES["T63-odd-tail"], FFN_SHAPES[shape]
    leaves, ids = ffn_leaves(case, layout, dtype)
    exact, here = double(leaves), on_gpu(leaves)
    want_out = ffn(reference.mixture_ffn, exact, ids, case, layout, True)
    upstream = [torch.randn(o.shape, dtype=torch.float64) for o in want_out if o is not None]
    got_out = ffn(kernel, here, ids.cuda(), case, layout, True)
    got = gradients(got_out, here, [u.cuda() for u in upstream])
    want = gradients(want_out, exact, upstream)
    assert_close({n: t.cpu() for n, t in got.items()}, want, TOLERANCE[dtype])


def cuda_batch() -> dict[str, Tensor]:
    return {n: t.cuda() for n, t in batch().items()}


def gpu_logits(model: torch.nn.Module) -> Tensor:
    inputs = cuda_batch()
    with torch.no_grad():
        out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return out[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_fresh_mixture_is_the_base_and_reloads(tmp_path: Path, family: str, placement: str, dtype: torch.dtype):
    want = gpu_logits(base_model(family, dtype=dtype).cuda())
    model = get_peft_model(base_model(family, dtype=dtype).cuda(), config(placement))
    assert torch.equal(gpu_logits(model), want)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**cuda_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    want = gpu_logits(model.eval())
    assert torch.equal(gpu_logits(model), want)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(family, dtype=dtype).cuda(), tmp_path)
    assert torch.equal(gpu_logits(again), want)


def adapter_gradients(model: torch.nn.Module) -> Tensor:
    grads = [p.grad.flatten().cpu() for p in model.parameters() if p.requires_grad and p.grad is not None]
    return torch.cat(grads)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradients_equal_the_cpus_under_checkpointing_and_compile(placement: str):
    options = {"init_lora_weights": False, "router": {"top_k": 2, "router_aux_loss_coef": 0.1, "init_std": 0.5}}

    def fresh() -> PeftModel:
        base = base_model()
        torch.manual_seed(1)
        return get_peft_model(base, config(placement, **options)).train()

    model = fresh()
    model(**batch()).loss.backward()
    want = adapter_gradients(model)
    for kind in ("plain", "reentrant", "non-reentrant", "compiled"):
        model = fresh().cuda()
        run: Callable = model
        if kind.endswith("reentrant"):
            model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
            model.enable_input_require_grads()
        elif kind == "compiled":
            run = torch.compile(model, fullgraph=True)
        run(**cuda_batch()).loss.backward()
        error = float((adapter_gradients(model) - want).norm() / want.norm())
        assert error < 1e-4, (kind, error)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_autocast_trains_on_a_gpu(placement: str):
    model = get_peft_model(base_model().cuda(), config(placement, lora_dropout=0.1)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**cuda_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_generate_on_a_gpu():
    model = get_peft_model(base_model(), config("block"))
    train(model)
    model = model.eval().cuda()
    ids = torch.randint(3, 97, (2, 6), device="cuda")
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert out.shape == (2, 14)


@pytest.mark.parametrize("preset", ["mixlora", "mixlora-dynamic"])
def test_ffn_experts_of_a_presets_own_size_steered_and_not(preset: str) -> None:
    """Eight experts of rank 16 for every token, as dynamic routing and steering have, are too large to be fused."""
    torch.manual_seed(0)
    model = get_peft_model(base_model(dtype=torch.bfloat16), MoloraConfig.from_preset(preset, init_lora_weights=False))
    model = model.eval()
    runtime, inner = runtime_of(model), model.get_base_model()
    ids = torch.randint(3, 60, (1, 40))

    def logits(wish: TokenSteering | None, device: str) -> Tensor:
        def tell(*_: Any) -> None:
            runtime.inputs.steering = wish and TokenSteering(*(part.to(device) for part in wish))

        hook = inner.register_forward_pre_hook(tell)
        with torch.no_grad():
            found: Tensor = model.to(device)(input_ids=ids.to(device)).logits.float().cpu()
        hook.remove()
        return found

    keep, add = torch.ones(40, 8), torch.zeros(40, 8)
    keep[:, 2], add[:, 5] = 0.0, 0.25
    for wish in (None, TokenSteering(keep, add)):
        want, got = logits(wish, "cpu"), logits(wish, "cuda")
        # In bf16 a token whose second expert is nearly tied may get another on the other device: seen once in 40.
        wrong = (got - want).norm(dim=-1) > 0.05 * want.norm(dim=-1)
        assert wrong.sum() <= 2
