"""llama.cpp's quantizer: every file type, importance matrix, metadata, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf.quants import dequantize

from distill.exporting import tokenizer_entries
from students.export import ExportError, ExportNames, write_gguf
from students.file_types import FILE_TYPES
from students.lineage import Lineage, Source
from students.quantize import quantize_gguf
from teachers import example_teacher
from teachers.gguf_file import read_gguf
from teachers.gguf_teacher import GGUFTeacher
from tests.conftest import make_student

LINEAGE = Lineage(
    {"": "mit", "link": "https://example.org/licence"},
    (Source("the teacher", {"organization": "somebody", "description": "its file"}),),
    (Source("prompts.jsonl", {"description": "12 sequences"}),),
    ("en", "ja"),
)
STORED = {  # of a matrix with rows of 256, in llama.cpp's mixtures
    "f32": {"F32"},
    "f16": {"F16"},
    "bf16": {"BF16"},
    "q8_0": {"Q8_0"},
    "q6_k": {"Q6_K"},
    "q5_k_m": {"Q5_K", "Q6_K"},
    "q4_k_m": {"Q4_K", "Q6_K"},
    "q4_0": {"Q4_0"},
    "iq4_nl": {"IQ4_NL"},
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An F32 file with rows of 256, heads and lineage."""
    tokenizer = tokenizer_entries(read_gguf(example_teacher()))
    student = make_student(256, 1, len(tokenizer["tokenizer.ggml.tokens"][0]), heads=True)
    path = tmp_path_factory.mktemp("quantize") / "original.gguf"
    write_gguf(student, path, "f32", tokenizer, ExportNames("original", {"teacher_name": "example"}, LINEAGE))
    return path


@pytest.mark.parametrize("quant", FILE_TYPES)
def test_every_file_type(original: Path, tmp_path: Path, quant: str) -> None:
    """It loads and computes, is stored as asked, and keeps everything that the F32 file says."""
    path = tmp_path / "s.gguf"
    seen: list[tuple[int, int]] = []
    quantize_gguf(original, path, quant, progress=lambda done, tensors: seen.append((done, tensors)))
    file, first = read_gguf(path), read_gguf(original)
    assert seen[-1] == (len(first.tensors), len(first.tensors))
    assert file.tensors.keys() == first.tensors.keys()
    kinds = {
        info.type.name
        for name, info in file.tensors.items()
        if name.startswith("blk") and len(info.shape) == 2
    }
    assert kinds <= STORED[quant] and min(STORED[quant]) in kinds
    assert file.value("general.file_type") == int(FILE_TYPES[quant].number)
    assert file.value("general.quantization_version") == 2
    changed = {"general.file_type", "general.quantization_version"}
    for key, field in first.fields.items():
        assert key in changed or file.fields[key] == field
    random = np.random.default_rng(0)
    tokens = random.integers(3, 1000, size=20).astype(np.int32)
    with GGUFTeacher(path, threads=1) as model:
        assert np.isfinite(model.logits([tokens])).all()


def test_the_file_says_where_it_comes_from(original: Path) -> None:
    """Licence, models, data and size by the keys of the GGUF specification."""
    file = read_gguf(original)
    said = {
        "general.type": "model",
        "general.name": "original",
        "general.license": "mit",
        "general.license.link": "https://example.org/licence",
        "general.base_model.count": 1,
        "general.base_model.0.name": "the teacher",
        "general.base_model.0.organization": "somebody",
        "general.dataset.count": 1,
        "general.dataset.0.name": "prompts.jsonl",
        "general.languages": ["en", "ja"],
        "so8t.teacher_name": "example",
    }
    assert {key: file.value(key) for key in said} == said
    assert file.value("general.size_label") == "1.1M"  # 1,116,672 with the gates folded away
    assert Lineage.from_json(LINEAGE.to_json()) == LINEAGE


