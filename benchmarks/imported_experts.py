"""Four LoRAs of one base, each of one task, as the experts of one model: what does each way of choosing cost and give?

    python benchmarks/imported_experts.py [--base molora-tiny] [--dtype float32] [--keep]
    python benchmarks/imported_experts.py --train clinc150      # this LoRA only; each may have its own process
    python benchmarks/imported_experts.py --systems arrow ties  # so may systems, once the LoRAs are there

Trains a LoRA for each of four tasks of recipes/separable.yaml, imports them, and scores each system on the rows of each
task as they are ("alone"), and behind a solved row of another task ("mixed"), where the prompt shows two tasks and asks
for the second. Systems: each LoRA on its own task (the oracle choice); their average and TIES merge, by PEFT; arrow,
centroids, retrieval by prompt, LoRA-TLE with an embedder that reads the running text; gates trained for 100 steps, each
on its task (PHATGOOSE), and by task labels (MeteoRA). Prepared: seconds that a system took beyond the LoRAs and the
loaded base. What is done is kept under --out. --keep writes results/imported_experts.json beside itself.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import random
import re
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TASKS = ("clinc150", "agnews", "scan", "geography")
SYSTEMS = (
    *("oracle choice", "base"),
    *("average", "average of products", "ties", "arrow", "centroid", "centroid, one layer"),
    *("retrieval, selection", "retrieval, mixture", "retrieval, fusion", "lora-tle", "lora-tle, every other"),
    *("phatgoose", "meteora"),
)
TOKENS = {"geography": 80}  # written at most; longer queries count as wrong
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
BETWEEN = "\n\n"  # stands between two tasks of one prompt


def recipe_of(options: Any, tasks: tuple[str, ...], **sections: Any) -> Any:
    """separable.yaml with these tasks only."""
    from molora.train.recipe import read_recipe

    recipe = read_recipe(
        HERE.parent / "recipes" / "separable.yaml", [f"base.model={options.base}", f"base.dtype={options.dtype}"]
    )
    training = {**recipe.training, "max_steps": options.steps, "output_dir": str(options.out / "unused")}
    training |= {"per_device_train_batch_size": options.train_batch_size}
    wanted = [task for task in recipe.tasks if task.name in tasks]
    evaluation = replace(recipe.evaluation, before=False, after=False)
    limited = [replace(t, eval=replace(t.eval, limit=options.rows, max_new_tokens=TOKENS.get(t.name))) for t in wanted]
    return replace(recipe, tasks=limited, training=training, evaluation=evaluation, **sections)


def train_loras(options: Any) -> dict[str, str]:
    """A LoRA for each task, or for those of --train; the directory of each."""
    from molora.train.run import train

    paths = {}
    for name in options.train or TASKS:
        out = options.out / "loras" / name
        if not (out / "results.json").is_file():
            recipe = recipe_of(options, (name,), mixture=None, lora=LORA)
            train(replace(recipe, training={**recipe.training, "output_dir": str(out)}))
        paths[name] = str(out)
    return paths


def mixed(task: Any, others: list[Any], options: Any) -> Any:
    """The task's evaluation rows, each behind a solved training row of another task; no longer than they can be."""
    from molora.eval.results import write_text
    from molora.eval.rows import load_rows
    from molora.eval.tasks import eval_task, fill

    draw, solved = random.Random(0), []
    for other in others:
        rows = load_rows(replace(other, eval=None, limit=200)).to_list()
        words = other.choices or {}
        for row in rows:
            answer = fill(other.answer, row)
            solved.append(fill(other.prompt, row) + words.get(answer, answer))
    solved = [text for text in solved if len(text) < 300]
    own = eval_task(task)
    path = options.out / "mixed" / f"{task.name}.jsonl"
    lines = []
    for row in load_rows(own).to_list():
        prompt = draw.choice(solved) + BETWEEN + fill(own.prompt, row)
        lines.append(json.dumps({"prompt": prompt, "answer": fill(own.answer, row)}))
    write_text(path, "\n".join(lines) + "\n")
    plain = {"columns": None, "parse": None, "replace": None, "field": None, "split": "train"}
    evaluation = replace(task.eval, data=str(path), limit=None, split=None)
    return replace(task, data=str(path), prompt="{prompt}", answer="{answer}", eval=evaluation, **plain)


