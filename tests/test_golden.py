"""Checkpoints of every released format load for good, and compute what they computed then.

`python tests/test_golden.py` writes those of the present format; it never writes over one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from molora import MoloraConfig
from molora.config import FORMAT_VERSION

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = sorted(path for path in GOLDEN.glob("v*/*") if path.name != "base" and path.is_dir())


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_golden_checkpoint_loads_and_computes_the_same(path: Path):
    want = load_file(path / "expected.safetensors")
    for model in (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path.parent / "base"), path),
        _native(path),
    ):
        with torch.no_grad():
            got = model.eval()(input_ids=want["input_ids"]).logits
        torch.testing.assert_close(got, want["logits"], rtol=1e-4, atol=1e-5)


def test_the_present_format_has_golden_checkpoints():
    names = {path.name for path in CHECKPOINTS if path.parent.name == f"v{FORMAT_VERSION}"}
    assert names == {"linear", "block", "ffn"}


def _native(path: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path.parent / "base")
    model.load_adapter(str(path))
    return model


def _write() -> None:
    root = GOLDEN / f"v{FORMAT_VERSION}"
    root.mkdir(parents=True)  # refuses to write over a released format
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=32)).save_pretrained(root / "base")
    ids = torch.randint(0, 32, (2, 7))
    for placement in ("linear", "block", "ffn"):
        base = AutoModelForCausalLM.from_pretrained(root / "base")
        plain = {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 4} if placement == "ffn" else None
        config = MoloraConfig(
            num_experts=3, r=2, lora_alpha=4, placement=placement, plain_lora=plain, init_lora_weights=False,
            router={"top_k": 2, "init_std": 0.5}, share_A=placement == "block",
        )  # fmt: skip
        model = get_peft_model(base, config).eval()
        model.peft_config["default"].base_model_name_or_path = "../base"
        model.save_pretrained(root / placement)
        (root / placement / "README.md").unlink()
        with torch.no_grad():
            expected = {"input_ids": ids, "logits": model(input_ids=ids).logits}
        save_file(expected, root / placement / "expected.safetensors")


if __name__ == "__main__":
    _write()
