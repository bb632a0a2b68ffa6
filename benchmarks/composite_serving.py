"""One endpoint, several tasks in one text: does a served mixture tell whose token it writes, and is the answer right?

    python benchmarks/composite_serving.py [--base molora-tiny] [--dtype float32] [--keep]
    python benchmarks/composite_serving.py --systems arrow    # adds this system to the result; so may other processes

A composite prompt has two to four of the tasks of imported_experts.py in random order: the server (`molora serve`, in a
process of its own) answers the first task's prompt, its answer is appended, the next task's prompt follows. The same
prompts are also asked alone. For each answer: is it right (the greedy text, also where a recipe scores likelihoods),
and which expert has the largest share, summed over its tokens (`routed_experts`)? That expert predicts the task; the
same against shuffled labels is the control. Systems: four LoRAs behind arrow, centroids, or gates trained for 100 steps
(PHATGOOSE, MeteoRA); oracle choice, which names the right expert as `model` of the same server; one merged LoRA
(uniform average, TIES); one LoRA trained on all tasks, on as many rows as the four together, in batches four times as
large. What is made is kept under --out (LoRAs in --out/loras are taken as they are). --tuning asks other rows than
those that are reported, to choose settings by. --keep writes results/composite_serving.json beside itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from imported_experts import BETWEEN, LORA, TASKS, common_options, recipe_of, systems, train_loras

MIXTURES = ("arrow", "centroid", "phatgoose", "meteora")
RANKS = {"one LoRA, rank 16": 16, "one LoRA, rank 64": 64}
SYSTEMS = ("oracle choice", *MIXTURES, "average", "ties", *RANKS)
BAR = 0.8
STREAMS = 64
"""Texts that are written at once; the server's own default for what runs at once."""
Text = list[tuple[str, Any]]
"""Tasks and their rows, each a `molora.eval.encode.Example`, in the order of one prompt."""


def compose(rows: dict[str, Sequence[Any]], count: int, seed: int) -> list[Text]:
    """Composite prompts of two or more different tasks; a row comes again only when all of its task have been used."""
    draw = random.Random(seed)
    next_rows = {task: itertools.cycle(draw.sample(own, len(own))) for task, own in rows.items()}
    orders = [draw.sample(list(rows), draw.randint(2, len(rows))) for _ in range(count)]
    return [[(task, next(next_rows[task])) for task in order] for order in orders]


def predicted(routed: dict[str, Any]) -> str | None:
    """The expert with the largest share, summed over the tokens of an answer; None if none was written."""
    sums = [sum(shares) for shares in zip(*routed["shares"], strict=True)]
    return routed["experts"][sums.index(max(sums))] if sums else None


def shuffled(outcomes: Sequence[dict[str, Any]], times: int = 100) -> float:
    """The accuracy of the predictions for permuted labels, the mean over so many permutations."""
    draw, labels, hits = random.Random(0), [one["task"] for one in outcomes], 0
    for _ in range(times):
        draw.shuffle(labels)
        hits += sum(one["predicted"] == label for one, label in zip(outcomes, labels, strict=True))
    return hits / (times * len(labels))


