"""``distill serve``: a GGUF teacher over HTTP, for captures on other machines."""
