"""What serving a mixture costs: the same engine under load, with the bare base, one PEFT LoRA, and the mixture."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from molora import MoloraConfig
from molora.bench.measure import Timing
from molora.bench.subjects import LINEARS, Shape, base
from molora.bench.tables import TOP_2, Bar, Result

STREAMS = (1, 8, 32, 64)
THROUGHPUT_AT, LEAST_THROUGHPUT, LATENCY_LIMIT = 32, 0.85, 1.20


@contextlib.contextmanager
def served(model: Any, **options: Any) -> Iterator[str]:
    """The model behind an endpoint of this process on a free port; its address."""
    from molora.serve.app import create_app
    from molora.serve.launch import make_server

    server = make_server(model, word_tokenizer(model.config.vocab_size), "model", **options)
    with listening(create_app(server, 1.0)) as url:
        yield url


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A word for each of so many tokens: what random weights write is then text, and its client sees every token."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({f"w{n}": n for n in range(size)}, "w0")))


@contextlib.contextmanager
def listening(app: Any) -> Iterator[str]:
    """The address of an application that listens, in a thread of this process, on a free port."""
    import uvicorn

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError("the server did not start; its log says why")
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


def loaded(url: str, streams: int, requests: int, tokens: int) -> dict[str, Any]:
    """What a client of so many streams measures."""
    # As a file: a client that imports molora would need longer for that than for its requests.
    client = str(Path(__file__).with_name("load.py"))
    command = [sys.executable, client, url, "--streams", str(streams), "--requests", str(requests)]
    command += ["--prompt-tokens", str(tokens), "--max-tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout)
    if found["failed"]:
        raise RuntimeError(f"{len(found['failed'])} requests failed, first: {found['failed'][0]}")
    return found


def serve(shape: Shape, repeats: int) -> Result:
    """Streams of greedy answers over loopback, 32 layers; a row's times are inter-token latencies.

    Bars: seconds a token at 32 streams over the base's (at most 1 / 0.85) and over an unmerged LoRA's, and the
    inter-token latency of one stream over the base's.
    """
    tiny = shape.layers <= 2
    deep = dataclasses.replace(shape, layers=2 if tiny else 32, vocab=2048 if tiny else shape.vocab)
    tokens, every = (16, STREAMS[:2]) if tiny else (128, STREAMS)
    room = {"max_model_len": 4 * tokens, "cache_tokens": 4 * tokens * max(every)}
    subjects: dict[str, Callable[[], Any]] = {"base": lambda: None, "peft lora r16": _lora, "mixture": _mixture}
    if torch.cuda.is_available():  # elsewhere all are eager
        subjects |= {"base, eager": lambda: None, "mixture, eager": _mixture}
    rows: dict[str, Timing] = {}
    details: dict[str, dict[str, Any]] = {}
    model = base(deep).eval()
    for name, config in subjects.items():
        torch.manual_seed(2)
        adapter, eager = config(), name.endswith("eager")
        adapted = model if adapter is None else get_peft_model(model, adapter, autocast_adapter_dtype=False)
        with served(adapted, cuda_graph=False if eager else None, **room) as url:
            for count in (1,) if eager else every:
                loaded(url, count, 1, tokens)
                found = loaded(url, count, 1 if eager else repeats if count == 1 else 2, tokens)
                key = f"{name}, {count} stream{'s' * (count > 1)}"
                rows[key] = _timing(found["between"])
                details[key] = {
                    "tokens_per_second": found["tokens"] / found["seconds"],
                    "first_token_ms": 1e3 * median(found["first"]),
                    "p99_ms": 1e3 * quantiles(found["between"], n=100, method="inclusive")[98],
                }
        if adapted is not model:
            model = adapted.unload()
    return Result(rows, {}, _bars(rows, details), details)


def _lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=LINEARS, init_lora_weights=False)


def _mixture() -> MoloraConfig:
    options: dict[str, Any] = {"num_experts": 8, "r": 16, "lora_alpha": 32, "placement": "block", "router": TOP_2}
    return MoloraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)


def _timing(seconds: list[float]) -> Timing:
    cuts = quantiles(seconds, n=10, method="inclusive")
    return Timing(1e3 * cuts[4], 1e3 * cuts[1], 1e3 * cuts[7], 0, len(seconds))


def _bars(rows: dict[str, Timing], details: dict[str, dict[str, Any]]) -> list[Bar]:
    found = []
    at = f"{THROUGHPUT_AT} streams"
    if f"mixture, {at}" in rows:
        mine = details[f"mixture, {at}"]["tokens_per_second"]
        for name, limit in (("base", 1 / LEAST_THROUGHPUT), ("peft lora r16", 1.0)):
            ratio = details[f"{name}, {at}"]["tokens_per_second"] / mine
            found.append(Bar(f"seconds a token at {at} over {name}", ratio, limit))
    ratio = rows["mixture, 1 stream"].median_ms / rows["base, 1 stream"].median_ms
    return [*found, Bar("inter-token latency of one stream over base", ratio, LATENCY_LIMIT)]
