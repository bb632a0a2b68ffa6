"""The engine gives the answers that `generate` gives, whatever else is in the batch, however little room there is."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import _tokenizer as word_tokenizer
from lora_pools import examples_of, save_pool
from peft import PeftModel, get_peft_model
from serving import answers, collected, greedy, offline, offline_gates, prompts_of, small_engine, with_engine
from tiny_models import base_model, preset_config
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from molora import from_adapters
from molora.integrations.continuous_batching import SeededChoice
from molora.serve.engine import Engine, EngineError, Request
from molora.serve.launch import check_servable

# One preset for each router and FFN experts; then the routers whose experts are imported.
TRAINED = ("mixlora", "mixlora-dynamic", "dynmole", "smora", "adamole", "mole")
IMPORTED = ("arrow", "centroid", "phatgoose")
LENGTHS = (5, 17, 1, 12)


def trained_mixture(preset: str, family: str = "llama") -> PeftModel:
    """A preset with four experts that are told apart."""
    model = get_peft_model(base_model(family), preset_config(preset))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def imported_mixture(router: str, folder: Path, **options: Any) -> PeftModel:
    pool = save_pool(folder)
    model = from_adapters(base_model(), pool, router, **options)
    if router == "centroid":
        model.set_centroids(examples_of(pool), word_tokenizer())
    return model.eval()


@pytest.fixture(scope="module")
def arrow(tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    """Experts sql, math and code. Tests of this module use it one after the other."""
    return imported_mixture("arrow", tmp_path_factory.mktemp("arrow"), placement="block")


# -- the answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", TRAINED + IMPORTED)
def test_many_at_once_and_prompts_in_parts_are_answered_as_alone(router: str, tmp_path: Path) -> None:
    model = trained_mixture(router) if router in TRAINED else imported_mixture(router, tmp_path)
    check_servable(model)
    prompts = prompts_of(LENGTHS)
    expected = [offline(model, prompt, 6) for prompt in prompts]
    found = answers(small_engine(model, max_batch_tokens=8), [greedy(prompt, 6) for prompt in prompts])
    assert [(tokens, reason) for tokens, _, reason in found] == [(tokens, "length") for tokens in expected]


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_other_families_and_sliding_windows(family: str) -> None:
    model = get_peft_model(base_model(family), preset_config("dynmole")).eval()
    prompts = prompts_of(LENGTHS)
    expected = [offline(model, prompt, 6) for prompt in prompts]
    found = answers(small_engine(model, max_batch_tokens=16), [greedy(prompt, 6) for prompt in prompts])
    assert [tokens for tokens, _, _ in found] == expected


def test_requests_that_lose_their_room_come_back_and_go_on(arrow: PeftModel) -> None:
    prompts = prompts_of((30, 28, 25, 29, 31))
    expected = [offline(arrow, prompt, 24) for prompt in prompts]
    engine = small_engine(arrow, cache_tokens=80, max_batch_tokens=64)  # 5 pages, for five requests of 4
    moved = list[bool]()

    async def work(engine: Engine) -> Any:
        while engine.manager.batch_processor is None:
            await asyncio.sleep(0.01)
        manager = engine.manager.batch_processor.offloading_manager
        offload = manager.offload_requests
        manager.offload_requests = lambda: moved.append(offload()) or moved[-1]
        return await asyncio.gather(*(collected(engine, greedy(prompt, 24, traced=True)) for prompt in prompts))

    found = with_engine(engine, work)
    assert [tokens for tokens, _, _ in found] == expected and any(moved)
    # What is read anew does not count twice among the routings.
    assert [len(routing) for _, routing, _ in found] == [24] * 5


def test_an_end_token_ends_the_answer_and_is_no_part_of_it(arrow: PeftModel) -> None:
    prompts = prompts_of(LENGTHS)
    whole = [offline(arrow, prompt, 12) for prompt in prompts]
    end = Counter(token for answer in whole for token in answer[1:]).most_common(1)[0][0]
    expected = [offline(arrow, prompt, 12, [end]) for prompt in prompts]
    found = answers(small_engine(arrow, [end]), [greedy(prompt, 12) for prompt in prompts])
    assert [tokens for tokens, _, _ in found] == expected
    assert [reason for _, _, reason in found] == ["stop" if end in answer else "length" for answer in whole]
    assert any(end in answer for answer in whole)


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_answer_whatever_runs_beside_it(arrow: PeftModel) -> None:
    prompt = prompts_of([6])[0]
    seeds = [1, 2, 1, None, -1, 2**62, 0, None]
    sampled = [Request(prompt_ids=prompt, max_tokens=12, seed=seed) for seed in seeds]
    found = [tokens for tokens, _, _ in answers(small_engine(arrow), sampled)]
    assert found[0] == found[2] and len({tuple(tokens) for tokens in found}) == len(seeds) - 1
    alone = answers(small_engine(arrow, max_batch_tokens=4), [sampled[5]])
    assert alone[0][0] == found[5]


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Standard deviations that the statistic is above its mean."""
    expected = probabilities * counts.sum()
    statistic = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    freedom = int((expected > 0).sum()) - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


