"""What a student takes from its teacher beside soft targets: embeddings, tokenizer, lines."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf import GGUFValueType as Kind

import teachers.gguf.embeddings
from distill.capture.capture import keep_teacher_record
from distill.config.loading import load_config
from distill.initialization.embeddings import initialize_embeddings
from distill.pipeline.capture import capture_only
from distill.runtime.progress import Console
from teachers.atomic_files import StoreError
from teachers.base import TokenizedLines
from teachers.gguf.embeddings import principal_scores
from teachers.gguf.file import (
    Field,
    GGUFFile,
    TeacherFileError,
    TensorInfo,
    read_gguf,
    tokenizer_fields,
)
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.store import SoftTargetStore
from teachers.store.teacher_record import (
    LINE_SEQUENCES,
    TEACHER,
    TeacherRecord,
    find_teacher_record,
    first_sequences,
    make_teacher_record,
    require_teacher_record,
    write_teacher_record,
)
from tests.support.children.capture_child import Source, begin
from tests.support.stores import filled
from tests.support.students import make_student
from tests.support.tiny_checkpoint import make_folder

NO_LINES = TokenizedLines([], [])


def embedding_file(folder: Path, matrix: np.ndarray) -> GGUFFile:
    """Only as much of a GGUF file as the embeddings' reader looks at."""
    path = folder / "embeddings.bin"
    path.write_bytes(matrix.astype(np.float32).tobytes())
    kind, name = GGMLQuantizationType.F32, "token_embd.weight"
    info = TensorInfo(name, matrix.shape, kind, 0, matrix.size * 4, path)
    return GGUFFile(path, path.stat().st_size, {}, {info.name: info})


def uneven(rows: int = 300, width: int = 24) -> np.ndarray:
    """Embeddings with a mean far from zero and uneven directions, in a random basis."""
    random = np.random.default_rng(8)
    turned, _ = np.linalg.qr(random.normal(size=(width, width)))
    return 5.0 + 0.02 * (random.normal(size=(rows, width)) * 0.8 ** np.arange(width)) @ turned


# --- embeddings


def test_principal_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a singular value decomposition, up to sign and scale; also read in parts."""
    matrix = uneven()
    file = embedding_file(tmp_path, matrix)
    scores = principal_scores(file).astype(np.float64)
    left, strengths, _ = np.linalg.svd(matrix - matrix.mean(axis=0), full_matrices=False)
    wanted = left * strengths / np.sqrt((strengths**2).sum() / matrix.size)
    wanted *= np.sign((scores * wanted).sum(axis=0))
    assert np.abs(scores - wanted).max() < 5e-3  # half precision of numbers up to 8
    assert np.sqrt((scores**2).mean()) == pytest.approx(1.0, abs=1e-3)
    monkeypatch.setattr(teachers.gguf.embeddings, "ROWS_TOGETHER", 7)
    assert np.abs(principal_scores(file) - scores).max() < 0.01
    monkeypatch.setattr(teachers.gguf.embeddings, "MAX_COLUMNS", 5)
    few = principal_scores(file)
    assert few.shape == (300, 5) and few.dtype == np.float16
    scale = scores[:, :5].std() / few.astype(np.float64).std()
    assert np.abs(few * scale - scores[:, :5]).max() < 0.01


def test_scores_of_nothing_and_of_nonsense(tmp_path: Path) -> None:
    """Equal rows say nothing; what is not finite is refused by name."""
    assert not principal_scores(embedding_file(tmp_path, np.ones((9, 4)))).any()
    with pytest.raises(TeacherFileError, match=r"embeddings\.bin.*not finite"):
        principal_scores(embedding_file(tmp_path, np.array([[1.0, np.nan], [2.0, 3.0]])))


def test_a_student_takes_the_first_columns() -> None:
    """Narrower: a prefix; wider: zeros behind; always with the student's own initial spread."""
    scores = np.random.default_rng(0).normal(size=(96, 24)).astype(np.float16)
    for width in (8, 24, 32):
        student = make_student(width, 1)
        before = {name: value.clone() for name, value in student.state_dict().items()}
        initialize_embeddings(student, scores)
        found = student.model.embed_tokens.weight.detach()
        taken = torch.from_numpy(scores[:, :width].astype(np.float32))
        assert torch.equal(found[:, 24:], torch.zeros(96, max(0, width - 24))), width
        ratio = found[:, : taken.shape[1]] / taken
        assert float(ratio.max() - ratio.min()) < 1e-6 * float(ratio.max()), width
        spread = student.config.initializer_range
        assert float(found.std()) == pytest.approx(spread, rel=1e-3), width
        now = student.state_dict()
        changed = {name for name in now if not torch.equal(now[name], before[name])}
        assert changed == {"model.embed_tokens.weight", "lm_head.weight"}, "one tensor"
    with pytest.raises(ValueError, match="95 token embeddings, the student 96"):
        initialize_embeddings(student, scores[:95])


