"""Training an 8B-shaped Llama under DeepSpeed on 1, 2 and 4 GPUs: mixtures beside PEFT's LoRA, step by step.

    python benchmarks/scale.py [--gpus 1 2 4] [--stages 2 3] [--layers 32] [--keep]

Each cell (subject, ZeRO stage, number of GPUs) is a launch of its own through torch.distributed.run and Trainer: random
bf16 weights, at stage 3 created in parts; random tokens; activation checkpointing; router losses on; dropout 0; at
stage 3 the sizes that `molora train` fits to a model, for LoRA too. Cells of fewer GPUs than there are run side by side
on different GPUs. MFU counts what a step must compute, without the recomputation: 4 FLOPs for each frozen weight and
token (forward, gradient of the input), 6 for each active adapter weight, and causal attention. Bars: step time over
that of LoRA in the same stage and on as many GPUs, at most 1.10; tokens per second and GPU on 4 GPUs over those on one,
at least 0.90. --tiny is a look at the code on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

HERE = Path(__file__).parent
SUBJECTS = ("lora", "mixlora", "dynmole")
PEAK_FLOPS = 989e12  # bf16, dense: H100 and H200, NVIDIA's data sheet
SCALING_FROM, SCALING_TO = 1, 4


def peft_config(subject: str) -> Any:
    from peft import LoraConfig

    from molora import MoloraConfig

    if subject == "lora":
        return LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64, target_modules="all-linear")
    if subject == "mixlora":
        return MoloraConfig.from_preset("mixlora", task_type="CAUSAL_LM", lora_dropout=0.0)
    return MoloraConfig.from_preset(
        "dynmole", task_type="CAUSAL_LM", num_experts=8, r=16, target_modules="all-linear", lora_dropout=0.0
    )


def deepspeed_config(stage: int, changes: list[str]) -> dict[str, Any]:
    """What ``molora train --deepspeed zero2`` (or zero3) takes, with changes ``key=JSON`` to its zero_optimization."""
    from molora.train.engine import CONFIGS

    config: dict[str, Any] = json.loads(CONFIGS[f"zero{stage}"].read_text(encoding="utf-8"))
    config["zero_optimization"] |= {key: json.loads(value) for key, value in (c.split("=", 1) for c in changes)}
    return config


def llama_config(options: argparse.Namespace) -> Any:
    from transformers import LlamaConfig

    if options.tiny:
        return LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=options.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )


def model_flops(config: Any, adapter: int, tokens: int, length: int) -> float:
    """Of one step of one GPU: frozen linears and head, adapter weights, causal attention.

    Args:
        adapter: adapter weights that a token meets.
    """
    h, layers = config.hidden_size, config.num_hidden_layers
    kv = h * config.num_key_value_heads // config.num_attention_heads
    frozen = layers * (2 * h * h + 2 * h * kv + 3 * h * config.intermediate_size) + h * config.vocab_size
    attention = layers * 2 * length * h  # scores and values, forward, half of the square; twice that backward
    return tokens * (4.0 * frozen + 6.0 * adapter + 3.0 * attention)


def worker(options: argparse.Namespace) -> None:
    """One cell on one rank; rank 0 writes the outcome."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
    from transformers.utils import logging

    from molora import MoloraConfig
    from molora.integrations.deepspeed import fit_stage3

    logging.set_verbosity_error()
    on_gpu = torch.cuda.is_available()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    args = TrainingArguments(
        output_dir=options.out + ".run",
        per_device_train_batch_size=options.rows,
        max_steps=options.steps,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        deepspeed=deepspeed_config(options.stage, options.zero),
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        learning_rate=1e-4,
    )
    set_seed(0)
    began = time.perf_counter()
    config = llama_config(options)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if options.stage == 3:  # transformers then creates every parameter in parts
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        with torch.device(args.device):
            base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model: Any = get_peft_model(base, peft_config(options.subject))
    fit_stage3(args.hf_deepspeed_config.config, model)
    made = time.perf_counter() - began

    def sizes(condition: Any) -> int:
        return sum(getattr(p, "ds_numel", p.numel()) for n, p in model.named_parameters() if condition(n, p))

    experts = sizes(lambda n, p: "molora_A." in n or "molora_B." in n)
    adapter = sizes(lambda n, p: p.requires_grad)
    own = model.peft_config["default"]
    share = own.router.top_k / own.num_experts if isinstance(own, MoloraConfig) and hasattr(own.router, "top_k") else 1
    ids = torch.randint(0, config.vocab_size, (64, options.length), generator=torch.Generator().manual_seed(rank))
    rows = [{"input_ids": row, "labels": row} for row in ids] * (options.steps * options.rows * world // 64 + 1)
    seconds: list[float] = []

    class Clock(TrainerCallback):
        began = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
                if len(seconds) == 1:
                    torch.cuda.reset_peak_memory_stats()
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)

    loss = Trainer(model=model, args=args, train_dataset=rows, callbacks=[Clock()]).train().training_loss
    timed = seconds[options.warmup :]
    peak = torch.tensor(torch.cuda.max_memory_allocated() if on_gpu else 0, device=args.device)
    torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    tokens = options.rows * options.length
    step = median(timed)
    flops = model_flops(config, round(adapter - experts + share * experts), tokens, options.length)
    cuts = quantiles(timed, n=10, method="inclusive")
    found = {
        "subject": options.subject,
        "stage": options.stage,
        "gpus": world,
        "rows": options.rows,
        "trainable": adapter,
        "median_ms": 1e3 * step,
        "p20_ms": 1e3 * cuts[1],
        "p80_ms": 1e3 * cuts[7],
        "steps": len(timed),
        "tokens_per_second_per_gpu": tokens / step,
        "mfu": flops / step / PEAK_FLOPS if on_gpu else None,
        "peak_bytes": int(peak),
        "loss": loss,
        "seconds_to_make": made,
    }
    if rank == 0:
        Path(options.out).write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


