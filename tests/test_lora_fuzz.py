"""200 damaged LoRA directories, each another way: every one is refused in one line that names it, and runs nothing."""

from __future__ import annotations

import json
import math
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_adapters import CONFIG, PICKLE, WEIGHTS, Payload, peft_model
from safetensors.torch import load_file, save_file
from tiny_models import base_model
from torch import Tensor, nn

from molora.adapters.lora_files import LoraFile, read_lora
from molora.adapters.lora_match import match_lora

COUNT = 200
MARKER = "ran"


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    tensors = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def header_size(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def flip(file: Path, rng: random.Random, first: int, last: int) -> None:
    """Another value in one byte of first..last - 1."""
    data = bytearray(file.read_bytes())
    data[rng.randrange(first, last)] ^= rng.randrange(1, 256)
    file.write_bytes(data)


def truncated(path: Path, rng: random.Random) -> None:
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[: rng.randrange(len(data))])


def appended(path: Path, rng: random.Random) -> None:
    with (path / WEIGHTS).open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 64)))


def header_flip(path: Path, rng: random.Random) -> None:
    flip(path / WEIGHTS, rng, 0, header_size((path / WEIGHTS).read_bytes()))


def data_flip(path: Path, rng: random.Random) -> None:
    data = (path / WEIGHTS).read_bytes()
    flip(path / WEIGHTS, rng, header_size(data), len(data))


def header_length(path: Path, rng: random.Random) -> None:
    data = (path / WEIGHTS).read_bytes()
    length = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(data), rng.getrandbits(64)])
    (path / WEIGHTS).write_bytes(length.to_bytes(8, "little") + data[8:])


def header_shape(path: Path, rng: random.Random) -> None:
    """A header that claims other shapes or places than the data have."""
    data = (path / WEIGHTS).read_bytes()
    header = json.loads(data[8 : header_size(data)])
    entry = header[rng.choice([key for key in header if key != "__metadata__"])]
    spoil = rng.choice(["shape", "data_offsets", "dtype"])
    entry[spoil] = {
        "shape": [2 ** rng.randrange(20, 64), 2 ** rng.randrange(1, 63)],
        "data_offsets": [entry["data_offsets"][0], rng.randrange(2**60)],
        "dtype": rng.choice(["F64", "F8_E4M3", "F12", "C64", "", "BOOL"]),
    }[spoil]
    text = json.dumps(header).encode()
    (path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[header_size(data) :])


def edited(change: Callable[[dict[str, Tensor], str, random.Random], dict[str, Tensor]]) -> Callable[..., None]:
    """Damage to a random tensor of the file, saved as a whole file."""

    def damage(path: Path, rng: random.Random) -> None:
        tensors = load_file(path / WEIGHTS)
        save(path, change(tensors, rng.choice(sorted(tensors)), rng))

    return damage


def other_matrix(key: str) -> str:
    return key.replace("lora_A", "lora_X").replace("lora_B", "lora_A").replace("lora_X", "lora_B")


def poisoned(tensors: dict[str, Tensor], key: str, rng: random.Random) -> dict[str, Tensor]:
    tensors[key].view(-1)[rng.randrange(tensors[key].numel())] = rng.choice([math.nan, math.inf, -math.inf])
    return tensors


