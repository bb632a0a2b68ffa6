"""Centroid routing through a model: centroids from examples, a chosen layer, the running text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import _tokenizer as word_tokenizer
from peft import PeftModel, get_peft_model
from tiny_models import VOCAB, base_model, batch, train
from torch import Tensor

from molora import MoloraConfig, record_routing
from molora.context import runtime_of
from molora.routers import Centroid
from molora.routers.centroid import largest_similarity_weights
from molora.running_text import embed

EXAMPLES = {
    name: [" ".join(f"t{(11 * i + 5 * j + 3 * k) % (VOCAB - 5) + 3}" for k in range(5 + j)) for j in range(3)]
    for i, name in enumerate(("sql", "math", "code"))
}


def centroid_model(router: dict[str, Any] | None = None, placement: str = "linear", **options: Any) -> PeftModel:
    config = MoloraConfig(
        num_experts=3,
        r=4,
        lora_alpha=8,
        placement=placement,
        init_lora_weights=False,
        router={"name": "centroid", **(router or {})},
        **options,
    )
    torch.manual_seed(1)
    return get_peft_model(base_model(), config).eval()


@torch.no_grad()
def hidden_states(text: str, name: str) -> Tensor:
    """The input of a module of the base, (T, D) fp64, for one text."""
    base, seen = base_model(), []
    module = base.get_submodule(name)
    module.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    base(input_ids=word_tokenizer()(text, return_tensors="pt")["input_ids"])
    return seen[0].double().flatten(0, -2)


def mean_of_examples(name: str) -> Tensor:
    """The centroids written out: the mean over texts of the mean over tokens, by the base alone."""
    return torch.stack(
        [torch.stack([hidden_states(t, name).mean(0) for t in texts]).mean(0) for texts in EXAMPLES.values()]
    )


def written_gates(query: Tensor, centroids: Tensor) -> Tensor:
    return largest_similarity_weights(
        torch.nn.functional.cosine_similarity(query[:, None].double(), centroids[None].double(), dim=2), 4.0
    )


@pytest.mark.parametrize(
    ("placement", "site", "module"),
    [
        ("linear", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj"),
        ("block", "model.layers.0.self_attn.q_proj+k_proj+v_proj", "model.layers.0.self_attn.q_proj"),
        ("ffn", "model.layers.1.mlp", "model.layers.1.mlp"),
    ],
)
def test_centroids_are_means_of_the_examples(placement: str, site: str, module: str) -> None:
    model = centroid_model(placement=placement)
    model.set_centroids(EXAMPLES, word_tokenizer())
    assert model.peft_config["default"].expert_names == list(EXAMPLES)
    router = next(s.router for s in runtime_of(model).sites if s.name == site)
    assert (router.centroids - mean_of_examples(module)).abs().max() < 1e-6
    with record_routing(model) as routing, torch.no_grad():
        model(**batch())
    assert len(routing) == len(runtime_of(model).sites)
    assert torch.allclose(routing[site].gates.sum(1), torch.ones(len(routing[site].gates)))


def test_one_query_for_all_mixtures() -> None:
    """The input of decoder layer 1 routes everything behind it; what comes before weighs all experts alike."""
    model = centroid_model({"layer": 1})
    model.set_centroids(EXAMPLES, word_tokenizer())
    assert [site.name for site in runtime_of(model).sites] == ["model.layers.1"]
    centroids = runtime_of(model).sites[0].router.centroids
    assert (centroids - mean_of_examples("model.layers.1")).abs().max() < 1e-6
    seen: list[Tensor] = []
    gates: dict[str, Tensor] = {}
    base = model.get_base_model()
    base.model.layers[1].register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    for number in (0, 1):
        layer = base.model.layers[number].mlp.down_proj
        route = layer.routing

        def watched(*args: Any, number: int = number, route: Any = route) -> Any:
            routing = route(*args)
            gates[str(number)] = routing.gates
            return routing

        layer.routing = watched
    with torch.no_grad():
        model(**batch())
    assert torch.equal(gates["0"], torch.full_like(gates["0"], 1 / 3))
    assert (gates["1"] - written_gates(seen[0], centroids)).abs().max() < 1e-6
    assert float(gates["1"].std(0).max()) > 1e-3


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["none", "non-reentrant", "reentrant"])
def test_a_chosen_layer_survives_checkpointing(checkpointing: bool | None) -> None:
    """Every micro-batch's recomputation reads the query of its own forward."""
    grads = []
    for kind in (None, checkpointing):
        model = centroid_model({"layer": 1})
        model.set_centroids(EXAMPLES, word_tokenizer())
        model.train()
        if kind is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind})
        total = sum(model(**batch(seed=seed)).loss for seed in (3, 4))
        total.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0] and grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[1][n], grads[0][n], rtol=1e-5, atol=1e-7) for n in grads[0])


