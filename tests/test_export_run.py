"""``distill export-gguf`` on a finished run: several types at once, their table, what is kept, what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import distill.exporting
import distill.prove
from distill.audit_verify import verify
from distill.cli import main
from distill.config import get_args, load_config, parse_quants
from distill.console import Console
from distill.errors import ProofFailed, UserError
from distill.export_run import export_run
from distill.exports import read_exports
from distill.pipeline import run
from distill.run_folder import Places, RunFolder
from students.file_types import FILE_TYPES
from students.importance import Importance, write_importance
from students.lineage import Lineage
from teachers.files import StoreError, exclusive
from teachers.gguf_file import file_sha256, read_gguf
from tests.test_run import SMALL


@pytest.fixture(scope="module")
def finished(tiny_teacher_path: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run."""
    overrides = {
        "teacher.path": str(tiny_teacher_path),
        "student.size": "32x1",
        "data.samples": 24,
        "train.epochs": 1,
    }
    out = tmp_path_factory.mktemp("runs") / "run"
    return run(load_config(None, overrides, SMALL), Places(out=out), Console())


@pytest.fixture
def copy(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of it to write in."""
    shutil.copytree(finished.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def test_types_are_those_of_the_settings() -> None:
    """One list of names; ``all``, capital letters and repetition are understood."""
    from distill.config import Quant

    assert get_args(Quant) == tuple(FILE_TYPES) == parse_quants("all")
    assert parse_quants("Q8_0, f16,q8_0") == ("q8_0", "f16")
    with pytest.raises(UserError, match=r"'q3'.*choose from f32, .*iq4_nl"):
        parse_quants("f16,q3")


def test_several_at_once(
    copy: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is loaded back and proved; table, exports.json, card and log name them all."""
    monkeypatch.setattr(
        sys, "argv", ["distill", "export-gguf", str(copy.path), "--quant", "f32,q8_0,q4_k_m,iq4_nl"]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    rows = {file.file: file for file in read_exports(copy)}
    wanted = [
        "student-f32.gguf",
        "student.gguf",
        "student-q8_0.gguf",
        "student-q4_k_m.gguf",
        "student-iq4_nl.gguf",
    ]
    assert sorted(rows) == sorted(wanted)
    card, log = copy.card.read_text(), (copy.path / "audit.jsonl").read_text()
    for name, file in rows.items():
        path = copy.path / name
        header = read_gguf(path)
        assert file.bytes == path.stat().st_size and file.sha256 == file_sha256(path)
        assert header.value("general.file_type") == int(FILE_TYPES[file.quant].number)
        assert sum(file.types.values()) == len(header.tensors) and file.generation > 0 and file.prompt > 0
        assert name in card and file.sha256 in log
        if name != "student.gguf":
            assert file.quant in said
        assert file.imatrix is FILE_TYPES[file.quant].weighted
        assert ("quantize.imatrix.entries_count" in header.fields) is file.imatrix
    assert rows["student-f32.gguf"].max_logit_difference <= 1e-3 and rows["student-f32.gguf"].kl <= 1e-6
    assert 0 < rows["student-q8_0.gguf"].kl <= 5e-3 < 0.1 and rows["student-q8_0.gguf"].agreement > 0.9
    assert rows["student-q8_0.gguf"].kl < rows["student-iq4_nl.gguf"].kl
    assert "q4_k_m as Q5_0" in " ".join(said.split())  # rows of 32 have no place in blocks of 256


def test_the_files_say_where_they_come_from(finished: RunFolder, tmp_path: Path) -> None:
    """Also one that is exported later: the teacher as base model, the text, what the teacher's file says of itself."""
    [file] = export_run(finished, ["f16"], tmp_path / "later.gguf", Console())
    for path in (finished.gguf, tmp_path / file.file):
        said = read_gguf(path)
        assert said.value("general.base_model.0.name") == "tiny"
        assert said.value("so8t.teacher_sha256") in said.value("general.base_model.0.description")
        assert said.value("general.dataset.0.name") == "text written by tiny"
        assert said.value("general.size_label") and said.value("tokenizer.chat_template")
    assert (
        Lineage.from_json(json.loads((finished.student / "lineage.json").read_text())).models[0].name
        == "tiny"
    )
    assert [row.file for row in read_exports(finished)] == [
        "student.gguf"
    ]  # what lies elsewhere is not the run's


def test_the_importance_matrix_is_of_training_text(finished: RunFolder) -> None:
    """It is in the run, has a row for every matrix of the file, and may be left out."""
    file, model = read_gguf(finished.importance, model=False), read_gguf(finished.gguf)
    matrices = {name for name, info in model.tensors.items() if len(info.shape) == 2}
    assert {name.removesuffix(".in_sum2") for name in file.tensors if name.endswith(".in_sum2")} == matrices
    lengths = [len(tokens) for tokens in finished.read_held_out(10**6).sequences]
    tokens = float(file.tensor("blk.0.attn_q.weight.counts")[0, 0])
    assert tokens + sum(lengths) <= finished.read_results()["soft_targets"]["tokens"]


def test_without_a_matrix(copy: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs made before it existed are exported without and say so; a damaged one is refused in one line."""
    [file] = export_run(copy, ["q4_0"], None, Console(), imatrix=False)
    plain = (copy.path / file.file).read_bytes()
    assert not file.imatrix
    copy.importance.write_bytes(copy.importance.read_bytes()[:200])
    with pytest.raises(UserError, match=r"imatrix\.gguf is damaged.*--no-imatrix"):
        export_run(copy, ["q4_0"], None, Console())
    copy.importance.unlink()
    [again] = export_run(copy, ["q4_0"], None, Console())
    assert not again.imatrix and (copy.path / again.file).read_bytes() == plain
    assert "no importance matrix" in capsys.readouterr().out


def test_one_that_fails_does_not_take_the_others_with_it(
    copy: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A type that rounds this student away is named and gets no file; those before and after it stay."""
    monkeypatch.setitem(distill.prove.MAX_MEAN_KL, "q4_0", 1e-12)
    with pytest.raises(ProofFailed, match=r"the q4_0 file is .* nats per token from the F32 file"):
        export_run(copy, ["q8_0", "q4_0", "f16"], None, Console())
    names = {path.name for path in copy.path.glob("*.gguf")}
    assert names == {"student.gguf", "imatrix.gguf", "student-q8_0.gguf", "student-f16.gguf"}
    assert not list(copy.path.glob(".*.tmp*"))
    rows = [row.file for row in read_exports(copy)]
    assert rows == ["student-f16.gguf", "student-q8_0.gguf", "student.gguf"]


def test_where_files_go(finished: RunFolder, tmp_path: Path) -> None:
    """One file by name, several into a folder; nothing is written over."""
    there = tmp_path / "there"
    there.mkdir()
    export_run(finished, ["f16", "q8_0"], there, Console())
    assert {path.name for path in there.iterdir()} == {"student-f16.gguf", "student-q8_0.gguf"}
    with pytest.raises(UserError, match="is not a folder; several types need one"):
        export_run(finished, ["f16", "q8_0"], tmp_path / "nowhere", Console())
    with pytest.raises(UserError, match="exists; choose another name"):
        export_run(finished, ["f16"], there / "student-f16.gguf", Console())
    with pytest.raises(UserError, match=r"has a student-q8_0\.gguf already"):  # it may be another run's
        export_run(finished, ["q4_0", "q8_0"], there, Console())
    with pytest.raises(UserError, match=r"must end in \.gguf"):
        export_run(finished, ["f16"], tmp_path / "x.txt", Console())
    with pytest.raises(UserError, match=r"the folder .* does not exist"):
        export_run(finished, ["f16"], tmp_path / "nowhere" / "x.gguf", Console())


ROW = {
    "file": "x.gguf",
    "quant": "q2_k",
    "bytes": 1,
    "bits_per_weight": 1,
    "sha256": "",
    "kl": 0,
    "agreement": 1,
}
ROW |= {
    "max_logit_difference": 0,
    "positions": 1,
    "prompt": 1,
    "generation": 1,
    "imatrix": False,
    "types": {},
}


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"files": [{"file": "student.gguf"}]}',
        '{"files": 3}',
        "[",
        json.dumps({"files": [ROW]}),
        json.dumps({"files": [ROW | {"quant": "q8_0", "file": "../x.gguf"}]}),
    ],
)
def test_damaged_records_are_named(copy: RunFolder, content: str) -> None:
    """exports.json that is none: one line, and the student can be exported again without it."""
    copy.exports.write_text(content)
    with pytest.raises(UserError, match=r"exports\.json is damaged"):
        export_run(copy, ["f16"], None, Console())


