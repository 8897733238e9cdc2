"""The vocabulary check of a GGUF teacher and a base: what agrees, is padding, is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFValueType, TokenType
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from distill.base_models.vocabulary_match import VocabularyMatch, compare_vocabularies
from distill.errors import UserError
from teachers import example_teacher
from teachers.gguf.file import Field, read_gguf, tokenizer_fields
from teachers.tokenizer.tokenizer_json import write_tokenizer_folder
from tests.support.teachers import shared_file

NORMAL, UNKNOWN, CONTROL = int(TokenType.NORMAL), int(TokenType.UNKNOWN), int(TokenType.CONTROL)
USER_DEFINED, UNUSED = int(TokenType.USER_DEFINED), int(TokenType.UNUSED)
TOKENS = ("<s>", "</s>", "a", "b", "ab", "▁")


def teacher(
    tokens: tuple[str, ...], kinds: dict[int, int] | None = None, **roles: int
) -> dict[str, Field]:
    """Metadata of these tokens, normal ones but for ``kinds``; ``bos=0, eos=1`` unless told."""
    types = [(kinds or {}).get(number, NORMAL) for number in range(len(tokens))]
    fields = {
        "tokenizer.ggml.model": Field("gpt2", GGUFValueType.STRING),
        "tokenizer.ggml.tokens": Field(list(tokens), GGUFValueType.ARRAY, GGUFValueType.STRING),
        "tokenizer.ggml.token_type": Field(types, GGUFValueType.ARRAY, GGUFValueType.INT32),
    }
    for role, number in {"bos": 0, "eos": 1, **roles}.items():
        fields[f"tokenizer.ggml.{role}_token_id"] = Field(number, GGUFValueType.UINT32)
    return fields


def base(tokens: tuple[str, ...], added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A base model's tokenizer with these tokens, ``added`` ones behind them."""
    tokenizer = Tokenizer(
        models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[])
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_what_agrees() -> None:
    """Rows of the base beyond the teacher are cut, padding or not; missing ones are added."""
    controls = teacher(TOKENS, {0: CONTROL, 1: CONTROL})
    match = compare_vocabularies(controls, base(TOKENS), 6, 6)
    assert match == VocabularyMatch(
        6, padding=0, rows_to_add=0, rows_to_cut=0, tokens_cut=0, roles={}
    )
    assert match.describe() == "6 tokens, all alike"
    match = compare_vocabularies(teacher(TOKENS), base(TOKENS), 70, 6)
    assert (match.rows_to_cut, match.rows_to_add, match.tokens_cut) == (64, 0, 0)
    assert match.describe().startswith(
        "6 tokens, all alike; the base has 64 more rows, which are padding"
    )
    # A base whose makers added tokens later; its padding names count as padding.
    added = base(TOKENS, ("<|tool|>", "<|reserved_special_token_1|>"))
    match = compare_vocabularies(teacher(TOKENS), added, 9, 6)
    assert (match.common, match.rows_to_cut, match.tokens_cut) == (6, 3, 1)
    assert "3 more rows, which are padding but for 1 token and are cut" in match.describe()


def test_teacher_padding_by_name() -> None:
    """The teacher's padding is no token of the base: its rows stand for it, or are added."""
    numbered = ("[PAD6]", "<unused6>", "<|placeholder6|>", "[EMPTY_6]", "<SPECIAL_6>")
    for name in (*numbered, "<|reserved_special_token_6|>", ""):
        fields = teacher((*TOKENS, name), {6: UNKNOWN})
        for rows, added in ((7, 0), (6, 1)):
            match = compare_vocabularies(fields, base(TOKENS), rows, 7)
            assert (match.common, match.padding, match.rows_to_add) == (6, 1, added), name
            assert "6 tokens, all alike; 1 more id of the teacher is padding" in match.describe()
            assert ("the base has 1 row fewer, which is added" in match.describe()) == bool(added)


def test_teacher_padding_by_type_and_beyond_its_tokens() -> None:
    """Whatever an unused token is called, in either; and rows that no token belongs to."""
    match = compare_vocabularies(teacher((*TOKENS, "anything"), {6: UNUSED}), base(TOKENS), 8, 10)
    found = (match.common, match.padding, match.rows_to_add, match.rows_to_cut)
    assert found == (6, 4, 2, 0)
    fields, other = teacher((*TOKENS, "[PAD6]"), {6: UNUSED}), base(TOKENS, ("<|extra_0|>",))
    match = compare_vocabularies(fields, other, 7, 7)
    assert (match.common, match.padding) == (6, 1)


