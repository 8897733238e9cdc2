"""What a student takes from its teacher beside soft targets: embeddings, tokenizer, facts, lines; kept whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType

import teachers.embeddings
from distill.capturing import capture_only, keep_inheritance
from distill.config import load_config
from distill.console import Console
from students.initialise import initialise_embeddings
from teachers.base import TeacherInfo, TokenizedLines
from teachers.embeddings import principal_scores
from teachers.files import StoreError
from teachers.gguf_file import Field, GGUFFile, TeacherFileError, TensorInfo, read_gguf, tokenizer_fields
from teachers.gguf_teacher import GGUFTeacher
from teachers.inheritance import (
    LINE_SEQUENCES,
    TEACHER,
    Inheritance,
    find_inheritance,
    first_sequences,
    inherit,
    need_inheritance,
    write_inheritance,
)
from teachers.store import SoftTargetStore
from tests.capture_child import Source
from tests.conftest import make_student
from tests.test_capture import filled
from tests.tiny_checkpoint import make_folder


def embedding_file(folder: Path, matrix: np.ndarray) -> GGUFFile:
    """Only as much of a GGUF file as the embeddings' reader looks at."""
    path = folder / "embeddings.bin"
    path.write_bytes(matrix.astype(np.float32).tobytes())
    info = TensorInfo("token_embd.weight", matrix.shape, GGMLQuantizationType.F32, 0, matrix.size * 4)
    return GGUFFile(path, path.stat().st_size, {}, {info.name: info})


def uneven(rows: int = 300, width: int = 24) -> np.ndarray:
    """Embeddings with a mean far from zero and directions of different strength, in a random basis."""
    random = np.random.default_rng(8)
    turned, _ = np.linalg.qr(random.normal(size=(width, width)))
    return 5.0 + 0.02 * (random.normal(size=(rows, width)) * 0.8 ** np.arange(width)) @ turned


# --- embeddings


def test_scores_are_the_principal_components(tmp_path: Path) -> None:
    """Against a singular value decomposition: the same up to the sign and the common scale, strongest first."""
    matrix = uneven()
    scores = principal_scores(embedding_file(tmp_path, matrix)).astype(np.float64)
    left, strengths, _ = np.linalg.svd(matrix - matrix.mean(axis=0), full_matrices=False)
    wanted = left * strengths / np.sqrt((strengths**2).sum() / matrix.size)
    wanted *= np.sign((scores * wanted).sum(axis=0))
    assert np.abs(scores - wanted).max() < 5e-3  # half precision of numbers up to 8
    assert np.sqrt((scores**2).mean()) == pytest.approx(1.0, abs=1e-3)


def test_scores_do_not_depend_on_how_the_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few rows at a time, or fewer columns: the same numbers up to rounding and the common scale."""
    file = embedding_file(tmp_path, uneven())
    whole = principal_scores(file).astype(np.float64)
    monkeypatch.setattr(teachers.embeddings, "ROWS_TOGETHER", 7)
    assert np.abs(principal_scores(file) - whole).max() < 0.01
    monkeypatch.setattr(teachers.embeddings, "MAX_COLUMNS", 5)
    few = principal_scores(file)
    assert few.shape == (300, 5) and few.dtype == np.float16
    scale = whole[:, :5].std() / few.astype(np.float64).std()
    assert np.abs(few * scale - whole[:, :5]).max() < 0.01


def test_scores_of_nothing_and_of_nonsense(tmp_path: Path) -> None:
    """Equal rows say nothing; what is not finite is refused by name."""
    assert not principal_scores(embedding_file(tmp_path, np.ones((9, 4)))).any()
    with pytest.raises(TeacherFileError, match=r"embeddings\.bin.*not finite"):
        principal_scores(embedding_file(tmp_path, np.array([[1.0, np.nan], [2.0, 3.0]])))


@pytest.mark.parametrize("width", [8, 24, 32])
def test_a_student_takes_the_first_columns(width: int) -> None:
    """Narrower: a prefix; wider: zeros behind; always with the student's own initial spread."""
    scores = np.random.default_rng(0).normal(size=(96, 24)).astype(np.float16)
    student = make_student(width, 1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    initialise_embeddings(student, scores)
    found = student.model.embed_tokens.weight.detach()
    taken = torch.from_numpy(scores[:, :width].astype(np.float32))
    assert torch.equal(found[:, 24:], torch.zeros(96, max(0, width - 24)))
    ratio = found[:, : taken.shape[1]] / taken
    assert float(ratio.max() - ratio.min()) < 1e-6 * float(ratio.max())
    assert float(found.std()) == pytest.approx(student.config.initializer_range, rel=1e-3)
    now = student.state_dict()
    changed = {name for name in now if not torch.equal(now[name], before[name])}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}  # one tensor
    with pytest.raises(ValueError, match="95 token embeddings, the student 96"):
        initialise_embeddings(student, scores[:95])


