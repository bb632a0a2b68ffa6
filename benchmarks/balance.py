"""Does the balance loss balance? From a collapsed start, with the loss and without it: the largest load over 200 steps.

    python benchmarks/balance.py

A tiny random Llama with 8 experts learns which token follows which; the router's first logit gets a constant head start
on every token, so that top-1 routing sends nearly all of them to one expert. Writes results/balance.json beside itself.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import molora
from molora.telemetry import routing_statistics

NUM_EXPERTS = 8
VOCAB = 256
RESULTS = Path(__file__).parent / "results" / "balance.json"


def collapsed_model(coef: float, seed: int) -> peft.PeftModel:
    """One FFN mixture with top-1 routing whose router prefers expert 0 for every token."""
    torch.manual_seed(seed)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=VOCAB,
            initializer_range=0.1,
            use_cache=False,
        )
    )
    with torch.no_grad():
        # All hidden states share a direction, as they do in trained models; the router looks along it.
        base.model.embed_tokens.weight.add_(0.5)
    router = {"name": "top_k", "top_k": 1, "norm_topk_prob": False, "router_aux_loss_coef": coef, "init_std": 0.02}
    config = molora.MoloraConfig(
        num_experts=NUM_EXPERTS, r=4, lora_alpha=8, placement="ffn", router=router, init_lora_weights=True
    )
    model = get_peft_model(base, config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molora_router" in name:
                parameter[0].add_(0.1)
    return model


def largest_load(coef: float, steps: int, seed: int) -> list[float]:
    """The share of tokens of the busiest expert, before each step and after the last one."""
    model = collapsed_model(coef, seed)
    generator = torch.Generator().manual_seed(seed)
    following = torch.randperm(VOCAB, generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    loads = []
    for step in range(steps + 1):
        ids = torch.randint(VOCAB, (16, 1), generator=generator)
        for _ in range(15):
            noise = torch.randint(VOCAB, (16, 1), generator=generator)
            keep = torch.rand(16, 1, generator=generator) < 0.8
            ids = torch.cat([ids, torch.where(keep, following[ids[:, -1:]], noise)], 1)
        loss = model(input_ids=ids, labels=ids).loss
        (statistics,) = routing_statistics(model).values()
        loads.append(float(statistics["load"].max()))
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return loads


def run(coef: float = 0.2, steps: int = 200, seed: int = 0) -> dict[str, Any]:
    """Both curves and what made them."""
    with_loss, without = largest_load(coef, steps, seed), largest_load(0.0, steps, seed)
    return {
        "schema": "molora.results/1",
        "command": "python benchmarks/balance.py",
        "versions": {
            "molora": molora.__version__,
            "peft": peft.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": {
            "num_experts": NUM_EXPERTS,
            "top_k": 1,
            "router_aux_loss_coef": coef,
            "steps": steps,
            "seed": seed,
        },
        "bar": {"largest_load_below": 2 / NUM_EXPERTS, "within_steps": 200},
        "first_step_below_bar": next((i for i, load in enumerate(with_loss) if load < 2 / NUM_EXPERTS), None),
        "curves": {"largest_load_with_loss": with_loss, "largest_load_without": without},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--coef", type=float, default=0.2, help="router_aux_loss_coef of the run with the loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = run(arguments.coef, arguments.steps, arguments.seed)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, curve in result["curves"].items():
        print(f"{name}: {curve[0]:.3f} at the start, {curve[-1]:.3f} after {arguments.steps} steps")


if __name__ == "__main__":
    main()
