"""LoRA adapters as experts: nothing is lost on the way, and what cannot be imported is refused."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_pools import logits_of, peft_lora, same_tensors, save_lora, save_pool, tensors_of, write_adapter
from peft import ArrowConfig, AutoPeftModelForCausalLM, PeftModel, create_arrow_model
from safetensors.torch import load_file
from tiny_models import base_model, batch, train
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from molora import from_adapters, record_routing
from molora.context import runtime_of
from molora.linear import MixedLinear

ADAPTERS = Path(os.environ.get("MOLORA_SHARED") or Path(__file__).resolve().parents[2] / "shared") / "data" / "adapters"
ROUTERS = ["arrow", "centroid", "softmax", "top_k"]


def linears(model: nn.Module) -> dict[str, MixedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, MixedLinear)}


def weights(model: PeftModel, linear: str) -> tuple[Tensor, Tensor]:
    layer = linears(model.get_base_model())[linear]
    return layer.molora_A["default"].weight, layer.molora_B["default"].weight


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pool(tmp_path_factory.mktemp("pool"))


# -- one adapter is that adapter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["linear", "block"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_one_adapter_is_pefts_lora(family: str, placement: str, tmp_path: Path) -> None:
    path = save_lora(tmp_path / "a", family, lora_alpha=7)
    model = from_adapters(base_model(family), {"a": path}, placement=placement).eval()
    want = logits_of(peft_lora(path, family))
    assert (logits_of(model) - want).abs().max() < 1e-5  # measured 1.2e-6
    assert (want - logits_of(base_model(family))).abs().max() > 1e-2


@pytest.mark.parametrize("router", ["softmax", {"name": "top_k", "top_k": 1}])
def test_one_adapter_under_a_router_that_is_trained(router: Any, tmp_path: Path) -> None:
    path = save_lora(tmp_path / "a")
    model = from_adapters(base_model(), {"a": path}, router).eval()
    assert (logits_of(model) - logits_of(peft_lora(path))).abs().max() < 1e-5


def real(name: str) -> Path:
    path = next((p for p in ADAPTERS.glob("*") if name in p.name), None)
    if path is None:
        pytest.skip("no real adapters: set MOLORA_SHARED to the directory that holds data/adapters")
    return path


def base_for(path: Path) -> nn.Module:
    """A random base with the sizes that the adapter's tensors have, and a small vocabulary."""
    tensors = load_file(path / "adapter_model.safetensors")
    layers = 1 + max(int(next(p for p in key.split(".") if p.isdigit())) for key in tensors)
    first = next(key for key in sorted(tensors) if "lora_A" in key)
    hidden = tensors[first].shape[1]
    torch.manual_seed(0)
    if "query_key_value" in first:
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=97,
                hidden_size=hidden,
                intermediate_size=8,  # no adapter sits there
                num_hidden_layers=layers,
                num_attention_heads=hidden // 128,
                max_position_embeddings=32,
            )
        ).eval()
    layers = max(layers, 12)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=hidden, n_layer=layers, n_head=12, n_positions=32)).eval()


def check_against_peft(model: PeftModel, path: Path) -> None:
    """Compares with PEFT's LoRA on the same base, which takes the experts off it."""
    got, without = logits_of(model.eval()), None
    with model.disable_adapter():
        without = logits_of(model)
    base = model.unload()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = logits_of(PeftModel.from_pretrained(base, path).eval())
    assert (got - want).abs().max() < 1e-5 * want.abs().max()  # measured 4e-6, after 24 layers of width 2048
    assert (want - without).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["tigrinya", "Smart-Review", "deltacompression"])
def test_real_adapters_are_pefts_lora(name: str) -> None:
    path = real(name)
    check_against_peft(from_adapters(base_for(path), {"real": path}), path)


def test_a_real_adapter_that_lacks_weights_is_refused_or_accepted_by_word() -> None:
    path = real("tiny_lora")
    base = base_for(path)
    with pytest.raises(ValueError, match=r"expert 'dialo': .*selects \d+ modules.*no weights, first transformer\.h\."):
        from_adapters(base, {"dialo": path})
    assert not linears(base)
    with pytest.warns(UserWarning, match=r"tiny_lora has no weights for \d+ of the \d+ linears") as caught:
        model = from_adapters(base, {"dialo": path}, allow_partial=True)
    counts = [int(word) for word in str(caught[0].message).split() if word.isdigit()]
    assert counts[1] - counts[0] == len(load_file(path / "adapter_model.safetensors")) // 2 == len(linears(model))
    check_against_peft(model, path)