# --- what the store keeps


@pytest.fixture
def kept(tmp_path: Path, tiny_teacher: GGUFTeacher) -> SoftTargetStore:
    """A store with what it keeps of the tiny teacher."""
    store, _ = filled(tmp_path / "store", tiny_teacher, Source())
    keep_inheritance(tiny_teacher, tiny_teacher.file.path, store, Console())
    return store


def test_everything_is_kept(kept: SoftTargetStore, tiny_teacher: GGUFTeacher) -> None:
    """Facts, tokenizer and template as they are in the file, scores, and lines with the teacher's own ids."""
    found = need_inheritance(kept)
    assert found.info == tiny_teacher.info
    assert found.tokenizer == tokenizer_fields(tiny_teacher.file)
    assert list(found.tokenizer) == list(tokenizer_fields(tiny_teacher.file))
    assert np.array_equal(found.embeddings, principal_scores(tiny_teacher.file))
    assert found.embeddings.shape == (1024, 64) and found.embeddings.dtype == np.float16
    assert found.lines.texts == tiny_teacher.detokenize([kept.tokens(index) for index in range(len(kept))])
    again = tiny_teacher.tokenize(found.lines.texts, add_special=True, parse_special=True)
    assert all(np.array_equal(*pair) for pair in zip(found.lines.tokens, again, strict=True))


def test_odd_metadata_survives(kept: SoftTargetStore, tiny_teacher: GGUFTeacher) -> None:
    """Bytes that are no UTF-8, floats to the last bit, empty arrays, every kind of scalar."""
    tokens = [f"<{n}>" for n in range(1023)] + [b"\xff\xfe".decode(errors="surrogateescape")]
    odd = {
        "tokenizer.ggml.tokens": Field(tokens, GGUFValueType.ARRAY, GGUFValueType.STRING),
        "tokenizer.ggml.scores": Field(
            [float(np.float32(0.1)), -1e30], GGUFValueType.ARRAY, GGUFValueType.FLOAT32
        ),
        "tokenizer.ggml.merges": Field([], GGUFValueType.ARRAY, GGUFValueType.STRING),
        "tokenizer.ggml.add_bos_token": Field(True, GGUFValueType.BOOL),
        "tokenizer.ggml.x": Field(-3, GGUFValueType.INT8),
    }
    given = Inheritance(tiny_teacher.info, TokenizedLines([], []), odd, np.ones((1024, 3), dtype=np.float16))
    write_inheritance(kept, given)
    found = need_inheritance(kept)
    assert found.tokenizer == odd and found.embeddings.shape == (1024, 3)


