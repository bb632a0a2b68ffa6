"""From a loaded model to a server that listens."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from molora.centroids import base_alone
from molora.context import runtime_of
from molora.eval.score import context_length
from molora.prompts import prompts
from molora.routers import Retrieval
from molora.routers.fixed_vectors import FixedVectorRouter
from molora.serve.app import create_app
from molora.serve.engine import Engine
from molora.serve.limits import Limits
from molora.serve.pool import ExpertPool
from molora.serve.server import Server
from molora.steering import TokenSteering

CPU_CACHE_BYTES = 2**30
GPU_CACHE_SHARE = 0.6
"""Of the memory that is free once the model is loaded."""


def make_server(
    model: Any,
    tokenizer: Any,
    name: str,
    *,
    base_name: str | None = None,
    api_key: str | None = None,
    adapter_dirs: tuple[Path, ...] = (),
    cuda_graph: bool | None = None,
    max_model_len: int | None = None,
    cache_tokens: int | None = None,
    **limits: Any,
) -> Server:
    """A server, not started.

    Args:
        model: in eval mode, with or without a mixture.
        base_name: by which requests ask for the base alone; it is offered only where silenced gates give the base.
        limits: other fields of `Limits`.

    Raises:
        ValueError: a router that one row of many requests cannot serve, or limits that do not fit.
    """
    check_servable(model)
    if not tokenizer.is_fast:
        raise ValueError("serving streams text through a fast tokenizer (tokenizer.json), and this model has none")
    longest = context_length(model, max_model_len) or 4096
    room = _cache_tokens(model) if cache_tokens is None else cache_tokens
    bounds = Limits(
        max_model_len=longest, cache_tokens=max(room, longest + 16) if cache_tokens is None else room, **limits
    )
    with_base = base_name if base_name != name and is_bare_without_gates(model, tokenizer) else None
    engine = Engine(model, end_tokens(model, tokenizer), bounds, cuda_graph, tokenizer)
    taken = (name, *([with_base] if with_base else []))
    pool = ExpertPool(engine=engine, tokenizer=tokenizer, allowed=adapter_dirs, taken=taken)
    return Server(engine=engine, tokenizer=tokenizer, name=name, pool=pool, base_name=with_base, api_key=api_key)


def check_servable(model: Any) -> None:
    """Raises ValueError for a router that reads the running text as a whole, because a batch is one row here, and for
    one that lacks its experts' vectors."""
    try:
        runtime = runtime_of(model)
    except ValueError:
        return
    for site in runtime.sites:
        config: Any = site.router.config
        if site.live and not isinstance(config, Retrieval) and getattr(config, "reads_text", False):
            raise ValueError(
                f"router {config.name!r} with embedder={config.embedder!r} reads the running text, which tokens of "
                "many requests in one batch do not have; serve with arrow or retrieval, or with embedder 'base'"
            )
        if site.live and isinstance(site.router, FixedVectorRouter):
            site.router.check_set()


@torch.no_grad()
def is_bare_without_gates(model: Any, tokenizer: Any) -> bool:
    """Whether the model with all gates at zero gives the logits of its base bit for bit, by trying it."""
    try:
        runtime = runtime_of(model)
    except ValueError:
        return False
    base = runtime.model()
    assert base is not None
    ids = torch.arange(8, device=model.device)[None] + 5
    width = max(site.router.num_gates for site in runtime.sites if site.live)

    def silence(module: Any, args: Any, kwargs: Any) -> None:
        silent = torch.zeros(ids.numel(), width, device=ids.device)
        runtime.inputs.steering = TokenSteering(silent, silent)

    hook = base.register_forward_pre_hook(silence, with_kwargs=True)
    try:
        with prompts(model, ids, tokenizer=tokenizer):
            silenced = base(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    with base_alone(base):
        return bool(torch.equal(silenced, base(input_ids=ids, use_cache=False).logits))


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: what the model's generation config says, and the tokenizer's end token."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = named if isinstance(named, list) else [named]
    return sorted({token for token in [*found, tokenizer.eos_token_id] if token is not None})


def _cache_tokens(model: Any) -> int:
    """Tokens whose keys and values fit: into a part of a GPU's free memory, or into a gigabyte."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    free = CPU_CACHE_BYTES
    if model.device.type == "cuda":
        free = int(GPU_CACHE_SHARE * torch.cuda.mem_get_info(model.device)[0])
    return max(1024, min(free // each, 131072))


def run(server: Server, host: str, port: int, drain_s: float) -> None:
    """Listens until it is interrupted; then running requests finish within `drain_s` seconds."""
    import uvicorn

    log = logging.getLogger("molora.serve")
    log.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter('{"time": "%(asctime)s", "request": %(message)s}'))
    log.addHandler(handler)
    app = create_app(server, drain_s)
    uvicorn.run(
        app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=int(drain_s) + 1
    )
