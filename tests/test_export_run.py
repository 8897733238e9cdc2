"""``distill export-gguf`` on a finished run: several types at once, their table, what is kept, what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import distill.prove
from distill.cli import main
from distill.config import get_args, load_config, parse_quants
from distill.console import Console
from distill.errors import ProofFailed, UserError
from distill.export_run import export_run, read_exports
from distill.pipeline import Places, run
from distill.run_folder import RunFolder
from students.file_types import FILE_TYPES
from students.lineage import Lineage
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
    with pytest.raises(UserError, match=r"the folder .* does not exist"):
        export_run(finished, ["f16"], tmp_path / "nowhere" / "x.gguf", Console())


@pytest.mark.parametrize("content", ["{}", '{"files": [{"file": "student.gguf"}]}', '{"files": 3}', "["])
def test_damaged_records_are_named(copy: RunFolder, content: str) -> None:
    """exports.json that is none: one line, and the student can be exported again without it."""
    copy.exports.write_text(content)
    with pytest.raises(UserError, match=r"exports\.json is damaged"):
        export_run(copy, ["f16"], None, Console())


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
