"""Linears that read the same tensor read it once: the gradients of every parameter, however the model is run."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import base_model, batch, config
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from molora import record_routing
from molora.kernels import decode, selection, shrink
from molora.linear import MixedLinear

OPTIONS: dict[str, dict[str, Any]] = {
    "top-2": {"router": {"top_k": 2, "init_std": 0.5, "router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.1}},
    "rank-wise": {"num_experts": 1, "r": 8, "router": {"name": "rank_wise", "active_ranks": 3}},
    "tsallis": {"router": {"name": "tsallis", "init_std": 0.5}},
    "bias": {"router": {"top_k": 1, "norm_topk_prob": False, "bias": True, "init_std": 0.5}},
    "plain-beside": {"target_modules": ["gate_proj"], "plain_lora": {"target_modules": "all-linear", "r": 3}},
}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, triton_on_cpu: None) -> list[int]:
    """Inputs are read before the frozen linear, in fp32 on a CPU; how many matrices each of the reads was for."""
    counts: list[int] = []
    forward = shrink._Shrink.forward

    def counted(ctx: Any, options: Any, x: Tensor, *matrices: Tensor) -> Any:
        counts.append(len(matrices))
        return forward(ctx, options, x, *matrices)

    monkeypatch.setattr(selection, "reads_first", lambda x: True)
    monkeypatch.setattr(decode, "MAX_TOKENS", 0)  # a forward without gradients, before it is recomputed, counts too
    monkeypatch.setattr(shrink._Shrink, "forward", staticmethod(counted))
    return counts


def mixture(placement: str = "linear", family: str = "llama", **options: Any) -> PeftModel:
    base = base_model(family)
    torch.manual_seed(1)
    return get_peft_model(base, config(placement, **{"init_lora_weights": False, **options})).train()


def gradients(model: PeftModel) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch()).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 3e-5) -> None:
    assert got.keys() == want.keys() and want
    for name in want:
        error = float((got[name] - want[name]).norm() / want[name].norm().clamp(min=1e-6))
        assert error < tolerance, (name, error)


def reference_gradients(model: PeftModel) -> dict[str, Tensor]:
    model.set_kernel("reference")
    want = gradients(model)
    model.set_kernel(None)
    return want


@pytest.mark.parametrize("placement", ["linear", "block"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_equal_the_reference_kernels(options: dict[str, Any], placement: str, reads: list[int]) -> None:
    if "plain_lora" in options and placement == "block":
        pytest.skip("one placement is enough for LoRAs without a router")
    model = mixture(placement, **options)
    want = reference_gradients(model)
    assert not reads
    assert_equal(gradients(model), want)
    # In each of two layers q/k/v, o, gate/up and down; a router beside each A, or one for the block.
    routers = 0 if "plain_lora" in options else 1
    expected = {"linear": [6, 2, 4, 2], "block": [4, 2, 3, 2]}[placement] if routers else [3, 1, 1, 1, 2, 1]
    assert sum(reads) == 2 * sum(expected) if routers else sum(reads) == 2 * 8


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_recomputation_reads_again(reentrant: bool, reads: list[int]) -> None:
    model = mixture()
    want = gradients(model)
    per_forward = len(reads)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = gradients(model)
    assert len(reads) == 3 * per_forward
    assert_equal(got, want)


def test_a_hooked_linear_is_read_first_too(reads: list[int]) -> None:
    """Its gradient may be held by the hook, so nothing is added into it."""
    model = mixture()
    want = reference_gradients(model)
    held: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, MixedLinear):
            module.base_layer.register_full_backward_hook(lambda m, grad_in, grad_out: held.extend(grad_in))
            assert not module.base_is_plain
    got = gradients(model)
    copies = [t.clone() for t in held if t is not None]
    assert_equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(copies, (t for t in held if t is not None), strict=True))


def test_linears_that_read_different_tensors_read_apart(reads: list[int]) -> None:
    """Cross-attention: keys and values read something else than queries."""
    model = mixture("linear", target_modules=["q_proj", "k_proj", "v_proj"])
    attention = model.base_model.model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    x, other = torch.randn(1, 5, 32, requires_grad=True), torch.randn(1, 5, 32, requires_grad=True)

    def run() -> dict[str, Tensor]:
        outs = [layer(t) for layer, t in zip(layers, (x, other, other), strict=True)]
        with model.aux_weight(0.0):
            loss = sum((o.square().sum() for o in outs), torch.zeros(()))
        grads = torch.autograd.grad(loss, [x, other, *(p for p in attention.parameters() if p.requires_grad)])
        return dict(enumerate(grads))  # type: ignore[arg-type]

    model.eval()
    model.set_kernel("reference")
    want = run()
    model.set_kernel(None)
    for _ in range(2):
        assert_equal(run(), want)
    assert layers[0].molora_reads["default"].apart
    assert not layers[0].molora_reads["default"].of_thread


def test_two_adapters_and_a_deleted_one(reads: list[int]) -> None:
    model = mixture()
    model.add_adapter("other", config("block", init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    want = reference_gradients(model)
    assert_equal(gradients(model), want)
    model.base_model.set_adapter("other")
    model.delete_adapter("default")
    reads.clear()
    assert_equal(gradients(model), reference_gradients(model))
    assert sum(reads) == 2 * sum([4, 2, 3, 2])


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["top-2", "rank-wise", "tsallis", "plain-beside"])
def test_with_dropout_routers_read_together_and_experts_apart(name: str, checkpointed: bool, reads: list[int]) -> None:
    """Each linear's experts have a mask of their own; the routers see the input without one."""
    model = mixture(**OPTIONS[name], lora_dropout=0.5)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    torch.manual_seed(3)
    want = reference_gradients(model)
    assert not reads
    torch.manual_seed(3)
    assert_equal(gradients(model), want)
    routers = {"plain-beside": [1]}.get(name, [3, 1, 2, 1])
    assert sorted(reads) == sorted(2 * (routers + [1] * 7) * (2 if checkpointed else 1))


