"""The whole path on a tiny teacher: run, reuse, refuse, export again, chat; and what errors look like."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import distill.pipeline
import distill.publishing
from distill.cli import main
from distill.config import RunConfig, load_config
from distill.console import Console
from distill.engine import train
from distill.errors import UserError
from distill.export_run import export_run
from distill.pipeline import run
from distill.run_folder import Places, RunFolder
from students.fold import to_llama
from students.model import SO8TForCausalLM
from teachers.files import StoreError, exclusive
from teachers.gguf_file import read_gguf
from teachers.gguf_teacher import GGUFTeacher
from teachers.manifest import read_manifest
from teachers.store import SoftTargetStore

FEW_PROMPTS = Path(__file__).parent / "few_prompts.jsonl"  # of the built-in ones, so that runs are short
SMALL = [
    f"safety.labels={FEW_PROMPTS}",
    "data.max_length=24",
    "data.held_out=0.2",
    "train.epochs=2",
    "train.learning_rate=0.003",
    "train.batch_size=8",
    "train.evaluations=3",
    "student.init=embeddings",  # a random teacher's own weights could hardly be improved (test_beginning.py)
]


def small_config(teacher: Path, *settings: str, samples: int = 40) -> RunConfig:
    overrides = {"teacher.path": str(teacher), "student.size": "32x1", "data.samples": samples}
    return load_config(None, overrides, [*SMALL, *settings])


@pytest.fixture(scope="module")
def finished(tiny_teacher_path: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """One finished run that the tests look at."""
    out = tmp_path_factory.mktemp("runs") / "first"
    return run(small_config(tiny_teacher_path), Places(out=out), Console())


def test_the_folder_holds_what_is_promised(finished: RunFolder) -> None:
    """Configuration, metrics, checkpoints, student, GGUF, results; no temporary files."""
    names = {path.name for path in finished.path.iterdir()} - {".lock", ".lock.audit"}
    written = "config.json identity.json metrics.jsonl checkpoints student"
    kept = "audit.jsonl audit.head held_out.json student.gguf results.json report.html README.md"
    more = "imatrix.gguf exports.json Modelfile transformers"
    assert names == {*written.split(), *kept.split(), *more.split()}
    assert load_config(finished.config_file, {}, []) == finished.read_config()


def test_results_say_everything(finished: RunFolder) -> None:
    """Rotations, proof, scores before and after, sizes and speeds are in results.json, and in bounds."""
    results = finished.read_results()
    rotations = results["rotations"]
    assert rotations["max_orthogonality_error"] <= 1e-5 and rotations["max_determinant_error"] <= 1e-5
    assert rotations["min_commutator_norm"] > 0
    assert results["proof"]["quant"] == "q8_0" and results["proof"]["mean_kl"] <= 5e-3
    assert results["proof"]["token_lines"] > 0
    scores = results["evaluation"]
    assert scores["after"]["kl"] < scores["before"]["kl"]
    assert scores["against"] == "teacher" and scores["kl_over"] == "whole vocabulary"
    assert scores["teacher"].keys() == {"cross_entropy", "perplexity", "approximate"}
    assert results["student"]["file_bytes"] == finished.gguf.stat().st_size
    assert all(speed > 0 for pair in results["tokens_per_second"].values() for speed in pair.values())
    held_out = results["training"]["held_out"]
    assert held_out[0]["step"] == 0 and held_out[-1]["step"] == results["training"]["steps"]


def test_the_shipped_files_are_the_trained_student(finished: RunFolder) -> None:
    """student/ loads through AutoModelForCausalLM and is what the GGUF holds, up to Q8_0."""
    student = AutoModelForCausalLM.from_pretrained(finished.student)
    assert isinstance(student, SO8TForCausalLM)
    [file] = export_run(finished, ["f32"], None, Console())
    path = finished.path / file.file
    assert path.name == "student-f32.gguf" and file.max_logit_difference <= 1e-3
    llama = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokens = torch.tensor([finished.read_held_out(student.config.vocab_size).sequences[0].tolist()])
    with torch.no_grad():
        assert (llama(tokens).logits - student(tokens).logits).abs().max() <= 1e-3
        assert (to_llama(student)(tokens).logits - student(tokens).logits).abs().max() <= 1e-4
    path.unlink()


def test_same_seed_same_bytes_and_the_store_is_reused(
    finished: RunFolder, tiny_teacher_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second run elsewhere skips the capture, says so, and ends at byte-identical weights."""
    second = run(small_config(tiny_teacher_path), Places(out=finished.path.parent / "second"), Console())
    said = capsys.readouterr().out
    assert "skipped" in said and "reused" in said
    weights = "student/model.safetensors"
    assert (second.path / weights).read_bytes() == (finished.path / weights).read_bytes()
    assert second.read_results()["soft_targets"]["reused"] is True


