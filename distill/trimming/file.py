"""A GGUF file with a part of its vocabulary: rows copied in their quantized blocks, the rest as it
is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from distill.capture.temporary_files.tokenizer_only import metadata_entries
from students.gguf.architectures import EMBEDDING, OUTPUT
from students.gguf.metadata import add_tokenizer
from teachers.base import no_progress
from teachers.gguf.file import Field, GGUFFile, TensorInfo
from teachers.vocabulary.metadata import MERGES, PER_TOKEN, TOKENS, reduced_fields
from teachers.vocabulary.reduced import ReducedVocabulary, VocabularyError

_OWN = ("general.architecture", "split.no", "split.count", "split.tensors.count")
# In whose graph ids have a meaning of their own (its image tokens are never predicted).
_BY_ID = ("chameleon",)


def require_plain_vocabulary(file: GGUFFile) -> None:
    """Refuse a model whose vocabulary lies anywhere but in the rows of embedding and output.

    Raises:
        VocabularyError: it does; names the architecture and what is in the way.
    """
    count = len(file.fields[TOKENS].value)
    elsewhere = [
        tensor.name
        for tensor in file.tensors.values()
        if count in (tensor.shape[1:] if tensor.name in (EMBEDDING, OUTPUT) else tensor.shape)
    ]
    if elsewhere or file.architecture in _BY_ID:
        what = f"{elsewhere[0]!r}" if elsewhere else "token ids in its computation"
        raise VocabularyError(
            f"{file.path}: the vocabulary of the architecture {file.architecture!r} cannot be cut: "
            f"it is not in {EMBEDDING} and {OUTPUT} alone, but in {what} too"
        )
    rows = file.tensors[OUTPUT].shape[0] if OUTPUT in file.tensors else count
    known = {TOKENS, MERGES, *PER_TOKEN}
    lists = [
        key
        for key, field in file.fields.items()
        if isinstance(field.value, list) and len(field.value) == count and key not in known
    ]
    if lists or rows != count:
        what = f"{lists[0]} has" if lists else f"{OUTPUT} has {rows} rows, not"
        raise VocabularyError(
            f"{file.path}: {what} an entry for each of its {count} tokens; how to cut it is not "
            "known"
        )


def write_reduced(
    file: GGUFFile,
    vocabulary: ReducedVocabulary,
    path: Path,
    extras: Mapping[str, str] | None = None,
    progress: Callable[[float], None] = no_progress,
) -> None:
    """Write ``file`` to ``path`` with ``vocabulary``, as one file whatever it was split into.

    ``extras``: further text entries by their keys. ``progress``: the share that is written.

    Raises:
        VocabularyError: see ``require_plain_vocabulary``.
        TokenizerConversionError: malformed tokenizer metadata.
        OSError: the disk refuses.
    """
    require_plain_vocabulary(file)
    fields = reduced_fields(file.fields, vocabulary)
    cut = {EMBEDDING, OUTPUT}
    kept = {name: vocabulary.kept if name in cut else None for name in file.tensors}
    _write(file, path, fields, extras or {}, kept, progress)


def write_vocabulary(file: GGUFFile, path: Path, name: str, *, tensors: bool = True) -> None:
    """Write ``file`` to ``path`` without its layers: metadata, embeddings and output as they are;
    ``name``: the model's, where the file gives it none. Without ``tensors`` the metadata alone.

    Raises:
        OSError: the disk refuses.
    """
    extras = {} if "general.name" in file.fields else {"general.name": name}
    kept = [one for one in file.tensors if tensors and one.startswith((EMBEDDING, "output"))]
    _write(file, path, file.fields, extras, dict.fromkeys(kept), no_progress)


def _write(
    file: GGUFFile,
    path: Path,
    fields: Mapping[str, Field],
    extras: Mapping[str, str],
    kept: Mapping[str, NDArray[np.int64] | None],
    progress: Callable[[float], None],
) -> None:
    """Write metadata, and those tensors of ``file`` that ``kept`` names, all rows or some."""
    writer = GGUFWriter(path, file.architecture)
    try:
        if "general.alignment" in file.fields:
            writer.data_alignment = file.fields["general.alignment"].value
        own = {key: field for key, field in fields.items() if key not in _OWN}
        add_tokenizer(writer, metadata_entries(own))
        for key, text in extras.items():
            writer.add_string(key, text)
        arrays = []
        for name, rows in kept.items():
            tensor = file.tensors[name]
            array = _rows(tensor, rows)
            count = tensor.shape[0] if rows is None else len(rows)
            shape = (count, *tensor.shape[1:])
            kind = np.dtype(np.float32)
            writer.add_tensor_info(name, shape, kind, array.nbytes, raw_dtype=tensor.type)
            arrays.append(array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total, done = sum(array.nbytes for array in arrays), 0
        for array in arrays:
            writer.write_tensor_data(array)
            progress((done := done + array.nbytes) / total)
    finally:
        writer.close()


def _rows(tensor: TensorInfo, kept: NDArray[np.int64] | None) -> NDArray[np.uint8]:
    """A tensor's bytes as they lie in the file; ``kept``: of these rows alone, each a whole number
    of blocks."""
    raw = np.memmap(tensor.path, np.uint8, "r", offset=tensor.offset, shape=(tensor.nbytes,))
    return raw if kept is None else raw.reshape(tensor.shape[0], -1)[kept]