@pytest.mark.parametrize("part", range(5))
def test_a_flipped_byte_is_damage_and_is_made_again(
    kept: SoftTargetStore, tiny_teacher: GGUFTeacher, part: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the header, the scores or the text: noticed; a rerun makes just this file again, to the same bytes."""
    path = kept.folder / TEACHER
    whole = path.read_bytes()
    place = (3, 60, len(whole) // 3, 2 * len(whole) // 3, len(whole) - 1)[part]
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert find_inheritance(kept) is None
    with pytest.raises(
        StoreError, match=r"store .*teacher\.safetensors .* is damaged; run the capture again"
    ):
        need_inheritance(kept)
    others = {file.name: file.stat().st_mtime_ns for file in kept.folder.iterdir() if file.name != TEACHER}
    capsys.readouterr()
    keep_inheritance(tiny_teacher, tiny_teacher.file.path, kept, Console())
    assert "wasdamagedandismadeagain" in "".join(capsys.readouterr().out.split())
    assert path.read_bytes() == whole
    assert {name: (kept.folder / name).stat().st_mtime_ns for name in others} == others


def test_an_old_store_is_completed(kept: SoftTargetStore, tiny_teacher: GGUFTeacher) -> None:
    """Without the file: said so; made once, and then left as it is."""
    path = kept.folder / TEACHER
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(StoreError, match="is missing; run the capture again"):
        need_inheritance(kept)
    keep_inheritance(tiny_teacher, tiny_teacher.file.path, kept, Console())
    written = path.stat().st_mtime_ns
    keep_inheritance(tiny_teacher, tiny_teacher.file.path, kept, Console())
    assert path.read_bytes() == whole and path.stat().st_mtime_ns == written


def test_another_stores_file_is_refused(
    kept: SoftTargetStore, tmp_path: Path, tiny_teacher: GGUFTeacher
) -> None:
    """The seal names the store it belongs to."""
    other, _ = filled(tmp_path / "other", tiny_teacher, Source(spoken=True))
    (other.folder / TEACHER).write_bytes((kept.folder / TEACHER).read_bytes())
    assert find_inheritance(other) is None


@pytest.mark.parametrize(
    "change",
    [
        {"card": np.frombuffer(b"{}", np.uint8)},
        {"card": np.frombuffer(b"[1]", np.uint8)},
        {"card": np.frombuffer(b"\xff{", np.uint8)},
        {"embeddings": np.zeros((1023, 4), np.float16)},
        {"embeddings": np.zeros(1024, np.float16)},
        {"embeddings": None},
    ],
)
def test_well_sealed_nonsense_is_damage(kept: SoftTargetStore, change: dict[str, np.ndarray | None]) -> None:
    """Another program's file with a right checksum is not trusted either."""
    arrays = {**need_inheritance(kept).arrays(), **change}
    kept.write_file(TEACHER, {name: rows for name, rows in arrays.items() if rows is not None})
    assert find_inheritance(kept) is None


def test_facts_are_checked(kept: SoftTargetStore, tiny_teacher: GGUFTeacher) -> None:
    """A teacher of no parameters would divide by zero at the end of a long run."""
    content = {**vars(tiny_teacher.info), "parameters": 0}
    wrong = Inheritance(TeacherInfo(**content), TokenizedLines([], []), {}, np.empty((0, 0), np.float16))
    write_inheritance(kept, wrong)
    assert find_inheritance(kept) is None


def test_lines_are_bounded(tiny_teacher: GGUFTeacher) -> None:
    """So many sequences, so many tokens, one at least; texts without any token are left out."""
    rows = [np.full(10, n, dtype=np.int32) for n in range(5)]
    assert len(first_sequences(rows, 3, 1000)) == 3
    assert len(first_sequences(rows, 9, 39)) == 3
    assert len(first_sequences(rows, 9, 1)) == 1 and first_sequences([], 9, 9) == []
    many = (np.array([0, 300 + n], dtype=np.int32) for n in range(500))
    assert len(inherit(tiny_teacher, None, many).lines.texts) == LINE_SEQUENCES
    assert next(many)[1] <= 300 + LINE_SEQUENCES + 1  # no more of the store is read


def test_a_teacher_that_is_no_gguf_file(tmp_path: Path, tiny_teacher: GGUFTeacher) -> None:
    """A transformers folder is captured as before; what it lacks is not kept, and is added once it is there."""
    make_folder(tmp_path / "model")
    (tmp_path / "data.txt").write_text("the cat sat on the mat while " * 30)
    overrides = {"teacher.path": str(tmp_path / "model"), "data.path": str(tmp_path / "data.txt")}
    store = capture_only(load_config(None, overrides, ["data.max_length=16"]), tmp_path / "store", Console())
    found = need_inheritance(store)
    assert found.info.name == "model" and not found.tokenizer and found.embeddings.shape == (0, 0)
    assert found.lines.texts
    mixed, _ = filled(tmp_path / "mixed", tiny_teacher, Source())
    keep_inheritance(tiny_teacher, None, mixed, Console())
    assert not need_inheritance(mixed).tokenizer
    keep_inheritance(tiny_teacher, tiny_teacher.file.path, mixed, Console())
    assert need_inheritance(mixed).tokenizer == tokenizer_fields(read_gguf(tiny_teacher.file.path))
