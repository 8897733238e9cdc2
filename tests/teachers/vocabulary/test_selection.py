"""Which tokens stay, and that what is left is a tokenizer: the same ids everywhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType, TokenType

from teachers.gguf.file import Field, read_gguf, tokenizer_fields
from teachers.tokenizer.gguf_metadata import SENTENCEPIECE, read_metadata
from teachers.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from teachers.tokenizer.tokenizer_json import SPACE, build_tokenizer
from teachers.vocabulary.metadata import reduced_fields
from teachers.vocabulary.pieces import Pieces
from teachers.vocabulary.reduced import ReducedVocabulary, VocabularyError
from teachers.vocabulary.selection import Vocabulary
from teachers.vocabulary.size import KEPT_MASS, MORE_TOKENS, VocabularySize
from tests.support.llama.tokenizers import (
    byte_level_fields,
    loaded_tokenizer,
    sentencepiece_fields,
    teacher_of,
)
from tests.support.real import real_teacher
from tests.support.teachers import LINES, Fields, different, edited, example_fields

TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|unused 2|>{% endfor %}"
MORE = {
    "<|user|>": TokenType.CONTROL,
    "<|unused 1|>": TokenType.CONTROL,
    "<|unused 2|>": TokenType.CONTROL,
    "<|im_end|>": TokenType.NORMAL,  # control all the same
    "lower": TokenType.USER_DEFINED,
    "  ": TokenType.USER_DEFINED,
    "   ": TokenType.USER_DEFINED,
    "\n\n": TokenType.USER_DEFINED,
    "\n\n\n": TokenType.USER_DEFINED,
}
KINDS: dict[str, Fields] = {}


def kinds() -> dict[str, Fields]:
    """Tokenizers of both kinds, with and without what makes each difficult."""
    if not KINDS:
        KINDS["learnt bytes"] = byte_level_fields(pre="qwen2")
        KINDS["whole words"] = byte_level_fields(pre="llama-bpe")
        KINDS["example"] = example_fields()
        KINDS["pieces"] = sentencepiece_fields(MORE, chat_template=TEMPLATE)
        no_prefix = {"add_space_prefix": False, "add_bos_token": False}
        KINDS["no prefix"] = sentencepiece_fields(MORE, **no_prefix)
    return KINDS


def mass_of(fields: Fields, seed: int = 0) -> np.ndarray:
    """A few tokens have most of it, as in a text, and spare ones nothing."""
    tokens = fields["tokenizer.ggml.tokens"].value
    mass = np.random.default_rng(seed).permutation(1.0 / (1 + np.arange(len(tokens))) ** 1.5)
    return mass * ["unused" not in text for text in tokens]


def by_definition(fields: Fields) -> Callable[[str], list[int]]:
    """A function that gives a text's ids: user-defined tokens taken out, words cut; then, as long
    as two neighbors make a token, the best-ranked two of them are joined, the leftmost first."""
    metadata = read_metadata(fields)
    ids = {text: number for number, text in enumerate(metadata.tokens)}
    sentencepiece = metadata.model == SENTENCEPIECE
    merges = {pair: rank for rank, pair in enumerate(metadata.merges)}

    def rank(left: str, right: str) -> float:
        if not sentencepiece:
            return merges.get((left, right), math.inf)
        return -metadata.scores[ids[left + right]] if left + right in ids else math.inf

    def joined(word: str) -> list[int]:
        if PRE_TOKENIZERS[metadata.pre].ignore_merges and word in ids:
            return [ids[word]]
        parts = list(word)
        while len(parts) > 1:
            ranks = [rank(*pair) for pair in itertools.pairwise(parts)]
            if (best := min(ranks)) == math.inf:
                break
            at = ranks.index(best)
            parts[at : at + 2] = ["".join(parts[at : at + 2])]
        pieces = [[part] if part in ids else list(part.encode()) for part in parts]
        return [ids[one if isinstance(one, str) else f"<0x{one:02X}>"] for p in pieces for one in p]

    whole = sorted((metadata.tokens[n] for n in metadata.user_defined), key=len, reverse=True)
    cutter = build_tokenizer(fields).pre_tokenizer

    def fragments(line: str) -> list[str | int]:
        found: list[str | int] = [line]
        for token in whole:
            parts = [
                intersperse(one.split(token), ids[token]) if isinstance(one, str) else [one]
                for one in found
            ]
            found = [one for some in parts for one in some]
        return found

    def tokenized(line: str) -> list[int]:
        found: list[int] = []
        for one in fragments(line):
            if isinstance(one, int):
                found.append(one)
            elif sentencepiece and one:
                found += joined(SPACE * metadata.add_space_prefix + one.replace(" ", SPACE))
            elif one:
                words = [word for word, _ in cutter.pre_tokenize_str(one)]
                found += [number for word in words for number in joined(word)]
        return found

    return tokenized


def intersperse(parts: list[str], between: int) -> list[str | int]:
    """The parts with ``between`` between them."""
    return [one for part in parts for one in (part, between)][:-1]


def middle(vocabulary: Vocabulary, fields: Fields) -> ReducedVocabulary:
    """Half of the tokens that may go."""
    with pytest.raises(VocabularyError) as refusal:
        vocabulary.select(mass_of(fields), VocabularySize(count=1))
    least = int(str(refusal.value).split(": ")[1].split()[0])
    return vocabulary.select(mass_of(fields), VocabularySize((least + len(vocabulary)) // 2))


def tokens_checked(name: str, fields: Fields, reduced: ReducedVocabulary, folder: Path) -> int:
    """How many tokens were looked at one by one. A thousand lines have the same ids in llama.cpp,
    in transformers and by the definition, and come back as with the whole tokenizer. What that made
    of a kept token's text is still made of it, and the first piece of a dropped one's is where its
    mass goes."""
    cut, metadata = reduced_fields(fields, reduced), read_metadata(fields)
    step = 1 + len(metadata.tokens) // 20000  # of a large vocabulary some will do
    numbers, prefixed = range(0, len(metadata.tokens), step), metadata.add_space_prefix
    texts = [metadata.tokens[number] for number in numbers]
    plain = {"add_special": False, "parse_special": False}
    with teacher_of(fields, folder) as teacher:
        before, lines = (teacher.tokenize(some, **plain) for some in (texts, LINES))
        loaded = loaded_tokenizer(fields, folder)
        expected = [loaded.decode(row.tolist()) for row in lines]
    with teacher_of(cut, folder) as teacher:
        loaded = loaded_tokenizer(cut, folder)
        assert different(loaded, teacher, LINES) == [], name
        after, lines = (teacher.tokenize(some, **plain) for some in (texts, LINES))
    back = [loaded.decode(row.tolist()) for row in lines]
    if prefixed:  # a space is put in front behind user-defined tokens too
        back, expected = ([one.replace(" ", "") for one in some] for some in (back, expected))
    assert back == expected, name
    defined, pairs = by_definition(cut), zip(LINES, lines, strict=True)
    assert [line for line, row in pairs if defined(line) != row.tolist()] == [], name
    checked = 0
    for old, text, was, now in zip(numbers, texts, before, after, strict=True):
        if was.tolist() == [old]:  # a text of one token
            # With a space in front it has another first piece.
            assert prefixed or now[0] == reduced.first_piece[old], (name, text)
            assert len(now) == 1 or old not in reduced.kept, (name, text)
            checked += 1
    return checked


def test_what_is_left_is_a_tokenizer(tmp_path: Path) -> None:
    """Of both kinds, half of what may go dropped."""
    for name, fields in kinds().items():
        reduced = middle(Vocabulary(fields), fields)
        assert tokens_checked(name, fields, reduced, tmp_path) > 4, name


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_tokenizers(tmp_path: Path, name: str) -> None:
    """Byte-level BPE of 49,152 tokens and SentencePiece of 262,144, cut to 16k; the older tokens
    are the more frequent ones."""
    fields = tokenizer_fields(read_gguf(real_teacher(name)))
    vocabulary = Vocabulary(fields)
    mass = 1.0 / (1.0 + np.arange(len(vocabulary)))
    reduced = vocabulary.select(mass, VocabularySize(1 << 14))
    assert tokens_checked(name, fields, reduced, tmp_path) > 4


def test_what_must_stay_and_what_is_chosen() -> None:
    """Bytes, control tokens but spare ones, roles, the template's; the rest by mass, with what
    each is joined from; so many as asked for."""
    for name, fields in kinds().items():
        vocabulary, mass = Vocabulary(fields), mass_of(fields)
        tokens = vocabulary.tokenizer.tokens
        reduced = middle(vocabulary, fields)
        kept = {tokens[old] for old in reduced.kept.tolist()}
        staying = {tokens[number] for number in vocabulary.tokenizer.roles.values()}
        if vocabulary.tokenizer.model == SENTENCEPIECE:
            staying |= {f"<0x{byte:02X}>" for byte in range(256)} | {"<|user|>", "<|im_end|>"}
            staying |= {"<|unused 2|>"} if name == "pieces" else set()
            assert "<|unused 1|>" not in kept
        else:
            staying |= {text for text in tokens if len(text) == 1}
        assert staying <= kept, name
        pieces = Pieces(vocabulary.tokenizer)
        expected = {one for number in vocabulary.staying for one in pieces.needs(number)}
        for number in sorted(range(len(tokens)), key=lambda one: -mass[one]):
            more = pieces.needs(number)
            if len(expected | more) <= len(reduced):
                expected |= more
        assert set(reduced.kept.tolist()) == expected and len(expected) == len(reduced), name


def test_sizes_and_refusals() -> None:
    """What is asked for, read; what cannot be had, refused in one line."""
    fields = example_fields()
    vocabulary, mass = Vocabulary(fields), mass_of(fields)
    rows = {"16k": 16384, "500": 500, "25%": 256, "12.5 %": 128, "100%": 1024, "AUTO": None}
    for text, count in rows.items():
        size = VocabularySize.parse(text)
        assert size.of(max(1024, count or 0)) == count, text
    for text in ("", "0", "0%", "k", "1.5k", "-5", "101%", "16kk", "all", "1e9", "٣"):
        with pytest.raises(VocabularyError, match="no size of a vocabulary"):
            VocabularySize.parse(text)
            pytest.fail(text)
    with pytest.raises(VocabularyError, match=r"--vocab 2000: .* has 1024 tokens"):
        vocabulary.select(mass, VocabularySize(2000))
    with pytest.raises(VocabularyError, match=r"--vocab 9: (\d+) tokens must stay.*\1 or more"):
        vocabulary.select(mass, VocabularySize(9))
    assert len(vocabulary.select(mass, VocabularySize(share=1.0))) <= 1024
    for model, kind in (("bert", "WPM"), ("t5", "UGM"), ("rwkv", "RWKV"), ("plamo2", "PLaMo")):
        with pytest.raises(VocabularyError, match=kind):
            Vocabulary(edited(fields, model=model))
            pytest.fail(model)
    pieces = sentencepiece_fields()
    tokens = [text.replace("<0x41>", "<oxen>") for text in pieces["tokenizer.ggml.tokens"].value]
    with pytest.raises(VocabularyError, match=r"no token for 1 of the 256 bytes.*<0x41>"):
        Vocabulary(edited(pieces, tokens=tokens))


def test_auto_is_the_smallest_that_keeps_enough() -> None:
    """A few tokens fewer would lose too much or lengthen the text too much."""
    for name, fields in kinds().items():
        vocabulary = Vocabulary(fields)
        made = [bool(vocabulary.pieces.needs(number)) for number in range(len(vocabulary))]
        mass = mass_of(fields) ** 2 * made
        draw = np.random.default_rng(1)
        held_out = draw.multinomial(3000, mass / mass.sum())
        chosen = vocabulary.select(mass, VocabularySize(), held_out=held_out)
        kept = chosen.kept.tolist()

        def enough(some: list[int]) -> bool:
            more = vocabulary.added_tokens(some, held_out)  # noqa: B023
            return mass[some].sum() >= KEPT_MASS * mass.sum() and more <= MORE_TOKENS  # noqa: B023

        assert enough(kept), name
        smaller = vocabulary.select(mass, VocabularySize(len(kept) - 5)).kept.tolist()
        assert len(kept) < len(vocabulary) and not enough(smaller), name


def test_metadata_is_renumbered() -> None:
    """Every entry that names tokens; one that names none stays, a copy of the whole goes."""
    fields = dict(edited(sentencepiece_fields(MORE), padding_token_id=99999, eot_token_id=0))
    fields["llama.vocab_size"] = Field(1, GGUFValueType.UINT32)
    fields["tokenizer.huggingface.json"] = Field("{}", GGUFValueType.STRING)
    vocabulary = Vocabulary(fields)
    reduced = middle(vocabulary, fields)
    cut, new = reduced_fields(fields, reduced), reduced.new_ids
    assert cut["llama.vocab_size"].value == len(reduced) == len(cut["tokenizer.ggml.tokens"].value)
    assert "tokenizer.huggingface.json" not in cut
    for key in ("tokens", "scores", "token_type"):
        before, after = (some[f"tokenizer.ggml.{key}"] for some in (fields, cut))
        assert after.value == [before.value[old] for old in reduced.kept], key
        assert (after.type, after.element_type) == (before.type, before.element_type)
    ids = {key: field.value for key, field in cut.items() if key.endswith("_token_id")}
    expected = {"bos": new[1], "eos": new[2], "eot": new[0], "padding": 99999}
    assert ids == {f"tokenizer.ggml.{role}_token_id": number for role, number in expected.items()}
    dropped = int(np.flatnonzero(new < 0)[0])
    with pytest.raises(VocabularyError, match=r"eom_token_id is .* not kept"):
        reduced_fields(edited(fields, eom_token_id=dropped), reduced)
