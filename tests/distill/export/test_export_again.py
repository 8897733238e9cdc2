"""``distill export-gguf`` on a finished run: several types at once, what is kept and refused."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import distill.export.export
import distill.export.proof
from distill.config.loading import load_config
from distill.config.schema import Quant
from distill.config.units import parse_quants
from distill.errors import ProofFailed, UserError
from distill.export.export_again import export_run
from distill.pipeline.run import run
from distill.runs.audit_verify import verify
from distill.runs.exports import ExportedFile, read_exports
from distill.runs.folder import RunFolder, RunPaths
from distill.runtime.progress import Console
from students.gguf.file_types import FILE_TYPES
from students.gguf.imatrix import Importance, write_importance
from students.gguf.provenance import Lineage
from teachers.atomic_files import StoreError, exclusive
from teachers.gguf.file import file_sha256, read_gguf
from teachers.llama_cpp.teacher import GGUFTeacher
from tests.conftest import command
from tests.support.runs import SMALL

pytestmark = pytest.mark.usefixtures("llama_here")
Elsewhere = tuple[Path, dict[str, ExportedFile]]


@pytest.fixture(scope="module")
def finished(tiny_teacher_path: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run."""
    overrides = {"teacher.path": str(tiny_teacher_path), "student.size": "32x1"}
    overrides |= {"data.samples": 24, "train.epochs": 1}
    out = tmp_path_factory.mktemp("runs") / "run"
    return run(load_config(None, overrides, SMALL), RunPaths(out=out), Console())


def export(
    folder: RunFolder, *quants: Quant, to: Path | None = None, imatrix: bool = True
) -> list[ExportedFile]:
    """Export it again."""
    return export_run(folder, quants, to, Console(), imatrix=imatrix)


