"""One expert more or less in a mixture of LoRA adapters, while the model is in use."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molora.adapters.from_adapters import check_name, check_range, experts_of, linears_of, pairs_of, replace_experts
from molora.adapters.lora_files import LoraPair
from molora.adapters.places import (
    VACANT,
    Changes,
    Pause,
    apply_changes,
    forget_use,
    make_places,
    no_pause,
    place_to_leave,
    pool_of,
    renew,
    routers_of,
)
from molora.centroids import check_texts, example_vectors
from molora.context import Runtime
from molora.linear import MixedLinear
from molora.prototypes import prototypes


def add_expert(
    model: Any,
    name: str,
    path: str | os.PathLike[str],
    *,
    examples: Sequence[str] | None = None,
    tokenizer: Any = None,
    allow_partial: bool = False,
    adapter_name: str | None = None,
) -> None:
    """Adds a LoRA adapter as one more expert of a mixture whose router needs no training.

    The weights are rounded to the dtype of the experts that are there.

    Args:
        model: made by `from_adapters`, or loaded from what it saved.
        name: of the new expert.
        path: a PEFT LoRA of the same base: directory or hub id. It may leave linears out, and may not have others.
        examples, tokenizer: example prompts of the new expert, for routers "centroid" and "retrieval".
        allow_partial: see `from_adapters`.
        adapter_name: the active adapter if None.

    Raises:
        ValueError: a name that is taken, a router that would have to be trained, an adapter that is refused; the model
            is then as it was.
    """
    new = prepare_expert(
        model,
        name,
        path,
        examples=examples,
        tokenizer=tokenizer,
        allow_partial=allow_partial,
        adapter_name=adapter_name,
    )
    new.add()


@dataclass(frozen=True, kw_only=True)
class NewExpert:
    """An expert that was read and checked for a pool; it is in the pool from `add` on.

    Attributes:
        weights: for each linear of the pool A (1, R, D) and B (1, R, O), zeros where the adapter leaves it out.
        vectors: for each router, by name, the expert's (1, D'); None: `add` makes them of its example prompts, for
            which it runs the model.
        others: the names of the places that there were.
    """

    name: str
    runtime: Runtime
    adapter: str
    config: Any
    weights: Mapping[MixedLinear, tuple[Tensor, Tensor]]
    vectors: Mapping[str, Tensor] | None
    others: tuple[str, ...]
    examples: Sequence[str]
    tokenizer: Any

    @torch.no_grad()
    def add(self, pause: Pause = no_pause, room: int = 1) -> None:
        """Puts the expert into a vacant place of its pool, or makes places.

        Args:
            pause: no forward may run in it. Where a place takes the expert as it is and its vectors are known, most is
                done beside forwards: no token goes to a place whose vector is zero.
            room: places that are made where there is none.

        Raises:
            ValueError: the pool changed since the expert was prepared.
        """
        runtime, adapter, others = self.runtime, self.adapter, self.others
        if tuple(self.config.expert_names) != others:
            raise ValueError(f"the pool changed while expert {self.name!r} was read; add it again")
        place = others.index(VACANT) if VACANT in others else len(others)
        ranks = {layer: A.shape[1] for layer, (A, _) in self.weights.items()}
        moves = place == len(others) or any(r > layer.molora_specs[adapter][""].r for layer, r in ranks.items())
        changes: Changes = []
        if beside := not moves and self.vectors is not None:
            self._write(place)
            changes = self._changes(place, self.vectors or {})
        with pause(moves):
            vectors = self.vectors or self._of_examples()
            if moves:
                make_places(runtime, adapter, self.config, room if place == len(others) else 0, ranks)
            if not beside:
                self._write(place)
            apply_changes(changes or self._changes(place, vectors))
            self.config.expert_names[place] = self.name
            forget_use(runtime, adapter)

    def _of_examples(self) -> dict[str, Tensor]:
        base = self.runtime.model()
        assert base is not None
        examples = {self.name: self.examples}
        return example_vectors(base, self.runtime, self.adapter, self.config.router, examples, self.tokenizer)

    def _write(self, place: int) -> None:
        """Copies the weights into a place."""
        changes: Changes = []
        for layer, new in self.weights.items():
            old = experts_of(layer, self.adapter)
            changes += [(stacked[place], own[0]) for stacked, own in zip(old, new, strict=True)]
        apply_changes(changes)

    def _changes(self, place: int, vectors: Mapping[str, Tensor]) -> Changes:
        routers = routers_of(self.runtime, self.adapter)
        return [change for site, (vector,) in vectors.items() for change in routers[site].changes(place, vector)]


@torch.no_grad()
def prepare_expert(
    model: Any,
    name: str,
    path: str | os.PathLike[str],
    *,
    examples: Sequence[str] | None = None,
    tokenizer: Any = None,
    allow_partial: bool = False,
    adapter_name: str | None = None,
) -> NewExpert:
    """What takes time of `add_expert`, with its arguments and errors: reading, checking, prototypes. It changes nothing
    and may run beside forwards of the model."""
    runtime, adapter, config = pool_of(model, adapter_name)
    check_name(name)
    if name in config.expert_names:
        raise ValueError(f"there is an expert {name!r} already; delete it first, or choose another name")
    if config.router.has_centroids and (not examples or isinstance(examples, str) or tokenizer is None):
        raise ValueError(
            f"router {config.router.name!r} knows experts by example prompts; call add_expert(name, path, "
            "examples=[...], tokenizer=tokenizer)"
        )
    if examples is not None:
        check_texts(name, examples)
    for router in routers_of(runtime, adapter).values():
        router.check_set()
    base = runtime.model()
    assert base is not None
    try:
        pairs = pairs_of(base, path, allow_partial)
    except ValueError as error:
        raise ValueError(f"expert {name!r}: {error}") from error
    linears = linears_of(runtime, adapter)
    if strange := [linear for linear in pairs if linear not in linears]:
        raise ValueError(
            f"expert {name!r} ({path}) adapts {len(strange)} linears that no expert of this model does, first "
            f"{strange[0]}; make the model anew with from_adapters"
        )
    first: Any = next(iter(linears.values()))
    check_range(name, pairs, first.molora_A[adapter].weight.dtype)
    weights = {layer: _weights(layer, adapter, pairs.get(linear)) for linear, layer in linears.items()}
    return NewExpert(
        name=name,
        runtime=runtime,
        adapter=adapter,
        config=config,
        weights=weights,
        vectors=None if config.router.has_centroids else prototypes(runtime, adapter, experts=weights),
        others=tuple(config.expert_names),
        examples=examples or (),
        tokenizer=tokenizer,
    )


def delete_expert(model: Any, name: str, *, adapter_name: str | None = None) -> None:
    """Takes an expert out of a mixture whose router needs no training.

    Raises:
        ValueError: an unknown name, the last expert, or a router that would have to be trained.
    """
    runtime, adapter, config = pool_of(model, adapter_name)
    gone = place_to_leave(config, adapter, name)
    kept = [i for i in range(len(config.expert_names)) if i != gone]
    for layer in linears_of(runtime, adapter).values():
        A, B = experts_of(layer, adapter)
        replace_experts(layer, adapter, A[kept], B[kept])
    vectors = {site: router.vectors[kept] for site, router in routers_of(runtime, adapter).items()}
    renew(runtime, adapter, config, [config.expert_names[i] for i in kept], vectors)


def _weights(layer: MixedLinear, adapter: str, pair: LoraPair | None) -> tuple[Tensor, Tensor]:
    """A (1, R, D) and B (1, R, O) of one expert for a linear, of its rank there or a higher one."""
    r = layer.molora_specs[adapter][""].r if pair is None else max(layer.molora_specs[adapter][""].r, len(pair.A))
    A, B = (torch.zeros(1, r, w.shape[2], dtype=w.dtype, device=w.device) for w in experts_of(layer, adapter))
    if pair is not None:
        A[0, : len(pair.A)] = pair.A.to(A.device)
        B[0, : len(pair.A)] = pair.B.T.to(B.device).float() * pair.scaling
    return A, B
