"""Published systems as configs: each is a point on the axes router, placement and losses.

Paper names live here, in docs and in tests, and nowhere else. `molora presets --markdown` makes docs/presets.md of it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from molora.checks import check_choice


@dataclass(frozen=True)
class Preset:
    """One published system.

    Attributes:
        title: the system in a line.
        arxiv: number of the paper.
        code: repository of the released code; empty where none was released.
        options: the keys of MoloraConfig that differ from its defaults.
        notes: for a key, where its default comes from, and what the paper or the released code has instead.
    """

    title: str
    arxiv: str
    code: str
    options: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return f"arXiv {self.arxiv}; {self.code or 'no code was released'}"

    @property
    def router(self) -> str:
        return str(self.options["router"].get("name", "top_k"))

    @property
    def placement(self) -> str:
        return str(self.options.get("placement", "linear"))


_LORA_BESIDE = {"target_modules": "all-linear"}
_MIXLORA = {
    "num_experts": 8,
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "placement": "ffn",
    "plain_lora": _LORA_BESIDE,
}
_MIXLORA_SOURCE = ("2404.15159", "TUDB-Labs/MixLoRA, TUDB-Labs/MoE-PEFT")
_PADDING = "molora: padding is left out; the released loss counts it (router.count_padding=true)."

PRESETS: dict[str, Preset] = {
    "mixlora": Preset(
        "MixLoRA: top-2 of eight FFN experts, plain LoRA on attention",
        *_MIXLORA_SOURCE,
        {**_MIXLORA, "router": {"name": "top_k", "top_k": 2, "router_aux_loss_coef": 1e-3, "init_std": 0.02}},
        {
            "router.router_aux_loss_coef": "code and the paper's ablation: 1e-3; the paper's text: 1e-2.",
            "router.top_k": "code: F counts all k choices, so that it sums to k; the paper's equation: the arg-max "
            "only.",
            "lora_dropout": "code: the experts' dropout stays on in evaluation there, because eval() does not reach "
            "them; here it is off.",
        },
    ),
    "mixlora-dynamic": Preset(
        "MixLoRA with top-p routing",
        *_MIXLORA_SOURCE,
        {**_MIXLORA, "router": {"name": "top_p", "top_p": 0.8, "router_aux_loss_coef": 1e-3, "init_std": 0.02}},
        {
            "router.include_crossing": "code: the expert that crosses top_p is kept, and gates are not renormalised, "
            "so that the frozen FFN is scaled by the kept mass.",
            "router.temperature": "code: divides the probabilities, after the softmax; off by default.",
            "router.count_padding": _PADDING,
        },
    ),
    "mixlora-switch": Preset(
        "MixLoRA with Switch routing: top-1 with capacity",
        *_MIXLORA_SOURCE,
        {
            **_MIXLORA,
            "router": {
                "name": "top_k",
                "top_k": 1,
                "norm_topk_prob": False,
                "expert_capacity": 32,
                "dropped_tokens": "input",
                "router_jitter_noise": 0.01,
                "router_aux_loss_coef": 1e-3,
                "router_z_loss_coef": 1e-3,
                "init_std": 0.02,
            },
        },
        {
            "router.expert_capacity": "code: 32 tokens of a sequence for each expert, in training. The released "
            "evaluation returns its input unchanged; here it routes every token.",
            "router.dropped_tokens": "code: a token beyond capacity leaves the FFN as p_max * x; Switch leaves it out "
            "('zero').",
            "router.count_padding": _PADDING,
        },
    ),
    "dynmole": Preset(
        "DynMoLE: Tsallis-entropy hybrid of dense and top-p routing",
        "2504.00661",
        "mikecovlee/DynMoLE",
        {
            "num_experts": 6,
            "r": 24,
            "lora_alpha": 48,
            "lora_dropout": 0.05,
            "target_modules": "ffn-linear",
            "router": {"name": "tsallis"},
        },
        {
            "num_experts": "code: the LLaMA template; the README's example has 8.",
            "lora_dropout": "code: each expert draws a mask of its own; here they share one.",
            "router.norm_topk_prob": "code: gates are not renormalised.",
            "router.include_crossing": "code: the expert that crosses top_p is dropped unless it is among keep_top_k.",
            "router.entropy_over_padding": "molora: padding is left out of the entropy loss; the released code counts "
            "it there, though not in the balance loss.",
        },
    ),
    "smora": Preset(
        "SMoRA: eight of 64 ranks, balanced without a loss",
        "2501.15103",
        "StyxXuan/smora",
        {
            "num_experts": 1,
            "r": 64,
            "lora_alpha": 16,
            "router": {"name": "rank_wise", "active_ranks": 8},
        },
        {
            "router.bias_in_gates": "code: sigmoid scores, sum-normalised, the bias inside the gate; a review of the "
            "paper writes softmax over the top k.",
            "router.bias_update": "molora: once for each optimiser step, over micro-batches and ranks, without "
            "padding; released: in each forward of each process ('forward').",
            "lora_dropout": "the router sees the input without dropout; the released one sees the dropped-out input "
            "(both equal at the published dropout of 0).",
        },
    ),
    "mola": Preset(
        "MoLA: more experts in higher layers",
        "2402.08562",
        "GCYZSL/MoLA",
        {
            "num_experts": [2, 4, 6, 8],
            "r": 8,
            "lora_alpha": 16,
            "router": {
                "name": "top_k",
                "top_k": 2,
                "router_aux_loss_coef": 0.0,
                "balance_pool": "layer",
                "balance_reduction": "sum",
                "init_std": None,
            },
        },
        {
            "num_experts": "paper: 2-4-6-8 over the quarters of the depth (MoLA-inverted triangle); [8, 6, 4, 2] and "
            "[5, 5, 5, 5] are its others.",
            "router.router_aux_loss_coef": "code: off by default. With it on, 1e-3 there is 1e-3 / top_k here, because "
            "F is normalised over the k slots there.",
            "router.count_padding": _PADDING,
        },
    ),
    "llava-mole": Preset(
        "LLaVA-MoLE: the top-1 expert of each FFN, ungated; plain LoRA on attention",
        "2401.16160",
        "forwchen/LLaVA-MoLE",
        {
            "num_experts": 3,
            "r": 32,
            "lora_alpha": 64,
            "lora_dropout": 0.05,
            "placement": "ffn",
            "plain_lora": _LORA_BESIDE,
            "router": {
                "name": "top_k",
                "top_k": 1,
                "bias": True,
                "balance_over": "sample",
                "router_aux_loss_coef": 1e-2,
                "init_std": None,
            },
        },
        {
            "placement": "paper: top-1. The released inference mixes all experts in each projection: placement="
            "'ffn_linear' with router={'name': 'softmax', 'bias': true}.",
            "router.top_k": "code: the chosen expert has no gate factor, so the language-model loss gives the router "
            "no gradient; the balance loss is all that moves it.",
            "router.router_aux_loss_coef": "molora: the repository gives no value; its loss has no factor E, so a "
            "weight w there is w / num_experts here.",
        },
    ),
    "meteora": Preset(
        "MeteoRA: gates that learn the task of each token",
        "2405.13053",
        "NJUDeepEngine/meteora",
        {
            "num_experts": 28,
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.1,
            "router": {
                "name": "top_k",
                "top_k": 2,
                "task_loss_coef": 50.0,
                "router_aux_loss_coef": 0.0,
                "init_std": None,
            },
        },
        {
            "num_experts": "code: 28 tasks; one expert for each of your tasks, in their order.",
            "lora_alpha": "molora: the adapters' own in the released code.",
            "router.router_temperature": "code: 1 for single tasks, 15, 20, 30 for composite-3, -5, -10; in inference.",
            "router.shift_task_labels": "code: the gate of a token learns the task of the next token.",
            "router.task_loss_coef": "code: 50, hard-coded. The released script trains the LoRAs too; the paper only "
            "the gates.",
        },
    ),
    "adamole": Preset(
        "AdaMoLE: experts above a learned threshold",
        "2405.00361",
        "zefang-liu/AdaMoLE",
        {
            "num_experts": 8,
            "r": 32,
            "lora_alpha": 64,
            "target_modules": "attention-linear",
            "router": {"name": "threshold", "router_aux_loss_coef": 1e-3},
        },
        {
            "lora_alpha": "molora.",
            "router.max_threshold": "code: 1 / num_experts, with which some expert is always active.",
            "router.router_aux_loss_coef": "code: 1e-3 in the config, 1e-2 in the trainer's default; summed over "
            "routers. The released loss is left out where a layer's input needs no gradient.",
            "router.count_padding": _PADDING,
        },
    ),
    "hydralora": Preset(
        "HydraLoRA: one A, several B, dense",
        "2404.19245",
        "Clin0212/HydraLoRA",
        {
            "num_experts": 4,
            "r": 4,
            "lora_alpha": 32,
            "share_A": True,
            "target_modules": "ffn-linear",
            "router": {"name": "softmax"},
        },
        {
            "num_experts": "code: the script's; the paper finds it by k-means on the corpus.",
            "lora_dropout": "code: drawn anew for each head; here all heads share a mask.",
        },
    ),
    "loramoe": Preset(
        "LoRAMoE: dense experts with localised balance",
        "2312.09979",
        "Ablustrund/LoRAMoE",
        {
            "num_experts": 8,
            "r": 4,
            "lora_alpha": 32,
            "target_modules": "ffn-linear",
            "router": {"name": "softmax", "localized_balance_coef": 0.0, "localized_balance_delta": 0.0},
        },
        {
            "router.localized_balance_coef": "code: the script ships weight and delta 0; above 0 every row needs its "
            "task type, 0 or 1.",
            "router.count_padding": _PADDING,
        },
    ),
    "lora-tle": Preset(
        "LoRA-TLE (Belofsky 2023): token-level mixing by similarity to example prompts",
        "2311.10847",
        "jb-01/LoRA-TLE",
        {
            "num_experts": 4,
            "r": 64,
            "lora_alpha": 16,
            "lora_dropout": 0.1,
            "target_modules": ["q_proj", "v_proj"],
            "router": {"name": "centroid", "temperature": 4.0},
        },
        {
            "router.embedder": "molora: the token's own hidden state, so that caches and packing work. The paper reads "
            "the running text with 'sentence-transformers/all-MiniLM-L6-v2' (generate only).",
            "router.reweight_every": "code: every token; the paper's best average is every other token (2).",
            "router.temperature": "code: multiplies the largest similarity only.",
            "placement": "molora mixes outputs. The released code merges parameters with PEFT 0.4's 'linear', which "
            "leaves B unweighted and adds cross terms between experts; that is not offered.",
        },
    ),
    "arrow": Preset(
        "Arrow: LoRAs as they are, each token to those whose product stretches it most",
        "2405.11157",
        "microsoft/mttl, huggingface/peft",
        {
            "num_experts": 8,
            "r": 16,
            "lora_alpha": 32,
            "router": {"name": "arrow", "top_k": 3},
        },
        {
            "num_experts": "molora, as r and lora_alpha: those of the adapters (`from_adapters`, `--adapters`).",
            "router.top_k": "PEFT; the paper's code uses all experts by default and 4 in its example.",
            "router.router_temperature": "code: 1.",
        },
    ),
    "phatgoose": Preset(
        "PHATGOOSE: LoRAs as they are, a gate for each trained alone on its task",
        "2402.05859",
        "r-three/phatgoose",
        {
            "num_experts": 8,
            "r": 16,
            "lora_alpha": 1,
            "freeze_experts": True,
            "router": {"name": "phatgoose", "top_k": 2},
        },
        {
            "num_experts": "molora: one for each adapter.",
            "lora_alpha": "code: a LoRA's scale is 1/r there; imported adapters keep their own.",
            "router.top_k": "code. The paper trains each gate for 100 steps, all else frozen; here the gates of all "
            "experts learn at once, each from the rows of its own task.",
        },
    ),
    "loraretriever": Preset(
        "LoraRetriever: the LoRAs whose example prompts are most like this prompt",
        "2402.09997",
        "Sherry805139/LoraRetriever",
        {
            "num_experts": 8,
            "r": 16,
            "lora_alpha": 32,
            "router": {"name": "retrieval", "top_k": 3, "composition": "mixture"},
        },
        {
            "num_experts": "molora, as r and lora_alpha: those of the adapters; the paper has 48.",
            "router.top_k": "paper: 3 for mixture and fusion, 1 for selection; the released script: 2.",
            "router.embedder": "molora: the base's own hidden states. The paper trains an Instructor encoder for it "
            "(Styxxxx/lora_retriever), which a sentence-transformers directory can name here.",
        },
    ),
    "xlora-single-pass": Preset(
        "After X-LoRA: gates over frozen LoRAs, dense and layer-wise, in one pass",
        "2402.07148",
        "EricLBuehler/xlora",
        {
            "num_experts": 8,
            "r": 16,
            "lora_alpha": 32,
            "freeze_experts": True,
            "router": {"name": "softmax", "bias": True},
        },
        {
            "router.bias": "code: a linear with a bias from hidden states to one scaling for each adapter and module.",
            "placement": "molora: each gate reads the input of its own linear, in the one forward there is. Released: "
            "all gates read the last hidden state of a forward without adapters, so that every step runs the model "
            "twice and no cache is kept; that is why this preset has a name of its own.",
            "freeze_experts": "code: only the classifier trains.",
        },
    ),
    "molora": Preset(
        "MoLORA (Zadouri et al. 2023): dense soft mixture of LoRA, whose name this package carries",
        "2309.05444",
        "for-ai/parameter-efficient-moe",
        {
            "num_experts": 10,
            "r": 4,
            "lora_alpha": 16,
            "router": {"name": "softmax", "init_std": 0.02},
        },
        {
            "router.router_aux_loss_coef": "code: no balance loss in the shipped path; the paper's ablation finds that "
            "it does not help.",
            "target_modules": "molora: every linear. The released T5 leaves the FFN's linear second factor (wi_1, "
            "up_proj in Llama) alone: exclude_modules=['up_proj'].",
            "init_lora_weights": "code: A normal with standard deviation 0.02.",
        },
    ),
    "mole": Preset(
        "MoLE (Wu et al. 2024): a learned softmax over whole experts with a learned temperature",
        "2404.13628",
        "",
        {
            "num_experts": 8,
            "r": 16,
            "lora_alpha": 32,
            "placement": "block",
            "router": {"name": "softmax", "learned_temperature": True, "log_balance_coef": 0.5},
        },
        {
            "placement": "molora: the gate reads the token's own input. The paper's gate reads the outputs of all "
            "experts over the whole sequence, one gate for each block and sequence: not causal, and tied to one "
            "length.",
            "router.log_balance_coef": "paper: 0.5.",
            "r": "molora; the paper takes LoRAs that exist, freezes them and trains the gates alone.",
        },
    ),
}


def preset_options(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of MoloraConfig for a preset, with overrides merged in.

    `router` and `plain_lora` merge key by key; a router of another name, and None, replace the preset's.

    Raises:
        ValueError: an unknown preset, with the nearest one.
    """
    check_choice("preset", name, PRESETS)
    options = copy.deepcopy(PRESETS[name].options)
    for key, value in overrides.items():
        own = options.get(key)
        if key == "router" and isinstance(value, str):
            value = {"name": value}
        if isinstance(own, dict) and isinstance(value, Mapping):
            same = key != "router" or value.get("name", own["name"]) == own["name"]
            options[key] = {**(own if same else {}), **value}
        else:
            options[key] = value
    return options