@pytest.fixture(scope="module")
def elsewhere(finished: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    """A folder with three types of it, and what is known of them."""
    folder = tmp_path_factory.mktemp("elsewhere")
    files = export(finished, "f32", "q4_0", "q8_0", to=folder)
    return folder, {file.quant: file for file in files}


@pytest.fixture
def copy(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of it to write in."""
    shutil.copytree(finished.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, wherever its lines were broken."""
    return " ".join(capsys.readouterr().out.split())


def names(folder: Path, pattern: str = "*.gguf") -> set[str]:
    """The files of a folder."""
    return {path.name for path in folder.glob(pattern)}


def contents(folder: Path) -> dict[Path, bytes]:
    """Of the files of a folder."""
    return {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_types_are_those_of_the_settings() -> None:
    """One list of names; ``all``, capital letters and repetition are understood."""
    assert tuple(FILE_TYPES) == parse_quants("all")
    assert parse_quants("Q8_0, f16,q8_0") == ("q8_0", "f16")
    with pytest.raises(UserError, match=r"'q3'.*choose from f32, .*iq4_nl"):
        parse_quants("f16,q3")


def test_several_at_once(copy: RunFolder) -> None:
    """Each is loaded back and proved; table, exports.json, card and log name them all."""
    quants = ("f32", "q8_0", "q4_k_m", "iq4_nl")
    ended = command("export-gguf", copy.path, "--quant", ",".join(quants))
    assert ended.code == 0
    printed = ended.said
    rows = {file.file: file for file in read_exports(copy)}
    assert rows.keys() == {"student.gguf", *(f"student-{quant}.gguf" for quant in quants)}
    card, log = copy.card.read_text(), (copy.path / "audit.jsonl").read_text()
    for name, file in rows.items():
        path, kind = copy.path / name, FILE_TYPES[file.quant]
        header = read_gguf(path)
        assert (file.bytes, file.sha256) == (path.stat().st_size, file_sha256(path)), name
        assert header.value("general.file_type") == int(kind.number), name
        assert sum(file.types.values()) == len(header.tensors), name
        assert file.generation > 0 and file.prompt > 0, name
        assert name in card and file.sha256 in log, name
        assert name == "student.gguf" or file.quant in printed, name
        assert file.imatrix is kind.weighted, name
        assert ("quantize.imatrix.entries_count" in header.fields) is file.imatrix, name
    exact, eight = rows["student-f32.gguf"], rows["student-q8_0.gguf"]
    assert exact.max_logit_difference <= 1e-3 and exact.kl <= 1e-6
    assert 0 < eight.kl <= 5e-3 < 0.1 and eight.agreement > 0.9
    assert eight.kl < rows["student-iq4_nl.gguf"].kl
    four = rows["student-q4_k_m.gguf"]
    assert four.bytes < 0.9 * eight.bytes and (four.embedding, eight.embedding) == ("Q5_1", "Q8_0")
    assert re.search(r"q4_k_m as [^;.]*Q5_0", printed)  # rows of 32 have no place in blocks of 256


def test_types_of_token_rows(copy: RunFolder) -> None:
    """As asked, or what such rows divide into, which is said; an output matrix has to be there."""
    asked = {"q8_0:embedding=q5_k": "Q5_1", "q4_k_m:embedding=q4_0": "Q4_0", "q8_0": "Q8_0"}
    ended = command("export-gguf", copy.path, "--quant", ",".join(asked))
    assert ended.code == 0 and "q8_0:embedding=q5_k with the embedding as Q5_1" in ended.said
    files = {file.quant: file for file in read_exports(copy) if file.file != "student.gguf"}
    assert {quant: file.embedding for quant, file in files.items()} == asked
    assert names(copy.path, "*-embedding-*") == {
        "student-q8_0-embedding-q5_k.gguf",
        "student-q4_k_m-embedding-q4_0.gguf",
    }
    for quant, file in files.items():
        embedding = read_gguf(copy.path / file.file).tensors["token_embd.weight"]
        assert embedding.type.name == asked[quant], quant
    sizes = [file.bytes for file in sorted(files.values(), key=lambda file: file.embedding)]
    assert sizes == sorted(sizes)  # Q4_0, Q5_1, Q8_0
    ended = command("export-gguf", copy.path, "--quant", "q8_0:output=q6_k")
    assert ended.code == 2 and "give the type of its rows as embedding=" in ended.complaint


def test_the_files_say_where_they_come_from(finished: RunFolder, elsewhere: Elsewhere) -> None:
    """The teacher as base model, and the text; a later export has the run's own bytes."""
    later = elsewhere[0] / "student-q8_0.gguf"
    assert later.read_bytes() == finished.gguf.read_bytes()
    file = read_gguf(later)
    assert file.value("general.base_model.0.name") == "tiny"
    assert file.value("so8t.teacher_sha256") in file.value("general.base_model.0.description")
    assert file.value("general.dataset.0.name") == "text written by tiny"
    assert file.value("general.size_label") and file.value("tokenizer.chat_template")
    lineage = Lineage.from_json(json.loads((finished.student / "lineage.json").read_text()))
    assert lineage.models[0].name == "tiny"
    rows = [row.file for row in read_exports(finished)]
    assert rows == ["student.gguf"]  # what lies elsewhere is not the run's


def test_the_importance_matrix_is_of_training_text(copy: RunFolder) -> None:
    """It is measured when a type takes one, kept in the run, and has a row for every matrix."""
    copy.importance.unlink(missing_ok=True)
    export(copy, "f16")
    assert not copy.importance.exists()
    [file_of_type] = export(copy, "q4_0")
    assert file_of_type.imatrix
    finished, made = copy, copy.importance.read_bytes()
    file, model = read_gguf(finished.importance, model=False), read_gguf(finished.gguf)
    matrices = {name for name, info in model.tensors.items() if len(info.shape) == 2}
    sums = {name.removesuffix(".in_sum2") for name in file.tensors if name.endswith(".in_sum2")}
    assert sums == matrices
    lengths = [len(tokens) for tokens in finished.read_held_out(10**6).sequences]
    tokens = float(file.tensor("blk.0.attn_q.weight.counts")[0, 0])
    assert tokens + sum(lengths) <= finished.read_results()["soft_targets"]["tokens"]
    export(copy, "iq4_nl")
    assert copy.importance.read_bytes() == made
    copy.importance.unlink()
    copy.calibration_file.write_text('{"sequences": [[999999]]}')
    with pytest.raises(UserError, match=r"calibration\.json is damaged"):
        export(copy, "q4_0")


def test_without_a_matrix(copy: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs older than it are exported without and say so; a damaged or foreign one is refused."""
    [file] = export(copy, "q4_0", imatrix=False)
    plain = (copy.path / file.file).read_bytes()
    assert not file.imatrix
    export(copy, "iq4_nl")
    copy.importance.write_bytes(copy.importance.read_bytes()[:200])
    with pytest.raises(UserError, match=r"imatrix\.gguf is damaged.*--no-imatrix"):
        export(copy, "q4_0")
    foreign = Importance({"blk.0.attn_q.weight": np.ones(12)}, 4, 1)
    write_importance(foreign, copy.importance, ["x"])
    with pytest.raises(UserError, match=r"not of this student .*--no-imatrix"):
        export(copy, "q4_0")
    copy.importance.unlink()
    copy.calibration_file.unlink()
    [again] = export(copy, "q4_0")
    assert not again.imatrix and (copy.path / again.file).read_bytes() == plain
    assert "no text to measure an importance matrix on" in said(capsys)


def test_one_that_fails_does_not_take_the_others_with_it(
    copy: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A type that rounds this student away is named and gets no file; those around it stay."""
    monkeypatch.setitem(distill.export.proof.MAX_MEAN_KL, "q4_0", 1e-12)
    with pytest.raises(ProofFailed, match=r"the q4_0 file is .* nats per token from .*") as said:
        export(copy, "q8_0", "q4_0", "f16")
    assert f"distill export-gguf {copy.path} --quant f16" in str(said.value)
    made = {"student.gguf", "student-q8_0.gguf", "student-f16.gguf"}
    assert names(copy.path) == made | {"imatrix.gguf"}
    assert not names(copy.path, ".*.tmp*")
    assert [row.file for row in read_exports(copy)] == sorted(made)


def test_a_run_ends_with_a_more_exact_type_where_its_own_loses_too_much(
    tiny_teacher_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Hours of training are not lost to a bound of the last minute, and all records say the type
    that there is."""
    monkeypatch.setitem(distill.export.proof.MAX_MEAN_KL, "q8_0", 1e-12)
    overrides = {"teacher.path": str(tiny_teacher_path), "student.size": "32x1"}
    overrides |= {"data.samples": 8, "train.epochs": 1}
    folder = run(load_config(None, overrides, SMALL), RunPaths(out=tmp_path / "run"), Console())
    assert "student.gguf is of a more exact type" in said(capsys)
    assert folder.read_results()["student"]["quant"] == "f16"
    assert [row.quant for row in read_exports(folder)] == ["f16"]


def test_where_files_go(finished: RunFolder, elsewhere: Elsewhere, tmp_path: Path) -> None:
    """One file by name, several into a folder; nothing is written over."""
    there, nowhere = elsewhere[0], tmp_path / "nowhere"
    made = {f"student-{quant}.gguf" for quant in elsewhere[1]}
    assert names(there, "*") == made and len(made) == 3
    cases: list[tuple[tuple[Quant, ...], Path, str]] = [
        (("f16", "q8_0"), nowhere, "is not a folder; several types need one"),
        (("q8_0",), there / "student-q8_0.gguf", "exists; choose another name"),
        (("f16", "q8_0"), there, r"has a student-q8_0\.gguf already"),  # it may be another run's
        (("f16",), tmp_path / "x.txt", r"must end in \.gguf"),
        (("f16",), nowhere / "x.gguf", r"the folder .* does not exist"),
    ]
    for quants, output, words in cases:
        with pytest.raises(UserError, match=words):
            export(finished, *quants, to=output)
            pytest.fail(f"exported to {output}")
    assert names(there, "*") == made


def test_damaged_records_are_named(copy: RunFolder) -> None:
    """exports.json that is none: one line; and one process at a time works in a run's folder."""
    with exclusive(copy.path), pytest.raises(StoreError, match="in use by another process"):
        export(copy, "f16")
    [row] = json.loads(copy.exports.read_text())["files"]
    for content in (
        "{}",
        '{"files": [{"file": "student.gguf"}]}',
        '{"files": 3}',
        "[",
        json.dumps({"files": [row | {"quant": "q2_k"}]}),
        json.dumps({"files": [row | {"file": "../x.gguf"}]}),
    ):
        copy.exports.write_text(content)
        with pytest.raises(UserError, match=r"exports\.json is damaged"):
            export(copy, "f16")
            pytest.fail(f"{content} is read")


def test_what_was_made_before_the_disk_filled_up_is_known(
    copy: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure in one type: those before it have their names, rows and lines in the log."""
    real = distill.export.export.quantize_gguf

    def full(source: Path, target: Path, quant: str, **more: object) -> None:
        if quant == "q5_k_m":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        real(source, target, quant, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(distill.export.export, "quantize_gguf", full)
    with pytest.raises(OSError, match="No space"):
        export(copy, "f32", "q8_0", "q5_k_m", "q4_0")
    made = {"student-f32.gguf", "student-q8_0.gguf", "student.gguf"}
    assert names(copy.path, "student*.gguf") == made
    assert [row.file for row in read_exports(copy)] == sorted(made)
    assert verify(copy.path).intact and not names(copy.path, ".*.tmp*")


def test_a_run_that_cannot_be_written_to_is_exported_elsewhere(
    copy: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is made; that nothing is written down is said."""
    before = contents(copy.path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    output = copy.path.parent / "x.gguf"
    export(copy, "f16", to=output)
    assert output.exists() and "cannot be written to" in said(capsys)
    assert contents(copy.path) == before


def test_what_an_export_says_and_leaves(
    copy: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unsteady speeds are said to be so; what killed exports left goes; the card follows new
    exports until somebody writes in it."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    kinds = (("q8_0", ended.pid), ("q8_0", os.getppid()), ("q8_01", ended.pid))
    paths = [copy.path / f".student-{quant}.f32.{pid}.tmp.gguf" for quant, pid in kinds]
    for path in paths:
        path.write_bytes(b"left")
    speeds = iter([(1000.0, 100.0), (1000.0, 160.0), (1000.0, 130.0), *[(1000.0, 100.0)] * 6])
    monkeypatch.setattr(distill.export.proof, "measure_speed", lambda model: next(speeds))
    [busy, quiet] = export(copy, "q8_0", "f16")
    assert (busy.generation, quiet.generation) == (130.0, 100.0)
    assert "speeds of q8_0 differed" in said(capsys)
    assert [path.exists() for path in paths] == [False, True, True]
    card = copy.card.read_text()
    assert "student-q8_0.gguf" in card and "student-f16.gguf" in card
    edited = card.replace("## How to run it", "## My words")
    copy.card.write_text(edited)
    export(copy, "bf16")
    assert copy.card.read_text() == edited and "has been edited" in said(capsys)


def test_the_kl_is_what_it_says(finished: RunFolder, elsewhere: Elsewhere) -> None:
    """That of an independent computation with the files' own logits."""
    folder, files = elsewhere
    sequences, logs = finished.read_held_out(10**6).sequences, []
    for quant in ("f32", "q4_0"):
        with GGUFTeacher(folder / files[quant].file, threads=1) as model:
            rows = model.logits(sequences, exact=True).astype(np.float64)
        logs.append(rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)))
    p, q = logs
    wanted = float((np.exp(p) * (p - q)).sum(axis=1).mean())
    assert files["q4_0"].kl == pytest.approx(wanted, rel=1e-6)
    same = float((p.argmax(1) == q.argmax(1)).mean())
    assert files["q4_0"].agreement == pytest.approx(same)