def test_spaces_in_user_defined_tokens() -> None:
    """Converters write ▁▁ of a user-defined token as two spaces; of a normal one they do not."""
    tokens, other = (*TOKENS[:4], "  ", "▁"), base((*TOKENS[:4], "▁▁", "▁"))
    assert compare_vocabularies(teacher(tokens, {4: USER_DEFINED}), other, 6, 6).common == 6
    with pytest.raises(UserError, match="first token 4"):
        compare_vocabularies(teacher(tokens), other, 6, 6)


def test_roles_are_told_not_refused() -> None:
    """Which token begins and ends a text may differ; the teacher's is used."""
    match = compare_vocabularies(teacher(TOKENS, eos=4, bos=99), base(TOKENS), 6, 6)
    assert match.roles == {"bos": (0, None), "eos": (1, 4)}
    assert "bos is 0 in the base, missing in the teacher, whose is used" in match.describe()
    assert "eos is 1 in the base, 4 in the teacher, whose is used" in match.describe()


def test_refused(tmp_path: Path) -> None:
    """Each difference is counted, the first one named, and the message says what to do."""
    swapped, user = ("<s>", "</s>", "b", "a", "ab", "▁"), (*TOKENS, "<|user|>")
    for tokens, other, message in (
        (TOKENS, swapped, "2 of 6 tokens differ, first token 2, which is 'a' .* and 'b'"),
        (user, TOKENS, r"1 of 7 tokens differs, first token 6, .* '<\|user\|>' .* and missing"),
        ((*TOKENS, "[PAD6]"), (*TOKENS, "c"), "1 of 7 .* first token 6, .* 'c' in the base"),
        (TOKENS, (*TOKENS[:5], "<unused5>"), "1 of 6 tokens differs, first token 5"),
        ((*TOKENS, "<|vision_pad|>"), TOKENS, "first token 6"),
    ):
        with pytest.raises(UserError, match=message) as refusal:
            compare_vocabularies(teacher(tokens), base(other), len(tokens) + 3, len(tokens))
        assert "distill plan" in str(refusal.value) and "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="has 6 tokens, its embedding only 5 rows"):
        compare_vocabularies(teacher(TOKENS), base(TOKENS), 5, 6)
    with pytest.raises(UserError, match=r"teacher's tokenizer has 6 tokens, its .* only 5 rows"):
        compare_vocabularies(teacher(TOKENS), base(TOKENS), 6, 5)
    with pytest.raises(UserError, match="'a' occurs twice"):
        compare_vocabularies(teacher(("a", "a")), base(TOKENS), 6, 2)
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be used"):
        compare_vocabularies(teacher(TOKENS), tmp_path, 6, 6)


def test_a_folder_made_from_the_teacher(tmp_path: Path) -> None:
    """A tokenizer.json written from the teacher's own metadata agrees with it."""
    file = read_gguf(example_teacher())
    fields = tokenizer_fields(file)
    write_tokenizer_folder(fields, tmp_path)
    match = compare_vocabularies(fields, tmp_path, 1088, 1024)
    assert match.common == 1024 and match.rows_to_cut == 64 and match.padding == 0
    assert match.describe().startswith("1,024 tokens, all alike; the base has 64 more rows")


def test_a_real_sentencepiece_teacher(tmp_path: Path) -> None:
    """Phi-3's vocabulary against itself, and against another family's."""
    fields = tokenizer_fields(read_gguf(shared_file("teachers/wikiphi-q8_0.gguf")))
    write_tokenizer_folder(fields, tmp_path)
    assert (
        compare_vocabularies(fields, tmp_path, 32064, 32064).describe()
        == "32,064 tokens, all alike"
    )
    write_tokenizer_folder(tokenizer_fields(read_gguf(example_teacher())), tmp_path)
    with pytest.raises(
        UserError, match="32,064 tokens differ, first token 0, which is '<unk>' in the teacher"
    ):
        compare_vocabularies(fields, tmp_path, 32064, 32064)
