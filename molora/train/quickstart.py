"""`molora quickstart`: the embedded base learns eight skills by one LoRA and by a mixture of no more parameters."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback

from molora import equal_lora
from molora.assets import MOLORA_TINY
from molora.eval.disk import writing
from molora.eval.models import load_base, load_model
from molora.eval.results import write_json
from molora.eval.strict import build
from molora.telemetry import record_routing
from molora.train.recipe import SCHEMA, Recipe, mixture_config
from molora.train.run import train
from molora.train.skills import CHAINS, SKILLS, skill

MIXTURE = {
    "num_experts": 4,
    "r": 4,
    # A gate of one half makes this the LoRA's scaling of 2; with 32, a token that uses one expert would take steps four
    # times as large as the LoRA's.
    "lora_alpha": 16,
    "placement": "ffn",
    "plain_lora": {"target_modules": "all-linear", "r": 16, "lora_alpha": 32},
    # All experts learn while the router is uncertain, few work once it is certain: with two from the first step, the
    # mixture is further behind one LoRA after as few steps as this (docs/results.md).
    "router": {"name": "tsallis", "norm_topk_prob": True, "init_std": 1e-3},
}
TRAIN_ROWS, TEST_ROWS, CHAIN_ROWS, STEPS = 1200, 40, 10, 310


def write_tasks(folder: Path, seed: int) -> list[dict[str, Any]]:
    """The tasks section of the recipe, with JSON lines in `folder`; no test subject is among the training ones."""
    tasks = []
    training = [one.rows(TRAIN_ROWS, seed) for one in SKILLS]
    for number, (one, rows) in enumerate(zip(SKILLS, training, strict=True)):
        test = one.rows(TEST_ROWS, seed + 1, frozenset(row.subject for row in rows))
        name = one.name.replace(" ", "_")
        prompts = [row.prompt for row in rows]
        for i in range(0, len(rows), 3):  # every third comes after a solved one of another skill, as in a running text
            before = training[(number + 1 + i // 3 % (len(SKILLS) - 1)) % len(SKILLS)][i]
            prompts[i] = f"{before.prompt} {before.answer}\n{prompts[i]}"
        for part, lines in (
            ("train", zip(prompts, (row.answer for row in rows), strict=True)),
            ("test", ((row.prompt, row.answer) for row in test)),
        ):
            text = "".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in lines)
            (folder / f"{name}.{part}.jsonl").write_text(text, encoding="utf-8")
        tasks.append(
            {
                "name": one.name,
                "data": str(folder / f"{name}.train.jsonl"),
                "prompt": "{prompt}",
                "answer": " {answer}",
                "eval": {"data": str(folder / f"{name}.test.jsonl"), "max_new_tokens": 24},
            }
        )
    return tasks


def chain_score(model: PeftModel, tokenizer: PreTrainedTokenizerBase, chain: Sequence[str], seed: int) -> float:
    """The share of subjects, which the chain's first skill did not train on, for which the last answer is right."""
    first = skill(chain[0])
    seen = frozenset(row.subject for row in first.rows(TRAIN_ROWS, seed))
    subjects = [row.subject for row in first.rows(CHAIN_ROWS, seed + 2, seen)]
    wanted = subjects
    for name in chain:
        wanted = [skill(name).answer(subject) for subject in wanted]
    _, answers = run_chain(model, tokenizer, chain, subjects)
    return sum(a == w for a, w in zip(answers, wanted, strict=True)) / len(wanted)


def run_chain(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, chain: Sequence[str], subjects: Sequence[str]
) -> tuple[list[str], list[str]]:
    """(the whole texts, the last answers): each skill is asked of the model's own answer to the one before, and the
    text runs on."""
    texts, answers = ["" for _ in subjects], list(subjects)
    for name in chain:
        prompt = skill(name).prompt
        texts = [t + ("\n" if t else "") + prompt.format(x=a) for t, a in zip(texts, answers, strict=True)]
        answers = continue_texts(model, tokenizer, texts)
        texts = [f"{text} {answer}" for text, answer in zip(texts, answers, strict=True)]
    return texts, answers


@torch.inference_mode()
def continue_texts(model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """What the model says next, greedily, each up to its end token."""
    inputs = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="left").to(model.device)
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    replies = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [reply.strip() for reply in replies]