# -- ranks, scalings, targets, dtypes ----------------------------------------------------------------------------------


def test_each_expert_keeps_its_rank_scaling_and_targets(tmp_path: Path) -> None:
    """Gates that are one for a single expert give that adapter's LoRA, whatever the others are like."""
    paths = {
        "small": save_lora(tmp_path / "small", r=1, lora_alpha=3, target_modules=["q_proj"], seed=1),
        "stable": save_lora(tmp_path / "stable", r=6, lora_alpha=5, use_rslora=True, target_modules=["v_proj"], seed=2),
        "patterned": save_lora(
            tmp_path / "patterned",
            r=4,
            lora_alpha=7,
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 9},
            alpha_pattern={"down_proj": 11},
            seed=3,
        ),
        "layered": save_lora(tmp_path / "layered", layers_to_transform=[1], seed=4),
    }
    model = from_adapters(base_model(), paths, "softmax").eval()
    q = weights(model, "model.layers.1.self_attn.q_proj")
    assert q[0].shape == (4, 9, 32) and weights(model, "model.layers.0.self_attn.q_proj")[0].shape == (4, 4, 32)
    assert not q[0][0, 1:].any() and not q[1][0, 1:].any()
    assert not weights(model, "model.layers.0.self_attn.v_proj")[0][0].any()
    for e, path in enumerate(paths.values()):
        for site in runtime_of(model).sites:
            with torch.no_grad():
                # exp(-1e4) is zero: the gates are exactly those of one expert.
                site.router.weight.zero_()
                site.router.bias = nn.Parameter(torch.full((4,), -1e4).index_fill(0, torch.tensor(e), 0.0))
        assert (logits_of(model) - logits_of(peft_lora(path))).abs().max() < 1e-5


def test_an_expert_is_never_chosen_where_it_has_no_weights(tmp_path: Path) -> None:
    paths = {
        "q": save_lora(tmp_path / "q", target_modules=["q_proj"], seed=1),
        "qv": save_lora(tmp_path / "qv", target_modules=["q_proj", "v_proj"], seed=2),
        "v": save_lora(tmp_path / "v", target_modules=["v_proj"], seed=3),
    }
    for router in ("arrow", "phatgoose"):
        model = from_adapters(base_model(), paths, {"name": router, "top_k": 2}).eval()
        if router == "phatgoose":
            for site in runtime_of(model).sites:
                torch.nn.init.normal_(site.router.weight)
        with record_routing(model) as routing:
            logits_of(model)
        for name, own in routing.items():
            absent = 2 if name.endswith("q_proj") else 0
            assert not own.gates[:, absent].any(), (router, name)
            assert torch.allclose(own.gates.sum(1), torch.ones(len(own.gates)), atol=1e-5)
        # Saved and loaded it is the same.
        model.save_pretrained(tmp_path / router)
        again = PeftModel.from_pretrained(base_model(), tmp_path / router).eval()
        assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize(
    ("dtypes", "alphas", "want"),
    [
        ([torch.float16, torch.float16], [4, 8], torch.float16),
        ([torch.bfloat16, torch.bfloat16], [2, 16], torch.bfloat16),
        ([torch.float32, torch.float32], [5, 7], torch.float32),
        ([torch.float16, torch.bfloat16], [4, 4], torch.float32),
        ([torch.float16, torch.float32], [4, 4], torch.float32),
        ([torch.float16, torch.float16], [4, 6], torch.float32),
    ],
)
def test_no_dtype_rounds_a_weight(
    dtypes: list[torch.dtype], alphas: list[float], want: torch.dtype, tmp_path: Path
) -> None:
    paths = {
        f"e{i}": save_lora(tmp_path / str(i), seed=i, dtype=dtype, lora_alpha=alpha)
        for i, (dtype, alpha) in enumerate(zip(dtypes, alphas, strict=True))
    }
    model = from_adapters(base_model(), paths)
    name = "model.layers.1.mlp.down_proj"
    A, B = weights(model, name)
    assert A.dtype == B.dtype == want
    for e, (path, alpha) in enumerate(zip(paths.values(), alphas, strict=True)):
        tensors = load_file(path / "adapter_model.safetensors")
        own_A, own_B = (tensors[f"base_model.model.{name}.lora_{m}.weight"].float() for m in "AB")
        assert torch.equal(A[e].float(), own_A)
        assert torch.equal(B[e].float(), own_B.T * (alpha / 4))
    assert from_adapters(base_model(), paths, dtype=torch.bfloat16).state_dict()[
        f"base_model.model.{name}.molora_A.default.weight"
    ].dtype == (torch.bfloat16)


