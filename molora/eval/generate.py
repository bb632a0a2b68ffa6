"""Continues one prompt and writes the text as it comes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from molora.eval.encode import encode_prompt, unknown_characters
from molora.eval.score import context_length, end_tokens


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> str:
    """Writes the continuation of ``prompt`` to standard output while it is generated.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        prompt: the text to continue.
        max_new_tokens: tokens, at most; fewer where the model's context ends.
        temperature: 0 is greedy.
        seed: for a temperature above 0.
        note: told what the text itself does not show: characters that the tokenizer lacks, and a full context.

    Returns:
        The continuation.

    Raises:
        ValueError: the prompt is empty or fills the model's context.
    """
    ids = encode_prompt(prompt, tokenizer)
    limit = context_length(model)
    if not ids:
        raise ValueError("the prompt has no tokens; give some text to continue")
    if limit is not None and len(ids) >= limit:
        raise ValueError(f"the prompt has {len(ids)} tokens and the model's context is {limit}; shorten the prompt")
    unknown = unknown_characters(prompt, ids, tokenizer)
    if unknown:
        note(f"the tokenizer does not know {unknown}; the model reads its unknown symbol instead")
    set_seed(seed)
    config = GenerationConfig(
        do_sample=temperature > 0,
        temperature=temperature or None,
        max_new_tokens=max_new_tokens if limit is None else min(max_new_tokens, limit - len(ids)),
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.eos_token_id,
    )
    inputs = torch.tensor([ids], device=model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=config,
            streamer=streamer,
            tokenizer=tokenizer,  # for routers that read the running text
        )
    if len(output[0]) == limit and len(ids) + max_new_tokens > limit and output[0, -1] not in config.eos_token_id:
        note(f"stopped at the end of the model's context of {limit} tokens")
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
