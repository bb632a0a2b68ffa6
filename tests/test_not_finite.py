"""A loss or a gradient that is not finite stops training in one sentence, at the first step where it is, and is never
saved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import molora, write_recipe
from tiny_lm import save_tiny

from molora.train import watched
from molora.train.finite import MAX_SKIPPED, NEVER, FiniteWatch, largest
from molora.train.recipe import read_recipe
from molora.train.run import train
from molora.train.watched import WatchedTrainer

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base"))


class Poison(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * float("inf")


def spoil(monkeypatch: pytest.MonkeyPatch, step: int, how: str, micro_batch: int = 0) -> None:
    """From one micro-batch of one step on: logits of task "odd" are NaN, the loss is, or a gradient on its way down."""
    original, counts = WatchedTrainer.compute_loss, {"all": 0}

    def compute_loss(self: WatchedTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        now = (
            self.state.global_step + 1 == step and counts["all"] % self.args.gradient_accumulation_steps == micro_batch
        )
        counts["all"] += 1
        if not now:
            return original(self, model, inputs, *args, **kwargs)
        tasks = inputs["task"]

        def hook(module: Any, inputs_: Any, output: Any) -> Any:
            if how == "gradient":
                return Poison.apply(output)
            output = output.clone()
            output[tasks == 1] = float("nan")
            return output

        layers = dict(model.named_modules())
        target = next(m for n, m in layers.items() if n.endswith(UP if how == "gradient" else "lm_head"))
        handle = target.register_forward_hook(hook) if how != "loss" else None
        result = original(self, model, inputs, *args, **kwargs)
        if handle is not None:
            handle.remove()
            return result
        return result * float("nan")

    monkeypatch.setattr(WatchedTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("logits", "at step 6 the logits gave rows of task 'odd' a loss that is not finite"),
        ("loss", "at step 6 the loss was not finite, though the logits gave every row a finite one"),
        # What follows up_proj in the forward is behind the infinity in the backward; up_proj's own B is the first.
        ("gradient", rf"at step 6 the gradient of {re.escape(UP)}\.molora_B\.default\.weight was not finite \(of \d+ "),
    ],
)
def test_training_stops_with_the_step_the_place_and_the_checkpoint(
    how: str,
    message: str,
    base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The log looks two steps later; what was spread meanwhile is not blamed, and checkpoint-8 is not written."""
    recipe, out = (
        write_recipe(tmp_path, base, logging_steps=4, save_steps=4, gradient_accumulation_steps=2),
        tmp_path / "out",
    )
    spoil(monkeypatch, 6, how, micro_batch=1)
    assert molora("train", recipe, "evaluation.before=false") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(f"training stopped: {message}", line), line
    assert f"; {out / 'checkpoint-4'} is the last checkpoint and is from before; --resume would repeat this" in line
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not (out / "adapter_model.safetensors").exists()


