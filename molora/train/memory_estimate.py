"""What a training step will take of the memory of one process, from a few small steps that are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from molora.integrations.deepspeed import fit_stage3
from molora.quantization import weight_bytes
from molora.train.engine import deepspeed_config
from molora.train.step_peaks import END, at_length, stretch_peaks

PROBED = {"cuda": 2048, "cpu": 256}
"""Tokens of the shortest probe at most: on a GPU enough for the kernels that a long batch would run."""
ADAPTER_WEIGHTS = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes of one process at the peak of a training step; scoring before and after it is not in it.

    Attributes:
        weights: of the base, as it is stored, and of the adapter.
        optimizer_states: after the first step; ``None`` where the optimizer cannot be tried on one parameter alone.
        gradients: those that are there at the peak.
        activations: with logits, the loss and what operations need for themselves; ``None`` under ZeRO-3, where the
            weights that a probe would read are spread over the processes.
        lines, length: of the batch: as many lines of as many tokens.
        zero_stage, processes: of DeepSpeed, 0 without; among how many processes what the stage says is divided.
    """

    weights: int
    optimizer_states: int | None
    gradients: int
    activations: int | None
    lines: int
    length: int
    device: str
    zero_stage: int = 0
    processes: int = 1

    @property
    def total(self) -> int:
        """The sum, of what is known."""
        return self.weights + (self.optimizer_states or 0) + self.gradients + (self.activations or 0)


def estimate_memory(trainer: Trainer, lines: int, length: int, packed: bool = False) -> MemoryEstimate:
    """Measures steps of short lines and says what as many lines of `length` tokens would take.

    Each stretch between two gradients is extrapolated by itself, so that the peak may sit where it does not in a short
    step: activations grow with the tokens, gradients and optimizer states do not. The trainer's model has other
    gradients and counters after it.

    Args:
        trainer: with its model, not begun.
        lines: of a batch, at least 1.
        length: tokens of its longest line.
        packed: whether a line holds several rows, so that the batch is one line of ``lines * length`` tokens.
    """
    args, model = trainer.args, trainer.model
    device = args.device
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    config = deepspeed_config(args)
    zero, processes = config.get("zero_optimization", {}), args.world_size
    stage = int(zero.get("stage", 0))
    # DeepSpeed casts what is trained to its 16-bit type and keeps an fp32 master among its states.
    halved = any(config.get(key, {}).get("enabled") is True for key in ("bf16", "fp16"))
    size = {name: p.numel() * (2 if halved else p.element_size()) for name, p in trained.items()}
    full = sum(size.values())
    states, scratch = _optimizer_bytes(trainer, sum(p.numel() for p in trained.values()))
    if states is not None and halved:
        states += 4 * sum(p.numel() for p in trained.values())
    found = {"lines": lines, "length": length, "device": device.type, "zero_stage": stage, "processes": processes}
    weights = weight_bytes(model) - (full if halved else 0)

    def share(amount: int | None, from_stage: int) -> int | None:
        return None if amount is None else amount // processes if stage >= from_stage else amount

    states = share(states, 1)
    if stage == 3:
        fit_stage3(config, model)
        threshold = zero.get("stage3_param_persistence_threshold", 1e5)  # DeepSpeed's own, if left out
        whole = sum(size[n] for n, p in trained.items() if threshold != "auto" and p.numel() <= float(threshold))
        parts = [p.ds_tensor for p in model.parameters() if hasattr(p, "ds_tensor")]  # a base that was loaded so
        return MemoryEstimate(
            weights=sum(part.nbytes for part in parts) + weights // processes + whole,
            optimizer_states=states,
            gradients=full // processes,
            activations=None,
            **found,
        )
    if packed:
        lines, length = 1, lines * length
    peaks = _probe(trainer, trained, lines, length, packed)
    # Between optimizer steps gradients stay; else each of them is there only when it has come.
    kept = args.gradient_accumulation_steps > 1 or processes > 1 or stage > 0
    come, best = full if kept else 0, (full + scratch, full, scratch)
    for name, activations in peaks.items():
        best = max(best, (activations + come, come, activations))
        come += 0 if kept else size.get(name, 0)
    _, gradients, activations = best
    return MemoryEstimate(
        weights=weights,
        optimizer_states=states,
        gradients=share(gradients, 2) or 0,
        activations=activations,
        **found,
    )


def _probe(trainer: Trainer, trained: dict[str, nn.Parameter], lines: int, length: int, packed: bool) -> dict[str, int]:
    """For each stretch of a step the peak above weights, states and gradients."""
    args = trainer.args
    model: Any = trainer.model
    _enable_checkpointing(args, model)
    if not trainer.is_deepspeed_enabled:
        # With the autocast and the casts of the outputs that it trains under.
        model = trainer.accelerator.prepare_model(model, evaluation_mode=True)
    model.train()

    def step(tokens: int) -> None:
        batch = trainer.data_collator(_items(lines, tokens, packed))
        inputs = {key: value.to(args.device) for key, value in batch.items()}
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=(inputs["labels"] != -100).sum())
        loss.backward()

    shortest = max(8, min(PROBED.get(args.device.type, PROBED["cpu"]) // lines, length // 2))
    lengths = [shortest, 3 * shortest // 2, 2 * shortest]
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    before = _allocated(args.device)
    step(lengths[-1])  # compiled kernels and workspaces are there from now on
    held = _allocated(args.device) - before
    found = [stretch_peaks(lambda n=n: step(n), trained, args.device) for n in lengths]  # type: ignore[misc]
    if any(peaks.keys() != found[0].keys() for peaks in found):
        found = [{END: max(peaks.values())} for peaks in found]
    return {name: held + round(at_length(lengths, [p[name] for p in found], length)) for name in found[0]}


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _items(lines: int, tokens: int, packed: bool) -> list[Any]:
    """What the collator makes `lines` lines of: rows, of which the second is a token shorter, so that there is the mask
    of a padded batch; or a pack of two rows, which the mask tells apart."""
    lengths = [tokens // 2, tokens - tokens // 2] if packed else [tokens - (i == 1) for i in range(lines)]
    rows = [{"input_ids": [1] * n, "labels": [1] * n, "task": 0, "task_label": 0} for n in lengths]
    return [rows] if packed else rows


def _enable_checkpointing(args: Any, model: Any) -> None:
    """As the Trainer does when it begins, under the name that transformers is giving up and under the new one."""
    word = "activation" if hasattr(args, "activation_checkpointing") else "gradient"
    if getattr(args, f"{word}_checkpointing"):
        options = dict(getattr(args, f"{word}_checkpointing_kwargs") or {})
        getattr(model, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": options or None})


def _optimizer_bytes(trainer: Trainer, num_weights: int) -> tuple[int | None, int]:
    """(states, what a step needs for itself) for that many weights, from one step of the optimizer on a square one."""
    side = round(ADAPTER_WEIGHTS**0.5)
    parameter = nn.Parameter(torch.zeros(side, side, device=trainer.args.device))
    parameter.grad = torch.zeros_like(parameter)
    try:
        cls, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        optimizer = cls([parameter], **options)
        optimizer.step()
        (scratch,) = stretch_peaks(optimizer.step, {}, trainer.args.device).values()
    except (TypeError, ValueError, RuntimeError, ImportError, AttributeError, KeyError):
        return None, 0  # one that takes no parameters (LOMO), wants several, or runs on other devices only
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    per_weight = num_weights / ADAPTER_WEIGHTS
    return round(sum(t.nbytes for t in states) * per_weight), round(scratch * per_weight)
