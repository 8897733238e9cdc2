"""`distill train`: from a store alone to a proved student, the same as `distill run` makes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.config.loading import load_config
from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.evaluation.scorers import evaluate, evaluate_stored, llama_scorer, student_scorer
from distill.export.export_again import export_run
from distill.losses import divergences
from distill.metrics.closeness import STORED_TARGETS
from distill.pipeline.capture import capture_only
from distill.pipeline.run import run, train_from_store
from distill.runs.folder import RunFolder, RunPaths
from distill.runtime.progress import Console
from teachers.atomic_files import StoreError
from teachers.gguf.file import read_gguf, tokenizer_sha256
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.manifest import MANIFEST, read_manifest
from teachers.store.store import SHARED_CODEC, SoftTargetStore
from teachers.store.teacher_record import TEACHER, require_teacher_record, write_teacher_record
from teachers.targets.distributions import CompactTargets
from tests.conftest import command, not_refused
from tests.support.runs import SMALL, interrupted, small_config, times_in
from tests.support.students import make_student
from tests.support.tiny_checkpoint import make_folder

pytestmark = pytest.mark.usefixtures("llama_here")

Made = tuple[RunFolder, Path]
WEIGHTS = "student/model.safetensors"
# What the capture alone decides is no setting of a training.
TRAINING = [setting for setting in SMALL if setting.split("=")[0] != "data.max_length"]


def train_config(store: Path, *settings: str) -> RunConfig:
    """The settings of `small_config`, for `distill train`."""
    return load_config(None, {"store": str(store), "student.size": "32x1"}, [*TRAINING, *settings])


@pytest.fixture(scope="module")
def made(tiny_teacher_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A finished `distill run`, and its store elsewhere; the teacher file is gone since."""
    place = tmp_path_factory.mktemp("with-teacher")
    teacher = place / "tiny.gguf"
    shutil.copy(tiny_teacher_path, teacher)
    folder = run(small_config(teacher), RunPaths(place / "run", place / "store"), Console())
    teacher.unlink()
    store = tmp_path_factory.mktemp("without") / "copied"
    shutil.move(place / "store", store)
    return folder, store


