"""Do answers go on while experts are added to the model that writes them?

    python benchmarks/live_experts.py [--experts 64] [--places 64] [--streams 8] [--layers 32] [--keep] [--tiny]

A Llama of 8B shape with random weights and four random LoRAs (rank 16, all linears) behind an arrow router is served,
with so many places for experts more. A client of another process keeps so many streams busy while nothing else happens
("before"), while the experts are added one after the other over HTTP ("during"), and then again ("after", with all of
them). "paused_ms" is what one expert's pause takes, with the wait for the forward that runs. Bars: no request fails,
and the 99th percentile of the inter-token latency during is at most 1.20 of before. --tiny is a small Llama, for a CPU.
Prints JSON; --keep writes results/live_experts-<device>.json beside itself.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import torch
from peft import LoraConfig, get_peft_model

from molora import from_adapters
from molora.bench import load
from molora.bench.serving import listening, word_tokenizer
from molora.bench.subjects import LINEARS, LLAMA_8B, TINY, base
from molora.eval.results import SCHEMA, environment, write_json
from molora.serve.app import create_app
from molora.serve.launch import make_server

START, LIMIT, KEY = 4, 1.20, "key"


def write_loras(model: Any, folder: Path, count: int) -> Any:
    """Random LoRAs as PEFT saves them; returns the model without them."""
    options = LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM")
    lora = get_peft_model(model, options, autocast_adapter_dtype=False)
    for number in range(count):
        torch.manual_seed(number)
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        lora.save_pretrained(folder / f"expert{number}")
    return lora.unload()


class Streams:
    """Streams that ask until they are told to stop."""

    def __init__(self, url: str, count: int, tokens: int) -> None:
        command = [sys.executable, load.__file__, url, "--streams", str(count), "--until-closed", "--key", KEY]
        command += ["--prompt-tokens", str(tokens), "--max-tokens", str(tokens)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def stop(self) -> dict[str, Any]:
        out, _ = self.process.communicate()
        if self.process.returncode:
            raise RuntimeError("the client failed; its error is above")
        found: dict[str, Any] = json.loads(out)
        return found


def phase(url: str, engine: Any, options: Any, tokens: int, work: Callable[[], Any]) -> dict[str, Any]:
    """What clients measure while something else happens."""
    streams = Streams(url, options.streams, tokens)
    while engine.open < options.streams and streams.process.poll() is None:
        time.sleep(0.01)
    work()
    found = streams.stop()
    between = sorted(1e3 * seconds for seconds in found["between"])
    return {
        "answers": len(found["first"]),
        "tokens_per_second": found["tokens"] / found["seconds"],
        "inter_token_ms": {
            "median": median(between),
            "p99": quantiles(between, n=100, method="inclusive")[98],
            "longest": between[-1],
        },
        "failed": found["failed"],
    }


def timed_pauses(engine: Any) -> list[float]:
    """Seconds of each pause of an engine from now on, with the wait for the forward that runs."""
    paused, took = engine.paused, list[float]()

    @contextlib.contextmanager
    def timed(moves: bool) -> Iterator[None]:
        began = time.perf_counter()
        with paused(moves):
            yield
        took.append(time.perf_counter() - began)

    engine.paused = timed
    return took


def measure(options: Any) -> dict[str, Any]:
    tiny = dataclasses.replace(TINY, vocab=2048)
    shape = tiny if options.tiny else dataclasses.replace(LLAMA_8B, layers=options.layers)
    tokens = 16 if options.tiny else 64
    took: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_loras(base(shape).eval(), folder, START + options.experts)
        start = {f"expert{n}": folder / f"expert{n}" for n in range(START)}
        mixture = from_adapters(model, start, "arrow", placement="block").eval()
        room = {"max_model_len": 4 * tokens, "cache_tokens": 4 * tokens * options.streams}
        server = make_server(
            mixture,
            word_tokenizer(shape.vocab),
            "model",
            api_key=KEY,
            adapter_dirs=(folder,),
            expert_places=options.places,
            **room,
        )
        pauses = timed_pauses(server.engine)
        with listening(create_app(server, 1.0)) as url:
            client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=600)

            def add() -> None:
                for number in range(START, START + options.experts):
                    began = time.perf_counter()
                    body = {"lora_name": f"expert{number}", "lora_path": str(folder / f"expert{number}")}
                    client.post("v1/load_lora_adapter", json=body).raise_for_status()
                    took.append(time.perf_counter() - began)

            def wait() -> None:
                time.sleep(options.seconds)

            phase(url, server.engine, options, tokens, lambda: time.sleep(2.0))
            found = {
                "before": phase(url, server.engine, options, tokens, wait),
                "during": phase(url, server.engine, options, tokens, add),
                "after": phase(url, server.engine, options, tokens, wait),
            }
    return {
        "phases": found,
        "seconds_to_add_one": {"median": median(took), "longest": max(took)},
        "paused_ms": {"median": 1e3 * median(pauses), "longest": 1e3 * max(pauses)},
    }


def bars(phases: dict[str, Any]) -> list[dict[str, Any]]:
    failed = sum(len(phase["failed"]) for phase in phases.values())
    before, during = (phases[name]["inter_token_ms"]["p99"] for name in ("before", "during"))
    ratio = during / before
    return [
        {"name": "requests that failed", "value": failed, "limit": 0, "holds": failed == 0},
        {"name": "p99 during over before", "value": round(ratio, 3), "limit": LIMIT, "holds": ratio <= LIMIT},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--places", type=int, default=64, help="made at the start")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=15.0, help="of the phases before and after")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    began = time.perf_counter()
    found = measure(options)
    command = f"python benchmarks/live_experts.py --experts {options.experts} --places {options.places}"
    command += f" --streams {options.streams}"
    command += f" --layers {options.layers}" * (options.layers != 32) + f" --seconds {options.seconds:g}"
    command += " --tiny" * options.tiny + " --keep"
    result = {"schema": SCHEMA, "command": command, **environment(), **found, "bars": bars(found["phases"])}
    result["seconds"] = time.perf_counter() - began
    print(json.dumps(result, indent=1))
    if options.keep:
        device = "-".join(str(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu").lower().split())
        write_json(Path(__file__).parent / "results" / f"live_experts-{device}.json", result)


if __name__ == "__main__":
    main()
