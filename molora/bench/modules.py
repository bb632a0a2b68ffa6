"""Tables of parts of a model: one linear, one FFN, and decoding a token of a whole model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from molora import MoloraConfig
from molora.bench import mixlora_peer
from molora.bench.correct import gradient_error, gradients, with_kernel
from molora.bench.measure import Timing, captured, measure
from molora.bench.subjects import Shape, base, device, dtype
from molora.bench.tables import TOP_2, Bar, Result, memory_bar

EXPERTS: dict[str, Any] = {
    "task_type": None,
    "num_experts": 8,
    "r": 16,
    "lora_alpha": 32,
    "router": TOP_2,
    "init_lora_weights": False,
}


class Holder(nn.Module):
    """A module under the name that adapters look for."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.mlp = module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x)
        return out


def holder(module: Callable[[], nn.Module]) -> Holder:
    torch.manual_seed(0)
    with torch.device(device()):
        return Holder(module()).to(dtype()).requires_grad_(False)


def _inputs(tokens: int, width: int, out: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(1, tokens, n, generator=generator).to(device(), dtype()) for n in (width, out))
    return x.requires_grad_(), dy


def _compared(
    module: nn.Module,
    ours: MoloraConfig,
    peer: LoraConfig,
    tokens: int,
    width: int,
    out: int,
    repeats: int,
    peers: Mapping[str, Callable[[], nn.Module]] | None = None,
) -> tuple[dict[str, Timing], dict[str, float]]:
    x, dy = _inputs(tokens, width, out)
    torch.manual_seed(2)
    mixture = get_peft_model(copy.deepcopy(module), ours).train()
    lora = get_peft_model(copy.deepcopy(module), peer, autocast_adapter_dtype=False).train()
    few = gradients(mixture, x[:, :256].detach().requires_grad_(), dy[:, :256])
    error = gradient_error("molora 8 x r16 top-2", few, with_kernel(mixture, "reference", few))
    subjects = {
        "frozen": gradients(module, x, dy),
        "molora 8 x r16 top-2": gradients(mixture, x, dy),
        "peft lora r32, bf16 adapters": gradients(lora, x, dy),
    }
    subjects |= {f"{name}, CUDA graph": captured(step) for name, step in subjects.items()}
    subjects |= {name: gradients(make(), x, dy) for name, make in (peers or {}).items()}
    return measure(subjects, repeats=repeats, flush=True), {"molora 8 x r16 top-2": error}


def one_linear(shape: Shape, repeats: int) -> Result:
    """One linear of width `hidden`, forward and backward, against the frozen linear.

    Also as CUDA graphs: a single linear is over before the next launches are made, which in a model it never is.
    """
    width = shape.hidden
    module = holder(lambda: nn.Linear(width, width, bias=False))
    ours = MoloraConfig(target_modules=["mlp"], **EXPERTS)
    peer = LoraConfig(r=32, target_modules=["mlp"], init_lora_weights=False)
    rows, errors = _compared(module, ours, peer, shape.rows * shape.length, width, width, repeats)
    frozen, mine, _, in_graph, ours_in_graph, _ = rows.values()
    bars = [
        Bar("one_linear", ours_in_graph.median_ms / in_graph.median_ms, 1.35),
        Bar("one_linear, launched eagerly", mine.median_ms / frozen.median_ms, 1.35),
    ]
    return Result(rows, errors, bars)


def ffn(shape: Shape, repeats: int) -> Result:
    """One gated FFN with FFN-level experts, forward and backward, against one LoRA on its three linears."""
    config = LlamaConfig(hidden_size=shape.hidden, intermediate_size=shape.ffn)
    module = holder(lambda: LlamaMLP(config))
    ours = MoloraConfig(placement="ffn", **EXPERTS)
    linears = ["gate_proj", "up_proj", "down_proj"]
    peer = LoraConfig(r=32, target_modules=linears, init_lora_weights=False)
    peers: dict[str, Callable[[], nn.Module]] = {}
    if mixlora_peer.available():
        peers["released mixlora block, 8 x r16 top-2"] = lambda: mixlora_peer.MixLoraBlock(
            copy.deepcopy(module).mlp, shape.hidden
        )
    tokens = shape.rows * shape.length
    rows, errors = _compared(module, ours, peer, tokens, shape.hidden, shape.hidden, repeats, peers)
    _, mine, lora, _, mine_in_graph, lora_in_graph, *rest = rows.values()
    bars = [
        Bar("ffn", mine.median_ms / lora.median_ms, 1.05),
        Bar("ffn, CUDA graph", mine_in_graph.median_ms / lora_in_graph.median_ms, 1.05),
        *memory_bar("ffn_memory", mine, lora, 1.05),
        *(Bar("ffn_peer", mine.median_ms / released.median_ms, 0.33) for released in rest),
    ]
    return Result(rows, errors, bars)


@torch.inference_mode()
def decode(shape: Shape, repeats: int) -> Result:
    """One token of each of 1 and 8 rows through a model of 32 layers, in a CUDA graph where there is a GPU."""
    deep = dataclasses.replace(shape, layers=32 if shape.layers > 2 else 2)
    rows: dict[str, Timing] = {}
    bars = []
    model = base(deep).eval()
    limits: dict[Literal["block", "linear"], float] = {"block": 1.15, "linear": 1.25}
    for placement, limit in limits.items():
        torch.manual_seed(2)
        config = MoloraConfig(**EXPERTS | {"placement": placement, "task_type": "CAUSAL_LM"})
        mixture = get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False).eval()
        for batch_size in (1, 8):
            ids = torch.ones(batch_size, 1, dtype=torch.long, device=device())
            subjects = {"base": graphed(model, ids), "mixture": graphed(mixture, ids)}
            timed = measure(subjects, repeats=repeats)
            name = "decode" if placement == "block" else "decode_linear"
            rows |= {f"{key}, {placement}, batch {batch_size}": timing for key, timing in timed.items()}
            ratio = timed["mixture"].median_ms / timed["base"].median_ms
            bars.append(Bar(f"{name}, batch {batch_size}", ratio, limit))
        del mixture
    return Result(rows, {}, bars)


def graphed(model: nn.Module, ids: Tensor) -> Callable[[], Any]:
    """A forward of the model, captured in a CUDA graph if there is a GPU."""

    def forward() -> Any:
        return model(input_ids=ids, use_cache=False).logits

    return captured(forward)
