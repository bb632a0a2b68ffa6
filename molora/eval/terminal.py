"""What the command line prints: tables on standard output, progress on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.status import Status
from rich.syntax import Syntax
from rich.table import Table
from transformers import TrainerCallback

from molora.equal_lora import active_parameters
from molora.eval.ranks import is_first
from molora.eval.results import parameters

out = Console()
err = Console(stderr=True)


def quiet() -> None:
    """One progress bar at a time: ours; and no word of other libraries about what the user cannot mend."""
    import logging
    import os
    import warnings

    import datasets
    import torch
    import transformers

    out.quiet = err.quiet = not is_first()
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where it is installed, logs that it guesses so

    # PEFT asks transformers for a name that it has renamed.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    # DeepSpeed calls what torch has renamed, and accelerate remarks that it follows DeepSpeed's accumulation.
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    # A file that cannot be read is reported once, by our own sentence.
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    # At every call of an 8-bit linear, that it computes in fp16 inside.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def warn(text: str) -> None:
    """A yellow line on standard error."""
    err.print(f"warning: {text}", style="yellow", highlight=False, soft_wrap=True)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Warnings of molora's own code as yellow lines; those of other libraries are left out."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for entry in caught:
        if "molora" in Path(entry.filename).parts:
            warn(str(entry.message))


def status(text: str) -> Status:
    """A spinner on standard error."""
    return err.status(text)


def progress() -> Progress:
    """A bar per task on standard error, gone when done."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, console=err, transient=True)


def score_progress(bars: Progress) -> Callable[[str, int, int], None]:
    """A progress function for :func:`molora.eval.suite.run_suite`: one bar per task."""
    known: dict[str, Any] = {}

    def advance(task: str, rows: int, total: int) -> None:
        # A task that is scored again (before and after training) gets a new bar.
        if task not in known or bars.tasks[known[task]].finished:
            known[task] = bars.add_task(f"scoring {task}", total=total)
        bars.update(known[task], advance=rows)

    return advance


class TrainingBar(TrainerCallback):
    """Steps and the last logged loss."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = self.bars.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bars.update(self.bar, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            loss = f"loss {float(logs['loss']):.4f}"
            self.bars.update(self.bar, description=f"training, {loss}")
            # A bar shows nothing in a file; lines do.
            if not err.is_terminal:
                err.print(f"step {state.global_step}/{state.max_steps}: {loss}", highlight=False)


def yaml_text(text: str) -> Syntax:
    """YAML in colour."""
    return Syntax(text, "yaml", background_color="default", word_wrap=True)


def plain_table(title: str, names: list[str]) -> Table:
    """An empty table; the first column holds names, the others figures."""
    table = Table(title=title, title_justify="left")
    table.add_column(names[0], overflow="fold")
    for name in names[1:]:
        table.add_column(name, justify="right", overflow="fold")
    return table


def model_table(model: Any) -> Table:
    """The adapter and its size."""
    config, counts = model.peft_config["default"], parameters(model)
    table = plain_table("model", ["", ""])
    table.show_header = False
    table.add_row("base", str(config.base_model_name_or_path))
    for key in ("placement", "num_experts", "r", "lora_alpha"):
        if hasattr(config, key):
            table.add_row(key, str(getattr(config, key)))
    if hasattr(config, "router"):
        table.add_row("router", config.router.name)
    table.add_row("sites", str(num_sites(model)))
    table.add_row("trainable parameters", f"{counts['trainable']:,}")
    if hasattr(config, "router"):
        active = active_parameters(model)
        table.add_row("active for a token", "varies" if active is None else f"{active:,}")
    table.add_row("base parameters", f"{counts['base']:,}")
    return table


def num_sites(model: Any) -> int:
    """Modules that hold adapter weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return sum(isinstance(module, BaseTunerLayer) for module in model.modules())


def preset_table(presets: dict[str, Any]) -> Table:
    """The published systems, one line each."""
    table = Table(title="presets", title_justify="left")
    for column in ("preset", "arXiv", "router", "placement", "experts x r"):
        table.add_column(column, no_wrap=True)
    for name, preset in presets.items():
        size = f"{preset.options['num_experts']} x {preset.options['r']}"
        table.add_row(name, preset.arxiv, preset.router, preset.placement, size)
    return table


def show_preset(name: str) -> None:
    """One preset: its settings in full, and where they come from."""
    import yaml

    from molora import MoloraConfig
    from molora.presets import PRESETS

    preset = MoloraConfig.from_preset(name), PRESETS[name]
    out.print(f"[bold]{name}[/bold] - {preset[1].title}", highlight=False)
    out.print(f"source: {preset[1].source}", highlight=False)
    keys = {k: v for k, v in preset[0].to_dict().items() if k in preset[1].options or k in _AXES}
    out.print(yaml_text(yaml.safe_dump(keys, sort_keys=False, width=120)))
    for key, note in preset[1].notes.items():
        out.print(f"[cyan]{key}[/cyan] - {note}", highlight=False)