OTHER_DTYPES = (torch.float64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
EXTRA = ("x.weight", "lora_A.weight", "base_model.model.lm_head.weight", "base_model.model.model.q.lora_A.weight")
EDITS: dict[str, Callable[[dict[str, Tensor], str, random.Random], dict[str, Tensor]]] = {
    "wrong dtype": lambda t, key, rng: t | {key: t[key].to(rng.choice(OTHER_DTYPES))},
    "swapped A and B": lambda t, key, rng: t | {key: t[other_matrix(key)], other_matrix(key): t[key]},
    "transposed": lambda t, key, rng: t | {key: t[key].t()},
    "missing key": lambda t, key, rng: {k: v for k, v in t.items() if k != key},
    "missing module": lambda t, key, rng: {k: v for k, v in t.items() if k not in (key, other_matrix(key))},
    "extra key": lambda t, key, rng: t | {rng.choice(EXTRA): t[key]},
    "renamed module": lambda t, key, rng: {k.replace(".layers.0.", ".layers.7."): v for k, v in t.items()},
    "cut rank": lambda t, key, rng: t | {key: t[key][: t[key].shape[0] - 1, : t[key].shape[1] - 1]},
    "empty tensor": lambda t, key, rng: t | {key: t[key][:0]},
    "vector": lambda t, key, rng: t | {key: t[key].flatten()},
    "NaN or infinity": poisoned,
}


def as_pickle(path: Path, content: Any) -> None:
    (path / WEIGHTS).unlink()
    torch.save(content, path / PICKLE)


def payload_beside_tensors(path: Path, rng: random.Random) -> None:
    tensors = load_file(path / WEIGHTS)
    as_pickle(path, tensors | {rng.choice(sorted(tensors)): Payload(str(path / MARKER))})


def payload_alone(path: Path, rng: random.Random) -> None:
    (path / WEIGHTS).unlink()
    (path / PICKLE).write_bytes(pickle.dumps(Payload(str(path / MARKER)), protocol=rng.randrange(6)))


def pickle_named_safetensors(path: Path, rng: random.Random) -> None:
    tensors = load_file(path / WEIGHTS)
    as_pickle(path, {"a": Payload(str(path / MARKER))} if rng.random() < 0.5 else tensors)
    (path / PICKLE).rename(path / WEIGHTS)


def pickle_cut(path: Path, rng: random.Random) -> None:
    as_pickle(path, load_file(path / WEIGHTS))
    data = (path / PICKLE).read_bytes()
    (path / PICKLE).write_bytes(data[: rng.randrange(len(data))])


def pickle_flip(path: Path, rng: random.Random) -> None:
    as_pickle(path, load_file(path / WEIGHTS))
    flip(path / PICKLE, rng, 0, (path / PICKLE).stat().st_size)


def zero_size(path: Path, rng: random.Random) -> None:
    (path / rng.choice([CONFIG, WEIGHTS])).write_bytes(b"")


def directory_for_file(path: Path, rng: random.Random) -> None:
    name = rng.choice([CONFIG, WEIGHTS])
    (path / name).unlink()
    (path / name).mkdir()


def dangling_link(path: Path, rng: random.Random) -> None:
    name = rng.choice([CONFIG, WEIGHTS])
    (path / name).unlink()
    (path / name).symlink_to(path / "nowhere")


def missing_file(path: Path, rng: random.Random) -> None:
    (path / rng.choice([CONFIG, WEIGHTS])).unlink()


def config_value(path: Path, rng: random.Random) -> None:
    config = json.loads((path / CONFIG).read_text())
    key = rng.choice(["r", "lora_alpha", "use_rslora", "rank_pattern", "target_modules", "peft_type", "use_dora"])
    config[key] = {
        "r": rng.choice([0, -3, 5, "4", None, 1e9, 4.0, True, [4], 10**30]),
        "lora_alpha": rng.choice([0, -1, "6", None, math.nan, math.inf, 10**500, {}, True]),
        "use_rslora": rng.choice(["no", 1, [0]]),
        "rank_pattern": rng.choice([[1], "q", {"q_proj": "4"}, {"q_proj": 3}, {"(": 4}, {"q_proj": None}]),
        "target_modules": rng.choice([None, [], 3, [3], "(", ["o_proj"], {"q_proj": 1}]),
        "peft_type": rng.choice([None, "VERA", "lora", 7, "", ["LORA"]]),
        "use_dora": rng.choice([True, "no", 1]),
    }[key]
    (path / CONFIG).write_text(json.dumps(config))


def config_cut(path: Path, rng: random.Random) -> None:
    data = (path / CONFIG).read_bytes()
    (path / CONFIG).write_bytes(data[: rng.randrange(len(data) - 1)])


def config_noise(path: Path, rng: random.Random) -> None:
    noise = rng.choice([rng.randbytes(50), b"\x00" * 9, b"[" * 50_000, b'{"r":' * 20_000, b"1" * 9999, b"null", b"[]"])
    (path / CONFIG).write_bytes(noise)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    f.__name__: f
    for f in (
        truncated,
        appended,
        header_flip,
        data_flip,
        header_length,
        header_shape,
        payload_beside_tensors,
        payload_alone,
        pickle_named_safetensors,
        pickle_cut,
        pickle_flip,
        zero_size,
        directory_for_file,
        dangling_link,
        missing_file,
        config_value,
        config_cut,
        config_noise,
    )
} | {name: edited(change) for name, change in EDITS.items()}
# One other byte in a tensor may be another finite number, and in a name that nothing reads, nothing.
UNSEEN = ("data_flip", "header_flip", "pickle_flip")


