"""Save and load: every route of PEFT and transformers gives the same bits, in this process and in another."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import PeftModel, get_peft_model
from tiny_models import CELLS, PLACEMENTS, base_model, config, logits, train, trained
from transformers import AutoModelForCausalLM

_LOAD_ELSEWHERE = """
import sys
import torch
sys.path.insert(0, {tests!r})
import molora
from peft import AutoPeftModelForCausalLM, PeftModel
from tiny_models import base_model, logits
from transformers import AutoModelForCausalLM
for family, placement in {cells!r}:
    base, adapter = f"{{family}}-base", f"{{family}}-{{placement}}"
    want = torch.load(f"{{adapter}}.pt")
    native = base_model(family)
    native.load_adapter(adapter)
    routes = {{
        "PeftModel": PeftModel.from_pretrained(base_model(family), adapter),
        "low_cpu_mem_usage": PeftModel.from_pretrained(base_model(family), adapter, low_cpu_mem_usage=True),
        "AutoPeftModel": AutoPeftModelForCausalLM.from_pretrained(adapter),
        "AutoModel of the adapter": AutoModelForCausalLM.from_pretrained(adapter),
        "load_adapter": native,
    }}
    for route, model in routes.items():
        got = logits(model.eval())
        assert torch.equal(got, want), (family, placement, route, (got - want).abs().max())
        print(family, placement, route, "equal")
"""


@pytest.mark.slow
def test_every_loading_route_in_a_new_process_gives_the_same_bits(tmp_path: Path):
    cells = CELLS
    for family in {family for family, _ in cells}:
        base_model(family).save_pretrained(tmp_path / f"{family}-base")
    for family, placement in cells:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / f"{family}-base").eval()
        model = get_peft_model(base, config(placement))
        train(model)
        torch.save(logits(model.eval()), tmp_path / f"{family}-{placement}.pt")
        model.save_pretrained(tmp_path / f"{family}-{placement}")
    script = _LOAD_ELSEWHERE.format(tests=str(Path(__file__).parent), cells=cells)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 5 * len(cells)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("autocast", [True, False])
def test_a_bf16_base_reloads_to_the_same_bits(tmp_path: Path, placement: str, autocast: bool):
    model = get_peft_model(base_model(dtype=torch.bfloat16), config(placement), autocast_adapter_dtype=autocast)
    train(model)
    want = logits(model.eval())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(dtype=torch.bfloat16), tmp_path, autocast_adapter_dtype=autocast)
    assert torch.equal(logits(again), want)
    native = base_model(dtype=torch.bfloat16)
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native), want)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_native_adapters_save_and_reload(tmp_path: Path, placement: str):
    model = base_model()
    model.add_adapter(config(placement), "mine")
    train(model)
    want = logits(model.eval())
    model.save_pretrained(tmp_path)
    again = base_model()
    again.load_adapter(str(tmp_path), "other")
    assert torch.equal(logits(again), want)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(base_model()))
    model.enable_adapters()
    assert torch.equal(logits(model), want)


def test_a_loaded_adapter_can_train_on(tmp_path: Path):
    trained().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
    losses = train(model, 4)
    assert losses[-1] < losses[0]
    frozen = PeftModel.from_pretrained(base_model(), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cpu_offload(tmp_path: Path, family: str, placement: str):
    model = trained(family, placement)
    want = logits(model)
    offloaded = cpu_offload(copy.deepcopy(model))
    assert torch.equal(logits(offloaded), want)
    model.save_pretrained(tmp_path / "adapter")
    base = base_model(family)
    first = "model.layers.0" if family == "llama" else "transformer.h.0"
    names = {first: "disk"}
    for name, module in base.named_children():
        for child, grandchild in module.named_children():
            path = f"{name}.{child}"
            if first.startswith(path + "."):
                names.update({f"{path}.{n}": "cpu" for n, _ in grandchild.named_children() if f"{path}.{n}" != first})
            else:
                names[path] = "cpu"
        if not list(module.children()):
            names[name] = "cpu"
    base.tie_weights()
    base = dispatch_model(base, names, main_device="cpu", offload_dir=str(tmp_path / "offload"), force_hooks=True)
    again = PeftModel.from_pretrained(
        base, tmp_path / "adapter", offload_dir=str(tmp_path / "offload"), ephemeral_gpu_offload=False
    )
    assert torch.equal(logits(again), want)
