"""What does a mixture cost on a 4-bit base, beside PEFT's QLoRA?

    python benchmarks/quantized.py [--layers 32] [--rows 4] [--length 2048] [--repeats 10] [--keep] [--tiny]

A Llama of the shape of Llama-3-8B with random weights in NF4, made linear by linear, so that the 16-bit model is never
there. On it, in one run and in turn: PEFT's LoRA of rank 32 on all linears (adapters in bf16, and in fp32 as PEFT makes
them by default), and molora's mixtures of 8 experts of rank 16. Each step is forward, backward and fused AdamW, with
activation checkpointing. The frozen weights are shared between the subjects. Of memory the bar is on what a step needs
above weights and optimizer states; total_bytes has all of it, as if the subject were alone: the mixtures train several
times PEFT's parameters. Then each mixture is saved, loaded on the base again, and its logits are compared bit by bit.
Prints JSON; --keep writes results/quantized-<gpu>.json beside itself. --tiny: a toy, for a look at the code.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from molora import MoloraConfig
from molora.bench.measure import measure
from molora.bench.subjects import LINEARS, LLAMA_8B, TINY, Shape, batch, device
from molora.eval.results import environment, parameters, write_json

DTYPE = torch.bfloat16
LIMIT = 1.10
SIZE = {"num_experts": 8, "r": 16, "lora_alpha": 32}
MIXTURES: dict[str, Callable[[], MoloraConfig]] = {
    "linear_all": lambda: MoloraConfig(target_modules=LINEARS, router={"top_k": 2}, **SIZE),  # type: ignore[arg-type]
    "dynmole": lambda: MoloraConfig.from_preset("dynmole", **SIZE),
    "mixlora": lambda: MoloraConfig.from_preset("mixlora", **SIZE),
}


def base_model(shape: Shape) -> LlamaForCausalLM:
    """A random frozen Llama whose linears, but for the head, are NF4; one linear at a time is there in 16 bits."""
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=max(4096, shape.length),
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(DTYPE)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nf4_linear(module.in_features, module.out_features))
        elif isinstance(module, nn.Embedding) or name == "lm_head":
            module.weight = nn.Parameter(0.02 * torch.randn(*module.weight.shape, device=device(), dtype=DTYPE))
        elif "norm" in name:
            module.weight = nn.Parameter(torch.ones(*module.weight.shape, device=device(), dtype=DTYPE))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device())
    model.is_quantized = model.is_loaded_in_4bit = True  # as from_pretrained says it; PEFT chooses its layer by this
    return model.requires_grad_(False)


def nf4_linear(inputs: int, outputs: int) -> nn.Module:
    linear = bnb.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=DTYPE, quant_type="nf4", device="meta")
    values = 0.02 * torch.randn(outputs, inputs, device=device(), dtype=DTYPE)
    weight = bnb.nn.Params4bit(values, False, compress_statistics=False, quant_type="nf4", module=linear)
    linear.weight = weight.to(device())
    return linear


def copied(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy that shares the frozen weights, with activation checkpointing."""
    frozen = {id(p): p for p in model.parameters()}
    copy_of = copy.deepcopy(model, frozen)
    copy_of.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return copy_of


def subjects(model: LlamaForCausalLM, names: list[str]) -> dict[str, PeftModel]:
    made = {}
    for name, fp32 in (("peft", False), ("peft_default", True)):
        torch.manual_seed(1)
        lora = LoraConfig(r=32, lora_alpha=64, target_modules=LINEARS, init_lora_weights=False)
        made[name] = get_peft_model(copied(model), lora, autocast_adapter_dtype=fp32)
    for name in names:
        torch.manual_seed(1)
        made[name] = get_peft_model(copied(model), MIXTURES[name]())
    return {name: one.train() for name, one in made.items()}


def step_of(model: PeftModel, inputs: dict[str, Tensor]) -> tuple[Callable[[], Any], torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, optimizer


def own_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Weights, frozen ones with their quantisation, and optimizer states."""
    found = {t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
    for p in model.parameters():
        if (state := getattr(p, "quant_state", None)) is not None:
            found |= {t.untyped_storage() for t in (state.absmax, state.code)}
    sizes = {s.data_ptr(): s.nbytes() for s in found}
    states = (t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
    return sum(sizes.values()) + sum(t.nbytes for t in states)


def reload_differs(model: PeftModel, base: LlamaForCausalLM, ids: Tensor) -> int:
    """How many logits differ between the trained mixture and what is loaded from where it was saved."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        want = model.eval()(input_ids=ids).logits
        model.save_pretrained(folder)
        got = PeftModel.from_pretrained(copied(base), folder).eval()(input_ids=ids).logits
    return int((want != got).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--mixtures", nargs="+", choices=MIXTURES, default=list(MIXTURES))
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device to measure on; --tiny runs the same code on a toy model, for a look at it")
    big = Shape(**asdict(LLAMA_8B) | {k: getattr(options, k) for k in ("layers", "rows", "length")})
    shape = TINY if options.tiny else big
    base, inputs = base_model(shape), batch(shape)
    models = subjects(base, options.mixtures)
    steps = {name: step_of(model, inputs) for name, model in models.items()}
    timings = measure({name: step for name, (step, _) in steps.items()}, repeats=options.repeats)
    rows = []
    for name, timing in timings.items():
        held = own_bytes(models[name], steps[name][1])
        total = held + timing.peak_bytes
        rows.append({"name": name, **asdict(timing), "total_bytes": total, "parameters": parameters(models[name])})
    found = {row["name"]: row for row in rows}
    bars = [
        {"name": f"{name}: {what} over peft", "value": found[name][key] / found["peft"][key], "limit": LIMIT}
        for name in options.mixtures
        for what, key in (("step time", "median_ms"), ("memory of a step", "peak_bytes"))
        if found["peft"][key]
    ]
    ids = inputs["input_ids"][:1, :256]
    for name in options.mixtures:
        differ = reload_differs(models[name], base, ids)
        bars.append({"name": f"{name}: logits that differ after reload", "value": differ, "limit": 0})
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {
        "command": ["python", "benchmarks/quantized.py", *sys.argv[1:]],
        "gpu": gpu,
        **environment(),
        "bitsandbytes": bnb.__version__,
        "shape": asdict(shape),
        "rows": rows,
        "bars": [bar | {"holds": bar["value"] <= bar["limit"]} for bar in bars],
    }
    print(json.dumps({"rows": result["rows"], "bars": result["bars"]}, indent=1))
    if options.keep:
        write_json(Path(__file__).parent / "results" / f"quantized-{gpu.replace(' ', '-').lower()}.json", result)


if __name__ == "__main__":
    main()