# --- what the store keeps


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: GGUFTeacher) -> SoftTargetStore:
    """A store with what it keeps of the tiny teacher."""
    store, _ = filled(tmp_path_factory.mktemp("whole") / "store", tiny_teacher, Source())
    keep_teacher_record(tiny_teacher, tiny_teacher.file.path, store, Console())
    return store


@pytest.fixture
def kept(tmp_path: Path, whole: SoftTargetStore) -> SoftTargetStore:
    """A copy of it, which a test may damage."""
    folder = shutil.copytree(whole.folder, tmp_path / "store")
    return SoftTargetStore.create_or_open(folder, whole.manifest)


def test_everything_is_kept(kept: SoftTargetStore, tiny_teacher: GGUFTeacher) -> None:
    """Facts, tokenizer and template as in the file, scores, and lines with the teacher's ids."""
    found = require_teacher_record(kept)
    assert found.info == tiny_teacher.info
    assert found.tokenizer == tokenizer_fields(tiny_teacher.file)
    assert list(found.tokenizer) == list(tokenizer_fields(tiny_teacher.file))
    assert np.array_equal(found.embeddings, principal_scores(tiny_teacher.file))
    assert found.embeddings.shape == (1024, 64) and found.embeddings.dtype == np.float16
    tokens = [kept.tokens(index) for index in range(len(kept))]
    assert found.lines.texts == tiny_teacher.detokenize(tokens)
    again = tiny_teacher.tokenize(found.lines.texts, add_special=True, parse_special=True)
    assert all(np.array_equal(*pair) for pair in zip(found.lines.tokens, again, strict=True))


def test_odd_metadata_survives(kept: SoftTargetStore, tiny_teacher: GGUFTeacher) -> None:
    """Bytes that are no UTF-8, floats to the last bit, empty arrays, every kind of scalar."""
    tokens = [f"<{n}>" for n in range(1023)] + [b"\xff\xfe".decode(errors="surrogateescape")]
    scores = [float(np.float32(0.1)), -1e30]
    odd = {
        "tokenizer.ggml.tokens": Field(tokens, Kind.ARRAY, Kind.STRING),
        "tokenizer.ggml.scores": Field(scores, Kind.ARRAY, Kind.FLOAT32),
        "tokenizer.ggml.merges": Field([], Kind.ARRAY, Kind.STRING),
        "tokenizer.ggml.add_bos_token": Field(True, Kind.BOOL),
        "tokenizer.ggml.x": Field(-3, Kind.INT8),
    }
    embeddings = np.ones((1024, 3), dtype=np.float16)
    write_teacher_record(kept, TeacherRecord(tiny_teacher.info, NO_LINES, odd, embeddings))
    found = require_teacher_record(kept)
    assert found.tokenizer == odd and found.embeddings.shape == (1024, 3)


