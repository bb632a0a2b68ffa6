"""What a server is started with, refused before a model is loaded, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_serve_api import TOKENIZER, ask, tiny, wait
from typer.testing import CliRunner

from molora.serve.launch import listener, make_server, run
from molora_cli import app


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"api_key": ""}, "--api-key must be visible"),
        ({"api_key": " "}, "--api-key must be visible"),
        ({"api_key": "ключ"}, "--api-key must be visible"),
        ({"api_key": "a\nb"}, "--api-key must be visible"),
        ({"api_key": "k", "adapter_dirs": (Path("/not/there"),)}, "--adapter-dir /not/there is no directory"),
        ({"adapter_dirs": (Path("/"),)}, "give --api-key too"),
        ({"max_model_len": 100_000}, "--max-model-len 100000 exceeds the model's context of 512 tokens"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_server(tiny(), TOKENIZER, "tiny", **options)


def test_an_address_that_cannot_be_had_shows_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molora.eval.models.load_model", lambda *args, **options: pytest.fail("it was loaded"))
    with listener("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        found = CliRunner().invoke(app, ["serve", "molora-tiny", "--port", port])
    assert isinstance(found.exception, ValueError)
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use; choose another" in str(found.exception)
    with pytest.raises(ValueError, match=r"cannot listen on no\.such\.host\.invalid"):
        listener("no.such.host.invalid", 8000)


def run_beside(clients: Callable[[], None], server: Any, bound: socket.socket, drain_s: float, number: int) -> None:
    """Serves until a client sends this process the signal."""
    before = signal.signal(number, lambda *_: None)  # uvicorn raises it again when it is done
    thread = threading.Thread(target=clients)
    try:
        thread.start()
        run(server, bound, drain_s)
    finally:
        thread.join()
        signal.signal(number, before)


def test_at_a_signal_short_answers_finish_and_long_ones_get_an_error() -> None:
    """The signal comes to this process, where the server listens; its clients are in a thread."""
    server = make_server(tiny(), TOKENIZER, "tiny", cache_tokens=4096, max_model_len=512)
    server.engine.eos_token_ids.clear()
    bound, found = listener("127.0.0.1", 0), dict[str, httpx.Response]()
    bound.listen()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}/"

    def clients() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            wait(lambda: client.get("health").status_code == 200)

            def asks(name: str, **options: Any) -> None:
                found[name] = ask(client, model="tiny", **options)

            kinds: dict[str, dict[str, Any]] = {
                "short": {"max_tokens": 20},
                "long": {"prompt": ["x"] * 16, "max_tokens": 500},
                "stream": {"prompt": ["x"] * 16, "max_tokens": 500, "stream": True},
            }
            threads = [threading.Thread(target=asks, args=(name,), kwargs=kinds[name]) for name in kinds]
            for thread in threads:
                thread.start()
            wait(lambda: server.engine.open == 33)
            os.kill(os.getpid(), signal.SIGTERM)
            for thread in threads:
                thread.join()

    run_beside(clients, server, bound, 2.0, signal.SIGTERM)
    assert found["short"].status_code == 200
    assert found["long"].status_code == 503 and "shutting down" in found["long"].json()["error"]["message"]
    assert "shutting down" in found["stream"].text.strip().split("\n")[-1]
    assert server.engine.open == 0 and not server.engine.manager.is_running()


def test_a_second_interrupt_ends_at_once_and_leaves_no_thread() -> None:
    server = make_server(tiny(), TOKENIZER, "tiny", cache_tokens=4096, max_model_len=512)
    server.engine.eos_token_ids.clear()
    bound = listener("127.0.0.1", 0)
    bound.listen()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}/"
    interrupted = list[float]()

    def clients() -> None:
        def asks() -> None:
            with contextlib.suppress(httpx.HTTPError), httpx.Client(base_url=url, timeout=60) as client:
                ask(client, model="tiny", prompt=["x"] * 16, max_tokens=500)

        thread = threading.Thread(target=asks)
        thread.start()
        wait(lambda: server.engine.open == 16)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        interrupted.append(time.monotonic())
        thread.join()

    run_beside(clients, server, bound, 60.0, signal.SIGINT)
    assert time.monotonic() - interrupted[0] < 20 and not server.engine.manager.is_running()
