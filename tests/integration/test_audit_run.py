"""A run's log: what is in it and what is not, over interruptions too; `distill audit verify`.

Over 400 lines because one run, interrupted and finished, serves all of the tests.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from distill.inference.judge import Judgment
from distill.pipeline.run import run
from distill.runs.audit_events import (
    record_checkpoint,
    record_export,
    record_finish,
    record_judgments,
    record_resumed,
)
from distill.runs.audit_log import HEAD, LOG, append, read_head
from distill.runs.audit_verify import verify
from distill.runs.folder import RunFolder, RunPaths
from distill.runs.metrics_log import MetricsFile
from distill.runtime.progress import Console
from distill.training.engine import Loop
from distill.training.guard_hooks import write_events
from stability import Event
from tests.conftest import Ended, command
from tests.support.runs import PLAIN_PROMPTS, interrupted, small_config

pytestmark = pytest.mark.usefixtures("llama_here")

SECRET = "the quince marmalade"
HIDDEN = "a heron at dusk"
PLACE = "somebodys-own-folder"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lines_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text("utf-8").splitlines()]


def events_in(folder: Path, name: str) -> list[dict[str, Any]]:
    return [line["content"] for line in lines_in(folder) if line["event"] == name]


def audit(folder: Path, *words: object) -> Ended:
    return command("audit", "verify", folder, *words)


@pytest.fixture(scope="module")
def finished(tiny_teacher_path: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run on secret prompts and texts, in somebody's own folder.

    It was interrupted once and finished, and then asked to decide on prompts.
    """
    home = tmp_path_factory.mktemp("home") / PLACE
    data, out = home / "data" / "mine.jsonl", home / "runs" / "one"
    data.parent.mkdir(parents=True)
    rows = [{"prompt": f"Order {n} jars of {SECRET}."} for n in range(4)]
    rows += [{"text": f"{SECRET} <think>{HIDDEN}, {n}</think> {n}"} for n in range(30)]
    data.write_text("\n".join(map(json.dumps, rows)))
    labels = f"safety.labels={PLAIN_PROMPTS}"
    config = small_config(tiny_teacher_path, labels, f"data.path={data}")
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("HOME", str(home))
        with interrupted(at=4):
            run(config, RunPaths(out=out), Console())
        run(config, RunPaths(out=out), Console())
        run(config, RunPaths(out=out), Console())  # finished: nothing is done or written down
        asked = data.with_name("asked.jsonl")
        asked.write_text("\n".join([json.dumps({"prompt": f"{SECRET}? <think>{HIDDEN}"})] * 2))
        for words in ([f"May I have {SECRET}?"], ["--prompts", asked, "--json"]):
            assert command("judge", out / "student.gguf", *words).code == 0
    return RunFolder(out)


