"""Is the memory that `molora train --dry-run` shows what training then takes?

    python benchmarks/memory_estimate.py [--keep] [--tiny]

Llamas with random weights in bf16, adapted by molora, of several widths, batches and lengths, with activation
checkpointing and without. For each the estimate is made first, as the dry run makes it; then the same trainer setup
trains three steps, and the most that torch's CUDA allocator held is compared. Rows have the full length but for one
token of padding. Without a GPU (--tiny only) what was held is the sum of the allocations that torch.profiler saw.
Prints JSON; --keep writes results/memory_estimate-<gpu>.json beside itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from molora import MoloraConfig
from molora.bench.subjects import LINEARS, Shape, device
from molora.eval.encode import collate
from molora.eval.results import environment, write_json
from molora.quantization import weight_bytes
from molora.train.checkpoint import AtomicTrainer
from molora.train.memory_estimate import estimate_memory
from molora.train.task_loss import TaskLosses

WITHIN = 0.15
SIZE: dict[str, Any] = {"num_experts": 8, "r": 16, "lora_alpha": 32}
MIXTURES: dict[str, Callable[[], MoloraConfig]] = {
    "top_k": lambda: MoloraConfig(target_modules=LINEARS, router={"top_k": 2}, **SIZE),
    "dynmole": lambda: MoloraConfig.from_preset("dynmole", **SIZE),
    "mixlora": lambda: MoloraConfig.from_preset("mixlora", **SIZE),
}
#              layers hidden   ffn heads kv   vocab rows length
NARROW = Shape(12, 1024, 2816, 16, 8, 32000, 8, 1024)
MIDDLE = Shape(16, 2048, 8192, 32, 8, 128256, 4, 2048)
WIDE = Shape(8, 4096, 14336, 32, 8, 32000, 1, 4096)
MANY = Shape(12, 1024, 2816, 16, 8, 32000, 32, 256)
CELLS: list[tuple[str, Shape, dict[str, Any]]] = [
    ("top_k", NARROW, {}),
    ("top_k", MIDDLE, {}),
    ("dynmole", MIDDLE, {"gradient_accumulation_steps": 2}),
    ("dynmole", MANY, {"optim": "sgd"}),
    ("mixlora", MIDDLE, {}),
    ("mixlora", WIDE, {"bf16": True}),
]
TINY = [
    ("top_k", Shape(2, 64, 128, 4, 2, 4096, 4, 128), {}),
    ("dynmole", Shape(2, 256, 512, 4, 2, 300, 1, 64), {"gradient_accumulation_steps": 2}),
    ("mixlora", Shape(2, 64, 128, 4, 2, 1000, 2, 192), {"optim": "sgd"}),
]


def trainer_of(mixture: str, shape: Shape, options: dict[str, Any], folder: str) -> AtomicTrainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.length,
    )
    with torch.device(device()):
        model = get_peft_model(LlamaForCausalLM(config).bfloat16(), MIXTURES[mixture]())
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=shape.rows,
        max_steps=3,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device().type == "cpu",
        **options,
    )
    count = shape.rows * args.gradient_accumulation_steps
    rows = [row(shape.length - (i % shape.rows == 1), i) for i in range(count)]
    made = AtomicTrainer(model=model, args=args, train_dataset=rows, data_collator=collate)
    made.task_losses = TaskLosses(["random"])
    return made


def row(length: int, seed: int) -> dict[str, Any]:
    ids = torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": ids, "task": 0, "task_label": 0}


def held(trainer: AtomicTrainer) -> int:
    """The most that training held, bytes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        trainer.train()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most + weight_bytes(trainer.model)


def empty() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device to measure on; --tiny runs the same code on toy models, for a look at it")
    rows, bars = [], []
    for mixture, shape, settings in TINY if options.tiny else CELLS:
        for checkpointing in (False, True):
            setup = (mixture, shape, settings | {"gradient_checkpointing": checkpointing})
            with tempfile.TemporaryDirectory() as folder:
                trainer = trainer_of(*setup, folder)
                estimate = estimate_memory(trainer, shape.rows, shape.length)
                del trainer
                empty()
                trainer = trainer_of(*setup, folder)
                empty()
                measured = held(trainer)
                del trainer
                empty()
            name = f"{mixture}, {shape.layers} x {shape.hidden}, {shape.rows} x {shape.length}"
            name += "".join(f", {key}={value}" for key, value in setup[2].items() if value is not False)
            row_of = {"name": name, "shape": asdict(shape), "estimate": asdict(estimate), "measured_bytes": measured}
            rows.append(row_of | {"estimated_bytes": estimate.total})
            off = abs(estimate.total / measured - 1)
            bars.append({"name": name, "value": off, "limit": WITHIN, "holds": off <= WITHIN})
            print(
                f"{name}: {estimate.total / 2**20:,.0f} MiB estimated, {measured / 2**20:,.0f} measured",
                file=sys.stderr,
            )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    command = ["python", "benchmarks/memory_estimate.py", *sys.argv[1:]]
    result = {"command": command, "gpu": gpu, **environment(), "rows": rows, "bars": bars}
    print(json.dumps({"bars": bars}, indent=1))
    if options.keep:
        slug = gpu.replace(" ", "-").lower()
        write_json(Path(__file__).parent / "results" / f"memory_estimate-{slug}.json", result)


if __name__ == "__main__":
    main()
