"""The SO8T student: SO(8) gates, the decoder, its construction, folding and GGUF export.

Importing this package registers the architecture with transformers, so that
``AutoModelForCausalLM.from_pretrained`` loads a saved student.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from students.config import SO8TConfig
from students.model import SO8TForCausalLM

AutoConfig.register("so8t", SO8TConfig)
AutoModelForCausalLM.register(SO8TConfig, SO8TForCausalLM)

__all__ = ["SO8TConfig", "SO8TForCausalLM"]
