"""Gates that a caller changes token by token: an expert forced, forbidden or favoured, or all of them silenced."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from molora.routers import Routing


class TokenSteering(NamedTuple):
    """What is done to the gates g (T, G) of a forward: ``(1 - sum add) * kept(g) + add``, where kept(g) is g at the
    experts that may be used, scaled to the sum that g had (0 where nothing of g is left).

    Attributes:
        keep: (T, G), 1 where an expert may be used, else 0.
        add: (T, G), parts of 1 that an expert gets whatever the router says.
    """

    keep: Tensor
    add: Tensor


def steered(routing: Routing, steering: TokenSteering | None) -> Routing:
    """The routing with its gates changed; as it is without a steering.

    A token that keeps every expert and is added none has the gates that it had, bit for bit.
    """
    if steering is None:
        return routing
    gates = routing.gates
    keep, add = (part[:, : gates.shape[1]].to(gates) for part in steering)
    kept = gates * keep
    total, left = gates.sum(1, keepdim=True), kept.sum(1, keepdim=True)
    scale = (total / left).where(left > 0, 1.0).where(keep.amin(1, keepdim=True) < 1, 1.0)
    changed = (1 - add.sum(1, keepdim=True)) * scale * kept + add
    return routing._replace(gates=changed, topk_ids=None)
