"""Tokenizers and chat templates, from GGUF to tokenizer.json."""
