"""Does the data keep up with training, and what does packing save?

    python benchmarks/input_pipeline.py [--steps 12] [--seconds 5] [--keep]

For each recipe the loader that its run would have, padded and packed, from a table and from a stream: rows and tokens
for each second, labels and padding aside. Beside it the tokens for each second that the training steps alone take from
batches in memory. The bar: data at least five times as fast. A stream's first batch waits for the tasks' buffers; that
is its own column. Prints JSON; --keep writes results/input_pipeline.json beside itself.
MOLORA_DATA is the folder with tasks/ and models/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from molora.eval.results import header, write_json
from molora.train.prepare import prepare, training_arguments
from molora.train.recipe import Recipe, read_recipe
from molora.train.run import make_trainer

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 5.0
UNSCORED = ["evaluation.before=false", "evaluation.after=false"]
TABLE = ["mixing.streaming=false", "mixing.buffer_size=null"]
STREAM = ["mixing.streaming=true", "training.train_sampling_strategy=random"]
# As many tokens in a packed batch as in a padded one, about.
RECIPES: dict[str, dict[str, list[str]]] = {
    "two_tasks": {
        "table": TABLE,
        "stream": STREAM,
        "packed": ["sequence.packing=true", "training.per_device_train_batch_size=8"],
        "packed, one sequence": [
            "sequence.packing=true",
            "training.per_device_train_batch_size=1",
            "training.gradient_accumulation_steps=8",
        ],
    },
    "instruct_local": {
        "table": [*TABLE, *(f"tasks.{name}.size=null" for name in ("gsm8k", "codegen", "t0"))],
        "stream": STREAM,
        "packed": ["sequence.packing=true", "training.per_device_train_batch_size=2"],
        "packed, one sequence": [
            "sequence.packing=true",
            "training.per_device_train_batch_size=1",
            "training.gradient_accumulation_steps=2",
        ],
    },
}


def trainer_of(recipe: Recipe) -> tuple[Any, Any]:
    """The run's trainer, and its training set."""
    model, tokenizer, rows, _ = prepare(recipe)
    return make_trainer(recipe, training_arguments(recipe), model, tokenizer, rows, [], print), rows


def real_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Tokens of a batch that are no padding."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


def num_rows(batch: dict[str, torch.Tensor]) -> int:
    positions = batch.get("position_ids")
    return len(batch["input_ids"]) if positions is None else int((positions == 0).sum())


def pipeline(batches: Iterator[dict[str, torch.Tensor]], seconds: float) -> dict[str, float]:
    """Reads batches for so many seconds after the first one."""
    began = time.perf_counter()
    next(batches)
    first = time.perf_counter() - began
    rows = tokens = 0
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        batch = next(batches, None)
        if batch is None:
            break
        rows, tokens = rows + num_rows(batch), tokens + real_tokens(batch)
    return {"rows_per_second": rows / passed, "tokens_per_second": tokens / passed, "first_batch_seconds": first}


def training(trainer: Any, steps: int) -> dict[str, float]:
    """Training steps alone, on batches in memory."""
    trainer.create_optimizer()
    model, micro = trainer.model.train(), trainer.args.gradient_accumulation_steps
    model.config.use_cache = False
    batches = list(islice(trainer.get_train_dataloader(), (steps + 1) * micro))
    for batch in batches:
        batch.pop("task")
    slots = real = 0
    for number, batch in enumerate(batches):
        if number == micro:  # the first step warms up
            began = time.perf_counter()
        model(**batch).loss.backward()
        if number % micro == micro - 1:
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        if number >= micro:
            slots, real = slots + batch["input_ids"].numel(), real + real_tokens(batch)
    seconds = time.perf_counter() - began
    return {"tokens_per_second": real / seconds, "padding": 1 - real / slots, "tokens_per_step": real / steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="training steps that are timed")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds for which each loader is read")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    table: list[dict[str, Any]] = []
    bars: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in RECIPES.items():
            took: dict[str, dict[str, float]] = {}
            for layout in ("padded", "packed", "packed, one sequence"):
                for source in ("table", "stream"):
                    if source == "stream" and layout == "packed, one sequence":
                        continue
                    overrides = [*changes[source], *changes.get(layout, []), f"training.output_dir={folder}", *UNSCORED]
                    trainer, rows = trainer_of(read_recipe(ROOT / "recipes" / f"{name}.yaml", overrides))
                    if source == "table":
                        took[layout] = training(trainer, options.steps)
                    found = pipeline(iter(trainer.get_train_dataloader()), options.seconds)
                    ratio = found["tokens_per_second"] / took[layout]["tokens_per_second"]
                    fill = getattr(getattr(rows, "report", None), "fill", None)
                    row = {"recipe": name, "layout": layout, "source": source, **found, "fill": fill, "ratio": ratio}
                    table.append(row | {"training": took[layout]})
                    print(json.dumps(table[-1]), file=sys.stderr, flush=True)
                    where = f"{name}, {layout}, {source}: tokens read over tokens trained on"
                    bars.append({"name": where, "value": ratio, "limit": LIMIT, "holds": ratio >= LIMIT})
    result = header(trainer.model, "molora-tiny and babyllama-0.9M", 0) | {
        "command": f"python benchmarks/input_pipeline.py --steps {options.steps} --seconds {options.seconds} --keep",
        "rows": table,
        "bars": bars,
    }
    print(json.dumps({"rows": table, "bars": bars}, indent=1))
    if options.keep:
        write_json(Path(__file__).parent / "results" / "input_pipeline.json", result)


if __name__ == "__main__":
    main()
