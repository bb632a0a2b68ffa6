"""Initial values of trained experts by PEFT's own routines, where a mixture can have them.

What a routine may do here follows from one fact: the gates of a mixture differ from token to token. Routines that
start from a product B A and subtract it from the frozen weight (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) need a weight that
makes up for it, and no weight makes up for ``sum_e g_e(x) B_e A_e`` at every x; they would also leave another base
behind on `unload()` and while the adapter is disabled. They are refused by name. Left are those that start from a
product of zero: "orthogonal" and "eva".

Legend: E experts, R rank of one expert, D input features, O output features.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from molora.checks import check_choice

SUPPORTED = (True, False, "gaussian", "orthogonal", "eva", "imported")
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_init(init: Any, ranks: list[int], share_A: bool, router: str) -> None:
    """Checks `init_lora_weights` of experts of these ranks.

    Raises:
        ValueError: a routine of PEFT that a mixture cannot have, with the reason, or a value that is none.
    """
    if isinstance(init, str) and (init in _CHANGE_THE_BASE or re.fullmatch(r"pissa_niter_\d+", init)):
        raise ValueError(
            f"init_lora_weights={init!r} starts from experts whose product is subtracted from the base weight; gates "
            "differ from token to token, so no weight makes up for a mixture of them; choose 'eva', which starts from "
            "the data's directions and leaves the base as it is, or 'orthogonal'"
        )
    if init == "mica":
        raise ValueError(
            "init_lora_weights='mica' trains A alone, and the experts of a mixture train A and B; choose 'eva' or "
            "'orthogonal'"
        )
    check_choice("init_lora_weights", init, SUPPORTED)
    for r in ranks:
        if init == "orthogonal" and r % 2:
            raise ValueError(f"init_lora_weights='orthogonal' pairs ranks, so r={r} must be even")
    if init == "orthogonal" and (share_A or router == "rank_wise"):
        what = "share_A gives it the A of others" if share_A else "router 'rank_wise' gates its ranks one by one"
        raise ValueError(
            f"init_lora_weights='orthogonal' makes each expert's product zero by its own A and B, but {what}; choose "
            "True"
        )


def orthogonal(num_experts: int, r: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """A (E, R, D) and B (E, R, O) of experts whose products are zero though no matrix is: PEFT's "orthogonal".

    The routine is PEFT's, run once for each expert on a LoRA over a linear without memory; random numbers are torch's.
    """
    config = LoraConfig(r=r, init_lora_weights=True)
    host = LoraLinear(nn.Linear(in_features, out_features, bias=False, device="meta"), "expert", config, r=r)
    A, B = [], []
    for _ in range(num_experts):
        host.orthogonal_init("expert")
        A.append(host.lora_A["expert"].weight.detach())
        B.append(host.lora_B["expert"].weight.detach().T)
    return torch.stack(A), torch.stack(B)


class _Base(nn.Module):
    """A model in a module that PEFT does not take for one with adapters, so that it looks at the linears inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


@torch.no_grad()
def initialize_eva_weights(
    model: PeftModel,
    dataloader: Iterable[dict[str, Any]],
    adapter: str = "default",
    *,
    tau: float = 0.99,
    use_label_mask: bool = True,
    whiten: bool = False,
    **options: Any,
) -> None:
    """Sets every A to the directions in which the inputs of its frozen linear vary most (EVA); B stays zero.

    PEFT's `get_eva_state_dict` computes the E*R leading right-singular vectors of each linear's inputs, in the frozen
    model. They are dealt out in turn, expert e gets numbers e, e + E, e + 2E, ..., so that experts differ and each has
    strong directions. Experts with one A get the first R. Ranks are not redistributed over linears (rho = 1): `r` stays
    what the config says, for the linears of an FFN are called together.

    Args:
        model: with a mixture whose `init_lora_weights` is "eva", before training; not partitioned by ZeRO-3.
        dataloader: batches of the model's inputs, with a length; some with at least E*R tokens that count.
        adapter: name of the mixture.
        tau, use_label_mask, whiten: as in `peft.EvaConfig`.
        options: more arguments of `peft.get_eva_state_dict`.

    Raises:
        ValueError: an adapter with another `init_lora_weights`, experts that are partitioned, more ranks than inputs
            have features, or batches with fewer tokens than ranks, for which PEFT would wait for ever.

    Source: arXiv 2410.07170; peft.tuners.lora.eva.
    """
    from molora.ffn import MixedFFN
    from molora.layers import MoloraLayer

    config = getattr(model, "peft_config", {}).get(adapter)
    if getattr(config, "init_lora_weights", None) != "eva":
        raise ValueError(f"initialize_eva_weights needs a mixture {adapter!r} with init_lora_weights='eva'")
    base = _Base(model.get_base_model())
    weights: dict[str, nn.Parameter] = {}
    ranks: dict[str, int] = {}
    for name, module in base.named_modules():
        if not isinstance(module, MoloraLayer) or adapter not in module.molora_specs:
            continue
        for part, spec in module.molora_specs[adapter].items():
            inside = f".{module.structure.names[part[1:]]}" if isinstance(module, MixedFFN) else ""
            linear = f"{name}.base_layer{inside}"
            if not module.has_whole_experts(adapter, part):
                raise ValueError(
                    f"{name}: the experts are partitioned or offloaded; call initialize_eva_weights before"
                )
            weights[linear] = getattr(module, f"molora_A{part}")[adapter].weight
            ranks[linear] = spec.r if spec.share_A else spec.num_experts * spec.r
    most = max(ranks.values())
    _check_sizes(weights, ranks, most, dataloader, use_label_mask)
    eva = EvaConfig(rho=1.0, tau=tau, use_label_mask=use_label_mask, whiten=whiten)
    lora = LoraConfig(r=most, target_modules=list(weights), init_lora_weights="eva", eva_config=eva)
    with model.disable_adapter():
        found = get_eva_state_dict(base, dataloader, lora, **{"show_progress_bar": False, **options})
    for linear, A in weights.items():
        directions = found[linear][: ranks[linear]]  # (E * R, D)
        experts, r, features = A.shape
        A.copy_(directions.view(r, experts, features).transpose(0, 1))


def _check_sizes(
    weights: dict[str, nn.Parameter], ranks: dict[str, int], most: int, batches: Any, use_label_mask: bool
) -> None:
    for linear, A in weights.items():
        if most > A.shape[-1]:
            raise ValueError(
                f"{linear} reads {A.shape[-1]} features, which have no {most} directions; lower num_experts or r"
            )
    tokens = [0]
    for batch in batches:
        counted = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        if use_label_mask and "labels" in batch:
            counted = counted & (batch["labels"] != -100)
        tokens.append(int(counted.sum()))
    if max(tokens) < most:
        raise ValueError(
            f"no batch has the {most} tokens that count which {most} directions need (num_experts * r), the largest "
            f"has {max(tokens)}; use larger batches, or lower num_experts or r"
        )