def examples_of(recipe: Any, tokenizer: Any, count: int = 20) -> dict[str, list[str]]:
    """The prompts of each task's first training rows."""
    from molora.eval.rows import load_rows
    from molora.eval.tasks import fill

    found = {}
    for task in recipe.tasks:
        rows = load_rows(replace(task, eval=None, limit=count)).to_list()
        found[task.name] = [fill(task.prompt, row) for row in rows]
    return found


def text_embedder(base: str, out: Path) -> str:
    """A sentence-transformers directory that means over the base's own last hidden states."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    from molora.eval.models import resolve

    if not out.is_dir():
        words = Transformer(resolve(base), max_seq_length=256)
        SentenceTransformer(modules=[words, Pooling(words.get_word_embedding_dimension())], device="cpu").save(str(out))
    return str(out.resolve())


def systems(options: Any, paths: dict[str, str], tokenizer: Any, embedder: str = "") -> dict[str, Callable[[Any], Any]]:
    """How each system is made of the base."""
    from peft import PeftModel

    from molora import average_adapters, from_adapters
    from molora.train.run import train

    recipe = recipe_of(options, TASKS)
    examples = examples_of(recipe, tokenizer)

    def averaged(combination: str) -> Callable[[Any], Any]:
        def make(base: Any) -> Any:
            out = options.out / f"average-{combination}"
            average_adapters(base, paths, out, combination=combination)
            return PeftModel.from_pretrained(base, str(out))

        return make

    def routed(router: dict[str, Any], asked: bool = False) -> Callable[[Any], Any]:
        def make(base: Any) -> Any:
            model = from_adapters(base, paths, router)
            if asked:
                model.set_centroids(examples, tokenizer)
            return model

        return make

    def trained(router: dict[str, Any]) -> Callable[[Any], Any]:
        def make(base: Any) -> Any:
            out = options.out / f"gates-{router['name']}"
            section = {"adapters": paths, "router": router}
            own = recipe_of(options, TASKS, mixture=section, lora=None)
            # Each step has rows of every task, so that every gate learns in each.
            steps = {"max_steps": 100, "learning_rate": 5e-3, "output_dir": str(out), "warmup_steps": 10}
            shutil.rmtree(out, ignore_errors=True)  # of a run that ended before its scores were written
            train(replace(own, training={**own.training, **steps}))
            return PeftModel.from_pretrained(base, str(out))

        return make

    reading = {"name": "centroid", "embedder": embedder}
    meteora = {"name": "top_k", "top_k": 2, "task_loss_coef": 50.0, "router_aux_loss_coef": 0.0, "init_std": None}
    return {
        "base": lambda base: base,
        "average": averaged("linear"),
        "average of products": averaged("cat"),
        "ties": averaged("ties"),
        "arrow": routed({"name": "arrow"}),
        "centroid": routed({"name": "centroid"}, True),
        "centroid, one layer": routed({"name": "centroid", "layer": 2}, True),
        "retrieval, selection": routed({"name": "retrieval", "top_k": 1}, True),
        "retrieval, mixture": routed({"name": "retrieval", "top_k": 2}, True),
        "retrieval, fusion": routed({"name": "retrieval", "top_k": 2, "composition": "fusion"}, True),
        "lora-tle": routed(reading, True),
        "lora-tle, every other": routed({**reading, "reweight_every": 2}, True),
        "phatgoose": trained({"name": "phatgoose"}),
        "meteora": trained(meteora),
    }


def common_options(description: str | None) -> argparse.ArgumentParser:
    """What the making of the systems needs to know."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="molora-tiny")
    parser.add_argument("--dtype", default="auto", help="of the base; float32 on a CPU")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--train-batch-size", type=int, default=32, help="rows of a training step")
    parser.add_argument("--rows", type=int, default=200, help="rows of each task that are scored")
    parser.add_argument("--keep", action="store_true", help="writes the result into benchmarks/results")
    return parser


