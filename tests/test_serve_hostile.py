"""Clients that are slow, huge, strange or gone, over a socket: they cost themselves an answer, and nobody else's."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from test_serve_api import TOKENIZER, ask, is_refusal, tiny, wait

from molora.bench.serving import listening
from molora.serve.app import create_app
from molora.serve.launch import make_server


@pytest.fixture(scope="module")
def server() -> Any:
    limits: dict[str, Any] = {"max_model_len": 256, "cache_tokens": 2048, "max_running": 16, "max_waiting": 4}
    return make_server(tiny(), TOKENIZER, "tiny", api_key="right", body_s=0.5, **limits)


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[httpx.Client]:
    app = create_app(server, drain_s=0.0)

    @app.get("/v1/fails")
    async def fails() -> None:
        raise KeyError("inside")

    with (
        listening(app) as url,
        httpx.Client(base_url=url, headers={"Authorization": "Bearer right"}, timeout=60) as client,
    ):
        yield client
        assert client.get("health").json() == {"status": "ok"} and server.engine.open == 0


def connected(client: httpx.Client, head: str, body: bytes = b"") -> socket.socket:
    url = client.base_url
    found = socket.create_connection((url.host, url.port or 0), timeout=20)
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Authorization: Bearer right", *head.split("\n")]
    found.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return found


def counted(client: httpx.Client, path: str, status: int) -> float:
    name = f'molora_requests_total{{path="{path}",status="{status}"}} '
    return sum(float(line[len(name) :]) for line in client.get("metrics").text.split("\n") if line.startswith(name))


def test_a_body_that_does_not_come_is_given_up(client: httpx.Client) -> None:
    with connected(client, "Content-Length: 500", b'{"model": ') as slow:
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")
    with connected(client, "Content-Length: 99999999999") as huge:
        assert huge.recv(1000).startswith(b"HTTP/1.1 413")


def test_who_leaves_within_the_body_is_counted_and_logs_no_traceback(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    before = counted(client, "/v1/completions", 499)
    connected(client, "Content-Length: 500", b"{").close()
    wait(lambda: counted(client, "/v1/completions", 499) == before + 1)
    assert not [record for record in caplog.records if record.exc_info]


def test_one_body_does_not_hold_up_the_others(client: httpx.Client) -> None:
    """Each of these took between one and sixty seconds of the event loop."""
    bodies: list[tuple[dict[str, Any], str]] = [
        ({"prompt": "word " * 250_000}, "tokens"),
        ({"prompt": ["a"] * 200_000}, "prompts in one request"),
        ({"prompt": [[5]] * 200_000}, "prompts in one request"),
        ({"prompt": ["a", 3] * 100_000}, "prompt must be text"),
        ({"prompt": "x", **{f"k{n}": 1 for n in range(100_000)}}, "unknown field 'k0'"),
    ]
    waits, over = list[float](), threading.Event()

    def look() -> None:
        with httpx.Client(base_url=client.base_url, timeout=60) as other:
            while not over.is_set():
                began = time.perf_counter()
                other.get("health")
                waits.append(time.perf_counter() - began)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for options, words in bodies:
            answer = ask(client, model="tiny", **options)
            assert answer.status_code == 400 and words in answer.json()["error"]["message"]
    finally:
        over.set()
        thread.join()
    assert len(waits) > 5 and max(waits) < 4.0  # mostly below 1; the second of these alone took 30


def test_who_does_not_read_a_stream_loses_the_place(
    client: httpx.Client, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event of 64 KiB for each token does not fit between the two; the answer itself is long over."""
    monkeypatch.setattr("molora.serve.events._event", lambda data: f"data: {'x' * 2**16}\n\n")
    monkeypatch.setattr("molora.serve.app.READ_S", -598.0)
    body = {"model": "tiny", "prompt": ["It was"] * 4, "max_tokens": 200, "temperature": 0, "stream": True}
    raw = json.dumps(body).encode()
    before = counted(client, "/v1/completions", 504)
    with connected(client, f"Content-Length: {len(raw)}", raw):
        wait(lambda: server.engine.open == 4)
        wait(lambda: server.engine.open == 0)
        wait(lambda: counted(client, "/v1/completions", 504) == before + 1)


