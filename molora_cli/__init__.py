"""The ``molora`` command. Heavy imports live inside the commands, so that ``molora --help`` is instant."""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated

import typer

from molora_cli import adapters, evaluation, serving, training  # noqa: F401  (their commands)
from molora_cli.common import app

GRACE_S = 5.0
"""How long other processes than the first wait before they tell an error."""


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Given by the deepspeed launcher.")] = 0,
) -> None:
    """Turn a dense Hugging Face causal LM into a mixture of LoRA experts, tune it, evaluate it, use it."""


def main() -> None:
    """Runs the command line; what the user can mend ends in one red sentence on standard error and exit code 2."""
    try:
        app()
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        if "--debug" in sys.argv[1:2] or not _is_for_user(error):
            raise
        if int(os.environ.get("RANK", "0")):
            # Of what every process finds the first one speaks, and its launcher ends the others while they wait here.
            time.sleep(GRACE_S)
        from rich.console import Console

        text = " ".join(str(error).split()) or type(error).__name__
        Console(stderr=True).print(f"error: {text}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _is_for_user(error: Exception) -> bool:
    """Whether the message is meant for the user: a file, or raised by code that checks what the user gave."""
    if isinstance(error, OSError):
        return True
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None:
        frames = frames.tb_next
    module = frames.tb_frame.f_globals.get("__name__", "") if frames is not None else ""
    return module.partition(".")[0] in {
        "molora",
        "molora_cli",
        "__main__",
        "peft",
        "transformers",
        "datasets",
        "huggingface_hub",
    }
