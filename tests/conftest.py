"""What every test gets: no network, few threads, a fixed seed, and a clear reason when a GPU is missing."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

# Before anything imports huggingface_hub, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that spin while they wait starve whatever else runs on the same cores, by a factor of ten under load.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if not os.path.exists("/dev/nvidia0"):
    # Triton reads this when it is imported: without a GPU its kernels are interpreted, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: one thread each, or they fight over them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips GPU tests with a reason; torch is imported only if such a test was collected."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seeds every generator that is in use; does not import a library for that."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fills new "empty" floating point tensors with NaN, so that reading uninitialised memory shows."""
    import torch

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    yield


@pytest.fixture
def triton_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run by Triton on CPU tensors too, interpreted; without Triton the test is skipped."""
    pytest.importorskip("triton")
    from molora.kernels import launch

    monkeypatch.setattr(launch, "ready", lambda device: True)


_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ENGINE = ("ACCELERATE_", "FSDP_")


def _launch_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in _LAUNCH or name.startswith(_ENGINE)}


@pytest.fixture(autouse=True)
def no_launch_is_left_behind() -> Iterator[None]:
    """TrainingArguments names its engine, and the engine its process, in variables; the next test begins without."""
    before = _launch_variables()
    yield
    after = _launch_variables()
    if after == before:
        return
    for name in after.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    import torch
    from accelerate.state import AcceleratorState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
