"""Mixtures made and taken apart: convert, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from molora_cli.common import ListOptions, Overrides, app, check_new, examples, interruptible, named


@app.command(
    cls=ListOptions,
    epilog=examples(
        "molora convert meta-llama/Llama-3.2-1B out --preset dynmole num_experts=8 r=16",
        "molora convert ./base out --adapters sql=./sql-lora math=me/math-lora --router arrow",
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
    from molora.eval.disk import writing

    check_new(out, overwrite=overwrite)
    if adapters is None and (examples or general or allow_partial or router):
        raise ValueError("--router, --examples, --general and --allow-partial go with --adapters; name the adapters")
    from peft import get_peft_model
    from transformers import set_seed

    from molora.eval import terminal
    from molora.eval.models import load_base, load_tokenizer
    from molora.eval.strict import apply_overrides
    from molora.presets import PRESETS
    from molora.routers import ROUTERS
    from molora.train.recipe import mixture_config, mixture_of_adapters

    # "meteora" names a system; its router is meant.
    if router in PRESETS and router not in ROUTERS and preset is None:
        preset, router = router, None
    chosen: dict[str, Any] = {} if router is None else {"router": {"name": router}}
    keys = apply_overrides(({} if preset is None else {"preset": preset}) | chosen, overrides or [])
    paths = named(adapters, "--adapters")
    for name, path in paths.items():
        if not Path(path).exists() and _is_setting(name):
            raise ValueError(f"--adapters: {name}={path} is a setting, no adapter; put settings before --adapters")
    prompts = example_prompts(examples)
    config = None if paths else mixture_config(keys)
    terminal.quiet()
    with interruptible():
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


def example_prompts(examples: list[str] | None) -> dict[str, list[str]]:
    """What ``--examples NAME=FILE`` names: the lines of each file."""
    return {name: _lines(Path(path)) for name, path in named(examples, "--examples").items()}


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    if not path.is_file():
        raise FileNotFoundError(f"--examples: no file {str(path)!r}; give a text file with one prompt a line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--examples: {path} is not UTF-8 text: {error}") from error
    if not lines:
        raise ValueError(f"--examples: {path} has no prompts; write one a line")
    return lines


def _load_mixture(model: str, base: str | None) -> tuple[Any, Any]:
    """The mixture in a directory, and its tokenizer."""
    import molora
    from molora.eval import terminal
    from molora.eval.models import load_model

    with terminal.status("loading the model"):
        loaded, tokenizer = load_model(model, base=base)
    if not isinstance(getattr(loaded, "peft_config", {}).get("default"), molora.MoloraConfig):
        raise ValueError(f"{model} is no mixture, so it has no experts; give the directory of a mixture")
    return loaded, tokenizer


@app.command(
    cls=ListOptions,
    epilog=examples(
        "molora export runs/pool out --to loras",
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
    from molora.eval.disk import writing

    check_choice("--to", to, ("loras", "merged", "average"))
    if to != "average" and (weights or combination != "linear"):
        raise ValueError("--combination and --weights go with --to average; leave them out")
    check_new(out, overwrite=overwrite)
    numbers = {}
    for name, value in named(weights, "--weights").items():
        try:
            numbers[name] = float(value)
        except ValueError:
            raise ValueError(f"--weights: {name}={value!r} must be a number") from None
        check_number(f"--weights: {name}", numbers[name])
    import molora
    from molora.adapters.to_adapters import PLAIN, average_adapters, merge_into_base
    from molora.eval import terminal

    terminal.quiet()
    with interruptible(), terminal.warnings_as_lines():
        loaded, tokenizer = _load_mixture(model, base)
        with writing(f"the export in {out}", "make room and run this again with --overwrite"):
            if to == "loras":
                written = molora.to_adapters(loaded, out, overwrite=overwrite)
                said = f"{len(written)} adapters in {out}: {', '.join(written)}"
            elif to == "merged":
                merge_into_base(loaded).save_pretrained(str(out))  # type: ignore[operator]
                tokenizer.save_pretrained(str(out))
                said = f"the merged model in {out}"
            else:
                with tempfile.TemporaryDirectory() as directory:
                    paths = molora.to_adapters(loaded, directory)
                    paths.pop(PLAIN, None)
                    bare = loaded.unload()
                    how: dict[str, Any] = {"combination": combination, "density": density, "overwrite": overwrite}
                    average_adapters(bare, paths, out, weights=numbers or None, **how)
                said = f"one LoRA, the {combination} average, in {out}"
    terminal.out.print(said, highlight=False, soft_wrap=True)


@app.command(
    epilog=examples(
        "molora compress runs/pool runs/small --rank 64",
        "molora compress runs/pool runs/one-lora --rank 16 --method clusters",
    )
)
def compress(
    model: Annotated[str, typer.Argument(help="Adapter directory of a mixture.")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    rank: Annotated[int, typer.Option(min=1, help="Of the shared basis, or of the one LoRA.")],
    method: Annotated[
        str, typer.Option(help="basis: one basis for all experts of a linear; clusters: one LoRA of their ranks.")
    ] = "basis",
    base: Annotated[str | None, typer.Option(help="Base to use instead of the one that the adapter names.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a directory that is not empty.")] = False,
) -> None:
    """Make the experts of a mixture smaller, and say what that lost."""
    from molora.checks import check_choice
    from molora.eval.disk import writing

    check_choice("--method", method, ("basis", "clusters"))
    if out.exists() and out.resolve() == Path(model).resolve():
        raise ValueError("OUT is MODEL itself, whose experts would be lost; choose another directory")
    check_new(out, overwrite=overwrite)
    import molora
    from molora.eval import terminal

    terminal.quiet()
    with interruptible(), terminal.warnings_as_lines():
        loaded, tokenizer = _load_mixture(model, base)
        with terminal.status("compressing"), writing(f"the model in {out}", "make room and run this again"):
            if method == "basis":
                errors = molora.compress_experts(loaded, rank)
                loaded.save_pretrained(str(out))
                tokenizer.save_pretrained(str(out))
            else:
                errors = molora.merge_experts(loaded, rank, out, overwrite=overwrite)
    worst = max(errors, key=lambda name: errors[name])
    mean = sum(errors.values()) / len(errors)
    said = f"relative error of the products: {mean:.3f} on average over {len(errors)} linears, {errors[worst]:.3f} at"
    terminal.out.print(f"{said} {worst}; {out}", highlight=False, soft_wrap=True)
