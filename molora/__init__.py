"""molora: any dense Hugging Face causal LM as a mixture of LoRA experts. Importing it registers the PEFT method."""

from molora.adapters.compress import compress_experts, merge_experts
from molora.adapters.expert_pool import add_expert, delete_expert
from molora.adapters.from_adapters import from_adapters
from molora.adapters.to_adapters import average_adapters, merge_into_base, to_adapters
from molora.centroids import set_centroids
from molora.config import MoloraConfig
from molora.context import aux_weight, end_step
from molora.equal_lora import equal_lora
from molora.init_experts import initialize_eva_weights
from molora.integrations.peft import register as _register
from molora.prototypes import set_prototypes
from molora.telemetry import record_routing, router_losses, routing_report, routing_statistics

__version__ = "0.1.0"
__all__ = [
    "MoloraConfig",
    "add_expert",
    "aux_weight",
    "average_adapters",
    "compress_experts",
    "delete_expert",
    "end_step",
    "equal_lora",
    "from_adapters",
    "merge_experts",
    "merge_into_base",
    "initialize_eva_weights",
    "record_routing",
    "router_losses",
    "routing_report",
    "routing_statistics",
    "set_centroids",
    "set_prototypes",
    "to_adapters",
]

_register()
