"""Does a server stay right, small and up under many clients of whom a fifth misbehaves?

    python benchmarks/soak.py [--seconds 60] [--clients 64] [--keep]

molora-tiny with four random LoRAs behind an arrow router answers clients of another process: prompts and answers of
random lengths, streamed and whole, greedy and sampled, with and without routings; more than a tenth hangs up in
mid-stream and more than a tenth is garbage. There are fewer places than clients: who gets 429 asks the same again, so
that these shares hold among the requests that were taken. The caches of all that run do not fit,
so that requests are taken out and come back. Every greedy answer that is completed must be the text of the offline
greedy answer; where two tokens or two experts are nearly tied offline, what follows is exempt and counted. Resident
memory is read each second. Prints JSON; --keep writes results/soak.json beside itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

PROMPTS, LONGEST_PROMPT, LONGEST_ANSWER = 24, 96, 32
LOGIT_NOISE, ROUTING_NOISE = 1e-3, 1e-5
GARBAGE = (b"", b"{", b"\xff", b"[1]", b'{"model": "mix"}', b'{"model": "mix", "prompt": [99999999]}',
           b'{"model": "mix", "prompt": "x", "max_tokens": -1}', b'{"model": "mix", "prompt": "\\ud800"}',
           b'{"model": "mix", "prompt": "x", "temperature": NaN}', b"[" * 9000)  # fmt: skip


def prompts() -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(10, 2000) for _ in range(draw.randint(1, LONGEST_PROMPT))] for _ in range(PROMPTS)]


# -- the clients -------------------------------------------------------------------------------------------------------


async def client(http: httpx.AsyncClient, seed: int, ends: float, found: list[dict[str, Any]]) -> None:
    """Asks until the time is over; notes what each request came to."""
    draw, texts = random.Random(seed), prompts()
    while time.monotonic() < ends:
        kind = draw.choices(("greedy", "sampled", "hangs up", "garbage"), (50, 20, 15, 15))[0]
        if kind == "garbage":
            answer = await http.post("v1/completions", content=draw.choice(GARBAGE))
            found.append({"kind": kind, "status": answer.status_code})
            continue
        number, count = draw.randrange(PROMPTS), draw.randint(12 if kind == "hangs up" else 1, LONGEST_ANSWER)
        body: dict[str, Any] = {"model": "mix", "prompt": texts[number], "max_tokens": count}
        body |= {"temperature": float(kind == "sampled"), "stream": kind == "hangs up" or draw.random() < 0.5}
        body |= {"routed_experts": draw.random() < 0.3, "model": "mix" if kind == "greedy" else draw.choice(MODELS)}
        leave_after, status = draw.randint(1, 4) if kind == "hangs up" else None, 429
        one = {"kind": kind, "prompt": number, "tokens": count}
        while status == 429:
            status, text, whole = await asked(http, body, leave_after)
            found.append({**one, "status": status, "text": text, "whole": whole})
            if status == 429:
                await asyncio.sleep(draw.uniform(2.0, 6.0))


MODELS = ("mix", "bare", "expert0", "expert1")


async def asked(http: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None) -> tuple[int, str, bool]:
    """Status, text, and whether the answer is complete."""
    if not body["stream"]:
        answer = await http.post("v1/completions", json=body)
        whole = answer.status_code == 200
        return answer.status_code, answer.json()["choices"][0]["text"] if whole else "", whole
    text, chunks = "", 0
    async with http.stream("POST", "v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return answer.status_code, text, True
            chunk = json.loads(line[6:]) if line.startswith("data: ") else {}
            if "error" in chunk:
                return 500, chunk["error"]["message"], False
            text += "".join(choice["text"] for choice in chunk.get("choices", []))
            chunks += 1
            if leave_after is not None and chunks > 2 * leave_after:
                break
    return answer.status_code, text, False


async def all_clients(url: str, clients: int, seconds: float) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        ends = time.monotonic() + seconds
        await asyncio.gather(*(client(http, seed, ends, found) for seed in range(clients)))
    return found


# -- the server --------------------------------------------------------------------------------------------------------


def make_model(folder: Path) -> Any:
    """molora-tiny with four random experts of rank 8, whose weights are as large as trained ones."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from molora import from_adapters
    from molora.assets import MOLORA_TINY

    for seed in range(4):
        torch.manual_seed(seed)
        options = LoraConfig(r=8, target_modules="all-linear", init_lora_weights="gaussian", task_type="CAUSAL_LM")
        lora = get_peft_model(AutoModelForCausalLM.from_pretrained(MOLORA_TINY, dtype=torch.float32), options)
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        lora.save_pretrained(folder / f"expert{seed}")
    base = AutoModelForCausalLM.from_pretrained(MOLORA_TINY, dtype=torch.float32)
    return from_adapters(
        base, {f"expert{n}": folder / f"expert{n}" for n in range(4)}, "arrow", placement="block"
    ).eval()


