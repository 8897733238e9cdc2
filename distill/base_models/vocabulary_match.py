"""Whether a base model and a GGUF teacher have the same token at every id, as distillation by
logits needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from distill.errors import UserError
from teachers.gguf.file import Field, TeacherFileError
from teachers.huggingface.checkpoint import load_tokenizer
from teachers.huggingface.folder import ModelFolder
from teachers.tokenizer.gguf_metadata import (
    TokenizerConversionError,
    read_roles,
    read_tokens,
    token_text,
)

# Names that converters give to rows without a token: [PAD32011], <unused7>, <|reserved_9|>, …
_PADDING = re.compile(
    r"[\[<]\|?_?(pad|padding|unused|reserved|reserved_token|reserved_special_token|placeholder|"
    r"empty|dummy|extra|special)"
    r"[_ -]?\d+\|?[\]>]",
    re.IGNORECASE,
)
_ROLES = ("bos", "eos")
_REMEDY = "use a base model of the teacher's own family, and try it with distill plan first"


@dataclass(frozen=True)
class VocabularyMatch:
    """A teacher's vocabulary and a base model's that agree.

    ``common``: tokens both have, at the same ids. ``padding``: ids of the teacher that no text
    produces and the base has no such token for. ``rows_to_add`` and ``rows_to_cut``: how the base's
    rows become the teacher's (one of the two is 0); ``tokens_cut``: how many of the rows cut are
    tokens the base knows. ``roles``: for ``bos`` and ``eos``, where they differ, the base's id and
    the teacher's (``None``: it has none); the teacher's is used.
    """

    common: int
    padding: int
    rows_to_add: int
    rows_to_cut: int
    tokens_cut: int
    roles: dict[str, tuple[int | None, int | None]]

    def describe(self) -> str:
        """One line for the console."""
        parts = [f"{_count(self.common, 'token')}, all alike"]
        if self.padding:
            parts.append(
                f"{_count(self.padding, 'more id')} of the teacher {_are(self.padding)} padding"
            )
        if self.rows_to_add:
            are = _are(self.rows_to_add)
            parts.append(f"the base has {_count(self.rows_to_add, 'row')} fewer, which {are} added")
        if self.rows_to_cut:
            more, are = _count(self.rows_to_cut, "more row"), _are(self.rows_to_cut)
            but = f" but for {_count(self.tokens_cut, 'token')}" if self.tokens_cut else ""
            parts.append(f"the base has {more}, which {are} padding{but} and {are} cut")
        for role, (base, teacher) in self.roles.items():
            parts.append(
                f"{role} is {_id(base)} in the base, {_id(teacher)} in the teacher, whose is used"
            )
        return "; ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _id(number: int | None) -> str:
    return "missing" if number is None else str(number)


def compare_vocabularies(
    fields: Mapping[str, Field],
    tokenizer: Path | Mapping[str, Field] | Any,
    base_rows: int,
    teacher_rows: int,
) -> VocabularyMatch:
    """Compare a GGUF teacher's vocabulary with a base model's, id by id.

    Args:
        fields: the teacher's metadata (the ``tokenizer.*`` entries at least).
        tokenizer: the base model's: the folder it is in, as ``load_tokenizer`` gives it, or GGUF
            metadata as ``fields``.
        base_rows: rows of the base model's embedding.
        teacher_rows: rows of the teacher's.

    Raises:
        UserError: a token differs, or a tokenizer cannot be read.
    """
    try:
        texts, kinds = read_tokens(fields)
        theirs = read_roles(fields, len(texts))
        base, own = _tokens_and_roles(tokenizer, base_rows)
    except (TokenizerConversionError, TeacherFileError) as error:
        raise UserError(str(error)) from None
    if max(base, default=-1) >= base_rows:
        raise UserError(
            f"the base's tokenizer has {max(base) + 1:,} tokens, its embedding only {base_rows:,} "
            "rows; use the tokenizer that belongs to the base model"
        )
    if len(texts) > teacher_rows:
        raise UserError(
            f"the teacher's tokenizer has {len(texts):,} tokens, its embedding only "
            f"{teacher_rows:,} rows; convert the teacher again"
        )
    common = padding = 0
    different: list[int] = []
    for number in range(teacher_rows):
        text = texts[number] if number < len(texts) else None
        ours = base.get(number)
        if text is not None and ours is not None and _alike(text, kinds[number], ours, number):
            common += 1
        elif (text is None or _is_padding(text, kinds[number])) and (
            ours is None or _PADDING.fullmatch(ours)
        ):
            padding += 1
        else:
            different.append(number)
    if different:
        raise UserError(_difference(texts, base, different, teacher_rows))
    roles = {role: (own.get(role), theirs.get(role)) for role in _ROLES}
    return VocabularyMatch(
        common=common,
        padding=padding,
        rows_to_add=max(0, teacher_rows - base_rows),
        rows_to_cut=max(0, base_rows - teacher_rows),
        tokens_cut=sum(
            number >= teacher_rows and not _PADDING.fullmatch(text) for number, text in base.items()
        ),
        roles={role: pair for role, pair in roles.items() if pair[0] != pair[1]},
    )


def _tokens_and_roles(
    tokenizer: Path | Mapping[str, Field] | Any, rows: int
) -> tuple[dict[int, str], dict[str, int | None]]:
    """A base's tokens by their ids, and the ids of those of ``_ROLES``."""
    if isinstance(tokenizer, Mapping):
        texts = read_tokens(tokenizer)[0]
        return dict(enumerate(texts)), dict(read_roles(tokenizer, len(texts)))
    if isinstance(tokenizer, Path):
        tokenizer = load_tokenizer(ModelFolder(tokenizer, {}, ()), rows)
    base = {number: text for text, number in tokenizer.get_vocab().items()}
    return base, {role: getattr(tokenizer, f"{role}_token_id") for role in _ROLES}


def _is_padding(text: str, kind: TokenType) -> bool:
    return kind == TokenType.UNUSED or _PADDING.fullmatch(text) is not None


def _alike(text: str, kind: TokenType, ours: str, number: int) -> bool:
    """Whether a teacher's token is the base's ``ours``, up to how conversion to GGUF writes it."""
    ours = token_text(ours, number)
    # User-defined tokens are looked for before spaces become ▁, so converters write theirs as
    # spaces.
    return text == ours or (kind == TokenType.USER_DEFINED and text == ours.replace("▁", " "))


def _difference(
    texts: tuple[str, ...], base: Mapping[int, str], different: list[int], teacher_rows: int
) -> str:
    first = different[0]
    teacher = repr(texts[first]) if first < len(texts) else "missing"
    ours = repr(base[first]) if first in base else "missing"
    return (
        f"the base does not have the teacher's vocabulary: {len(different):,} of "
        f"{_count(teacher_rows, 'token')} {'differs' if len(different) == 1 else 'differ'}, first "
        f"token {first}, which is {teacher} in the teacher and {ours} in the base; {_REMEDY}"
    )
