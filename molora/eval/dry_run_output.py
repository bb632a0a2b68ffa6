"""What `molora train --dry-run` prints beside the data and the model: schedule, samples with their loss, memory."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from molora.eval import terminal

BEFORE, AFTER = 24, 60
"""Tokens that are shown in front of the first one with loss, and from it on."""


def show_dry_run(found: Any) -> None:
    """Prints a :class:`molora.train.dry_run.DryRun`."""
    for sample in found.samples:
        terminal.out.print(sample_text(sample.task, sample.tokens))
    terminal.out.print(schedule_table(found.schedule))
    terminal.out.print(memory_table(found.memory))


def sample_text(task: str, tokens: list[tuple[str, bool]]) -> Text:
    """One training row; tokens are parted by bars, those with loss stand in brackets and in colour."""
    with_loss = [i for i, (_, loss) in enumerate(tokens) if loss]
    start = max(0, (with_loss[0] if with_loss else 0) - BEFORE)
    end = start + BEFORE + AFTER
    text = Text()
    text.append(f"{task}: ", style="bold")
    text.append(f"{len(tokens)} tokens, [{len(with_loss)}] with loss\n")
    if start:
        text.append(f"({start} tokens) ", style="dim")
    for i, (piece, loss) in enumerate(tokens[start:end], start):
        shown = piece.replace("\n", "\\n")
        if loss:
            text.append(f"[{shown}]", style="bold green")
        else:
            text.append(shown, style="dim")
            if i + 1 < len(tokens) and not tokens[i + 1][1]:
                text.append("|", style="dim")
    if end < len(tokens):
        text.append(f" ({len(tokens) - end} tokens)", style="dim")
    text.append("\n")
    return text


def schedule_table(schedule: Any) -> Table:
    """Steps, tokens and learning rates."""
    table = terminal.plain_table("schedule", ["", ""])
    table.show_header = False
    per_epoch = "-, a stream has no end" if schedule.steps_per_epoch is None else f"{schedule.steps_per_epoch:,}"
    table.add_row("steps in all", f"{schedule.max_steps:,}")
    table.add_row("steps per epoch", per_epoch)
    table.add_row("sequences per step", f"{schedule.rows_per_step:,}")
    table.add_row("tokens per step, about", f"{schedule.tokens_per_step:,}")
    table.add_row("warm-up steps", f"{schedule.warmup_steps:,}")
    for step, rate in schedule.learning_rates.items():
        table.add_row(f"learning rate at step {step:,} ({schedule.scheduler})", f"{rate:.3g}")
    if not schedule.learning_rates:
        table.add_row("learning rate", f"as {schedule.scheduler} finds it")
    return table


def memory_table(memory: Any) -> Table:
    """The memory of one process at the peak of a step."""
    where = {"cuda": "this GPU", "cpu": "the CPU"}.get(memory.device, memory.device)
    table = terminal.plain_table(f"memory of a training step on {where}", ["", "MiB"])
    unknown = "not known"
    table.add_row("weights", mebibytes(memory.weights))
    states = unknown if memory.optimizer_states is None else mebibytes(memory.optimizer_states)
    table.add_row("optimizer states", states)
    table.add_row("gradients at the peak", mebibytes(memory.gradients))
    activations = unknown if memory.activations is None else mebibytes(memory.activations)
    table.add_row("activations, logits, loss", activations)
    table.add_row("peak", mebibytes(memory.total), style="bold")
    notes = [f"for {memory.lines} lines of {memory.length:,} tokens, from shorter ones that were run here"]
    if memory.zero_stage:
        notes.append(f"per process under ZeRO-{memory.zero_stage} with {memory.processes}, without DeepSpeed's buffers")
    table.caption, table.caption_justify = "\n".join(notes), "left"
    return table


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f}" if count < 100 * 2**20 else f"{count / 2**20:,.0f}"