def test_what_is_not_finite_is_not_saved(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter spoiled behind the watch's back, which no loss has seen yet."""
    recipe = read_recipe(write_recipe(tmp_path, base), ["evaluation.before=false"])

    original, lines = watched.Throughput.collect, iter((1, 2))

    def collect(self: Any) -> Any:
        if next(lines) == 2:  # behind the last look before a save
            parameter = next(p for n, p in self.model.named_parameters() if "molora_B" in n)
            parameter.data.view(-1)[0] = float("inf")
        return original(self)

    monkeypatch.setattr(watched.Throughput, "collect", collect)
    with pytest.raises(FloatingPointError, match=r"layers\.0\..*molora_B.* holds values that are not finite \(1 param"):
        train(recipe)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_the_first_step_counts_and_no_step_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    watch = FiniteWatch(model, ["a", "b"], fp16=False, hidden=False, device="cpu")
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy", "nonzero"):
            patch.setattr(torch.Tensor, name, lambda *args, name=name: pytest.fail(f"{name} in a step"))
        for step, sums, scale in (
            (1, [1.0, 2.0], 1.0),
            (2, [1.0, float("inf")], 1.0),
            (3, [float("nan")] * 2, float("nan")),
        ):
            model(torch.full((2, 3), scale)).sum().backward()
            watch.loss(step, torch.tensor(float(sum(sums))), torch.tensor(sums, dtype=torch.float64))
            watch.gradients(step)
            model.zero_grad()
    assert watch.first.tolist() == [2, 3]
    assert watch.verdict() == "at step 2 the logits gave rows of task 'b' a loss that is not finite"
    watch.first[0] = NEVER
    # NaN inputs spoil the weights' gradients, and not those of the biases.
    want = "at step 3 the gradient of 1.weight was not finite (of 2 among 4 parameters the first in the backward)"
    assert watch.verdict() == want


def test_the_largest_magnitudes_are_those_of_plain_loops() -> None:
    tensors = [
        torch.randn(4, 3),
        None,
        torch.tensor([1.0, float("nan")]),
        torch.empty(0),
        torch.tensor([-float("inf")]),
    ]
    got = largest(tensors, torch.zeros(5))
    want = [tensors[0].abs().max().item(), 0.0, float("nan"), 0.0, float("inf")]
    assert torch.equal(got.nan_to_num(7.0, 8.0), torch.tensor(want).nan_to_num(7.0, 8.0))
    assert got.isfinite().tolist() == [True, True, False, True, False]


def test_fp16_gives_up_only_after_many_skipped_steps(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Infinite gradients, of which the loss scaling skips the steps, are told only where too many come in a row."""
    watch = FiniteWatch(torch.nn.Linear(2, 2), [], fp16=True, hidden=False, device="cpu")
    bad = torch.full((2, 2), float("inf"))
    for step in range(1, 3 * MAX_SKIPPED):
        watch.parameters[0].grad = torch.zeros(2, 2) if step == MAX_SKIPPED else bad  # a step that is taken begins anew
        watch.gradients(step)
        in_a_row = step if step < MAX_SKIPPED else step - MAX_SKIPPED
        wrong = watch.verdict()
        assert (wrong is None) == (in_a_row <= MAX_SKIPPED)
    assert wrong is not None and wrong.startswith(f"{in_a_row} steps in a row up to step {step} were skipped by fp16's")

    original, seen = WatchedTrainer.training_step, FiniteWatch.gradients

    def training_step(self: WatchedTrainer, *args: Any) -> torch.Tensor:
        self.args.fp16 = True
        return original(self, *args)

    def gradients(self: FiniteWatch, step: int) -> None:
        kept = [p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, float("inf"))
        seen(self, step)
        for parameter, grad in zip(self.parameters, kept, strict=True):
            parameter.grad = grad

    monkeypatch.setattr(WatchedTrainer, "training_step", training_step)
    monkeypatch.setattr(FiniteWatch, "gradients", gradients)
    recipe = write_recipe(tmp_path, base, max_steps=30, save_steps=10)
    with pytest.raises(FloatingPointError, match=r"2\d steps in a row up to step 2\d were skipped by fp16's"):
        train(read_recipe(recipe, ["evaluation.before=false"]))


def test_losses_are_not_hidden(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers puts the mean of the losses before in place of one that is not finite, unless told not to."""
    from molora.train.prepare import training_arguments

    recipe = write_recipe(tmp_path, base)
    assert training_arguments(read_recipe(recipe)).logging_nan_inf_filter is False
    assert molora("train", recipe, "training.logging_nan_inf_filter=true") == 2
    assert "stops the run instead of being hidden; remove it" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_largest_magnitudes_on_a_gpu() -> None:
    tensors = [torch.randn(400, 300), torch.tensor([1.0, float("nan"), 2.0]), torch.tensor([-float("inf"), 3.0])]
    got = largest([tensor.cuda() for tensor in tensors], torch.zeros(3, device="cuda")).cpu()
    assert got[0] == tensors[0].abs().max() and got[1].isnan() and got[2].isinf()


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [1, 30])
def test_fp16_on_a_gpu(steps: int, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is infinite in one step is skipped and the run goes on; where it is in all, the run ends."""
    original = WatchedTrainer.compute_loss

    def compute_loss(self: WatchedTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= steps:
            return original(self, model, inputs, *args, **kwargs)
        layer = next(m for n, m in model.named_modules() if n.endswith(UP))
        handle = layer.register_forward_hook(lambda module, inputs, output: Poison.apply(output))
        result = original(self, model, inputs, *args, **kwargs)
        handle.remove()
        return result

    monkeypatch.setattr(WatchedTrainer, "compute_loss", compute_loss)
    recipe = read_recipe(
        write_recipe(tmp_path, base, fp16=True, max_steps=30, save_steps=30),
        ["evaluation={before: false, after: false}"],
    )
    if steps == 1:
        assert train(recipe)["training"]["steps"] == 30
    else:
        with pytest.raises(FloatingPointError, match=rf"steps in a row up to step \d+ .* {re.escape(UP)}"):
            train(recipe)
