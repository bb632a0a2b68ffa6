"""Does a run that is killed at any moment, again and again, end as the run that was left alone?

    python benchmarks/kill_resume.py [--kills 50] [--keep]

A tiny random Llama learns two tasks with rank-wise routing (SMoRA: its bias counter is state beside the gradients),
dropout, unequal weights and gradient accumulation; half of the runs read a stream. Each run is forked from this process
and gets SIGKILL after a random time, or a random time after a random one of its operations on files (opening for
writing, renaming, deleting, making directories, all of which saving does), so that many kills hit the saving, library
calls included. What is left is resumed, and killed again, until it ends; then losses, gradient norms, learning rates,
losses by task and routing of every step, the adapter, the optimizer, the schedule and the random numbers must be those
of the run that was left alone, bit for bit. Seeded, but for what the scheduler of the machine does. Prints JSON; --keep
writes results/kill_resume.json beside itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from molora.eval.results import SCHEMA, environment, write_json
from molora.train.recipe import read_recipe
from molora.train.run import train

STEPS, SAVE_EVERY = 12, 3
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
SAME_FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
NOT_THE_SAME = ("tokens_per_second", "peak_memory_gib")


def write_base(folder: Path) -> str:
    """A random Llama of two layers with a character tokenizer."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789 :"
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **shape)).save_pretrained(
        folder
    )
    return str(folder)


