"""transformers' continuous batching: the manager with sampling of our own. The only file that touches its inside."""

from __future__ import annotations

import contextlib
import math
import queue
import random
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.utils import CudaGraphBuffer

_BITS = 0xFFFFFFFF


class SeededChoice(ContinuousBatchingLogitsProcessor):
    """Chooses each row's token itself, so that temperature 0 is the arg-max and a seed holds for one request.

    The manager samples all requests from one generator. Here every position of a request has a 32-bit key, made of its
    seed and the position; noise is a hash of (key, token), and the choice is ``argmax(score + Gumbel(noise))``, which
    is a draw from softmax(score). A key of 0 adds no noise. All other scores become -inf, so that the manager's own
    draw has nothing left to choose.
    """

    supported_kwargs: dict[str, type] = {"seed": int}
    ignored_kwargs: tuple[str, ...] = ()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        states = [request.state for request in requests_with_new_token]
        keys = [_key(s.logit_processor_kwargs.get("seed", 0), s.position_offset) for s in states]
        return torch.tensor(keys, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        key = tensor_arg[: scores.shape[0], None].long()
        token = torch.arange(scores.shape[1], device=scores.device)
        uniform = ((_mixed(key * 0x9E3779B1 + token * 0x85EBCA77) >> 8) + 0.5) / 2**24
        noise = -(-uniform.float().log()).log()
        best = torch.where(key == 0, scores, scores + noise).argmax(1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, best, 0.0)


def _mixed(x: Any) -> Any:
    """MurmurHash3's 32-bit finaliser, of an int or of int64 tensors."""
    x = x & _BITS
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _BITS
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _BITS
    return x ^ (x >> 16)


def _key(seed: int, position: int) -> int:
    """A signed 32-bit key for one position; 0 for seed 0 alone."""
    if seed == 0:
        return 0
    mixed = _mixed(_mixed(seed & _BITS) + _mixed(seed >> 32) * 31 + position * 0x9E3779B1) or 1
    return mixed - (mixed >> 31 << 32)


def sampling_arguments(temperature: float, top_p: float, seed: int | None) -> dict[str, Any]:
    """The manager's per-request arguments. Temperature 0 is greedy; without a seed one is drawn."""
    if temperature == 0:
        return {"temperature": 1.0, "top_p": 1.0, "seed": 0}
    drawn = random.getrandbits(62) if seed is None else _mixed(seed & _BITS) + (seed >> 32 << 32)
    return {"temperature": float(temperature), "top_p": float(top_p), "seed": drawn + 1}


def make_manager(
    model: Any,
    *,
    num_blocks: int,
    page_size: int,
    max_model_len: int,
    max_batch_tokens: int,
    max_requests: int,
    cuda_graph: bool | None,
) -> ContinuousBatchingManager:
    """A manager, not started, of `num_blocks` pages of `page_size` tokens, with `sampling_arguments` for each request.

    Args:
        max_model_len: tokens of the longest request; flash attention decodes those with a table of their pages.
        max_batch_tokens: tokens of one forward, prompts in parts.
        max_requests: requests in one forward.
        cuda_graph: None: on a GPU. transformers would leave them out without flash attention, but a mixture gains more
            by them than a bare model: most of what one token takes is Python, and launches.
    """
    # Neutral values would leave the processors out for good; each request brings its own.
    sampling = GenerationConfig(do_sample=True, temperature=0.5, top_p=0.5, max_new_tokens=16, eos_token_id=-1)
    config = ContinuousBatchingConfig(
        num_blocks=num_blocks,
        page_size=page_size,
        # One more, because the warm-up asks for the token behind a full page.
        max_blocks_per_request=math.ceil(max_model_len / page_size) + 1 if model.device.type == "cuda" else None,
        max_batch_tokens=max_batch_tokens,
        max_requests_per_batch=max_requests,
        per_request_processors=True,
        use_cuda_graph=model.device.type == "cuda" if cuda_graph is None else cuda_graph,
        use_async_batching=False,  # the batch that runs is then the batch that is known
        # A prompt has other keys and values under other experts, and another request may choose them by itself.
        allow_block_sharing=False,
        auto_switch_to_flash=True,
    )
    manager = model.init_continuous_batching(generation_config=sampling, continuous_batching_config=config)
    processors = manager.logit_processor
    processors.logits_processor.append(SeededChoice())
    processors.tensors_required += 1
    processors._retrieve_processors_kwargs()
    return manager


def around_forwards(manager: ContinuousBatchingManager, begin: Callable[[], Hashable], end: Callable[[], None]) -> None:
    """Calls `begin` before and `end` behind each forward of a manager, on its thread and on the stream of its forwards.

    Replayed CUDA graphs run no hooks, but they read and write the tensors of the forward that was captured. What
    `begin` returns tells apart the graphs of one size: each value has graphs of its own.

    Also has the thread make a batch's tensors on the stream that reads them, and capture the first graphs before the
    first request. transformers 5.19 to 5.23 make them on the thread's default stream and run the model on another,
    which without async batching waits for nothing: a forward may read the page numbers of the batch before.
    """
    create, step, kind = manager._create_batch_processor, manager._generation_step, [begin()]

    def created() -> Any:
        processor = create()
        batch = processor.inputs_and_outputs
        if batch.compute_stream is not None:
            torch.cuda.synchronize(batch.compute_stream.device)
            torch.cuda.set_stream(batch.compute_stream)  # of the calling thread, which is the engine's
        size = batch._get_graph_key
        batch._get_graph_key = lambda: (*size(), kind[0])
        processor.warmup(manager.model)
        _capture_prompts(processor, manager.model)
        return processor

    def stepped() -> None:
        kind[0] = begin()
        step()
        end()

    manager._create_batch_processor, manager._generation_step = created, stepped


@torch.no_grad()
def _capture_prompts(processor: Any, model: Any) -> None:
    """Captures batches with prompts, of each number of tokens that they are padded to: the warm-up knows the largest
    alone, and with the others those that wait first would wait for a capture each time."""
    runner, config = processor.model_runner, processor.cb_config
    if runner.pad_inputs:
        for tokens in range(config.q_padding_interval_size, config.max_batch_tokens, config.q_padding_interval_size):
            runner.run_one_warmup(model, num_q_tokens=tokens, max_kv_read=1)
        runner.cache.reset()


def fatal_error(manager: ContinuousBatchingManager) -> str | None:
    """Why the manager's thread has ended, if it has."""
    error = manager.background_thread_status.fatal_error
    return None if error is None else str(error)


def requests_of_batch(manager: ContinuousBatchingManager) -> list[str]:
    """Around a forward: the requests that get a token from it, in the order of its ``logits_indices``."""
    batch = manager.batch_processor
    requests = [] if batch is None else batch.inputs_and_outputs.requests_in_batch
    return [request.state.request_id for request in requests if request.has_new_token]


def tokens_of_batch(manager: ContinuousBatchingManager) -> list[tuple[str, int]]:
    """Around a forward: each request and how many tokens of it the batch holds, in the batch's order."""
    batch = manager.batch_processor
    requests = [] if batch is None else batch.inputs_and_outputs.requests_in_batch
    return [(request.state.request_id, request.query_length) for request in requests]


def drop_graphs(manager: ContinuousBatchingManager) -> None:
    """In a pause: has forwards captured anew, because their CUDA graphs know the tensors of the model as it was."""
    if manager.batch_processor is not None:
        manager.batch_processor.inputs_and_outputs.graphs = CudaGraphBuffer()


def forget(manager: ContinuousBatchingManager, request_id: str) -> None:
    """Ends a request whose answer nobody waits for, and what is left of earlier ones."""
    manager.cancel_request(request_id)
    router = manager.output_router
    with router._lock:
        router.result_handlers.pop(request_id, None)
    with contextlib.suppress(queue.Empty):
        while True:
            router.output_queue.get_nowait()
