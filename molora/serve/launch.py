"""From a loaded model to a server that listens."""

from __future__ import annotations

import copy
import logging
import socket
from pathlib import Path
from typing import Any

import torch

from molora.adapters.places import reserve_places
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

PAGE_SIZES = {"cpu": 16, "cuda": 256}
"""FlashAttention 2 takes multiples of 256 only."""
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
    expert_places: int = 0,
    cuda_graph: bool | None = None,
    max_model_len: int | None = None,
    cache_tokens: int | None = None,
    **limits: Any,
) -> Server:
    """A server, not started.

    Args:
        model: in eval mode, with or without a mixture.
        base_name: by which requests ask for the base alone; it is offered only where silenced gates give the base.
        expert_places: with `adapter_dirs`, experts that may be loaded before the tensors must grow; more make room for
            as many again. Left out where no expert may be added.
        limits: other fields of `Limits`.

    Raises:
        ValueError: a router that one row of many requests cannot serve, or limits that do not fit.
    """
    check_servable(model)
    for folder in adapter_dirs:
        if not folder.is_dir():
            raise ValueError(f"--adapter-dir {folder} is no directory; name one below which adapters lie")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
        raise ValueError("--api-key must be visible ASCII characters, as a header can bear them; choose another key")
    if adapter_dirs and api_key is None:
        raise ValueError("--adapter-dir lets requests load adapters, which needs a key; give --api-key too")
    if not tokenizer.is_fast:
        raise ValueError("serving streams text through a fast tokenizer (tokenizer.json), and this model has none")
    longest = context_length(model) or max_model_len or 4096
    if max_model_len is not None:
        if max_model_len > longest:
            raise ValueError(f"--max-model-len {max_model_len} exceeds the model's context of {longest} tokens")
        longest = max_model_len
    limits.setdefault("page_size", PAGE_SIZES.get(model.device.type, PAGE_SIZES["cpu"]))
    room = _reserved(model, expert_places if adapter_dirs else 0)  # before the cache takes what is free
    if cache_tokens is None:
        cache_tokens = max(_cache_tokens(model), longest + limits["page_size"])
    bounds = Limits(max_model_len=longest, cache_tokens=cache_tokens, **limits)
    with_base = base_name if base_name != name and is_bare_without_gates(model, tokenizer) else None
    engine = Engine(model, end_tokens(model, tokenizer), bounds, cuda_graph, tokenizer)
    taken = (name, *([with_base] if with_base else []))
    own = copy.deepcopy(tokenizer)  # truncation is state of a tokenizer, and prompts are not to be cut
    pool = ExpertPool(engine=engine, tokenizer=own, allowed=adapter_dirs, taken=taken, room=max(1, room))
    return Server(engine=engine, tokenizer=tokenizer, name=name, pool=pool, base_name=with_base, api_key=api_key)


def _reserved(model: Any, places: int) -> int:
    """Makes vacant places for experts; returns how many: none where the router needs training for its experts."""
    if places:
        try:
            reserve_places(model, places)
        except ValueError:
            return 0
    return places


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


def listener(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet: an address that cannot be had shows before a model is loaded.

    Raises:
        ValueError: it cannot be had.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = min(addresses, key=lambda found: found[0] != socket.AF_INET)
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; choose another --host or --port"
        ) from error
    return found


def run(server: Server, bound: socket.socket, drain_s: float) -> None:
    """Listens until it is interrupted; then running requests finish within `drain_s` seconds, or get an error."""
    import uvicorn

    class Listening(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            server.engine.close(drain_s)  # while uvicorn waits for the connections, before it tells the application
            super().handle_exit(sig, frame)

    log = logging.getLogger("molora.serve")
    log.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter('{"time": "%(asctime)s", "request": %(message)s}'))
    log.addHandler(handler)
    config = uvicorn.Config(
        create_app(server, drain_s),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(drain_s) + 5,  # so that those that got an error can be told
    )
    try:
        Listening(config).run([bound])
    finally:
        server.engine.end()  # after a second Ctrl-C uvicorn does not tell the application
