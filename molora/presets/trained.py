"""Published systems whose experts and routers are trained together."""

from __future__ import annotations

from molora.presets.preset import Preset

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

TRAINED: dict[str, Preset] = {
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
