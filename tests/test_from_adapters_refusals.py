"""What `from_adapters` refuses, in one sentence each, with the base as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import _tokenizer as word_tokenizer
from lora_adapters import edit_config, edit_weights
from lora_pools import examples_of, logits_of, save_lora, save_pool, tensors_of, write_adapter
from tiny_models import base_model

from molora import MoloraConfig, from_adapters
from molora.linear import MixedLinear
from molora.train.recipe import mixture_config


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pool(tmp_path_factory.mktemp("pool"), 2)


def refused(message: str, adapters: Any, base: Any = None, **options: Any) -> None:
    """from_adapters raises one sentence; the base computes and holds what it did."""
    base = base_model() if base is None else base
    before, logits = {n: t.clone() for n, t in base.state_dict().items()}, logits_of(base)
    flags = [p.requires_grad for p in base.parameters()]
    modules = [(n, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in base.named_modules()]
    with pytest.raises(ValueError, match=message) as error:
        from_adapters(base, adapters, **options)
    assert "\n" not in str(error.value)
    assert [(n, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in base.named_modules()] == modules
    after = base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert [p.requires_grad for p in base.parameters()] == flags and torch.equal(logits_of(base), logits)
    assert not hasattr(base, "peft_config") or not base.peft_config


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({}, r"adapters=\{\} must map names of experts to PEFT LoRA adapters, at least one"),
        (["./a"], r"adapters=\['./a'\] must map names"),
        ({"a/b": "x"}, "expert name 'a/b' must be a word without slashes"),
        ({"": "x"}, "expert name '' must be a word"),
        ({".hidden": "x"}, "expert name '.hidden' must be a word"),
        ({3: "x"}, "expert name 3 must be a word"),
        ({"sql": "./nothing here"}, "expert 'sql': adapter ./nothing here: no such directory"),
    ],
)
def test_adapters_that_are_none(adapters: Any, message: str) -> None:
    refused(message, adapters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 8}, "r follows from the adapters; leave it out"),
        ({"num_experts": 2}, "num_experts follows from the adapters"),
        ({"target_modules": ["q_proj"]}, "target_modules follows from the adapters"),
        ({"share_A": True}, "share_A follows from the adapters"),
        ({"plain_lora": {"target_modules": ["q_proj"]}}, "plain_lora follows from the adapters"),
        ({"freeze_expert": True}, "did you mean 'freeze_experts'"),
        ({"placement": "ffn"}, "placement='ffn': LoRAs of linears become experts of linears; use 'linear' or 'block'"),
        ({"router": "arow"}, "did you mean 'arrow'"),
        ({"router": {"name": "arrow", "topk": 1}}, "did you mean 'top_k'"),
        ({"router": {"name": "arrow", "top_k": 0}}, "top_k=0 must be an integer of at least 1"),
        ({"router": {"name": "arrow", "router_temperature": 0}}, "router_temperature=0 must be"),
        ({"router": {"name": "retrieval", "composition": "mix"}}, "composition='mix' must be one of|composition='mix'"),
        ({"router": {"name": "retrieval", "embedder": "minilm"}}, "embedder='minilm' must be 'base' or"),
        ({"router": {"name": "retrieval", "embedder": "./m", "layer": 1}}, "layer=1 is for embedder='base'"),
        ({"router": {"name": "retrieval", "layer": 7}}, "layer=7: this model has decoder layers 0 to 1"),
        ({"router": {"name": "centroid", "top_k": 3}}, "top_k=3 exceeds num_experts=2"),
        ({"router": {"name": "top_k", "top_k": 3}}, "top_k=3 exceeds num_experts=2"),
        ({"adapter_name": "1"}, "adapter name '1' is a number"),
        ({"adapter_name": "a.b"}, "adapter name 'a.b' must be a word without dots"),
        ({"lora_dropout": 1.5}, "lora_dropout=1.5"),
        ({"power_iterations": 0}, "power_iterations=0 must be an integer of at least 1"),
        ({"power_iterations": 15, "router": "softmax"}, "power_iterations=15 is for router 'arrow', not 'softmax'"),
        ({"dtype": torch.int8}, "dtype=torch.int8 must be a floating point dtype"),
        ({"dtype": "float32"}, "dtype='float32' must be a floating point dtype"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(pool: dict[str, Path], options: dict[str, Any], message: str) -> None:
    refused(message, pool, **options)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: edit_config(p, use_dora=True), "expert 'bad': adapter .*use_dora=True"),
        (lambda p: edit_config(p, peft_type="VERA"), "expert 'bad': .*peft_type='VERA'"),
        (lambda p: edit_weights(p, lambda t: t[min(t)].fill_(float("nan"))), "expert 'bad': .*NaN or infinity"),
        (lambda p: edit_weights(p, lambda t: t.pop(min(t))), "expert 'bad': .*lora_B but no lora_A"),
        (lambda p: (p / "adapter_model.safetensors").write_bytes(b"damaged"), "expert 'bad': .*is damaged"),
        (lambda p: (p / "adapter_model.safetensors").unlink(), "expert 'bad': .*no weights, wanted"),
        (lambda p: (p / "adapter_config.json").unlink(), "expert 'bad': .*adapter_config.json is missing"),
        (
            lambda p: edit_weights(p, lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}),
            "expert 'bad': .*layers.7.*which this base lacks",
        ),
        (lambda p: edit_config(p, target_modules=["v_proj"]), "expert 'bad': .*does not select"),
        (
            lambda p: edit_config(p, target_modules=["q_proj", "v_proj", "down_proj", "o_proj"]),
            "expert 'bad': .*selects 8 modules.*2 of them have no weights.*allow_partial=True",
        ),
    ],
)
def test_the_second_adapter_is_refused_before_the_base_is_touched(
    pool: dict[str, Path], damage: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    shutil.copytree(pool["math"], tmp_path / "bad")
    damage(tmp_path / "bad")
    refused(message, {"sql": pool["sql"], "bad": tmp_path / "bad"})


def test_an_adapter_of_another_base(pool: dict[str, Path], tmp_path: Path) -> None:
    refused("expert 'sql': .*which this base lacks.*belongs to another base", pool, base_model("gpt2"))
    refused("expert 'g': .*which this base lacks", {"g": save_lora(tmp_path / "g", "gpt2")})


def test_values_beyond_the_range_of_the_dtype(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    path = write_adapter(tmp_path / "a", {name: (torch.ones(2, 32), torch.full((32, 2), 5e4))}, 2, 4, [name])
    refused("expert 'a': model.layers.0.self_attn.q_proj has values beyond the range of torch.float16", {"a": path},
            dtype=torch.float16)  # fmt: skip
    from_adapters(base_model(), {"a": path}, dtype=torch.bfloat16)


def test_general_adapters_must_fit(pool: dict[str, Path], tmp_path: Path) -> None:
    general = save_lora(tmp_path / "r3", r=3)
    refused("general adapters must have its rank, 4, on model.layers.0.self_attn.q_proj", pool, general=[general])
    fewer = save_lora(tmp_path / "fewer", target_modules=["q_proj", "v_proj"])
    refused("general adapters must have its rank, 4, on model.layers.0.mlp.down_proj", pool, general=[fewer])
    refused("adapter ./nothing: no such directory", pool, general=["./nothing"])


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ("centroid", "has no centroids yet; give example prompts"),
        ("retrieval", "which this forward does not know|has no embeddings of its experts yet"),
        ("phatgoose", "passes? task_labels|pass task_labels"),
    ],
)
def test_a_router_that_is_not_ready_says_what_it_wants(router: str, message: str, pool: dict[str, Path]) -> None:
    model = from_adapters(base_model(), pool, router).train(router == "phatgoose")
    with pytest.raises(ValueError, match=message):
        logits_of(model)


def test_an_arrow_mixture_that_was_never_imported_has_no_prototypes(pool: dict[str, Path]) -> None:
    from peft import get_peft_model

    model = get_peft_model(
        base_model(), MoloraConfig(num_experts=2, r=4, init_lora_weights=False, router="arrow")
    ).eval()
    with pytest.raises(ValueError, match=r"no prototypes yet.*model.set_prototypes\(\)"):
        logits_of(model)
    model.set_prototypes()
    assert logits_of(model).isfinite().all()
    with pytest.raises(ValueError, match="power_iterations=0"):
        model.set_prototypes(power_iterations=0)
    softmax = from_adapters(base_model(), pool, "softmax")
    with pytest.raises(ValueError, match="adapter 'default' has no arrow router"):
        softmax.set_prototypes()
    with pytest.raises(ValueError, match="placement='ffn'"):
        MoloraConfig(num_experts=2, router="arrow", placement="ffn")


def test_examples_must_be_those_of_the_experts(pool: dict[str, Path]) -> None:
    model = from_adapters(base_model(), pool, "retrieval").eval()
    before = tensors_of(model)
    tokenizer = word_tokenizer()
    for examples, message in [
        (examples_of(["sql", "code"]), r"examples are for \['sql', 'code'\], the experts are \['sql', 'math'\]"),
        (examples_of(["sql"]), "examples has 1 sets of prompts"),
        ({"sql": "t3 t4", "math": ["t5"]}, r"examples\['sql'\] must be a list of texts"),
        ({"sql": [" "], "math": ["t5"]}, r"examples\['sql'\] must be a list of texts that are not empty"),
        (["t3"], "examples must map each expert's name"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.set_centroids(examples, tokenizer)
        assert all(torch.equal(t, before[n]) for n, t in tensors_of(model).items())
    model.set_centroids(dict(reversed(examples_of(pool).items())), tokenizer)  # in any order
    vectors = next(m for m in model.modules() if hasattr(m, "centroid_bits")).vectors.clone()
    model.set_centroids(examples_of(pool), tokenizer)
    assert torch.equal(next(m for m in model.modules() if hasattr(m, "centroid_bits")).vectors, vectors)
    arrow = from_adapters(base_model(), pool)
    with pytest.raises(ValueError, match="router 'arrow' has no centroids"):
        arrow.set_centroids(examples_of(pool), tokenizer)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"adapters": ["a"]}, "mixture.adapters must map the name of each expert to a LoRA adapter"),
        ({"adapters": {"a": 3}}, "mixture.adapters must map the name"),
        ({"adapters": {}}, "at least one"),
        ({"adapters": {"a": "x"}, "num_experts": 2}, "num_experts follows from the adapters"),
        ({"adapters": {"a": "x"}, "preset": "meteor"}, "did you mean 'meteora'"),
        ({"adapters": {"a": "x", "b": "y"}, "preset": "mixlora"}, "placement='ffn': LoRAs of linears become experts"),
        ({"adapters": {"a": "x"}, "router": "arow"}, "did you mean 'arrow'"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture_config(keys)


def test_a_router_that_is_named_beside_a_preset_is_taken() -> None:
    keys = {"adapters": {"a": "x", "b": "y"}, "preset": "meteora"}
    assert mixture_config(keys).router.name == "top_k" and mixture_config(keys).router.task_loss_coef == 50.0
    assert mixture_config(keys | {"router": "arrow"}).router.name == "arrow"
    assert mixture_config(keys | {"router": {"top_k": 1}}).router.top_k == 1


def test_nothing_of_a_config_is_lost_in_its_file(pool: dict[str, Path], tmp_path: Path) -> None:
    model = from_adapters(base_model(), pool, {"name": "arrow", "top_k": 1, "router_temperature": 0.5})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["router"] == {"name": "arrow", "top_k": 1, "router_temperature": 0.5}
    assert config["init_lora_weights"] == "imported" and config["freeze_experts"] is True
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj", "v_proj"]
    assert sum(isinstance(m, MixedLinear) for m in model.modules()) == 6