def contents(path: Path) -> dict[str, Any]:
    return {p.name: p.read_bytes() if p.is_file() else str(p.lstat()) for p in sorted(path.iterdir())}


def tensors_of(lora: LoraFile) -> dict[str, Tensor]:
    return {f"{name}.{m}": t for name, pair in lora.pairs.items() for m, t in (("A", pair.A), ("B", pair.B))}


def check_unseen(kind: str, got: LoraFile, want: LoraFile) -> None:
    """A changed byte that was let pass changed at most one value, to a finite one, and only if it is in the values."""
    ours, theirs = tensors_of(got), tensors_of(want)
    assert ours.keys() == theirs.keys() and [p.scaling for p in got.pairs.values()] == [
        p.scaling for p in want.pairs.values()
    ]
    changed = sum(int((ours[key] != theirs[key]).sum()) for key in theirs)
    assert changed <= (kind == "data_flip") and all(bool(t.isfinite().all()) for t in ours.values())


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return base_model()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA as PEFT saves it, of sizes in which nothing can be taken for anything else."""
    path = tmp_path_factory.mktemp("whole")
    peft_model(target_modules=["q_proj", "v_proj"]).save_pretrained(path)
    (path / "README.md").unlink(missing_ok=True)
    return path


@pytest.mark.slow
def test_every_damaged_adapter_is_refused(whole: Path, base: nn.Module, tmp_path: Path):
    want = read_lora(whole)
    assert len(match_lora(want, base)[0]) == 4
    kinds = list(DAMAGES)
    unseen: Counter[str] = Counter()
    for number in range(COUNT):
        kind, rng = kinds[number % len(kinds)], random.Random(number)
        path = tmp_path / f"{number}-{kind.replace(' ', '-')}"
        shutil.copytree(whole, path)
        before = contents(path)
        DAMAGES[kind](path, rng)
        assert contents(path) != before, f"{path.name}: nothing was damaged"
        try:
            lora = read_lora(path)
            match_lora(lora, base)
        except (ValueError, OSError) as error:
            message = str(error)
            assert message.startswith(f"adapter {path}: ") and "\n" not in message, message
            assert len(message) < len(str(path)) + 500, message
        else:
            assert kind in UNSEEN, f"{path.name} loaded without a word"
            check_unseen(kind, lora, want)
            unseen[kind] += 1
        assert not list(path.glob(f"**/{MARKER}")), f"{path.name} ran what was in it"
    # Nearly every byte of a header counts, and of a zip file most; its padding and some of its fields nobody reads.
    times = Counter(kinds[number % len(kinds)] for number in range(COUNT))
    assert unseen["header_flip"] <= 1 and unseen["pickle_flip"] <= times["pickle_flip"] // 2, unseen


def test_the_payload_would_run(tmp_path: Path):
    pickle.loads(pickle.dumps(Payload(str(tmp_path / MARKER))))
    assert (tmp_path / MARKER).is_dir()


def test_an_undamaged_pickle_loads(whole: Path, base: nn.Module, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "a")
    as_pickle(tmp_path / "a", load_file(tmp_path / "a" / WEIGHTS))
    got, want = tensors_of(read_lora(tmp_path / "a")), tensors_of(read_lora(whole))
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
