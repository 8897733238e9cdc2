"""GGUF files that are made for the time of a capture."""
