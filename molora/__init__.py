"""molora: any dense Hugging Face causal LM as a mixture of LoRA experts. Importing it registers the PEFT method."""

from molora.config import MoloraConfig
from molora.context import aux_weight, router_losses, routing_statistics
from molora.integrations.peft import register as _register

__version__ = "0.1.0"
__all__ = ["MoloraConfig", "aux_weight", "router_losses", "routing_statistics"]

_register()
