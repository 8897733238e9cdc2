"""A small transformers checkpoint folder with a GGUF teacher's vocabulary, random weights and lively output."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from teachers.gguf_file import read_gguf
from teachers.tokenizer_json import write_tokenizer_folder


def make_base(
    folder: Path,
    teacher: Path,
    kind: str = "qwen2",
    *,
    extra_rows: int = 0,
    seed: int = 0,
    **settings: object,
) -> Path:
    """Write the folder and return it; ``extra_rows``: of padding beyond the vocabulary."""
    file = read_gguf(teacher)
    tokens = len(file.fields["tokenizer.ggml.tokens"].value)
    shape = {
        "vocab_size": tokens + extra_rows,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape | settings))
    model.save_pretrained(folder)
    write_tokenizer_folder(file.fields, folder)
    return folder
