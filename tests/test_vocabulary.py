"""The vocabulary check between a GGUF teacher and a base model: what agrees, what is padding, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFValueType, TokenType
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from distill.errors import UserError
from distill.vocabulary import VocabularyMatch, compare_vocabularies
from teachers import example_teacher
from teachers.gguf_file import Field, read_gguf, tokenizer_fields
from teachers.tokenizer_json import write_tokenizer_folder
from tests.conftest import shared_file

NORMAL, UNKNOWN, CONTROL = int(TokenType.NORMAL), int(TokenType.UNKNOWN), int(TokenType.CONTROL)
USER_DEFINED, UNUSED = int(TokenType.USER_DEFINED), int(TokenType.UNUSED)
TOKENS = ("<s>", "</s>", "a", "b", "ab", "▁")


def teacher(tokens: tuple[str, ...], kinds: dict[int, int] | None = None, **roles: int) -> dict[str, Field]:
    """Metadata of a teacher with these tokens, normal ones but for ``kinds``; ``bos=0, eos=1`` unless told."""
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
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_all_alike() -> None:
    match = compare_vocabularies(teacher(TOKENS, {0: CONTROL, 1: CONTROL}), base(TOKENS), 6, 6)
    assert match == VocabularyMatch(common=6, padding=0, rows_to_add=0, rows_to_cut=0, tokens_cut=0, roles={})
    assert match.words() == "6 tokens, all alike"


def test_base_rows_beyond_the_teacher_are_cut() -> None:
    match = compare_vocabularies(teacher(TOKENS), base(TOKENS), 70, 6)
    assert (match.rows_to_cut, match.rows_to_add, match.tokens_cut) == (64, 0, 0)
    assert match.words() == "6 tokens, all alike; the base has 64 more rows, which are padding and are cut"


def test_base_tokens_beyond_the_teacher_are_cut_and_told() -> None:
    """A base whose makers added tokens later; its padding names count as padding."""
    match = compare_vocabularies(
        teacher(TOKENS), base(TOKENS, ("<|tool|>", "<|reserved_special_token_1|>")), 9, 6
    )
    assert (match.common, match.rows_to_cut, match.tokens_cut) == (6, 3, 1)
    assert match.words().endswith("the base has 3 more rows, which are padding but for 1 token and are cut")


@pytest.mark.parametrize(
    "name",
    [
        "[PAD6]",
        "<unused6>",
        "<|reserved_special_token_6|>",
        "<|placeholder6|>",
        "[EMPTY_6]",
        "<SPECIAL_6>",
        "",
    ],
)
def test_teacher_padding_by_name(name: str) -> None:
    """The teacher's padding has no token in the base: rows of the base stand for it, or are added."""
    fields = teacher((*TOKENS, name), {6: UNKNOWN})
    roomy, tight = (compare_vocabularies(fields, base(TOKENS), rows, 7) for rows in (7, 6))
    assert (roomy.common, roomy.padding, roomy.rows_to_add) == (6, 1, 0)
    assert (tight.common, tight.padding, tight.rows_to_add) == (6, 1, 1)
    assert roomy.words() == "6 tokens, all alike; 1 more id of the teacher is padding"
    assert tight.words() == f"{roomy.words()}; the base has 1 row fewer, which is added"


def test_teacher_padding_by_type_and_beyond_its_tokens() -> None:
    """Whatever an unused token is called; and rows of the teacher that no token belongs to."""
    match = compare_vocabularies(teacher((*TOKENS, "anything"), {6: UNUSED}), base(TOKENS), 8, 10)
    assert (match.common, match.padding, match.rows_to_add, match.rows_to_cut) == (6, 4, 2, 0)


def test_padding_has_other_names_on_each_side() -> None:
    match = compare_vocabularies(
        teacher((*TOKENS, "[PAD6]"), {6: UNUSED}), base(TOKENS, ("<|extra_0|>",)), 7, 7
    )
    assert (match.common, match.padding) == (6, 1)


