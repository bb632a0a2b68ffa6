"""Requests that choose their experts, and experts that come and go while requests run."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_adapters import copy_lora, edit_config, edit_weights
from lora_pools import peft_lora, save_lora, save_pool
from peft import PeftModel, get_peft_model
from serving import answers, collected, greedy, offline, prompts_of, small_engine, with_engine
from tiny_models import base_model, config

from molora import from_adapters
from molora.adapters.places import reserve_places
from molora.bench.serving import word_tokenizer
from molora.context import runtime_of
from molora.serve.engine import Engine, EngineError
from molora.serve.launch import is_bare_without_gates, make_server
from molora.serve.pool import ExpertPool
from molora.serve.protocol import ApiError
from molora.serve.steering import Steering, parse_steering

PROMPT = prompts_of([6])[0]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pool(tmp_path_factory.mktemp("pool"), 4)


@pytest.fixture
def model(paths: dict[str, Path]) -> PeftModel:
    """Experts sql, math and code."""
    return from_adapters(base_model(), dict(list(paths.items())[:3]), "arrow", placement="block").eval()


# -- steering ----------------------------------------------------------------------------------------------------------


def test_forced_it_is_that_lora_and_bare_it_is_the_base_and_others_are_as_alone(
    model: PeftModel, paths: dict[str, Path]
) -> None:
    assert is_bare_without_gates(model, None)
    names = ["sql", "math", "code"]
    expected = [offline(model, PROMPT), offline(base_model(), PROMPT)]
    expected += [offline(peft_lora(paths[name]), PROMPT) for name in names]
    wishes = [None, Steering(bare=True), *(Steering(favour={name: 1.0}) for name in names)]
    assert len({tuple(tokens) for tokens in expected}) == 5
    found = answers(small_engine(model), [greedy(PROMPT, steering=wish) for wish in wishes])
    assert [tokens for tokens, _, _ in found] == expected


def test_bare_is_the_base_bit_for_bit(model: PeftModel) -> None:
    """The logits of every forward of the engine, against the same engine on the base alone."""

    def seen(model: Any, wish: Steering | None) -> list[torch.Tensor]:
        engine, found = small_engine(model), list[torch.Tensor]()
        hook = engine.manager.model.register_forward_hook(lambda m, args, out: found.append(out.logits.clone()))
        answers(engine, [greedy(PROMPT, steering=wish)])
        hook.remove()
        return found

    found, expected = seen(model, Steering(bare=True)), seen(base_model(), None)
    assert len(found) == 8 and all(map(torch.equal, found, expected))
    assert not torch.equal(seen(model, None)[0], expected[0])


@pytest.mark.parametrize(
    "wish", [{"forbid": ["math"]}, {"hint": {"code": 0.25}}, {"forbid": ["sql"], "hint": {"math": 0.5, "code": 0.25}}]
)
def test_gates_are_changed_as_documented(wish: dict[str, Any], model: PeftModel) -> None:
    """Against the formula, at the first router: those behind it read what its experts changed."""
    names = ["sql", "math", "code"]
    requests = [greedy(PROMPT, 1, traced=True), greedy(PROMPT, 1, traced=True, steering=parse_steering(wish, names))]
    (_, before, _), (_, after, _) = answers(small_engine(model), requests)
    gates = before[0].gates[0]
    keep = torch.tensor([float(name not in wish.get("forbid", [])) for name in names])
    add = torch.tensor([wish.get("hint", {}).get(name, 0.0) for name in names])
    wanted = (1 - add.sum()) * gates * keep * gates.sum() / (gates * keep).sum() + add
    torch.testing.assert_close(after[0].gates[0], wanted)
    assert not torch.equal(after[0].gates[0], gates)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"only": "sql"}, "no key 'only'"),
        ({"force": "sq"}, "no expert 'sq'"),
        ({"force": 3}, "no expert 3"),
        ({"force": "sql", "forbid": ["math"]}, "give it alone"),
        ({"forbid": "sql"}, "must be a list"),
        ({"forbid": [["sql"]]}, "no expert"),
        ({"forbid": ["sql", "math", "code"]}, "leaves no expert"),
        ({"hint": ["sql"]}, "an object of names and numbers"),
        ({"hint": {"sql": 1.5}}, "above 0 and at most 1"),
        ({"hint": {"sql": float("nan")}}, "above 0 and at most 1"),
        ({"hint": {"sql": True}}, "above 0 and at most 1"),
        ({"hint": {"sql": 0.7, "math": 0.7}}, "adds up to 1.4"),
        ({"forbid": ["sql"], "hint": {"sql": 0.5}}, "not forbidden"),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_sentence(wish: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_steering(wish, ["sql", "math", "code"])


# -- experts that come and go ------------------------------------------------------------------------------------------


def changed(model: PeftModel, folder: Path, work: Any) -> Any:
    engine = small_engine(model)
    pool = ExpertPool(engine=engine, tokenizer=None, allowed=(folder,), taken=("mixture",))

    async def run(engine: Engine) -> Any:
        return await work(engine, pool)

    return with_engine(engine, run)


def test_who_forces_an_expert_that_goes_is_told(model: PeftModel, paths: dict[str, Path]) -> None:
    """And not answered by the others."""

    async def work(engine: Engine, pool: ExpertPool) -> Any:
        wishes = [Steering(favour={"sql": 1.0}), Steering(favour={"sql": 0.5}), Steering(forbid=("sql",))]
        streams = [asyncio.create_task(collected(engine, greedy(PROMPT, 48, steering=wish))) for wish in wishes]
        await asyncio.sleep(0.1)
        await pool.unload("sql")
        return await asyncio.gather(*streams, return_exceptions=True)

    forced, hinted, forbidden = changed(model, paths["chat"].parent, work)
    assert isinstance(forced, EngineError) and forced.status == 404 and "'sql' was unloaded" in str(forced)
    assert len(hinted[0]) == len(forbidden[0]) == 48


def test_under_streams_an_expert_comes_serves_and_goes(model: PeftModel, paths: dict[str, Path]) -> None:
    alone = offline(peft_lora(paths["chat"]), PROMPT)

    async def work(engine: Engine, pool: ExpertPool) -> Any:
        streams = [asyncio.create_task(collected(engine, greedy(PROMPT, 48, traced=True))) for _ in range(8)]
        await asyncio.sleep(0.1)
        await pool.load("chat", str(paths["chat"]), None)
        there = await collected(engine, greedy(PROMPT, steering=Steering(favour={"chat": 1.0})))
        await pool.unload("sql")
        with pytest.raises(ApiError) as unknown:
            await pool.unload("sql")
        return there[0], await asyncio.gather(*streams), unknown.value.status, engine.tracer.expert_names

    there, streams, status, names = changed(model, paths["chat"].parent, work)
    assert there == alone and status == 404 and names == ["math", "code", "chat"]
    for tokens, routing, reason in streams:
        assert len(tokens) == 48 == len(routing) and reason == "length"
        # Each token's gates bear the names of the experts that were there when it was made.
        seen = list(dict.fromkeys(token.experts for token in routing))
        three = ("sql", "math", "code")
        assert seen[0] == three and set(seen) <= {three, (*three, "chat"), ("math", "code", "chat")}
        assert all(len(token.experts) == len(token.share) for token in routing)
    # The pool is the one that would be made anew.
    anew = from_adapters(base_model(), {n: paths[n] for n in names}, "arrow", placement="block").eval()
    assert offline(model, PROMPT) == offline(anew, PROMPT)


def test_in_a_vacant_place_an_expert_comes_and_goes_beside_the_same_graphs(
    model: PeftModel, paths: dict[str, Path], tmp_path: Path
) -> None:
    alone = offline(peft_lora(paths["chat"]), PROMPT)
    extra = save_lora(tmp_path / "extra", seed=7)
    reserve_places(model, 1)

    async def work(engine: Engine, pool: ExpertPool) -> Any:
        def graphs() -> int:
            return id(engine.manager.batch_processor.inputs_and_outputs.graphs)

        pool.allowed = (*pool.allowed, tmp_path)
        before = await collected(engine, greedy(PROMPT, traced=True))
        kept = [engine.manager.batch_processor.inputs_and_outputs.graphs]  # so that its number is not given again
        await pool.load("chat", str(paths["chat"]), None)
        forced = await collected(engine, greedy(PROMPT, traced=True, steering=Steering(favour={"chat": 1.0})))
        await pool.unload("sql")
        with pytest.raises(ApiError, match="there is no expert 'sql'"):
            await pool.unload("sql")
        bare = await collected(engine, greedy(PROMPT, steering=Steering(bare=True)))
        await pool.load("extra", str(extra), None)
        seen, same = await collected(engine, greedy(PROMPT, traced=True)), graphs() == id(kept[0])
        await pool.load("sql", str(paths["sql"]), None)  # there is no place left
        return before, forced, bare, seen, same, graphs() == id(kept[0])

    before, forced, bare, seen, same, at_last = changed(model, paths["chat"].parent, work)
    assert before[1][0].experts == ("sql", "math", "code") and before[1][0].gates.shape[1] == 3
    assert forced[0] == alone and forced[1][0].experts == ("sql", "math", "code", "chat")
    assert bool((forced[1][0].gates[:, 3] == 1).all())
    assert bare[0] == offline(base_model(), PROMPT)
    assert seen[1][0].experts == ("extra", "math", "code", "chat") and len(seen[1][0].share) == 4
    assert same and not at_last
    anew = {"extra": extra, **{n: paths[n] for n in ("math", "code", "chat", "sql")}}
    assert offline(model, PROMPT) == offline(from_adapters(base_model(), anew, "arrow", placement="block"), PROMPT)


def test_places_are_made_where_experts_may_come(model: PeftModel, paths: dict[str, Path]) -> None:
    """And not where no request may load one, or where a router must be trained for them."""
    trained = from_adapters(base_model(), paths, "top_k").eval()
    folder = paths["chat"].parent
    for made, dirs, experts in ((model, (), 3), (model, (folder,), 5), (trained, (folder,), 4)):
        key = {"api_key": "key"} if dirs else {}
        server = make_server(made, word_tokenizer(97), "m", adapter_dirs=dirs, expert_places=2, max_model_len=32, **key)
        assert made.peft_config["default"].num_experts == experts
        assert server.pool.room == (2 if experts == 5 else 1)
        assert len(server.model_names) == 1 + (3 if made is model else 4)
        assert server.pool.tokenizer is not server.tokenizer  # which examples would have cut prompts short


def test_what_must_not_be_loaded_is_not_and_the_engine_goes_on(
    model: PeftModel, paths: dict[str, Path], tmp_path: Path
) -> None:
    inside, outside = tmp_path / "allowed", tmp_path / "elsewhere"
    inside.mkdir()
    good = copy_lora(paths["chat"], inside / "good")
    copy_lora(paths["chat"], outside)
    (inside / "link").symlink_to(outside)
    (inside / "circle").symlink_to(inside / "circle")
    half = copy_lora(paths["chat"], inside / "half")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        linked = copy_lora(paths["chat"], inside / f"linked {name}")
        (linked / name).unlink()
        (linked / name).symlink_to(outside / name)
    nan = copy_lora(paths["chat"], inside / "nan")
    edit_weights(nan, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
    pickle = copy_lora(paths["chat"], inside / "pickle")
    (pickle / "adapter_model.safetensors").rename(pickle / "adapter_model.bin")
    dora = copy_lora(paths["chat"], inside / "dora")
    edit_config(dora, use_dora=True)
    strange = copy_lora(paths["chat"], inside / "strange")
    edit_config(strange, target_modules=3)
    other_base = save_lora(inside / "gpt2", "gpt2")
    wider = save_lora(inside / "wider", target_modules=["k_proj"])
    (half / "adapter_model.safetensors").write_bytes((good / "adapter_model.safetensors").read_bytes()[:200])
    cases: list[tuple[str, str, int, str]] = [
        ("new", str(outside), 403, "is not allowed"),
        ("new", str(inside / ".." / "elsewhere"), 403, "is not allowed"),
        ("new", str(inside / "link"), 403, "is not allowed"),
        ("new", "/etc/passwd", 403, "is not allowed"),
        ("new", "me/hub-lora", 403, "is not allowed"),
        ("new", "", 403, "is not allowed"),
        ("new", "~nobody/x", 403, "is not allowed"),
        ("new", str(inside) + "\0", 400, "is no path"),
        ("new", str(inside / "circle"), 400, "circle"),
        ("new", str(inside / ("x" * 5000)), 400, "has no adapter_config.json"),
        ("new", str(inside / "not there"), 400, "has no adapter_config.json"),
        ("new", str(inside / "linked adapter_config.json"), 403, "leads out"),
        ("new", str(inside / "linked adapter_model.safetensors"), 403, "leads out"),
        ("new", str(pickle), 400, "has no adapter_model.safetensors"),
        ("new", str(nan), 400, "NaN|finite"),
        ("new", str(half), 400, "adapter_model.safetensors"),
        ("new", str(dora), 400, "DoRA|dora"),
        ("new", str(strange), 400, "target_modules"),
        ("new", str(other_base), 400, "base|transformer"),
        ("new", str(wider), 400, "no expert of this model does"),
        ("sql", str(good), 400, "already"),
        ("mixture", str(good), 400, "choose another name"),
        ("a/b", str(good), 400, "a/b"),
        (" ", str(good), 400, "must be a word"),
    ]

    async def work(engine: Engine, pool: ExpertPool) -> Any:
        found = []
        for name, path, _, _ in cases:
            try:
                await pool.load(name, path, None)
                found.append((200, path))
            except ApiError as refused:
                found.append((refused.status, str(refused)))
        return found, await collected(engine, greedy(PROMPT)), engine.error

    expected = offline(model, PROMPT)
    found, answer, error = changed(model, inside, work)
    for (name, path, status, words), (got, message) in zip(cases, found, strict=True):
        assert got == status, (name, path, message)
        assert re.search(words, message), (name, path, message)
        assert "\n" not in message
    assert answer[0] == expected and error is None


def test_a_router_that_is_trained_keeps_its_experts_and_so_does_a_failed_engine(
    paths: dict[str, Path], tmp_path: Path
) -> None:
    trained = get_peft_model(base_model(), config(expert_names=["sql", "math", "code", "chat"])).eval()

    async def work(engine: Engine, pool: ExpertPool) -> Any:
        for change in (pool.load("new", str(paths["chat"]), None), pool.unload("sql")):
            with pytest.raises(ApiError, match="made of LoRA adapters|trained for its experts") as refused:
                await change
            assert refused.value.status == 400
        await asyncio.to_thread(engine.manager.stop, hard_stop=True)
        with pytest.raises(ApiError) as refused:
            await pool.unload("sql")
        return refused.value.status

    assert changed(trained, paths["chat"].parent, work) == 503
    assert runtime_of(trained) is not None
