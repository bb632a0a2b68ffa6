"""A served router that chooses by the prompt: each request's own, read once and as `generate` reads it."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from gradients import _tokenizer as word_tokenizer
from lora_pools import examples_of, peft_lora, save_pool
from peft import LoraConfig, PeftModel, get_peft_model
from serving import answers, collected, greedy, offline, prompts_of, small_engine, with_engine
from tiny_models import base_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from molora import from_adapters, record_routing
from molora.assets import MOLORA_TINY
from molora.bench.serving import listening
from molora.context import runtime_of
from molora.prompts import embed_prompts
from molora.serve.app import create_app
from molora.serve.engine import Engine, EngineError
from molora.serve.launch import check_servable, is_bare_without_gates, make_server
from molora.serve.pool import ExpertPool
from molora.serve.reading import PromptReader
from molora.serve.steering import Steering, parse_steering

NAMES = ("sql", "math", "code", "chat")
PROMPTS = prompts_of((5, 17, 1, 12, 30, 9))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pool(tmp_path_factory.mktemp("pool"), 4)


def retrieval(paths: dict[str, Path], names: Any = NAMES, family: str = "llama", **router: Any) -> PeftModel:
    pool = {name: paths[name] for name in names}
    model = from_adapters(base_model(family), pool, {"name": "retrieval", **router}).eval()
    model.set_centroids(examples_of(pool), word_tokenizer())
    return model


@torch.no_grad()
def choice(model: PeftModel, prompt: list[int]) -> torch.Tensor:
    """The gates (E,) that the router gives this prompt offline."""
    ids = torch.tensor([prompt])
    with record_routing(model) as routing, model.prompts(ids):
        model(input_ids=ids)
    (found,) = routing.values()
    return found.gates[0].float()


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("composition", "top_k"), [("mixture", 2), ("fusion", 2)])
def test_many_at_once_and_prompts_in_parts_go_to_the_experts_of_their_prompt(
    composition: str, top_k: int, paths: dict[str, Path]
) -> None:
    model = retrieval(paths, composition=composition, top_k=top_k)
    assert is_bare_without_gates(model, None)
    expected = [offline(model, prompt) for prompt in PROMPTS]
    gates = [choice(model, prompt) for prompt in PROMPTS]
    assert len({tuple(chosen.tolist()) for chosen in gates}) > 2
    assert all(sorted(chosen.tolist())[-top_k:] == [1 / top_k] * top_k for chosen in gates)
    # Every second request is traced; the last two are not asked of the mixture.
    requests = [greedy(prompt, traced=bool(n % 2)) for n, prompt in enumerate(PROMPTS)]
    requests += [greedy(PROMPTS[0], steering=Steering(bare=True)), greedy(PROMPTS[0], steering=favour("math"))]
    found = answers(small_engine(model, max_batch_tokens=8), requests)
    assert [tokens for tokens, _, _ in found[:-2]] == expected
    for request, chosen, (tokens, routing, _) in zip(requests, gates, found, strict=False):
        assert len(routing) == (len(tokens) if request.traced else 0)
        for token in routing:
            assert (
                token.experts == NAMES and torch.equal(token.gates, chosen[None]) and torch.equal(token.share, chosen)
            )
    assert found[-2][0] == offline(base_model(), PROMPTS[0])
    assert found[-1][0] == offline(peft_lora(paths["math"]), PROMPTS[0])


def favour(name: str) -> Steering:
    return Steering(favour={name: 1.0})


def test_wishes_stand_above_the_choice(paths: dict[str, Path]) -> None:
    """Against models that need no wish: one LoRA alone, or a pool without the forbidden experts."""
    model, prompt = retrieval(paths, top_k=2), PROMPTS[1]
    chosen = [NAMES[n] for n in choice(model, prompt).nonzero().flatten()]
    others = [name for name in NAMES if name not in chosen]
    wishes: list[tuple[dict[str, Any], Any]] = [
        ({"force": others[0]}, peft_lora(paths[others[0]])),
        ({"forbid": [others[0]]}, model),
        ({"forbid": [chosen[0]]}, peft_lora(paths[chosen[1]])),
        # One half to each of two, whom a pool of two would give as much.
        ({"forbid": [chosen[0]], "hint": {others[1]: 0.5}}, retrieval(paths, [chosen[1], others[1]], top_k=2)),
    ]
    expected = [offline(other, prompt) for _, other in wishes]
    assert len({tuple(tokens) for tokens in expected}) == len(wishes)
    requests = [greedy(prompt, steering=parse_steering(wish, NAMES)) for wish, _ in wishes]
    found = answers(small_engine(model), requests + [greedy(prompt) for prompt in PROMPTS])
    assert [tokens for tokens, _, _ in found[:4]] == expected
    assert [tokens for tokens, _, _ in found[4:]] == [offline(model, prompt) for prompt in PROMPTS]


def test_under_streams_an_expert_comes_is_chosen_and_goes(paths: dict[str, Path]) -> None:
    model = retrieval(paths, NAMES[:3], top_k=2)
    examples = examples_of(["chat"])["chat"]
    prompt = word_tokenizer()(examples[0])["input_ids"]
    engine = small_engine(model, max_model_len=128)
    pool = ExpertPool(engine=engine, tokenizer=word_tokenizer(), allowed=(paths["chat"].parent,))

    async def work(engine: Engine) -> Any:
        streams = [asyncio.create_task(collected(engine, greedy(prompt, 90, traced=True))) for _ in range(4)]
        while not all(engine.tracer._wants.get(f"r{n}") or streams[n].done() for n in range(4)):
            await asyncio.sleep(0.001)
        await pool.load("chat", str(paths["chat"]), examples)
        there = await collected(engine, greedy(prompt, traced=True))
        await pool.unload("sql")
        return there, await collected(engine, greedy(prompt)), await asyncio.gather(*streams), engine.error

    there, after, streams, error = with_engine(engine, work)
    assert error is None and there[1][0].gates[0, 3] == 0.5
    four, three = retrieval(paths, top_k=2), retrieval(paths, NAMES[1:], top_k=2)
    assert there[0] == offline(four, prompt) and after[0] == offline(three, prompt)
    expected = {tuple(NAMES[:3]): choice(retrieval(paths, NAMES[:3], top_k=2), prompt)}
    expected |= {NAMES: choice(four, prompt), NAMES[1:]: choice(three, prompt)}
    seen = Counter(token.experts for _, routing, _ in streams for token in routing)
    assert set(seen) == set(expected) and [len(tokens) for tokens, _, _ in streams] == [90] * 4
    for _, routing, _ in streams:  # each token by the choice among the experts that there were when it was made
        assert all(torch.equal(token.gates[0], expected[token.experts]) for token in routing)


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "layer"), [("llama", None), ("llama", 0), ("gpt2", None), ("gpt_neox", 1)])
def test_the_second_trunk_reads_what_the_first_does_with_its_weights(
    family: str, layer: int | None, tmp_path: Path
) -> None:
    pool = save_pool(tmp_path, 2, family)
    model = retrieval(pool, NAMES[:2], family, layer=layer)
    base = model.get_base_model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    reader = PromptReader(model)
    for prompt in PROMPTS:
        (wanted,) = embed_prompts(base, reader.router, torch.tensor([prompt]))
        assert torch.equal(reader.embed(prompt), wanted)
    stack, _, number = reader._layer.rpartition(".")
    assert len(reader._trunk.get_submodule(stack)) == int(number) + 1  # type: ignore[arg-type]
    own = {tensor.data_ptr() for tensor in base.state_dict().values()}
    assert {tensor.data_ptr() for tensor in reader._trunk.state_dict().values()} <= own
    # The model that is served is as it was, with all of its layers.
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    reader.close()


def test_prompts_are_read_while_forwards_run_and_nothing_stays_behind(paths: dict[str, Path]) -> None:
    """A reader that hangs holds back its own request, and no other."""
    model = retrieval(paths, top_k=1)
    engine = small_engine(model)
    reader: Any = engine.reader
    release = threading.Event()

    async def work(engine: Engine) -> Any:
        running = asyncio.create_task(collected(engine, greedy(PROMPTS[0], 40)))
        while not reader._vectors:
            await asyncio.sleep(0.001)
        reader._thread.submit(release.wait, 20)
        held = asyncio.create_task(collected(engine, greedy(PROMPTS[1])))
        bare = await collected(engine, greedy(PROMPTS[0], steering=Steering(bare=True)))  # needs no choice
        done = await asyncio.wait_for(running, 20)
        leaving = asyncio.create_task(collected(engine, greedy(PROMPTS[2])))
        await asyncio.sleep(0)
        leaving.cancel()
        object.__setattr__(engine.limits, "timeout_s", 0.05)
        with pytest.raises(EngineError, match="more than 0.05 seconds") as slow:
            await collected(engine, greedy(PROMPTS[2]))
        object.__setattr__(engine.limits, "timeout_s", 20.0)
        assert not held.done()
        release.set()
        answer = await held
        release.clear()
        reader._thread.submit(release.wait, 20)
        late = asyncio.create_task(collected(engine, greedy(PROMPTS[1])))
        await asyncio.sleep(0)
        await engine.stop(0.0)
        release.set()
        with pytest.raises(EngineError, match="could not be read: the server is shutting down") as stopped:
            await late
        return done[0], bare[0], answer[0], [slow.value.status, stopped.value.status]

    done, bare, held, status = with_engine(engine, work)
    assert done == offline(model, PROMPTS[0], 40) and held == offline(model, PROMPTS[1]) and status == [504, 503]
    assert bare == offline(base_model(), PROMPTS[0])
    assert not reader._vectors and engine.open == 0


def test_what_cannot_be_served_is_refused_before_it_starts(paths: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="no embeddings of its experts yet; give example prompts"):
        check_servable(from_adapters(base_model(), paths, "retrieval"))
    with pytest.raises(ValueError, match="router 'retrieval' is told each request's prompt.*leave cuda_graph out"):
        Engine(retrieval(paths), [], small_engine(base_model()).limits, cuda_graph=True)


def test_an_embedder_that_reads_text_reads_prompts_and_no_running_text(
    paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def embed(name: str, texts: Any) -> torch.Tensor:  # letters of a text, as a sentence-transformers model would
        return torch.stack([torch.tensor([float(t.count(c)) for c in "0123456789"]) for t in texts]) + 0.1

    for module in ("running_text", "centroids", "prompts"):
        monkeypatch.setattr(f"molora.{module}.embed", embed)
    model = retrieval(paths, top_k=1, embedder="./letters")
    check_servable(model)
    tokenizer = word_tokenizer()
    for prompt in PROMPTS:
        assert torch.equal(
            PromptReader(model, tokenizer).embed(prompt), embed("", [tokenizer.decode(prompt)])[0].double()
        )
    generated = [
        model.generate(torch.tensor([p]), do_sample=False, max_new_tokens=8, tokenizer=tokenizer, eos_token_id=-1)
        for p in PROMPTS
    ]
    engine = Engine(model, [], small_engine(base_model()).limits, tokenizer=tokenizer)
    found = answers(engine, [greedy(prompt) for prompt in PROMPTS])
    assert [tokens for tokens, _, _ in found] == [out[0, -8:].tolist() for out in generated]
    centroid = from_adapters(base_model(), paths, {"name": "centroid", "embedder": "./letters"})
    with pytest.raises(ValueError, match="router 'centroid' with embedder='./letters' reads the running text"):
        check_servable(centroid)


# -- over a socket -----------------------------------------------------------------------------------------------------


def test_molora_tiny_with_four_loras_answers_as_generate(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MOLORA_TINY)

    def tiny() -> Any:
        return AutoModelForCausalLM.from_pretrained(MOLORA_TINY, dtype=torch.float32)

    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        options = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(tiny(), options).save_pretrained(tmp_path / name)
    model = from_adapters(tiny(), {n: tmp_path / n for n in NAMES}, {"name": "retrieval", "top_k": 2}).eval()
    examples = {
        "sql": ["How many rows does the table have?", "List the names of all states"],
        "math": ["12 + 30 =", "7 * 8 ="],
        "code": ["def add(a, b):", "import os"],
        "chat": ["Hello, how are you?", "Tell me a story"],
    }
    model.set_centroids(examples, tokenizer)
    texts = ["What is 3 + 4 =", "def main():", "Once upon a time there was a house", "Which state is large?"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    messages = [{"role": "user", "content": texts[0]}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    wanted = [tokenizer.decode(offline(model, prompt)) for prompt in ids]
    said = tokenizer.decode(offline(model, chat, eos=[tokenizer.eos_token_id]))
    gates = [choice(model, prompt) for prompt in [*ids, chat]]
    code = PeftModel.from_pretrained(tiny(), tmp_path / "code").eval()
    assert len({tuple(chosen.tolist()) for chosen in gates}) > 1
    server = make_server(model, tokenizer, "mix", base_name="bare", max_model_len=256, cache_tokens=2048)

    def ask(client: httpx.Client, path: str = "completions", **body: Any) -> Any:
        answer = client.post(f"v1/{path}", json={"model": "mix", "max_tokens": 8, "temperature": 0} | body)
        assert answer.status_code == 200, answer.text
        return answer

    with listening(create_app(server, 0.0)) as url, httpx.Client(base_url=url, timeout=60) as client:
        with ThreadPoolExecutor(8) as threads:
            whole = [threads.submit(ask, client, prompt=text, routed_experts=True) for text in texts]
            parts = [threads.submit(ask, client, prompt=text, stream=True) for text in texts]
        for text, chosen, answer, streamed in zip(wanted, gates, whole, parts, strict=False):
            (told,) = answer.result().json()["choices"]
            assert told["text"] == text and told["routed_experts"]["experts"] == list(NAMES)
            assert told["routed_experts"]["shares"] == [[round(gate, 4) for gate in chosen.tolist()]] * 8
            lines = [line[6:] for line in streamed.result().text.split("\n") if line.startswith("data: {")]
            chunks = [httpx.Response(200, text=line).json()["choices"][0]["text"] for line in lines]
            assert len(chunks) > 1 and "".join(chunks) == text
        # Several prompts of one request have each their own choice; a chat's prompt is what its template makes.
        several = ask(client, prompt=texts).json()["choices"]
        assert [told["text"] for told in several] == wanted
        answer = ask(client, "chat/completions", messages=messages, routed_experts=True)
        (told,) = answer.json()["choices"]
        assert told["message"]["content"] == said
        shares = [round(gate, 4) for gate in gates[-1].tolist()]
        assert all(share == shares for share in told["routed_experts"]["shares"])
        (alone,) = ask(client, prompt=texts[0], model="code").json()["choices"]
        assert alone["text"] == tokenizer.decode(offline(code, ids[0]))
        refused = client.post("v1/completions", json={"model": "mix", "prompt": "word " * 300})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"
        assert 'molora_expert_share_total{expert="math"}' in client.get("metrics").text
    assert runtime_of(model).standing == {}