def test_spaces_in_user_defined_tokens() -> None:
    """Converters write ▁▁ of a user-defined token as two spaces; of a normal one they do not."""
    tokens = (*TOKENS[:4], "  ", "▁")
    assert (
        compare_vocabularies(teacher(tokens, {4: USER_DEFINED}), base((*TOKENS[:4], "▁▁", "▁")), 6, 6).common
        == 6
    )
    with pytest.raises(UserError, match="first token 4"):
        compare_vocabularies(teacher(tokens), base((*TOKENS[:4], "▁▁", "▁")), 6, 6)


def test_roles_are_told_not_refused() -> None:
    match = compare_vocabularies(teacher(TOKENS, eos=4, bos=99), base(TOKENS), 6, 6)
    assert match.roles == {"bos": (0, None), "eos": (1, 4)}
    assert match.words() == (
        "6 tokens, all alike; bos is 0 in the base, missing in the teacher, whose is used; eos is 1 in the base, 4 in "
        "the teacher, whose is used"
    )


@pytest.mark.parametrize(
    ("tokens", "other", "message"),
    [
        (TOKENS, ("<s>", "</s>", "b", "a", "ab", "▁"), "2 of 6 tokens differ, first token 2, which is 'a' .* and 'b'"),
        ((*TOKENS, "<|user|>"), TOKENS, "1 of 7 tokens differs, first token 6, .* '<|user|>' .* and missing"),
        ((*TOKENS, "[PAD6]"), (*TOKENS, "c"), "1 of 7 tokens differs, first token 6, .* 'c' in the base"),
        (TOKENS, (*TOKENS[:5], "<unused5>"), "1 of 6 tokens differs, first token 5"),
        ((*TOKENS, "<|vision_pad|>"), TOKENS, "first token 6"),
    ],
)  # fmt: skip
def test_refused(tokens: tuple[str, ...], other: tuple[str, ...], message: str) -> None:
    """Each difference is counted, the first one named, and the message says what to do."""
    with pytest.raises(UserError, match=message.replace("|", r"\|")) as refusal:
        compare_vocabularies(teacher(tokens), base(other), len(tokens) + 3, len(tokens))
    assert "distill plan" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_row_short_of_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="has 6 tokens, its embedding only 5 rows"):
        compare_vocabularies(teacher(TOKENS), base(TOKENS), 5, 6)
    with pytest.raises(UserError, match="teacher's tokenizer has 6 tokens, its embedding only 5 rows"):
        compare_vocabularies(teacher(TOKENS), base(TOKENS), 6, 5)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'a' occurs twice"):
        compare_vocabularies(teacher(("a", "a")), base(TOKENS), 6, 2)
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be used"):
        compare_vocabularies(teacher(TOKENS), tmp_path, 6, 6)


def test_a_folder_made_from_the_teacher(tmp_path: Path) -> None:
    """A tokenizer.json written from the teacher's own metadata agrees with it, read from its folder."""
    file = read_gguf(example_teacher())
    fields = tokenizer_fields(file)
    write_tokenizer_folder(fields, tmp_path)
    match = compare_vocabularies(fields, tmp_path, 1088, 1024)
    assert (
        match.words() == "1,024 tokens, all alike; the base has 64 more rows, which are padding and are cut"
    )


def test_a_real_sentencepiece_teacher(tmp_path: Path) -> None:
    """Phi-3's vocabulary against itself, and against another family's."""
    fields = tokenizer_fields(read_gguf(shared_file("teachers/wikiphi-q8_0.gguf")))
    write_tokenizer_folder(fields, tmp_path)
    assert compare_vocabularies(fields, tmp_path, 32064, 32064).words() == "32,064 tokens, all alike"
    write_tokenizer_folder(tokenizer_fields(read_gguf(example_teacher())), tmp_path)
    with pytest.raises(
        UserError, match="32,064 tokens differ, first token 0, which is '<unk>' in the teacher"
    ):
        compare_vocabularies(fields, tmp_path, 32064, 32064)