def references(model: Any, end: list[int]) -> list[tuple[list[int], int]]:
    """For each prompt the offline greedy answer, and how many of its tokens come before a near tie."""
    import torch

    from molora.layers import MoloraLayer

    gaps: list[Any] = []

    def watch(router: Any, args: Any, out: Any) -> None:
        top = router.logits(args[0]).abs().sort(descending=True).values
        gaps.append((top[:, router.config.top_k - 1] - top[:, router.config.top_k]).min())

    layers = [layer for layer in model.modules() if isinstance(layer, MoloraLayer)]
    routers = [router for layer in layers for router in layer.molora_router.values()]
    hooks = [router.register_forward_hook(watch) for router in routers]
    found = []
    with torch.no_grad():
        for prompt in prompts():
            ids, cache, tokens, sure = torch.tensor([prompt]), None, list[int](), True
            safe = 0
            for _ in range(LONGEST_ANSWER):
                gaps.clear()
                out = model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache, top = out.past_key_values, out.logits[0, -1].topk(2)
                near = top.values[0] - top.values[1] < LOGIT_NOISE or min(map(float, gaps)) < ROUTING_NOISE
                sure, token = sure and not near, int(top.indices[0])
                if token in end:
                    break
                tokens.append(token)
                safe += sure
                ids = torch.tensor([[token]])
            found.append((tokens, safe))
    for hook in hooks:
        hook.remove()
    return found


def compared(found: list[dict[str, Any]], wanted: list[tuple[list[int], int]], tokenizer: Any) -> Counter[str]:
    """How many completed greedy answers are the same, exempt from a near tie on, or different."""
    count: Counter[str] = Counter()
    for one in found:
        if one["kind"] == "greedy" and one["whole"]:
            tokens, safe = wanted[one["prompt"]]
            # The stream never shows a part of a character.
            texts = [tokenizer.decode(tokens[:n]).rstrip("\ufffd") for n in (one["tokens"], min(one["tokens"], safe))]
            same = one["text"].rstrip("\ufffd") == texts[0]
            near = safe < min(one["tokens"], len(tokens)) and one["text"].startswith(texts[1])
            count["same" if same else "exempt" if near else "different"] += 1
    return count


def resident_mib() -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