def test_a_flipped_byte_is_damage_and_is_made_again(
    kept: SoftTargetStore, tiny_teacher: GGUFTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the header, the scores or the text: a rerun makes just this file again."""
    path = kept.folder / TEACHER
    whole, size = path.read_bytes(), path.stat().st_size
    for place in (3, 60, size // 3, 2 * size // 3, size - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert find_teacher_record(kept) is None, place
        with pytest.raises(StoreError, match=rf"{TEACHER} .*damaged; run the capture again"):
            require_teacher_record(kept)
        files = [file for file in kept.folder.iterdir() if file.is_file() and file != path]
        others = {file: file.stat().st_mtime_ns for file in files}
        capsys.readouterr()
        keep_teacher_record(tiny_teacher, tiny_teacher.file.path, kept, Console())
        said = "".join(capsys.readouterr().out.split())
        assert "wasdamagedandismadeagain" in said, place
        assert path.read_bytes() == whole, place
        assert {file: file.stat().st_mtime_ns for file in others} == others, place


def test_an_old_store(kept: SoftTargetStore, tmp_path: Path, tiny_teacher: GGUFTeacher) -> None:
    """Without the file: said so; made once, and then left. Another store's file is refused."""
    path = kept.folder / TEACHER
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(StoreError, match="is missing; run the capture again"):
        require_teacher_record(kept)
    keep_teacher_record(tiny_teacher, tiny_teacher.file.path, kept, Console())
    written = path.stat().st_mtime_ns
    keep_teacher_record(tiny_teacher, tiny_teacher.file.path, kept, Console())
    assert path.read_bytes() == whole and path.stat().st_mtime_ns == written
    other = begin(tmp_path / "other", tiny_teacher, Source(spoken=True))
    (other.folder / TEACHER).write_bytes(whole)
    assert find_teacher_record(other) is None


def test_well_sealed_nonsense_is_damage(kept: SoftTargetStore, tiny_teacher: GGUFTeacher) -> None:
    """Another program's file with a right checksum is no better, nor one of no parameters."""
    arrays = require_teacher_record(kept).arrays()
    for name, rows in (
        ("card", np.frombuffer(b"{}", np.uint8)),
        ("card", np.frombuffer(b"[1]", np.uint8)),
        ("card", np.frombuffer(b"\xff{", np.uint8)),
        ("embeddings", np.zeros((1023, 4), np.float16)),
        ("embeddings", np.zeros(1024, np.float16)),
    ):
        kept.write_file(TEACHER, {**arrays, name: rows})
        assert find_teacher_record(kept) is None, (name, rows)
    kept.write_file(TEACHER, {name: rows for name, rows in arrays.items() if name != "embeddings"})
    assert find_teacher_record(kept) is None, "without embeddings"
    kept.write_file(TEACHER, arrays)
    assert find_teacher_record(kept) is not None
    info = replace(tiny_teacher.info, parameters=0)
    write_teacher_record(kept, TeacherRecord(info, NO_LINES, {}, np.empty((0, 0), np.float16)))
    assert find_teacher_record(kept) is None, "no parameters"


def test_lines_are_bounded(tiny_teacher: GGUFTeacher) -> None:
    """So many sequences, so many tokens, one at least; texts without any token are left out."""
    rows = [np.full(10, n, dtype=np.int32) for n in range(5)]
    assert len(first_sequences(rows, 3, 1000)) == 3
    assert len(first_sequences(rows, 9, 39)) == 3
    assert len(first_sequences(rows, 9, 1)) == 1 and first_sequences([], 9, 9) == []
    many = (np.array([0, 300 + n], dtype=np.int32) for n in range(500))
    assert len(make_teacher_record(tiny_teacher, None, many).lines.texts) == LINE_SEQUENCES
    assert next(many)[1] <= 300 + LINE_SEQUENCES + 1  # no more of the store is read


def test_a_teacher_that_is_no_gguf_file(tmp_path: Path, tiny_teacher: GGUFTeacher) -> None:
    """A transformers folder is captured as before; what it lacks is added once it is there."""
    (tmp_path / "data.txt").write_text("the cat sat on the mat while " * 30)
    paths = {"teacher.path": make_folder(tmp_path / "model"), "data.path": tmp_path / "data.txt"}
    overrides = {name: str(path) for name, path in paths.items()}
    config = load_config(None, overrides, ["data.max_length=16"])
    found = require_teacher_record(capture_only(config, tmp_path / "store", Console()))
    assert found.info.name == "model" and not found.tokenizer and found.embeddings.shape == (0, 0)
    assert found.lines.texts
    mixed, _ = filled(tmp_path / "mixed", tiny_teacher, Source())
    keep_teacher_record(tiny_teacher, None, mixed, Console())
    assert not require_teacher_record(mixed).tokenizer
    keep_teacher_record(tiny_teacher, tiny_teacher.file.path, mixed, Console())
    assert require_teacher_record(mixed).tokenizer == tokenizer_fields(
        read_gguf(tiny_teacher.file.path)
    )
