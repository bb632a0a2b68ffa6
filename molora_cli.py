"""The ``molora`` command. Heavy imports live inside the commands, so that ``molora --help`` is instant."""

from __future__ import annotations

import sys
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


def _examples(*lines: str) -> str:
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"[cyan]{line}[/cyan]" for line in lines)


@contextmanager
def _interruptible(advice: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Ctrl-C ends in one line and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted{advice()}", err=True)
        raise typer.Exit(130) from None


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Turn a dense Hugging Face causal LM into a mixture of LoRA experts, tune it, evaluate it, use it."""


class _ListOptions(TyperCommand):
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


def _named(values: list[str] | None, option: str) -> dict[str, str]:
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


@app.command(
    cls=_ListOptions,
    epilog=_examples(
        "molora convert meta-llama/Llama-3.2-1B out --preset dynmole num_experts=8 r=16",
        "molora convert ./base out placement=ffn router.top_k=1 --overwrite",
        "molora convert ./base out --adapters sql=./sql-lora math=me/math-lora --router arrow",
        "molora convert ./base out --adapters sql=./sql math=./math --examples sql=sql.txt math=math.txt "
        "--router retrieval",
    ),
)
def convert(
    base: Annotated[str, typer.Argument(help="Base model: hub id or directory.")],
    out: Annotated[Path, typer.Argument(help="Directory for the adapter.")],
    overrides: Overrides = None,
    preset: Annotated[
        str | None, typer.Option(help="A published system (molora presets); settings override it.")
    ] = None,
    adapters: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH ...", help="PEFT LoRA adapters that become the experts.")
    ] = None,
    router: Annotated[str | None, typer.Option(help="The router among them; arrow if left out.")] = None,
    examples: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE ...", help="Example prompts of each expert, one a line (centroid, retrieval)."),
    ] = None,
    general: Annotated[
        list[str] | None, typer.Option(metavar="PATH ...", help="Adapters whose mean is subtracted from the experts.")
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Accept adapters that lack weights for modules they name.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a directory that is not empty.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights.")] = 0,
) -> None:
    """Make a mixture on a base model, fresh or of LoRA adapters, and save it as a PEFT adapter directory."""
    from molora.eval.disk import check_directory, writing

    check_directory(out, "OUT")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"{out} exists and is not empty; pass --overwrite or choose another directory")
    if adapters is None and (examples or general or allow_partial or router):
        raise ValueError("--router, --examples, --general and --allow-partial go with --adapters; name the adapters")
    from peft import get_peft_model
    from transformers import set_seed

    from molora.eval import terminal
    from molora.eval.models import load_base, load_tokenizer
    from molora.eval.strict import apply_overrides
    from molora.train.recipe import mixture_config, mixture_of_adapters

    chosen: dict[str, Any] = {} if router is None else {"router": {"name": router}}
    keys = apply_overrides(({} if preset is None else {"preset": preset}) | chosen, overrides or [])
    paths = _named(adapters, "--adapters")
    for name, path in paths.items():
        if not Path(path).exists() and _is_setting(name):
            raise ValueError(f"--adapters: {name}={path} is a setting, no adapter; put settings before --adapters")
    prompts = {name: _lines(Path(path)) for name, path in _named(examples, "--examples").items()}
    config = None if paths else mixture_config(keys)
    terminal.quiet()
    with _interruptible():
        with terminal.status("loading the base"):
            model, tokenizer = load_base(base), load_tokenizer(base)
        set_seed(seed)
        if config is not None:
            model = get_peft_model(model, config)
        else:
            with terminal.status(f"reading {len(paths)} adapters"), terminal.warnings_as_lines():
                model = mixture_of_adapters(model, {**keys, "adapters": paths}, general or (), allow_partial)
        config = model.peft_config["default"]
        if prompts:
            with terminal.status("reading the examples"):
                model.set_centroids(prompts, tokenizer)
        with writing(f"the adapter in {out}", "make room and run this again with --overwrite"):
            model.save_pretrained(str(out))
            tokenizer.save_pretrained(str(out))
    terminal.out.print(terminal.model_table(model))
    if config.router.has_centroids and not prompts:
        terminal.warn(
            f"a {config.router.name} router needs example prompts before it routes: give --examples, train it by a "
            "recipe, whose tasks give them, or call model.set_centroids(...) in Python"
        )
    elif paths and config.router.name not in ("arrow", "centroid", "retrieval"):
        terminal.warn(
            f"the gates of router {config.router.name} are not trained yet; train them by a recipe with "
            "mixture.adapters (docs/adapters.md)"
        )


def _is_setting(key: str) -> bool:
    from dataclasses import fields

    from molora import MoloraConfig

    return key.partition(".")[0] in {field.name for field in fields(MoloraConfig)}


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    if not path.is_file():
        raise FileNotFoundError(f"--examples: no file {str(path)!r}; give a text file with one prompt a line")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--examples: {path} has no prompts; write one a line")
    return lines


@app.command(
    cls=_ListOptions,
    epilog=_examples(
        "molora export runs/pool out --to loras",
        "molora export runs/one out --to merged",
        "molora export runs/pool out --to average --combination ties --weights sql=1 math=0.5",
    ),
)
def export(
    model: Annotated[str, typer.Argument(help="Adapter directory of a mixture.")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    to: Annotated[
        str,
        typer.Option(help="loras: a PEFT LoRA for each expert; merged: the base with them in it; average: one LoRA."),
    ],
    combination: Annotated[
        str, typer.Option(help="How to average: linear, cat, svd, ties, dare_linear, ... (PEFT's combination_type).")
    ] = "linear",
    weights: Annotated[
        list[str] | None, typer.Option(metavar="NAME=NUMBER ...", help="Of each expert in the average.")
    ] = None,
    density: Annotated[float, typer.Option(help="Share of values that ties and dare keep.")] = 0.2,
    base: Annotated[str | None, typer.Option(help="Base to use instead of the one that the adapter names.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a directory that is not empty.")] = False,
) -> None:
    """Write the experts of a mixture as LoRA adapters, or as one model where that is exact."""
    import tempfile

    from molora.checks import check_choice, check_number
    from molora.eval.disk import check_directory, writing

    check_choice("--to", to, ("loras", "merged", "average"))
    if to != "average" and (weights or combination != "linear"):
        raise ValueError("--combination and --weights go with --to average; leave them out")
    check_directory(out, "OUT")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"{out} exists and is not empty; pass --overwrite or choose another directory")
    numbers = {}
    for name, value in _named(weights, "--weights").items():
        try:
            numbers[name] = float(value)
        except ValueError:
            raise ValueError(f"--weights: {name}={value!r} must be a number") from None
        check_number(f"--weights: {name}", numbers[name])
    import molora
    from molora.eval import terminal
    from molora.eval.models import load_model
    from molora.to_adapters import PLAIN, average_adapters, merge_into_base

    terminal.quiet()
    with _interruptible(), terminal.warnings_as_lines():
        with terminal.status("loading the model"):
            loaded, tokenizer = load_model(model, base=base)
        config = getattr(loaded, "peft_config", {}).get("default")
        if not isinstance(config, molora.MoloraConfig):
            raise ValueError(f"{model} is no mixture, so it has no experts; give the directory of a mixture")
        with writing(f"the export in {out}", "make room and run this again with --overwrite"):
            if to == "loras":
                written = molora.to_adapters(loaded, out, overwrite=overwrite)
                terminal.out.print(f"{len(written)} adapters in {out}: {', '.join(written)}", highlight=False)
            elif to == "merged":
                merge_into_base(loaded).save_pretrained(str(out))  # type: ignore[operator]
                tokenizer.save_pretrained(str(out))
                terminal.out.print(f"the merged model in {out}", highlight=False)
            else:
                with tempfile.TemporaryDirectory() as directory:
                    paths = molora.to_adapters(loaded, directory)
                    paths.pop(PLAIN, None)
                    bare = loaded.unload()
                    average_adapters(
                        bare, paths, out, weights=numbers or None, combination=combination, density=density
                    )
                terminal.out.print(f"one LoRA, the {combination} average, in {out}", highlight=False)


@app.command(
    epilog=_examples(
        "molora train recipes/two_tasks.yaml",
        "molora train recipes/two_tasks.yaml training.max_steps=50 training.output_dir=runs/short",
    )
)
def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in training.output_dir from its last whole checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe, count the data, show the model; train nothing.")
    ] = False,
) -> None:
    """Train what a recipe describes; score its tasks before and after."""
    from molora.eval import terminal
    from molora.train.recipe import read_recipe, recipe_yaml

    if resume and dry_run:
        raise ValueError("--dry-run trains nothing, so there is nothing to resume; leave one of the two out")
    resolved = read_recipe(recipe, overrides)
    from molora.eval.disk import check_directory
    from molora.train.output import last_checkpoint, stored_results
    from molora.train.run import prepare, train

    def show(model: Any, reports: Any) -> None:
        terminal.err.print(terminal.yaml_text(recipe_yaml(resolved)))
        terminal.out.print(terminal.data_table(reports))
        terminal.out.print(terminal.model_table(model))

    def advice() -> str:
        if dry_run or not (resolved.output_dir / "recipe.yaml").is_file():
            return ""
        last = last_checkpoint(resolved.output_dir)
        return "; continue with --resume" + (
            f", from {last}" if last else ": no checkpoint yet, so from the first step"
        )

    terminal.quiet()
    check_directory(resolved.output_dir, "training.output_dir")
    was_complete = resume and stored_results(resolved) is not None
    with _interruptible(advice):
        if dry_run:
            model, _, _, reports = prepare(resolved)
            return show(model, reports)
        with terminal.progress() as progress:
            results = train(
                resolved,
                resume=resume,
                show_reports=show,
                callbacks=[terminal.TrainingBar(progress)],
                score_progress=terminal.score_progress(progress),
                warn=terminal.warn,
            )
    if was_complete:
        typer.echo(f"the run in {resolved.output_dir} is complete; nothing is left to do", err=True)
    if results["tasks"]:
        terminal.out.print(terminal.score_table(results["tasks"], (results["before"] or {}).get("tasks")))
    terminal.out.print(f"adapter and results.json in {resolved.output_dir}", highlight=False, soft_wrap=True)
    return None


@app.command(
    epilog=_examples(
        "molora eval runs/two_tasks",
        "molora eval ./base --suite recipes/two_tasks.yaml --out base.json",
    )
)
def eval(  # noqa: A001  (the command's name)
    model: Annotated[str, typer.Argument(help="Adapter directory, or a base model (hub id or directory).")],
    suite: Annotated[
        list[Path] | None,
        typer.Option(help="Suite or recipe file; may be given again. Default: the recipe that trained MODEL."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Results as JSON; predictions go beside it as .jsonl.")] = None,
    base: Annotated[str | None, typer.Option(help="Base to use instead of the one that the adapter names.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows per forward, instead of the suite's.")] = None,
) -> None:
    """Score a model: greedy generations by exact match, last number or ROUGE-L; choices by likelihood."""
    from dataclasses import replace

    from molora.eval.suite import merge_suites, read_suite

    files = suite or [Path(model) / "recipe.yaml"]
    if not suite and not files[0].is_file():
        if not Path(model).is_dir():
            raise ValueError(f"{model!r} is no directory with a recipe.yaml that names its tasks; pass --suite FILE")
        raise ValueError(f"{model!r} holds no recipe.yaml that names its tasks; pass --suite FILE")
    tasks = merge_suites([read_suite(file) for file in files])
    if batch_size is not None:
        tasks = replace(tasks, batch_size=batch_size)
    import molora  # noqa: F401  (registers the PEFT method)
    from molora.eval import terminal
    from molora.eval.disk import check_directory, writing
    from molora.eval.models import load_model
    from molora.eval.results import write_json
    from molora.eval.suite import run_suite

    if out is not None:
        if out.is_dir():
            raise ValueError(f"--out {out} is a directory; give a file")
        check_directory(out.parent, "--out")
    terminal.quiet()
    with _interruptible():
        with terminal.status("loading the model"):
            loaded, tokenizer = load_model(model, base=base)
        with terminal.progress() as progress, writing(f"{out}", "make room and run this again"):
            results = run_suite(
                loaded,
                tokenizer,
                tasks,
                name=model,
                predictions_path=out.with_suffix(".jsonl") if out else None,
                progress=terminal.score_progress(progress),
            )
            if out:
                write_json(out, results)
    terminal.out.print(terminal.score_table(results["tasks"]))


@app.command(
    epilog=_examples(
        'molora generate runs/two_tasks "jump twice and look left:"',
        'molora generate ./base "Once upon a time" --max-new-tokens 50',
    )
)
def generate(
    model: Annotated[str, typer.Argument(help="Adapter directory, or a base model (hub id or directory).")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed for a temperature above 0.")] = 0,
    base: Annotated[str | None, typer.Option(help="Base to use instead of the one that the adapter names.")] = None,
) -> None:
    """Continue a prompt; the text streams to standard output."""
    import molora  # noqa: F401  (registers the PEFT method)
    from molora.eval import terminal
    from molora.eval.generate import stream
    from molora.eval.models import load_model

    terminal.quiet()
    with _interruptible():
        with terminal.status("loading the model"):
            loaded, tokenizer = load_model(model, base=base)
        stream(
            loaded,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            note=lambda text: typer.echo(text, err=True),
        )


@app.command(epilog=_examples("molora quickstart", "molora quickstart --out runs/again --seed 1"))
def quickstart(
    out: Annotated[Path, typer.Option(help="Directory for the two adapters and results.json.")] = Path(
        "runs/quickstart"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the data, the weights and the order.")] = 0,
) -> None:
    """Teach the embedded base eight skills, by one LoRA and by a mixture of no more parameters; about three minutes."""
    from molora.eval import terminal
    from molora.eval.disk import check_directory

    check_directory(out, "--out")
    from molora.eval.quickstart_output import show_quickstart
    from molora.train.quickstart import quickstart as run

    terminal.quiet()
    with _interruptible(), terminal.progress() as progress:
        results = run(
            out,
            seed=seed,
            callbacks=[terminal.TrainingBar(progress)],
            score_progress=terminal.score_progress(progress),
            say=lambda text: terminal.err.print(text, highlight=False),
        )
    show_quickstart(results, out)


@app.command(epilog=_examples("molora presets", "molora presets dynmole"))
def presets(
    name: Annotated[str | None, typer.Argument(help="One preset, with its settings and where they come from.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/presets.md.")] = False,
) -> None:
    """List the published systems that can be named instead of writing their settings."""
    if markdown:
        from molora.eval import preset_page

        return typer.echo(preset_page.markdown(), nl=False)
    from molora.eval import terminal
    from molora.presets import PRESETS

    if name is None:
        terminal.out.print(terminal.preset_table(PRESETS))
        typer.echo("molora presets NAME shows one; recipes take it as mixture.preset, convert as --preset")
    else:
        terminal.show_preset(name)
    return None


@app.command(epilog=_examples("molora bench", "molora bench linear_all ffn --out runs/bench"))
def bench(
    tables: Annotated[list[str] | None, typer.Argument(metavar="[TABLE]...", help="Default: all of them.")] = None,
    out: Annotated[Path, typer.Option(help="Directory for TABLE-GPU.json.")] = Path("runs/bench"),
    repeats: Annotated[int, typer.Option(min=1, help="How often each subject is timed.")] = 20,
    tiny: Annotated[bool, typer.Option("--tiny", help="A toy model, to see it work without a GPU.")] = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Say which kernel is chosen here, and why; time nothing."),
    ] = False,
) -> None:
    """Measure what a mixture costs beside its peers on this GPU; what differs from the reference is not timed."""
    from molora.eval import terminal
    from molora.eval.disk import check_directory

    check_directory(out, "--out")
    from molora.bench.run import TABLES, check_tables, run_table

    terminal.quiet()
    if explain:
        from molora.bench.backends import explain as choices
        from molora.bench.subjects import LLAMA_8B

        return terminal.out.print(terminal.choice_table(choices(LLAMA_8B)))
    check_tables(tables or [], tiny)
    with _interruptible():
        for name in tables or TABLES:
            with terminal.status(f"measuring {name}"):
                path, found = run_table(name, out, tiny=tiny, repeats=repeats)
            terminal.out.print(terminal.bench_table(name, found))
            terminal.out.print(f"{path}", highlight=False, soft_wrap=True)
    return None


def main() -> None:
    """Runs the command line; what the user can mend ends in one red sentence on standard error and exit code 2."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        if "--debug" in sys.argv[1:2] or not _is_for_user(error):
            raise
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


if __name__ == "__main__":
    main()
