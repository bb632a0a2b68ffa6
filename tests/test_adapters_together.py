"""Several adapters on one model, copies of it, compiled steps, and bases that flatten their tokens."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from gradients import _tokenizer as word_tokenizer
from gradients import tiny_llama
from peft import PeftModel, get_peft_model
from test_centroids import EXAMPLES, centroid_model
from tiny_models import base_model, batch, config, logits, preset_config, preset_model

import molora
from molora import MoloraConfig, record_routing, routing_report
from molora.context import runtime_of


def biases(model: torch.nn.Module) -> list[list[int]]:
    return [value.tolist() for name, value in model.named_buffers() if name.endswith("bias_steps")]


def test_a_compiled_model_moves_its_bias_and_ends_its_window() -> None:
    """The optimiser step is seen though no eager forward ever ran."""
    moved = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = preset_model("smora", tiny_llama(), router={"bias_update_rate": 1e-6})
        run = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        for _ in range(2):
            run(**batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(biases(model))
        assert not runtime_of(model).window
    assert moved[0] == moved[1] != biases(preset_model("smora", tiny_llama()))


def test_a_copy_moves_its_own_bias() -> None:
    model = preset_model("smora", tiny_llama())
    for make in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        twin = make(model)
        before = biases(model)
        optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.0)
        twin(**batch()).loss.backward()
        optimizer.step()
        assert biases(model) == before != biases(twin)


def test_queries_of_two_adapters_stay_apart() -> None:
    """Each adapter reads its own decoder layer, whichever was added first; copies do too."""
    model = centroid_model({"layer": 1})
    model.set_centroids(EXAMPLES, word_tokenizer())
    alone = logits(model)
    for make in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        assert torch.equal(logits(make(model)), alone)
    other = MoloraConfig(num_experts=3, r=4, init_lora_weights=False, router={"name": "centroid", "layer": 0})
    model.add_adapter("other", other)
    assert torch.equal(logits(model), alone)
    model.set_adapter("other")
    molora.set_centroids(model, EXAMPLES, word_tokenizer())
    both = logits(model)
    assert not torch.equal(both, alone)
    model.set_adapter("default")
    assert torch.equal(logits(model), alone)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(logits(model), both)


def test_what_is_not_active_decides_nothing() -> None:
    """Labels, checkpointing and the embedder are asked for by active adapters only; deleted routers are let go."""
    model = get_peft_model(base_model(), preset_config("meteora", num_experts=2), adapter_name="two")
    model.add_adapter("eight", preset_config("meteora", num_experts=8))
    model.set_adapter("eight")
    model.train()
    labels = torch.tensor([5, 7])
    model(**batch(), task_labels=labels).loss.backward()
    model.set_adapter("two")
    with pytest.raises(ValueError, match="task_labels holds 7, but this router tells 2 tasks apart"):
        model(**batch(), task_labels=labels)
    model.add_adapter("released", preset_config("smora", router={"bias_update": "forward"}))
    model.set_adapter("eight")
    model.delete_adapter("two")
    model.gradient_checkpointing_enable()
    model(**batch(), task_labels=labels).loss.backward()
    sites = runtime_of(model).sites
    assert all((site.owner is None) == (site.adapter == "two") == (site.router is None) for site in sites)


def test_two_adapters_have_their_own_lines() -> None:
    model = get_peft_model(base_model(), config("linear"), adapter_name="a")
    model.add_adapter("b", config("linear", num_experts=3))
    model.train()
    with record_routing(model) as routing:
        for name in ("a", "b"):
            model.set_adapter(name)
            model(**batch()).loss.backward()
    name = "model.layers.0.self_attn.q_proj"
    assert routing[name].gates.shape[1] == 4 and routing[f"b:{name}"].gates.shape[1] == 3
    report = routing_report(model)
    assert len(report) == 28 and len(report[f"a:{name}"].load) == 4 and len(report[f"b:{name}"].load) == 3
    with pytest.raises(KeyError, match="no router of this name ran: 'model.layers.0.mlp'"):
        routing["model.layers.0.mlp"]


def test_linears_inside_a_converted_ffn_are_refused(tmp_path: Path) -> None:
    for targets in ("all-linear", "ffn-linear", ["down_proj"]):
        model = get_peft_model(base_model(), config("ffn"), adapter_name="whole")
        with pytest.raises(ValueError, match="adapter 'whole' has converted model.layers.0.mlp as a whole FFN, so"):
            model.add_adapter("linears", MoloraConfig(num_experts=2, target_modules=targets))
    model = get_peft_model(base_model(), MoloraConfig(placement="ffn", num_experts=4), adapter_name="whole")
    model.add_adapter("linears", MoloraConfig(num_experts=2, target_modules="attention-linear"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(), tmp_path / "linears")
    assert len(runtime_of(again).sites) == 8


def test_adding_an_ffn_adapter_leaves_the_first_alone() -> None:
    model = preset_model("smora", base_model(), router={"bias_update": "forward"})
    before = biases(model)
    model.add_adapter("ffn", config("ffn"))
    assert biases(model) == before and not runtime_of(model).records
    unset = get_peft_model(base_model(), preset_config("lora-tle", target_modules="ffn-linear"))
    unset.add_adapter("ffn", config("ffn"))  # the router without centroids is not asked


def test_a_base_that_flattens_its_tokens_keeps_its_rows() -> None:
    """OPT hands its FFN linears (T, D): rows come from the model's input."""
    options = {"task_loss_coef": 1.0, "balance_over": "sample", "router_aux_loss_coef": 0.1}
    linears = MoloraConfig(num_experts=4, r=4, target_modules=["fc1", "q_proj"], router=options)
    model = get_peft_model(base_model("opt"), linears).train()
    with record_routing(model) as routing:
        model(**batch(rows=3), task_labels=torch.tensor([0, 1, 2])).loss.backward()
    assert {tuple(record.shapes) for record in routing.values()} == {((3, 11),)}
    for targets in ("ffn-linear", "attention-linear"):
        with pytest.raises(ValueError, match="this model has no FFN module of its own whose linears could be told"):
            get_peft_model(base_model("opt"), MoloraConfig(num_experts=2, target_modules=targets))


