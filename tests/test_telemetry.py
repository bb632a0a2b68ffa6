"""The routing in the trainer's log: figures against plain counts, no copy from the device per step, collapse named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import base_model, batch, config
from transformers import Trainer, TrainingArguments

from molora import record_routing, routing_report
from molora.context import runtime_of
from molora.telemetry import RouterUse
from molora.train.routing_log import RoutingLog, collapse_warning

METRICS = {"largest_load", "entropy_before", "entropy_after", "top1_share", "dead_experts", "load", "mean_gate"}


def fit(model: PeftModel, folder: Path, steps: int, every: int, **callback: Any) -> list[dict[str, Any]]:
    """The log of a Trainer over one batch again and again; lines of the training loss only."""
    rows = [{k: v[i] for k, v in batch(rows=4).items()} for i in range(4)]
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        logging_steps=every,
        learning_rate=0.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
    )
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[RoutingLog(**callback)])
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def test_the_log_has_every_router(tmp_path: Path) -> None:
    model = get_peft_model(base_model(), config("block"))
    names = [site.name for site in runtime_of(model).sites]
    first, second = fit(model, tmp_path, steps=4, every=2)
    for line in (first, second):
        for name in names:
            assert {k.rpartition("/")[2] for k in line if k.startswith(f"routing/{name}/")} == METRICS
            load, gate = line[f"routing/{name}/load"], line[f"routing/{name}/mean_gate"]
            assert abs(sum(load) - 1) < 1e-6 and abs(sum(gate) - 1) < 1e-5
            assert line[f"routing/{name}/largest_load"] == max(load)
            assert 0 <= line[f"routing/{name}/entropy_after"] <= line[f"routing/{name}/entropy_before"] <= 1 + 1e-6
        assert line["largest_load"] == max(line[f"routing/{n}/largest_load"] for n in names)
        assert line["dead_experts"] == sum(line[f"routing/{n}/dead_experts"] for n in names)
    # Two batches of two rows make each line at learning rate 0, so both lines are of the same tokens.
    assert all(first[f"routing/{n}/load"] == second[f"routing/{n}/load"] for n in names)


def test_the_report_is_of_all_micro_batches_without_padding() -> None:
    model = get_peft_model(base_model(), config("linear")).train()
    want: dict[str, torch.Tensor] = {}
    tokens = 0
    for seed in (3, 4, 5):
        inputs = batch(seed=seed)
        with record_routing(model) as routing:
            model(**inputs).loss.backward()
        real = inputs["attention_mask"].flatten().bool()
        tokens += int(real.sum())
        for name, record in routing.items():
            want[name] = want.get(name, 0) + (record.gates[real] > 0).double().sum(0)
    report = routing_report(model)
    assert report.keys() == want.keys()
    for name, use in report.items():
        assert use.tokens == tokens and use.active == pytest.approx(2)
        assert torch.tensor(use.load) == pytest.approx((want[name] / want[name].sum()).numpy(), abs=1e-6)
    assert routing_report(model) == {}  # each report starts anew


def test_no_step_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two lines of the log nothing is copied to the host: the report does all of it at once."""
    from molora import telemetry

    model = get_peft_model(base_model(), config("linear")).train()
    copies: list[int] = []
    use = telemetry._use
    monkeypatch.setattr(telemetry, "_use", lambda row: (copies.append(1), use(row))[1])
    # Not a count of transfers, which a CPU does not have: tensors that a step would read raise.
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def guarded(self: torch.Tensor, *args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            assert not guard or self.device.type == "cpu" and self.dtype == torch.int64, f"{name} in a step"
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, guarded)
    guard = False
    inputs = batch()
    for _ in range(2):
        model(**inputs)  # warms what is read once
    runtime = runtime_of(model)
    stats = dict(runtime.last.stats)
    guard = True
    from molora.record import count_choices

    count_choices(stats, runtime.sites, runtime.window, runtime.use)
    count_choices(stats, runtime.sites, runtime.window, runtime.use)
    guard = False
    assert not copies
    assert len(routing_report(model)) == len(copies) == len(runtime.sites)


def collapsed(num_experts: int = 4) -> PeftModel:
    """Every router sends every token to experts 0 and 1: all hidden states share a direction it looks along."""
    base = base_model()
    with torch.no_grad():
        base.model.embed_tokens.weight.add_(3.0)
    options = {"top_k": 2, "init_std": 0.01, "router_aux_loss_coef": 0.0}
    model = get_peft_model(base, config("ffn", num_experts=num_experts, router=options))
    with torch.no_grad():
        for site in runtime_of(model).sites:
            site.router.weight[:2] += 1.0
    return model


def test_a_collapsed_router_is_named_once(tmp_path: Path) -> None:
    said: list[str] = []
    lines = fit(collapsed(), tmp_path, steps=3, every=1, warn=said.append)
    assert [line["routing/model.layers.0.mlp/dead_experts"] for line in lines] == [2, 2, 2]
    first = [text for text in said if "model.layers.0.mlp" in text]
    assert first == [
        "the router of model.layers.0.mlp has collapsed: by step 1 its tokens go to 2 of 4 experts (0, 1); raise "
        "router.router_aux_loss_coef, or lower the learning rate"
    ]
    with pytest.warns(UserWarning, match="the router of model.layers.0.mlp has collapsed"):
        fit(collapsed(), tmp_path, steps=1, every=1)
    healthy: list[str] = []
    fit(get_peft_model(base_model(), config("linear")), tmp_path, steps=2, every=1, warn=healthy.append)
    assert not healthy


@pytest.mark.parametrize(
    ("gate", "entropy", "active", "dead", "is_collapsed"),
    [
        ([0.5, 0.5, 0.0, 0.0], 0.5, 2.0, 2, True),
        ([0.5, 0.4, 0.1, 0.0], 0.5, 2.0, 1, False),
        ([1.0, 0.0, 0.0, 0.0], 0.0, 4.0, 3, True),  # dense, and one expert has all the weight
        ([0.25] * 4, 1.0, 4.0, 0, False),
        ([1.0], 0.0, 1.0, 0, False),  # there is nothing to collapse to
        ([1.0, 1.0], 1.0, 2.0, 0, False),  # every token uses both
        ([0.4, 0.3, 0.3, 1e-9], 0.3, 3.2, 1, False),  # soft: a token's gates are worth one or two of the three alive
    ],
)
def test_what_counts_as_collapse(
    gate: list[float], entropy: float, active: float, dead: int, is_collapsed: bool
) -> None:
    use = RouterUse(10.0, gate, gate, 1.0, entropy, 1.0, active)
    assert (use.dead_experts, use.collapsed) == (dead, is_collapsed)
    assert "collapsed: by step 7" in collapse_warning("x", use, 7)


def test_record_routing_twice_is_refused() -> None:
    model = get_peft_model(base_model(), config("linear"))
    with record_routing(model):
        with pytest.raises(ValueError, match="already recording this model"), record_routing(model):
            pass
        model(**batch())
    with record_routing(model) as routing:
        pass
    assert len(routing) == 0
    with pytest.raises(ValueError, match="no mixture"), record_routing(base_model()):
        pass
