"""A GGUF file with a smaller vocabulary: ``distill trim``."""
