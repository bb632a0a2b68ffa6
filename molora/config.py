"""MoloraConfig: what a mixture of LoRA experts is, in PEFT's words."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from molora.routers import RouterConfig, router_config
from molora.suggest import unknown_key_message

FORMAT_VERSION = 1

Placement = Literal["linear", "block", "ffn"]


class PeftTypeName(str):
    """A key of PEFT's tables that is no member of its enum: equal to its string, with the enum's `.value`.

    PEFT looks methods up by equality and hash, transformers reads `.value`; a string subclass serves both, and unlike
    an added enum member it can be unpickled in a process that has not registered it yet.
    """

    @property
    def value(self) -> str:
        return str(self)


MOLORA = PeftTypeName("MOLORA")

_PLAIN_LORA_KEYS = ("target_modules", "exclude_modules", "r", "lora_alpha")


@dataclass
class MoloraConfig(PeftConfig):
    """Configuration of a mixture of LoRA experts, with PEFT's names.

    An unknown key, at any depth, is a ValueError that names the nearest valid one (PEFT only warns).

    Attributes:
        num_experts: experts in each mixture, >= 1.
        r: rank of one expert, >= 1.
        lora_alpha: the factor of an expert's product is lora_alpha / r (lora_alpha / sqrt(r) with `use_rslora`).
        lora_dropout: probability of dropping an input feature of the experts, 0 <= p < 1; the router sees all of them.
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        init_lora_weights: True: A uniform, B zero, so that a fresh mixture is the base; "gaussian": A normal with
            standard deviation 1/r, B zero; False: both uniform, for tests.
        share_A: one A for all experts of a mixture (HydraLoRA).
        placement: "linear": a router for each adapted linear; "block": linears that read the same input (q/k/v;
            gate/up) share one router; "ffn": an expert is a whole FFN with its own LoRA on each projection.
        target_modules: the linears (placement "ffn": the FFN modules) to convert, as in LoraConfig: a list of name
            endings, a regular expression, or "all-linear" for all of them but the output head.
        exclude_modules: what to leave out of `target_modules`; with placement "ffn" also single projections.
        plain_lora: ungated LoRA on other linears in the same adapter: {"target_modules", "r", "lora_alpha",
            "exclude_modules"}; target_modules "all-linear" means every linear that the mixture does not take.
        router: a typed config of `molora.routers`, a dict with its name and options, or its name.
        layers_to_transform, layers_pattern, rank_pattern, alpha_pattern, modules_to_save, trainable_token_indices: as
            in LoraConfig.
        bias: "none", "all" or "molora_only": which biases train.
        ensure_weight_tying: as in LoraConfig, for modules_to_save and trainable_token_indices.
        expert_names: names of the experts, num_experts of them; for reports.
        base_fingerprint: written on save, checked on load: which base the adapter belongs to. Set it to None in a
            loaded config to put the adapter on another base on purpose.
        format_version: of the checkpoint's layout.
    """

    task_type: str | None = field(default="CAUSAL_LM")
    num_experts: int = 8
    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    share_A: bool = False
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
    base_fingerprint: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def __new__(cls, *args: Any, **kwargs: Any) -> MoloraConfig:
        # Here and not in __init__: PEFT catches the TypeError of a dataclass for an unknown key and drops the key.
        valid = [f.name for f in fields(cls)]
        for key in kwargs:
            if key not in valid:
                raise ValueError(unknown_key_message("MoloraConfig", key, valid))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MOLORA
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"this adapter has format_version={self.format_version}, this molora reads up to {FORMAT_VERSION}; "
                "upgrade molora"
            )
        for key in ("num_experts", "r"):
            _check_positive_int(key, getattr(self, key))
        if self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha={self.lora_alpha} must be positive")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} must be at least 0 and below 1")
        if self.placement not in get_args(Placement):
            raise ValueError(unknown_key_message("placement", str(self.placement), get_args(Placement)))
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(f"init_lora_weights={self.init_lora_weights!r} must be True, False or 'gaussian'")
        if self.bias not in ("none", "all", "molora_only"):
            raise ValueError(unknown_key_message("bias", str(self.bias), ("none", "all", "molora_only")))
        for name, rank in self.rank_pattern.items():
            _check_positive_int(f"rank_pattern[{name!r}]", rank)
        if self.placement == "ffn" and (self.rank_pattern or self.alpha_pattern):
            raise ValueError(
                "rank_pattern and alpha_pattern name linears, but with placement 'ffn' all projections of an expert "
                "share r and lora_alpha; leave the patterns out"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform; give both or neither")
        self.target_modules = _as_list(self.target_modules)
        self.exclude_modules = _as_list(self.exclude_modules)
        if not self.target_modules:
            raise ValueError("target_modules must name at least one module, or be 'all-linear'")
        if self.expert_names is not None and len(self.expert_names) != self.num_experts:
            raise ValueError(f"expert_names has {len(self.expert_names)} names for num_experts={self.num_experts}")
        self.router = router_config(self.router)
        self.router.check(self.num_experts)
        if self.plain_lora is not None:
            self.plain_lora = _plain_lora(self.plain_lora, self)

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


def _as_list(names: Any) -> Any:
    return sorted(names) if isinstance(names, (set, tuple, list)) else names


def _check_positive_int(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key}={value!r} must be an integer of at least 1")


def _plain_lora(options: Mapping[str, Any], config: MoloraConfig) -> dict[str, Any]:
    """The options of the ungated LoRA, checked and completed with the mixture's own."""
    for key in options:
        if key not in _PLAIN_LORA_KEYS:
            raise ValueError(unknown_key_message("MoloraConfig.plain_lora", key, _PLAIN_LORA_KEYS))
    result = {"r": config.r, "lora_alpha": config.lora_alpha, "exclude_modules": None, **options}
    if not result.get("target_modules"):
        raise ValueError(
            "plain_lora needs target_modules: a list of name endings, a regular expression or 'all-linear'"
        )
    _check_positive_int("plain_lora.r", result["r"])
    if result["lora_alpha"] <= 0:
        raise ValueError(f"plain_lora.lora_alpha={result['lora_alpha']} must be positive")
    return {**result, "target_modules": _as_list(result["target_modules"])}
