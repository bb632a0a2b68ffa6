"""Every preset compiled, and on a GPU: its gradients are those of the eager model on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gradients import Gradients, relative_error, take_gradients, tiny_llama
from test_preset_gradients import task_batches
from tiny_models import PRESETS_THAT_TRAIN, preset_model
from torch import nn

from molora import record_routing

# A compilation takes about five seconds; all fourteen were measured once, and the GPU test compiles all.
COMPILED = ("mixlora-switch", "dynmole", "adamole", "lora-tle")  # one of each kind of router with code of its own


def gradients_of(name: str, device: str = "cpu", prepare: Callable[[nn.Module], Callable] = lambda m: m) -> Gradients:
    model = preset_model(name, tiny_llama()).to(device)
    (batch,) = task_batches(name, 1)
    prepare(model)(**{key: value.to(device) for key, value in batch.items()}).loss.backward()
    return {key: grad.cpu() for key, grad in take_gradients(model).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    got = gradients_of(name, prepare=lambda model: torch.compile(model, backend="aot_eager", fullgraph=True))
    assert relative_error(got, gradients_of(name)) <= 1e-5  # measured 1.4e-6


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRESETS_THAT_TRAIN)
def test_gradients_on_a_gpu(name: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    want = gradients_of(name)

    def checkpointed(model: nn.Module) -> Callable:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    for kind, prepare in (
        ("plain", lambda model: model),
        ("checkpointed", checkpointed),
        ("compiled", lambda model: torch.compile(model, fullgraph=True)),
    ):
        torch._dynamo.reset()
        got = gradients_of(name, "cuda", prepare)
        error = max(
            float((got[key] - want[key]).norm() / want[key].norm())
            for key in want
            if want[key].numel() > 1 and bool(want[key].any())
        )
        assert error < 1e-4, (kind, error)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRESETS_THAT_TRAIN)
def test_training_and_generation_on_a_gpu(name: str) -> None:
    """bf16 base under autocast: the loss falls, gates stay fp32, a cached generation is the uncached one."""
    model = preset_model(name, tiny_llama().to(torch.bfloat16)).cuda()
    (batch,) = task_batches(name, 1)
    batch = {key: value.cuda() for key, value in batch.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with record_routing(model) as routing:
        out = model.generate(input_ids=batch["input_ids"][:1], max_new_tokens=6, do_sample=False)
    assert out.shape[1] == batch["input_ids"].shape[1] + 6 or 2 in out[0].tolist()
    assert all(record.gates.dtype == torch.float32 and record.gates.is_cuda for record in routing.values())