def test_the_choice_is_a_draw_from_the_softmax() -> None:
    """Against torch's own draws, which pass the same test; and against wrong probabilities, which do not."""
    draws, scores = 40_000, torch.tensor([0.3, -1.0, 1.2, 0.0, -torch.inf, 0.7])
    choice = SeededChoice()
    keys = torch.randint(-(2**31), 2**31, (draws,)).int()
    found = choice(scores.expand(draws, -1), keys).argmax(1).bincount(minlength=6)
    probabilities = scores.softmax(0)
    assert found[4] == 0 and abs(chi_square(found, probabilities)) < 4
    assert abs(chi_square(torch.multinomial(probabilities, draws, True).bincount(minlength=6), probabilities)) < 4
    assert chi_square(found, (scores * 1.05).softmax(0)) > 4
    greedy_keys = torch.zeros(3, dtype=torch.int32)
    assert choice(scores.expand(3, -1), greedy_keys).argmax(1).tolist() == [2] * 3


def test_temperature_and_top_p_of_each_request_are_those_of_transformers(arrow: PeftModel) -> None:
    prompt = prompts_of([6])[0]
    ids = torch.tensor([prompt])
    with torch.no_grad():
        logits = arrow(input_ids=ids).logits[:, -1]
    settings, draws = [(0.1, 1.0), (0.2, 0.7)], 200  # a random model is nearly undecided: cold
    requests = [
        Request(prompt_ids=prompt, max_tokens=1, temperature=temperature, top_p=top_p, seed=seed)
        for seed in range(1, draws + 1)
        for temperature, top_p in settings
    ]
    found = [tokens[0] for tokens, _, _ in answers(small_engine(arrow, max_waiting=1000), requests)]
    for number, (temperature, top_p) in enumerate(settings):
        scores = TopPLogitsWarper(top_p)(ids, TemperatureLogitsWarper(temperature)(ids, logits))
        probabilities = scores.softmax(1)[0]
        counts = torch.tensor(found[number :: len(settings)]).bincount(minlength=len(probabilities))
        assert not counts[probabilities == 0].any()
        # The rare ones as one, or the statistic would not be one of chi-square.
        rare = probabilities * draws < 5
        together = [torch.cat([part[~rare], part[rare].sum()[None]]) for part in (counts, probabilities)]
        assert len(together[0]) > 5 and abs(chi_square(*together)) < 4, (temperature, top_p)


# -- experts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["dynmole", "smora", "arrow"])
def test_the_routing_of_each_token_is_that_of_an_offline_forward(router: str, tmp_path: Path) -> None:
    model = trained_mixture(router) if router in TRAINED else imported_mixture(router, tmp_path)
    prompts = prompts_of(LENGTHS)
    # Every second request is traced: the rows of the others must not count.
    requests = [greedy(prompt, 6, traced=bool(n % 2)) for n, prompt in enumerate(prompts)]
    found = answers(small_engine(model, max_batch_tokens=8), requests)
    for request, (tokens, routing, _) in zip(requests, found, strict=True):
        assert len(routing) == (len(tokens) if request.traced else 0)
        wanted = offline_gates(model, request.prompt_ids, tokens)
        for token, gates in zip(routing, wanted, strict=False):
            torch.testing.assert_close(token.gates, gates, atol=1e-5, rtol=0)
            share = (gates / gates.sum(1, keepdim=True)).mean(0)
            torch.testing.assert_close(token.share, share, atol=1e-5, rtol=0)


