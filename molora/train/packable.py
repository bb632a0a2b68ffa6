"""Whether a base model keeps packed rows apart: what its config says, and what it does with two short rows."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

KEEPS_ROWS_APART = ("eager", "sdpa", "flex_attention")
"""Attention implementations that heed position ids, beside those of flash attention."""


def check_packable(model: Any, max_length: int | None, router: Any = None) -> None:
    """Refuses a base or a router for which packed rows would not be what they are alone.

    Two random rows run packed, with another first row, alone, and as one row: the second may not notice the first. A
    model whose weights are not here (ZeRO-3, FSDP) cannot be asked that and is judged by its config alone.

    Args:
        model: the base, without adapters.
        max_length: tokens of a packed sequence.
        router: config of the mixture's router; None: no mixture.

    Raises:
        ValueError: one sentence with the reason.
    """
    if max_length is None:
        raise ValueError("sequence.packing needs the tokens of a packed sequence; set sequence.max_length")
    reason = _router_reason(router) or _config_reason(model)
    if reason is None and all(parameter.numel() for parameter in model.parameters()):
        reason = _found_reason(model)
    if reason is not None:
        raise ValueError(f"sequence.packing: {reason}; set packing: false")


def _router_reason(router: Any) -> str | None:
    if getattr(router, "name", None) != "retrieval":
        return None
    return "router 'retrieval' chooses by the prompt of a line, and a packed line has several"


def _config_reason(model: Any) -> str | None:
    name, config = type(model).__name__, model.config.get_text_config()
    kinds = {kind for kind in getattr(config, "layer_types", None) or () if "attention" not in kind or "linear" in kind}
    if getattr(model, "_is_stateful", False) or kinds:
        return f"{name} has recurrent layers, whose state would go on from row to row"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{name} takes no position ids, so it cannot tell where a row begins"
    attention = getattr(config, "_attn_implementation", None) or "eager"
    if attention not in KEEPS_ROWS_APART and "flash" not in attention:
        return f"attention {attention!r} is not known to keep rows apart (known: {', '.join(KEEPS_ROWS_APART)}, flash)"
    return None


@torch.no_grad()
def _found_reason(model: Any) -> str | None:
    training, vocabulary = model.training, model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(vocabulary, (3, 8), generator=generator)

    def last_8(ids: Tensor, positions: Tensor | None) -> Tensor:
        device = model.get_input_embeddings().weight.device
        given = {} if positions is None else {"position_ids": positions.unsqueeze(0).to(device)}
        out = model(input_ids=ids.unsqueeze(0).to(device), use_cache=False, **given).logits
        return out[0, -8:].float()

    twice = torch.arange(8).repeat(2)
    try:
        model.eval()
        packed = last_8(torch.cat([first, second]), twice)
        changed = last_8(torch.cat([other, second]), twice)
        alone = last_8(second, None)
        one_row = last_8(torch.cat([first, second]), None)
    finally:
        model.train(training)
    # How much a token's past matters to this model is the measure of how little another row may.
    past = float((one_row - alone).abs().max())
    rounding = 16 * torch.finfo(model.dtype).eps * float(alone.abs().max())
    if float((packed - changed).abs().max()) > max(0.01 * past, rounding / 16):
        return f"{type(model).__name__} looks from one packed row into another"
    if float((packed - alone).abs().max()) > max(0.25 * past, rounding):
        return f"{type(model).__name__} answers a packed row otherwise than the row alone"
    return None