def rates(outcomes: Sequence[dict[str, Any]], hit: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The share of hits with its 95 % interval, of each task and of all."""
    from molora.eval.results import wilson

    found = {}
    for name in ("all", *TASKS):
        own = [hit(one) for one in outcomes if name in ("all", one["task"])]
        found[name] = {"value": sum(own) / max(len(own), 1), "interval": wilson(sum(own), len(own)), "n": len(own)}
    return found


def summary(name: str, outcomes: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The rates of prompts alone, of all segments, and of those behind others; a text's first is as if alone."""
    found: dict[str, Any] = {}
    for kind, own in {**outcomes, "behind": [one for one in outcomes["segments"] if one["behind"]]}.items():
        found[kind] = {"right": rates(own, lambda one: bool(one["right"]))}
        if name in MIXTURES:
            found[kind] |= {"predicted": rates(own, lambda one: one["predicted"] == one["task"])}
            found[kind] |= {"shuffled": shuffled(own)}
    return found


@contextlib.contextmanager
def served(*arguments: str) -> Iterator[httpx.Client]:
    """A client of `molora serve`, which runs as a user starts it and is interrupted in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "molora_cli", "serve", *arguments, "--port", port]
    process = subprocess.Popen([*command, "--served-model-name", "mixture"], stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as http:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if http.get("/health").is_success:
                        break
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended; see for yourself: {shlex.join(command)}")
                time.sleep(0.2)
            yield http
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def answers(http: httpx.Client, texts: Sequence[Text], system: str, tokens: dict[str, int]) -> list[dict[str, Any]]:
    """What becomes of each segment of each text."""
    from molora.eval.metrics import exact_match

    def written(text: Text) -> list[dict[str, Any]]:
        prompt, found = "", []
        for task, row in text:
            prompt += (BETWEEN if prompt else "") + row.prompt
            body = {"model": task if system == "oracle choice" else "mixture", "prompt": prompt, "temperature": 0}
            body |= {"max_tokens": tokens[task], "routed_experts": system in MIXTURES}
            reply = http.post("/v1/completions", json=body)
            if not reply.is_success:
                raise RuntimeError(reply.text)
            choice = reply.json()["choices"][0]
            prompt += choice["text"]
            told = {"task": task, "behind": bool(found), "answer": choice["text"]}
            told |= {"right": exact_match(choice["text"], row.answer) == 1.0}
            if system in MIXTURES:
                told |= {"predicted": predicted(choice["routed_experts"]), "routed": choice["routed_experts"]}
            found.append(told)
        return found

    with ThreadPoolExecutor(STREAMS) as pool:
        return [outcome for found in pool.map(written, texts) for outcome in found]


def model_arguments(name: str, options: Any, paths: dict[str, str], tokenizer: Any) -> list[str]:
    """What `molora serve` is given; makes the model directory where one is needed and not there."""
    from molora.eval.models import load_base
    from molora.train.run import train

    if name in ("oracle choice", "arrow"):
        return [options.base, "--adapters", *(f"{task}={path}" for task, path in paths.items()), "--router", "arrow"]
    out = options.out / "served" / re.sub("[^a-z0-9]+", "_", name)
    if not (out / "results.json").is_file() and name in RANKS:
        recipe = recipe_of(options, TASKS, mixture=None, lora={**LORA, "r": RANKS[name], "lora_alpha": 2 * RANKS[name]})
        rows = len(TASKS) * options.train_batch_size
        training = {"per_device_train_batch_size": rows, "output_dir": str(out)}
        train(replace(recipe, training={**recipe.training, **training}))
    elif not (out / "adapter_config.json").is_file():
        model = systems(options, paths, tokenizer)[name](load_base(options.base, dtype=options.dtype).eval())
        model.save_pretrained(str(out))
    return [str(out), "--base", options.base]


def measured(name: str, options: Any, paths: dict[str, str], tokenizer: Any) -> dict[str, Any]:
    """One system: its answers and predictions of the prompts alone and as segments."""
    from molora.eval.results import write_json
    from molora.eval.score import load_examples
    from molora.eval.tasks import eval_task

    rows, tokens = {}, {}
    for task in map(eval_task, recipe_of(options, TASKS).tasks):
        every, _ = load_examples(task, tokenizer, None)
        tokens[task.name] = (task.eval and task.eval.max_new_tokens) or max(len(e.answer_ids) for e in every) + 8
        rows[task.name] = every[1::2] if options.tuning else every[::2]
    texts = compose(rows, options.prompts, seed=int(options.tuning))
    kinds = {"alone": [[segment] for text in texts for segment in text], "segments": texts}
    arguments = model_arguments(name, options, paths, tokenizer)
    began = time.perf_counter()
    with served(*arguments) as http:
        outcomes = {kind: answers(http, own, name, tokens) for kind, own in kinds.items()}
    kept = options.out / ("tuning" if options.tuning else "answers")
    write_json(kept / f"{re.sub('[^a-z0-9]+', '_', name)}.json", outcomes)
    return summary(name, outcomes) | {"seconds": time.perf_counter() - began}


def add(path: Path, name: str, found: dict[str, Any]) -> None:
    """Puts one system into the file, in the order of SYSTEMS; several processes may do so."""
    from molora.eval.results import SCHEMA, write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        before = json.loads(path.read_text(encoding="utf-8"))["systems"] if path.is_file() else {}
        every = before | {name: found}
        every = {name: every[name] for name in SYSTEMS if name in every}
        bars = []
        for mixture, kind in itertools.product([name for name in MIXTURES if name in every], ("segments", "behind")):
            value = every[mixture][kind]["predicted"]["all"]["value"]
            bar = {"name": f"{mixture}: task predicted, {kind}", "value": value, "limit": BAR, "holds": value >= BAR}
            bars.append(bar)
        write_json(path, {"schema": SCHEMA, "seed": 0, "systems": every, "bars": bars})
    finally:
        os.close(folder)


def main() -> None:
    parser = common_options(__doc__)
    parser.set_defaults(train=None)  # every LoRA
    parser.add_argument("--prompts", type=int, default=100, help="composite prompts")
    parser.add_argument("--tuning", action="store_true", help="other prompts than those that are reported")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--out", type=Path, default=Path("runs/composite_serving"))
    options = parser.parse_args()
    from molora.eval.models import load_base, load_tokenizer
    from molora.eval.results import environment
    from molora.eval.terminal import quiet

    quiet()
    given = f"--base {options.base} --dtype {options.dtype} --steps {options.steps} --rows {options.rows}"
    given += f" --train-batch-size {options.train_batch_size} --prompts {options.prompts} --keep"
    tokenizer = load_tokenizer(options.base)
    if options.dtype != "auto":  # a server takes a base as it is stored
        base = options.out / f"base-{options.dtype}"
        load_base(options.base, dtype=options.dtype).save_pretrained(str(base))
        tokenizer.save_pretrained(str(base))
        options.base = str(base)
    paths = train_loras(options)
    result = (Path(__file__).parent / "results" if options.keep else options.out) / "composite_serving.json"
    if options.tuning:
        result = options.out / "tuning.json"
    for name in options.systems:
        found = measured(name, options, paths, tokenizer)
        command = f"python benchmarks/composite_serving.py {given} --systems {shlex.quote(name)}"
        add(result, name, {"command": command, **environment(), **found})
        shown = {kind: {key: e["all"]["value"] for key, e in found[kind].items() if key != "shuffled"}
                 for kind in ("alone", "segments", "behind")}  # fmt: skip
        print(name, shown, f"{found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
