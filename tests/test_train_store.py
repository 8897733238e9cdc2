"""`distill train`: from a store alone to a proved student, the same as `distill run` makes; refusals; continuation."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import distill.pipeline
from distill import losses
from distill.capturing import capture_only
from distill.cli import main
from distill.config import RunConfig, load_config
from distill.console import Console
from distill.engine import train
from distill.errors import UserError
from distill.evaluation.scores import STORED_TARGETS, evaluate, evaluate_stored, llama_scorer, student_scorer
from distill.export_run import export_run
from distill.pipeline import run, train_from_store
from distill.run_folder import Places, RunFolder
from teachers.files import StoreError
from teachers.gguf_file import read_gguf, tokenizer_sha256
from teachers.gguf_teacher import GGUFTeacher
from teachers.inheritance import TEACHER, need_inheritance, write_inheritance
from teachers.manifest import MANIFEST, read_manifest
from teachers.soft_targets import CompactTargets
from teachers.store import COMPANION, SoftTargetStore
from tests.conftest import make_student
from tests.test_run import SMALL, small_config
from tests.tiny_checkpoint import make_folder

WEIGHTS = "student/model.safetensors"
# What the capture alone decides is no setting of a training.
TRAINING = [setting for setting in SMALL if setting.split("=")[0] != "data.max_length"]


def train_config(store: Path, *settings: str) -> RunConfig:
    """The settings of `small_config`, for `distill train`."""
    return load_config(None, {"store": str(store), "student.size": "32x1"}, [*TRAINING, *settings])


def open_there(folder: Path) -> SoftTargetStore:
    return SoftTargetStore(folder, read_manifest(folder))


@pytest.fixture(scope="module")
def made(tiny_teacher_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Path]:
    """A finished `distill run`, and its store elsewhere; the teacher file is gone since."""
    place = tmp_path_factory.mktemp("with-teacher")
    teacher = place / "tiny.gguf"
    shutil.copy(tiny_teacher_path, teacher)
    folder = run(small_config(teacher), Places(place / "run", place / "store"), Console())
    teacher.unlink()
    store = tmp_path_factory.mktemp("without") / "copied"
    shutil.move(place / "store", store)
    return folder, store


@pytest.fixture(scope="module")
def trained(made: tuple[RunFolder, Path], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished `distill train` on that store."""
    return train_from_store(train_config(made[1]), tmp_path_factory.mktemp("trained") / "run", Console())


@pytest.fixture
def copy(made: tuple[RunFolder, Path], tmp_path: Path) -> Path:
    """The store, to do harm to."""
    shutil.copytree(made[1], tmp_path / "store")
    return tmp_path / "store"


# --- the same student


def test_the_student_is_the_one_that_run_makes(made: tuple[RunFolder, Path], trained: RunFolder) -> None:
    """Weights, tokenizer and exported file are equal to the byte, and so is how training went."""
    for name in (WEIGHTS, "student/tokenizer.gguf", "student/config.json", "student.gguf"):
        assert (trained.path / name).read_bytes() == (made[0].path / name).read_bytes(), name
    ours, theirs = trained.read_results(), made[0].read_results()
    for name in ("teacher", "student", "proof", "rotations"):
        assert ours[name] == theirs[name]
    assert ours["training"]["held_out"] == theirs["training"]["held_out"]
    assert ours["proof"]["token_lines"] > 0
    assert trained.read_identity() == made[0].read_identity()


def test_other_settings_give_another_student(
    made: tuple[RunFolder, Path], trained: RunFolder, tmp_path: Path
) -> None:
    """Or the test above could not fail: another seed, another width of the same embeddings."""
    other = train_from_store(train_config(made[1], "seed=1"), tmp_path / "seed", Console())
    assert (other.path / WEIGHTS).read_bytes() != (trained.path / WEIGHTS).read_bytes()
    wide = train_from_store(
        train_config(made[1], "student.size=96x1", "train.epochs=1", "train.learning_rate=1e-12"),
        tmp_path / "wide",
        Console(),
    )
    embedding = load_file(wide.path / WEIGHTS)["model.embed_tokens.weight"]
    assert embedding.shape[1] == 96 and float(embedding[:, 64:].abs().max()) < 1e-9 < float(embedding.std())


def test_config_and_identity_say_what_was_used(made: tuple[RunFolder, Path], trained: RunFolder) -> None:
    """The store as given, its key, and of the capture what the store knows."""
    config = trained.read_config()
    assert config.store == str(made[1]) and config.teacher.path is None
    assert config.targets.sketch_bytes == 64 and config.data.max_length == 256
    assert trained.read_identity()["soft_targets"] == read_manifest(made[1]).key
    assert load_config(trained.config_file, {}, []) == config


