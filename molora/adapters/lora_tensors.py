"""The tensors of an adapter's weights file what their keys say and the pairs they make; nothing in it is executed."""

from __future__ import annotations

import os
import re
import zipfile
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from molora.adapters.lora_config import CONFIG_FILE, one_line, refuse, short

SAFETENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# lora_A.weight as PEFT saves it, lora_A.<adapter>.weight as a model's own state dict has it.
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OTHER_KEYS = (
    (r"\.lora_embedding_[AB](\.|$)", "a LoRA of an embedding, which no expert can sit on; train without it"),
    (r"\.lora_magnitude_vector(\.|$)", "DoRA's magnitudes, which no expert has; train with use_dora=False"),
    (r"\.lora_[AB](\.[^.]+)?\.bias$", "a bias of the LoRA, which no expert has; train with lora_bias=False"),
    (r"\.trainable_tokens_", "trained tokens, which have no place in an expert; train without them"),
    (r"\.lora_[AB]$", "a layout from before PEFT 0.4; load it with the PEFT that wrote it and save it again"),
    (r"\.lora_", "no A or B of a plain LoRA; train a plain LoRA, or convert the file to PEFT's layout"),
    (r"\.bias$", "a trained bias, which has no place in an expert; train with bias='none'"),
    (
        r"\.weight$",
        "a whole trained module (modules_to_save, resized embedding), which no expert has; train without it",
    ),
)


class LoraPair(NamedTuple):
    """The LoRA of one module: y + scaling * B A x.

    Attributes:
        A: (r, D), float32, float16 or bfloat16, on the CPU; memory-mapped where the file is a safetensors file.
        B: (O, r), likewise.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) where use_rslora.
    """

    A: Tensor
    B: Tensor
    scaling: float


def check_pair(path: str, module: str, pair: LoraPair, r: int) -> None:
    """Raises ValueError unless A is (r, D) and B is (O, r), of floats, none of them NaN or infinite."""
    shapes = f"A {tuple(pair.A.shape)} and B {tuple(pair.B.shape)} of {short(module)}"
    for matrix, tensor in (("A", pair.A), ("B", pair.B)):
        if tensor.is_meta:
            raise refuse(
                path, f"lora_{matrix} of {short(module)} has no values here; load it from where it is offloaded"
            )
        if tensor.dtype not in DTYPES:
            raise refuse(
                path,
                f"lora_{matrix} of {short(module)} is {tensor.dtype}; convert it to torch.float32, float16 or bfloat16",
            )
    if pair.A.dim() != 2 or pair.B.dim() != 2:
        raise refuse(path, f"{shapes} are no matrices; only the LoRA of a linear becomes an expert")
    if not pair.A.numel() or not pair.B.numel():
        raise refuse(path, f"{shapes}: empty; gather sharded parameters before saving (DeepSpeed ZeRO-3, FSDP)")
    if (pair.A.shape[0], pair.B.shape[1]) != (r, r):
        if (pair.A.shape[1], pair.B.shape[0]) == (r, r):
            raise refuse(path, f"{shapes} are swapped or transposed: wanted A ({r}, D) and B (O, {r}); save it again")
        raise refuse(
            path, f"{shapes} do not have the rank {r} that {CONFIG_FILE} gives them; they are of different adapters"
        )
    for matrix, tensor in (("A", pair.A), ("B", pair.B)):
        if not is_finite(tensor):
            raise refuse(
                path,
                f"lora_{matrix} of {short(module)} holds NaN or infinity; it is damaged or its training diverged, use "
                "an earlier checkpoint",
            )


def is_finite(tensor: Tensor) -> bool:
    """As ``tensor.isfinite().all()``, several times faster: the bits without the sign are below those of infinity."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.dtype.itemsize]
    infinity = tensor.new_tensor(float("inf")).view(integers)
    return bool((tensor.view(integers) & torch.iinfo(integers).max).max() < infinity)


def read_tensors(path: str, directory: str) -> dict[str, Tensor]:
    """All tensors of the weights file by their keys, on the CPU; the safetensors file where there are two, as in PEFT.

    Args:
        path: what messages call the adapter.
        directory: where the file is.

    Raises:
        ValueError: no such file, damage, or a pickle that holds more than tensors.
    """
    for name, read in ((SAFETENSORS_FILE, _read_safetensors), (PICKLE_FILE, _read_pickle)):
        file = os.path.join(directory, name)
        if os.path.lexists(file):
            if not os.path.isfile(file):
                raise refuse(path, f"{name} is a directory or a broken link, not a file; save the adapter again")
            return read(path, file)
    raise refuse(
        path, f"no weights, wanted {SAFETENSORS_FILE} or {PICKLE_FILE}; download or save the adapter completely"
    )


def _read_safetensors(path: str, file: str) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 -- no dict
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, AttributeError, MemoryError) as error:
        raise refuse(path, f"{SAFETENSORS_FILE} is damaged ({one_line(error)}); download or save it again") from None


def _read_pickle(path: str, file: str) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, by torch's unpickler that builds tensors and containers only."""
    try:
        # What torch.save has written since 1.6 is a zip of stored records: older pickles, damage and records that
        # claim to be larger than the file are found before anything is unpickled.
        with zipfile.ZipFile(file) as archive:
            if sum(info.file_size for info in archive.infolist()) > os.path.getsize(file):
                raise ValueError("its records are larger than the file")
            if (bad := archive.testzip()) is not None:
                raise ValueError(f"checksum of {bad}")
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything at all, from KeyError to struct.error
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {named[1][:80]}" if named else one_line(error)
        raise refuse(
            path,
            f"{PICKLE_FILE} is damaged, or holds more than tensors and would run code ({reason}); nothing was run, ask "
            f"for {SAFETENSORS_FILE}",
        ) from None
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise refuse(
            path, f"{PICKLE_FILE} holds a {type(loaded).__name__}, not tensors by name; save the adapter again"
        )
    size = os.path.getsize(file)
    for key, value in loaded.items():
        if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.device.type != "cpu":
            raise refuse(path, f"{short(key)} in {PICKLE_FILE} is no plain tensor; save the adapter again")
        if value.numel() * value.element_size() > size:
            raise refuse(path, f"{short(key)} in {PICKLE_FILE} is larger than the file; it is damaged, save it again")
    return {key: value.detach() for key, value in loaded.items()}


def parse_key(path: str, key: str) -> tuple[str, str, str | None]:
    """The full name of the module in the base, "A" or "B", and the adapter's name, None where the key has none.

    Raises:
        ValueError: the key is none of a plain LoRA of a linear; says what it is of.
    """
    name = _WRAPPERS.sub("", key)
    while name.startswith("base_model.model."):
        name = name.removeprefix("base_model.model.")
    found = _KEY.fullmatch(name)
    if found is not None:
        return found["module"], found["matrix"], found["adapter"]
    what = next((what for pattern, what in _OTHER_KEYS if re.search(pattern, f".{name}")), None)
    raise refuse(path, f"{short(key)} is {what or 'no key of a LoRA that PEFT wrote since 0.4; convert the file'}")
