"""A student as a GGUF file."""