def test_results_claim_nothing_of_the_absent_teacher(
    trained: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured against stored targets, and said so; the teacher's speed is not there, its size is known."""
    results = trained.read_results()
    scores = results["evaluation"]
    assert scores["against"] == STORED_TARGETS and scores["kl_over"] == "16 top tokens and the rest"
    assert scores["teacher"]["approximate"] is True and "kl" not in scores["teacher"]
    assert scores["after"]["kl"] < scores["before"]["kl"]
    training = results["training"]
    kept = next(score for score in training["held_out"] if score["step"] == training["best_step"])
    for name in ("kl", "agreement", "cross_entropy"):
        assert scores["after"][name] == pytest.approx(kept[name], rel=1e-4)
    assert results["tokens_per_second"].keys() == {"student"}
    assert results["teacher"]["file_bytes"] > results["student"]["file_bytes"]
    train_from_store(train_config(Path(trained.read_config().store or "")), trained.path, Console())
    said = " ".join(capsys.readouterr().out.split())
    assert "against the teacher's stored soft targets; KL over the 16 top tokens and the rest" in said
    assert "KL to targets" in said and "KL to teacher" not in said and "≈" in said
    writing = next(line for line in said.split("│ llama.cpp, ") if line.startswith("writing"))
    assert [cell.strip() for cell in writing.split("│")][1] == ""


def test_the_teacher_is_never_opened(
    made: tuple[RunFolder, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is any other looked for, such as the example teacher."""

    def fail(*_: object) -> None:
        raise AssertionError("a teacher was asked for")

    for name in ("load_teacher", "open_teacher", "find_gguf"):
        monkeypatch.setattr(distill.pipeline, name, fail)
    assert train_from_store(train_config(made[1], "train.epochs=1"), tmp_path / "run", Console()).finished


def test_the_run_can_be_used_like_any_other(
    trained: RunFolder,
    tiny_teacher_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exported again, talked to; the tokenizer is the teacher's."""
    [file] = export_run(trained, ["f32"], None, Console())
    path = trained.path / file.file
    assert file.max_logit_difference <= 1e-3
    assert tokenizer_sha256(read_gguf(path)) == tokenizer_sha256(read_gguf(tiny_teacher_path))
    assert read_gguf(path).value("so8t.teacher_name") == "tiny"
    path.unlink()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["distill", "chat", str(trained.gguf), "Hello", "--max-tokens", "4"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0 and "expected agreement" in capsys.readouterr().err


# --- against stored targets


@pytest.mark.parametrize("kind", ["dense", "hidden", "compact", "buckets"])
def test_stored_targets_score_like_the_teacher(
    kind: str, tiny_teacher_path: Path, tiny_teacher: GGUFTeacher, tmp_path: Path
) -> None:
    """As well as the kind allows, and the teacher's own cross-entropy only where it is known."""
    extra = {"buckets": ["targets.kind=compact", "targets.sketch_bytes=0"]}.get(
        kind, [f"targets.kind={kind}"]
    )
    store = capture_only(small_config(tiny_teacher_path, *extra, samples=8), tmp_path / "store", Console())
    indices = [1, 4, 6]
    # One model far from the teacher, and the teacher itself.
    models = {
        "other": student_scorer(make_student(32, 1, 1024)),
        "teacher": llama_scorer(tiny_teacher),
    }
    live = evaluate(tiny_teacher, [store.tokens(index) for index in indices], models)
    stored = evaluate_stored(store, indices, models)
    assert stored.positions == live.positions and stored.approximate == (kind != "dense")
    for name in models:
        assert stored.models[name].cross_entropy == live.models[name].cross_entropy
        assert stored.models[name].agreement == pytest.approx(live.models[name].agreement, abs=0.04)
    other, exact = stored.models["other"].kl, live.models["other"].kl
    if kind in ("compact", "buckets"):  # 16 tokens and the rest: a lower bound of what every token would give
        assert other < exact
        sequences = [store.tokens(index) for index in indices]
        buckets = CompactTargets.from_logits(torch.from_numpy(tiny_teacher.logits(sequences)), 16)
        exact = float(losses.forward_kl(models["other"](sequences), buckets, 1.0).mean())
    assert other == pytest.approx(exact, rel=2e-2 if kind == "hidden" else 1e-3)
    assert stored.models["teacher"].kl < (1e-2 if kind == "hidden" else 1e-5)
    if kind == "buckets":
        assert stored.teacher is None
    else:
        assert stored.teacher == pytest.approx(live.teacher, abs=1e-5 if kind == "dense" else 0.03)


def test_no_perplexity_of_the_teacher_where_it_is_unknown(
    tiny_teacher_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Top-k alone do not say how probable every word was: neither results nor table have a number."""
    capture_only(
        small_config(tiny_teacher_path, "targets.sketch_bytes=0", samples=16), tmp_path / "s", Console()
    )
    folder = train_from_store(train_config(tmp_path / "s", "train.epochs=1"), tmp_path / "run", Console())
    assert "teacher" not in folder.read_results()["evaluation"]
    line = next(line for line in capsys.readouterr().out.splitlines() if "perplexity, held" in line)
    assert line.split("│")[2].strip() == "" and line.split("│")[3].strip()


# --- continuing, finished, refused


def test_an_interrupted_training_continues(
    made: tuple[RunFolder, Path],
    trained: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the folder it chooses by itself, named after the store; to the same bytes."""
    monkeypatch.chdir(tmp_path)

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
            train_from_store(train_config(made[1]), None, Console())
    folder = train_from_store(train_config(made[1]), None, Console())
    assert folder.path == Path("runs/copied-32x1") and "continued from step" in capsys.readouterr().out
    assert (folder.path / WEIGHTS).read_bytes() == (trained.path / WEIGHTS).read_bytes()


def test_finished_is_finished(
    made: tuple[RunFolder, Path], trained: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written again; the table is shown."""
    before = {path: path.stat().st_mtime_ns for path in trained.path.rglob("*")}
    train_from_store(train_config(made[1]), trained.path, Console())
    said = " ".join(capsys.readouterr().out.split())
    assert "already holds this run, finished" in said and "32x1 SO8T" in said and "Train " not in said
    assert {path: path.stat().st_mtime_ns for path in trained.path.rglob("*")} == before


def test_another_runs_folder_is_left_alone(
    made: tuple[RunFolder, Path], trained: RunFolder, tiny_teacher_path: Path, tmp_path: Path
) -> None:
    """Other settings; a folder of `run`; another store at the same place."""
    with pytest.raises(UserError, match=r"another run \(train.epochs is 2 there, 3 here\)"):
        train_from_store(train_config(made[1], "train.epochs=3"), trained.path, Console())
    with pytest.raises(UserError, match="another run"):
        train_from_store(train_config(made[1]), made[0].path, Console())
    with pytest.raises(UserError, match="another run"):
        run(small_config(tiny_teacher_path), Places(trained.path), Console())
    store = tmp_path / "store"
    shutil.copytree(made[1], store)
    out = tmp_path / "run"
    train_from_store(train_config(store), out, Console())
    shutil.rmtree(store)
    capture_only(small_config(tiny_teacher_path, "seed=5"), store, Console())
    with pytest.raises(UserError, match="another soft targets"):
        train_from_store(train_config(store), out, Console())


def command(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """The exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["distill", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: list[tuple[str, Callable[[Path], object], list[str]]] = [
    (MANIFEST, Path.unlink, ["not a store", MANIFEST]),
    (MANIFEST, lambda path: path.write_text("{"), [MANIFEST, "damaged"]),
    ("shard-00000.safetensors", flip, ["has 1 file damaged", "shard-00000"]),
    ("shard-00000.safetensors", cut, ["damaged", "shard-00000", "run the capture again"]),
    ("shard-00000.safetensors", Path.unlink, ["holds no soft targets yet", "run the capture again"]),
    (COMPANION, flip, [COMPANION, "damaged", "run the capture again"]),
    (COMPANION, Path.unlink, [COMPANION, "missing"]),
    (TEACHER, flip, [TEACHER, "damaged", "run the capture again"]),
    (TEACHER, Path.unlink, [TEACHER, "missing", "run the capture again"]),
]


@pytest.mark.parametrize(("name", "harm", "words"), DAMAGE)
def test_a_damaged_store_is_one_line_and_exit_2(
    name: str,
    harm: Callable[[Path], object],
    words: list[str],
    copy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is missing or has a wrong byte: named with a remedy before anything is written."""
    harm(copy / name)
    out = tmp_path / "run"
    assert command("train", str(copy), "--out", str(out), monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said and str(copy) in said
    for word in words:
        assert word in said, said
    assert not out.exists()


def test_a_half_captured_store_is_refused(
    tiny_teacher_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One share of two: which shards are missing, and what to do."""
    config = load_config(
        None, {"teacher.path": str(tiny_teacher_path), "data.samples": 520}, ["data.max_length=16"]
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    store = capture_only(config, tmp_path / "store", Console())
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    with pytest.raises(StoreError, match=r"1 file missing \(shard-00001.*run the capture again"):
        train_from_store(train_config(store.folder), tmp_path / "run", Console())
    assert not (tmp_path / "run").exists()


def test_what_is_no_store_is_refused(
    made: tuple[RunFolder, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A missing folder, a file, a run's folder; bad flags; a folder that is in use by something else."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    store = str(made[1])
    for arguments, words in (
        (["nowhere"], ["nowhere", "does not exist", "distill capture"]),
        ([str(tmp_path / "file")], ["is not a folder"]),
        ([str(made[0].path)], ["is not a store"]),
        ([], ["STORE"]),
        ([store, "--student-size", "60x2"], ["60", "divisible by 8"]),
        ([store, "--student-size", "60000x900"], ["60000x900", "memory"]),
        ([store, "--quant", "q1"], ["export.quant", "q1"]),
        ([store, "--out", str(tmp_path / "other")], ["other files"]),
        ([store, "--teacher", "x.gguf"], ["x.gguf", "does not exist"]),
        ([store, "--set", "train.on_policy=0.5"], ["train.on_policy", "0.5", "teacher", "distill run"]),
    ):
        assert command("train", *arguments, monkeypatch=monkeypatch) == 2, arguments
        said = capsys.readouterr().err
        assert "Traceback" not in said and all(word in said for word in words), said


def test_a_store_without_a_gguf_tokenizer_is_refused(tmp_path: Path) -> None:
    """Captured from a transformers folder: what, why, what to do."""
    make_folder(tmp_path / "model")
    (tmp_path / "data.txt").write_text("the cat sat on the mat while " * 60)
    overrides = {"teacher.path": str(tmp_path / "model"), "data.path": str(tmp_path / "data.txt")}
    capture_only(load_config(None, overrides, ["data.max_length=16"]), tmp_path / "store", Console())
    with pytest.raises(UserError, match=r"store .* captured from model, .* no GGUF .*convert_hf_to_gguf"):
        train_from_store(train_config(tmp_path / "store"), tmp_path / "run", Console())


def test_settings_of_the_capture_are_not_skipped_silently(
    made: tuple[RunFolder, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named, where they differ from what the store was made with; the run is the same without them."""
    given = ("data.samples=10", "targets.num_topk=4", "targets.kind=compact", "targets.sketch_bytes=64")
    out = tmp_path / "run"
    train_from_store(train_config(made[1], "train.epochs=1", *given), out, Console())
    said = " ".join(capsys.readouterr().out.split())
    assert "has decided it: data.samples, targets.num_topk" in said
    train_from_store(train_config(made[1], "train.epochs=1"), out, Console())
    said = " ".join(capsys.readouterr().out.split())
    assert "finished; nothing was done again" in said and "has decided it" not in said


def test_a_trainings_configuration_asks_no_teacher(
    trained: RunFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Given to another command, its config.json would mean the example teacher: refused by name."""
    monkeypatch.chdir(tmp_path)
    for name in ("run", "capture", "plan"):
        assert command(name, "--config", str(trained.config_file), monkeypatch=monkeypatch) == 2
        said = capsys.readouterr().err
        assert "store = " in said and "distill train" in said
    assert not list(tmp_path.iterdir())


def test_a_wrong_tokenizer_fails_the_proof(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kept lines are compared: other ids for them and no student gets its name."""
    store = open_there(copy)
    kept = need_inheritance(store)
    kept.lines.tokens[0] = kept.lines.tokens[0][::-1].copy()
    write_inheritance(store, kept)
    out = tmp_path / "run"
    settings = [word for setting in [*TRAINING, "train.epochs=1"] for word in ("--set", setting)]
    code = command(
        "train", str(copy), "--student-size", "32x1", "--out", str(out), *settings, monkeypatch=monkeypatch
    )
    assert code == 1 and not (out / "student.gguf").exists()


def test_a_mixture_with_one_gguf_file_is_enough(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """Its tokenizer and embeddings are kept, and its facts are the mixture's."""
    mixed = f"teacher.mix_with=[{json.dumps(str(tiny_teacher_path))}]"
    store = capture_only(small_config(tiny_teacher_path, mixed, samples=12), tmp_path / "store", Console())
    folder = train_from_store(train_config(store.folder, "train.epochs=1"), tmp_path / "run", Console())
    assert folder.read_results()["teacher"]["name"] == "tiny + tiny"
    assert torch.isfinite(load_file(folder.path / WEIGHTS)["model.embed_tokens.weight"]).all()