def test_regions_name_linears() -> None:
    model = get_peft_model(base_model(), MoloraConfig(num_experts=2, target_modules="attention-linear"))
    assert {site.name.split(".")[3] for site in runtime_of(model).sites} == {"self_attn"}
    plain = {"target_modules": "attention-linear", "r": 2}
    model = get_peft_model(base_model(), MoloraConfig(num_experts=2, target_modules="ffn-linear", plain_lora=plain))
    assert {site.name.split(".")[3] for site in runtime_of(model).sites} == {"mlp"}
    assert sum("self_attn" in n for n, p in model.named_parameters() if p.requires_grad) == 2 * 4 * 2
    with pytest.raises(ValueError, match="names linears, but placement 'ffn' converts FFN modules"):
        MoloraConfig(placement="ffn", target_modules="attention-linear")
    with pytest.raises(ValueError, match="write 'ffn-linear' as text, not in a list"):
        get_peft_model(base_model(), MoloraConfig(target_modules=["ffn-linear"]))


def test_a_micro_batch_of_padding_alone_changes_nothing() -> None:
    for name in ("mole", "dynmole", "loramoe", "mixlora-switch"):
        model = preset_model(name, tiny_llama())
        inputs = batch()
        inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
        labels = {"task_labels": torch.tensor([0, 1])} if name == "loramoe" else {}
        model(**inputs, **labels, num_items_in_batch=torch.tensor(7)).loss.backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None), name


def test_native_adapters_take_centroids() -> None:
    base = base_model()
    torch.manual_seed(1)
    base.add_adapter(MoloraConfig(num_experts=3, r=4, init_lora_weights=False, router="centroid"))
    molora.set_centroids(base, EXAMPLES, word_tokenizer())
    with torch.no_grad():
        assert bool(base.eval()(**batch()).logits.isfinite().all())


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (dict.fromkeys(EXAMPLES, "one text"), r"examples\['sql'\] must be a list of texts"),
        ([["a"], ["b"], ["c"]], "examples must map each expert's name to a list of texts"),
        ({**EXAMPLES, "math": [" "]}, r"examples\['math'\] must be a list of texts that are not empty"),
    ],
)
def test_bad_examples(examples: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        centroid_model().set_centroids(examples, word_tokenizer())
    with pytest.raises(ValueError, match="there is no adapter 'x' to set centroids of"):
        centroid_model().set_centroids(EXAMPLES, word_tokenizer(), adapter_name="x")
    with pytest.raises(ValueError, match="max_length=0 must be an integer of at least 1"):
        centroid_model().set_centroids(EXAMPLES, word_tokenizer(), max_length=0)


@pytest.mark.parametrize("tensor", ["bias_steps", "centroid_bits"])
def test_a_damaged_state_is_refused(tensor: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = preset_model("smora" if tensor == "bias_steps" else "lora-tle", tiny_llama())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    name = next(key for key in state if key.endswith(tensor))
    if tensor == "bias_steps":
        save_file({**state, name: state[name].float()}, path)
        message = "is torch.float32 in the checkpoint and torch.int32 in the model; it is damaged"
    else:
        nan = torch.full(state[name].shape, float("nan")).view(torch.int32)
        save_file({**state, name: nan}, path)
        message = "holds NaN or infinity in the checkpoint"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
