"""What does it cost to make one model of a hundred LoRA adapters?

    python benchmarks/import_cost.py [--adapters 100] [--keep]

A random Llama of the shape of Llama-3.2-1B, bf16, and adapters of ranks 4, 8 and 16 on every linear, written to a
temporary directory; then `molora.from_adapters` with the arrow router on the CPU, prototypes included. Memory is the
peak of the process above what the base holds, over the adapters' own bytes. Prints JSON; --keep writes
results/import_cost.json beside itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from molora import from_adapters
from molora.adapters.lora_files import LoraPair, write_lora
from molora.eval.results import header, write_json
from molora.layers import linear_features

RANKS = (4, 8, 16)
LIMITS = {"seconds": 60.0, "memory": 2.0}


def base_model() -> LlamaForCausalLM:
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
    config = LlamaConfig(**shape, num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def write_adapters(base: LlamaForCausalLM, count: int, folder: Path) -> dict[str, str]:
    sizes = {name: linear_features(module) for name, module in base.named_modules() if "lm_head" not in name}
    linears = {name: size for name, size in sizes.items() if size is not None}
    paths = {}
    for i in range(count):
        r = RANKS[i % len(RANKS)]
        pairs = {
            name: LoraPair(torch.randn(r, D).bfloat16() / D**0.5, torch.randn(O, r).bfloat16() / r**0.5, 2.0)
            for name, (D, O) in linears.items()
        }
        write_lora(folder / f"a{i}", pairs, "base", model=base)
        paths[f"a{i}"] = str(folder / f"a{i}")
    return paths


def memory(what: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    base = base_model()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_adapters(base, options.adapters, Path(folder))
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of what came before
        before, began = memory("VmRSS"), time.perf_counter()
        from_adapters(base, paths, "arrow")
        seconds, peak, after = time.perf_counter() - began, memory("VmHWM") - before, memory("VmRSS") - before
    values = {"seconds": seconds, "memory": peak / size}
    result = header(base, "Llama-3.2-1B shape", 0) | {
        "command": f"python benchmarks/import_cost.py --adapters {options.adapters} --keep",
        "rows": [{"adapters": options.adapters, "ranks": list(RANKS), "bytes": size, "peak": peak, "after": after}],
        "bars": [
            {"name": name, "value": value, "limit": LIMITS[name], "holds": value <= LIMITS[name]}
            for name, value in values.items()
        ],
    }
    print(json.dumps({"rows": result["rows"], "bars": result["bars"]}, indent=1))
    if options.keep:
        write_json(Path(__file__).parent / "results" / "import_cost.json", result)


if __name__ == "__main__":
    main()
