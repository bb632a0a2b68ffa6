"""Gates that are trained over frozen experts, and experts that are retrieved for a prompt.

Legend: E experts, R rank, T tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gradients import _tokenizer as word_tokenizer
from lora_pools import examples_of, logits_of, peft_lora, save_lora, save_pool, tensors_of
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_lm import save_tiny, tiny_llama, write_jsonl
from tiny_models import base_model, batch
from torch import Tensor

from molora import from_adapters, record_routing
from molora.adapters.lora_files import read_lora
from molora.centroids import base_alone
from molora.context import runtime_of
from molora.linear import MixedLinear
from molora.train.prepare import prepare
from molora.train.recipe import read_recipe
from molora.train.run import train

NAMES = ("sql", "math", "code")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pool(tmp_path_factory.mktemp("pool"))


# -- phatgoose ---------------------------------------------------------------------------------------------------------


def gates_of(model: PeftModel) -> dict[str, Tensor]:
    return {site.name: site.router.weight for site in runtime_of(model).sites}


@pytest.mark.parametrize("placement", ["linear", "block"])
def test_each_gate_learns_as_if_it_were_trained_alone(placement: str, pool: dict[str, Path]) -> None:
    """The gradient of v_i from a batch of all tasks is that from task i's rows with adapter i alone, weighted by its
    share in the tokens of the loss."""
    together = from_adapters(base_model(), pool, "phatgoose", placement=placement).train()
    for i, weight in enumerate(gates_of(together).values()):
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(i))
    ids = batch(rows=6)["input_ids"].clamp(min=3)
    tasks = torch.tensor([0, 2, 1, 0, 2, 0])
    together(input_ids=ids, labels=ids, task_labels=tasks).loss.backward()
    for e, name in enumerate(pool):
        alone = from_adapters(base_model(), {name: pool[name]}, "phatgoose", placement=placement).train()
        for site, weight in gates_of(alone).items():
            weight.data.copy_(gates_of(together)[site][e : e + 1])
        rows = ids[tasks == e]
        alone(input_ids=rows, labels=rows, task_labels=torch.zeros(len(rows), dtype=torch.int64)).loss.backward()
        for site, weight in gates_of(alone).items():
            want = weight.grad[0] * len(rows) / len(ids)
            assert torch.allclose(gates_of(together)[site].grad[e], want, rtol=1e-4, atol=1e-8), site
            assert want.any()


def test_a_task_without_rows_leaves_its_gate_alone(pool: dict[str, Path]) -> None:
    model = from_adapters(base_model(), pool, "phatgoose").train()
    model(**batch(), task_labels=torch.tensor([0, -1])).loss.backward()
    for weight in gates_of(model).values():
        assert weight.grad[0].any() and not weight.grad[1:].any()


def test_the_gate_in_training_is_the_written_one(pool: dict[str, Path]) -> None:
    """y = W x + sigmoid(v_i . x) s_i B_i A_i x for a token of task i, whatever the other experts are."""
    model = from_adapters(base_model(), pool, "phatgoose").train()
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    router = layer.molora_router["default"]
    torch.nn.init.normal_(router.weight)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    model(**batch(), task_labels=torch.tensor([2, 1]))
    x, y = (t.detach() for t in seen)
    for row, (e, name) in enumerate(((2, "code"), (1, "math"))):
        pair = read_lora(pool[name]).pairs["model.layers.1.mlp.down_proj"]
        gate = torch.sigmoid(x[row] @ router.weight[e])[:, None]
        want = x[row] @ layer.base_layer.weight.T + gate * pair.scaling * (x[row] @ pair.A.T @ pair.B.T)
        assert (y[row] - want).abs().max() < 1e-5


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, an adapter and a file of rows for each task."""
    path = tmp_path_factory.mktemp("recipes")
    save_tiny(path / "base")
    for i, name in enumerate(NAMES):
        torch.manual_seed(i)
        config = LoraConfig(r=2, lora_alpha=3 + i, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(tiny_llama(), config).save_pretrained(path / name)
        rows = [{"q": f"{name} {j}", "a": f"{name[i % 3]}{j}"} for j in range(20)]
        write_jsonl(path / f"{name}.jsonl", rows)
    return path


def recipe_of(folder: Path, out: Path, mixture: dict[str, Any], tasks: tuple[str, ...] = NAMES, **task: Any) -> Any:
    file = out / "recipe.yaml"
    content = {
        "schema": "molora.recipe/1",
        "base": {"model": str(folder / "base")},
        "mixture": {"adapters": {name: str(folder / name) for name in NAMES}, **mixture},
        "tasks": [
            {"name": name, "data": str(folder / f"{name}.jsonl"), "prompt": "{q}:", "answer": " {a}", **task}
            for name in tasks
        ],
        "training": {
            "output_dir": str(out / "run"),
            "max_steps": 4,
            "per_device_train_batch_size": 6,
            "learning_rate": 1e-2,
            "report_to": "none",
        },
    }
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return read_recipe(file)


@pytest.mark.parametrize(
    ("mixture", "kind"),
    [
        ({"router": "phatgoose"}, "phatgoose"),
        ({"preset": "phatgoose"}, "phatgoose"),
        ({"preset": "meteora", "router": {"top_k": 1}}, "top_k"),
        ({"preset": "xlora-single-pass"}, "softmax"),
    ],
    ids=["router", "phatgoose", "meteora", "xlora"],
)
def test_a_recipe_trains_the_gates_of_adapters(
    mixture: dict[str, Any], kind: str, folder: Path, tmp_path: Path
) -> None:
    # The tasks come in another order than the experts: names pair them.
    recipe = recipe_of(folder, tmp_path, mixture, tasks=("code", "sql", "math"))
    model, _, rows, _ = prepare(recipe)
    before = tensors_of(model)
    labels = {row["task_label"] for row in rows} if "task_label" in rows.column_names else set()
    assert labels <= {0, 1, 2}
    train(recipe)
    trained = PeftModel.from_pretrained(tiny_llama(), tmp_path / "run").eval()
    after = tensors_of(trained)
    assert after.keys() == before.keys()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and all("molora_router" in name for name in moved)
    assert trained.peft_config["default"].expert_names == list(NAMES)
    assert trained.peft_config["default"].router.name == kind
    experts = from_adapters(tiny_llama(), {name: folder / name for name in NAMES}, "softmax")
    same = {n: t for n, t in tensors_of(experts).items() if "molora_A" in n or "molora_B" in n}
    assert same and all(torch.equal(after[n], t) for n, t in same.items())
    assert logits_of(trained, torch.tensor([[5, 9, 3]])).isfinite().all()


def test_a_recipe_pairs_tasks_and_experts_by_name(folder: Path, tmp_path: Path) -> None:
    from molora.train.prepare import task_labels
    from molora.train.recipe import adapter_config

    recipe = recipe_of(folder, tmp_path, {"preset": "phatgoose"}, tasks=("code", "sql"))
    assert task_labels(recipe, adapter_config(recipe)) == [2, 0]
    own = recipe_of(folder, tmp_path, {"preset": "phatgoose"}, tasks=("code",), task_label=1)
    assert task_labels(own, adapter_config(own)) == [1]
    content = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    content["tasks"] = [{**content["tasks"][0], "name": "poems", "task_label": None}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ValueError, match=r"task 'poems' has no expert of its name among mixture.adapters \(sql, math"):
        prepare(read_recipe(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("router", ["arrow", "retrieval"])
def test_a_recipe_that_would_train_nothing_is_refused(router: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"router '{router}' needs no training and the imported experts are frozen"):
        prepare(recipe_of(folder, tmp_path, {"router": router}))
    model, *_ = prepare(recipe_of(folder, tmp_path, {"router": "arrow", "freeze_experts": False}))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "molora_A" in n or "molora_B" in n
    }


# -- retrieval ---------------------------------------------------------------------------------------------------------


def retrieval(pool: dict[str, Path], family: str = "llama", **router: Any) -> PeftModel:
    model = from_adapters(base_model(family), pool, {"name": "retrieval", **router}).eval()
    model.set_centroids(examples_of(pool), word_tokenizer())
    return model


def prompts_of(names: list[str], j: int = 0) -> Tensor:
    texts = [examples_of([name])[name][j] for name in names]
    return word_tokenizer()(texts, return_tensors="pt")["input_ids"]


@torch.no_grad()
def written_choice(model: PeftModel, ids: Tensor, top_k: int, layer: int = 1) -> list[list[int]]:
    """The experts whose examples' mean hidden state is most like that of the prompt, written out."""
    base, seen = base_model(), []
    base.model.layers[layer].register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )

    def embedding(row: Tensor) -> Tensor:
        base(input_ids=row[None])
        return seen.pop().double()[0].mean(0)

    experts = torch.stack(
        [
            torch.stack([embedding(word_tokenizer()(t, return_tensors="pt")["input_ids"][0]) for t in texts]).mean(0)
            for texts in examples_of(model.peft_config["default"].expert_names).values()
        ]
    )
    cosines = torch.nn.functional.cosine_similarity(
        torch.stack([embedding(row) for row in ids])[:, None], experts[None], dim=2
    )
    return cosines.topk(top_k, dim=1).indices.sort(1).values.tolist()


@pytest.mark.parametrize("top_k", [1, 2])
def test_generate_goes_to_the_experts_of_the_prompt(top_k: int, pool: dict[str, Path]) -> None:
    model = retrieval(pool, top_k=top_k)
    ids = prompts_of(["math", "sql", "code"])
    with record_routing(model) as routing:
        out = model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    want = written_choice(model, ids, top_k)
    if top_k == 1:
        assert want == [[1], [0], [2]]
    (record,) = routing.values()  # one router for all mixtures
    assert record.shapes == [(3, ids.shape[1]), *[(3, 1)] * 5]
    gates = record.gates.split([rows * length for rows, length in record.shapes])
    for part, (rows, length) in zip(gates, record.shapes, strict=True):
        for row in range(rows):
            own = part.view(rows, length, -1)[row]
            assert torch.equal(own, torch.zeros(3).index_fill(0, torch.tensor(want[row]), 1 / top_k).expand(length, -1))
    if top_k == 1:  # each row is written by that adapter alone
        for row, name in enumerate(("math", "sql", "code")):
            lora = peft_lora(pool[name]).generate(
                input_ids=ids[row : row + 1], max_new_tokens=6, min_new_tokens=6, do_sample=False
            )
            assert torch.equal(out[row], lora[0])


@pytest.mark.parametrize("composition", ["mixture", "fusion"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_of_a_batch_are_independent(family: str, composition: str, tmp_path: Path) -> None:
    """A padded prompt goes where it goes alone, and gets the same answer."""
    pool = save_pool(tmp_path, 3, family)
    model = retrieval(pool, family, top_k=2, composition=composition)
    tokenizer = word_tokenizer()
    tokenizer.padding_side = "left"
    texts = [examples_of([name])[name][j] for name, j in (("math", 2), ("sql", 0), ("code", 1))]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with record_routing(model) as routing:
        out = model.generate(**{k: inputs[k] for k in ("input_ids", "attention_mask")}, **options)
    gates = next(iter(routing.values())).gates[: inputs["input_ids"].numel()].view(3, -1, 3)[:, -1]
    for row, text in enumerate(texts):
        alone = tokenizer(text, return_tensors="pt")["input_ids"]
        with record_routing(model) as single:
            answer = model.generate(input_ids=alone, **options)
        assert torch.equal(next(iter(single.values())).gates[0], gates[row]), text
        assert torch.equal(answer[0, -5:], out[row, -5:])
        # The vector itself, not only the choice that it led to.
        from molora.prompts import embed_prompts

        name = next(iter(single))
        base = model.get_base_model()
        both = embed_prompts(base, name, inputs["input_ids"], inputs["attention_mask"])
        assert (both[row] - embed_prompts(base, name, alone)[0]).abs().max() < 1e-5


def test_beams_and_several_answers_belong_to_their_prompt(pool: dict[str, Path]) -> None:
    model = retrieval(pool, top_k=1)
    ids = prompts_of(["code", "sql"])
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    beams = model.generate(input_ids=ids, num_beams=3, num_return_sequences=2, **options)
    for row, name in enumerate(("code", "sql")):
        lora = peft_lora(pool[name])
        want = lora.generate(input_ids=ids[row : row + 1], num_beams=3, num_return_sequences=2, **options)
        assert torch.equal(beams[2 * row : 2 * row + 2], want)
    # An answer inside `prompts` is to these prompts, whatever its ids are.
    with model.prompts(prompts_of(["sql", "code"])):
        swapped = model.generate(input_ids=ids, **options)
    assert torch.equal(swapped[0], peft_lora(pool["sql"]).generate(input_ids=ids[:1], **options)[0])
    positional = model.generate(ids, **options)
    assert torch.equal(positional, model.generate(inputs=ids, **options))


def test_scoring_inside_prompts(pool: dict[str, Path]) -> None:
    model = retrieval(pool, top_k=1)
    prompt = prompts_of(["sql", "math"])
    ids = torch.cat([prompt, batch()["input_ids"].clamp(min=3)], 1)
    with model.prompts(prompt):
        got = logits_of(model, ids)
        assert torch.equal(logits_of(model, ids), got)
        four = logits_of(model, ids.repeat_interleave(2, 0))
    assert (four - got.repeat_interleave(2, 0)).abs().max() < 1e-6
    for row, name in enumerate(("sql", "math")):
        want = logits_of(peft_lora(pool[name]), ids[row : row + 1])[0]
        assert (got[row] - want).abs().max() < 1e-5
    with pytest.raises(ValueError, match="which this forward does not know.*with model.prompts"):
        logits_of(model, ids)
    with model.prompts(prompt), pytest.raises(ValueError, match="3 rows.*2 prompts"):
        logits_of(model, torch.cat([ids, ids[:1]]))
    with pytest.raises(ValueError, match="which this forward does not know"):
        logits_of(model, ids)
    # Other models run inside as they are.
    arrow = from_adapters(base_model(), pool).eval()
    with arrow.prompts(prompt):
        assert torch.equal(logits_of(arrow, ids), logits_of(from_adapters(base_model(), pool).eval(), ids))


@pytest.mark.parametrize("kernel", ["reference", "dense_masked"])
@pytest.mark.parametrize("composition", ["mixture", "fusion"])
def test_compositions_are_the_written_formulas(composition: str, kernel: str, tmp_path: Path) -> None:
    """mixture: sum_i B_i A_i x / k; fusion: (sum_i B_i / k) (sum_i A_i / k) x; with every gradient."""
    paths = save_pool(tmp_path, 3, r=3, target_modules=["q_proj", "v_proj"])
    paths["wide"] = save_lora(tmp_path / "wide", seed=8, r=5, lora_alpha=7, target_modules=["q_proj", "v_proj"])
    model = from_adapters(
        base_model(), paths, {"name": "retrieval", "top_k": 2, "composition": composition}, freeze_experts=False
    ).train()
    model.set_centroids(examples_of(paths), word_tokenizer())
    model.set_kernel(kernel)
    layer = model.get_base_model().model.layers[0].self_attn.v_proj
    assert isinstance(layer, MixedLinear)
    prompt = prompts_of(["math", "wide"])
    chosen = written_choice(model, prompt, 2)
    assert chosen[0] != chosen[1]
    x = torch.randn(2, 7, 32, requires_grad=True)
    upstream = torch.randn(2, 7, 16)
    A, B = layer.molora_A["default"].weight, layer.molora_B["default"].weight
    model.eval()
    with model.prompts(prompt):
        runtime = runtime_of(model)
        runtime.inputs.rows = 2
        runtime.inputs.embeddings = dict(runtime.standing)
        y = layer(x)
        got = torch.autograd.grad((y * upstream).sum(), [x, A, B])
    parts = []
    for row, experts in enumerate(chosen):
        if composition == "fusion":
            ranks = x[row] @ (A[experts].sum(0) / 2).T
            parts.append(ranks @ (B[experts].sum(0) / 2))
        else:
            parts.append(sum(x[row] @ A[e].T @ B[e] for e in experts) / 2)
    want = x @ layer.base_layer.weight.T + torch.stack(parts)
    assert (y - want).abs().max() < 1e-5
    grads = torch.autograd.grad((want * upstream).sum(), [x, A, B])
    for one, other in zip(got, grads, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


def test_fusion_of_one_is_selection_and_of_two_is_not_their_mixture(pool: dict[str, Path]) -> None:
    ids = prompts_of(["math"])
    for top_k in (1, 2):
        found = []
        for composition in ("mixture", "fusion"):
            model = retrieval(pool, top_k=top_k, composition=composition)
            with model.prompts(ids):
                found.append(logits_of(model, ids))
        assert ((found[0] - found[1]).abs().max() < 1e-5) == (top_k == 1)


def test_prompts_end_in_a_failure_too_and_read_the_base_alone(pool: dict[str, Path]) -> None:
    model = retrieval(pool)
    prompt = prompts_of(["sql"])
    with pytest.raises(RuntimeError, match="stop"), model.prompts(prompt):
        raise RuntimeError("stop")
    with pytest.raises(ValueError, match="which this forward does not know"):
        logits_of(model, prompt)
    model.train()
    with base_alone(model):
        assert not model.training
    assert model.training
    with model.prompts(prompt):
        assert model.training