def weighted_error(path: Path, original: Path, weights: Mapping[str, np.ndarray]) -> float:
    """Σ over matrices, rows and columns of weight · (value − original)², by definition."""
    total, file, first = 0.0, read_gguf(path), read_gguf(original)
    for name, importance in weights.items():
        info = file.tensors[name]
        raw = np.memmap(path, np.uint8, "r", offset=info.offset, shape=(info.nbytes,)).reshape(
            info.shape[0], -1
        )
        values = dequantize(np.asarray(raw), info.type).astype(np.float64)
        total += float((importance * (values - first.tensor(name)) ** 2).sum())
    return total


@pytest.mark.parametrize("quant", [name for name, kind in FILE_TYPES.items() if kind.weighted])
def test_important_columns_are_rounded_more_exactly(original: Path, tmp_path: Path, quant: str) -> None:
    """With an importance matrix the error weighted by it is smaller than without."""
    random = np.random.default_rng(1)
    matrices = {
        n: i for n, i in read_gguf(original).tensors.items() if n.startswith("blk") and len(i.shape) == 2
    }
    weights = {
        name: (10.0 ** random.uniform(-3, 3, info.shape[1])).astype(np.float32)
        for name, info in matrices.items()
    }
    plain, helped = tmp_path / "plain.gguf", tmp_path / "helped.gguf"
    quantize_gguf(original, plain, quant)
    quantize_gguf(original, helped, quant, importance=weights, labels={"quantize.imatrix.entries_count": 7})
    assert read_gguf(helped).value("quantize.imatrix.entries_count") == 7
    better, worse = (weighted_error(path, original, weights) for path in (helped, plain))
    assert 0 < better < 0.9 * worse


@pytest.mark.parametrize("quant", ["f16", "q8_0"])
def test_types_that_take_none_leave_it_alone(original: Path, tmp_path: Path, quant: str) -> None:
    """The same bytes with it as without."""
    weights = {"blk.0.attn_q.weight": np.linspace(0, 9, 256, dtype=np.float32)}
    quantize_gguf(original, tmp_path / "a.gguf", quant)
    quantize_gguf(original, tmp_path / "b.gguf", quant, importance=weights)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_same_bytes_again_with_any_number_of_threads(original: Path, tmp_path: Path) -> None:
    """Quantizing is repeatable."""
    for number, threads in enumerate((1, 2)):
        quantize_gguf(original, tmp_path / f"{number}.gguf", "q4_k_m", threads=threads)
    assert (tmp_path / "0.gguf").read_bytes() == (tmp_path / "1.gguf").read_bytes()


def test_what_cannot_be_quantized_leaves_no_file(original: Path, tmp_path: Path) -> None:
    """One line with llama.cpp's own words; a source is never overwritten."""
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(original.read_bytes()[:5000])
    with pytest.raises(ExportError, match=r"could not quantize cut\.gguf to q8_0"):
        quantize_gguf(cut, tmp_path / "s.gguf", "q8_0")
    with pytest.raises(ExportError, match="could not quantize"):  # a matrix of another width
        weights = {"blk.0.attn_q.weight": np.ones(12, np.float32)}
        quantize_gguf(original, tmp_path / "s.gguf", "q4_k_m", importance=weights)
    with pytest.raises(ExportError, match="q2_k"):
        quantize_gguf(original, tmp_path / "s.gguf", "q2_k")
    before = original.read_bytes()
    with pytest.raises(ExportError, match="onto itself"):
        quantize_gguf(original, original, "q8_0")
    assert original.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]
    with pytest.raises(OSError):
        quantize_gguf(original, tmp_path / "nowhere" / "s.gguf", "q8_0")


def test_a_full_disk_is_said_to_be_one(original: Path, tmp_path: Path) -> None:
    """llama.cpp's failing write is the disk's error, not a defect, and leaves nothing."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))  # the quantizer's process inherits it
    try:
        with pytest.raises(OSError, match="No space left"):
            quantize_gguf(original, tmp_path / "s.gguf", "q8_0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
