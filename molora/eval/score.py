"""Scores one task: greedy generations by a metric, or the likelihood of each choice.

Legend: B rows of a batch, S tokens of the longest row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from molora.eval.encode import IGNORED, Example, collate, encode_example, num_unknown, pad
from molora.eval.metrics import METRICS, exact_match, last_number, majority, mean_interval
from molora.eval.ranks import connected_ranks, device_of, gathered, is_partitioned, own_share
from molora.eval.results import wilson
from molora.eval.rows import load_rows
from molora.eval.tasks import NullFieldError, TaskConfig
from molora.prompts import prompts


def context_length(model: PreTrainedModel, max_length: int | None = None) -> int | None:
    """Tokens that fit: the smaller of ``max_length`` and the model's positions; ``None`` if neither is bounded.

    Raises:
        ValueError: ``max_length`` exceeds what the model was built for.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_length is not None and limit is not None and max_length > limit:
        raise ValueError(
            f"max_length={max_length} exceeds the model's context of {limit} tokens; lower sequence.max_length"
        )
    return max_length or limit


def score_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskConfig,
    *,
    max_length: int | None,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda rows, total: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores one task. Several processes share its batches, and each gets all results: those of one process.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        task: a task that reads its evaluation rows (:func:`molora.eval.tasks.eval_task`).
        max_length: tokens; rows whose prompt and answer (every choice of it) do not fit are skipped and counted.
        batch_size: rows per forward.
        progress: told the rows of each batch done, and of the task.

    Returns:
        The entry of the results file, and one prediction per scored row.

    Raises:
        ValueError: no row fits.
    """
    limit = context_length(model, max_length)
    fitting, num_skipped = load_examples(task, tokenizer, limit)
    found: list[tuple[int, dict[str, Any]]] = []
    batches = list(_batches(fitting, batch_size, limit))
    tokens = (task.eval and task.eval.max_new_tokens) or max(len(e.answer_ids) for e in fitting) + 8
    for turn, batch in enumerate(own_share(batches)):
        rows = [fitting[index] for index in batch]
        if task.metric == "choice":
            outcomes = _score_choices(model, tokenizer, rows)
        else:
            outcomes = _score_generations(model, tokenizer, rows, tokens, limit, task.metric)
        for index, outcome in zip(batch, outcomes, strict=True):
            told = {"task": task.name, "prompt": fitting[index].prompt, "answer": fitting[index].answer}
            found.append((index, told | outcome))
        together = batches[turn * connected_ranks() :][: connected_ranks()]  # what the processes score at this time
        progress(sum(map(len, together)), len(fitting))
    by_index = dict(gathered(found))
    predictions = [by_index[index] for index in range(len(fitting))]
    scores = [p.get("score", p["correct"]) for p in predictions]
    entry = {
        "metric": task.metric,
        "n": len(fitting),
        "value": sum(scores) / len(fitting),
        "interval": mean_interval(scores) if task.metric == "rouge_l" else wilson(sum(scores), len(fitting)),
        "majority": majority(task.metric, [e.answer for e in fitting]),
        "skipped_too_long": num_skipped,
        "unknown_tokens": sum(num_unknown(e, tokenizer) for e in fitting),
    }
    if task.metric == "choice":
        entry["ties"] = sum(p["tie"] for p in predictions)
    return entry, predictions


def load_examples(task: TaskConfig, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> tuple[list[Example], int]:
    """Reads and encodes the rows to score.

    Returns:
        The rows that fit into ``limit`` tokens, and how many do not.

    Raises:
        ValueError: no row fits, a null where text is wanted, or an answer without a number for the metric ``number``.
    """
    try:
        examples = [encode_example(row, task, tokenizer) for row in load_rows(task)]
    except NullFieldError as error:
        raise ValueError(
            f"task {task.name!r}: {error}; a row to score must be whole, so remove it from {task.data!r}"
        ) from error
    if task.metric == "number":
        for example in examples:
            if last_number(example.answer) is None:
                raise ValueError(
                    f"task {task.name!r}: metric 'number' needs a number in every answer, got {example.answer[:80]!r}; "
                    "use exact_match or rouge_l"
                )
    fitting = [e for e in examples if limit is None or _length(e) <= limit]
    if not fitting:
        raise ValueError(
            f"evaluation of task {task.name!r} is empty: none of its {len(examples)} rows fits in {limit} tokens"
        )
    return fitting, len(examples) - len(fitting)


def _length(example: Example) -> int:
    return len(example.prompt_ids) + max(map(len, example.choice_ids or (example.answer_ids,)))


def _batches(examples: Sequence[Example], size: int, limit: int | None) -> Iterator[list[int]]:
    """Positions of the rows of each batch, longest prompts first.

    A batch is closed early where its longest prompt would leave another row's answer no room within ``limit`` tokens.
    """
    batch: list[int] = []
    longest_answer = 0
    for index in sorted(range(len(examples)), key=lambda index: -len(examples[index].prompt_ids)):
        answer = _length(examples[index]) - len(examples[index].prompt_ids)
        longest_prompt = len(examples[batch[0]].prompt_ids) if batch else 0
        if batch and (
            len(batch) == size or (limit is not None and longest_prompt + max(longest_answer, answer) > limit)
        ):
            yield batch
            batch, longest_answer = [], 0
        batch.append(index)
        longest_answer = max(longest_answer, answer)
    yield batch


@torch.no_grad()  # not inference_mode: FSDP2 and ZeRO-3 keep gathered weights, which training then uses
def _score_generations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Example],
    tokens: int,
    limit: int | None,
    metric: str,
) -> list[dict[str, Any]]:
    """Greedy generation in a left-padded batch; a ``score`` besides ``correct`` where the metric has values between."""
    ids = pad([row.prompt_ids for row in rows], 0, left=True)
    mask = pad([[1] * len(row.prompt_ids) for row in rows], 0, left=True)
    longest = ids.shape[1]
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=tokens if limit is None else min(tokens, limit - longest),
        eos_token_id=sorted({*end_tokens(model, tokenizer), *(token for row in rows for token in row.end_ids)}),
        pad_token_id=tokenizer.eos_token_id,
    )
    out = model.generate(
        input_ids=ids.to(device_of(model)),
        attention_mask=mask.to(device_of(model)),
        generation_config=config,
        tokenizer=tokenizer,
        synced_gpus=is_partitioned(model),
    )
    texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    outcomes: list[dict[str, Any]] = []
    for text, row in zip(texts, rows, strict=True):
        score = METRICS[metric](text, row.answer)
        between = {"correct": exact_match(text, row.answer) == 1.0, "score": score}
        outcomes.append({"prediction": text.strip(), **(between if metric == "rouge_l" else {"correct": score == 1.0})})
    return outcomes


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a text: the tokenizer's, and those that the model's generation config names."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    tokens = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return sorted(token for token in tokens if token is not None)


@torch.no_grad()
def _score_choices(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Example]
) -> list[dict[str, Any]]:
    """Log-likelihood of each choice given the prompt, summed over its tokens; a tie at the top counts as wrong."""
    flat = [(row.prompt_ids, choice) for row in rows for choice in row.choice_ids]
    ids = pad([prompt for prompt, _ in flat], 0)
    mask = pad([[1] * len(prompt) for prompt, _ in flat], 0)
    with prompts(model, ids.to(device_of(model)), mask.to(device_of(model)), tokenizer):
        scores = choice_log_likelihoods(model, flat).tolist()
    outcomes = []
    for row in rows:
        own, scores = scores[: len(row.choices)], scores[len(row.choices) :]
        best = max(own)
        tie = own.count(best) > 1
        prediction = row.choices[own.index(best)]
        outcomes.append(
            {
                "prediction": prediction,
                "correct": not tie and prediction == row.answer,
                "tie": tie,
                "log_likelihoods": own,
            }
        )
    return outcomes


def choice_log_likelihoods(model: PreTrainedModel, pairs: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Sum over a continuation's tokens of log p(token | everything before it), for each (prompt, continuation).

    Returns:
        (pairs,) float64 on the CPU, nats. One forward of a right-padded batch: with a causal mask the padding behind a
        row changes nothing in front of it.
    """
    rows = [{"input_ids": p + c, "labels": [IGNORED] * len(p) + c} for p, c in pairs]
    batch = {key: value.to(device_of(model)) for key, value in collate(rows).items()}
    labels_BS = batch.pop("labels")[:, 1:]
    logits_BSV = model(**batch, use_cache=False).logits[:, :-1].float()
    losses_BS = torch.nn.functional.cross_entropy(
        logits_BSV.transpose(1, 2), labels_BS, reduction="none", ignore_index=IGNORED
    )
    return -losses_BS.double().sum(1).cpu()
