"""Experts leave as LoRA adapters: PEFT loads each to what the expert computed, and they come back bit for bit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import _tokenizer as word_tokenizer
from lora_adapters import same
from lora_pools import examples_of, logits_of, peft_lora, same_tensors, save_lora, save_pool, tensors_of
from peft import PeftModel, get_peft_model
from tiny_models import base_model, train
from torch import Tensor, nn

from molora import MoloraConfig, average_adapters, from_adapters, merge_into_base, to_adapters
from molora.adapters.lora_files import read_lora
from molora.context import runtime_of


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pool(tmp_path_factory.mktemp("pool"))


def only(model: PeftModel, e: int) -> Tensor:
    """Logits with the gates of a softmax router all on expert e."""
    for site in runtime_of(model).sites:
        with torch.no_grad():
            site.router.weight.zero_()
            count = site.router.num_gates
            bias = torch.full((count,), -1e4).index_fill(0, torch.tensor(e), 0.0)
            site.router.bias = nn.Parameter(bias, requires_grad=False)
    return logits_of(model)


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_what_was_imported_leaves_as_it_came(family: str, tmp_path: Path) -> None:
    paths = {
        "a": save_lora(tmp_path / "in" / "a", family, seed=1, lora_alpha=7),
        "b": save_lora(tmp_path / "in" / "b", family, seed=2, r=2, lora_alpha=3, use_rslora=True),
    }
    model = from_adapters(base_model(family), paths)
    written = to_adapters(model, tmp_path / "out")
    assert written == {name: tmp_path / "out" / name for name in paths}
    for name, path in paths.items():
        want = logits_of(peft_lora(path, family))
        assert (logits_of(peft_lora(written[name], family)) - want).abs().max() < 1e-6
        before, after = read_lora(path).pairs, read_lora(written[name]).pairs
        assert before.keys() == after.keys()
        for linear, pair in before.items():
            assert torch.equal(after[linear].A, pair.A) and after[linear].scaling == 1
            assert torch.equal(after[linear].B, pair.B * torch.tensor(pair.scaling, dtype=torch.float32))
    again = from_adapters(base_model(family), written)
    assert same_tensors(tensors_of(again), tensors_of(model)) and torch.equal(logits_of(again), logits_of(model))
    # Out again: nothing changes any more.
    second = to_adapters(again, tmp_path / "second")
    assert all(same(read_lora(second[name]).pairs, read_lora(written[name]).pairs) for name in paths)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays(dtype: torch.dtype, tmp_path: Path) -> None:
    paths = {f"e{i}": save_lora(tmp_path / str(i), seed=i, dtype=dtype, lora_alpha=8 * (i + 1)) for i in range(2)}
    written = to_adapters(from_adapters(base_model(), paths), tmp_path / "out")
    for name, path in paths.items():
        assert {pair.A.dtype for pair in read_lora(written[name]).pairs.values()} == {dtype}
        assert (logits_of(peft_lora(written[name])) - logits_of(peft_lora(path))).abs().max() < 1e-6


def test_unequal_targets_leave_no_zeros_behind(tmp_path: Path) -> None:
    paths = {
        "q": save_lora(tmp_path / "q", seed=1, r=1, target_modules=["q_proj"]),
        "most": save_lora(tmp_path / "most", seed=2, r=5, rank_pattern={"v_proj": 2}),
    }
    model = from_adapters(base_model(), paths)
    written = to_adapters(model, tmp_path / "out")
    for name, path in paths.items():
        ranks = [{n: len(p.A) for n, p in read_lora(each).pairs.items()} for each in (path, written[name])]
        assert ranks[0] == ranks[1]
    assert json.loads((written["q"] / "adapter_config.json").read_text())["r"] == 1


@pytest.mark.parametrize("placement", ["linear", "block", "ffn"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trained_experts_leave_as_loras_and_the_plain_lora_beside_them(
    placement: str, family: str, tmp_path: Path
) -> None:
    """One expert and a softmax router: the mixture is that expert and the plain LoRA together."""
    names = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}[family]
    targets = {"llama": ["up_proj", "down_proj"], "gpt2": ["c_fc"]}[family]
    options = {} if placement == "ffn" else {"target_modules": targets}
    config = MoloraConfig(
        num_experts=1,
        r=3,
        lora_alpha=5,
        placement=placement,
        router="softmax",
        plain_lora={"target_modules": names, "r": 2, "lora_alpha": 7},
        init_lora_weights=False,
        **options,
    )
    torch.manual_seed(5)
    model = get_peft_model(base_model(family), config).eval()
    written = to_adapters(model, tmp_path)
    assert set(written) == {"expert_0", "plain_lora"}
    base = base_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in written.values():
            base = PeftModel.from_pretrained(base, path).merge_and_unload()
    assert (logits_of(base) - logits_of(model)).abs().max() < 1e-5
    assert (logits_of(base) - logits_of(base_model(family))).abs().max() > 1e-3
    assert (logits_of(merge_into_base(model)) - logits_of(base)).abs().max() < 1e-5


@pytest.mark.parametrize("share_A", [False, True])
def test_each_of_several_trained_experts(share_A: bool, tmp_path: Path) -> None:
    config = MoloraConfig(
        num_experts=3, r=4, lora_alpha=6, share_A=share_A, router="softmax", target_modules=["q_proj", "down_proj"]
    )
    model = get_peft_model(base_model(), config)
    train(model)
    written = to_adapters(model.eval(), tmp_path)
    assert list(written) == ["expert_0", "expert_1", "expert_2"]
    for e, path in enumerate(written.values()):
        assert (logits_of(peft_lora(path)) - only(model, e)).abs().max() < 1e-5
    pairs = [read_lora(path).pairs["model.layers.0.self_attn.q_proj"] for path in written.values()]
    assert torch.equal(pairs[0].A, pairs[1].A) == share_A and pairs[0].scaling == 1.5


def test_ffn_experts_leave_as_loras_of_their_projections(tmp_path: Path) -> None:
    config = MoloraConfig(num_experts=2, r=4, lora_alpha=8, placement="ffn", router="softmax", init_lora_weights=False)
    model = get_peft_model(base_model(), config).eval()
    written = to_adapters(model, tmp_path)
    for e, path in enumerate(written.values()):
        pairs = read_lora(path).pairs
        assert sorted({n.rpartition(".")[2] for n in pairs}) == ["down_proj", "gate_proj", "up_proj"]
        assert (logits_of(peft_lora(path)) - only(model, e)).abs().max() < 1e-5


def test_rank_wise_mixtures_leave_as_their_one_lora(tmp_path: Path) -> None:
    """With all ranks active and gates of one, that LoRA is the mixture."""
    config = MoloraConfig(
        num_experts=1,
        r=6,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj"],
        router={"name": "rank_wise", "active_ranks": 6},
        init_lora_weights=False,
    )
    model = get_peft_model(base_model(), config).eval()
    written = to_adapters(model, tmp_path)
    assert list(written) == ["expert_0"]
    pair = read_lora(written["expert_0"]).pairs["model.layers.1.self_attn.v_proj"]
    layer = model.get_base_model().model.layers[1].self_attn.v_proj
    found = layer.experts("default", "")
    assert torch.equal(pair.A, found.A[0]) and torch.equal(pair.B, found.B[0].T)
    assert pair.scaling == found.scaling == 1.0
    with pytest.raises(ValueError, match="gates that differ from token to token"):
        merge_into_base(model)


def test_what_cannot_be_exported(pool: dict[str, Path], tmp_path: Path) -> None:
    model = from_adapters(base_model(), pool)
    with pytest.raises(ValueError, match="there is no adapter 'other' to export; there are default"):
        to_adapters(model, tmp_path, "other")
    fresh = get_peft_model(base_model(), MoloraConfig(num_experts=2, r=2, target_modules=["q_proj"]))
    assert list(to_adapters(fresh, tmp_path / "fresh")) == ["expert_0", "expert_1"]  # A alone is an expert too
    empty = get_peft_model(base_model(), MoloraConfig(num_experts=2, r=2, init_lora_weights="imported"))
    with pytest.raises(ValueError, match="expert 'expert_0' is zero in every linear.*delete it"):
        to_adapters(empty, tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_a_directory_that_is_taken_is_refused_before_anything_is_written(pool: dict[str, Path], tmp_path: Path) -> None:
    model = from_adapters(base_model(), pool)
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "mine.txt").write_text("mine")
    for overwrite, message in ((False, "math is there already; .*overwrite=True"), (True, "only adapters are")):
        with pytest.raises(ValueError, match=message):
            to_adapters(model, tmp_path, overwrite=overwrite)
        assert [p.name for p in tmp_path.iterdir()] == ["math"] and (tmp_path / "math" / "mine.txt").exists()
    written = to_adapters(model, tmp_path / "out")
    with pytest.raises(ValueError, match="sql is there already"):
        to_adapters(model, tmp_path / "out")
    other = from_adapters(base_model(), dict(zip(pool, reversed(pool.values()), strict=True))).eval()
    assert to_adapters(other, tmp_path / "out", overwrite=True) == written
    assert torch.equal(logits_of(from_adapters(base_model(), written).eval()), logits_of(other))


# -- averages and merges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("combination", "weights"),
    [
        ("linear", None),
        ("linear", {"sql": 0.7, "math": 0.2, "code": 0.4}),
        ("cat", None),
        ("svd", None),
        ("ties", {"sql": 1.0, "math": 0.5, "code": 2.0}),
        ("magnitude_prune", None),
    ],
)
def test_averages_are_pefts(combination: str, weights: Any, pool: dict[str, Path], tmp_path: Path) -> None:
    base = base_model()
    before = logits_of(base)
    average_adapters(base, pool, tmp_path / "out", weights=weights, combination=combination)
    assert torch.equal(logits_of(base), before) and not any("lora" in n for n, _ in base.named_modules())
    got = logits_of(peft_lora(tmp_path / "out"))
    theirs = PeftModel.from_pretrained(base_model(), pool["sql"], adapter_name="one")
    theirs.load_adapter(pool["math"], adapter_name="two")
    theirs.load_adapter(pool["code"], adapter_name="three")
    numbers = list((weights or dict.fromkeys(pool, 1 / 3)).values())
    density = {"density": 0.2} if combination in ("ties", "magnitude_prune") else {}
    theirs.add_weighted_adapter(["one", "two", "three"], numbers, "all", combination_type=combination, **density)
    theirs.set_adapter("all")
    want = logits_of(theirs.eval())
    assert (got - want).abs().max() < 1e-5
    assert (want - before).abs().max() > 1e-3


def test_cat_is_the_weighted_sum_of_the_experts(pool: dict[str, Path], tmp_path: Path) -> None:
    weights = {"sql": 0.5, "math": 0.25, "code": 0.125}
    average_adapters(base_model(), pool, tmp_path / "out", weights=weights, combination="cat")
    loras = {name: read_lora(path).pairs for name, path in pool.items()}
    for linear, pair in read_lora(tmp_path / "out").pairs.items():
        want = sum(w * loras[n][linear].scaling * (loras[n][linear].B @ loras[n][linear].A) for n, w in weights.items())
        assert (pair.scaling * pair.B @ pair.A - want).abs().max() < 1e-6


def test_averages_that_make_no_sense(pool: dict[str, Path], tmp_path: Path) -> None:
    base = base_model()
    before = logits_of(base)
    other_rank = {"sql": pool["sql"], "low": save_lora(tmp_path / "low", r=2)}
    for adapters, options, message in [
        ({}, {}, "adapters is empty; name at least one"),
        (pool, {"combination": "mean"}, "combination='mean'"),
        (pool, {"density": 0}, "density=0 must be"),
        (pool, {"weights": {"sql": 1.0}}, "weights are for sql, the adapters are sql, math, code; give each one"),
        (pool, {"weights": dict.fromkeys(pool, float("nan"))}, r"weights\['sql'\]=nan"),
        ({"sql": tmp_path / "none"}, {}, "no such directory"),
        (other_rank, {}, "same r value|svd"),
    ]:
        with pytest.raises(ValueError, match=message):
            average_adapters(base, adapters, tmp_path / "out", **options)
        assert torch.equal(logits_of(base), before) and not (tmp_path / "out").exists()


MERGED: dict[str, Any] = {
    "arrow": "arrow",
    "centroid": "centroid",
    "retrieval": "retrieval",
    "fusion": {"name": "retrieval", "composition": "fusion"},
    "softmax": "softmax",
    "top_k": {"name": "top_k", "top_k": 1},
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("router", MERGED)
def test_one_expert_merges_into_the_base(router: str, family: str, tmp_path: Path) -> None:
    path = save_lora(tmp_path / "a", family, lora_alpha=7)
    model = from_adapters(base_model(family), {"a": path}, MERGED[router]).eval()
    if router in ("centroid", "retrieval", "fusion"):
        model.set_centroids(examples_of(["a"]), word_tokenizer())
    with model.prompts(torch.tensor([[5, 6, 7]])):
        want = logits_of(model)
    merged = merge_into_base(model)
    assert type(merged) is type(base_model(family)) and not any("molora" in n for n, _ in merged.named_modules())
    assert (logits_of(merged) - want).abs().max() < 1e-5
    assert (logits_of(merged) - logits_of(peft_lora(path, family))).abs().max() < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(again), logits_of(merged))


@pytest.mark.parametrize(
    "router", [*MERGED.values(), "phatgoose", {"name": "top_k", "top_k": 1, "norm_topk_prob": False}]
)
def test_gates_that_vary_merge_into_nothing(router: Any, pool: dict[str, Path]) -> None:
    name = router if isinstance(router, str) else router["name"]
    model = from_adapters(base_model(), pool, router).eval()
    before = tensors_of(model)
    with pytest.raises(ValueError, match="has 3 gates that differ.*--to loras, or their average with --to average"):
        merge_into_base(model)
    assert same_tensors(tensors_of(model), before)
    if name == "phatgoose" or (isinstance(router, dict) and "norm_topk_prob" in router):
        single = from_adapters(base_model(), {"a": pool["sql"]}, router)
        with pytest.raises(ValueError, match="gates that differ from token to token"):
            merge_into_base(single)