_AXES = (
    "num_experts",
    "r",
    "lora_alpha",
    "lora_dropout",
    "share_A",
    "placement",
    "target_modules",
    "plain_lora",
    "router",
)


def data_table(reports: list[Any], packing: Any = None) -> Table:
    """What became of every task's rows (:class:`molora.train.mixing.TaskReport`), and of all rows where they are packed
    (:class:`molora.train.packing.PackingReport`)."""
    names = ["task", "rows", "used", "too long", "no label", "unknown", "tokens", "labels", "share"]
    table = plain_table("training data", names)
    for r in reports:
        counts = (r.rows, r.used, r.too_long, r.no_label, r.unknown_tokens)
        cells = [*("-" if count is None else str(count) for count in counts), _short(r.tokens), _short(r.label_tokens)]
        table.add_row(r.name, *cells, f"{r.probability:.1%}")
    notes = ["-: streamed, so not counted before training"] if any(r.used is None for r in reports) else []
    if packing is not None and packing.sequences is not None:
        room = f"{packing.sequences} sequences of at most {packing.max_length} tokens"
        notes.append(f"packed into {room}, {packing.fill:.1%} filled")
    elif packing is not None:
        notes.append(f"packed into sequences of at most {packing.max_length} tokens")
    table.caption, table.caption_justify = "\n".join(notes) or None, "left"
    return table


def _short(count: int | None) -> str:
    """``1234567`` as ``1.23 M``."""
    if count is None:
        return "-"
    if count < 1000:
        return str(count)
    return f"{count / 1e3:.3g} k" if count < 1e6 else f"{count / 1e6:.3g} M" if count < 1e9 else f"{count / 1e9:.3g} B"


def score_table(tasks: dict[str, Any], before: dict[str, Any] | None = None) -> Table:
    """Scores in percent with their 95 % intervals; ``before``: those before training, side by side."""
    names = ["task", "metric", "n", *(["before"] if before else []), "score", "95 %", "majority"]
    table = plain_table("scores", names)
    notes = []
    for name, entry in tasks.items():
        low, high = entry["interval"]
        was = [f"{before[name]['value']:.1%}"] if before else []
        scores = [f"{entry['value']:.1%}", f"{100 * low:.1f}-{100 * high:.1f}", f"{entry['majority']:.1%}"]
        table.add_row(name, entry["metric"], str(entry["n"]), *was, *scores)
        counts = {"rows skipped, too long": "skipped_too_long", "unknown tokens": "unknown_tokens", "ties": "ties"}
        notes += [f"{name}: {entry[key]} {what}" for what, key in counts.items() if entry.get(key)]
    table.caption = "\n".join(notes) or None
    table.caption_justify = "left"
    return table


def bench_table(name: str, found: dict[str, Any]) -> Table:
    """What one table of `molora bench` found, and which bars hold."""
    served = "tokens_per_second" in found["rows"][0]
    last = ["p99 ms", "first token ms", "tokens/s"] if served else ["peak MiB", "error"]
    table = plain_table(f"{name}, {found['gpu']}", ["", "ms a token" if served else "ms", "20-80 %", *last])
    for row in found["rows"]:
        if served:
            values = [f"{row[key]:.3g}" for key in ("p99_ms", "first_token_ms", "tokens_per_second")]
        else:
            values = [f"{row['peak_bytes'] / 2**20:,.0f}", "" if row["error"] is None else f"{row['error']:.1e}"]
        table.add_row(row["name"], f"{row['median_ms']:.3g}", f"{row['p20_ms']:.3g}-{row['p80_ms']:.3g}", *values)
    held = ("holds" if bar["holds"] else "does not hold" for bar in found["bars"])
    bars = (f"{bar['name']}: {bar['value']:.2f} of at most {bar['limit']}" for bar in found["bars"])
    table.caption = "\n".join(f"{bar}, {state}" for bar, state in zip(bars, held, strict=True))
    table.caption_justify = "left"
    return table


def choice_table(choices: list[dict[str, Any]]) -> Table:
    """Which kernel `molora.kernels.selection` chooses for which mixture, and why."""
    table = plain_table("8,192 tokens through a linear of width 4,096", ["experts", "r", "top-k", "kernel", "why"])
    for row in choices:
        table.add_row(str(row["num_experts"]), str(row["r"]), str(row["top_k"]), row["kernel"], row["reason"])
    return table
