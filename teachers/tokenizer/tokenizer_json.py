"""A GGUF file's tokenizer as a Hugging Face one: tokenizer.json, made to give llama.cpp's own ids.

llama.cpp joins SentencePiece tokens by their scores, the tokenizers library by a list of merges, so
the list is derived from the scores. What cannot be carried over: of two *different* tokens with
equal scores that compete for the same character, llama.cpp takes the one further left, this
tokenizer the longer one (the same in runs of spaces, where it matters); of two overlapping special
tokens llama.cpp reads the longer one, the tokenizers library the one that begins first; and where
Phi-3's special tokens absorb white space behind them, llama.cpp means ASCII's, the tokenizers
library all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from teachers.gguf.file import Field
from teachers.tokenizer.gguf_metadata import (
    SENTENCEPIECE,
    TokenizerConversionError,
    TokenizerMetadata,
    read_metadata,
)
from teachers.tokenizer.pre_tokenizers import PRE_TOKENIZERS

SPACE = "▁"  # what SentencePiece writes for a space
# Bytes that no UTF-8 text contains.
_NEVER = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))

__all__ = ["TokenizerConversionError", "build_tokenizer", "write_tokenizer_folder"]


def build_tokenizer(fields: Mapping[str, Field]) -> Tokenizer:
    """The tokenizer that GGUF metadata describes; ``encode`` gives llama.cpp's own ids.

    Special tokens are added and read as with ``add_special`` and ``parse_special``; ``encode(...,
    add_special_tokens=False)`` and ``tokenizer.encode_special_tokens = True`` turn them off.
    ``fields``: the ``tokenizer.*`` entries, and ``general.name`` where it is at hand (see
    ``read_metadata``).

    Raises:
        TokenizerConversionError: malformed metadata, or a tokenizer that cannot be carried over.
    """
    return _assemble(read_metadata(fields))


def write_tokenizer_folder(fields: Mapping[str, Field], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and, if there is one, chat_template.jinja.

    ``folder`` exists; files of these names are replaced. ``AutoTokenizer.from_pretrained`` then
    loads the tokenizer as it stands, unless a ``config.json`` beside it names an architecture that
    transformers always gives its own class (``qwen2`` and ``qwen3_5``, which bring text into NFC
    first); ``PreTrainedTokenizerFast.from_pretrained`` always does. Tokens with a role (bos, eos,
    …) are read in texts even where llama.cpp does not know them as special.

    Raises:
        TokenizerConversionError: malformed metadata, or a tokenizer that cannot be carried over.
        OSError: the disk refuses.
    """
    metadata = read_metadata(fields)
    text = _assemble(metadata).to_str(pretty=True)
    config: dict[str, Any] = {
        # Any other class might build its own tokenizer
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": metadata.tokens[number] for role, number in metadata.roles.items()},
    }
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    template = folder / "chat_template.jinja"
    if metadata.chat_template is None:
        template.unlink(missing_ok=True)
    else:
        template.write_bytes(metadata.chat_template.encode("utf-8"))  # its line ends as they are


def _assemble(metadata: TokenizerMetadata) -> Tokenizer:
    try:
        build = _sentencepiece if metadata.model == SENTENCEPIECE else _byte_level
        tokenizer = build(metadata)
        _add_special_tokens(tokenizer, metadata)
    except TokenizerConversionError:
        raise
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise TokenizerConversionError(
            f"the tokenizers library refuses this tokenizer: {error}"
        ) from error
    return tokenizer