def test_routing_is_that_of_the_router_alone(reads: list[int]) -> None:
    model = mixture("block").eval()
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    with record_routing(model) as read_first, torch.no_grad():
        out = model(**inputs).logits
    model.set_kernel("reference")
    with record_routing(model) as alone, torch.no_grad():
        want = model(**inputs).logits
    assert torch.allclose(out, want, atol=1e-5)
    assert read_first.keys() == alone.keys()
    real = inputs["attention_mask"].flatten().bool()
    for name in alone:
        assert torch.equal(read_first[name].topk_ids[real], alone[name].topk_ids[real])
        assert torch.allclose(read_first[name].gates[real], alone[name].gates[real], atol=1e-5)


def test_a_frozen_input_gets_no_gradient(reads: list[int]) -> None:
    model = mixture("linear", target_modules=["q_proj"])
    layer: nn.Module = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 5, 32)
    out = layer.eval()(x)
    assert layer.base_layer(x).grad_fn is None  # the frozen linear has no backward of its own to run
    out.square().sum().backward()
    assert x.grad is None


def tokens(model: PeftModel, seed: int) -> Tensor:
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("placement", ["linear", "block"])
def test_threads_of_one_model(placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread reads for itself (by plain operations: Triton's interpreter knows one thread only)."""
    model = mixture(placement).eval()
    want = [tokens(model, seed) for seed in range(4)]
    monkeypatch.setattr(selection, "reads_first", lambda x: True)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda i: tokens(model, i % 4), range(80)))
    finally:
        sys.setswitchinterval(before)
    assert max(float((got - want[i % 4]).abs().max()) for i, got in enumerate(found)) < 1e-5


@pytest.mark.parametrize("placement", ["linear", "block"])
def test_a_replica_reads_by_itself(placement: str, reads: list[int]) -> None:
    """DataParallel copies modules; what they share lists the originals."""
    model = mixture(placement).eval()
    layer = model.get_base_model().model.layers[0].self_attn
    x = torch.randn(2, 5, 32)
    want = [linear(x) for linear in (layer.q_proj, layer.k_proj)]
    for linear, expected in zip((layer.q_proj, layer.k_proj), want, strict=True):
        copy = linear._replicate_for_data_parallel()
        for name, child in linear._modules.items():
            setattr(copy, name, child)
        assert (copy(x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("how", ["no_grad", "reentrant"])
def test_a_linear_without_gradient_does_not_take_that_of_its_siblings(how: str, reads: list[int]) -> None:
    model = mixture("linear")
    layer = model.get_base_model().model.layers[0].self_attn
    x = torch.randn(2, 5, 32, requires_grad=True)

    def run() -> list[Tensor | None]:
        model.zero_grad()
        if how == "no_grad":
            with torch.no_grad():
                layer.q_proj(x)
        else:
            checkpoint(layer.q_proj, x, use_reentrant=True)
        y = layer.k_proj(x)
        y.backward(torch.ones_like(y))
        k = layer.k_proj
        return [k.molora_A["default"].weight.grad, k.molora_router["default"].weight.grad]

    got = run()
    model.set_kernel("reference")
    for found, want in zip(got, run(), strict=True):
        assert found is not None and want is not None
        assert float((found - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
def test_each_linear_checkpointed_by_itself(reentrant: bool, reads: list[int]) -> None:
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    made = [mixture("linear", router={"top_k": 2, "init_std": 0.5}) for _ in range(2)]
    made[0].set_kernel("reference")
    want = gradients(made[0])
    apply_activation_checkpointing(
        made[1],
        checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, checkpoint_impl=kind),
        check_fn=lambda m: isinstance(m, MixedLinear),
    )
    made[1].enable_input_require_grads()
    got = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in gradients(made[1]).items()}
    assert_equal(got, want)


def test_probing_one_linear_leaves_the_others_together(reads: list[int]) -> None:
    model = mixture("linear")
    layer = model.get_base_model().model.layers[0].self_attn
    for _ in range(2):
        layer.q_proj(torch.randn(2, 11, 32))
    reads.clear()
    gradients(model)
    assert len(reads) == 8  # of two layers: q/k/v, o, gate/up, down
