"""Quantised bases: against the same model with its weights dequantised into `nn.Linear`, and through the trainers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_cli import molora, write_recipe
from tiny_lm import save_tiny
from tiny_models import base_model, batch, config, logits
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from molora.eval.models import load_base, trained_quantization
from molora.eval.results import parameters
from molora.layers import is_fresh, is_plain_linear
from molora.quantization import is_quantized, quantization_config

bnb = pytest.importorskip("bitsandbytes")

ROUTERS: dict[str, dict[str, Any]] = {
    "top_k": {"router": {"top_k": 2, "router_aux_loss_coef": 0.01, "init_std": 0.5}},
    "tsallis": {"router": {"name": "tsallis", "init_std": 0.5}},
    "rank_wise": {"router": {"name": "rank_wise", "active_ranks": 3}, "num_experts": 1, "r": 8},
}
CELLS = [(q, p, "top_k") for q in ("nf4", "int8") for p in ("linear", "block", "ffn")]
CELLS += [("nf4_double", "linear", "top_k"), ("nf4", "ffn", "tsallis"), ("nf4", "linear", "rank_wise")]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("base")
    base_model().save_pretrained(path)
    return str(path)


def quantized(path: str, name: str, dtype: torch.dtype = torch.float32) -> Any:
    made = quantization_config(name, dtype)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=made, device_map={"": "cpu"})


def weight_of(module: nn.Module) -> torch.Tensor:
    """The matrix that an integer weight stands for, by bitsandbytes' public functions; int8 by its own definition."""
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return module.weight.data.float() * scale.float()[:, None] / 127


def dequantized(model: nn.Module) -> nn.Module:
    """The same model with `nn.Linear`s of the dequantised weights."""
    plain = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight = nn.Parameter(weight_of(module), requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(parent), leaf, linear)
    return plain


def _seeded(make: Any, *args: Any) -> Any:
    torch.manual_seed(1)
    return make(*args)


def loss_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    out = model.train()(**batch())
    out.loss.backward()
    return out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "placement", "router"), CELLS)
def test_output_and_gradients_are_those_of_the_dequantized_base(stored: str, name: str, placement: str, router: str):
    """fp32, to 1e-5 of the largest entry: bitsandbytes dequantises to fp32 and multiplies as torch does."""
    options = {"init_lora_weights": False, **ROUTERS[router]}
    bases = quantized(stored, name), dequantized(quantized(stored, name))
    model, plain = (_seeded(get_peft_model, base, config(placement, **options)) for base in bases)
    assert is_quantized(model) and not is_quantized(plain)
    (got, grads), (want, known) = loss_and_gradients(model), loss_and_gradients(plain)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert grads.keys() == known.keys() and any("router" in n for n in grads)
    for n, grad in known.items():
        torch.testing.assert_close(grads[n], grad, rtol=0, atol=1e-5 * float(grad.abs().max()) + 1e-9, msg=n)
    assert parameters(model) == parameters(plain)


@pytest.mark.parametrize("kind", [None, True, False])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_trainer_trains_every_layer_under_checkpointing(stored: str, tmp_path: Path, name: str, kind: bool | None):
    """Without `prepare_model_for_kbit_training`; reentrant checkpointing needs an input with gradients."""
    model = get_peft_model(quantized(stored, name), config())
    rows = [{k: v[i].tolist() for k, v in batch(4).items()} for i in range(4)]
    checkpointing = {} if kind is None else {"gradient_checkpointing_kwargs": {"use_reentrant": kind}}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        gradient_checkpointing=kind is not None,
        **checkpointing,  # type: ignore[arg-type]
    )
    Trainer(model, arguments, train_dataset=rows).train()
    assert all(p.abs().sum() > 0 for n, p in model.named_parameters() if "molora_B" in n)
    frozen = [p for n, p in model.named_parameters() if "molora_" not in n]
    assert not any(p.requires_grad or p.grad is not None for p in frozen)
    model.save_pretrained(tmp_path)
    assert not [f for f in tmp_path.glob("*.safetensors") if f.name != "adapter_model.safetensors"]
    want = logits(model.eval())
    assert torch.equal(logits(PeftModel.from_pretrained(quantized(stored, name), tmp_path).eval()), want)


