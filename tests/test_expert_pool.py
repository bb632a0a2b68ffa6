"""Experts that come and go: the pool is then what it would be if it were made anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from expert_pools import KINDS, extra, make, outputs, same_models
from gradients import _tokenizer as word_tokenizer
from lora_adapters import edit_config
from lora_pools import examples_of, logits_of, peft_lora, same_tensors, save_lora, save_pool, tensors_of
from peft import PeftModel, get_peft_model
from tiny_models import base_model, batch

import molora
from molora import MoloraConfig, from_adapters, record_routing, routing_statistics
from molora.context import runtime_of


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pool(tmp_path_factory.mktemp("pool"), 4)


# -- add, delete -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["linear", "block"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_added_expert_is_one_that_was_there_from_the_start(
    kind: str, placement: str, paths: dict[str, Path], tmp_path: Path
) -> None:
    first = dict(list(paths.items())[:2])
    model = make(kind, first, placement=placement)
    before = outputs(model)
    for name in list(paths)[2:]:
        model.add_expert(name, paths[name], **extra(kind, name))
    assert same_models(model, make(kind, paths, placement=placement))
    assert not torch.equal(outputs(model), before)
    assert model.peft_config["default"].expert_names == list(paths)
    # Saved and loaded it is the same, and goes on changing.
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    assert same_models(again, model)
    for each in (again, model):
        each.delete_expert("math")
    assert same_models(again, model)


@pytest.mark.parametrize("placement", ["linear", "block"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_deleted_expert_it_was_never_there(kind: str, placement: str, paths: dict[str, Path]) -> None:
    model = make(kind, paths, placement=placement)
    for name in ("sql", "code"):
        model.delete_expert(name)
        left = {n: p for n, p in paths.items() if n in model.peft_config["default"].expert_names}
        assert name not in left and same_models(model, make(kind, left, placement=placement))
    model.add_expert("sql", paths["sql"], **extra(kind, "sql"))
    assert same_models(model, make(kind, {**left, "sql": paths["sql"]}, placement=placement))


def test_down_to_one_expert_it_is_that_lora(paths: dict[str, Path]) -> None:
    model = make("arrow", paths)
    for name in ("math", "chat", "sql"):
        model.delete_expert(name)
    assert (logits_of(model) - logits_of(peft_lora(paths["code"]))).abs().max() < 1e-5
    with pytest.raises(ValueError, match="'code' is the last expert; delete the adapter 'default' instead"):
        model.delete_expert("code")


@pytest.mark.parametrize("kind", ["arrow", "centroid"])
def test_an_expert_of_a_higher_rank_widens_the_pool(kind: str, paths: dict[str, Path], tmp_path: Path) -> None:
    first = dict(list(paths.items())[:2])
    wide = save_lora(tmp_path / "wide", seed=9, r=7, lora_alpha=3, rank_pattern={"v_proj": 2})
    low = save_lora(tmp_path / "low", seed=10, r=1, target_modules=["q_proj"])
    model = make(kind, first)
    model.add_expert("wide", wide, **extra(kind, "wide"))
    model.add_expert("low", low, **extra(kind, "low"))
    anew = make(kind, {**first, "wide": wide, "low": low})
    assert same_models(model, anew)
    config = model.peft_config["default"]
    assert config.r == config.lora_alpha == 7 and set(config.rank_pattern.values()) == {4}
    model.save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "out").eval()
    assert same_models(loaded, model)
    # The ranks stay when it goes; they are zeros.
    model.delete_expert("wide")
    model.delete_expert("low")
    assert (outputs(model) - outputs(make(kind, first))).abs().max() < 1e-6


def test_forty_experts(tmp_path: Path) -> None:
    paths = {f"e{i}": save_lora(tmp_path / str(i), seed=i, r=2, target_modules=["q_proj"]) for i in range(40)}
    model = from_adapters(base_model(), dict(list(paths.items())[:1])).eval()
    for name in list(paths)[1:]:
        model.add_expert(name, paths[name])
    anew = from_adapters(base_model(), paths).eval()
    assert same_tensors(tensors_of(model), tensors_of(anew)) and torch.equal(logits_of(model), logits_of(anew))
    with record_routing(model) as routing:
        logits_of(model)
    gates = next(iter(routing.values())).gates
    assert gates.shape[1] == 40 and bool(((gates > 0).sum(1) == 3).all())
    assert len({int(i) for own in routing.values() for i in own.gates.argmax(1)}) > 8
    model.save_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(base_model(), tmp_path / "out").eval()
    assert torch.equal(logits_of(again), logits_of(model))
    for name in list(paths)[3:]:
        model.delete_expert(name)
    three = from_adapters(base_model(), dict(list(paths.items())[:3])).eval()
    assert torch.equal(logits_of(model), logits_of(three))


def test_statistics_and_training_go_on_with_the_experts_there_are(paths: dict[str, Path]) -> None:
    model = from_adapters(base_model(), dict(list(paths.items())[:2]), freeze_experts=False).train()
    model(**batch()).loss.backward()
    model.add_expert("code", paths["code"])
    assert all(p.requires_grad for n, p in model.named_parameters() if "molora_A" in n or "molora_B" in n)
    model.zero_grad()
    model(**batch()).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "molora_B" in n}
    assert all(g is not None and g.shape[0] == 3 for g in grads.values())
    assert any(g[2].any() for g in grads.values())
    assert all(len(own["load"]) == 3 for own in routing_statistics(model).values())


def test_the_functions_are_the_methods(paths: dict[str, Path]) -> None:
    model = make("arrow", dict(list(paths.items())[:2]))
    other = make("arrow", dict(list(paths.items())[:2]))
    molora.add_expert(model, "code", paths["code"])
    molora.delete_expert(model, "sql")
    other.add_expert("code", paths["code"])
    other.delete_expert("sql")
    assert same_models(model, other)
    # Of two adapters of a model the named one changes.
    both = from_adapters(base_model(), {"a": paths["sql"]}, adapter_name="first")
    both.add_adapter("second", MoloraConfig(num_experts=2, r=2, target_modules=["q_proj"]))
    both.add_expert("b", paths["math"], adapter_name="first")
    assert both.peft_config["first"].expert_names == ["a", "b"]
    with pytest.raises(ValueError, match="adapter 'second' was not made of LoRA adapters; make it with from_adapters"):
        both.add_expert("b", paths["math"], adapter_name="second")


def test_added_weights_take_the_dtype_of_the_pool(tmp_path: Path) -> None:
    half = {f"h{i}": save_lora(tmp_path / str(i), seed=i, dtype=torch.float16, lora_alpha=8) for i in range(2)}
    full = save_lora(tmp_path / "full", seed=5, lora_alpha=7)
    model = from_adapters(base_model(), half).eval()
    model.add_expert("full", full)
    anew = from_adapters(base_model(), {**half, "full": full}, dtype=torch.float16).eval()
    assert same_tensors(tensors_of(model), tensors_of(anew))
    assert {t.dtype for n, t in tensors_of(model).items() if "molora_A" in n} == {torch.float16}


# -- refusals ----------------------------------------------------------------------------------------------------------


def unchanged(model: PeftModel, message: str, call: Any) -> None:
    tensors, config, logits = tensors_of(model), model.peft_config["default"].to_dict(), outputs(model)
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
    assert same_tensors(tensors_of(model), tensors) and model.peft_config["default"].to_dict() == config
    assert torch.equal(outputs(model), logits)


def test_what_cannot_be_added(paths: dict[str, Path], tmp_path: Path) -> None:
    model = make("arrow", dict(list(paths.items())[:2]))
    more = save_lora(tmp_path / "more", target_modules=["q_proj", "o_proj"])
    dora = save_lora(tmp_path / "dora")
    edit_config(dora, use_dora=True)
    partial = save_lora(tmp_path / "partial")
    edit_config(partial, target_modules=["q_proj", "v_proj", "down_proj", "k_proj"])
    other = save_lora(tmp_path / "gpt2", "gpt2")
    for name, path, message in [
        ("sql", paths["code"], "there is an expert 'sql' already; delete it first, or choose another name"),
        ("a/b", paths["code"], "expert name 'a/b' must be a word without slashes"),
        ("new", more, "expert 'new' .*adapts 2 linears that no expert of this model does, first .*o_proj"),
        ("new", dora, "expert 'new': adapter .*use_dora=True"),
        ("new", partial, "expert 'new': adapter .*2 of them have no weights.*allow_partial=True"),
        ("new", other, "expert 'new': adapter .*which this base lacks"),
        ("new", tmp_path / "none", "expert 'new': adapter .*no such directory"),
    ]:
        unchanged(model, message, lambda name=name, path=path: model.add_expert(name, path))
    unchanged(model, "there is no expert 'code'; there are sql, math", lambda: model.delete_expert("code"))
    with pytest.warns(UserWarning, match="has no weights for 2 of the 8 linears"):
        model.add_expert("partial", partial, allow_partial=True)
    assert model.peft_config["default"].num_experts == 3


@pytest.mark.parametrize("kind", ["centroid", "retrieval"])
def test_an_expert_known_by_prompts_needs_some(kind: str, paths: dict[str, Path]) -> None:
    model = make(kind, dict(list(paths.items())[:2]))
    tokenizer = word_tokenizer()
    for options in (
        {},
        {"examples": ["t3"]},
        {"tokenizer": tokenizer},
        {"examples": [], "tokenizer": tokenizer},
        {"examples": "t3 t4", "tokenizer": tokenizer},
    ):
        unchanged(
            model,
            f"router '{kind}' knows experts by example prompts; call add_expert",
            lambda options=options: model.add_expert("code", paths["code"], **options),
        )
    for examples in ([""], ["t3", " "], ["t3", 4]):
        unchanged(
            model,
            r"examples\['code'\] must be a list of texts that are not empty",
            lambda examples=examples: model.add_expert("code", paths["code"], examples=examples, tokenizer=tokenizer),
        )


def test_a_pool_whose_experts_are_not_known_yet_takes_none(paths: dict[str, Path]) -> None:
    """Without centroids of the others, those of the new expert alone would pass for all of them."""
    model = from_adapters(base_model(), dict(list(paths.items())[:2]), "retrieval").eval()
    before = tensors_of(model)
    with pytest.raises(ValueError, match="no embeddings of its experts yet; give example prompts for each expert"):
        model.add_expert("code", paths["code"], **extra("retrieval", "code"))
    assert same_tensors(tensors_of(model), before)


@pytest.mark.parametrize("router", ["softmax", "top_k", "phatgoose"])
def test_trained_gates_know_no_other_experts(router: str, paths: dict[str, Path]) -> None:
    model = from_adapters(base_model(), paths, router).eval()
    for call in (lambda: model.add_expert("new", paths["sql"]), lambda: model.delete_expert("sql")):
        unchanged(model, f"router '{router}' is trained for its experts; make the model anew with from_adapters", call)


def test_fewer_experts_than_the_router_chooses(paths: dict[str, Path]) -> None:
    first = dict(list(paths.items())[:2])
    model = from_adapters(base_model(), first, {"name": "centroid", "top_k": 2}).eval()
    model.set_centroids(examples_of(first), word_tokenizer())
    unchanged(model, "top_k=2 exceeds num_experts=1", lambda: model.delete_expert("sql"))


def test_a_mixture_that_was_not_imported(paths: dict[str, Path]) -> None:
    model = get_peft_model(base_model(), MoloraConfig(num_experts=2, r=4, init_lora_weights=False, router="arrow"))
    model.set_prototypes()
    for call in (lambda: model.add_expert("new", paths["sql"]), lambda: model.delete_expert("sql")):
        unchanged(model.eval(), "adapter 'default' was not made of LoRA adapters; make it with from_adapters", call)
    assert all(site.router.num_gates == 2 for site in runtime_of(model).sites)
