"""A transformers checkpoint made on the spot: a tiny model and a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from teachers.base import Tokens
from tests.support.tiny_models import SHAPE

BOS, EOS, END = 0, 1, 2
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
WORDS = "the cat sat on the mat while the other cat was looking for a hat that was not there"


def save_tokenizer(
    folder: Path, *, text: str = WORDS, size: int = 290, add_bos: bool = True
) -> int:
    """Train a tokenizer on ``text`` and save it with its template; how many tokens it has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
        add_bos_token=add_bos,
    )
    wrapped.save_pretrained(folder)
    return len(wrapped)


def make_model(
    vocab_size: int, seed: int = 0, *, kind: str = "llama", **settings: object
) -> PreTrainedModel:
    """A 64×3 model with lively random weights: a Llama, or another that has the same settings."""
    ids = {"bos_token_id": BOS, "eos_token_id": [EOS, END], "pad_token_id": EOS}
    shape = SHAPE | ids | {"num_hidden_layers": 3, "max_position_embeddings": 256}
    config = AutoConfig.for_model(kind, vocab_size=vocab_size, **shape)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6.0)
    return model


def make_folder(
    folder: Path, *, seed: int = 0, vocab_size: int = 300, kind: str = "llama", **settings: object
) -> Path:
    """A whole checkpoint; the model has a few more output rows than the tokenizer has tokens."""
    assert save_tokenizer(folder) <= vocab_size
    make_model(vocab_size, seed, kind=kind, **settings).save_pretrained(folder)
    return folder


def texts(count: int, seed: int = 0, vocab_size: int = 300) -> list[Tokens]:
    """Random sequences of 2 to 40 tokens."""
    random = np.random.default_rng(seed)
    return [
        random.integers(3, vocab_size, random.integers(2, 41)).astype(np.int32)
        for _ in range(count)
    ]


def edit(path: Path, **changes: object) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