def test_paths_of_clients_make_no_labels(client: httpx.Client) -> None:
    for path in ("v1/completions-of-mine", "v1/models-of-mine", "v1/chat/x", "nothing"):
        is_refusal(client.get(path), 404, None)
        is_refusal(client.get(path, headers={"Authorization": ""}), 401 if path.startswith("v1") else 404, None)
    assert "mine" not in client.get("metrics").text


def test_what_fails_inside_is_told_in_the_same_form(client: httpx.Client) -> None:
    answer = client.get("v1/fails")
    is_refusal(answer, 500, None)
    assert answer.headers["connection"] == "close"
    assert counted(client, "/v1/fails", 500) == 1


def test_a_refusal_says_what_is_allowed(client: httpx.Client) -> None:
    answer = client.get("v1/completions")
    is_refusal(answer, 405, None)
    assert answer.headers["allow"] == "POST"
    assert client.get("v1/models", headers={"Authorization": ""}).headers["www-authenticate"] == "Bearer"


def test_streams_are_counted_by_how_they_end(client: httpx.Client, server: Any) -> None:
    counts = [counted(client, "/v1/completions", status) for status in (200, 499, 504)]
    assert ask(client, model="tiny", stream=True).text.endswith("data: [DONE]\n\n")
    with client.stream("POST", "v1/completions", json={"model": "tiny", "prompt": "x", "stream": True}) as left:
        next(left.iter_lines())
    wait(lambda: counted(client, "/v1/completions", 499) == counts[1] + 1)
    limits = server.engine.limits
    object.__setattr__(limits, "timeout_s", 0.01)
    try:
        assert "more than 0.01 seconds" in ask(client, model="tiny", stream=True, max_tokens=200).text
    finally:
        object.__setattr__(limits, "timeout_s", 600.0)
    wait(lambda: counted(client, "/v1/completions", 504) == counts[2] + 1)
    assert counted(client, "/v1/completions", 200) == counts[0] + 1


def test_an_answer_given_back_as_a_message_is_taken(client: httpx.Client) -> None:
    own = {"role": "assistant", "content": "yes", "refusal": None, "annotations": [], "audio": None}
    own |= {"function_call": None, "tool_calls": None}
    user = {"role": "user", "content": "and"}
    body: dict[str, Any] = {"model": "tiny", "messages": [user, own, user], "max_tokens": 2}
    assert client.post("v1/chat/completions", json=body).status_code == 200
    own["tool_calls"] = [{"id": "x"}]
    is_refusal(client.post("v1/chat/completions", json=body), 400, "messages")


def test_one_model_is_shown_by_its_name(client: httpx.Client) -> None:
    assert client.get("v1/models/tiny").json() == client.get("v1/models").json()["data"][0]
    is_refusal(client.get("v1/models/nobody"), 404, "model")
    is_refusal(client.get(f"v1/models/{'m' * 5000}"), 404, "model")


def test_the_schema_of_the_api_is_whole(client: httpx.Client) -> None:
    schema = client.get("openapi.json").json()

    def references(part: Any) -> Iterator[str]:
        for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            yield from references(value)
        if isinstance(part, dict) and isinstance(part.get("$ref"), str):
            yield part["$ref"]

    for reference in references(schema):
        found: Any = schema
        for key in reference.removeprefix("#/").split("/"):
            found = found[key]
    operations = [operation for path in schema["paths"].values() for operation in path.values()]
    assert all({"4XX", "5XX"} <= set(operation["responses"]) for operation in operations)
    assert list(schema["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]
    message = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "properties" in message["properties"]["messages"]["items"]
