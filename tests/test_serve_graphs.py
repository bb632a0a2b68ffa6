"""Forwards of fixed size, as CUDA graphs need them: what is captured at the start, what a graph tells and is told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_pools import save_pool
from peft import get_peft_model
from serving import answers, collected, greedy, offline, prompts_of, with_engine
from tiny_models import base_model, preset_config
from transformers.generation.continuous_batching.model_runner import ModelRunner

from molora import from_adapters
from molora.adapters.places import reserve_places
from molora.serve.engine import Engine
from molora.serve.limits import Limits
from molora.serve.pool import ExpertPool
from molora.serve.steering import Steering
from molora.serve.tracing import Tracer


def mixture(device: str = "cpu") -> Any:
    torch.manual_seed(0)
    return get_peft_model(base_model(), preset_config("mixlora", init_lora_weights=False)).to(device).eval()


def engine(model: Any, cuda_graph: bool | None = None) -> Engine:
    limits = Limits(max_model_len=64, cache_tokens=2048, max_batch_tokens=256, max_running=16)
    return Engine(model, [], limits, cuda_graph)


def test_every_size_is_captured_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the forwards are padded as for graphs, and run; no size comes that was not there at the start."""
    sizes: list[tuple[Any, ...]] = []
    compute = ModelRunner.compute_batch

    def noted(self: Any, *args: Any) -> None:
        queries, read, *_, kind = self.inputs_and_outputs._get_graph_key()  # between: a length, padded for graphs alone
        sizes.append((queries, read, kind))
        compute(self, *args)

    monkeypatch.setattr(ModelRunner, "pad_inputs", property(lambda self: True, lambda self, value: None), raising=False)
    monkeypatch.setattr(ModelRunner, "compute_batch", noted)
    model, prompts = mixture(), prompts_of([5, 40, 33, 50, 7, 48, 20, 31, 12])
    want = [offline(model, prompt) for prompt in prompts]

    async def work(served: Engine) -> tuple[list[Any], list[tuple[Any, ...]]]:
        first, *others = (greedy(prompt) for prompt in prompts)
        found, at_start = [await collected(served, first)], list(sizes[:-8])  # its eight tokens: eight forwards
        found += await asyncio.gather(*(collected(served, request) for request in others))
        return found, at_start

    found, at_start = with_engine(engine(model), work)
    assert [tokens for tokens, _, _ in found] == want
    assert len(at_start) == 4 and set(sizes) <= set(at_start)
    assert {size[0] for size in at_start} == {64, 128, 192, 256}


def test_the_names_of_the_routers_are_whole_while_a_forward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer is written down on another thread than the one that traces the next token."""
    model, seen, add = mixture(), list[int](), Tracer.add

    def noted(self: Tracer, *args: Any) -> None:
        add(self, *args)
        seen.append(len(self.router_names))

    monkeypatch.setattr(Tracer, "add", noted)
    ((_, routing, _),) = answers(engine(model), [greedy([5, 9, 14], 4, traced=True)])
    routers = len(routing[0].gates)
    assert seen == [0] * routers + [routers] * 3 * routers and routers > 1


@pytest.mark.gpu
def test_graphs_answer_trace_and_steer_as_eager_forwards_do() -> None:
    """A few of the answers may differ, where two tokens are nearly tied: graphs pad their batches."""
    model, prompts = mixture("cuda"), prompts_of(range(3, 43, 2))
    wishes = [{}, {"traced": True}, {"steering": Steering(favour={"1": 1.0}), "traced": True}]
    wishes += [{"steering": Steering(forbid=("0",))}, {"steering": Steering(bare=True), "traced": True}]
    requests = [greedy(prompt, 12, **wishes[n % 5]) for n, prompt in enumerate(prompts)]
    eager, graphs = (answers(engine(model, graph), requests) for graph in (False, True))
    assert sum(a[0] == b[0] for a, b in zip(eager, graphs, strict=True)) >= 0.9 * len(requests)
    for number, ((tokens, routing, _), (others, told, _)) in enumerate(zip(eager, graphs, strict=True)):
        assert len(told) == len(routing) == (12 if wishes[number % 5].get("traced") else 0)
        if tokens == others:
            for before, after in zip(routing, told, strict=True):
                torch.testing.assert_close(after.gates, before.gates, atol=1e-4, rtol=0)
        if number % 5 == 2:
            assert all(float(one.share[1]) == 1.0 for one in told)
        if number % 5 == 4:
            assert all(not one.gates.any() for one in told)


@pytest.mark.gpu
def test_graphs_go_on_while_experts_come_into_vacant_places(tmp_path: Path) -> None:
    paths = save_pool(tmp_path, 4)
    prompts = prompts_of(range(3, 23, 2))
    names = list(paths)

    def pool() -> Any:
        return from_adapters(base_model(), {n: paths[n] for n in names[:2]}, "arrow", placement="block").cuda().eval()

    wishes = [{}, {"traced": True}, {"steering": Steering(favour={"code": 1.0}), "traced": True}]
    requests = [greedy(prompt, 12, **wishes[n % 3]) for n, prompt in enumerate(prompts)]

    async def work(served: Engine) -> list[Any]:
        experts = ExpertPool(engine=served, tokenizer=None, allowed=(tmp_path,))
        await asyncio.gather(*(collected(served, request) for request in requests if request.steering is None))
        buffer = served.manager.batch_processor.inputs_and_outputs.graphs
        await experts.load("code", str(paths["code"]), None)
        await asyncio.gather(*(collected(served, request) for request in requests))
        await experts.unload("sql")
        await experts.load("chat", str(paths["chat"]), None)
        found = await asyncio.gather(*(collected(served, request) for request in requests))
        assert served.manager.batch_processor.inputs_and_outputs.graphs is buffer
        return found

    model = pool()
    reserve_places(model, 1)
    found = with_engine(engine(model), work)
    anew = from_adapters(base_model(), {n: paths[n] for n in ("chat", "math", "code")}, "arrow", placement="block")
    wanted = answers(engine(anew.cuda().eval(), False), requests)
    assert sum(a[0] == b[0] for a, b in zip(found, wanted, strict=True)) >= 0.9 * len(requests)
    for (_, traced, _), (_, expected, _) in zip(found, wanted, strict=True):
        for own, other in zip(traced[:1], expected[:1], strict=True):
            assert own.experts == ("chat", "math", "code") == other.experts
            torch.testing.assert_close(own.gates, other.gates, rtol=1e-4, atol=1e-4)