@torch.inference_mode()
def coloured(model: PeftModel, tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, Any]:
    """The tokens of a text, each with its largest expert by the router that tells the skills apart best."""
    rows = [(number, row) for number, one in enumerate(SKILLS) for row in one.rows(12, 99)]
    choices: dict[str, list[tuple[int, int]]] = {}
    for number, row in rows:
        ids = tokenizer(f"{row.prompt} {row.answer}", return_tensors="pt").to(model.device)
        with record_routing(model) as routing:
            model(**ids)
        for name, record in routing.items():
            choices.setdefault(name, []).append((number, int(record.gates[-1].argmax())))
    best = max(choices, key=lambda name: _told_apart(choices[name]))
    ids = tokenizer(text, return_tensors="pt").to(model.device)
    with record_routing(model) as routing:
        model(**ids)
    tokens = [tokenizer.decode([token]) for token in ids["input_ids"][0, 1:]]
    experts = routing[best].gates.argmax(1)[1:].tolist()
    return {"router": best, "tokens": list(zip(tokens, experts, strict=True))}


def _told_apart(pairs: list[tuple[int, int]]) -> float:
    """How often the commonest skill of an expert is the right one."""
    counts: dict[int, dict[int, int]] = {}
    for number, expert in pairs:
        own = counts.setdefault(expert, {})
        own[number] = own.get(number, 0) + 1
    return sum(max(own.values()) for own in counts.values()) / len(pairs)


def quickstart(
    out: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    score_progress: Callable[[str, int, int], None] = lambda task, rows, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Trains one LoRA and one mixture on the skills, scores both and the base, and writes ``results.json`` into `out`.

    Args:
        out: a directory that does not exist, or is empty.
        steps: of each run, STEPS if None.
        callbacks, score_progress: as in `molora.train.run.train`.
        say: told what begins.

    Returns:
        The results: ``tasks`` with the exact match of ``base``, ``lora`` and ``mixture`` for each skill; ``average``;
        ``composite``, the same for skills in a row; ``tokens``, a composite answer with the expert of each token by the
        router that tells skills apart best; ``parameters``; ``seconds``.
    """
    began, steps = time.perf_counter(), STEPS if steps is None else steps
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty; choose another directory with --out")
    with writing(f"the data in {out}", "make room and run this again with another --out"):
        (out / "data").mkdir(parents=True)
        tasks = write_tasks(out / "data", seed)
    rank = equal_lora(load_base(str(MOLORA_TINY)), mixture_config(MIXTURE)).r
    sections = {
        "lora": {"lora": {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}},
        "mixture": {"mixture": MIXTURE},
    }
    scores: dict[str, dict[str, float]] = {one.name: {} for one in SKILLS}
    chains: dict[str, dict[str, float]] = {" + ".join(chain): {} for chain in CHAINS}
    trainable, tokens = {}, {}
    for name, section in sections.items():
        say(f"training {'one LoRA' if name == 'lora' else 'the mixture'}")
        recipe = _recipe(out / name, tasks, section, seed, steps, before=name == "lora")
        results = train(recipe, callbacks=list(callbacks), score_progress=score_progress)
        for when, column in ((results["before"], "base"), (results, name)):
            for task, entry in (when or {"tasks": {}})["tasks"].items():
                scores[task][column] = entry["value"]
        trainable[name] = results["model"]["parameters"]["trainable"]
        say("answering composite prompts")
        model, tokenizer = load_model(str(out / name))
        for chain in CHAINS:
            chains[" + ".join(chain)][name] = chain_score(model, tokenizer, chain, seed)
        if name == "mixture":
            texts, _ = run_chain(model, tokenizer, ("plus one", "in words"), ["4719"])
            tokens = coloured(model, tokenizer, texts[0])
    results = {
        "schema": "molora.results/1",
        "seed": seed,
        "steps": steps,
        "tasks": scores,
        "average": _average(scores),
        "composite": {**chains, "average": _average(chains)},
        "parameters": trainable,
        "tokens": tokens,
        "seconds": time.perf_counter() - began,
    }
    with writing(f"the results in {out}", "make room and run this again with another --out"):
        write_json(out / "results.json", results)
    return results


def _average(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    columns = next(iter(scores.values()))
    return {column: sum(row[column] for row in scores.values()) / len(scores) for column in columns}


def _recipe(
    folder: Path, tasks: list[dict[str, Any]], section: dict[str, Any], seed: int, steps: int, *, before: bool
) -> Recipe:
    """The recipe of a run; both runs differ in what they train alone."""
    data = {
        "schema": SCHEMA,
        "base": {"model": str(MOLORA_TINY), "dtype": "float32"},
        **section,
        "tasks": tasks,
        "training": {
            "output_dir": str(folder),
            "max_steps": steps,
            "per_device_train_batch_size": 24,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "linear",
            "warmup_steps": 10,
            "weight_decay": 0.0,
            "logging_steps": 25,
            "save_strategy": "no",
            "seed": seed,
        },
        "evaluation": {"before": before, "batch_size": 64},
    }
    return build(Recipe, data, "recipe")
