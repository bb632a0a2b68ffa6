"""Training: train, quickstart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from molora_cli.common import Overrides, app, examples, interruptible


@app.command(
    epilog=examples(
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
    deepspeed: Annotated[
        str | None,
        typer.Option(
            help="zero1, zero2, zero3, zero3-offload, or a DeepSpeed JSON; as training.deepspeed of a recipe."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check the recipe; show data, schedule, memory, a row of each task; train nothing."
        ),
    ] = False,
) -> None:
    """Train what a recipe describes; score its tasks before and after."""
    from molora.eval import terminal
    from molora.train.recipe import read_recipe, recipe_yaml, with_deepspeed

    if resume and dry_run:
        raise ValueError("--dry-run trains nothing, so there is nothing to resume; leave one of the two out")
    resolved = read_recipe(recipe, overrides)
    if deepspeed is not None:
        resolved = with_deepspeed(resolved, deepspeed)
    from molora.eval.disk import check_directory
    from molora.train.output import find_checkpoint, last_checkpoint, stored_results
    from molora.train.prepare import prepare
    from molora.train.run import train

    def show(model: Any, reports: Any, rows: Any) -> None:
        terminal.err.print(terminal.yaml_text(recipe_yaml(resolved)))
        terminal.out.print(terminal.data_table(reports, getattr(rows, "report", None)))
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
    with interruptible(advice):
        if dry_run:
            from molora.eval.dry_run_output import show_dry_run
            from molora.train.dry_run import dry_run as describe

            try:
                find_checkpoint(resolved, resume=False)
            except ValueError as error:
                terminal.warn(f"{error}")
            prepared = prepare(resolved)
            show(prepared[0], prepared[3], prepared[2])
            with terminal.status("measuring small steps"):
                found = describe(resolved, prepared)
            return show_dry_run(found)
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


@app.command(epilog=examples("molora quickstart", "molora quickstart --out runs/again --seed 1"))
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
    with interruptible(), terminal.progress() as progress:
        results = run(
            out,
            seed=seed,
            callbacks=[terminal.TrainingBar(progress)],
            score_progress=terminal.score_progress(progress),
            say=lambda text: terminal.err.print(text, highlight=False),
        )
    show_quickstart(results, out)