@pytest.fixture(scope="module")
def trained(made: Made, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished `distill train` on that store."""
    out = tmp_path_factory.mktemp("trained") / "run"
    return train_from_store(train_config(made[1]), out, Console())


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """The store, to do harm to."""
    shutil.copytree(made[1], tmp_path / "store")
    return tmp_path / "store"


def train_small(store: Path, out: Path | None, *settings: str) -> RunFolder:
    return train_from_store(train_config(store, *settings), out, Console())


def capture_small(teacher: Path, store: Path, *settings: str, samples: int = 12) -> SoftTargetStore:
    return capture_only(small_config(teacher, *settings, samples=samples), store, Console())


def teachers_cell(out: str, row: str) -> str:
    """What a run's final table has in a row of the teacher's column."""
    line = next(line for line in out.splitlines() if line.startswith(f"│ {row}"))
    return line.split("│")[2].strip()


# -- the same student


def test_the_student_is_the_one_that_run_makes(made: Made, trained: RunFolder) -> None:
    """Weights, tokenizer and exported file are equal to the byte, and so is how training went."""
    for name in (WEIGHTS, "student/tokenizer.gguf", "student/config.json", "student.gguf"):
        assert (trained.path / name).read_bytes() == (made[0].path / name).read_bytes(), name
    ours, theirs = trained.read_results(), made[0].read_results()
    for name in ("teacher", "student", "proof", "rotations"):
        assert ours[name] == theirs[name], name
    assert ours["training"]["held_out"] == theirs["training"]["held_out"]
    assert ours["proof"]["token_lines"] > 0
    assert trained.read_identity() == made[0].read_identity()
    # The store as given, its key, and of the capture what the store knows.
    config = trained.read_config()
    assert config.store == str(made[1]) and config.teacher.path is None
    assert config.targets.sketch_bytes == 64 and config.data.max_length is None
    assert trained.read_identity()["soft_targets"] == read_manifest(made[1]).key
    assert load_config(trained.config_file, {}, []) == config


def test_other_settings_give_another_student(
    made: Made, trained: RunFolder, tmp_path: Path
) -> None:
    """Or the test above could not fail: another seed, another width of the same embeddings."""
    other = train_small(made[1], tmp_path / "seed", "seed=1")
    assert (other.path / WEIGHTS).read_bytes() != (trained.path / WEIGHTS).read_bytes()
    unmoved = ("student.size=96x1", "train.epochs=1", "train.learning_rate=1e-12")
    wide = train_small(made[1], tmp_path / "wide", *unmoved)
    embedding = load_file(wide.path / WEIGHTS)["model.embed_tokens.weight"]
    assert embedding.shape[1] == 96
    assert float(embedding[:, 64:].abs().max()) < 1e-9 < float(embedding.std())


def test_results_claim_nothing_of_the_absent_teacher(
    made: Made, trained: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured against stored targets, and said so; the teacher's size is known, not its speed.

    Given again, the command shows that table and writes nothing.
    """
    results = trained.read_results()
    scores, training = results["evaluation"], results["training"]
    assert scores["against"] == STORED_TARGETS
    assert scores["kl_over"] == "16 top tokens and the rest"
    assert scores["teacher"]["approximate"] is True and "kl" not in scores["teacher"]
    assert scores["after"]["kl"] < scores["before"]["kl"]
    kept = next(one for one in training["held_out"] if one["step"] == training["best_step"])
    for name in ("kl", "agreement", "cross_entropy"):
        assert scores["after"][name] == pytest.approx(kept[name], rel=1e-4), name
    assert results["tokens_per_second"].keys() == {"student"}
    assert results["teacher"]["file_bytes"] > results["student"]["file_bytes"]
    before = times_in(trained)
    train_small(made[1], trained.path)
    assert times_in(trained) == before
    out = capsys.readouterr().out
    said = " ".join(out.split())
    assert "already holds this run, finished" in said and "Train " not in said
    assert f"against the {STORED_TARGETS}; bucket KL over the 16 top tokens and the rest" in said
    assert "The teacher was not there" in said and "≈" in said
    assert teachers_cell(out, "decode") == "–"


def test_the_teacher_is_never_opened(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nor is any other looked for, such as the example teacher.

    Settings of the capture are named where they differ from the store's; the run is the same
    without them.
    """

    def fail(*_: object) -> None:
        raise AssertionError("a teacher was asked for")

    for name in ("run.load_teacher", "run.gguf_of", "stages.open_teacher"):
        monkeypatch.setattr(f"distill.pipeline.{name}", fail)
    given = ("data.samples=10", "targets.num_topk=4", "targets.kind=compact")
    out, settings = tmp_path / "run", ("train.epochs=1", "targets.sketch_bytes=64", *given)
    assert train_small(made[1], out, *settings).finished
    said = " ".join(capsys.readouterr().out.split())
    assert "has decided it: data.samples, targets.num_topk" in said
    train_small(made[1], out, "train.epochs=1")
    said = " ".join(capsys.readouterr().out.split())
    assert "finished; nothing was done again" in said and "has decided it" not in said


def test_the_run_can_be_used_like_any_other(trained: RunFolder, tiny_teacher_path: Path) -> None:
    """Exported again, talked to; the tokenizer is the teacher's."""
    [file] = export_run(trained, ["f32"], None, Console())
    path = trained.path / file.file
    assert file.max_logit_difference <= 1e-3
    assert tokenizer_sha256(read_gguf(path)) == tokenizer_sha256(read_gguf(tiny_teacher_path))
    assert read_gguf(path).value("so8t.teacher_name") == "tiny"
    path.unlink()
    ended = command("chat", trained.gguf, "Hello", "--max-tokens", 4)
    assert ended.code == 0 and "expected agreement" in ended.complaint


# -- against stored targets


@pytest.mark.parametrize("kind", ["dense", "hidden", "compact", "buckets"])
def test_stored_targets_score_like_the_teacher(
    kind: str, tiny_teacher_path: Path, tiny_teacher: GGUFTeacher, tmp_path: Path
) -> None:
    """As well as the kind allows; the teacher's own cross-entropy only where it is known."""
    settings = [f"targets.kind={kind}"]
    if kind == "buckets":
        settings = ["targets.kind=compact", "targets.sketch_bytes=0"]
    store = capture_small(tiny_teacher_path, tmp_path / "store", *settings, samples=8)
    indices = [1, 4, 6]
    sequences = [store.tokens(index) for index in indices]
    models = {"other": student_scorer(make_student(32, 1, 1024))}  # far from the teacher
    models["teacher"] = llama_scorer(tiny_teacher)
    live = evaluate(tiny_teacher, sequences, models)
    stored = evaluate_stored(store, indices, models)
    assert stored.positions == live.positions and stored.approximate == (kind != "dense")
    for name in models:
        ours, theirs = stored.models[name], live.models[name]
        assert ours.cross_entropy == theirs.cross_entropy
        assert ours.agreement == pytest.approx(theirs.agreement, abs=0.04)
    other, exact = stored.models["other"].kl, live.models["other"].kl
    if kind in ("compact", "buckets"):  # a lower bound of what every token would give
        assert other < exact
        logits = torch.from_numpy(tiny_teacher.logits(sequences))
        buckets = CompactTargets.from_logits(logits, 16)
        exact = float(divergences.known_kl(models["other"](sequences), buckets, 1.0).mean())
    assert other == pytest.approx(exact, rel=2e-2 if kind == "hidden" else 1e-3)
    assert stored.models["teacher"].kl < (1e-2 if kind == "hidden" else 1e-5)
    if kind == "buckets":
        assert stored.teacher is None
    else:
        assert stored.teacher == pytest.approx(live.teacher, abs=1e-5 if kind == "dense" else 0.03)


def test_a_mixture_with_one_gguf_file_is_enough(
    tiny_teacher_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tokenizer and embeddings are kept, and its facts are the mixture's.

    Top-k alone do not say how probable every word was to it: nothing has a number for that.
    """
    mixed = f"teacher.mix_with=[{json.dumps(str(tiny_teacher_path))}]"
    store = capture_small(tiny_teacher_path, tmp_path / "s", mixed, "targets.sketch_bytes=0")
    folder = train_small(store.folder, tmp_path / "run", "train.epochs=1")
    results = folder.read_results()
    assert results["teacher"]["name"] == "tiny + tiny"
    assert torch.isfinite(load_file(folder.path / WEIGHTS)["model.embed_tokens.weight"]).all()
    assert "teacher" not in results["evaluation"]
    assert teachers_cell(capsys.readouterr().out, "perplexity") == "–"


# -- continuing, refused


def test_an_interrupted_training_continues(
    made: Made,
    trained: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the folder it chooses by itself, named after the store; to the same bytes."""
    monkeypatch.chdir(tmp_path)
    with interrupted(at=6):
        train_small(made[1], None)
    folder = train_small(made[1], None)
    assert folder.path == Path("runs/copied-32x1")
    assert "continued from step" in capsys.readouterr().out
    assert (folder.path / WEIGHTS).read_bytes() == (trained.path / WEIGHTS).read_bytes()


def test_another_runs_folder_is_left_alone(
    made: Made, trained: RunFolder, tiny_teacher_path: Path, copy: Path, tmp_path: Path
) -> None:
    """Other settings; a folder of `run`; another store at the same place."""
    with pytest.raises(UserError, match=r"another run \(train.epochs is 2 there, 3 here\)"):
        train_small(made[1], trained.path, "train.epochs=3")
    with pytest.raises(UserError, match="another run"):
        train_small(made[1], made[0].path)
    with pytest.raises(UserError, match="another run"):
        run(small_config(tiny_teacher_path), RunPaths(trained.path), Console())
    with interrupted(at=0):
        train_small(copy, tmp_path / "run")
    shutil.rmtree(copy)
    capture_small(tiny_teacher_path, copy, "seed=5", samples=40)
    with pytest.raises(UserError, match="another soft targets"):
        train_small(copy, tmp_path / "run")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


SHARD = "shard-00000.safetensors"
DAMAGE: list[tuple[str, Callable[[Path], object], list[str]]] = [
    (MANIFEST, Path.unlink, ["not a store", MANIFEST]),
    (MANIFEST, lambda path: path.write_text("{"), [MANIFEST, "damaged"]),
    (SHARD, flip, ["has 1 file damaged", "shard-00000"]),
    (SHARD, cut, ["damaged", "shard-00000", "run the capture again"]),
    (SHARD, Path.unlink, ["holds no soft targets yet", "run the capture again"]),
    (SHARED_CODEC, flip, [SHARED_CODEC, "damaged", "run the capture again"]),
    (SHARED_CODEC, Path.unlink, [SHARED_CODEC, "missing"]),
    (TEACHER, flip, [TEACHER, "damaged", "run the capture again"]),
    (TEACHER, Path.unlink, [TEACHER, "missing", "run the capture again"]),
]


def test_a_damaged_store_is_one_line_and_exit_2(copy: Path, tmp_path: Path) -> None:
    """Whatever is missing or has a wrong byte: named with a remedy before anything is written."""
    out = tmp_path / "run"
    for number, (name, harm, words) in enumerate(DAMAGE):
        row = f"row {number} of DAMAGE, {name}: "
        whole = (copy / name).read_bytes()
        harm(copy / name)
        ended = command("train", copy, "--out", out)
        said = ended.complaint
        assert ended.code == 2 and said.count("\n") == 1 and "Traceback" not in said, row + said
        assert all(word in said for word in [str(copy), *words]), row + said
        assert not out.exists(), row
        (copy / name).write_bytes(whole)


def test_a_damaged_shard_of_a_large_store_is_found_when_it_is_read(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its targets are used."""
    flip(copy / SHARD)
    monkeypatch.setattr("distill.capture.ready_store.CHECKED_AT_START", 0)
    with pytest.raises(StoreError, match=r"1 file damaged \(shard-00000.*run the capture again"):
        train_small(copy, tmp_path / "run")


def test_a_half_captured_store_is_refused(
    tiny_teacher_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which shards are missing, and what to do."""
    with monkeypatch.context() as patch:
        patch.setattr("distill.capture.store_setup.SEQUENCES_PER_SHARD", 8)
        store = capture_small(tiny_teacher_path, tmp_path / "store")
    store.shard_path(1).unlink()
    with pytest.raises(StoreError, match=r"1 file missing \(shard-00001.*run the capture again"):
        train_small(store.folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_no_store_is_refused(made: Made) -> None:
    """None, a run's folder; bad flags. What needs no model: ``test_preflight``."""
    store = str(made[1])
    rows = (
        (["nowhere"], ["nowhere", "distill capture"]),
        ([str(made[0].path)], ["is not a store"]),
        ([], ["STORE"]),
        ([store, "--student-size", "60000x900"], ["60000x900", "memory"]),
        ([store, "--quant", "q1"], ["export.quant", "q1"]),
        ([store, "--set", "train.on_policy=0.5"], ["on_policy", "0.5", "distill run"]),
    )
    assert not_refused(rows, "train") == []


def test_a_store_without_a_gguf_tokenizer_is_refused(tmp_path: Path) -> None:
    """Captured from a transformers folder: what, why, what to do."""
    make_folder(tmp_path / "model")
    (tmp_path / "data.txt").write_text("the cat sat on the mat while " * 60)
    paths = {"teacher.path": "model", "data.path": "data.txt"}
    overrides = {key: str(tmp_path / name) for key, name in paths.items()}
    config = load_config(None, overrides, ["data.max_length=16"])
    capture_only(config, tmp_path / "store", Console())
    words = r"store .* captured from model, .* no GGUF .*convert_hf_to_gguf"
    with pytest.raises(UserError, match=words):
        train_small(tmp_path / "store", tmp_path / "run")


def test_a_trainings_configuration_asks_no_teacher(
    trained: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given to another command, its config.json would mean the example teacher: refused."""
    monkeypatch.chdir(tmp_path)
    for name in ("run", "capture", "plan"):
        ended = command(name, "--config", trained.config_file)
        assert ended.code == 2, name
        assert "store = " in ended.complaint and "distill train" in ended.complaint, name
    assert not list(tmp_path.iterdir())


def test_a_wrong_tokenizer_fails_the_proof(copy: Path, tmp_path: Path) -> None:
    """The kept lines are compared: other ids for them and no student gets its name."""
    store = SoftTargetStore(copy, read_manifest(copy))
    kept = require_teacher_record(store)
    kept.lines.tokens[0] = kept.lines.tokens[0][::-1].copy()
    write_teacher_record(store, kept)
    out = tmp_path / "run"
    settings = [word for one in [*TRAINING, "train.epochs=1"] for word in ("--set", one)]
    ended = command("train", copy, "--student-size", "32x1", "--out", out, *settings)
    assert ended.code == 1 and not (out / "student.gguf").exists()
