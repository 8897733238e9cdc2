"""The example teacher's tokenizer and the layout of a dialogue.

A byte-level BPE with the ``qwen2`` way of cutting text before merging (each digit stands alone),
which llama.cpp knows under the same name, so that both sides give the very same token ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT: Final[str] = "<|endoftext|>"  # starts every dialogue (BOS) and also ends it
USER: Final[str] = "<|user|>"
ASSISTANT: Final[str] = "<|assistant|>"
SYSTEM: Final[str] = "<|system|>"
END: Final[str] = "<|end|>"  # ends every message (EOS, end of turn)
SPECIAL_TOKENS: Final[tuple[str, ...]] = (END_OF_TEXT, USER, ASSISTANT, SYSTEM, END)
BOS_ID: Final[int] = SPECIAL_TOKENS.index(END_OF_TEXT)
EOS_ID: Final[int] = SPECIAL_TOKENS.index(END)

# BOS is put there by the tokenizer (tokenizer.ggml.add_bos_token), hence not by the template.
CHAT_TEMPLATE: Final[str] = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# What may be merged together: a word with one sign before it, one digit, a run of signs, or white
# space.
_QWEN2_PIECES: Final[str] = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Turn = tuple[str, str]  # (request, answer)


def turn_text(prompt: str, answer: str) -> str:
    """One request and its answer as the chat template writes them, up to the answer's end."""
    return f"{USER}\n{prompt}{END}\n{ASSISTANT}\n{answer}{END}"


def dialogue_text(turns: Sequence[Turn]) -> str:
    """A whole dialogue for training, from BOS to the token that says that nothing follows."""
    body = "\n".join(turn_text(prompt, answer) for prompt, answer in turns)
    return f"{END_OF_TEXT}{body}\n{END_OF_TEXT}"


def train_tokenizer(lines: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most ``vocab_size`` tokens, the special ones first (ids from 0)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        # Bytes; llama-cpp-python's detokenize leaves out tokens of more than 32
        max_token_length=24,
        special_tokens=[
            AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS
        ],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of ``text``, in which special tokens may be written out; none is added."""
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