def launch(options: argparse.Namespace, cell: tuple[str, int, int], first: int, folder: str) -> tuple[Any, Path]:
    """Starts a cell on the GPUs from `first` on."""
    subject, stage, gpus = cell
    out = Path(folder) / f"{subject}-{stage}-{gpus}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(gpus)]
    command += ["--master-port", str(29500 + first + 10 * stage), str(HERE / "scale.py"), "--worker", "--out", str(out)]
    command += ["--subject", subject, "--stage", str(stage), "--layers", str(options.layers)]
    for name in ("rows", "length", "steps", "warmup"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--tiny"] if options.tiny else []
    command += ["--zero", *options.zero]
    visible = ",".join(str(first + i) for i in range(gpus))
    log = out.with_suffix(".log").open("w")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible, "OMP_NUM_THREADS": "4"}
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment), out


def cells(options: argparse.Namespace) -> list[list[tuple[str, int, int]]]:
    """Groups of cells that fit onto the GPUs together; the largest first, which the bars need most."""
    groups: list[list[tuple[str, int, int]]] = []
    for gpus in sorted(options.gpus, reverse=True):
        wanted = [(subject, stage, gpus) for stage in options.stages for subject in options.subjects]
        together = max(1, (options.devices or max(options.gpus)) // gpus)
        groups += [wanted[i : i + together] for i in range(0, len(wanted), together)]
    return groups


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by = {(row["subject"], row["stage"], row["gpus"]): row for row in rows}
    found = []
    for (subject, stage, gpus), row in by.items():
        peer, alone = by.get(("lora", stage, gpus)), by.get((subject, stage, SCALING_FROM))
        if subject != "lora" and peer:
            ratio = row["median_ms"] / peer["median_ms"]
            name = f"{subject}, ZeRO-{stage}, {gpus} GPUs: step time over LoRA"
            found.append({"name": name, "value": ratio, "limit": 1.10, "holds": ratio <= 1.10})
        if gpus == SCALING_TO and alone:
            ratio = row["tokens_per_second_per_gpu"] / alone["tokens_per_second_per_gpu"]
            name = f"{subject}, ZeRO-{stage}: scaling from {SCALING_FROM} to {SCALING_TO} GPUs, at least"
            found.append({"name": name, "value": ratio, "limit": 0.90, "holds": ratio >= 0.90})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--devices", type=int, help="GPUs that there are; the most of --gpus if left out")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    parser.add_argument("--zero", nargs="*", default=[], metavar="KEY=JSON", help="changes to zero_optimization")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=12, help="sequences on each GPU; 12 fill one of 80 GB")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--warmup", type=int, default=4, help="steps that are not timed")
    parser.add_argument("--seconds", type=float, default=540, help="no cell is started after so many")
    parser.add_argument("--out", default=str(HERE / "results" / "scale.json"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--subject", choices=SUBJECTS, help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    from molora.eval.results import SCHEMA, environment, write_json

    began = time.perf_counter()
    result: dict[str, Any] = {"schema": SCHEMA, "command": sys.argv, **environment(), "seed": 0, "rows": [], "bars": []}
    with tempfile.TemporaryDirectory() as folder:
        for group in cells(options):
            if time.perf_counter() - began > options.seconds:
                print("no time left for", group)
                continue
            starts = [sum(cell[2] for cell in group[:i]) for i in range(len(group))]
            running = [launch(options, cell, first, folder) for cell, first in zip(group, starts, strict=True)]
            for (process, out), cell in zip(running, group, strict=True):
                process.wait()
                if out.is_file():
                    result["rows"].append(json.loads(out.read_text(encoding="utf-8")))
                    print(json.dumps(result["rows"][-1]), f"at {time.perf_counter() - began:.0f} s", flush=True)
                else:
                    print(cell, "failed:", out.with_suffix(".log").read_text()[-3000:], flush=True)
            result["bars"] = bars(result["rows"])
            if options.keep:  # after each group: a run that is cut off leaves what it has
                write_json(options.out, result)
    print(json.dumps(result["bars"], indent=1))
    return None


if __name__ == "__main__":
    main()
