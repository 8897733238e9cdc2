"""The SO8T student: SO(8) gates, the decoder, its construction, folding and GGUF export.

Importing this package registers the architecture with transformers, so that
``AutoModelForCausalLM.from_pretrained`` loads a saved student.
"""

import logging

# On some CPUs bitsandbytes, which transformers loads through peft, advises a package that fetches compiled code from
# the network.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from students.config import SO8TConfig  # noqa: E402
from students.model import SO8TForCausalLM  # noqa: E402

AutoConfig.register("so8t", SO8TConfig)
AutoModelForCausalLM.register(SO8TConfig, SO8TForCausalLM)

__all__ = ["SO8TConfig", "SO8TForCausalLM"]
