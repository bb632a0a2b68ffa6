"""Do experts specialise? A planted task-switching problem with known task labels, for every preset.

    python benchmarks/specialisation.py [--presets mixlora dynmole ...]

Four tasks, each with 16 tokens of its own whose embeddings lie around a direction of the task; every sequence switches
between tasks. For each task a random LoRA of a random frozen Llama is the teacher: the label of a token is what the
teacher of its task predicts. A mixture of eight experts of half the teachers' rank learns those labels. Then the
largest gate of a token predicts its task: each expert stands for the task that most of its tokens had in one half of
fresh data, and the accuracy is counted on the other half, for each router; before training and after it. The bar is on
the best router of the model, since not every module's input tells the task: attention's output mixes the tasks of a
sequence. Writes results/specialisation.json beside itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import molora
from molora import MoloraConfig, record_routing
from molora.presets import PRESETS
from molora.routers import Centroid
from molora.routers.centroid import CentroidRouter

TASKS, SYMBOLS, RANK, EXPERTS, LENGTH, SEGMENT = 4, 16, 4, 8, 32, 8
RESULTS = Path(__file__).parent / "results" / "specialisation.json"
BAR = 0.9

# What the presets need to fit the problem; the balance and entropy losses stay at their defaults.
SIZES: dict[str, dict[str, Any]] = {
    "smora": {"num_experts": 1, "r": TASKS * RANK, "router": {"active_ranks": RANK, "bias_update_rate": 1e-3}},
    "mola": {"num_experts": [EXPERTS, EXPERTS]},
    "meteora": {"num_experts": TASKS, "r": RANK},
    "mixlora-switch": {"router": {"expert_capacity": 16}},
    "loramoe": {"router": {"localized_balance_coef": 0.1, "localized_balance_delta": 0.5}},
    "lora-tle": {"num_experts": TASKS, "r": RANK, "target_modules": "all-linear"},
}
# Methods that do not claim that an expert stands for a task, or cannot reach it, and why.
NO_CLAIM = {
    "llava-mole": "the language-model loss gives its router no gradient; only the balance loss moves it",
    "hydralora": "dense: every head works for every token",
    "molora": "dense soft mixture: every expert works for every token",
    "mole": "dense, and its balance loss asks for equal mean gates",
    "loramoe": "dense; its labels tell two task types apart, so a half of the experts stands for two of the four tasks",
}
# Systems whose experts come trained are measured by imported_experts.py.
SUBJECTS = PRESETS.keys() - {"arrow", "phatgoose", "loraretriever", "xlora-single-pass"}


def base_model(seed: int) -> LlamaForCausalLM:
    """A random Llama whose token embeddings are grouped by task."""
    torch.manual_seed(seed)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=TASKS * SYMBOLS,
            initializer_range=0.1,
            use_cache=False,
        )
    )
    with torch.no_grad():
        directions = torch.randn(TASKS, 1, 64)
        base.model.embed_tokens.weight.copy_((directions + 0.7 * torch.randn(TASKS, SYMBOLS, 64)).flatten(0, 1))
    return base


class Problem:
    """Batches of tokens, the labels of their tasks' teachers, and the tasks."""

    def __init__(self, seed: int) -> None:
        self.teacher = get_peft_model(base_model(seed), self._lora(), adapter_name="task0")
        for task in range(1, TASKS):
            self.teacher.add_adapter(f"task{task}", self._lora())
        torch.manual_seed(seed + 1)
        for name, parameter in self.teacher.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.6 / parameter.shape[1] ** 0.5)
        self.teacher.eval()

    @staticmethod
    def _lora() -> LoraConfig:
        return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")

    @torch.no_grad()
    def batch(self, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        tasks = torch.randint(TASKS, (rows, LENGTH // SEGMENT), generator=generator).repeat_interleave(SEGMENT, 1)
        ids = tasks * SYMBOLS + torch.randint(SYMBOLS, tasks.shape, generator=generator)
        answers = torch.empty_like(ids)
        for task in range(TASKS):
            self.teacher.set_adapter(f"task{task}")
            predicted = self.teacher(input_ids=ids).logits.argmax(-1)
            answers = torch.where(tasks == task, predicted, answers)
        # The model shifts labels: the label at t + 1 is the answer to token t.
        labels = torch.cat([torch.full_like(ids[:, :1], -100), answers[:, :-1]], 1)
        return {"input_ids": ids, "labels": labels, "tasks": tasks}


def mixture(name: str, seed: int) -> peft.PeftModel:
    options: dict[str, Any] = {"num_experts": EXPERTS, "r": RANK // 2, "lora_alpha": RANK, "lora_dropout": 0.0}
    sizes = SIZES.get(name, {})
    torch.manual_seed(seed + 2)
    return get_peft_model(base_model(seed), MoloraConfig.from_preset(name, **options | sizes))


def task_labels(name: str, tasks: Tensor) -> dict[str, Tensor]:
    """MeteoRA learns the tasks themselves; LoRAMoE one type for each row, here that of its first token."""
    if name == "meteora":
        return {"task_labels": tasks}
    return {"task_labels": tasks[:, 0] // 2} if name == "loramoe" else {}


@torch.no_grad()
def set_centroids(model: peft.PeftModel, problem: Problem, seed: int) -> None:
    """Example prompts of one task each, as `model.set_centroids` averages them; there is no tokenizer here."""
    generator = torch.Generator().manual_seed(seed + 3)
    inputs: dict[str, list[Tensor]] = {}
    layers = {n: m for n, m in model.named_modules() if "default" in getattr(m, "molora_router", {})}
    handles = [
        layer.register_forward_pre_hook(lambda m, args, name=name: inputs.setdefault(name, []).append(args[0]))
        for name, layer in layers.items()
    ]
    with model.disable_adapter():
        for task in range(TASKS):
            ids = task * SYMBOLS + torch.randint(SYMBOLS, (16, LENGTH), generator=generator)
            model(input_ids=ids)
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        router = layer.molora_router["default"]
        assert isinstance(router, CentroidRouter)
        router.set_vectors(torch.stack([x.flatten(0, -2).mean(0) for x in inputs[name]]))


@torch.no_grad()
def predicted_tasks(model: peft.PeftModel, problem: Problem, seed: int) -> dict[str, float]:
    """For each router the accuracy of the largest gate as a predictor of the task."""
    model.eval()
    batch = problem.batch(256, torch.Generator().manual_seed(seed + 4))
    with record_routing(model) as routing:
        model(input_ids=batch["input_ids"])
    model.train()
    tasks = batch["tasks"].flatten()
    half = len(tasks) // 2
    accuracies = {}
    for name in routing:
        choice = routing[name].gates.argmax(1)
        counts = torch.zeros(routing[name].gates.shape[1], TASKS)
        counts.index_put_((choice[:half], tasks[:half]), torch.ones(half), accumulate=True)
        accuracies[name] = float((counts.argmax(1)[choice[half:]] == tasks[half:]).float().mean())
    return accuracies


def run(name: str, steps: int, seed: int) -> dict[str, Any]:
    """Trains one preset and measures it."""
    began = time.perf_counter()
    problem, model = Problem(seed), mixture(name, seed).train()
    if isinstance(model.peft_config["default"].router, Centroid):
        set_centroids(model, problem, seed)
    before = predicted_tasks(model, problem, seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    generator = torch.Generator().manual_seed(seed + 5)
    losses = []
    for _ in range(steps):
        batch = problem.batch(32, generator)
        tasks = batch.pop("tasks")
        loss = model(**batch, **task_labels(name, tasks)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    after = predicted_tasks(model, problem, seed)
    return {
        "loss": [sum(losses[:10]) / 10, sum(losses[-10:]) / 10],
        "before": _summary(before),
        "after": _summary(after),
        "routers": after,
        "no_claim": NO_CLAIM.get(name),
        "seconds": time.perf_counter() - began,
    }


def _summary(accuracies: dict[str, float]) -> dict[str, float]:
    values = sorted(accuracies.values())
    return {"mean": sum(values) / len(values), "lowest": values[0], "highest": values[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    presets = {}
    for name in args.presets:
        presets[name] = result = run(name, args.steps, args.seed)
        print(
            f"{name:16s} loss {result['loss'][0]:.2f} -> {result['loss'][1]:.2f}  task from the largest gate: before "
            f"{result['before']['mean']:.3f}, after mean {result['after']['mean']:.3f}, lowest "
            f"{result['after']['lowest']:.3f}, highest {result['after']['highest']:.3f}  ({result['seconds']:.0f} s)",
            flush=True,
        )
    bars = [
        {"name": name, "value": r["after"]["highest"], "limit": BAR, "holds": r["after"]["highest"] >= BAR}
        for name, r in presets.items()
        if r["no_claim"] is None
    ]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    results = {
        "schema": "molora.results/1",
        "command": "python benchmarks/specialisation.py",
        "versions": versions | {"molora": molora.__version__, "python": platform.python_version()},
        "settings": {
            "tasks": TASKS,
            "symbols": SYMBOLS,
            "rank": RANK,
            "experts": EXPERTS,
            "steps": args.steps,
            "seed": args.seed,
        },
        "presets": presets,
        "bars": bars,
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