@pytest.mark.parametrize(("value", "alpha"), [(6e4, 16), (1.4e-6, 1)], ids=["overflow", "subnormal"])
def test_folding_a_scaling_leaves_the_range_of_fp16(value: float, alpha: float, tmp_path: Path) -> None:
    """A power of two is exact only within the range of the exponents."""
    name = "model.layers.0.self_attn.q_proj"
    B = torch.full((32, 4), value).to(torch.float16) * torch.linspace(0.5, 1, 128).view(32, 4).half()
    path = write_adapter(tmp_path / "a", {name: (torch.randn(4, 32).half(), B)}, 4, alpha, [name])
    model = from_adapters(base_model(), {"a": path})
    assert torch.equal(weights(model, name)[1][0].float(), B.T.float() * (alpha / 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_of_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """Under a base of another dtype the experts keep theirs; the outputs are PEFT's up to rounding of that dtype."""
    path = save_lora(tmp_path / "a", lora_alpha=8)
    model = from_adapters(base_model(dtype=dtype), {"a": path}).eval()
    assert weights(model, "model.layers.1.mlp.down_proj")[0].dtype == torch.float32
    exact = logits_of(peft_lora(path))
    got, pefts = (logits_of(m).float() for m in (model, peft_lora(path, dtype=dtype)))
    assert got.isfinite().all() and (got - exact).norm() < 1.5 * (pefts - exact).norm()


# -- arrow, as PEFT has it ---------------------------------------------------------------------------------------------


def pefts_arrow(paths: list[Path], top_k: int, general: list[Path] | None = None) -> PeftModel:
    config = ArrowConfig(top_k=top_k, router_temperature=1.0, rng_seed=42, use_gks=general is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_arrow_model(
            base_model(), [str(p) for p in paths], config, general_adapter_paths=[str(p) for p in general or []]
        ).eval()


def take_prototypes(model: PeftModel, theirs: PeftModel) -> None:
    """Gives our routers PEFT's prototypes, which one forward has made."""
    for site in runtime_of(model).sites:
        site.router.set_vectors(theirs.get_base_model().get_submodule(site.name).lora_arrow["arrow_router"].prototypes)


@pytest.mark.parametrize("count", [4, 16])
def test_arrow_is_pefts_arrow(count: int, tmp_path: Path) -> None:
    paths = save_pool(tmp_path, count)
    theirs = pefts_arrow(list(paths.values()), top_k=3)
    want = logits_of(theirs)
    model = from_adapters(base_model(), paths, "arrow").eval()
    take_prototypes(model, theirs)
    with record_routing(model) as routing:
        got = logits_of(model)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    inputs: dict[str, Tensor] = {}
    for site in runtime_of(model).sites:
        theirs.get_base_model().get_submodule(site.name).register_forward_pre_hook(
            lambda module, args, name=site.name: inputs.update({name: args[0].flatten(0, -2)})
        )
    logits_of(theirs)
    unsure = 0
    for site in runtime_of(model).sites:
        scores = (inputs[site.name] @ site.router.vectors.T).abs()
        top = scores.topk(4, dim=1).values
        sure = top[:, 2] - top[:, 3] > 1e-5
        unsure += int((~sure).sum())
        kept = scores.masked_fill(scores < top[:, 2:3], float("-inf")).softmax(1)
        assert torch.equal((routing[site.name].gates > 0)[sure], (kept > 0)[sure])
        assert (routing[site.name].gates - kept)[sure].abs().max() < 1e-4
    assert unsure < 3
    # With exact prototypes other experts are chosen: that is what the agreement above depends on.
    assert (logits_of(from_adapters(base_model(), paths).eval()) - want).abs().max() > 1e-3


def test_general_knowledge_is_subtracted_as_in_peft(tmp_path: Path) -> None:
    paths = save_pool(tmp_path, 4)
    general = [save_lora(tmp_path / f"g{i}", seed=50 + i) for i in range(2)]
    theirs = pefts_arrow(list(paths.values()), 2, general)
    want = logits_of(theirs)
    model = from_adapters(base_model(), paths, {"name": "arrow", "top_k": 2}, general=general).eval()
    take_prototypes(model, theirs)
    assert (logits_of(model) - want).abs().max() < 1e-4 * want.abs().max()
    plain = from_adapters(base_model(), paths, {"name": "arrow", "top_k": 2}).eval()
    take_prototypes(plain, theirs)
    assert (logits_of(plain) - want).abs().max() > 1e-2


def test_a_block_has_one_prototype_of_all_that_read_its_input(pool: dict[str, Path]) -> None:
    model = from_adapters(base_model(), pool, placement="block").eval()
    site = next(s for s in runtime_of(model).sites if s.name == "model.layers.1.self_attn.q_proj+v_proj")
    for e, path in enumerate(pool.values()):
        tensors = load_file(path / "adapter_model.safetensors")
        prefix = "base_model.model.model.layers.1.self_attn"
        deltas = [
            tensors[f"{prefix}.{m}.lora_B.weight"].double() @ tensors[f"{prefix}.{m}.lora_A.weight"].double()
            for m in ("q_proj", "v_proj")
        ]
        v = torch.linalg.svd(torch.cat(deltas)).Vh[0]
        assert abs(float(site.router.vectors[e].double() @ v)) > 1 - 1e-6
    with record_routing(model) as routing:
        logits_of(model)
    assert len(routing) == 4 and site.name in routing


# -- use ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_and_loaded_by_peft_it_is_the_same(family: str, tmp_path: Path) -> None:
    base_model(family).save_pretrained(tmp_path / "base")
    paths = save_pool(tmp_path, 3, family)
    base = type(base_model(family)).from_pretrained(tmp_path / "base")
    model = from_adapters(base, paths).eval()
    model.save_pretrained(tmp_path / "out")
    loaded = (
        PeftModel.from_pretrained(base_model(family), tmp_path / "out"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out"),
    )
    for again in loaded:
        assert same_tensors(tensors_of(again), tensors_of(model))
        assert torch.equal(logits_of(again.eval()), logits_of(model))
        assert again.peft_config["default"].expert_names == list(paths)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["num_experts"] == 3 and config["expert_names"] == list(paths)


@pytest.mark.parametrize("router", ["phatgoose", "top_k", "softmax", "arrow"])
def test_experts_are_frozen_and_gates_learn(router: str, pool: dict[str, Path], tmp_path: Path) -> None:
    model = from_adapters(base_model(), pool, router)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if "molora_router" in n}
    assert bool(trainable) == (router != "arrow")
    if not trainable:
        return
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = {"task_labels": torch.tensor([0, 2])} if router == "phatgoose" else {}
    for _ in range(3):
        model(**batch(), **labels).loss.backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in trainable), name
    # PEFT's own switches do not thaw them.
    model.set_adapter("default")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trainable


def test_thawed_experts_train(pool: dict[str, Path]) -> None:
    model = from_adapters(base_model(), pool, freeze_experts=False)
    before = {n: p.clone() for n, p in model.named_parameters() if "molora_" in n}
    assert before and all(p.requires_grad == (n in before) for n, p in model.named_parameters())
    assert train(model, 4)[-1] < train(model, 1)[0] + 10
    assert not any(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_with_a_cache_is_generation_without(family: str, tmp_path: Path) -> None:
    model = from_adapters(base_model(family), save_pool(tmp_path, 3, family)).eval()
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    found = [
        model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=cache, eos_token_id=None)
        for cache in (True, False)
    ]
    assert torch.equal(*found)
    base = base_model(family).generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert not torch.equal(found[0], base)


@pytest.mark.parametrize("router", ["arrow", "softmax", "phatgoose"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(router: str, reentrant: bool, pool: dict[str, Path]) -> None:
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = from_adapters(base_model(), pool, router, freeze_experts=router != "arrow").train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        labels = {"task_labels": torch.tensor([1, 0])} if router == "phatgoose" else {}
        model(**batch(), **labels).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0] and grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[1][n], grads[0][n], rtol=1e-5, atol=1e-7) for n in grads[0])
    assert any(g.any() for g in grads[0].values())
