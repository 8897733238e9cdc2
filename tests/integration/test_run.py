"""The whole path on a tiny teacher: run, reuse, refuse, export again, chat; errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import distill.export.publish
from distill.config.loading import load_config
from distill.errors import UserError
from distill.export.export_again import export_run
from distill.pipeline.run import run
from distill.runs.folder import RunFolder, RunPaths
from distill.runtime.progress import Console
from students.model.decoder import SO8TForCausalLM
from students.model.fold import to_llama
from teachers.atomic_files import StoreError, exclusive
from teachers.gguf.file import read_gguf, tokenizer_sha256
from teachers.store.manifest import read_manifest
from teachers.store.store import SoftTargetStore
from tests.conftest import command, not_refused
from tests.support.runs import SMALL, interrupt, interrupted, small_config, times_in, until_training

pytestmark = pytest.mark.usefixtures("llama_here")


def small_command(teacher: Path, samples: int = 40) -> list[str]:
    """The same as ``small_config``, on the command line."""
    words = ["run", "--teacher", str(teacher), "--student-size", "32x1", "--samples", str(samples)]
    return words + [word for setting in SMALL for word in ("--set", setting)]


@pytest.fixture(scope="module")
def finished(tiny_teacher_path: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """One finished run that the tests look at."""
    out = tmp_path_factory.mktemp("runs") / "first"
    return run(small_config(tiny_teacher_path), RunPaths(out=out), Console())


def test_the_folder_holds_what_is_promised(finished: RunFolder) -> None:
    """Configuration, metrics, checkpoints, student, GGUF, results; no temporary files."""
    names = {path.name for path in finished.path.iterdir()} - {".lock", ".lock.audit"}
    written = "config.json identity.json metrics.jsonl checkpoints student"
    kept = "audit.jsonl audit.head held_out.json student.gguf results.json report.html README.md"
    more = "calibration.json exports.json Modelfile transformers"
    assert names == {*written.split(), *kept.split(), *more.split()}
    assert load_config(finished.config_file, {}, []) == finished.read_config()


def test_results_say_everything(finished: RunFolder) -> None:
    """Rotations, proof, scores before and after, sizes and speeds are there and in bounds."""
    results = finished.read_results()
    rotations = results["rotations"]
    assert rotations["max_orthogonality_error"] <= 1e-5
    assert rotations["max_determinant_error"] <= 1e-5 and rotations["min_commutator_norm"] > 0
    assert results["proof"]["quant"] == "q8_0" and results["proof"]["mean_kl"] <= 5e-3
    assert results["proof"]["token_lines"] > 0
    scores = results["evaluation"]
    assert scores["after"]["kl"] < scores["before"]["kl"]
    assert scores["against"] == "teacher" and scores["kl_over"] == "whole vocabulary"
    assert scores["teacher"].keys() == {"cross_entropy", "perplexity", "approximate"}
    assert results["student"]["file_bytes"] == finished.gguf.stat().st_size
    assert all(min(pair.values()) > 0 for pair in results["tokens_per_second"].values())
    held_out = results["training"]["held_out"]
    assert held_out[0]["step"] == 0 and held_out[-1]["step"] == results["training"]["steps"]


def test_the_shipped_files_are_the_trained_student(finished: RunFolder) -> None:
    """student/ loads through AutoModelForCausalLM and is what the GGUF holds, up to Q8_0."""
    student = AutoModelForCausalLM.from_pretrained(finished.student)
    assert isinstance(student, SO8TForCausalLM)
    [file] = export_run(finished, ["f32"], None, Console())
    assert file.file == "student-f32.gguf" and file.max_logit_difference <= 1e-3
    plain = {"gguf_file": file.file, "dtype": torch.float32}
    llama = AutoModelForCausalLM.from_pretrained(finished.path, **plain)
    tokens = torch.tensor([finished.read_held_out(student.config.vocab_size).sequences[0].tolist()])
    with torch.no_grad():
        assert (llama(tokens).logits - student(tokens).logits).abs().max() <= 1e-3
        assert (to_llama(student)(tokens).logits - student(tokens).logits).abs().max() <= 1e-4
    (finished.path / file.file).unlink()


def weights_of(out: Path) -> bytes:
    return (out / "student" / "model.safetensors").read_bytes()


def test_a_run_that_is_stopped_everywhere_ends_at_the_same_bytes(
    finished: RunFolder, tiny_teacher_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk, Ctrl-C in training and Ctrl-C in the export: the same command goes on each time.

    Nothing is lost, and the soft targets of the run beside it are reused.
    """
    out, config = finished.path.with_name("stopped"), small_config(tiny_teacher_path)
    same = [*small_command(tiny_teacher_path), "--out", out]
    full = OSError(28, "No space left on device", str(out / "checkpoints"))
    with patch("distill.training.engine.save_checkpoint", side_effect=full):
        ended = command(*same)
    assert ended.code == 2 and "No space left" in ended.complaint
    assert "free some space" in ended.complaint
    assert (out / "config.json").exists() and finished.results_file.exists()
    with interrupted(at=6):
        run(config, RunPaths(out=out), Console())
    with (
        patch.object(distill.export.publish, "export_proved", interrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        run(config, RunPaths(out=out), Console())
    said = capsys.readouterr().out
    assert "continued from step" in said and "skipped" in said and "reused" in said
    assert not (out / "results.json").exists()
    assert command(*same).code == 0
    results, expected = RunFolder(out).read_results(), finished.read_results()
    assert results["soft_targets"]["reused"] is True
    assert results["training"]["held_out"] == expected["training"]["held_out"]
    assert weights_of(out) == weights_of(finished.path)


def test_a_store_of_this_working_directory_is_found(
    tiny_teacher_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """First without --out, then with one elsewhere: the soft targets are not captured twice.

    The student is larger than its teacher, which works, but is said.
    """
    monkeypatch.chdir(tmp_path)
    config = small_config(tiny_teacher_path, "student.size=96x3", samples=12)
    assert run(config, RunPaths(), Console()).path == Path("runs/tiny-96x3")
    assert "not fewer than the teacher's" in " ".join(capsys.readouterr().out.split())
    assert until_training(config, tmp_path / "elsewhere" / "run")
    assert until_training(config, Path("runs/tiny-96x3-2"), given=False)


def test_only_what_is_the_same_is_reused(finished: RunFolder, tiny_teacher_path: Path) -> None:
    """Another seed, sampling, k or layer means another store; a temperature does not."""
    stores = finished.path.parent / "stores"
    warm = small_config(tiny_teacher_path, "loss.temperature=1.3", "loss.final_temperature=4.0")
    assert until_training(warm, finished.path.with_name("tempered"))
    for change in ("seed=1", "data.top_p=0.9", "targets.num_topk=8", "targets.layers=[1]"):
        before = set(stores.iterdir())
        out = finished.path.with_name(f"changed-{change}")
        assert not until_training(small_config(tiny_teacher_path, change), out), change
        assert len(set(stores.iterdir()) - before) == 1, change


HIDDEN = "targets.kind=hidden targets.layers=[1,0,1] targets.layer_bytes=8"


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("dense", "targets.kind=dense"), ("compact", "targets.sketch_bytes=0"), ("hidden", HIDDEN)],
)
def test_every_kind_of_targets_is_learnt_from(
    finished: RunFolder, tiny_teacher_path: Path, kind: str, settings: str
) -> None:
    """A whole run on each: it learns, and its student is proved like any other."""
    config = small_config(tiny_teacher_path, *settings.split(), samples=16)
    results = run(config, RunPaths(out=finished.path.with_name(kind)), Console()).read_results()
    scores, place = results["evaluation"], Path(results["soft_targets"]["folder"])
    assert scores["after"]["kl"] < scores["before"]["kl"] and results["proof"]["mean_kl"] <= 5e-3
    store = SoftTargetStore(place, read_manifest(place))
    assert store.manifest.recipe.kind == kind
    assert store.manifest.recipe.layers == ((0, 1) if kind == "hidden" else ())
    assert all(state == "complete" for state in map(store.state, range(store.manifest.shards)))
    shared_codec = store.shared_codec()
    assert (shared_codec is not None) == (kind == "hidden")
    if shared_codec is not None:
        assert set(shared_codec.bases) == {"layer0", "layer1"}
        for layer, states in store.layer_states(0).items():
            basis = shared_codec.bases[f"layer{layer}"]
            assert states.shape == (len(store.tokens(0)) - 1, len(basis.steps))
            assert basis.bytes_per_position <= 8


def test_the_default_is_topk_and_a_sketch_as_small_as_it_may_be(finished: RunFolder) -> None:
    """What a store keeps of a position when nothing is said about it."""
    results = finished.read_results()["soft_targets"]
    recipe = read_manifest(Path(results["folder"])).recipe
    assert (recipe.kind, recipe.num_topk, recipe.layers) == ("compact", 16, ())
    assert recipe.sketch_bytes == 64  # one byte for each of the teacher's 64 directions
    assert recipe.bytes_per_position(1024, 64) == 16 * 4 + 6 * 4 + 64 + 2 <= 200
    assert 0.0 <= results["sketch"]["kl"] <= recipe.sketch_kl
    assert 0 < results["sketch"]["bytes"] <= recipe.sketch_bytes


def test_a_finished_runs_folder_is_left_alone(
    finished: RunFolder, tiny_teacher_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command shows its table; other settings, other files, a plain file are refused."""
    before = times_in(finished)
    run(small_config(tiny_teacher_path), RunPaths(out=finished.path), Console())
    assert "already" in capsys.readouterr().out
    (tmp_path / "mine.txt").write_text("mine")
    for out, settings, words in (
        (finished.path, ["train.epochs=3"], r"another run \(train.epochs is 2 there, 3 here\)"),
        (tmp_path, [], "other files"),
        (tmp_path / "mine.txt", [], "is a file"),
    ):
        with pytest.raises(UserError, match=words):
            run(small_config(tiny_teacher_path, *settings), RunPaths(out=out), Console())
    assert times_in(finished) == before


def test_a_changed_teacher_is_noticed(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """The same path with other bytes is another teacher."""
    teacher, data = tmp_path / "teacher.gguf", bytearray(tiny_teacher_path.read_bytes())
    teacher.write_bytes(data)
    config = small_config(teacher, samples=12)
    until_training(config, tmp_path / "run")
    data[-8:-4] = b"\x00\x00\x00\x3f"
    teacher.write_bytes(data)
    with pytest.raises(UserError, match="another teacher sha256"):
        run(config, RunPaths(out=tmp_path / "run"), Console())


def test_data_from_files(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """A mistake in them does not claim the folder; the exported file keeps the tokenizer.

    Prompts and text in one folder go through.
    """
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    (data / "a.jsonl").write_text("{oops")
    (data / "b.txt").write_text("Room 3 is free. " * 40)
    config = small_config(tiny_teacher_path, f"data.path={data}")
    with pytest.raises(UserError, match=r"a\.jsonl"):
        run(config, RunPaths(out=out), Console())
    lines = [{"prompt": f"Order {n} boxes."} for n in range(6)] + [{"text": "The desk opens at 8."}]
    (data / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    folder = run(config, RunPaths(out=out), Console())
    assert folder.finished
    student, teacher = read_gguf(folder.gguf), read_gguf(tiny_teacher_path)
    assert tokenizer_sha256(student) == tokenizer_sha256(teacher)
    assert student.value("so8t.teacher_name") == "tiny"


def test_a_folder_in_use_is_refused(finished: RunFolder, tiny_teacher_path: Path) -> None:
    """Two processes cannot work in one run's folder, nor fill one store."""
    out = finished.path.with_name("busy")
    with exclusive(out), pytest.raises(StoreError, match=r"busy is in use"):
        run(small_config(tiny_teacher_path), RunPaths(out=out), Console())
    assert not (out / "config.json").exists()


def test_a_damaged_student_is_not_exported(finished: RunFolder, tmp_path: Path) -> None:
    """A missing tensor would be filled with random numbers, and proved to be random: refused."""
    folder = RunFolder(shutil.copytree(finished.path, tmp_path / "run"))
    file = folder.student / "model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if "down_proj" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"damaged.*down_proj"):
        export_run(folder, ["f16"], None, Console())
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be loaded"):
        export_run(folder, ["f16"], None, Console())


def test_user_errors_are_one_line_and_exit_2(
    tiny_teacher_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, the value named, nothing written; what needs no model: ``test_preflight``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    before = set(tmp_path.iterdir())
    own: list[tuple[list[str], list[str]]] = [
        (["--student-size", "60000x900"], ["60000x900", "memory"]),
        (["--data", "half.jsonl"], ["half.jsonl, line 1", "surrogate"]),
        (["--data", "x" * 300], ["too long"]),
        (["--set", "loss.temperature=0.5"], ["loss.temperature"]),
        (["--set", "targets.layers=[0,2]"], ["targets.layers = 2", "tiny has layers 0 to 1"]),
        (["--set", "targets.layers=[-1]"], ["targets.layers"]),
        (["--set", "targets.sketch_bytes=-1"], ["targets.sketch_bytes"]),
        (["--epochs", "many"], ["--epochs"]),
    ]
    assert not_refused(own, "run", "--teacher", tiny_teacher_path) == []
    assert not_refused([(["fly"], ["fly"]), (["run", "--teacher", "."], ["distill capture"])]) == []
    assert set(tmp_path.iterdir()) == before


def cli(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Start the command line as a user would, in a folder of its own."""
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "distill", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
    )


def test_the_command_itself(
    tiny_teacher_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process: Ctrl-C (exit code 130), version, error; then a whole run and an answer."""
    words = [*small_command(tiny_teacher_path, samples=12), "--out", "r"]
    process = cli(*words, cwd=tmp_path)
    assert process.stdout is not None
    next(line for line in process.stdout if "Capture" in line)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said, said
    version, wrong = (
        cli(*one, cwd=tmp_path) for one in (["--version"], ["run", "--teacher", "none.gguf"])
    )
    assert version.communicate(timeout=120)[0].startswith("distill ")
    _, said = wrong.communicate(timeout=120)
    assert wrong.returncode == 2 and said.count("\n") == 1 and "none.gguf" in said
    monkeypatch.chdir(tmp_path)
    assert command(*words).code == 0 and Path("r/results.json").exists()
    settings = ("--max-tokens", 8, "--temperature", 0)
    answer = command("chat", "r/student.gguf", "Hello", *settings)
    assert answer.code == 0 and "expected agreement" in answer.complaint


def test_too_little_space_is_refused_before_capture(
    tiny_teacher_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of the soft targets is known beforehand."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"need up to .* free"):
        run(small_config(tiny_teacher_path), RunPaths(out=tmp_path / "tight"), Console())
