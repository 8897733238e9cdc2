"""The checked GGUF reader: real files read right, damaged ones refused with a reason."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from teachers import example_teacher
from teachers.gguf.file import TeacherFileError, read_gguf, tokenizer_sha256


def test_agrees_with_the_gguf_package(tiny_teacher_path: Path) -> None:
    """Same fields, same tensors, same values as the library's own reader."""
    ours, theirs = read_gguf(tiny_teacher_path), gguf.GGUFReader(tiny_teacher_path)
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.fields.keys() == fields.keys()
    for key, field in fields.items():
        value = field.contents()
        expected = pytest.approx(value) if isinstance(value, float) else value
        assert ours.value(key) == expected, key
    for tensor in theirs.tensors:
        assert np.array_equal(ours.tensor(tensor.name).ravel(), np.asarray(tensor.data).ravel())


def test_quantized_tensors_are_dequantized() -> None:
    """The example teacher's embedding reads as float32 in its true shape."""
    model = read_gguf(example_teacher())
    embedding = model.tensor("token_embd.weight")
    assert embedding.shape == model.tensors["token_embd.weight"].shape
    assert embedding.dtype == np.float32 and np.isfinite(embedding).all() and embedding.std() > 0


def test_every_truncation_is_refused(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """A file cut anywhere — header, metadata, tensor table, data — never reads as whole."""
    whole = tiny_teacher_path.read_bytes()
    path = tmp_path / "cut.gguf"
    size = len(whole)
    for kept in (0, 3, 4, 10, 23, 24, 30, 100, size - 1, *range(1000, size, size // 40)):
        path.write_bytes(whole[:kept])
        with pytest.raises(TeacherFileError, match=r"cut\.gguf"):
            read_gguf(path)
            pytest.fail(f"{kept} of {size} bytes are read")


def test_random_damage_never_escapes(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """Flipped header bytes give a refusal or a file that still reads; nothing else is raised."""
    whole = bytearray(tiny_teacher_path.read_bytes())
    random = np.random.default_rng(0)
    path = tmp_path / "damaged.gguf"
    refused = 0
    for _ in range(100):
        data = bytearray(whole)
        for place in random.integers(0, 60_000, size=4):
            data[place] = int(random.integers(0, 256))
        path.write_bytes(data)
        try:
            read_gguf(path)
        except TeacherFileError:
            refused += 1
    assert refused > 10


def test_other_headers_are_refused(tmp_path: Path) -> None:
    """Another file type, an unknown version, and counts of 2⁶⁰ that must not be believed."""
    path = tmp_path / "model.gguf"
    for data, words in (
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(64), r"model\.gguf"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + bytes(64), r"model\.gguf"),
    ):
        path.write_bytes(data)
        with pytest.raises(TeacherFileError, match=words):
            read_gguf(path)


def written(path: Path, tokens: list[str], **tensors: np.ndarray) -> Path:
    """A file of these tokens and tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    for name, values in tensors.items():
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Two over the same bytes, which other readers accept; more tokens than embedding rows."""
    embedding, norm = np.ones((2, 32), np.float32), np.ones(32, np.float32)
    path = written(tmp_path / "a.gguf", ["a", "b"], token_embd=embedding, output_norm=norm)
    read_gguf(path)
    data = bytearray(path.read_bytes())
    second = data.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8 + 4
    data[second : second + 8] = struct.pack("<Q", 0)
    path.write_bytes(data)
    with pytest.raises(TeacherFileError, match="overlap"):
        read_gguf(path)
    short = written(tmp_path / "b.gguf", ["a", "b", "c"], token_embd=embedding)
    with pytest.raises(TeacherFileError, match=r"3 tokens.*2 rows"):
        read_gguf(short)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    """Missing, a directory, a FIFO (which would hang), a device: refused at once."""
    fifo = tmp_path / "fifo.gguf"
    os.mkfifo(fifo)
    for path, words in (
        (tmp_path / "none.gguf", "does not exist"),
        (tmp_path, "is a directory"),
        (fifo, "not a regular file"),
        (Path("/dev/null"), "not a regular file"),
    ):
        with pytest.raises(TeacherFileError, match=words):
            read_gguf(path)


def test_tokenizer_digest_sees_every_change(tiny_teacher_path: Path) -> None:
    """Equal tokenizers give equal digests; another model's differs."""
    tiny, example = read_gguf(tiny_teacher_path), read_gguf(example_teacher())
    assert tokenizer_sha256(tiny) == tokenizer_sha256(example)
    changed = dict(tiny.fields)
    del changed["tokenizer.chat_template"]
    other = type(tiny)(tiny.path, tiny.size, changed, tiny.tensors)
    assert tokenizer_sha256(other) != tokenizer_sha256(tiny)
