"""Trained models and what the package knows: eval, generate, presets, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from molora_cli.common import app, examples, interruptible

Quantization = Annotated[
    str | None,
    typer.Option(help="Of the base: nf4, nf4_double, int8 or none. Default: as in the recipe that trained MODEL."),
]


@app.command(
    epilog=examples(
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
    quantization: Quantization = None,
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
    from molora.eval.memory import enough_memory
    from molora.eval.models import load_model, trained_quantization
    from molora.eval.results import write_json
    from molora.eval.suite import run_suite

    if out is not None:
        if out.is_dir():
            raise ValueError(f"--out {out} is a directory; give a file")
        check_directory(out.parent, "--out")
    terminal.quiet()
    with interruptible():
        with terminal.status("loading the model"):
            quantization = quantization or (None if base else trained_quantization(model))
            loaded, tokenizer = load_model(model, base=base, quantization=quantization)
        with (
            terminal.progress() as progress,
            enough_memory("scoring", lambda: f"lower --batch-size ({tasks.batch_size})"),
            writing(f"{out}", "make room and run this again"),
        ):
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
    epilog=examples(
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
    quantization: Quantization = None,
) -> None:
    """Continue a prompt; the text streams to standard output."""
    import molora  # noqa: F401  (registers the PEFT method)
    from molora.eval import terminal
    from molora.eval.generate import stream
    from molora.eval.models import load_model, trained_quantization

    terminal.quiet()
    with interruptible():
        with terminal.status("loading the model"):
            quantization = quantization or (None if base else trained_quantization(model))
            loaded, tokenizer = load_model(model, base=base, quantization=quantization)
        stream(
            loaded,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            note=lambda text: typer.echo(text, err=True),
        )


@app.command(epilog=examples("molora presets", "molora presets dynmole"))
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


@app.command(epilog=examples("molora bench", "molora bench linear_all ffn --out runs/bench"))
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
    if explain and tables:
        raise ValueError(f"--explain is of the kernels, not of table {tables[0]!r}; leave the table out")
    if explain:
        from molora.bench.backends import explain as choices
        from molora.bench.subjects import LLAMA_8B

        return terminal.out.print(terminal.choice_table(choices(LLAMA_8B)))
    check_tables(tables or [], tiny)
    with interruptible():
        for name in tables or TABLES:
            with terminal.status(f"measuring {name}"):
                path, found = run_table(name, out, tiny=tiny, repeats=repeats)
            terminal.out.print(terminal.bench_table(name, found))
            terminal.out.print(f"{path}", highlight=False, soft_wrap=True)
    return None