def test_what_was_made_before_the_disk_filled_up_is_known(
    copy: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure in one type: those before it have their names, their rows and their lines in the log."""
    real = distill.exporting.quantize_gguf

    def full(source: Path, target: Path, quant: str, **more: object) -> None:
        if quant == "q5_k_m":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        real(source, target, quant, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(distill.exporting, "quantize_gguf", full)
    with pytest.raises(OSError, match="No space"):
        export_run(copy, ["f32", "q8_0", "q5_k_m", "q4_0"], None, Console())
    made = ["student-f32.gguf", "student-q8_0.gguf", "student.gguf"]
    assert sorted(path.name for path in copy.path.glob("student*.gguf")) == made
    assert sorted(row.file for row in read_exports(copy)) == made
    assert verify(copy.path).intact and not list(copy.path.glob(".*.tmp*"))


def test_leftovers_of_a_killed_export_go(copy: RunFolder) -> None:
    """Those of processes that are gone, and no others."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, busy, other = (
        copy.path / f".student-q8_0.f32.{ended.pid}.tmp.gguf",
        copy.path / f".student-q8_0.f32.{os.getppid()}.tmp.gguf",
        copy.path / f".student-q8_01.f32.{ended.pid}.tmp.gguf",
    )
    for path in (left, busy, other):
        path.write_bytes(b"left")
    export_run(copy, ["q8_0"], None, Console())
    assert not left.exists() and busy.exists() and other.exists()