def _sentencepiece(metadata: TokenizerMetadata) -> Tokenizer:
    ids = {token: number for number, token in enumerate(metadata.tokens)}
    unknown = metadata.roles.get("unk")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges_by_score(metadata, ids),
            unk_token=None if unknown is None else metadata.tokens[unknown],
            byte_fallback=True,
        )
    )
    # Not the Metaspace pre-tokenizer: it omits the prefix where the text begins with a space.
    escape = normalizers.Replace(" ", SPACE)
    unescape = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.add_space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape])
        tokenizer.decoder = decoders.Sequence([*unescape, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = escape
        tokenizer.decoder = decoders.Sequence(unescape)
    return tokenizer


def _merges_by_score(metadata: TokenizerMetadata, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make a token of two, in llama.cpp's order: the best score first.

    Within one score llama.cpp goes from left to right, which a list cannot express. Longer tokens
    first stand in for it: what has just been joined grows on, as a run of spaces does. The order
    among the ways to make one token does not matter.
    """

    def order(pair: tuple[str, str]) -> tuple[float, int, int]:
        token = pair[0] + pair[1]
        return -metadata.scores[ids[token]], -len(token), ids[token]

    # Read as wholes, or with a space, which is escaped: no text has them when tokens are joined.
    never = {metadata.tokens[number] for number in metadata.special | metadata.user_defined}
    pairs: list[tuple[str, str]] = []
    for token in metadata.tokens:
        pairs += _halves(token, ids, joined=token not in never and " " not in token)
    return sorted(pairs, key=order)


def _halves(token: str, ids: Mapping[str, int], *, joined: bool) -> Iterator[tuple[str, str]]:
    """The pairs that ``token`` can be made of; ``joined``: whether llama.cpp ever does so.

    Raises:
        TokenizerConversionError: of a character that is no token, which no list of merges can.
    """
    for cut in range(1, len(token)):
        left, right = token[:cut], token[cut:]
        if left in ids and right in ids:
            yield left, right
        elif joined and all(half in ids or len(half) == 1 for half in (left, right)):
            alone = left if left not in ids else right
            raise TokenizerConversionError(
                f"token {ids[token]}, {token!r}, is made with {alone!r}, which is no token itself: "
                "tokenizer.json cannot express this; use a teacher whose vocabulary has every "
                "character it uses"
            )


def _byte_level(metadata: TokenizerMetadata) -> Tokenizer:
    kind = PRE_TOKENIZERS[metadata.pre]
    ids = {token: number for number, token in enumerate(metadata.tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=list(metadata.merges), ignore_merges=kind.ignore_merges)
    )
    steps: list[Any] = [pre_tokenizers.Split(Regex(each), "isolated") for each in kind.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    signs = (sign for byte, sign in visible_bytes().items() if byte not in _NEVER)
    missing = [rf"\x{{{ord(sign):x}}}" for sign in signs if sign not in ids]
    if missing:  # llama.cpp drops such bytes; their neighbors must not be joined over the gap
        steps.append(pre_tokenizers.Split(Regex(f"[{''.join(missing)}]"), "removed"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def visible_bytes() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in shown]
    signs = {byte: chr(byte) for byte in shown}
    return signs | {byte: chr(0x100 + n) for n, byte in enumerate(hidden)}


def _add_special_tokens(tokenizer: Tokenizer, metadata: TokenizerMetadata) -> None:
    """Tokens read as wholes, and what is put before and after every text."""
    tokens = metadata.tokens
    for numbers, special in ((metadata.special, True), (metadata.user_defined, False)):
        added = []
        for number in sorted(numbers):
            strips = number in metadata.strips_right
            token = AddedToken(tokens[number], rstrip=strips, normalized=False, special=special)
            added.append(token)
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    before, after = ["BOS"] * metadata.add_bos, ["EOS"] * metadata.add_eos
    if before or after:
        single = [f"{piece}:0" for piece in (*before, "$A", *after)]
        second = [f"{piece}:1" for piece in (*before, "$B", *after)]
        # Names of their own: a token's text could be taken for part of the template.
        named = []
        for name in (*before, *after):
            number = metadata.roles[name.lower()]
            named.append({"id": name, "ids": [number], "tokens": [tokens[number]]})
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=[*single, *second], special_tokens=named
        )
