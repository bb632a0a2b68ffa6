"""One model behind an endpoint: serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from molora_cli.common import ListOptions, app, examples, interruptible, named


@app.command(
    cls=ListOptions,
    epilog=examples(
        "molora serve runs/instruct",
        "molora serve ./base --adapters sql=./sql-lora math=./math-lora --router arrow --port 8000",
    ),
)
def serve(
    model: Annotated[str, typer.Argument(help="Adapter directory, or base model: hub id or directory.")],
    adapters: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH ...", help="PEFT LoRA adapters that become the experts.")
    ] = None,
    router: Annotated[str | None, typer.Option(help="The router among them; arrow if left out.")] = None,
    examples: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE ...", help="Example prompts of each expert, one a line (centroid, retrieval)."),
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Accept adapters that lack weights for modules they name.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="For an adapter: the base to use instead of the one it names.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="By which requests name the mixture.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; only this machine if left out.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="MOLORA_API_KEY", help="What requests must bear; needed to change experts.")
    ] = None,
    adapter_dir: Annotated[
        list[Path] | None, typer.Option(help="A directory below which adapters may be loaded from; may be repeated.")
    ] = None,
    expert_places: Annotated[
        int, typer.Option(min=0, help="With --adapter-dir: experts that may be loaded while requests hardly wait.")
    ] = 8,
    eager: Annotated[bool, typer.Option("--eager", help="No CUDA graphs on a GPU: several times slower.")] = False,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer; the model's context if left out.")
    ] = None,
    cache_tokens: Annotated[
        int | None, typer.Option(min=32, help="Tokens of all running requests; by the free memory if left out.")
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Requests in one forward.")] = 64,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get 429.")] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that an answer may take.")] = 600.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that running requests get on shutdown.")] = 30.0,
) -> None:
    """Serve a model through OpenAI's API: one endpoint that picks the experts for each token."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"molora serve needs {error.name}; pip install 'molora[serve]'") from error
    if adapters is None and (router or examples or allow_partial):
        raise ValueError("--router, --examples and --allow-partial go with --adapters; name the adapters")
    if adapters is not None and base is not None:
        raise ValueError("--base goes with an adapter directory as MODEL; with --adapters, MODEL is the base")
    from molora.eval import terminal
    from molora.eval.models import adapter_base, load_base, load_model, load_tokenizer
    from molora.routers import router_config
    from molora.routers.fixed_vectors import FixedVectorRouter
    from molora.serve.launch import listener, make_server, run
    from molora.train.recipe import mixture_of_adapters
    from molora_cli.adapters import example_prompts

    paths, prompts = named(adapters, "--adapters"), example_prompts(examples)
    if router:
        config = router_config(router)
        if config.has_centroids and not prompts:
            raise ValueError(
                f"router {router!r} knows experts by example prompts; give --examples NAME=FILE for each of them"
            )
        if not isinstance(config.build(8, 2, 2), FixedVectorRouter):
            raise ValueError(
                f"router {router!r} must be trained for its experts first: molora train with a recipe whose mixture "
                "has adapters and this router, then molora serve its output; arrow, centroid and retrieval need no "
                "training"
            )
    terminal.quiet()
    bound = listener(host, port)
    with interruptible():
        with terminal.status("loading the model"), terminal.warnings_as_lines():
            if paths:
                keys = {"adapters": paths} | ({"router": {"name": router}} if router else {})
                loaded, tokenizer = load_base(model), load_tokenizer(model)
                loaded = mixture_of_adapters(loaded, keys, (), allow_partial)
                if prompts:
                    loaded.set_centroids(prompts, tokenizer)
            else:
                loaded, tokenizer = load_model(model, base=base)
            server = make_server(
                loaded,
                tokenizer,
                served_model_name or Path(model).name,
                base_name=Path(adapter_base(model) or base or model).name if not paths else f"{Path(model).name}-base",
                api_key=api_key,
                adapter_dirs=tuple(adapter_dir or ()),
                expert_places=expert_places,
                cuda_graph=False if eager else None,
                max_model_len=max_model_len,
                cache_tokens=cache_tokens,
                max_running=max_running,
                max_waiting=max_waiting,
                timeout_s=timeout,
            )
        bound.listen()  # who reads the line may ask at once
        terminal.out.print(
            f"http://{host}:{port}/v1 serves {', '.join(server.model_names)}", highlight=False, soft_wrap=True
        )
        run(server, bound, drain)
