"""molora: any dense Hugging Face causal LM as a mixture of LoRA experts. Importing it registers the PEFT method."""

from molora.centroids import set_centroids
from molora.config import MoloraConfig
from molora.context import aux_weight, end_step
from molora.equal_lora import equal_lora
from molora.init_experts import initialize_eva_weights
from molora.integrations.peft import register as _register
from molora.telemetry import record_routing, router_losses, routing_report, routing_statistics

__version__ = "0.1.0"
__all__ = [
    "MoloraConfig",
    "aux_weight",
    "end_step",
    "equal_lora",
    "initialize_eva_weights",
    "record_routing",
    "router_losses",
    "routing_report",
    "routing_statistics",
    "set_centroids",
]

_register()
