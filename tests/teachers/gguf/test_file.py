"""The checked GGUF reader: real files read right, damaged ones refused with a reason."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType

from teachers import example_teacher
from teachers.gguf.file import TeacherFileError, file_sha256, read_gguf, tokenizer_sha256


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


def written(
    path: Path, tokens: list[str], values: dict[str, Any] | None = None, **tensors: np.ndarray
) -> Path:
    """A file of these tokens, other metadata, and tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    if tokens:
        writer.add_token_list(tokens)
    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, str: GGUFValueType.STRING}
    for key, value in (values or {}).items():
        if key == "general.architecture":
            writer.kv_data[0].pop(key)
        writer.add_key_value(key, value, kinds[type(value)])
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


def split(folder: Path, name: str, norm: float = 1.0) -> list[Path]:
    """A model in three parts."""
    tensors = {
        "token_embd": np.ones((2, 32)),
        "output_norm": np.full(32, norm),
        "output": np.eye(2),
    }
    for number, (key, values) in enumerate(tensors.items()):
        stated = {"split.no": number, "split.count": 3, "split.tensors.count": 3}
        path = folder / f"{name}-{number + 1:05d}-of-00003.gguf"
        first = ["a", "b"] if number == 0 else []
        written(path, first, stated, **{key: values.astype(np.float32)})
    return sorted(folder.glob(f"{name}-*.gguf"))


def test_the_parts_of_a_split_model_are_one(tmp_path: Path) -> None:
    """Whichever is named; the digest is over all, so that another last part is another model."""
    parts = split(tmp_path, "a")
    files = [read_gguf(part) for part in parts]
    for file in files:
        assert file == files[0] and file.path == parts[0] and file.parts == tuple(parts)
        assert file.parameters == 64 + 32 + 4 and file.value("tokenizer.ggml.tokens") == ["a", "b"]
        assert file.size == sum(part.stat().st_size for part in parts)
        assert np.array_equal(file.tensor("output.weight"), np.eye(2))
    other = split(tmp_path, "b", norm=2.0)
    assert other[0].read_bytes() == parts[0].read_bytes()
    digests = {files[0].sha256, read_gguf(other[2]).sha256}
    assert len(digests) == 2 and not digests & {file_sha256(part) for part in parts}
    alone = tmp_path / "c-00001-of-00001.gguf"
    embedding = np.ones((1, 32), np.float32)
    written(alone, ["a"], {"split.no": 0, "split.count": 1}, token_embd=embedding)
    assert read_gguf(alone).sha256 == file_sha256(alone)


def test_a_split_model_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    """The part at fault is named: missing, of another model, in another's place, or cut."""
    stated = {"split.no": 1, "split.count": 3, "split.tensors.count": 3}
    norm, twice = np.ones(32, np.float32), np.ones((2, 32), np.float32)
    harm: dict[str, tuple[str, Callable[[Path], object]]] = {
        "missing": (r"02-of-00003\.gguf does not exist", lambda part: part.unlink()),
        "place": (
            r"02-of-00003\.gguf does not belong.*split\.no",
            lambda part: part.write_bytes(
                part.with_name(f"{part.name[:-20]}-00003-of-00003.gguf").read_bytes()
            ),
        ),
        "total": (
            r"02-of-00003\.gguf does not belong.*split\.tensors\.count",
            lambda part: written(part, [], stated | {"split.tensors.count": 4}, output_norm=norm),
        ),
        "architecture": (
            r"02-of-00003\.gguf does not belong.*general\.architecture",
            lambda part: written(part, [], stated | {"general.architecture": "phi3"}, norm=norm),
        ),
        "twice": (
            r"02-of-00003\.gguf does not belong.*token_embd\.weight",
            lambda part: written(part, [], stated, token_embd=twice),
        ),
        "empty": (r"hold 2 tensors instead of 3", lambda part: written(part, [], stated)),
        "cut": (r"02-of-00003\.gguf is truncated", lambda part: os.truncate(part, 90)),
        "name": (
            r"elsewhere\.gguf is a part",
            lambda part: part.rename(tmp_path / "elsewhere.gguf"),
        ),
    }
    for name, (words, change) in harm.items():
        parts = split(tmp_path, name)
        change(parts[1])
        with pytest.raises(TeacherFileError, match=words):
            read_gguf(tmp_path / "elsewhere.gguf" if name == "name" else parts[0])
            pytest.fail(f"{name} is read")


def test_only_causal_language_models_are_teachers(tmp_path: Path) -> None:
    """All else is refused by what it is, from its metadata; a recurrent model is one."""
    embedding, path = np.ones((2, 32), np.float32), tmp_path / "m.gguf"
    refused: list[tuple[str, dict[str, Any]]] = [
        ("LoRA adapter", {"general.type": "adapter"}),
        ("LoRA adapter", {"adapter.type": "lora"}),
        ("control vector", {"general.architecture": "controlvector"}),
        *[("image or video", {"general.architecture": name}) for name in ("flux", "sdxl", "wan")],
        ("importance matrix", {"general.type": "imatrix"}),
        ("image or audio part", {"general.type": "mmproj"}),
        ("image or audio part", {"general.architecture": "clip"}),
        ("speech", {"general.architecture": "wavtokenizer-dec"}),
        ("encoder-decoder", {"general.architecture": "t5"}),
        ("draft head", {"general.architecture": "eagle3"}),
        *[
            ("diffusion", {"general.architecture": name})
            for name in ("llada", "dream", "llada-moe", "rnd1")
        ],
        ("diffusion", {"diffusion.shift_logits": False}),
        *[
            ("is an encoder", {"general.architecture": name})
            for name in (
                *("bert", "nomic-bert", "modern-bert", "jina-bert-v2", "neo-bert", "eurobert"),
                *("gemma-embedding", "t5encoder"),
            )
        ],
        ("is an encoder", {"llama.attention.causal": False}),
        ("embeddings or ranks", {"general.architecture": "qwen3", "qwen3.pooling_type": 3}),
        ("names no architecture", {"general.architecture": 5}),
    ]
    for words, values in refused:
        written(path, ["a", "b"], values, token_embd=embedding)
        with pytest.raises(TeacherFileError, match=rf"m\.gguf .*{words}") as said:
            read_gguf(path)
            pytest.fail(f"{values} is a teacher")
        assert "\n" not in str(said.value)
        assert read_gguf(path, model=False).tensors
    written(path, ["a", "b"])
    with pytest.raises(TeacherFileError, match="no tensors"):
        read_gguf(path)
    for values in (
        {"general.architecture": "mamba"},
        {"general.architecture": "rwkv7"},
        {"general.type": "model", "llama.pooling_type": 0, "llama.attention.causal": True},
    ):
        written(path, ["a", "b"], values, token_embd=embedding)
        assert read_gguf(path).parameters == 64, values


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
