"""The teacher record: what a student takes from its teacher beside soft targets, kept in the store
so that training needs no teacher.

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
from teachers.gguf.embeddings import EMBEDDING, principal_scores
from teachers.gguf.file import Field, GGUFFile, tokenizer_fields
from teachers.store.store import SoftTargetStore
from teachers.targets.distributions import Arrays
from teachers.tokenizer.gguf_metadata import with_template_variables
from teachers.vocabulary.cut import VocabularyCut

TEACHER = "teacher.safetensors"
LINE_SEQUENCES = 64
LINE_TOKENS = 16_384
ABOUT = (
    *("author", "version", "organization", "url", "doi", "uuid", "repo_url"),
    *("license", "license.name", "license.link"),
)
ABOUT_CHARACTERS = 500  # of one text that a teacher's file says about itself
UNKNOWN = ("parameters", "width", "layers")  # perhaps, and then 0
COUNTS = (*UNKNOWN, "vocab_size", "context_length")


@dataclass(frozen=True)
class TeacherRecord:
    """The teacher's facts, ``lines`` to check an exported tokenizer against, tokenizer and
    embeddings.

    ``tokenizer`` (GGUF metadata) is empty and ``embeddings`` (``[V, C]``, see ``principal_scores``)
    has no rows where no teacher is a GGUF file. ``about``: what such a file says of itself (its
    ``general.*`` keys in ``ABOUT``, and ``languages`` with commas), as far as it does, and under
    ``text`` what the sequences are. ``cut``: how the teacher's vocabulary was cut; then the facts,
    tokenizer and embeddings are of what is left of it.
    """

    info: TeacherInfo
    lines: TokenizedLines
    tokenizer: dict[str, Field]
    embeddings: NDArray[np.float16]
    about: dict[str, str] = field(default_factory=dict)
    cut: VocabularyCut | None = None

    def arrays(self) -> Arrays:
        """Named arrays: the embeddings, and all else as the bytes of one JSON text."""
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
        arrays: Arrays = {"card": text} | (self.cut.arrays() if self.cut is not None else {})
        return arrays | ({"embeddings": self.embeddings} if self.tokenizer else {})

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> TeacherRecord:
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
        cut = VocabularyCut.in_arrays(arrays)
        if cut is not None and len(cut.vocabulary) != info.vocab_size:
            raise ValueError(f"a vocabulary cut to other than {info.vocab_size} tokens")
        return cls(info, texts, tokenizer, embeddings, about, cut)  # type: ignore[arg-type]


def make_teacher_record(
    teacher: Teacher, file: GGUFFile | None, sequences: Iterable[Tokens], text: str = ""
) -> TeacherRecord:
    """Gather what a student takes from ``teacher``; ``file``: whose tokenizer and embeddings, if
    there is one; ``text``: what the sequences are, in words."""
    lines = tokenized_lines(teacher, first_sequences(sequences, LINE_SEQUENCES, LINE_TOKENS))
    if file is None:
        return TeacherRecord(teacher.info, lines, {}, np.empty((0, 0), np.float16), {"text": text})
    fields = with_template_variables(tokenizer_fields(file), teacher.info.template_variables)
    about = {**_about(file), "text": text}
    none = np.empty((teacher.info.vocab_size, 0), np.float16)  # of a vocabulary alone
    scores = principal_scores(file) if EMBEDDING in file.tensors else none
    return TeacherRecord(teacher.info, lines, fields, scores, about)


def write_teacher_record(store: SoftTargetStore, teacher_record: TeacherRecord) -> None:
    """Keep it in the store, whole or not at all."""
    store.write_file(TEACHER, teacher_record.arrays())


def find_teacher_record(store: SoftTargetStore) -> TeacherRecord | None:
    """What the store keeps of its teacher, or ``None`` where that file is missing or damaged."""
    arrays = store.read_file(TEACHER) if (store.folder / TEACHER).exists() else None
    if arrays is None:
        return None
    try:
        return TeacherRecord.from_arrays(arrays)
    except (KeyError, TypeError, ValueError, AttributeError):  # sealed, but not by this program
        return None


def require_teacher_record(store: SoftTargetStore) -> TeacherRecord:
    """What the store keeps of its teacher.

    Raises:
        StoreError: it is missing or damaged; a rerun of the capture makes it again.
    """
    record = find_teacher_record(store)
    if record is None:
        wrong = "damaged" if (store.folder / TEACHER).exists() else "missing"
        raise StoreError(
            f"store {store.folder}: {TEACHER} (the teacher's tokenizer and embeddings) is {wrong}; "
            "run the capture again where the teacher is, which makes just what is missing"
        )
    return record


def tokenized_lines(teacher: Teacher, sequences: Sequence[Tokens]) -> TokenizedLines:
    """The texts of sequences with the teacher's ids for them, to check an exported tokenizer."""
    texts = teacher.detokenize(sequences)
    tokens = teacher.tokenize(texts, add_special=True, parse_special=True)
    kept = [(text, ids) for text, ids in zip(texts, tokens, strict=True) if len(ids)]
    return TokenizedLines([text for text, _ in kept], [ids for _, ids in kept])


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
    shape = TeacherShape.from_untrusted(**stated)
    if asdict(shape) != asdict(TeacherShape()) | stated:
        raise ValueError(f"a shape that no teacher has, {stated}")
    info = TeacherInfo(**content | {"end_tokens": tuple(content["end_tokens"]), "shape": shape})
    counts = {name: getattr(info, name) for name in COUNTS}
    unknown = UNKNOWN if info.file_bytes == 0 else ()  # of a teacher behind a server
    if any(
        type(count) is not int or count < (0 if name in unknown else 1)
        for name, count in counts.items()
    ):
        raise ValueError(f"facts {counts}")
    return info


def _about(file: GGUFFile) -> dict[str, str]:
    """What the file says of itself, in text that can be written elsewhere."""
    stated = {key: file.value(f"general.{key}") for key in ABOUT}
    languages = file.value("general.languages")
    if isinstance(languages, list):
        stated["languages"] = ",".join(name for name in languages if isinstance(name, str))
    about = {}
    for key, text in stated.items():
        if isinstance(text, str):
            readable = text.encode("utf-8", errors="replace").decode("utf-8")
            about[key] = " ".join(readable.split())[:ABOUT_CHARACTERS]
    return {key: text for key, text in about.items() if text}


def _field(value: Any, kind: int, element: int | None) -> Field:
    return Field(value, GGUFValueType(kind), None if element is None else GGUFValueType(element))