def test_a_store_of_this_working_directory_is_found(
    tiny_teacher_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First without --out, then with one somewhere else: the soft targets are not captured twice."""
    monkeypatch.chdir(tmp_path)
    config = small_config(tiny_teacher_path, samples=12)
    first = run(config, Places(), Console())
    assert first.path == Path("runs/tiny-32x1")
    second = run(config, Places(out=tmp_path / "elsewhere" / "run"), Console())
    third = run(config, Places(), Console())
    assert third.path == Path("runs/tiny-32x1-2")
    assert second.read_results()["soft_targets"]["reused"] and third.read_results()["soft_targets"]["reused"]


def test_capture_itself_is_reproducible(finished: RunFolder, tiny_teacher_path: Path, tmp_path: Path) -> None:
    """With nothing to reuse, the same seed still gives the same bytes."""
    again = run(small_config(tiny_teacher_path), Places(out=tmp_path / "run"), Console())
    assert again.read_results()["soft_targets"]["reused"] is False
    weights = "student/model.safetensors"
    assert (again.path / weights).read_bytes() == (finished.path / weights).read_bytes()


@pytest.mark.parametrize(
    "change",
    ["seed=1", "data.top_p=0.9", "targets.num_topk=8", "targets.layers=[1]"],
)
def test_nothing_is_reused_when_something_changed(
    finished: RunFolder, tiny_teacher_path: Path, tmp_path: Path, change: str
) -> None:
    """Another seed, sampling, k or layer means another store."""
    stores = finished.path.parent / "stores"
    before = set(stores.iterdir())
    out = finished.path.parent / f"changed-{change}"
    results = run(small_config(tiny_teacher_path, change), Places(out=out), Console()).read_results()
    assert results["soft_targets"]["reused"] is False
    assert Path(results["soft_targets"]["folder"]) not in before


def test_any_temperature_uses_the_same_soft_targets(finished: RunFolder, tiny_teacher_path: Path) -> None:
    """A store answers at every temperature from 1 on: nothing is captured for another one."""
    config = small_config(tiny_teacher_path, "loss.temperature=1.3", "loss.final_temperature=4.0")
    results = run(config, Places(out=finished.path.parent / "tempered"), Console()).read_results()
    assert results["soft_targets"]["reused"] is True
    assert results["soft_targets"]["folder"] == finished.read_results()["soft_targets"]["folder"]
    assert results["evaluation"]["after"]["kl"] < results["evaluation"]["before"]["kl"]


@pytest.mark.parametrize(
    "settings",
    [
        ("targets.kind=dense",),
        ("targets.sketch_bytes=0",),
        ("targets.kind=hidden", "targets.layers=[1,0,1]", "targets.layer_bytes=8"),
    ],
    ids=" ".join,
)
def test_every_kind_of_targets_is_learnt_from(
    finished: RunFolder, tiny_teacher_path: Path, settings: tuple[str, ...]
) -> None:
    """A whole run on each: it learns, and its student is proved like any other."""
    out = finished.path.parent / "-".join(settings)
    folder = run(small_config(tiny_teacher_path, *settings, samples=16), Places(out=out), Console())
    results = folder.read_results()
    scores = results["evaluation"]
    assert scores["after"]["kl"] < scores["before"]["kl"] and results["proof"]["mean_kl"] <= 5e-3
    store = SoftTargetStore(
        Path(results["soft_targets"]["folder"]), read_manifest(Path(results["soft_targets"]["folder"]))
    )
    assert store.manifest.recipe.kind == (
        "compact" if settings[0].endswith("=0") else settings[0].split("=")[1]
    )
    layers = (0, 1) if len(settings) > 1 else ()
    assert store.manifest.recipe.layers == layers
    assert all(state == "complete" for state in map(store.state, range(store.manifest.shards)))
    companion = store.companion()
    assert (companion is not None) == ("targets.kind=hidden" in settings)
    if layers:
        assert companion is not None and set(companion.bases) == {"layer0", "layer1"}
        for layer, states in store.layer_states(0).items():
            basis = companion.bases[f"layer{layer}"]
            assert states.shape == (len(store.tokens(0)) - 1, len(basis.ranges))
            assert basis.bytes_per_position <= 8


def test_the_default_is_topk_and_a_sketch_in_200_bytes(finished: RunFolder) -> None:
    """What a store keeps of a position when nothing is said about it."""
    folder = Path(finished.read_results()["soft_targets"]["folder"])
    recipe = read_manifest(folder).recipe
    assert (recipe.kind, recipe.num_topk, recipe.layers) == ("compact", 16, ())
    assert recipe.sketch_bytes == 64  # one byte for each of the teacher's 64 directions
    assert recipe.bytes_per_position(1024, 64) == 16 * 4 + 6 * 4 + 64 + 2 <= 200


def test_the_same_command_again_is_finished_already(
    finished: RunFolder, tiny_teacher_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is done twice in the same folder; the table is shown."""
    before = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*")}
    run(small_config(tiny_teacher_path), Places(out=finished.path), Console())
    assert "already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.path.rglob("*")} == before


def test_another_runs_folder_is_left_alone(
    finished: RunFolder, tiny_teacher_path: Path, tmp_path: Path
) -> None:
    """Other settings, a changed teacher file, other files, a plain file: refused with the difference."""
    before = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*")}
    with pytest.raises(UserError, match=r"another run \(train.epochs is 2 there, 3 here\)"):
        run(small_config(tiny_teacher_path, "train.epochs=3"), Places(out=finished.path), Console())
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        run(small_config(tiny_teacher_path), Places(out=tmp_path), Console())
    with pytest.raises(UserError, match="is a file"):
        run(small_config(tiny_teacher_path), Places(out=tmp_path / "mine.txt"), Console())
    assert {path: path.stat().st_mtime_ns for path in finished.path.rglob("*")} == before


def test_a_changed_teacher_is_noticed(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """The same path with other bytes is another teacher."""
    teacher = tmp_path / "teacher.gguf"
    data = bytearray(tiny_teacher_path.read_bytes())
    teacher.write_bytes(data)
    config = small_config(teacher, samples=12)
    run(config, Places(out=tmp_path / "run"), Console())
    data[-8:-4] = b"\x00\x00\x00\x3f"
    teacher.write_bytes(data)
    with pytest.raises(UserError, match="another teacher sha256"):
        run(config, Places(out=tmp_path / "run"), Console())


def test_a_mistake_does_not_claim_the_folder(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """A command that was refused for its data leaves the folder free for the corrected one."""
    (tmp_path / "bad.jsonl").write_text("{oops")
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"bad\.jsonl"):
        run(
            small_config(tiny_teacher_path, f"data.path={tmp_path / 'bad.jsonl'}"), Places(out=out), Console()
        )
    assert run(small_config(tiny_teacher_path, samples=12), Places(out=out), Console()).finished


def test_a_folder_in_use_is_refused(finished: RunFolder, tiny_teacher_path: Path) -> None:
    """Two processes cannot work in one run's folder, nor fill one store."""
    out = finished.path.parent / "busy"
    with exclusive(out), pytest.raises(StoreError, match=r"busy is in use"):
        run(small_config(tiny_teacher_path), Places(out=out), Console())
    assert not (out / "config.json").exists()


def test_a_run_stopped_after_training_is_finished_by_the_same_command(
    finished: RunFolder, tiny_teacher_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed proof, a full disk or Ctrl-C after the last step: the history and the bytes are whole."""
    out = finished.path.parent / "stopped"

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distill.publishing, "export_proved", fail)
        with pytest.raises(KeyboardInterrupt):
            run(small_config(tiny_teacher_path), Places(out=out), Console())
    run(small_config(tiny_teacher_path), Places(out=out), Console())
    weights, mine = "student/model.safetensors", RunFolder(out).read_results()
    assert (out / weights).read_bytes() == (finished.path / weights).read_bytes()
    assert mine["training"]["held_out"] == finished.read_results()["training"]["held_out"]


def test_a_damaged_student_is_not_exported(finished: RunFolder, tmp_path: Path) -> None:
    """A missing tensor would be filled with random numbers, and proved to be random: refused instead."""
    copy = tmp_path / "run"
    shutil.copytree(finished.path, copy)
    file = copy / "student" / "model.safetensors"
    tensors = load_file(file)
    save_file(
        {name: t for name, t in tensors.items() if "down_proj" not in name}, file, metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match=r"damaged.*down_proj"):
        export_run(RunFolder(copy), ["f16"], None, Console())
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be loaded"):
        export_run(RunFolder(copy), ["f16"], None, Console())


def test_an_interrupted_run_continues(
    finished: RunFolder,
    tiny_teacher_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C in training loses nothing: the same command continues and ends at the same bytes."""
    out = finished.path.parent / "interrupted"

    def interrupted(student, data, objective, config, folder, report, *rest):  # type: ignore[no-untyped-def]
        def stop(step: int, text: str) -> None:
            if step == 6:
                raise KeyboardInterrupt

        return train(student, data, objective, config, folder, stop, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(distill.pipeline, "train", interrupted)
        patch.setattr("distill.clock.CHECKPOINT_SECONDS", 0.0)
        patch.setattr("distill.clock.SAVING_SHARE", float("inf"))
        with pytest.raises(KeyboardInterrupt):
            run(small_config(tiny_teacher_path), Places(out=out), Console())
    assert not (out / "results.json").exists()
    run(small_config(tiny_teacher_path), Places(out=out), Console())
    assert "continued from step" in capsys.readouterr().out
    weights = "student/model.safetensors"
    assert (out / weights).read_bytes() == (finished.path / weights).read_bytes()


def test_data_from_files(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """Prompts, conversations and text in one folder go through; the exported file keeps the tokenizer."""
    data = tmp_path / "data"
    data.mkdir()
    lines = [{"prompt": f"Order {n} boxes."} for n in range(6)] + [{"text": "The desk opens at 8."}]
    (data / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (data / "b.txt").write_text("Room 3 is free. " * 40)
    config = small_config(tiny_teacher_path, f"data.path={data}")
    folder = run(config, Places(out=tmp_path / "run"), Console())
    with GGUFTeacher(folder.gguf, threads=1) as student, GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
        assert student.info.tokenizer_sha256 == teacher.info.tokenizer_sha256
    assert read_gguf(folder.gguf).value("so8t.teacher_name") == "tiny"


def cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would, in a folder of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "distill", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )


def test_user_errors_are_one_line_and_exit_2(
    tiny_teacher_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every kind of bad input: exit code 2, one line that names the value, no traceback, nothing written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.gguf").write_text("not a model at all, just words")
    (tmp_path / "cut.gguf").write_bytes(tiny_teacher_path.read_bytes()[:-1000])
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{oops}\n')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "odd.json").write_text("{}")
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    (tmp_path / "bad.yaml").write_text("train: {epoch: 3}")
    teacher = ["run", "--teacher", str(tiny_teacher_path)]
    cases = [
        (["run", "--teacher", "none.gguf"], ["none.gguf", "does not exist"]),
        (["run", "--teacher", "."], ["teacher . is a folder", "not a GGUF file", "distill capture"]),
        (["run", "--teacher", "text.gguf"], ["text.gguf", "not a GGUF file"]),
        (["run", "--teacher", "cut.gguf"], ["cut.gguf", "truncated"]),
        ([*teacher, "--student-size", "60x2"], ["60", "divisible by 8"]),
        ([*teacher, "--data", "bad.jsonl"], ["bad.jsonl, line 2"]),
        ([*teacher, "--data", "empty.txt"], ["empty.txt", "empty"]),
        ([*teacher, "--data", "nowhere"], ["nowhere", "does not exist"]),
        ([*teacher, "--data", "odd.json"], ["odd.json", ".jsonl"]),
        ([*teacher, "--data", "half.jsonl"], ["half.jsonl, line 1", "surrogate"]),
        ([*teacher, "--data", "x" * 300], ["too long"]),
        ([*teacher, "--student-size", "60000x900"], ["60000x900", "memory"]),
        ([*teacher, "--set", "data.sampling_temperature=0"], ["sampling_temperature"]),
        ([*teacher, "--config", "bad.yaml"], ["train.epoch", "bad.yaml"]),
        ([*teacher, "--set", "loss.tau=2"], ["loss.tau"]),
        ([*teacher, "--set", "loss.temperature=0.5"], ["loss.temperature"]),
        ([*teacher, "--targets", "sparse"], ["targets.kind", "sparse"]),
        ([*teacher, "--set", "targets.layers=[0,2]"], ["targets.layers = 2", "tiny has layers 0 to 1"]),
        ([*teacher, "--set", "targets.layers=[-1]"], ["targets.layers"]),
        ([*teacher, "--set", "targets.sketch_bytes=-1"], ["targets.sketch_bytes"]),
        ([*teacher, "--out", "text.gguf"], ["text.gguf"]),
        (["export-gguf", "."], ["not a run's folder"]),
        (["export-gguf", "nowhere", "--quant", "q1"], ["q1"]),
        (["chat", "none.gguf", "hi"], ["none.gguf"]),
        (["run", "--epochs", "many"], ["--epochs"]),
        (["fly"], ["fly"]),
    ]
    for arguments, words in cases:
        monkeypatch.setattr(sys, "argv", ["distill", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr().err
        assert stopped.value.code == 2, (arguments, said)
        assert "Traceback" not in said
        for word in words:
            assert word in said, (arguments, said)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"text.gguf", "cut.gguf", "bad.jsonl", "empty.txt", "bad.yaml", "odd.json", "half.jsonl"}


def test_the_command_itself(finished: RunFolder, tmp_path: Path) -> None:
    """As a process: version, an error with exit code 2 on stderr, and an answer from the student."""
    assert cli("--version", cwd=tmp_path).stdout.startswith("distill ")
    wrong = cli("run", "--teacher", "none.gguf", cwd=tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "none.gguf" in wrong.stderr
    answer = cli("chat", str(finished.gguf), "Hello", "--max-tokens", "8", "--temperature", "0", cwd=tmp_path)
    assert answer.returncode == 0 and answer.stdout.endswith("\n") and "expected agreement" in answer.stderr


def test_ctrl_c_of_the_command_itself(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """SIGINT while it works: exit code 130, one line on stderr, and the same command then finishes."""
    settings = [word for setting in SMALL for word in ("--set", setting)]
    command = [
        "run",
        "--teacher",
        str(tiny_teacher_path),
        "--student-size",
        "32x1",
        "--samples",
        "40",
        "--out",
        "r",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "distill", *command, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "Capture" in line:
            process.send_signal(signal.SIGINT)
            break
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said, said
    assert cli(*command, *settings, cwd=tmp_path).returncode == 0
    assert (tmp_path / "r" / "results.json").exists()


def test_a_full_disk_is_one_line_and_loses_nothing(
    finished: RunFolder,
    tiny_teacher_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The disk fills up while training: exit code 2, the reason, and the earlier files are still there."""
    out = finished.path.parent / "full"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(out / "checkpoints"))

    arguments = ["run", "--teacher", str(tiny_teacher_path), "--student-size", "32x1", "--samples", "40"]
    settings = [word for setting in SMALL for word in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", ["distill", *arguments, "--out", str(out), *settings])
    with monkeypatch.context() as patch:
        patch.setattr("distill.engine.save_checkpoint", full)
        with pytest.raises(SystemExit) as stopped:
            main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "No space left" in said and "free some space" in said
    assert (out / "config.json").exists() and (finished.path / "results.json").exists()
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0 and (out / "results.json").exists()


def test_too_little_space_is_refused_before_capture(
    finished: RunFolder, tiny_teacher_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of the soft targets is known beforehand."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"need up to .* free"):
        run(
            small_config(tiny_teacher_path, samples=41), Places(out=finished.path.parent / "tight"), Console()
        )


def test_a_student_larger_than_its_teacher_is_warned_about(
    finished: RunFolder, tiny_teacher_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It works, but says that nothing is compressed."""
    config = small_config(tiny_teacher_path, "student.size=96x3", samples=12)
    run(config, Places(out=finished.path.parent / "large"), Console())
    assert "not fewer than the teacher's" in " ".join(capsys.readouterr().out.split())
