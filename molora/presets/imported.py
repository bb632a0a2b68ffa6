"""Published systems whose experts are LoRAs that exist; their routers are set, or trained alone."""

from __future__ import annotations

from molora.presets.preset import Preset

IMPORTED: dict[str, Preset] = {
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
}