def measure(seconds: int, clients: int) -> dict[str, Any]:
    from molora.bench.serving import listening
    from molora.eval.models import load_tokenizer
    from molora.serve.app import create_app
    from molora.serve.launch import make_server

    tokenizer = load_tokenizer("molora-tiny")
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
    room = {"max_model_len": 256, "cache_tokens": 1024, "max_running": clients // 2}
    room["max_waiting"] = clients - 2 - room["max_running"]
    server = make_server(model, tokenizer, "mix", base_name="bare", timeout_s=120.0, **room)
    engine, memory = server.engine, list[float]()
    wanted = references(model, engine.eos_token_ids)
    with listening(create_app(server, 1.0)) as url:
        command = [sys.executable, __file__, "--client", url, "--seconds", str(seconds), "--clients", str(clients)]
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(command, stdout=output)
            while process.poll() is None:
                time.sleep(1.0)
                memory.append(resident_mib())
            output.seek(0)
            found = json.loads(output.read())
        time.sleep(1.0)
        router = engine.manager.output_router
        left = [engine.tracer._wants, engine.tracer._steered, router.result_handlers, range(engine.open)]
        failed = engine.error
    statuses = Counter(f"{one['kind']} {one['status']}" for one in found)
    taken = [one for one in found if one["status"] != 429]
    return {
        "requests": len(found),
        "taken": len(taken),
        "hung_up_in_mid_stream": sum(one["kind"] == "hangs up" and not one["whole"] for one in taken),
        "garbage": sum(one["kind"] == "garbage" for one in taken),
        "statuses": dict(sorted(statuses.items())),
        "answers": dict(compared(found, wanted, tokenizer)),
        "server_errors": sum(one["status"] >= 500 and one["status"] != 503 for one in found),
        "garbage_taken": sum(one["kind"] == "garbage" and not 400 <= one["status"] < 500 for one in found),
        "error_messages": sorted({one["text"] for one in found if one["status"] >= 500}),
        "broken_off": sum(one["kind"] in ("greedy", "sampled") and one["status"] == 200 and not one["whole"]
                          for one in found),
        "left_behind": sum(map(len, left)),
        "engine_error": failed,
        "resident_mib": [round(value, 1) for value in memory],
    }  # fmt: skip


def bars(found: dict[str, Any], seconds: int) -> list[dict[str, Any]]:
    memory, answers = found["resident_mib"], found["answers"]
    growth = memory[min(seconds, len(memory)) - 1] / memory[min(seconds // 3, len(memory) - 1)] - 1
    zero = {
        "greedy answers unlike the offline one": answers.get("different", 0),
        "server errors": found["server_errors"] + (found["engine_error"] is not None),
        "garbage that was not refused with 4xx": found["garbage_taken"],
        "answers broken off": found["broken_off"],
        "requests left in the engine's books": found["left_behind"],
    }
    rows = [{"name": name, "value": value, "limit": 0, "holds": value == 0} for name, value in zero.items()]
    least = {
        "share of those taken that hung up in mid-stream, at least": found["hung_up_in_mid_stream"] / found["taken"],
        "share of those taken that were garbage, at least": found["garbage"] / found["taken"],
    }
    rows += [{"name": name, "value": round(v, 4), "limit": 0.1, "holds": v >= 0.1} for name, v in least.items()]
    full = 1 - found["taken"] / found["requests"]
    rows.append({"name": "share that got 429, above 0", "value": round(full, 4), "limit": 0.2, "holds": 0 < full < 0.2})
    name = f"growth of resident memory from second {seconds // 3} to {seconds}"
    return [*rows, {"name": name, "value": round(growth, 4), "limit": 0.03, "holds": growth < 0.03}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--client", metavar="URL", help="used by this script itself")
    options = parser.parse_args()
    if options.client:
        print(json.dumps(asyncio.run(all_clients(options.client, options.clients, options.seconds))))
        return
    from molora.eval.results import SCHEMA, environment, write_json

    began = time.perf_counter()
    found = measure(options.seconds, options.clients)
    command = f"python benchmarks/soak.py --seconds {options.seconds} --clients {options.clients} --keep"
    result = {"schema": SCHEMA, "command": command, **environment(), "seed": 1, **found}
    result |= {"seconds": time.perf_counter() - began, "bars": bars(found, options.seconds)}
    print(json.dumps(result, indent=1))
    if options.keep:
        write_json(Path(__file__).parent / "results" / "soak.json", result)


if __name__ == "__main__":
    main()