def test_centroids_train_nothing_and_are_saved(tmp_path: Path) -> None:
    model = centroid_model({"layer": 1, "top_k": 2})
    model.set_centroids(EXAMPLES, word_tokenizer())
    before = runtime_of(model).sites[0].router.centroid_bits.clone()
    assert not [n for n, p in model.named_parameters() if "molora_router" in n]
    train(model)
    model.eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    assert torch.equal(runtime_of(again).sites[0].router.centroid_bits, before)
    with torch.no_grad():
        assert torch.equal(again(**batch()).logits, model(**batch()).logits)
    assert again.peft_config["default"].expert_names == list(EXAMPLES)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A local sentence-transformers model: the mean of static word vectors."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("embedder"))
    sentence_transformers.SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=8)]).save(folder)
    return folder


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_running_text_is_read_every_n_tokens(embedder: str, every: int) -> None:
    model, tokenizer = centroid_model({"embedder": embedder, "reweight_every": every}), word_tokenizer()
    model.set_centroids(EXAMPLES, tokenizer)
    inputs, new = batch(), 6
    prompt = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    with record_routing(model) as routing:
        out = model.generate(**prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, tokenizer=tokenizer)
    assert list(routing) == ["running text"]
    record = routing["running text"]
    rows, length = inputs["input_ids"].shape
    assert record.shapes == [(rows, length), *[(rows, 1)] * (new - 1)]
    centroids = torch.stack([embed(embedder, texts).double().mean(0) for texts in EXAMPLES.values()])
    steps = record.gates.split([r * n for r, n in record.shapes])
    for step, gates in enumerate(steps):
        read = length + step - step % every  # tokens that the embedder had seen
        texts = tokenizer.batch_decode(out[:, :read], skip_special_tokens=True)
        want = written_gates(embed(embedder, texts), centroids)
        assert (gates.view(rows, -1, 3) - want.unsqueeze(1)).abs().max() < 1e-6
    assert not torch.allclose(steps[0].view(rows, -1, 3)[:, 0], steps[-1].view(rows, 3), atol=1e-3)


def test_beams_read_their_own_text_and_a_plain_forward_is_refused(embedder: str) -> None:
    model, tokenizer = centroid_model({"embedder": embedder}), word_tokenizer()
    model.set_centroids(EXAMPLES, tokenizer)
    inputs = batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, num_beams=3, tokenizer=tokenizer)
    assert out.shape[0] == 2
    with pytest.raises(ValueError, match=r"reads the running text, which only model.generate\(..., tokenizer=token"):
        model(**inputs)
    with pytest.raises(ValueError, match="reads the running text, which needs the tokenizer; call generate"):
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(ValueError, match="only model.generate"):  # the wrapper left nothing behind
        model.train()(**inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedder": "minilm"}, "embedder='minilm' must be 'base' or a sentence-transformers model"),
        ({"reweight_every": 2}, "reweight_every=2 needs a sentence-transformers embedder"),
        ({"embedder": "a/b", "layer": 3}, "layer=3 is for embedder='base'"),
        ({"temperature": 0.0}, "temperature=0.0 must be a finite number above 0"),
        ({"layer": -1}, "layer=-1 must be an integer of at least 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options_say_what_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Centroid(**options)


def test_wrong_use_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = centroid_model(), word_tokenizer()
    with pytest.raises(ValueError, match="has no centroids yet; give example prompts for each expert"):
        model(**batch())
    two = {name: EXAMPLES[name] for name in ("sql", "math")}
    with pytest.raises(ValueError, match=r"2 sets of prompts \(sql, math\) for num_experts=3"):
        model.set_centroids(two, tokenizer)
    with pytest.raises(ValueError, match="give each expert one set that is not empty"):
        model.set_centroids({**EXAMPLES, "sql": []}, tokenizer)
    with pytest.raises(ValueError, match=r"examples are for \['sql', 'math', 'code'\], the experts are"):
        centroid_model(expert_names=["a", "b", "c"]).set_centroids(EXAMPLES, tokenizer)
    with pytest.raises(ValueError, match="router 'top_k' has no centroids"):
        get_peft_model(base_model(), MoloraConfig(num_experts=3)).set_centroids(EXAMPLES, tokenizer)
    with pytest.raises(ValueError, match="layer=7: this model has decoder layers 0 to 1"):
        centroid_model({"layer": 7})
    with pytest.raises(ValueError, match="one expert for each set of prompts"):
        MoloraConfig(num_experts=[2, 3], router="centroid")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match="needs the package sentence-transformers; pip install sentence-transformers"):
        centroid_model({"embedder": "sentence-transformers/all-MiniLM-L6-v2"})


def test_centroids_of_another_base_are_refused(tmp_path: Path) -> None:
    model = centroid_model()
    model.set_centroids(EXAMPLES, word_tokenizer())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this adapter was trained on another base"):
        PeftModel.from_pretrained(base_model(seed=5), tmp_path)