def write_recipe(folder: Path, base: str, out: Path, *, streaming: bool) -> Path:
    """The recipe of a run into ``out``; everything else is the same for all runs."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        rows.write_text("".join(json.dumps({"q": f"{i} and {i}", "a": str(2 * i)}) + "\n" for i in range(24)))
    tasks: list[dict[str, Any]] = [
        {"name": "sums", "data": str(rows), "prompt": "{q}:", "answer": " {a}", "weight": 2.0},
        {"name": "again", "data": str(rows), "prompt": "again {q}:", "answer": " {q}", "weight": 1.0},
    ]
    mixing: dict[str, Any] = {"strategy": "weights"} | ({"streaming": True, "buffer_size": 8} if streaming else {})
    recipe = {
        "schema": "molora.recipe/1",
        "base": {"model": base},
        "mixture": {"preset": "smora", "r": 8, "lora_dropout": 0.1, "router": {"active_ranks": 2}},
        "tasks": tasks,
        "mixing": mixing,
        "training": {
            "output_dir": str(out),
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": SAVE_EVERY,
            "save_total_limit": 2,
            "use_cpu": True,
        },
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return path


def fork_run(recipe: Path, resume: bool, event: int | None = None) -> tuple[int, int, Path]:
    """Starts a run in a child process: its process id; a pipe that receives a byte before the child's n-th operation on
    the files of its run; and the file of its messages."""
    log = recipe.with_suffix(".log")
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read, log
    code = 1
    try:
        os.close(read)
        with log.open("w") as messages:
            os.dup2(messages.fileno(), 1)
            os.dup2(messages.fileno(), 2)
        out, left = str(recipe.with_suffix("")), event

        def watch(name: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if left is None or name not in FILE_EVENTS or out not in str(arguments[0]):
                return
            if name == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                return
            left -= 1
            if left <= 0:
                left = None
                os.write(write, b"x")

        sys.addaudithook(watch)
        train(read_recipe(recipe), resume=resume, warn=print)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def finish(child: int, pipe: int, log: Path) -> None:
    """Waits for a run that nobody kills."""
    _, status = os.waitpid(child, 0)
    os.close(pipe)
    if status != 0:
        raise RuntimeError(f"a run failed:\n{log.read_text()[-3000:]}")


def kill(child: int, pipe: int, log: Path, rng: random.Random, seconds: float, at_files: bool) -> dict[str, Any] | None:
    """Kills a run at a random moment: where the kill hit, or ``None`` if the run had ended before."""
    began = time.time()
    if at_files:
        os.read(pipe, 1)  # empty when the run ends before that operation
        time.sleep(rng.uniform(0, 0.01))
    else:
        time.sleep(rng.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(pipe)
    if os.WIFEXITED(status):
        if os.WEXITSTATUS(status):
            raise RuntimeError(f"a run failed:\n{log.read_text()[-3000:]}")
        return None
    out = log.with_suffix("")
    steps = [int(path.name.rpartition("-")[2]) for path in out.glob("checkpoint-*")]
    # Not what an earlier kill left. Rests of a file that was being replaced count as saving, too.
    saving = any(path.stat().st_mtime >= began for path in out.glob(".*partial"))
    return {
        "by": "file operation" if at_files else "clock",
        "while_saving": saving,
        "checkpoint": max(steps, default=0),
    }


def outcome(out: Path) -> dict[str, Any]:
    """What must be the same: the curve without times and sizes, and the bytes of what was saved."""
    lines = json.loads((out / "loss_curve.json").read_text())
    curve = [{key: value for key, value in line.items() if key not in NOT_THE_SAME} for line in lines if "loss" in line]
    last = out / f"checkpoint-{STEPS}"
    saved = {name: _content(last / name) for name in SAME_FILES}
    names = sorted(path.name for path in out.glob("checkpoint-*"))
    return {"curve": curve, "final": (out / SAME_FILES[0]).read_bytes(), "names": names, **saved}


def _content(path: Path) -> Any:
    # torch's archives hold names and times of their own; what they hold is compared by a stable text.
    return path.read_bytes() if path.suffix == ".safetensors" else _text(torch.load(path, weights_only=False))


def _text(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_text(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def measure(folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kills and resumes until so many kills have hit a run; compares every finished run with one left alone."""
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    rng, base = random.Random(seed), write_base(folder / "base")
    whole: dict[bool, Any] = {}
    durations: dict[bool, float] = {}
    for streaming in (False, True):
        began = time.perf_counter()
        recipe = write_recipe(folder, base, folder / f"whole-{streaming}", streaming=streaming)
        finish(*fork_run(recipe, False))
        durations[streaming] = time.perf_counter() - began
        whole[streaming] = outcome(recipe.with_suffix(""))
    hits: list[dict[str, Any]] = []
    different: list[str] = []
    runs = 0
    while len(hits) < kills:
        streaming = bool(runs % 2)
        recipe = write_recipe(folder, base, folder / f"run-{runs}", streaming=streaming)
        out = recipe.with_suffix("")
        for attempt in range(rng.choice((1, 2, 3))):
            at_files = rng.random() < 0.6
            # A whole run makes 129 operations on files.
            event = rng.randint(1, 130) if at_files else None
            started = (out / "recipe.yaml").exists()
            child = fork_run(recipe, started, event)
            hit = kill(*child, rng, durations[streaming], at_files)
            if hit is None or len(hits) == kills:
                break
            hits.append({"run": runs, "attempt": attempt, "streaming": streaming, **hit})
        if not (out / "results.json").exists():
            finish(*fork_run(recipe, (out / "recipe.yaml").exists()))
        found = outcome(out)
        different += [f"run {runs}: {key}" for key in found if found[key] != whole[streaming][key]]
        runs += 1
    return {
        "kills": len(hits),
        "runs": runs,
        "while_saving": sum(hit["while_saving"] for hit in hits),
        "before_the_first_checkpoint": sum(hit["checkpoint"] == 0 for hit in hits),
        "different": different,
        "hits": hits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    # Of this process and of those forked from it: a pool of threads would not survive the fork.
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.kills)
    result = {
        "schema": SCHEMA,
        "command": f"python benchmarks/kill_resume.py --kills {options.kills} --keep",
        **environment(),
        "seed": 0,
        **found,
        "seconds": time.perf_counter() - began,
        "bars": [
            {"name": "runs that end otherwise", "value": len(found["different"]), "limit": 0}
            | {"holds": not found["different"]}
        ],
    }
    print(json.dumps({key: value for key, value in result.items() if key != "hits"}, indent=1))
    if options.keep:
        write_json(Path(__file__).parent / "results" / "kill_resume.json", result)


if __name__ == "__main__":
    main()
