"""Routers: hidden states -> `Routing`. They know no kernel and no model.

A new router is one file with a `RouterConfig` and a `Router`, and one line in `ROUTERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from molora.checks import check_choice
from molora.routers.arrow import Arrow
from molora.routers.base import Router, RouterConfig, RouterLosses, Routing, SiteStats, Tokens
from molora.routers.centroid import Centroid
from molora.routers.phatgoose import Phatgoose
from molora.routers.rank_wise import RankWise
from molora.routers.retrieval import Retrieval
from molora.routers.softmax import Softmax
from molora.routers.threshold import Threshold
from molora.routers.top_k import TopK
from molora.routers.top_p import TopP
from molora.routers.tsallis import Tsallis
from molora.suggest import unknown_key_message

__all__ = [
    "ROUTERS",
    "Arrow",
    "Centroid",
    "Phatgoose",
    "RankWise",
    "Retrieval",
    "Router",
    "RouterConfig",
    "RouterLosses",
    "Routing",
    "SiteStats",
    "Softmax",
    "Threshold",
    "Tokens",
    "TopK",
    "TopP",
    "Tsallis",
    "router_config",
]

_CONFIGS: tuple[type[RouterConfig], ...] = (
    *(TopK, TopP, Tsallis, RankWise, Threshold, Softmax),
    *(Centroid, Arrow, Retrieval, Phatgoose),
)
ROUTERS: dict[str, type[RouterConfig]] = {config.name: config for config in _CONFIGS}


def router_config(value: RouterConfig | Mapping[str, Any] | str) -> RouterConfig:
    """The typed config of a router given as itself, as a dict with a ``"name"`` (default: top_k), or as a name.

    Raises:
        ValueError: an unknown router or key, with the nearest valid one; or neither a config, nor a dict, nor a name.
    """
    if isinstance(value, RouterConfig) and type(value) in _CONFIGS:
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"router={value!r} must be a router config, a dict or a name")
    options = dict(value)
    name = options.pop("name", TopK.name)
    check_choice("router", name, ROUTERS)
    if "pool_layers" in options:  # how adapters saved before 0.2 say balance_pool
        options["balance_pool"] = "model" if options.pop("pool_layers") else "router"
    valid = [f.name for f in fields(ROUTERS[name])]
    for key in options:
        if key not in valid:
            raise ValueError(unknown_key_message(f"router {name!r}", key, valid))
    return ROUTERS[name](**options)
