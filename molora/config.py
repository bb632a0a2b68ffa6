"""MoloraConfig: what a mixture of LoRA experts is, in PEFT's words."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from peft import PeftConfig, TaskType
from peft.utils import CONFIG_NAME

from molora.checks import check_bool, check_choice, check_fraction, check_int, check_names, check_number
from molora.init_experts import check_init
from molora.presets import preset_options
from molora.routers import RouterConfig, router_config
from molora.suggest import unknown_key_message

FORMAT_VERSION = 1
REGIONS = ("ffn-linear", "attention-linear")
"""Words for the linears inside FFNs, and for all others but the output head."""

Placement = Literal["linear", "block", "ffn", "ffn_linear"]


class PeftTypeName(str):
    """A key of PEFT's tables that is no member of its enum: equal to its string, with the enum's `.value`.

    PEFT looks methods up by equality and hash, transformers reads `.value`; a string subclass serves both, and unlike
    an added enum member it can be unpickled in a process that has not registered it yet.
    """

    @property
    def value(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"  # as the enum's members; PEFT's status report cuts the name off this


MOLORA = PeftTypeName("MOLORA")

# What a saved config must hold: a default in its place would load without a word and compute something else.
_FUNCTION = ("num_experts", "r", "lora_alpha", "use_rslora", "placement", "target_modules", "router")
_PLAIN_LORA_KEYS = ("target_modules", "exclude_modules", "r", "lora_alpha")


@dataclass
class MoloraConfig(PeftConfig):
    """Configuration of a mixture of LoRA experts, with PEFT's names.

    An unknown key, at any depth, is a ValueError that names the nearest valid one (PEFT only warns).

    Attributes:
        num_experts: experts in each mixture, >= 1; or a list, one number for each decoder layer, or four for the
            quarters of the depth (MoLA).
        r: rank of one expert, >= 1.
        lora_alpha: the factor of an expert's product is lora_alpha / r (lora_alpha / sqrt(r) with `use_rslora`).
        lora_dropout: probability of dropping an input feature of the experts, 0 <= p < 1; the router sees all of them.
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        init_lora_weights: True: A uniform, B zero, so that a fresh mixture is the base; "gaussian": A normal with
            standard deviation 1/r, B zero; "orthogonal": PEFT's, neither zero, but each expert's product (r even, no
            share_A, not with router "rank_wise"); "eva": as True until `molora.initialize_eva_weights` has seen data;
            "imported": none, because adapters give them (`from_adapters`); False: both uniform, for tests. What would
            change the base ("pissa", "olora", "lora_ga", ...) is refused.
        share_A: one A for all experts of a mixture (HydraLoRA).
        shared_basis: one matrix on each side for all experts of a linear, and for each expert the (r, r) between them
            (Compress then Serve; `molora.compress_experts`).
        placement: "linear": a router for each adapted linear; "block": linears that read the same input (q/k/v;
            gate/up) share one router; "ffn": an expert is a whole FFN with its own LoRA on each projection;
            "ffn_linear": the projections of an FFN share one router, which reads the FFN's input, and each adds its own
            mixture.
        target_modules: the linears (placements "ffn" and "ffn_linear": the FFN modules) to convert, as in LoraConfig: a
            list of name endings, a regular expression, or "all-linear" for all of them but the output head; also
            "ffn-linear" for those inside FFNs, and "attention-linear" for the others.
        exclude_modules: what to leave out of `target_modules`; with placement "ffn" also single projections.
        plain_lora: ungated LoRA on other linears in the same adapter: {"target_modules", "r", "lora_alpha",
            "exclude_modules"}; target_modules "all-linear" means every linear that the mixture does not take.
        router: a typed config of `molora.routers`, a dict with its name and options, or its name.
        layers_to_transform, layers_pattern, rank_pattern, alpha_pattern, modules_to_save, trainable_token_indices: as
            in LoraConfig.
        bias: "none", "all" or "molora_only": which biases train.
        ensure_weight_tying: as in LoraConfig, for modules_to_save and trainable_token_indices.
        expert_names: names of the experts, num_experts of them; for reports.
        compression: what `molora.compress_experts` did and lost; for reports.
        freeze_experts: only the routers train, for experts that are trained already.
        riemannian: True: the experts' gradients come back preconditioned, ``(B B^T + delta I)^-1 dA`` and
            ``(A A^T + delta I)^-1 dB`` with delta = 1e-6, whatever the optimiser (arXiv 2502.15828,
            `molora.preconditioning`); "gate_rescaled": with the square root of each gate in the experts' gradients too
            (not with placement "ffn" nor router "rank_wise"). Nothing but training depends on it.
        base_fingerprint: written on save, checked on load: which base the adapter belongs to. Set it to None in a
            loaded config to put the adapter on another base on purpose.
        format_version: of the checkpoint's layout.
    """

    task_type: str | None = field(default="CAUSAL_LM")
    num_experts: int | list[int] = 8
    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    share_A: bool = False
    shared_basis: bool = False
    placement: Placement = "linear"
    target_modules: list[str] | str | None = "all-linear"
    exclude_modules: list[str] | str | None = None
    plain_lora: dict[str, Any] | None = None
    router: RouterConfig | dict[str, Any] | str = "top_k"
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    bias: Literal["none", "all", "molora_only"] = "none"
    ensure_weight_tying: bool = False
    expert_names: list[str] | None = None
    freeze_experts: bool = False
    compression: dict[str, Any] | None = None
    riemannian: bool | str = False
    base_fingerprint: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def __new__(cls, *args: Any, **kwargs: Any) -> MoloraConfig:
        # Here and not in __init__: PEFT catches the TypeError of a dataclass for an unknown key and drops the key.
        valid = [f.name for f in fields(cls)]
        for key in kwargs:
            if key not in valid:
                raise ValueError(unknown_key_message("MoloraConfig", key, valid))
        if "peft_type" in kwargs and "format_version" in kwargs:  # from a saved adapter_config.json, which has them all
            for key in _FUNCTION:
                if key not in kwargs:
                    raise ValueError(
                        f"the saved config lacks {key!r}, without which the adapter computes something else"
                    )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MOLORA
        check_int("format_version", self.format_version)
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"this adapter has format_version={self.format_version}, this molora reads up to {FORMAT_VERSION}; "
                "upgrade molora"
            )
        check_choice("task_type", self.task_type, (None, "CAUSAL_LM", TaskType.CAUSAL_LM))
        check_int("r", self.r)
        self.num_experts = _num_experts(self.num_experts)
        check_number("lora_alpha", self.lora_alpha, above=0)
        check_fraction("lora_dropout", self.lora_dropout)
        for key in ("use_rslora", "share_A", "shared_basis", "ensure_weight_tying", "freeze_experts"):
            check_bool(key, getattr(self, key))
        check_choice("placement", self.placement, get_args(Placement))
        if self.shared_basis and self.placement not in ("linear", "block"):
            raise ValueError(
                f"shared_basis is for experts of linears, not for placement={self.placement!r}; use 'linear' or 'block'"
            )
        check_choice("riemannian", self.riemannian, (True, False, "gate_rescaled"))
        check_choice("bias", self.bias, ("none", "all", "molora_only"))
        if self.base_fingerprint is not None and not isinstance(self.base_fingerprint, dict):
            raise ValueError(f"base_fingerprint={self.base_fingerprint!r} must be what molora saved, or null")
        self._check_patterns()
        self._check_modules()
        if self.expert_names is not None:
            check_names("expert_names", self.expert_names)
            if isinstance(self.num_experts, list):
                raise ValueError("expert_names needs the same experts in every layer, so num_experts as one number")
            if len(set(self.expert_names)) != self.num_experts or len(self.expert_names) != self.num_experts:
                raise ValueError(
                    f"expert_names has {len(self.expert_names)} names for num_experts={self.num_experts}; give one of "
                    "its own to each expert"
                )
        self.router = router_config(self.router)
        check_init(self.init_lora_weights, [self.r, *self.rank_pattern.values()], self.share_A, self.router.name)
        if self.riemannian == "gate_rescaled":
            self._check_rescaled(self.router)
        counts = self.num_experts if isinstance(self.num_experts, list) else [self.num_experts]
        for count in set(counts):
            self.router.check(count, self.r, self.placement)
        if isinstance(self.num_experts, list):
            self._check_counts(self.router)
        if self.plain_lora is not None:
            self.plain_lora = _plain_lora(self.plain_lora, self)

    def _check_rescaled(self, router: RouterConfig) -> None:
        if self.placement == "ffn":
            raise ValueError(
                "riemannian='gate_rescaled' is for mixtures of linears, but placement 'ffn' mixes the hidden states of "
                "whole FFNs; use riemannian=True, or placement 'ffn_linear'"
            )
        if router.name == "rank_wise":
            raise ValueError(
                "riemannian='gate_rescaled' takes the square roots of gates, and those of router 'rank_wise' can be "
                "negative; use riemannian=True"
            )

    def _check_counts(self, router: RouterConfig) -> None:
        pooled = getattr(router, "balance_pool", "layer") == "model" or getattr(router, "log_balance_coef", 0)
        if pooled and len(set(self.num_experts)) > 1:  # type: ignore[arg-type]
            raise ValueError(
                f"num_experts={self.num_experts} differs by layer, so no loss can be pooled over the model; "
                "set router.balance_pool to 'layer' or 'router' and router.log_balance_coef to 0"
            )
        if router.has_centroids:
            raise ValueError(
                f"router {router.name!r} has one expert for each set of prompts; give num_experts as one number"
            )

    def _check_patterns(self) -> None:
        for key in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, key)
            if not isinstance(pattern, dict):
                raise ValueError(f"{key}={pattern!r} must map names of modules to numbers")
            for name, value in pattern.items():
                if key == "rank_pattern":
                    check_int(f"{key}[{name!r}]", value)
                else:
                    check_number(f"{key}[{name!r}]", value, above=0)
        if self.placement in ("ffn", "ffn_linear") and (self.rank_pattern or self.alpha_pattern):
            raise ValueError(
                f"rank_pattern and alpha_pattern name linears, but with placement {self.placement!r} all projections "
                "of an FFN share r and lora_alpha; leave the patterns out"
            )

    def _check_modules(self) -> None:
        if self.target_modules is None:
            self.target_modules = "all-linear"  # PEFT's "the usual ones"
        self.target_modules = _module_names("target_modules", self.target_modules)
        if self.placement in ("ffn", "ffn_linear") and self.target_modules in REGIONS:
            raise ValueError(
                f"target_modules={self.target_modules!r} names linears, but placement {self.placement!r} converts FFN "
                "modules; use 'all-linear' or their names"
            )
        if self.exclude_modules is not None:
            self.exclude_modules = _module_names("exclude_modules", self.exclude_modules)
        if self.modules_to_save is not None:
            check_names("modules_to_save", self.modules_to_save)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform; give both or neither")
        if self.layers_to_transform is not None:
            layers = self.layers_to_transform
            for layer in layers if isinstance(layers, (list, tuple)) else [layers]:
                check_int("layers_to_transform", layer, at_least=0)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> MoloraConfig:
        """The config of a published system (`molora.presets`); overrides merge into it, inside `router` too.

        Raises:
            ValueError: an unknown preset or key.
        """
        return cls(**preset_options(name, overrides))

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As PeftConfig's, but the file appears whole or not at all, as the safetensors beside it does."""
        os.makedirs(save_directory, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".tmp") as directory:
            super().save_pretrained(directory, **kwargs)
            os.replace(os.path.join(directory, CONFIG_NAME), os.path.join(save_directory, CONFIG_NAME))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that makes an equal config; the router with its name."""
        assert isinstance(self.router, RouterConfig)
        return {**super().to_dict(), "router": self.router.to_dict()}


def _num_experts(value: Any) -> int | list[int]:
    if not isinstance(value, (list, tuple)):
        check_int("num_experts", value)
        return value
    if not value:
        raise ValueError("num_experts=[] is empty; give one number, one for each decoder layer, or four")
    for i, count in enumerate(value):
        check_int(f"num_experts[{i}]", count)
    return list(value)


def _module_names(key: str, names: Any) -> list[str] | str:
    """A sorted list of name endings, or a string that is "all-linear" or a regular expression."""
    if isinstance(names, str) and names:
        try:
            re.compile(names)
        except re.error as error:
            raise ValueError(f"{key}={names!r} is no regular expression: {error}") from None
        return names
    check_names(key, names)
    if not names and key.endswith("target_modules"):
        raise ValueError(f"{key} must name at least one module, or be 'all-linear'")
    return sorted(names)


def _plain_lora(options: Mapping[str, Any], config: MoloraConfig) -> dict[str, Any]:
    """The options of the ungated LoRA, checked and completed with the mixture's own."""
    if not isinstance(options, Mapping):
        raise ValueError(f"plain_lora={options!r} must be a dict with target_modules, and r and lora_alpha if wanted")
    for key in options:
        if key not in _PLAIN_LORA_KEYS:
            raise ValueError(unknown_key_message("MoloraConfig.plain_lora", key, _PLAIN_LORA_KEYS))
    result = {"r": config.r, "lora_alpha": config.lora_alpha, "exclude_modules": None, **options}
    if not result.get("target_modules"):
        raise ValueError(
            "plain_lora needs target_modules: a list of name endings, a regular expression or 'all-linear'"
        )
    check_int("plain_lora.r", result["r"])
    check_number("plain_lora.lora_alpha", result["lora_alpha"], above=0)
    for key in ("target_modules", "exclude_modules"):
        if result[key] is not None:
            result[key] = _module_names(f"plain_lora.{key}", result[key])
    return result