def test_what_leaves_the_engine_leaves_nothing_behind(arrow: PeftModel) -> None:
    prompts = prompts_of(LENGTHS)

    async def work(engine: Engine) -> Any:
        async def hangs_up(prompt: list[int]) -> None:
            async for _ in engine.stream(greedy(prompt, 30, traced=True)):
                break

        for _ in range(3):
            await asyncio.gather(*map(hangs_up, prompts))
        last = await collected(engine, greedy(prompts[0], 4))
        await asyncio.sleep(0.1)
        manager = engine.manager
        scheduler = manager.batch_processor.scheduler
        left = [engine.tracer._wants, engine.tracer._steered, manager.output_router.result_handlers]
        left += [scheduler.active_requests, scheduler.waiting_requests, scheduler.waiting_requests_order]
        return last[0], [len(part) for part in left], engine.open, manager.output_router.output_queue.qsize()

    tokens, left, count, outputs = with_engine(small_engine(arrow), work)
    assert tokens == offline(arrow, prompts[0], 4)
    assert left == [0] * len(left) and count == 0
    assert outputs <= len(prompts)  # what came between a hang-up and its cancellation; the next hang-up drops it


# -- the bounds --------------------------------------------------------------------------------------------------------


def test_a_full_engine_refuses_and_a_slow_answer_is_given_up(arrow: PeftModel) -> None:
    prompt = prompts_of([4])[0]

    async def work(engine: Engine) -> Any:
        tasks = [asyncio.create_task(collected(engine, greedy(prompt, 40))) for _ in range(3)]
        await asyncio.sleep(0)
        errors = [EngineError(0, "")]
        for count in (1, 4):
            with pytest.raises(EngineError) as refused, engine.places(count):
                pass
            errors.append(refused.value)
        done = await asyncio.gather(*tasks)
        with engine.places(3):
            pass
        object.__setattr__(engine.limits, "timeout_s", 0.0)
        with pytest.raises(EngineError, match="more than 0 seconds") as slow:
            await collected(engine, greedy(prompt, 40))
        return [error.status for error in errors[1:]], [len(tokens) for tokens, _, _ in done], slow.value.status

    engine = small_engine(arrow, max_running=2, max_waiting=1)
    assert with_engine(engine, work) == ([429, 400], [40] * 3, 504)
    assert engine.open == 0


def test_on_shutdown_those_that_run_finish_and_new_ones_are_refused(arrow: PeftModel) -> None:
    prompt = prompts_of([4])[0]
    engine = small_engine(arrow)

    async def work() -> Any:
        engine.start()
        running = asyncio.create_task(collected(engine, greedy(prompt, 40)))
        await asyncio.sleep(0.05)
        stopping = asyncio.create_task(engine.stop(20.0))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="shutting down") as late:
            await collected(engine, greedy(prompt, 1))
        await stopping
        return (await running)[0], late.value.status

    assert asyncio.run(work()) == (offline(arrow, prompt, 40), 503)


def test_without_time_to_drain_what_runs_gets_an_error_and_no_request_hangs(arrow: PeftModel) -> None:
    engine = small_engine(arrow)

    async def work() -> Any:
        engine.start()
        running = asyncio.create_task(collected(engine, greedy([5, 6], 60)))
        await asyncio.sleep(0.05)
        await engine.stop(0.0)
        return await asyncio.wait_for(asyncio.gather(running, return_exceptions=True), 10)

    (error,) = asyncio.run(work())
    assert isinstance(error, EngineError) and error.status == 503
