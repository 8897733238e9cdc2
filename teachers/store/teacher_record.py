"""What a student takes from its teacher beside soft targets; kept in the store, so that training
needs no teacher.

``teacher.safetensors`` holds the principal scores of the teacher's token embeddings and, as JSON,
the facts about it, its GGUF tokenizer with the chat template, and texts with the teacher's own ids
for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from teachers.atomic_files import StoreError
from teachers.base import Teacher, TeacherInfo, TeacherShape, TokenizedLines, Tokens
from teachers.gguf.embeddings import principal_scores
from teachers.gguf.file import Field, GGUFFile, tokenizer_fields
from teachers.store.store import SoftTargetStore
from teachers.targets.distributions import Arrays

TEACHER = "teacher.safetensors"
LINE_SEQUENCES = 64
LINE_TOKENS = 16_384
ABOUT = (
    "author",
    "version",
    "organization",
    "url",
    "doi",
    "uuid",
    "repo_url",
    "license",
    "license.name",
    "license.link",
)
ABOUT_CHARACTERS = 500  # of one text that a teacher's file says about itself
COUNTS = ("parameters", "vocab_size", "width", "layers", "context_length")


@dataclass(frozen=True)
class Inheritance:
    """The teacher's facts, ``lines`` to check an exported tokenizer against, tokenizer and
    embeddings.

    ``tokenizer`` (GGUF metadata) is empty and ``embeddings`` (``[V, C]``, see ``principal_scores``)
    has no rows where no teacher is a GGUF file. ``about``: what such a file says of itself (its
    ``general.*`` keys in ``ABOUT``, and ``languages`` with commas), as far as it does, and under
    ``text`` what the sequences are.
    """

    info: TeacherInfo
    lines: TokenizedLines
    tokenizer: dict[str, Field]
    embeddings: NDArray[np.float16]
    about: dict[str, str] = field(default_factory=dict)

    def arrays(self) -> Arrays:
        """Everything as named arrays; all but the embeddings as the bytes of one JSON text."""
        card: dict[str, Any] = {
            "info": asdict(self.info),
            "texts": self.lines.texts,
            "text_tokens": [tokens.tolist() for tokens in self.lines.tokens],
            "tokenizer": {
                key: [field.value, field.type, field.element_type]
                for key, field in self.tokenizer.items()
            },
        }
        if self.about:
            card["about"] = self.about
        text = np.frombuffer(json.dumps(card).encode("ascii"), dtype=np.uint8)
        return {"card": text} | ({"embeddings": self.embeddings} if self.tokenizer else {})

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Inheritance:
        """The inverse of ``arrays``.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: these arrays are something else.
        """
        card = json.loads(arrays["card"].tobytes())
        info = _info(card["info"])
        tokenizer = {str(key): _field(*entry) for key, entry in card["tokenizer"].items()}
        embeddings = arrays["embeddings"] if tokenizer else np.empty((0, 0), np.float16)
        if tokenizer and (embeddings.ndim != 2 or len(embeddings) != info.vocab_size):
            raise ValueError(f"embeddings {embeddings.shape} of {info.vocab_size} tokens")
        if tokenizer and len(tokenizer["tokenizer.ggml.tokens"].value) != info.vocab_size:
            raise ValueError(f"a tokenizer of other than {info.vocab_size} tokens")
        lines = [np.array(ids, dtype=np.int32) for ids in card["text_tokens"]]
        texts = TokenizedLines([str(text) for text in card["texts"]], lines)
        about = {str(key): str(text) for key, text in card.get("about", {}).items()}
        return cls(info, texts, tokenizer, embeddings, about)  # type: ignore[arg-type]


def inherit(
    teacher: Teacher, file: GGUFFile | None, sequences: Iterable[Tokens], text: str = ""
) -> Inheritance:
    """Gather what a student takes from ``teacher``; ``file``: whose tokenizer and embeddings, if
    there is one; ``text``: what the sequences are, in words."""
    lines = tokenized_lines(teacher, first_sequences(sequences, LINE_SEQUENCES, LINE_TOKENS))
    if file is None:
        return Inheritance(teacher.info, lines, {}, np.empty((0, 0), np.float16), {"text": text})
    return Inheritance(
        teacher.info,
        lines,
        tokenizer_fields(file),
        principal_scores(file),
        {**_about(file), "text": text},
    )


def write_inheritance(store: SoftTargetStore, inheritance: Inheritance) -> None:
    """Keep it in the store, whole or not at all.

    Raises:
        OSError: the disk refuses.
    """
    store.write_file(TEACHER, inheritance.arrays())


def find_inheritance(store: SoftTargetStore) -> Inheritance | None:
    """What the store keeps of its teacher, or ``None`` where that file is missing or damaged."""
    arrays = store.read_file(TEACHER) if (store.folder / TEACHER).exists() else None
    if arrays is None:
        return None
    try:
        return Inheritance.from_arrays(arrays)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ):  # well sealed, but not by this program
        return None


def need_inheritance(store: SoftTargetStore) -> Inheritance:
    """What the store keeps of its teacher.

    Raises:
        StoreError: it is missing or damaged; a rerun of the capture makes it again.
    """
    found = find_inheritance(store)
    if found is None:
        wrong = "damaged" if (store.folder / TEACHER).exists() else "missing"
        raise StoreError(
            f"store {store.folder}: {TEACHER} (the teacher's tokenizer and embeddings) is {wrong}; "
            "run the capture "
            "again where the teacher is, which makes just what is missing"
        )
    return found


def tokenized_lines(teacher: Teacher, sequences: Sequence[Tokens]) -> TokenizedLines:
    """The text of some sequences with the teacher's ids for it, to check an exported tokenizer
    against."""
    texts = teacher.detokenize(sequences)
    tokens = teacher.tokenize(texts, add_special=True, parse_special=True)
    told = [(text, ids) for text, ids in zip(texts, tokens, strict=True) if len(ids)]
    return TokenizedLines([text for text, _ in told], [ids for _, ids in told])


def first_sequences(sequences: Iterable[Tokens], count: int, total: int) -> list[Tokens]:
    """The first sequences: ``count`` at most, with at most ``total`` tokens, one at least."""
    chosen: list[Tokens] = []
    for tokens in sequences:
        if len(chosen) == count or (chosen and sum(map(len, chosen)) + len(tokens) > total):
            break
        chosen.append(tokens)
    return chosen


def _info(content: dict[str, Any]) -> TeacherInfo:
    stated = content.get("shape", {})  # stores made before it was kept have none
    shape = TeacherShape.believed(**stated)
    if asdict(shape) != asdict(TeacherShape()) | stated:
        raise ValueError(f"a shape that no teacher has, {stated}")
    info = TeacherInfo(**content | {"end_tokens": tuple(content["end_tokens"]), "shape": shape})
    if any(type(getattr(info, name)) is not int or getattr(info, name) < 1 for name in COUNTS):
        raise ValueError(f"facts {[(name, getattr(info, name)) for name in COUNTS]}")
    return info


def _about(file: GGUFFile) -> dict[str, str]:
    """What the file says of itself, in text that can be written elsewhere."""
    found = {key: file.value(f"general.{key}") for key in ABOUT}
    languages = file.value("general.languages")
    if isinstance(languages, list):
        found["languages"] = ",".join(name for name in languages if isinstance(name, str))
    readable = {
        key: " ".join(text.encode("utf-8", errors="replace").decode("utf-8").split())[
            :ABOUT_CHARACTERS
        ]
        for key, text in found.items()
        if isinstance(text, str)
    }
    return {key: text for key, text in readable.items() if text}


def _field(value: Any, kind: int, element: int | None) -> Field:
    return Field(value, GGUFValueType(kind), None if element is None else GGUFValueType(element))