def test_one_export_at_a_time(copy: RunFolder) -> None:
    """While a process works in the run's folder, another does not."""
    with exclusive(copy.path), pytest.raises(StoreError, match="in use by another process"):
        export_run(copy, ["f16"], None, Console())


def test_a_run_that_cannot_be_written_to_is_exported_elsewhere(
    copy: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is made; that nothing is written down is said."""
    before = {path: path.read_bytes() for path in copy.path.iterdir() if path.is_file()}
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    export_run(copy, ["f16"], tmp_path / "x.gguf", Console())
    assert (tmp_path / "x.gguf").exists() and "cannot be written to" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in copy.path.iterdir() if path.is_file()}


def test_unsteady_speeds_are_said_to_be(
    copy: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine that is busy otherwise makes figures that mean nothing."""
    speeds = iter([(1000.0, 100.0), (1000.0, 160.0), (1000.0, 130.0), *[(1000.0, 100.0)] * 3])
    monkeypatch.setattr(distill.prove, "measure_speed", lambda model: next(speeds))
    [busy, quiet] = export_run(copy, ["q8_0", "f16"], None, Console())
    assert (busy.generation, quiet.generation) == (130.0, 100.0)
    assert "speeds of q8_0 differed" in " ".join(capsys.readouterr().out.split())


def test_an_edited_card_is_left_alone(copy: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """The card follows new exports until somebody writes in it."""
    export_run(copy, ["f16"], None, Console())
    assert "student-f16.gguf" in copy.card.read_text()
    edited = copy.card.read_text().replace("## How to run it", "## My words")
    copy.card.write_text(edited)
    export_run(copy, ["bf16"], None, Console())
    assert copy.card.read_text() == edited and "has been edited" in capsys.readouterr().out


def test_an_importance_matrix_of_another_model(copy: RunFolder) -> None:
    """Refused in one line, as a user's mistake."""
    wrong = Importance({"blk.0.attn_q.weight": np.ones(12)}, 4, 1)
    write_importance(wrong, copy.importance, ["x"])
    with pytest.raises(UserError, match=r"not of this student .*--no-imatrix"):
        export_run(copy, ["q4_0"], None, Console())


def test_later_exports_have_the_runs_own_bytes(finished: RunFolder, tmp_path: Path) -> None:
    """The same type again is the same file, and the matrix is the same to the bit."""
    export_run(finished, ["q8_0"], tmp_path / "again.gguf", Console())
    assert (tmp_path / "again.gguf").read_bytes() == finished.gguf.read_bytes()


def test_every_type_of_a_wider_student_is_what_it_says(finished: RunFolder) -> None:
    """The KL that exports.json gives is that of an independent computation with the file's own logits."""
    from teachers.gguf_teacher import GGUFTeacher

    [file, original] = export_run(finished, ["q4_0", "f32"], None, Console())
    sequences = finished.read_held_out(10**6).sequences
    with (
        GGUFTeacher(finished.path / original.file, threads=1) as exact,
        GGUFTeacher(finished.path / file.file, threads=1) as rounded,
    ):
        p, q = (model.logits(sequences, exact=True).astype(np.float64) for model in (exact, rounded))
    p, q = (rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)) for rows in (p, q))
    assert file.kl == pytest.approx(float((np.exp(p) * (p - q)).sum(axis=1).mean()), rel=1e-6)
    assert file.agreement == pytest.approx(float((p.argmax(1) == q.argmax(1)).mean()))
    for row in (file, original):
        (finished.path / row.file).unlink()
