"""Arrow here beside PEFT's `create_arrow_model`: the same logits, and the time and memory of a forward.

    python benchmarks/arrow_peer.py [--keep]

Four layers of the shape of Llama-3.2-1B (random, small vocabulary), adapters of rank 8 on q, k, v and o, 256 tokens,
top 3, fp32, one CPU thread, each case in a process of its own. Agreement: the largest difference of logits with the
prototypes that PEFT's power iteration makes, over the largest logit. Peak: what the forward allocates at most. Made:
seconds from paths to model, first forward included (PEFT makes its prototypes there). Prints the table; --keep writes
results/arrow_peer.json beside itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from molora import from_adapters, set_prototypes
from molora.eval.results import header, write_json

COUNTS = (4, 16, 64)
SEED, ITERATIONS = 42, 15


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "vocab_size": 128}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=32, num_key_value_heads=8)).eval()


def write_adapters(folder: Path) -> None:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    options = {"r": 8, "lora_alpha": 16, "target_modules": targets, "init_lora_weights": False}
    model = get_peft_model(base_model(), LoraConfig(task_type="CAUSAL_LM", **options))
    for i in range(max(COUNTS)):
        torch.manual_seed(i + 1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(str(folder / f"a{i}"))


@torch.no_grad()
def case(kind: str, count: int, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    paths = {f"a{i}": str(folder / f"a{i}") for i in range(count)}
    base, ids = base_model(), torch.randint(3, 128, (1, 256), generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    if kind == "peft":
        model = create_arrow_model(base, list(paths.values()), ArrowConfig(top_k=3, rng_seed=SEED)).eval()
    else:
        model = from_adapters(base, paths, "arrow") if kind == "molora" else base
    model(input_ids=ids)
    made, times = time.perf_counter() - began, []
    for _ in range(9):
        began = time.perf_counter()
        model(input_ids=ids)
        times.append(time.perf_counter() - began)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model(input_ids=ids)
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    if kind == "molora":  # for the comparison of logits, after what is measured
        set_prototypes(model, power_iterations=ITERATIONS, seed=SEED)
    torch.save(model(input_ids=ids).logits, folder / f"{kind}-{count}.pt")
    quantiles = statistics.quantiles(times, n=5)
    row = {
        "kind": kind,
        "experts": count,
        "seconds": statistics.median(times),
        "p20": quantiles[0],
        "p80": quantiles[3],
    }
    return row | {"peak_bytes": peak, "made": made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(case(options.case[0], int(options.case[1]), Path(options.case[2]))))
        return
    rows, bars = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(Path(folder))
        for count in COUNTS:
            for kind in ("base", "molora", "peft"):
                command = [sys.executable, __file__, "--case", kind, str(count), folder]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(rows[-1], flush=True)
            ours, theirs = (torch.load(Path(folder) / f"{kind}-{count}.pt") for kind in ("molora", "peft"))
            error = float((ours - theirs).abs().max() / theirs.abs().max())
            bars.append({"name": f"agreement_{count}", "value": error, "limit": 1e-4, "holds": error <= 1e-4})
            print(bars[-1], flush=True)
    if options.keep:
        found = {"command": "python benchmarks/arrow_peer.py --keep", "rows": rows, "bars": bars}
        write_json(
            Path(__file__).parent / "results" / "arrow_peer.json",
            header(base_model(), "four layers of Llama-3.2-1B's shape", 0) | found,
        )


if __name__ == "__main__":
    main()
