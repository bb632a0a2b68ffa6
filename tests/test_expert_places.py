"""Experts that come into vacant places of a pool, of which no tensor is replaced."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_pools import KINDS, extra, make, outputs, same_models
from lora_adapters import copy_lora, edit_weights
from lora_pools import save_lora, save_pool, tensors_of
from peft import PeftModel
from tiny_models import base_model
from torch import Tensor
from torch.nn.functional import pad

import molora
from molora import from_adapters
from molora.adapters.expert_pool import prepare_expert
from molora.adapters.places import reserve_places, vacate_expert


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pool(tmp_path_factory.mktemp("pool"), 4)


def pointers(model: PeftModel) -> list[int]:
    tensors = itertools.chain(model.parameters(), model.buffers())
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("placement", ["linear", "block"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_vacant_places_the_mixture_is_that_of_the_experts_there_are(
    kind: str, placement: str, paths: dict[str, Path]
) -> None:
    """And no tensor is replaced as they come and go: a CUDA graph may go on reading them."""

    def close(there: list[str]) -> None:
        anew = make(kind, {name: paths[name] for name in there}, placement=placement)
        torch.testing.assert_close(outputs(model), outputs(anew), rtol=1e-5, atol=1e-5)

    told: list[bool] = []

    @contextlib.contextmanager
    def pause(moves: bool) -> Iterator[None]:
        told.append(moves)
        yield

    model = make(kind, {"sql": paths["sql"]}, placement=placement)
    reserve_places(model, 3)
    at_first, names = pointers(model), model.peft_config["default"].expert_names
    close(["sql"])
    for name in ("math", "code"):
        prepare_expert(model, name, paths[name], **extra(kind, name)).add(pause)
    close(["sql", "math", "code"])
    vacate_expert(model, "math", pause)
    close(["sql", "code"])
    prepare_expert(model, "chat", paths["chat"], **extra(kind, "chat")).add(pause)
    close(["sql", "chat", "code"])
    assert names == ["sql", "chat", "code", ""] and pointers(model) == at_first and told == [False] * 4
    model.delete_expert("sql")
    close(["chat", "code"])


def test_beside_forwards_the_weights_and_in_the_pause_the_rest(paths: dict[str, Path]) -> None:
    model = make("arrow", dict(list(paths.items())[:2]))
    reserve_places(model, 1)
    before, seen = outputs(model), list[Tensor]()

    @contextlib.contextmanager
    def pause(moves: bool) -> Iterator[None]:
        weights = [w for n, w in tensors_of(model).items() if "molora_B" in n]
        assert weights and all(bool(w[2].any()) for w in weights)
        seen.append(outputs(model))
        yield

    prepare_expert(model, "code", paths["code"]).add(pause)
    assert torch.equal(seen[0], before) and not torch.equal(outputs(model), before)


def test_where_no_place_takes_an_expert_places_are_made(paths: dict[str, Path], tmp_path: Path) -> None:
    told: list[bool] = []

    def pause(moves: bool) -> Any:
        told.append(moves)
        return contextlib.nullcontext()

    model = make("arrow", {"sql": paths["sql"]})
    prepare_expert(model, "math", paths["math"]).add(pause, room=3)
    prepare_expert(model, "code", paths["code"]).add(pause, room=3)
    config = model.peft_config["default"]
    assert config.expert_names == ["sql", "math", "code", ""] and config.num_experts == 4 and told == [True, False]
    wide = save_lora(tmp_path / "wide", seed=9, r=7)
    prepare_expert(model, "wide", wide).add(pause, room=3)  # a place is there, but its ranks are too few
    assert config.expert_names == ["sql", "math", "code", "wide"] and config.r == 7 and told == [True, False, True]
    anew = make("arrow", {**{n: paths[n] for n in ("sql", "math", "code")}, "wide": wide})
    assert same_models(model, anew)


@pytest.mark.parametrize("full", [True, False])
def test_where_memory_runs_out_the_model_is_as_it_was(
    full: bool, paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While places are made, and while those that are there get more ranks."""
    model, left = make("arrow", {"sql": paths["sql"]}), iter(range(5))
    if not full:
        reserve_places(model, 1)
    wide = save_lora(tmp_path / "wide", seed=9, r=7)

    def short(*args: Any) -> Tensor:
        if next(left, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pad(*args)

    monkeypatch.setattr("molora.adapters.places.pad", short)
    with pytest.raises(torch.OutOfMemoryError):
        model.add_expert("wide", wide)
    monkeypatch.undo()
    anew = make("arrow", {"sql": paths["sql"]})
    assert torch.equal(outputs(model), outputs(anew))
    for each in (model, anew):
        each.add_expert("wide", wide)
    assert torch.equal(outputs(model), outputs(anew))


def test_of_an_expert_that_has_left_or_was_refused_nothing_stays(paths: dict[str, Path], tmp_path: Path) -> None:
    """Its ranks may overflow where it has no gate, and zero times infinity is no zero."""
    huge = copy_lora(paths["math"], tmp_path / "huge")
    edit_weights(huge, lambda tensors: [t.div_(t.abs().max()).mul_(1e38) for t in tensors.values()])
    model = make("centroid", {"sql": paths["sql"]})
    reserve_places(model, 1)
    alone = outputs(model)
    prepare_expert(model, "huge", huge, **extra("centroid", "math")).add()
    assert not bool(outputs(model).isfinite().all())
    vacate_expert(model, "huge")
    assert torch.equal(outputs(model), alone)
    refused = dataclasses.replace(prepare_expert(model, "huge", huge, **extra("centroid", "math")), tokenizer=None)
    with pytest.raises(TypeError):  # as its examples are read
        refused.add()
    assert torch.equal(outputs(model), alone)


def test_places_are_no_experts(paths: dict[str, Path]) -> None:
    model = make("arrow", {"sql": paths["sql"]})
    reserve_places(model, 2)
    with pytest.raises(ValueError, match="'sql' is the last expert"):
        vacate_expert(model, "sql")
    for call in (vacate_expert, molora.delete_expert):
        with pytest.raises(ValueError, match="there is no expert ''; there are sql$"):
            call(model, "")
    with pytest.raises(ValueError, match="there is an expert 'sql' already"):
        model.add_expert("sql", paths["sql"])
    with pytest.raises(ValueError, match="expert name '' must be a word"):
        model.add_expert("", paths["math"])
    with pytest.raises(ValueError, match="is trained for its experts"):
        reserve_places(from_adapters(base_model(), paths, "top_k"), 1)