@pytest.fixture
def copy(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """The run in a folder that a test may change."""
    return RunFolder(shutil.copytree(finished.path, tmp_path / "copy"))


def test_a_run_with_an_interruption_is_one_chain(finished: RunFolder) -> None:
    """Intact, in the order in which things happened, each with what belongs to it."""
    found = verify(finished.path)
    assert found.intact and not found.notes
    names = [line["event"] for line in lines_in(finished.path)]
    identity, config = finished.read_identity(), finished.read_config()
    results = finished.read_results()
    assert names[:2] == ["run_started", "captured"] and names[-3:] == ["judged"] * 3
    middle = [name for name in names[2:] if name not in ("checkpoint", "guard")]
    assert middle[:4] == ["run_continued", "captured", "training_resumed", "training_finished"]
    assert middle[4:] == ["exported"] * (len(middle) - 8) + ["run_finished"] + ["judged"] * 3
    started, captured = (
        events_in(finished.path, "run_started")[0],
        events_in(finished.path, "captured"),
    )
    assert started["identity"] == identity and started["seed"] == config.seed
    assert started["files"]["config.json"]["sha256"] == digest(finished.config_file)
    assert started["settings"]["train"]["batch_size"] == 8
    assert started["settings"]["data"]["path"] == "mine.jsonl"
    assert started["environment"] == results["environment"]
    assert [entry["reused"] for entry in captured] == [False, True]
    store = Path(results["soft_targets"]["folder"])
    assert captured[0]["store_key"] == identity["soft_targets"]
    assert captured[0]["sequences"] == results["soft_targets"]["sequences"]
    assert captured[0]["manifest_sha256"] == digest(store / "manifest.json")
    over = events_in(finished.path, "training_finished")[0]
    training = results["training"]
    for name in ("steps", "best_step", "tokens_seen", "precision"):
        assert over[name] == training[name], name
    assert over["held_out_kl"] == [[score["step"], score["kl"]] for score in training["held_out"]]


def test_checkpoints_and_files_are_named_by_their_hashes(finished: RunFolder) -> None:
    """Those still there are as named; training went on from a saved one; so are results."""
    saved = events_in(finished.path, "checkpoint")
    steps = [entry["step"] for entry in saved]
    assert len(steps) > 3 and steps == sorted(steps)
    for entry in saved[-2:]:
        assert {name.rpartition("/")[2] for name in entry["files"]} >= {
            "model.safetensors",
            "state.json",
        }
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
    """Neither prompts, data, thoughts nor folders, though the run has them elsewhere."""
    log = (finished.path / LOG).read_text("utf-8")
    words = [SECRET, HIDDEN, *["quince", "heron", "think", "jars", "pytest", "/home", "/tmp"]]
    for word in [*words, PLACE, str(Path.home())]:
        assert word not in log, word
    assert SECRET in finished.held_out_file.read_text("utf-8")
    assert PLACE in finished.config_file.read_text()
    assert all(ord(sign) < 128 for sign in log)


@pytest.mark.parametrize("first", [True, False])
def test_what_the_guard_does_is_there_by_its_figures(tmp_path: Path, first: bool) -> None:
    """Of the first process alone, without the sentence, which may name a folder.

    So is a refused checkpoint.
    """
    guard, told = SimpleNamespace(on_event=None), []
    folder = tmp_path if first else None
    with MetricsFile(tmp_path / "metrics.jsonl" if first else None, None) as metrics:
        write_events(guard, [[4, 2], [7]], metrics, folder, told.append)  # type: ignore[arg-type]
        clipped = ("clip", "gradient norm", f"in {PLACE}", "layers.0.weight", float("inf"), 0.25)
        guard.on_event(Event(3, *clipped))
        guard.on_event(Event(5, "set_aside", "batch", "a batch", value=1.0, batch=[7]))
        process: Any = SimpleNamespace(is_main_process=first)
        job: Any = SimpleNamespace(folder=tmp_path)
        nothing: Any = None
        loop = Loop(job, process, nothing, [], None, metrics, told.append)
        loop.refuse(Path("checkpoints/step-000004"), f"cannot open /x/{PLACE}/state.json", 9)
    assert len(told) == 3 and (tmp_path / LOG).exists() == first
    if first:
        found = [
            {name: value for name, value in event.items() if value is not None}
            for event in events_in(tmp_path, "guard")
        ]
        about = {"step": 3, "action": "clip", "signal": "gradient norm"}
        assert found == [
            about | {"tensor": "layers.0.weight", "limit": 0.25},
            {"step": 5, "action": "set_aside", "signal": "batch", "value": 1.0, "batch": [7]},
            {
                "step": 9,
                "action": "checkpoint_refused",
                "signal": "checkpoint",
                "checkpoint": "step-000004",
            },
        ]
        assert PLACE not in (tmp_path / LOG).read_text()


# -- distill audit verify


def test_an_intact_run_on_the_command_line(finished: RunFolder) -> None:
    """Exit code 0; the head is printed and is taken by --expect; as JSON on one line."""
    head, ended = read_head(finished.path), audit(finished.path)
    assert head is not None and ended.code == 0 and not ended.complaint
    assert head.sha256 in ended.said and "intact" in ended.said and "judged 3" in ended.said
    assert "of older checkpoints are gone, as they should be" in ended.said
    ended = audit(finished.path, "--expect", f" {head.sha256.upper()}", "--json")
    found = json.loads(ended.said)
    assert ended.code == 0 and found["intact"] and found["findings"] == []
    assert found["head"] == vars(head)
    assert "student.gguf" in found["checked"] and "results.json" in found["checked"]
    ended = audit(finished.path, "--expect", "0" * 64)
    assert ended.code == 2 and "no line of it has the hash 0000" in ended.complaint


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_an_altered_file_is_named(copy: RunFolder) -> None:
    """One bit of it, and a byte more; exit code 2, one line with the file; the log is sound."""
    best = max(copy.path.glob("checkpoints/step-*/model.safetensors"))
    weights = copy.student / "model.safetensors"
    for path in (copy.gguf, copy.results_file, copy.config_file, weights, best):
        name, whole = path.relative_to(copy.path).as_posix(), path.read_bytes()
        flip(path, len(whole) // 2)
        ended = audit(copy.path)
        assert ended.code == 2 and "SHA-256" in ended.said, name
        assert f"✗ {name}: it is not the file that line" in ended.said
        assert ended.complaint.count("\n") == 1 and name in ended.complaint
        assert "Traceback" not in ended.complaint, name
        path.write_bytes(path.read_bytes() + b" ")
        ended = audit(copy.path, "--json")
        found = json.loads(ended.said)
        assert ended.code == 2 and not found["intact"], name
        assert found["findings"][0]["file"] == name
        assert "bytes instead of" in found["findings"][0]["problem"], name
        path.write_bytes(whole)


def test_deleted_files_are_no_fault_and_others_are_told(copy: RunFolder) -> None:
    """Checkpoints and the student may go; a GGUF file that the log does not know is named, but
    for one that an export at work is writing, whose name starts with a dot."""
    (copy.path / ".student-q4_0.gguf").write_bytes(b"half")
    assert not verify(copy.path).notes
    shutil.rmtree(copy.path / "checkpoints")
    shutil.copy(copy.gguf, copy.path / "other.gguf")
    copy.gguf.unlink()
    ended = audit(copy.path)
    assert ended.code == 0 and "student.gguf: no longer there" in ended.said
    assert "the log does not know other.gguf" in ended.said
    append(copy.path, [("[red]\x1b[2J", {"files": {"\x1b[2Jgone": {}}})])
    ended = audit(copy.path)
    assert ended.code == 0 and "\x1b[2J" not in ended.said and "[red]" in ended.said


def test_lines_that_are_gone_are_found_also_without_the_head(copy: RunFolder) -> None:
    """The end cut off and the head made anew: results.json knows how far the log had come."""
    lines = (copy.path / LOG).read_bytes().splitlines(keepends=True)
    kept = copy.read_results()["audit"]["lines"]
    for keep in (kept - 1, 1):
        (copy.path / LOG).write_bytes(b"".join(lines[:keep]))
        sha = hashlib.sha256(lines[keep - 1][:-1]).hexdigest()
        (copy.path / HEAD).write_text(f'{{"lines":{keep},"sha256":"{sha}"}}\n')
        [finding] = verify(copy.path).findings
        assert finding.line == keep + 1
        assert f"results.json names {kept - keep} more: its end was cut off" in finding.problem
    (copy.path / LOG).unlink()
    (copy.path / HEAD).unlink()
    assert audit(copy.path).code == 2


def test_a_run_without_a_log_says_so(copy: RunFolder) -> None:
    """A log deleted since, a run made before there was one, a folder that is no run."""

    def refused(folder: Path) -> str:
        ended = audit(folder)
        assert ended.code == 2 and not ended.said
        return " ".join(ended.complaint.split())

    (copy.path / LOG).unlink()
    (copy.path / HEAD).unlink()
    assert "is gone: results.json says that there was one" in refused(copy.path)
    results = copy.read_results()
    del results["audit"]
    copy.results_file.write_text(json.dumps(results))
    assert "made before there was a log" in refused(copy.path)
    assert not record_export(copy.path, [copy.gguf], "q8_0") and not record_finish(copy)
    assert not record_judgments(copy.gguf, [SOME]) and not (copy.path / LOG).exists()
    assert "is not a run's folder" in refused(copy.path.parent / "nothing")


SOME = Judgment(
    "x", "ALLOW", {"ALLOW": 1.0, "ESCALATE": 0.0, "REFUSE": 0.0}, 1.0, None, None
).to_audit()


def test_use_of_another_file_is_found(copy: RunFolder) -> None:
    """A student that lay there for a while: the line that it decided in is named."""
    data = copy.gguf.read_bytes()
    flip(copy.gguf, 1000)
    assert record_judgments(copy.gguf, [SOME, SOME])
    copy.gguf.write_bytes(data)
    last = len(lines_in(copy.path))
    found = verify(copy.path).findings
    assert [finding.line for finding in found] == [last - 1, last]
    assert "it was given another student.gguf than line" in found[0].problem
    # Training went on from a checkpoint that was not the saved one.
    resumed = events_in(copy.path, "training_resumed")[0]
    name = min(resumed["read"])
    resumed["read"][name]["sha256"] = "0" * 64
    append(copy.path, [("training_resumed", resumed)])
    problems = [finding.problem for finding in verify(copy.path).findings]
    assert any(f"it was given another {name}" in problem for problem in problems)


def test_exports_replace_and_names_stay_within_the_run(copy: RunFolder, tmp_path: Path) -> None:
    """The newest line about a file holds; one elsewhere is told by its name.

    A log cannot point out of the run's folder.
    """
    copy.gguf.write_bytes(b"another")
    (tmp_path / "elsewhere.gguf").write_bytes(b"1234")
    figures = {"mean_kl": float("nan"), "positions": 4, "quant": "q8_0"}
    assert record_export(copy.path, [copy.gguf, tmp_path / "elsewhere.gguf"], "q8_0", figures)
    assert verify(copy.path).intact
    told = events_in(copy.path, "exported")[-1]
    assert told["figures"] == {"mean_kl": None, "positions": 4, "quant": "q8_0"}
    assert told["files"] == {"student.gguf": {"bytes": 7, "sha256": digest(copy.gguf)}}
    sha = hashlib.sha256(b"1234").hexdigest()
    assert told["elsewhere"] == [{"name": "elsewhere.gguf", "bytes": 4, "sha256": sha}]
    up = "../elsewhere.gguf"
    names = [up, str(tmp_path / "elsewhere.gguf"), "", "a\\b", f"student/../{up}", "a\0b"]
    file = {"bytes": 4, "sha256": sha}
    append(copy.path, [("exported", {"files": {name: file}}) for name in names])
    bad: list[Any] = [{"held_out.json": None}, 3]
    append(copy.path, [("exported", {"files": files}) for files in bad])
    problems = [finding.problem for finding in verify(copy.path).findings]
    assert len(problems) == len(names) + 1
    assert all("which is no file within the run" in words for words in problems)


def move_and_link(path: Path, disk: Path) -> Path:
    """Move a file or folder, and link to it from where it was; returns where it is."""
    disk.mkdir(exist_ok=True)
    moved = Path(shutil.move(path, disk / path.name))
    path.symlink_to(moved, target_is_directory=moved.is_dir())
    return moved


def test_what_was_moved_to_another_disk_keeps_its_name(copy: RunFolder, tmp_path: Path) -> None:
    """Everything linked back goes by its own name, and is checked where the links lead."""
    checkpoints, disk = copy.path / "checkpoints", tmp_path / "disk"
    step = max(checkpoints.iterdir()).name
    moved = [move_and_link(path, disk) for path in (checkpoints, copy.gguf)]
    move_and_link(copy.student / "model.safetensors", disk)
    record_checkpoint(copy.path, checkpoints / step, 99)
    record_resumed(copy.path, checkpoints / step, 99)
    saved = events_in(copy.path, "checkpoint")[-1]["files"]
    assert {name.rpartition("/")[0] for name in saved} == {f"checkpoints/{step}"}
    assert record_judgments(copy.gguf, [SOME])
    append(copy.path, [("run_continued", {})])
    assert record_finish(copy)
    ended = events_in(copy.path, "run_finished")[-1]["files"]
    assert {"student.gguf", "student/model.safetensors"} <= ended.keys()
    found = verify(copy.path)
    assert found.intact and {"student.gguf", f"checkpoints/{step}/state.json"} <= {*found.checked}
    assert [note for note in found.notes if "lead out of it" in note and "student.gguf" in note]
    flip(moved[1], 1000)
    flip(moved[0] / step / "state.json", 3)
    named = [finding.file for finding in verify(copy.path).findings]
    assert named == [f"checkpoints/{step}/state.json", "student.gguf"]


def test_a_run_by_another_name(
    copy: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links to the folder and the student, a relative path, dots in it: the same file.

    What lies beside the folder is none of it.
    """
    latest, shortcut = tmp_path / "latest", tmp_path / "shortcut.gguf"
    latest.symlink_to(copy.path, target_is_directory=True)
    shortcut.symlink_to(copy.gguf)
    monkeypatch.chdir(copy.student)
    around = Path("..") / "student.gguf"
    for way in (latest / "student.gguf", shortcut, around, copy.student / around):
        assert record_judgments(way, [SOME])
        assert events_in(copy.path, "judged")[-1]["read"].keys() == {"student.gguf"}
        for folder in (copy.path, latest, Path("..")):
            assert record_export(folder, [way], "q8_0")
            assert events_in(copy.path, "exported")[-1]["files"].keys() == {"student.gguf"}
    beside = tmp_path / "beside.gguf"
    beside.write_bytes(b"1")
    for way in (beside, copy.path / ".." / "beside.gguf", latest / ".." / "beside.gguf"):
        assert not record_judgments(way, [SOME])
        assert record_export(latest, [way], "q8_0")
        assert not events_in(copy.path, "exported")[-1]["files"]
    found = verify(Path(".."))
    assert found.intact and not found.notes


def test_a_place_that_cannot_be_written_to_does_not_stop_a_decision(copy: RunFolder) -> None:
    """It is said on standard error; a full disk stops it."""
    denied, full = PermissionError(13, "denied"), OSError(28, "No space left on device")
    with patch("distill.runs.audit_events.append", side_effect=[denied, full]):
        ended = command("judge", copy.gguf, "Hello", "--json")
        assert ended.code == 0 and json.loads(ended.said)["decision"]
        assert "the decision is not in the run's log" in " ".join(ended.complaint.split())
        ended = command("judge", copy.gguf, "Hello", "--json")
    assert ended.code == 2 and "No space left" in ended.complaint


def test_a_run_made_again_is_finished_again(copy: RunFolder) -> None:
    """Killed between the results and the log's last line, the next start writes it; once."""
    lines = lines_in(copy.path)
    assert not record_finish(copy) and lines_in(copy.path) == lines
    append(copy.path, [("run_continued", {})])
    assert record_finish(copy) and not record_finish(copy)
    assert [line["event"] for line in lines_in(copy.path)[-2:]] == ["run_continued", "run_finished"]
    assert verify(copy.path).intact