def test_only_what_is_fresh_is_added_into(stored: str):
    """A 4-bit linear's output is fresh; an 8-bit one's is a view, and one with a hook may be held by the hook."""
    x = torch.randn(2, 3, 32, requires_grad=True)
    four = quantized(stored, "nf4").model.layers[0].self_attn.q_proj
    assert is_plain_linear(four) and is_fresh(four(x), x)
    handle = four.register_forward_hook(lambda *_: None)
    assert not is_plain_linear(four)
    handle.remove()
    eight = quantized(stored, "int8").model.layers[0].self_attn.q_proj
    assert not is_plain_linear(eight)

    held: list[torch.Tensor] = []
    model = get_peft_model(quantized(stored, "nf4"), config(init_lora_weights=False))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer.register_forward_hook(lambda _m, _a, out: held.append(out))
    inputs = torch.randn(1, 3, 32)
    layer(inputs)
    assert torch.equal(held[0], layer.base_layer(inputs))


def test_a_probe_leaves_the_compute_dtype_to_the_model(stored: str):
    """A 4-bit linear without a compute dtype takes that of its first input for good."""
    base = quantized(stored, "nf4")
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = None, False
    get_peft_model(base, config("ffn"))
    assert base.model.layers[0].mlp.base_layer.up_proj.compute_dtype == torch.float32


def test_loading_computes_in_the_dtype_of_the_base(stored: str, monkeypatch: pytest.MonkeyPatch):
    linear = load_base(stored, quantization="nf4").model.layers[0].mlp.up_proj
    assert linear.compute_dtype == torch.bfloat16 and not linear.weight.quant_state.nested
    linear = load_base(stored, quantization="nf4_double", dtype="float32").model.layers[0].mlp.up_proj
    assert linear.compute_dtype == torch.float32 and linear.weight.quant_state.nested
    assert not linear.support_avx512bf16_for_cpu
    with pytest.raises(ValueError, match="must be one of nf4, nf4_double, int8"):
        load_base(stored, quantization="fp4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'molora\[quantization\]'"):
        load_base(stored, quantization="nf4")


def test_a_base_that_is_stored_quantized_is_loaded_so(stored: str, tmp_path: Path):
    quantized(stored, "nf4").save_pretrained(tmp_path)
    assert is_quantized(load_base(str(tmp_path)))
    with pytest.raises(ValueError, match="stored quantised already"):
        load_base(str(tmp_path), quantization="int8")


def test_adapters_become_experts_on_a_quantized_base_and_are_not_merged(stored: str, tmp_path: Path):
    from lora_adapters import peft_model

    from molora import from_adapters, to_adapters
    from molora.adapters.to_adapters import merge_into_base

    for name, r in (("a", 4), ("b", 2)):
        peft_model(r=r).save_pretrained(tmp_path / name)
    paths = {name: str(tmp_path / name) for name in ("a", "b")}
    model = from_adapters(quantized(stored, "nf4"), paths, "arrow").eval()
    plain = from_adapters(dequantized(quantized(stored, "nf4")), paths, "arrow").eval()
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-5)
    assert set(to_adapters(model, tmp_path / "out")) == {"a", "b"}
    one = from_adapters(quantized(stored, "nf4"), {"a": paths["a"]}, "arrow")
    with pytest.raises(ValueError, match="base is quantised"):
        merge_into_base(one)


def test_command_line_remembers_the_quantization(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = write_recipe(tmp_path, save_tiny(tmp_path / "base"), max_steps=2)
    assert molora("train", recipe, "base.quantization=nf4") == 0
    out, scores = str(tmp_path / "out"), tmp_path / "e.json"
    assert trained_quantization(out) == "nf4" and trained_quantization(str(tmp_path / "base")) is None
    assert molora("eval", out, "--out", str(scores)) == 0
    trained = json.loads((tmp_path / "out" / "results.json").read_text())
    assert json.loads(scores.read_text())["tasks"] == trained["tasks"]
    assert molora("generate", out, "3 and 3:", "--max-new-tokens", "2", "--quantization", "none") == 0
    capsys.readouterr()
    assert molora("generate", out, "3 and 3:", "--quantization", "nf5") == 2
    assert "did you mean 'nf4'" in capsys.readouterr().err
