"""Distil a quantized GGUF teacher into a small SO8T student that stock llama.cpp and Ollama load."""

__version__ = "0.1.0"
