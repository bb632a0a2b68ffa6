"""What the commands share: the application, types of arguments, and how a run is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings; nested keys with dots, values as in YAML."),
]


def examples(*lines: str) -> str:
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"[cyan]{line}[/cyan]" for line in lines)


@contextmanager
def interruptible(advice: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Ctrl-C ends in one line and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted{advice()}", err=True)
        raise typer.Exit(130) from None


class ListOptions(TyperCommand):
    """A command whose options that end in "..." take all words up to the next option: ``--adapters a=X b=Y``."""

    many = ("--adapters", "--examples", "--general", "--weights")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        expanded: list[str] = []
        option = None
        for word in args:
            if word.startswith("-"):
                option = word if word in self.many else None
                if option is not None:
                    continue
            expanded += [word] if option is None else [option, word]
        return super().parse_args(ctx, expanded)


def named(values: list[str] | None, option: str) -> dict[str, str]:
    """NAME=VALUE words as a dict."""
    found: dict[str, str] = {}
    for word in values or []:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option}: {word!r} must be NAME=VALUE")
        if name in found:
            raise ValueError(f"{option}: {name!r} is given twice; each needs a name of its own")
        found[name] = value
    return found


def check_new(out: Path, *, overwrite: bool) -> None:
    """Raises ValueError for a directory that is not empty, unless it may be written over, and for what is none."""
    from molora.eval.disk import check_directory

    check_directory(out, "OUT")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"{out} exists and is not empty; pass --overwrite or choose another directory")
