"""A run's log: what is in it and what is not, that it goes on over interruptions, and `distill audit verify`."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

import distill.pipeline
from distill.audit import (
    record_checkpoint,
    record_export,
    record_finish,
    record_judgments,
    record_resumed,
)
from distill.audit_log import HEAD, LOG, append, read_head
from distill.audit_verify import verify
from distill.cli import main
from distill.console import Console
from distill.engine import Loop, train
from distill.guarding import write_events
from distill.judge import Judgment
from distill.metrics import MetricsFile
from distill.pipeline import run
from distill.run_folder import Places, RunFolder
from stability import Event
from teachers.gguf_teacher import GGUFTeacher
from tests.test_run import small_config

SECRET = "the quince marmalade"
HIDDEN = "a heron at dusk"
PLACE = "somebodys-own-folder"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lines_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text("utf-8").splitlines()]


def events_in(folder: Path, name: str) -> list[dict[str, Any]]:
    return [line["content"] for line in lines_in(folder) if line["event"] == name]


def command(*words: object) -> int | str | None:
    """The exit code of the command line."""
    with (
        patch.object(sys, "argv", ["distill", *map(str, words)]),
        pytest.raises(SystemExit) as stopped,
    ):
        main()
    return stopped.value.code


@contextmanager
def loaded_once(student: Path) -> Iterator[None]:
    """Commands that judge share one llama.cpp process."""
    with GGUFTeacher(student, threads=1) as model, pytest.MonkeyPatch.context() as changed:
        changed.setattr("distill.judge.GGUFTeacher", lambda path: model)
        changed.setattr(model, "close", lambda: None)
        yield


@pytest.fixture(scope="module")
def finished(tiny_teacher_path: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run on prompts and texts with secrets in them, in somebody's own folder; interrupted once, finished, and then
    asked to decide on prompts."""
    home = tmp_path_factory.mktemp("home") / PLACE
    data = home / "data" / "mine.jsonl"
    data.parent.mkdir(parents=True)
    rows = [{"prompt": f"Order {n} jars of {SECRET}."} for n in range(4)]
    rows += [{"text": f"{SECRET} <think>{HIDDEN}, {n}</think> {n}"} for n in range(30)]
    data.write_text("\n".join(map(json.dumps, rows)))
    config, out = small_config(tiny_teacher_path, f"data.path={data}"), home / "runs" / "one"

    def interrupted(student, data, objective, config, folder, report, *rest):  # type: ignore[no-untyped-def]
        def stop(step: int, text: str) -> None:
            if step == 4:
                raise KeyboardInterrupt

        return train(student, data, objective, config, folder, stop, *rest)

    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("HOME", str(home))
        with changed.context() as stopped:
            stopped.setattr(distill.pipeline, "train", interrupted)
            stopped.setattr("distill.clock.CHECKPOINT_SECONDS", 0.0)
            stopped.setattr("distill.clock.SAVING_SHARE", float("inf"))
            with pytest.raises(KeyboardInterrupt):
                run(config, Places(out=out), Console())
        run(config, Places(out=out), Console())
        run(config, Places(out=out), Console())  # finished: nothing is done, and nothing written down
        asked = data.with_name("asked.jsonl")
        asked.write_text("\n".join(json.dumps({"prompt": f"{SECRET}? <think>{HIDDEN}"}) for _ in range(2)))
        with loaded_once(out / "student.gguf"):
            assert command("judge", out / "student.gguf", f"May I have {SECRET}?") == 0
            assert command("judge", out / "student.gguf", "--prompts", asked, "--json") == 0
    return RunFolder(out)


