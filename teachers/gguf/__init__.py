"""GGUF files, read with every bound checked."""
