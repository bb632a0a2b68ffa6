"""A client that keeps so many streams of a server busy, and what it measures: run by `molora bench serve`.

    python molora/bench/load.py http://127.0.0.1:8000 --streams 8 --requests 3

    python molora/bench/load.py http://127.0.0.1:8000 --streams 8 --until-closed    # asks until its input is closed

Prints one JSON object: seconds, tokens, first (times to first token) and between (inter-token latencies), in seconds,
and failed, what went wrong with requests that got no whole answer.
A process of its own, so that it does not share the server's interpreter.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from typing import Any

import httpx


async def one(client: httpx.AsyncClient, body: dict[str, Any], found: dict[str, list[Any]]) -> None:
    """One streamed completion; a chunk is counted as one token."""
    last, fresh, whole = time.perf_counter(), True, False
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            whole = whole or line == "data: [DONE]"
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            if chunk.get("usage"):
                found["tokens"].append(chunk["usage"]["completion_tokens"])
            if not chunk["choices"]:
                continue
            now = time.perf_counter()
            found["first" if fresh else "between"].append(now - last)
            last, fresh = now, False
    if not whole:
        raise RuntimeError("the stream ended before its end")


async def load(
    url: str, model: str, streams: int, requests: int | None, prompt_tokens: int, max_tokens: int, key: str = ""
) -> dict[str, Any]:
    """`streams` at once, each asking `requests` times, or until standard input is closed."""
    draw = random.Random(0)
    found: dict[str, list[Any]] = {"first": [], "between": [], "tokens": [], "failed": []}
    closed = asyncio.Event()

    async def watch() -> None:
        await asyncio.to_thread(sys.stdin.read)
        closed.set()

    async def stream(client: httpx.AsyncClient) -> None:
        for number in itertools.count():
            if closed.is_set() or number == requests:
                return
            ids = [draw.randrange(10, 2000) for _ in range(prompt_tokens)]
            body = {"model": model, "prompt": ids, "max_tokens": max_tokens, "temperature": 0, "stream": True}
            try:
                await one(client, body | {"stream_options": {"include_usage": True}}, found)
            except (RuntimeError, httpx.HTTPError) as error:
                found["failed"].append(f"{type(error).__name__}: {error}")

    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, headers=headers) as client:
        began = time.perf_counter()
        streaming = [stream(client) for _ in range(streams)]
        await asyncio.gather(*streaming, *([watch()] if requests is None else []))
        seconds = time.perf_counter() - began
    return {"seconds": seconds, **found, "tokens": int(sum(found["tokens"]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--model", default="model")
    parser.add_argument("--key", default="", help="the server's --api-key")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--until-closed", action="store_true")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args()
    requests = None if options.until_closed else options.requests
    args = (options.streams, requests, options.prompt_tokens, options.max_tokens, options.key)
    print(json.dumps(asyncio.run(load(options.url, options.model, *args))))


if __name__ == "__main__":
    main()
