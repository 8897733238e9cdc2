"""Distil a quantized GGUF teacher into a small SO8T student that stock llama.cpp and Ollama
load."""

import logging

# On some CPUs bitsandbytes, which transformers loads through peft, advises a package that fetches
# compiled code from the network.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
