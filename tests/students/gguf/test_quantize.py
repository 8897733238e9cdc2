"""llama.cpp's quantizer: every file type, importance matrix, metadata, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf.quants import dequantize

from distill.capture.temporary_files.tokenizer_only import tokenizer_entries
from students.gguf.file_types import FILE_TYPES, ROW_TYPES, Quantization
from students.gguf.metadata import ExportError, ExportNames
from students.gguf.provenance import Lineage, Source
from students.gguf.quantize import quantize_gguf
from students.gguf.writer import write_gguf
from teachers import example_teacher
from teachers.gguf.file import TensorInfo, read_gguf
from teachers.llama_cpp.teacher import GGUFTeacher
from tests.support.students import make_student

pytestmark = pytest.mark.usefixtures("llama_here")
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
    names = ExportNames("original", {"teacher_name": "example"}, LINEAGE)
    write_gguf(student, path, "f32", tokenizer, names)
    return path


def matrices(path: Path) -> dict[str, TensorInfo]:
    """Those of the layers."""
    tensors = read_gguf(path).tensors.items()
    return {name: one for name, one in tensors if name.startswith("blk") and len(one.shape) == 2}


def test_every_file_type(original: Path, tmp_path: Path) -> None:
    """It loads and computes, is stored as asked, and keeps everything that the F32 file says."""
    path, first = tmp_path / "s.gguf", read_gguf(original)
    tokens = np.random.default_rng(0).integers(3, 1000, size=20).astype(np.int32)
    for quant, kind in FILE_TYPES.items():
        seen: list[tuple[int, int]] = []
        quantize_gguf(original, path, quant, progress=lambda *done, seen=seen: seen.append(done))
        file = read_gguf(path)
        assert seen[-1] == (len(first.tensors), len(first.tensors)), quant
        assert file.tensors.keys() == first.tensors.keys(), quant
        kinds = {info.type.name for info in matrices(path).values()}
        assert kinds <= STORED[quant] and min(STORED[quant]) in kinds, quant
        changed = {"general.file_type": int(kind.number), "general.quantization_version": 2}
        assert {key: file.value(key) for key in changed} == changed, quant
        for key, field in first.fields.items():
            assert key in changed or file.fields[key] == field, (quant, key)
        with GGUFTeacher(path, threads=1) as model:
            assert np.isfinite(model.logits([tokens])).all(), quant


def test_every_type_of_token_rows(tmp_path: Path) -> None:
    """The embedding is stored as asked, an output matrix of its own as another; where rows do not
    divide into blocks, as the next type that they do; what is not asked for is left alone."""
    tokenizer = tokenizer_entries(read_gguf(example_teacher()))
    count, path = len(tokenizer["tokenizer.ggml.tokens"][0]), tmp_path / "s.gguf"
    tokens = np.random.default_rng(0).integers(3, 1000, size=20).astype(np.int32)
    instead = {  # 96 = 3 · 32, 40: not even that
        96: {"q6_k": "Q8_0", "q5_k": "Q5_1", "q4_k": "Q5_0"},
        40: {kind: "F16" for kind in ROW_TYPES if kind not in ("f32", "f16", "bf16")},
        256: {},
    }
    for width, others in instead.items():
        original = tmp_path / f"{width}.gguf"
        student = make_student(width, 1, count, tied=False)
        write_gguf(student, original, "f32", tokenizer, ExportNames("rows", {}))
        layers = None
        for kind in ROW_TYPES:
            chosen = Quantization.parse(f"q4_0:embedding={kind}:output=q8_0")
            quantize_gguf(original, path, "q4_0", rows=chosen.row_types(width))
            tensors = read_gguf(path).tensors
            found = [tensors[name].type.name for name in ("token_embd.weight", "output.weight")]
            case = (width, kind)
            assert found == [others.get(kind, kind.upper()), others.get("q8_0", "Q8_0")], case
            layers = layers or matrices(path)
            now = {name: info.type for name, info in matrices(path).items()}
            assert now == {name: info.type for name, info in layers.items()}, case
            with GGUFTeacher(path, threads=1) as model:
                assert np.isfinite(model.logits([tokens])).all(), case


def test_the_file_says_where_it_comes_from(original: Path) -> None:
    """Licence, models, data and size by the keys of the GGUF specification."""
    file = read_gguf(original)
    expected = {
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
    assert {key: file.value(key) for key in expected} == expected
    assert file.value("general.size_label") == "1.1M"  # 1,116,672 with the gates folded away
    assert Lineage.from_json(LINEAGE.to_json()) == LINEAGE


def weighted_error(path: Path, original: Path, weights: Mapping[str, np.ndarray]) -> float:
    """Σ over matrices, rows and columns of weight · (value − original)², by definition."""
    total, file, first = 0.0, read_gguf(path), read_gguf(original)
    for name, importance in weights.items():
        info = file.tensors[name]
        raw = np.memmap(path, np.uint8, "r", offset=info.offset, shape=(info.nbytes,))
        rows = np.asarray(raw).reshape(info.shape[0], -1)
        values = dequantize(rows, info.type).astype(np.float64)
        total += float((importance * (values - first.tensor(name)) ** 2).sum())
    return total


def test_important_columns_are_rounded_more_exactly(original: Path, tmp_path: Path) -> None:
    """With an importance matrix the error weighted by it is smaller; others do not use it."""
    random = np.random.default_rng(1)
    wide = {name: info.shape[1] for name, info in matrices(original).items()}
    powers = {name: 10.0 ** random.uniform(-3, 3, columns) for name, columns in wide.items()}
    weights = {name: values.astype(np.float32) for name, values in powers.items()}
    plain, helped = tmp_path / "plain.gguf", tmp_path / "helped.gguf"
    count = {"quantize.imatrix.entries_count": 7}
    for quant in ("f16", "q8_0", *(name for name, kind in FILE_TYPES.items() if kind.weighted)):
        weighted = FILE_TYPES[quant].weighted
        quantize_gguf(original, plain, quant)
        labels = count if weighted else {}
        quantize_gguf(original, helped, quant, importance=weights, labels=labels)
        if not weighted:
            assert helped.read_bytes() == plain.read_bytes(), quant
            continue
        assert read_gguf(helped).value("quantize.imatrix.entries_count") == 7, quant
        better, worse = (weighted_error(path, original, weights) for path in (helped, plain))
        assert 0 < better < 0.9 * worse, quant


def test_the_same_bytes_again_with_any_number_of_threads(original: Path, tmp_path: Path) -> None:
    """Quantizing is repeatable."""
    for threads in (1, 2):
        quantize_gguf(original, tmp_path / f"{threads}.gguf", "q4_k_m", threads=threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


def test_what_cannot_be_quantized_leaves_no_file(original: Path, tmp_path: Path) -> None:
    """One line with llama.cpp's own message; a source is never overwritten."""
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
    assert original.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]
    with pytest.raises(OSError):
        quantize_gguf(original, tmp_path / "nowhere" / "s.gguf", "q8_0")


def test_a_full_disk_is_reported(original: Path, tmp_path: Path) -> None:
    """llama.cpp's failing write is the disk's error, not a defect, and leaves nothing."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    file_size = resource.RLIMIT_FSIZE  # the quantizer's process inherits it
    resource.setrlimit(file_size, (300_000, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            quantize_gguf(original, tmp_path / "s.gguf", "q8_0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
