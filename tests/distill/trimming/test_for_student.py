"""Students with a part of their teacher's vocabulary: a run, again, from the store; refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.pipeline.run import run
from distill.runs.folder import RunFolder, RunPaths
from distill.runtime.progress import Console
from teachers.gguf.file import read_gguf
from teachers.store.manifest import read_manifest
from tests.conftest import command
from tests.support.runs import SMALL, small_config

pytestmark = pytest.mark.usefixtures("llama_here")
TEXT = "The pump of line 7 stops and the operator calls the shift lead, who resets it.\n" * 30


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little English."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{number}. {TEXT[number:]}" for number in range(9)))
    return path


@pytest.fixture(scope="module")
def finished(
    tiny_teacher_path: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    """A finished run with half of the vocabulary."""
    settings = ["student.vocab=50%", f"data.path={text}", "data.train_on=all"]
    out = tmp_path_factory.mktemp("runs") / "first"
    return run(small_config(tiny_teacher_path, *settings), RunPaths(out=out), Console())


def store_of(folder: RunFolder) -> Path:
    """The store that a run made."""
    return Path(folder.read_results()["soft_targets"]["folder"])


def test_the_student_has_half_of_the_tokens(finished: RunFolder, tiny_teacher_path: Path) -> None:
    """Its file, its tokenizer everywhere, the store's identity; results, report and card say what
    was dropped, and compare in bits per byte."""
    whole = read_gguf(tiny_teacher_path).fields["tokenizer.ggml.tokens"].value
    count = -(-len(whole) // 2)
    file = read_gguf(finished.gguf)
    tokens = file.fields["tokenizer.ggml.tokens"].value
    assert len(tokens) == count and set(tokens) < set(whole)
    assert file.tensors["token_embd.weight"].shape[0] == count
    assert file.value("tokenizer.chat_template") == read_gguf(tiny_teacher_path).value(
        "tokenizer.chat_template"
    )
    folder = json.loads((finished.plain / "config.json").read_text())
    assert folder["vocab_size"] == count
    results = finished.read_results()
    part = results["vocabulary"]
    assert (part["kept"], part["of"], part["asked"]) == (count, len(whole), "50%")
    assert 0 <= part["dropped_mass"] < 0.9 and -0.01 < part["added_tokens"] < 0.5
    assert part["bits_per_byte"].keys() == {"teacher", "reduced_teacher", "student"}
    assert all(0 < bits < 30 for bits in part["bits_per_byte"].values())
    assert results["teacher"]["vocab_size"] == len(whole)
    identity = read_manifest(store_of(finished)).identity
    assert identity["vocab_size"] == count and len(identity["vocabulary_sha256"]) == 64
    for page in (finished.card, finished.report):
        said = page.read_text(encoding="utf-8")
        assert f"{count:,} of the teacher" in said and "bits per byte" in said, page
    held = json.loads(finished.held_out_file.read_text())
    assert max(max(tokens) for tokens in held["sequences"]) < count


def test_again_and_from_the_store(
    finished: RunFolder, tiny_teacher_path: Path, text: Path, tmp_path: Path
) -> None:
    """The choice, the teacher's cut file and the store are found again; ``train`` needs no teacher
    and starts from its cut file where there is one; another vocabulary is another store."""
    kept = {path.name: path.stat().st_mtime_ns for path in store_of(finished).parent.iterdir()}
    words = ["--teacher", tiny_teacher_path, "--data", text, "--samples", 40]
    settings = [word for one in (*SMALL, "data.train_on=all") for word in ("--set", one)]
    where = ["--store", store_of(finished)]
    again = ["capture", *words, *settings, *where]
    assert "reused" in command(*again, "--vocab", "50%").said
    assert {p.name: p.stat().st_mtime_ns for p in store_of(finished).parent.iterdir()} == kept
    ended = command(*again, "--vocab", "60%")
    assert ended.code == 2 and "vocab" in ended.complaint
    trained = [two for one in SMALL if "data." not in one for two in ("--set", one)]
    size = ["--student-size", "32x1", *trained]
    ended = command("train", store_of(finished), *size, "--out", tmp_path / "t", "--vocab", "50%")
    assert ended.code == 0, ended
    part = RunFolder(tmp_path / "t").read_results()["vocabulary"]
    assert part["bits_per_byte"].keys() == {"student"}
    for asked in ("60%", "all", "7"):
        ended = command("train", store_of(finished), *size, "--vocab", asked)
        assert ended.code == 2 and "vocab" in ended.complaint, asked


def test_what_cannot_be_cut_is_refused(tiny_teacher_path: Path, text: Path, tmp_path: Path) -> None:
    """One line, exit 2, before anything is captured."""
    words = ["run", "--teacher", tiny_teacher_path, "--data", text, "--student-size", "32x1"]
    words += ["--out", tmp_path / "run"]
    cases = [
        (["--vocab", "9"], "must stay"),
        (["--vocab", "many"], "'many' is no size of a vocabulary"),
        (["--vocab", "9000k"], "ask for fewer"),
        (["--vocab", "50%", "--targets", "hidden"], "targets.kind = hidden"),
        (["--vocab", "50%", "--set", f"teacher.mix_with=[{tiny_teacher_path}]"], "single GGUF"),
    ]
    for more, message in cases:
        ended = command(*words, *more)
        assert ended.code == 2 and message in ended.complaint, (more, ended)
        lines = [line for line in ended.complaint.splitlines() if line.startswith("error")]
        assert len(lines) == 1, (more, ended)
    assert not (tmp_path / "run").exists()
