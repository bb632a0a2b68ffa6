"""Trains a base model from scratch on one GPU: molora-tiny (in the package) or molora-small (made where it is needed).

    python recipes/base/train_base.py small ../shared/data/pretrain runs/molora-small --blimp ../shared/data/tasks/blimp

A Llama with its own byte-level BPE tokenizer and chat template, trained on the gzipped JSON lines ({"text": ...}) of a
directory, each document once per epoch in blocks of the context's length. Every 100th document is held out. Writes
model, tokenizer and a model card with data, tokens, bits per byte on the held-out text, and BLiMP accuracy.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role'] + ': use system, user or assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
HELD_OUT = 100  # every so many documents one is held out
SEED = 0


@dataclass(frozen=True)
class Size:
    """A model's shape and how it is trained; batch in blocks of `context` tokens."""

    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    batch: int
    epochs: float
    learning_rate: float


SIZES = {
    "tiny": Size(2048, 192, 512, 8, 6, 2, 512, 256, 12, 3e-3),
    "small": Size(8192, 448, 1216, 10, 7, 7, 1024, 128, 6, 1.5e-3),
}


def documents(data: Path) -> Iterator[str]:
    """The texts of all files, in the order of their names."""
    for path in sorted(data.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits stand alone, so that arithmetic sees them."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    sample = (text[start : start + 20_000] for text in texts for start in range(0, len(text), 400_000))
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All documents in one row of int32, each between its begin and end token."""
    pieces: list[list[int]] = []
    for start in range(0, len(texts), 256):
        for ids in tokenizer(texts[start : start + 256], verbose=False)["input_ids"]:
            pieces.append([*ids, tokenizer.eos_token_id])
    return torch.cat([torch.tensor(piece, dtype=torch.int32) for piece in pieces])


def build(size: Size, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden,
            intermediate_size=size.ffn,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            max_position_embeddings=size.context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def schedule(step: int, steps: int) -> float:
    """Linear over the first two percent, constant, then linear to zero over the last half."""
    return min(1.0, (step + 1) / (0.02 * steps), max(0.0, (steps - step) / (0.5 * steps)))


def train(model: LlamaForCausalLM, tokens: Tensor, size: Size, limit_s: float) -> dict[str, Any]:
    """Trains for `size.epochs`, or fewer where the clock says so: the schedule is laid after the first steps' speed."""
    device = tokens.device
    blocks = tokens[: len(tokens) // size.context * size.context].view(-1, size.context)
    generator = torch.Generator().manual_seed(SEED)
    order = torch.cat([torch.randperm(len(blocks), generator=generator) for _ in range(math.ceil(size.epochs))])
    steps = int(size.epochs * len(blocks) / size.batch)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=size.learning_rate, betas=(0.9, 0.95), fused=fused)
    run = torch.compile(model) if fused else model
    began, measured, step, loss = time.perf_counter(), 0.0, 0, torch.zeros(())
    while step < steps:
        if step == 20:
            torch.cuda.synchronize() if fused else None
            measured = time.perf_counter()
        if step == 60:  # compiled and warm by now
            torch.cuda.synchronize() if fused else None
            pace = (time.perf_counter() - measured) / 40
            steps = min(steps, max(80, 60 + int((limit_s - (time.perf_counter() - began)) / pace)))
        for group in optimizer.param_groups:
            group["lr"] = size.learning_rate * schedule(step, steps)
        batch = blocks[order[step * size.batch : (step + 1) * size.batch].to(device)].long()
        with torch.autocast(device.type, torch.bfloat16):
            loss = run(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 200 == 0:
            print(f"step {step}/{steps} loss {loss.item():.3f} {time.perf_counter() - began:.0f} s", flush=True)
    return {"steps": step, "tokens": step * size.batch * size.context, "seconds": time.perf_counter() - began}


@torch.no_grad()
def log_likelihoods(model: LlamaForCausalLM, rows: list[list[int]], pad: int) -> Tensor:
    """The summed log-likelihood of each row, (N,) in nats, given its first token."""
    device = next(model.parameters()).device
    sums = []
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        longest = max(map(len, part))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in part], device=device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=ids).logits[:, :-1]
        picked = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        sums.append((picked * (ids[:, 1:] != pad)).sum(1).cpu())
    return torch.cat(sums)