@pytest.fixture
def copy(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """The run in a folder that a test may change."""
    shutil.copytree(finished.path, tmp_path / "copy")
    return RunFolder(tmp_path / "copy")


def test_a_run_with_an_interruption_is_one_chain(finished: RunFolder) -> None:
    """Intact, in the order in which things happened, each with what belongs to it."""
    found = verify(finished.path)
    assert found.intact and not found.notes
    names = [line["event"] for line in lines_in(finished.path)]
    assert names[:2] == ["run_started", "captured"] and names[-3:] == ["judged"] * 3
    middle = [name for name in names[2:] if name not in ("checkpoint", "guard")]
    assert middle[:4] == ["run_continued", "captured", "training_resumed", "training_finished"]
    assert middle[4:] == ["exported"] * (len(middle) - 8) + ["run_finished"] + ["judged"] * 3
    started, captured = events_in(finished.path, "run_started")[0], events_in(finished.path, "captured")
    identity, config = finished.read_identity(), finished.read_config()
    assert started["identity"] == identity and started["seed"] == config.seed
    assert started["files"]["config.json"]["sha256"] == digest(finished.config_file)
    assert (
        started["settings"]["train"]["batch_size"] == 8
        and started["settings"]["data"]["path"] == "mine.jsonl"
    )
    assert started["environment"] == finished.read_results()["environment"]
    assert [entry["reused"] for entry in captured] == [False, True]
    results = finished.read_results()
    store = Path(results["soft_targets"]["folder"])
    assert (
        captured[0]["store_key"] == identity["soft_targets"]
        and captured[0]["sequences"] == results["soft_targets"]["sequences"]
    )
    assert captured[0]["manifest_sha256"] == digest(store / "manifest.json")
    over = events_in(finished.path, "training_finished")[0]
    training = results["training"]
    assert {name: over[name] for name in ("steps", "best_step", "tokens_seen", "precision")} == {
        name: training[name] for name in ("steps", "best_step", "tokens_seen", "precision")
    }
    assert over["held_out_kl"] == [[score["step"], score["kl"]] for score in training["held_out"]]


def test_checkpoints_and_files_are_named_by_their_hashes(finished: RunFolder) -> None:
    """Those still there are as named; training went on from one that was saved; the results have their own line."""
    saved = events_in(finished.path, "checkpoint")
    steps = [entry["step"] for entry in saved]
    assert len(steps) > 3 and steps == sorted(steps)
    for entry in saved[-2:]:
        assert {name.rpartition("/")[2] for name in entry["files"]} >= {"model.safetensors", "state.json"}
        for name, described in entry["files"].items():
            assert described["sha256"] == digest(finished.path / name)
            assert described["bytes"] == (finished.path / name).stat().st_size
    resumed = events_in(finished.path, "training_resumed")[0]
    assert {"step": resumed["step"], "files": resumed["read"]} in saved and resumed["step"] > 0
    ended = events_in(finished.path, "run_finished")[0]["files"]
    for path in (finished.results_file, finished.gguf, finished.held_out_file, finished.tokenizer):
        assert ended[path.relative_to(finished.path).as_posix()]["sha256"] == digest(path)
    assert {"metrics.jsonl", "student/model.safetensors", "student/config.json"} <= ended.keys()
    kept = finished.read_results()["audit"]
    line = (finished.path / LOG).read_bytes().splitlines()[kept["lines"] - 1]
    assert kept["sha256"] == hashlib.sha256(line).hexdigest()
    assert json.loads(line)["event"] in ("training_finished", "exported")


def test_decisions_are_there_without_a_word_of_the_prompts(finished: RunFolder) -> None:
    """Prompt and student as hashes, the decision with its figures rounded."""
    judged = events_in(finished.path, "judged")
    prompts = [f"May I have {SECRET}?", *[f"{SECRET}? <think>{HIDDEN}"] * 2]
    assert [entry["prompt_sha256"] for entry in judged] == [
        hashlib.sha256(p.encode()).hexdigest() for p in prompts
    ]
    for entry in judged:
        assert entry["read"]["student.gguf"]["sha256"] == digest(finished.gguf)
        assert entry["decision"] in ("ALLOW", "ESCALATE", "REFUSE")
        assert sum(entry["probabilities"].values()) == pytest.approx(1.0, abs=3e-6)
        assert all(value == round(value, 6) for value in entry["probabilities"].values())


def test_no_text_and_no_place_is_in_the_log(finished: RunFolder) -> None:
    """Neither prompts, data nor what was thought, nor folders; though the run has them elsewhere."""
    log = (finished.path / LOG).read_text("utf-8")
    for word in (
        SECRET,
        HIDDEN,
        "quince",
        "heron",
        "think",
        "jars",
        PLACE,
        str(Path.home()),
        "pytest",
        "/home",
        "/tmp",
    ):
        assert word not in log, word
    assert SECRET in finished.held_out_file.read_text("utf-8")
    assert PLACE in finished.config_file.read_text()
    assert all(ord(sign) < 128 for sign in log)


@pytest.mark.parametrize("first", [True, False])
def test_what_the_guard_does_is_there_by_its_figures(tmp_path: Path, first: bool) -> None:
    """Of the first process alone, and without the sentence, which may name a folder; so is a refused checkpoint."""
    guard, told = SimpleNamespace(on_event=None), []
    folder = tmp_path if first else None
    with MetricsFile(tmp_path / "metrics.jsonl" if first else None, None) as metrics:
        write_events(guard, [[4, 2], [7]], metrics, folder, told.append)  # type: ignore[arg-type]
        guard.on_event(
            Event(3, "clip", "gradient norm", f"in {PLACE}", "layers.0.weight", float("inf"), 0.25)
        )
        guard.on_event(Event(5, "set_aside", "batch", "a batch", value=1.0, batch=[7]))
        process: Any = SimpleNamespace(is_main_process=first)
        loop = Loop(process, None, None, None, [], None, tmp_path, metrics, told.append)  # type: ignore[arg-type]
        loop.refuse(Path("checkpoints/step-000004"), f"cannot open /x/{PLACE}/state.json", 9)
    assert len(told) == 3 and (tmp_path / LOG).exists() == first
    if first:
        found = [
            {key: line[key] for key in line if line[key] is not None} for line in events_in(tmp_path, "guard")
        ]
        assert found == [
            {
                "step": 3,
                "action": "clip",
                "signal": "gradient norm",
                "tensor": "layers.0.weight",
                "limit": 0.25,
            },
            {"step": 5, "action": "set_aside", "signal": "batch", "value": 1.0, "batch": [7]},
            {"step": 9, "action": "checkpoint_refused", "signal": "checkpoint", "checkpoint": "step-000004"},
        ]
        assert PLACE not in (tmp_path / LOG).read_text()


# -- distill audit verify ----------------------------------------------------------------------------------


def test_an_intact_run_on_the_command_line(finished: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0; the head is printed and is taken by --expect; as JSON on one line."""
    assert command("audit", "verify", finished.path) == 0
    said = capsys.readouterr()
    head = read_head(finished.path)
    assert head is not None and head.sha256 in said.out and "intact" in said.out and not said.err
    assert "of older checkpoints are gone, as they should be" in said.out and "judged 3" in said.out
    assert command("audit", "verify", finished.path, "--expect", f" {head.sha256.upper()}", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["intact"] and found["head"] == vars(head) and found["findings"] == []
    assert "student.gguf" in found["checked"] and "results.json" in found["checked"]
    assert command("audit", "verify", finished.path, "--expect", "0" * 64) == 2
    assert "no line of it has the hash 0000" in capsys.readouterr().err


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


ALTERED: list[tuple[str, Callable[[RunFolder], Path]]] = [
    ("student.gguf", lambda folder: folder.gguf),
    ("results.json", lambda folder: folder.results_file),
    ("config.json", lambda folder: folder.config_file),
    ("student/model.safetensors", lambda folder: folder.student / "model.safetensors"),
    ("best checkpoint", lambda folder: sorted(folder.path.glob("checkpoints/step-*/model.safetensors"))[-1]),
]


@pytest.mark.parametrize(("name", "choose"), ALTERED, ids=[name for name, _ in ALTERED])
def test_an_altered_file_is_named(
    copy: RunFolder, name: str, choose: Callable[[RunFolder], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """One bit of it, and a byte more; exit code 2, the file in one line; the log itself is sound."""
    path = choose(copy)
    within = path.relative_to(copy.path).as_posix()
    flip(path, path.stat().st_size // 2)
    assert command("audit", "verify", copy.path) == 2
    said = capsys.readouterr()
    assert f"✗ {within}: it is not the file that line" in said.out and "SHA-256" in said.out
    assert said.err.count("\n") == 1 and within in said.err and "Traceback" not in said.err
    path.write_bytes(path.read_bytes() + b" ")
    assert command("audit", "verify", copy.path, "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert not found["intact"] and found["findings"][0]["file"] == within
    assert "bytes instead of" in found["findings"][0]["problem"]


def test_deleted_files_are_no_fault_and_others_are_told(
    copy: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint and the student deleted on purpose; a GGUF file that the log does not know is said."""
    shutil.rmtree(copy.path / "checkpoints")
    shutil.copy(copy.gguf, copy.path / "other.gguf")
    copy.gguf.unlink()
    assert command("audit", "verify", copy.path) == 0
    said = capsys.readouterr().out
    assert "student.gguf: no longer there" in said and "the log does not know other.gguf" in said
    append(copy.path, [("[red]\x1b[2J", {"files": {"\x1b[2Jgone": {}}})])
    assert command("audit", "verify", copy.path) == 0
    said = capsys.readouterr().out
    assert "\x1b[2J" not in said and "[red]" in said


def test_lines_that_are_gone_are_found_also_without_the_head(copy: RunFolder) -> None:
    """The end cut off and the head made anew: results.json knows how far the log had come."""
    lines = (copy.path / LOG).read_bytes().splitlines(keepends=True)
    kept = copy.read_results()["audit"]["lines"]
    for keep in (kept - 1, 1):
        (copy.path / LOG).write_bytes(b"".join(lines[:keep]))
        sha = hashlib.sha256(lines[keep - 1][:-1]).hexdigest()
        (copy.path / HEAD).write_text(f'{{"lines":{keep},"sha256":"{sha}"}}\n')
        words = [finding.words for finding in verify(copy.path).findings]
        assert words == [
            f"line {keep + 1}: the log ends before it, results.json names {kept - keep} more: its end was cut off"
        ]
    (copy.path / LOG).unlink()
    (copy.path / HEAD).unlink()
    assert command("audit", "verify", copy.path) == 2


def test_a_run_without_a_log_says_so(copy: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """One made before there was a log, a log deleted since, and a folder that is no run: three different sentences."""
    (copy.path / LOG).unlink()
    (copy.path / HEAD).unlink()
    assert command("audit", "verify", copy.path) == 2
    assert "is gone: results.json says that there was one" in " ".join(capsys.readouterr().err.split())
    results = copy.read_results()
    del results["audit"]
    copy.results_file.write_text(json.dumps(results))
    assert command("audit", "verify", copy.path) == 2
    assert "made before there was a log" in " ".join(capsys.readouterr().err.split())
    assert not record_export(copy.path, [copy.gguf], "q8_0") and not record_finish(copy)
    assert not record_judgments(copy.gguf, [SOME]) and not (copy.path / LOG).exists()
    assert command("audit", "verify", copy.path.parent / "nothing") == 2
    said = capsys.readouterr()
    assert "is not a run's folder" in " ".join(said.err.split()) and not said.out


SOME = Judgment("x", "ALLOW", {"ALLOW": 1.0, "ESCALATE": 0.0, "REFUSE": 0.0}, 1.0, None, None)


def test_decisions_of_another_student_are_found(copy: RunFolder) -> None:
    """One that lay there for a while: the line that it decided in is named."""
    data = copy.gguf.read_bytes()
    flip(copy.gguf, 1000)
    assert record_judgments(copy.gguf, [SOME, SOME])
    copy.gguf.write_bytes(data)
    last = len(lines_in(copy.path))
    found = verify(copy.path).findings
    assert [finding.line for finding in found] == [last - 1, last]
    assert "it was given another student.gguf than line" in found[0].problem


def test_training_that_went_on_from_an_altered_checkpoint_is_found(copy: RunFolder) -> None:
    """What was read was not what had been saved."""
    resumed = events_in(copy.path, "training_resumed")[0]
    name = min(resumed["read"])
    resumed["read"][name]["sha256"] = "0" * 64
    append(copy.path, [("training_resumed", resumed)])
    assert any(f"it was given another {name}" in finding.problem for finding in verify(copy.path).findings)


def test_exports_replace_and_names_stay_within_the_run(copy: RunFolder, tmp_path: Path) -> None:
    """A file exported again is what the newest line says; one elsewhere is told by its name; a log cannot point out of
    the run's folder."""
    copy.gguf.write_bytes(b"another")
    (tmp_path / "elsewhere.gguf").write_bytes(b"1234")
    figures = {"mean_kl": float("nan"), "positions": 4, "quant": "q8_0"}
    assert record_export(copy.path, [copy.gguf, tmp_path / "elsewhere.gguf"], "q8_0", figures)
    assert verify(copy.path).intact
    told = events_in(copy.path, "exported")[-1]
    assert told["figures"] == {"mean_kl": None, "positions": 4, "quant": "q8_0"}
    assert told["files"] == {"student.gguf": {"bytes": 7, "sha256": hashlib.sha256(b"another").hexdigest()}}
    sha = hashlib.sha256(b"1234").hexdigest()
    assert told["elsewhere"] == [{"name": "elsewhere.gguf", "bytes": 4, "sha256": sha}]
    names = [
        "../elsewhere.gguf",
        str(tmp_path / "elsewhere.gguf"),
        "",
        "a\\b",
        "student/../../elsewhere.gguf",
        "a\0b",
    ]
    append(copy.path, [("exported", {"files": {name: {"bytes": 4, "sha256": sha}}}) for name in names])
    append(copy.path, [("exported", {"files": {"held_out.json": None}}), ("exported", {"files": 3})])
    problems = [finding.problem for finding in verify(copy.path).findings]
    assert len(problems) == len(names) + 1 and all(
        "which is no file within the run" in words for words in problems
    )


def move_and_link(path: Path, disk: Path) -> Path:
    """Move a file or folder to another place, and link to it from where it was; returns where it is."""
    disk.mkdir(exist_ok=True)
    moved = Path(shutil.move(path, disk / path.name))
    path.symlink_to(moved, target_is_directory=moved.is_dir())
    return moved


def test_what_was_moved_to_another_disk_keeps_its_name(copy: RunFolder, tmp_path: Path) -> None:
    """Checkpoints, weights and the student linked back: everything goes on being written down by its own name, and is
    checked where the links lead."""
    step = max((copy.path / "checkpoints").iterdir()).name
    moved = [move_and_link(path, tmp_path / "disk") for path in (copy.path / "checkpoints", copy.gguf)]
    move_and_link(copy.student / "model.safetensors", tmp_path / "disk")
    record_checkpoint(copy.path, copy.path / "checkpoints" / step, 99)
    record_resumed(copy.path, copy.path / "checkpoints" / step, 99)
    assert {name.rpartition("/")[0] for name in events_in(copy.path, "checkpoint")[-1]["files"]} == {
        f"checkpoints/{step}"
    }
    assert record_judgments(copy.gguf, [SOME]) and record_finish_again(copy)
    ended = events_in(copy.path, "run_finished")[-1]["files"]
    assert {"student.gguf", "student/model.safetensors"} <= ended.keys()
    found = verify(copy.path)
    assert found.intact and {"student.gguf", f"checkpoints/{step}/state.json"} <= {*found.checked}
    assert [note for note in found.notes if "lead out of it" in note and "student.gguf" in note]
    flip(moved[1], 1000)
    flip(moved[0] / step / "state.json", 3)
    assert [finding.file for finding in verify(copy.path).findings] == [
        f"checkpoints/{step}/state.json",
        "student.gguf",
    ]


def record_finish_again(folder: RunFolder) -> bool:
    append(folder.path, [("run_continued", {})])
    return record_finish(folder)


def test_a_run_by_another_name(copy: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to the folder, one to the student, a relative path, dots in it: the same file; what lies beside the
    folder is none of it."""
    latest, shortcut = tmp_path / "latest", tmp_path / "shortcut.gguf"
    latest.symlink_to(copy.path, target_is_directory=True)
    shortcut.symlink_to(copy.gguf)
    monkeypatch.chdir(copy.student)
    ways = [latest / "student.gguf", shortcut, Path("../student.gguf"), copy.student / ".." / "student.gguf"]
    for way in ways:
        assert record_judgments(way, [SOME])
        assert events_in(copy.path, "judged")[-1]["read"].keys() == {"student.gguf"}
        for folder in (copy.path, latest, Path("..")):
            assert record_export(folder, [way], "q8_0")
            assert events_in(copy.path, "exported")[-1]["files"].keys() == {"student.gguf"}
    beside = tmp_path / "beside.gguf"
    beside.write_bytes(b"1")
    for way in (beside, copy.path / ".." / "beside.gguf", latest / ".." / "beside.gguf"):
        assert not record_judgments(way, [SOME])
        assert record_export(latest, [way], "q8_0") and not events_in(copy.path, "exported")[-1]["files"]
    found = verify(Path(".."))
    assert found.intact and not found.notes


def test_files_that_are_being_written_are_not_told_of(copy: RunFolder) -> None:
    """An export that is at work has a file whose name begins with a dot."""
    (copy.path / ".student-q4_0.gguf").write_bytes(b"half")
    assert not verify(copy.path).notes


def test_a_place_that_cannot_be_written_to_does_not_stop_a_decision(
    copy: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said on standard error; a full disk stops it."""
    refused: list[OSError] = [
        PermissionError(13, "Permission denied"),
        OSError(28, "No space left on device"),
    ]

    def refuse(folder: Path, entries: object) -> None:
        raise refused.pop(0)

    monkeypatch.setattr("distill.audit.append", refuse)
    with loaded_once(copy.gguf):
        assert command("judge", copy.gguf, "Hello", "--json") == 0
        said = capsys.readouterr()
        assert json.loads(said.out)["decision"] and "the decision is not in the run's log" in " ".join(
            said.err.split()
        )
        assert command("judge", copy.gguf, "Hello", "--json") == 2
    assert "No space left" in capsys.readouterr().err


def test_a_run_made_again_is_finished_again(copy: RunFolder) -> None:
    """Killed between the results and the log's last line, the next start writes it; once."""
    lines = lines_in(copy.path)
    assert not record_finish(copy) and lines_in(copy.path) == lines
    append(copy.path, [("run_continued", {})])
    assert record_finish(copy) and not record_finish(copy)
    assert [line["event"] for line in lines_in(copy.path)[-2:]] == ["run_continued", "run_finished"]
    assert verify(copy.path).intact