def main() -> None:
    parser = common_options(__doc__)
    parser.add_argument("--batch-size", type=int, default=64, help="rows that are scored at once")
    parser.add_argument("--train", nargs="+", choices=TASKS, help="trains these tasks' LoRAs, and scores nothing")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--out", type=Path, default=Path("runs/imported_experts"))
    options = parser.parse_args()
    from peft import PeftModel

    from molora.eval.models import load_base, load_tokenizer
    from molora.eval.results import header, write_json
    from molora.eval.suite import Suite, run_suite
    from molora.eval.terminal import quiet

    quiet()
    paths = train_loras(options)
    if options.train:
        return
    tokenizer = load_tokenizer(options.base)
    recipe = recipe_of(options, TASKS)
    with (options.out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process makes what all read
        behind = [mixed(t, [o for o in recipe.tasks if o is not t], options) for t in recipe.tasks]
        embedder = text_embedder(options.base, options.out / "embedder")
    kinds = {"alone": recipe.tasks, "mixed": behind}
    ways = systems(options, paths, tokenizer, embedder)

    def fresh() -> Any:
        return load_base(options.base, dtype=options.dtype).eval()

    def score(model: Any, name: str, tasks: tuple[str, ...]) -> dict[str, Any]:
        found = {}
        for kind, every in kinds.items():
            own = [task for task in every if task.name in tasks]
            suite = Suite(tasks=own, max_length=recipe.sequence.max_length, batch_size=options.batch_size)
            result = run_suite(model, tokenizer, suite, name=name)
            found[kind] = {task: {k: e[k] for k in ("value", "interval", "n")} for task, e in result["tasks"].items()}
        return found

    def scored(name: str) -> dict[str, Any]:
        if name == "oracle choice":
            loras = {task: PeftModel.from_pretrained(fresh(), path).eval() for task, path in paths.items()}
            each = [score(model, task, (task,)) for task, model in loras.items()]
            return {"prepared": 0.0} | {kind: {n: e for one in each for n, e in one[kind].items()} for kind in kinds}
        base = fresh()
        began = time.perf_counter()
        model = ways[name](base)
        seconds = time.perf_counter() - began
        # An embedder that reads the running text works in generate only, so not for scores of choices.
        tasks = tuple(t for t in TASKS if t != "agnews") if name.startswith("lora-tle") else TASKS
        return score(model.eval(), name, tasks) | {"prepared": seconds}

    rows: dict[str, Any] = {}
    for name in options.systems:
        path = options.out / "scores" / f"{re.sub('[^a-z]+', '_', name)}.json"
        if not path.is_file():
            began = time.perf_counter()
            write_json(path, scored(name))
            print(f"{name}: made and scored in {time.perf_counter() - began:.0f} s", flush=True)
        rows[name] = json.loads(path.read_text(encoding="utf-8"))
        print(name, {k: [round(e["value"], 3) for e in rows[name][k].values()] for k in kinds}, flush=True)
    given = f"--base {options.base} --dtype {options.dtype} --steps {options.steps} --rows {options.rows}"
    given += f" --batch-size {options.batch_size} --keep"
    given += f" --train-batch-size {options.train_batch_size}" if options.train_batch_size != 32 else ""
    if tuple(options.systems) != SYSTEMS:
        given += " --systems " + " ".join(shlex.quote(name) for name in options.systems)
    result = header(fresh(), options.base, 0)
    result["model"]["base"] = options.base  # not where it lies
    result |= {"command": f"python benchmarks/imported_experts.py {given}", "systems": rows}
    if options.keep:
        write_json(HERE / "results" / "imported_experts.json", result)


if __name__ == "__main__":
    main()
