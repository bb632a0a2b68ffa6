"""The endpoints over a socket: answers in OpenAI's form, refusals that name the field, a server that survives them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from serving import offline
from transformers import AutoModelForCausalLM, AutoTokenizer

from molora import from_adapters
from molora.assets import MOLORA_TINY
from molora.bench.serving import listening
from molora.serve.app import create_app
from molora.serve.launch import make_server

EXPERTS = ("sql", "math", "code")
TOKENIZER = AutoTokenizer.from_pretrained(MOLORA_TINY)
KEY = {"Authorization": "Bearer right"}


def tiny() -> Any:
    return AutoModelForCausalLM.from_pretrained(MOLORA_TINY, dtype=torch.float32)


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate((*EXPERTS, "chat")):
        torch.manual_seed(seed)
        options = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(tiny(), options).save_pretrained(folder / name)
    return {name: folder / name for name in (*EXPERTS, "chat")}


def mixture(loras: dict[str, Path]) -> Any:
    return from_adapters(tiny(), {name: loras[name] for name in EXPERTS}, "arrow").eval()


@pytest.fixture(scope="module")
def server(loras: dict[str, Path]) -> Any:
    folder = loras["chat"].parent
    limits: dict[str, Any] = {"max_model_len": 256, "cache_tokens": 2048, "max_running": 8, "max_waiting": 4}
    options = {"base_name": "bare", "api_key": "right", "adapter_dirs": (folder,), "max_body_bytes": 20_000}
    return make_server(mixture(loras), TOKENIZER, "mix", **options, **limits)


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[httpx.Client]:
    with (
        listening(create_app(server, drain_s=0.0)) as url,
        httpx.Client(base_url=url, headers=KEY, timeout=60) as client,
    ):
        yield client
        assert client.get("health").json() == {"status": "ok"} and server.engine.open == 0


def ask(client: httpx.Client, prompt: Any = "It was", path: str = "v1/completions", **options: Any) -> httpx.Response:
    body = {"model": "mix", "max_tokens": 8, "temperature": 0, "prompt": prompt} | options
    return client.post(path, json={name: value for name, value in body.items() if value is not None})


def text_of(client: httpx.Client, *args: Any, **options: Any) -> str:
    answer = ask(client, *args, **options)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def wait(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


# -- answers -----------------------------------------------------------------------------------------------------------


def test_an_answer_is_the_offline_one_whole_and_in_parts(client: httpx.Client, loras: dict[str, Path]) -> None:
    prompts = ["It was", "The old house stood"]
    model = mixture(loras)
    wanted = [TOKENIZER.decode(offline(model, TOKENIZER(prompt)["input_ids"], 12)) for prompt in prompts]
    answer = ask(client, prompts, max_tokens=12).json()
    assert [(c["index"], c["text"]) for c in answer["choices"]] == list(enumerate(wanted))
    read = sum(len(TOKENIZER(prompt)["input_ids"]) for prompt in prompts)
    assert answer["usage"] == {"prompt_tokens": read, "completion_tokens": 24, "total_tokens": read + 24}
    assert answer["object"] == "text_completion" and {c["finish_reason"] for c in answer["choices"]} == {"length"}
    assert text_of(client, TOKENIZER(prompts[0])["input_ids"], max_tokens=12) == wanted[0]

    streamed = ask(client, prompts, max_tokens=12, stream=True, stream_options={"include_usage": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in streamed.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert chunks[-1]["usage"] == answer["usage"] and {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    for index, text in enumerate(wanted):
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in own) == text
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["length"]


def test_a_chat_is_what_the_template_makes_of_it(client: httpx.Client, loras: dict[str, Path]) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "it"}]}]
    plain = [{"role": "user", "content": "Say it"}]
    ids = TOKENIZER.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)["input_ids"]
    wanted = TOKENIZER.decode(offline(mixture(loras), ids, 6))
    body = {"messages": messages, "prompt": None, "max_tokens": None, "max_completion_tokens": 6}
    choice = ask(client, path="v1/chat/completions", **body).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": wanted, "refusal": None}
    streamed = ask(client, path="v1/chat/completions", stream=True, **body).text
    chunks = [json.loads(line[6:]) for line in streamed.split("\n") if line.startswith("data: {")]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == wanted


def test_a_stop_string_ends_an_answer_wherever_tokens_end(client: httpx.Client) -> None:
    whole = text_of(client, max_tokens=24)
    tokens = [TOKENIZER.decode(token) for token in TOKENIZER(whole, add_special_tokens=False)["input_ids"]]
    border = len("".join(tokens[:6]))
    for stop in (whole[border - 2 : border + 2], whole[3:5], [whole[border - 1 : border + 3], "never"]):
        for stream in (False, True):
            answer = ask(client, max_tokens=24, stop=stop, stream=stream)
            first = stop if isinstance(stop, str) else stop[0]
            lines = (
                [line[6:] for line in answer.text.split("\n") if line.startswith("data: {")]
                if stream
                else [answer.text]
            )
            choices = [json.loads(line)["choices"][0] for line in lines]
            assert "".join(c["text"] for c in choices) == whole[: whole.index(first)]
            assert choices[-1]["finish_reason"] == "stop"


def test_experts_are_told_and_chosen_by_name(client: httpx.Client) -> None:
    models = client.get("v1/models").json()["data"]
    assert [(m["id"], m["kind"]) for m in models] == [
        ("mix", "mixture"),
        ("bare", "base"),
        *((e, "expert") for e in EXPERTS),
    ]
    choice = ask(client, routed_experts="layers").json()["choices"][0]
    routed = choice["routed_experts"]
    assert routed["experts"] == list(EXPERTS) and "".join(routed["texts"]) == choice["text"]
    assert len(routed["shares"]) == len(routed["gates"]) == 8
    assert all(sum(share) == pytest.approx(1, abs=1e-3) for share in routed["shares"])
    assert all(len(gates) == len(routed["routers"]) for gates in routed["gates"])
    alone = ask(client, model="math", routed_experts=True).json()["choices"][0]
    forced = ask(client, experts={"force": "math"}, routed_experts=True).json()["choices"][0]
    assert alone == forced and alone["routed_experts"]["shares"] == [[0.0, 1.0, 0.0]] * 8
    assert text_of(client, model="bare") == text_of_base()


def text_of_base() -> str:
    return TOKENIZER.decode(offline(tiny(), TOKENIZER("It was")["input_ids"]))


# -- refusals ----------------------------------------------------------------------------------------------------------

HUGE = int("9" * 4000)
REFUSED: list[tuple[dict[str, Any], int, str | None]] = [
    ({"model": "nobody"}, 404, "model"),
    ({"model": None}, 400, "model"),
    ({"model": 3}, 400, "model"),
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt"),
    ({"prompt": ["a", 3]}, 400, "prompt"),
    ({"prompt": [[5], []]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [5, True]}, 400, "prompt"),
    ({"prompt": [100_000]}, 400, "prompt"),
    ({"prompt": [HUGE]}, 400, "prompt"),
    ({"prompt": "word " * 400}, 400, "prompt"),
    ({"prompt": ["a"] * 13}, 400, "prompt"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": -5}, 400, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"),
    ({"max_tokens": "8"}, 400, "max_tokens"),
    ({"max_tokens": HUGE}, 400, "max_tokens"),
    ({"max_tokens": 1000}, 400, "max_tokens"),
    ({"temperature": -0.1}, 400, "temperature"),
    ({"temperature": 2.1}, 400, "temperature"),
    ({"temperature": HUGE}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_p": "1"}, 400, "top_p"),
    ({"seed": 2**63}, 400, "seed"),
    ({"stop": ["a"] * 17}, 400, "stop"),
    ({"stop": 3}, 400, "stop"),
    ({"stream": "yes"}, 400, "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, 400, "stream_options"),
    ({"n": 2}, 400, "n"),
    ({"n": True}, 400, "n"),
    ({"best_of": 3}, 400, "best_of"),
    ({"logprobs": 5}, 400, "logprobs"),
    ({"echo": True}, 400, "echo"),
    ({"suffix": "end"}, 400, "suffix"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"temprature": 1}, 400, "temprature"),
    ({"routed_experts": "all"}, 400, "routed_experts"),
    ({"experts": {"force": "nobody"}}, 400, "experts"),
    ({"experts": "math"}, 400, "experts"),
    ({"model": "math", "experts": {"force": "sql"}}, 400, "experts"),
    ({"metadata": {"a": 1}}, 400, "metadata"),
]
CHATS: list[tuple[dict[str, Any], int, str | None]] = [
    ({"messages": []}, 400, "messages"),
    ({"messages": None}, 400, "messages"),
    ({"messages": [{"role": "user"}]}, 400, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "word " * 400}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": -1}, 400, "max_completion_tokens"),
    ({"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 999}, 400, "max_completion_tokens"),
    ({"messages": [{"role": "user", "content": "x"}], "logprobs": True}, 400, "logprobs"),
]


def is_refusal(answer: httpx.Response, status: int, param: str | None) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and "\n" not in error["message"] and len(error["message"]) < 5000


def test_every_mistake_is_named_by_its_field(client: httpx.Client) -> None:
    for options, status, param in REFUSED:
        is_refusal(ask(client, **options), status, param)
    for options, status, param in CHATS:
        is_refusal(ask(client, None, "v1/chat/completions", **{"max_tokens": None, **options}), status, param)
    assert len(text_of(client)) > 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "mix", "prompt": "\xc3\x28"}',
        b'{"model": "mix", "prompt": "\\ud800"}',
        b'{"model": "mix", "prompt": "x", "\\udfff": 1}',
        b'{"model": "mix", "prompt": "x", "tools": "\\ud800"}',
        b'{"model": "mix", "prompt": "x", "temperature": NaN}',
        b'{"model": "mix", "prompt": "x", "top_p": 1e999}',
        b'{"model": "mix", "prompt": "x", "experts": {"hint": {"sql": NaN}}}',
        b'{"model": "mix", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "mix", "prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}",
        b'{"model": "mix", "prompt": "x", "experts": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
    ],
    ids=range(16),
)
@pytest.mark.parametrize("path", ["v1/completions", "v1/chat/completions", "v1/load_lora_adapter"])
def test_a_body_that_is_none_is_refused(body: bytes, path: str, client: httpx.Client) -> None:
    answer = client.post(path, content=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text


def test_the_key_the_size_and_the_path(client: httpx.Client) -> None:
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}):
        for path in ("v1/completions", "v1/load_lora_adapter", "v1/unload_lora_adapter"):
            is_refusal(client.post(path, json={}, headers=headers), 401, None)
        is_refusal(client.get("v1/models", headers=headers), 401, None)
        assert client.get("health", headers=headers).status_code == 200
    is_refusal(client.post("v1/completions", content=b" " * 20_001), 413, None)
    is_refusal(client.get("v1/completions"), 405, None)
    is_refusal(client.get("v1/nothing"), 404, None)
    is_refusal(client.get("nothing"), 404, None)


def test_without_a_key_experts_cannot_be_changed(loras: dict[str, Path]) -> None:
    server = make_server(mixture(loras), TOKENIZER, "mix", cache_tokens=1024)
    with listening(create_app(server, 0.0)) as url, httpx.Client(base_url=url) as client:
        for path, body in (("load", {"lora_path": str(loras["chat"])}), ("unload", {})):
            answer = client.post(f"v1/{path}_lora_adapter", json={"lora_name": "chat", **body})
            is_refusal(answer, 403, None)
        assert len(text_of(client)) > 0


def test_an_expert_is_loaded_served_and_unloaded(client: httpx.Client, loras: dict[str, Path]) -> None:
    is_refusal(ask(client, model="chat"), 404, "model")
    body = {"lora_name": "chat", "lora_path": str(loras["chat"])}
    answer = client.post("v1/load_lora_adapter", json=body)
    assert answer.status_code == 200 and "'chat' added" in answer.text
    is_refusal(client.post("v1/load_lora_adapter", json=body), 400, "lora_name")
    is_refusal(client.post("v1/load_lora_adapter", json={**body, "examples": ["x"] * 1001}), 400, "examples")
    alone = PeftModel.from_pretrained(tiny(), loras["chat"]).eval()
    assert text_of(client, model="chat") == TOKENIZER.decode(offline(alone, TOKENIZER("It was")["input_ids"]))
    is_refusal(client.post("v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/etc"}), 403, "lora_path")
    assert client.post("v1/unload_lora_adapter", json={"lora_name": "chat"}).status_code == 200
    is_refusal(client.post("v1/unload_lora_adapter", json={"lora_name": "chat"}), 404, "lora_name")
    is_refusal(ask(client, model="chat"), 404, "model")


# -- load and leaving --------------------------------------------------------------------------------------------------


def test_who_hangs_up_frees_the_place_and_a_full_server_says_so(client: httpx.Client, server: Any) -> None:
    url = str(client.base_url)
    engine = server.engine
    with httpx.Client(base_url=url, headers=KEY, timeout=60) as other:
        body = {"model": "mix", "prompt": ["It was"] * 12, "max_tokens": 250, "stream": True, "temperature": 1}
        with other.stream("POST", "v1/completions", json=body) as answer:
            lines = answer.iter_lines()  # kept: without it the connection is closed
            assert next(lines).startswith("data: ")
            assert engine.open == 12
            full = ask(client)
            is_refusal(full, 429, None)
            assert full.headers["retry-after"] == "1"
        wait(lambda: engine.open == 0)
    assert len(text_of(client)) > 0
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=url, headers=KEY, timeout=0.3) as other:
        other.post("v1/completions", json={**body, "stream": False})
    wait(lambda: engine.open == 0)
    assert not engine.tracer._wants and not engine.manager.output_router.result_handlers


def test_too_slow_an_answer_is_given_up(client: httpx.Client, server: Any) -> None:
    limits = server.engine.limits
    object.__setattr__(limits, "timeout_s", 0.05)
    try:
        is_refusal(ask(client, ["It was"] * 3, max_tokens=250), 504, None)
        streamed = ask(client, max_tokens=250, stream=True).text.strip().split("\n")[-1]
        assert "more than 0.05 seconds" in json.loads(streamed[6:])["error"]["message"]
        wait(lambda: server.engine.open == 0)
    finally:
        object.__setattr__(limits, "timeout_s", 600.0)


def test_metrics_count_what_was_done(client: httpx.Client) -> None:
    def value(name: str) -> float:
        lines = [line for line in client.get("metrics").text.split("\n") if line.startswith(name + " ")]
        return float(lines[0].split()[-1]) if lines else 0.0  # a share has no line before its expert's first token

    before = value("molora_generated_tokens_total"), value('molora_expert_share_total{expert="math"}')
    ask(client, model="math", routed_experts=True)
    after = value("molora_generated_tokens_total"), value('molora_expert_share_total{expert="math"}')
    assert [round(b - a, 3) for a, b in zip(before, after, strict=True)] == [8, 8]
    assert value("molora_open_requests") == 0