def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], context: int) -> float:
    """Of held-out text, in blocks of the context's length, each after a begin token."""
    text = "".join(texts)[:2_000_000]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [[tokenizer.bos_token_id, *ids[i : i + context - 1]] for i in range(0, len(ids), context - 1)]
    return float(-log_likelihoods(model, rows, tokenizer.pad_token_id).sum()) / (math.log(2) * len(text.encode()))


def blimp(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> float:
    """The share of minimal pairs whose good sentence is more likely, over all paradigms."""
    files = [gzip.decompress(path.read_bytes()).decode() for path in sorted(folder.rglob("*.jsonl.gz"))]
    pairs = [json.loads(line) for text in files for line in text.splitlines()]
    sides = [[tokenizer(pair[side])["input_ids"] for pair in pairs] for side in ("sentence_good", "sentence_bad")]
    good, bad = (log_likelihoods(model, rows, tokenizer.pad_token_id) for rows in sides)
    return float((good > bad).float().mean())


def card(name: str, size: Size, facts: dict[str, Any]) -> str:
    lines = [
        "---",
        "license: apache-2.0",
        "---",
        f"# molora-{name}",
        "",
        f"A Llama of {facts['parameters']:,} parameters ({size.layers} layers, width {size.hidden}, FFN {size.ffn}, "
        f"{size.heads} heads of which {size.kv_heads} for keys and values, context {size.context}, "
        f"{size.vocab} byte-level BPE pieces, tied embeddings), trained from scratch by `recipes/base/train_base.py`. "
        "A base to try mixtures on; it writes English sentences, and knows nothing.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in facts.items()),
        "",
        "Chat template: `<|bos|>`, then `<|system|>`, `<|user|>` and `<|assistant|>` turns; the assistant's end in "
        "`<|eos|>`. Base training saw no chats.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--blimp", type=Path, help="directory of BLiMP's gzipped JSON lines")
    parser.add_argument("--limit-s", type=float, default=420.0, help="seconds of training at most")
    parser.add_argument("--documents", type=int, help="only so many, to try the script")
    parser.add_argument("--epochs", type=float, help="instead of the size's own")
    args = parser.parse_args()
    size, device = SIZES[args.size], "cuda" if torch.cuda.is_available() else "cpu"
    size = size if args.epochs is None else replace(size, epochs=args.epochs)
    began = time.perf_counter()
    texts = list(documents(args.data))[: args.documents]
    held = texts[HELD_OUT // 2 :: HELD_OUT]
    kept = [text for i, text in enumerate(texts) if (i - HELD_OUT // 2) % HELD_OUT]
    tokenizer = train_tokenizer(kept, size.vocab)
    tokenizer.model_max_length = size.context
    tokens = encode(tokenizer, kept).to(device)
    print(f"{len(kept)} documents, {len(tokens):,} tokens, {time.perf_counter() - began:.0f} s", flush=True)
    model = build(size, tokenizer).to(device)
    torch.set_float32_matmul_precision("high")
    spent = train(model, tokens, size, args.limit_s)
    model.eval()
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": f"{len(kept):,} documents, {sum(len(t.encode()) for t in kept) / 1e6:.0f} MB: public domain books, "
        "permissively licensed technical and government text",
        "tokens in the data": f"{len(tokens):,}",
        "tokens seen": f"{spent['tokens']:,} in {spent['steps']:,} steps of {size.batch * size.context:,}",
        "bits per byte, held out": f"{bits_per_byte(model, tokenizer, held, size.context):.3f}",
        "BLiMP accuracy": "not measured" if args.blimp is None else f"{blimp(model, tokenizer, args.blimp):.3f}",
        "seed": SEED,
        "training": f"{spent['seconds']:.0f} s on {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}",
    }
    model.to(torch.bfloat16).save_pretrained(args.out, max_shard_size="14MB")
    tokenizer.save_pretrained(args.out)
    (args.out / "README.md").write_text(card(args.size, size, facts), encoding="utf-8")
    print(json.dumps(facts, indent=1), flush=True)


if __name__ == "__main__":
    main()
