"""Where a run's student begins: what is chosen, what is said, and that interruptions and processes change nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.batches import load_batch
from distill.beginning import begin, find_teacher, settle_beginning, with_learning_rate
from distill.capturing import capture_only
from distill.cli import main
from distill.config import LossConfig, RunConfig, TrainConfig, load_config
from distill.console import Console
from distill.errors import UserError
from distill.full_store import open_full_store
from distill.held_out import HeldOutScore, held_out_score
from distill.launch import Launch
from distill.new_student import student_shape, with_size
from distill.objective import Objective
from distill.pipeline import run, train_from_store
from distill.run_folder import Places
from distill.training_module import TrainingModule
from students.builder import build_student, student_config
from students.model import SO8TForCausalLM
from students.shape import StudentSize
from teachers import example_teacher
from teachers.base import TeacherInfo
from teachers.gguf_file import GGUFFile
from teachers.inheritance import Inheritance
from teachers.llama_weights import NotALlama
from teachers.share import WHOLE
from teachers.store import SoftTargetStore

SHORT = [
    "data.max_length=24",
    "data.held_out=0.2",
    "train.epochs=1",
    "train.evaluations=2",
    "safety.labels=none",
]


def short_config(teacher: Path, *settings: str) -> RunConfig:
    overrides = {"teacher.path": str(teacher), "student.size": "32x1", "data.samples": 24}
    return load_config(None, overrides, [*SHORT, *settings])


@pytest.fixture(scope="module")
def store_folder(tiny_teacher_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beginning") / "store"
    capture_only(short_config(tiny_teacher_path), folder, Console())
    return folder


@pytest.fixture
def kept(store_folder: Path) -> Inheritance:
    return open_full_store(store_folder)[1]


def settled(config: RunConfig, info: TeacherInfo, gguf: Path | None) -> RunConfig:
    return settle_beginning(with_size(config, info), info, gguf, Console())


def made(config: RunConfig, kept: Inheritance, teacher: Path, store: Path, path: Path) -> SO8TForCausalLM:
    texts = [SoftTargetStore(store, open_full_store(store)[0].manifest).tokens(index) for index in range(8)]
    return begin(config, kept, teacher, texts, path, Launch(WHOLE), Console())


def test_auto_takes_the_teachers_weights(tiny_teacher_path: Path, kept: Inheritance) -> None:
    """The default where the file is there and of a known layout; another wish stays."""
    config = settled(short_config(tiny_teacher_path), kept.info, tiny_teacher_path)
    assert config.student.init == "teacher" and config.train.learning_rate is None
    other = settled(short_config(tiny_teacher_path, "student.init=random"), kept.info, tiny_teacher_path)
    assert other.student.init == "random"


def test_the_nearer_to_the_teacher_the_lower_the_rate(store_folder: Path) -> None:
    """√KL / 2 of the usual rate, between a fiftieth and a half; else the usual one; one that is given stays."""
    store = open_full_store(store_folder)[0]
    batches = [load_batch(store, range(4))]
    student = build_student(
        student_config(
            StudentSize(32, 1), vocab_size=int(store.manifest.identity["vocab_size"]), context_length=64
        ),
        0,
    )
    usual = 0.5 / 32
    train = TrainConfig()
    kl = held_out_score(TrainingModule(student, Objective(LossConfig())), batches).kl
    assert kl > 0
    expected = usual * min(0.5, max(0.02, 0.5 * kl**0.5))
    assert with_learning_rate(train, student, "teacher", batches).learning_rate == pytest.approx(expected)
    assert with_learning_rate(train, student, "random", batches).learning_rate == usual
    given = TrainConfig(learning_rate=0.003)
    assert with_learning_rate(given, student, "teacher", batches) == given


@pytest.mark.parametrize(("kl", "share"), [(4.0, 0.5), (0.25, 0.25), (1e-6, 0.02), (-1e-9, 0.02)])
def test_the_rate_is_bounded(kl: float, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A far student gets half of the usual rate, one that is the teacher a fiftieth."""
    student = build_student(student_config(StudentSize(32, 1), vocab_size=16, context_length=64), 0)
    monkeypatch.setattr("distill.beginning.held_out_score", lambda *_: HeldOutScore(kl, 1.0, 1.0))
    rate = with_learning_rate(TrainConfig(), student, "teacher", []).learning_rate
    assert rate == pytest.approx(share * 0.5 / 32)


def test_without_the_file_auto_says_so_and_teacher_is_refused(
    tiny_teacher_path: Path, kept: Inheritance, capsys: pytest.CaptureFixture[str]
) -> None:
    """A store holds no layers: the default falls back, an explicit wish does not."""
    assert settled(short_config(tiny_teacher_path), kept.info, None).student.init == "embeddings"
    assert "its file is not here" in capsys.readouterr().out
    with pytest.raises(UserError, match="--teacher"):
        settled(short_config(tiny_teacher_path, "student.init=teacher"), kept.info, None)


@pytest.mark.parametrize("wish", ["auto", "teacher"])
def test_another_layout_falls_back_and_says_why(
    wish: str,
    tiny_teacher_path: Path,
    kept: Inheritance,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An architecture whose weights cannot be read is no error, but it is said."""

    def refuse(config: object, file: GGUFFile) -> None:
        raise NotALlama(f"{file.path} is of architecture gemma")

    monkeypatch.setattr("distill.beginning.require_head_start", refuse)
    config = settled(short_config(tiny_teacher_path, f"student.init={wish}"), kept.info, tiny_teacher_path)
    assert config.student.init == "embeddings"
    assert "architecture gemma" in " ".join(capsys.readouterr().out.split())


def test_every_beginning_is_what_it_says(
    tiny_teacher_path: Path, store_folder: Path, kept: Inheritance, tmp_path: Path
) -> None:
    """Random weights are those of the seed; embeddings change the embedding alone; the teacher's change everything."""
    students = {}
    for init in ("random", "embeddings", "teacher"):
        config = settled(
            short_config(tiny_teacher_path, f"student.init={init}"), kept.info, tiny_teacher_path
        )
        students[init] = made(config, kept, tiny_teacher_path, store_folder, tmp_path / init).state_dict()
    plain = build_student(student_shape(config, kept.info), config.seed).state_dict()
    assert all(torch.equal(students["random"][name], value) for name, value in plain.items())
    changed = {name for name, value in plain.items() if not torch.equal(students["embeddings"][name], value)}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}
    changed = {name for name, value in plain.items() if not torch.equal(students["teacher"][name], value)}
    assert (
        "model.layers.0.self_attn.q_proj.weight" in changed
        and "model.layers.0.mlp.down_proj.weight" in changed
    )


def test_a_head_start_is_computed_once(
    tiny_teacher_path: Path,
    store_folder: Path,
    kept: Inheritance,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rerun takes it from the file; a damaged file is made again, to the same bytes."""
    config = settled(short_config(tiny_teacher_path), kept.info, tiny_teacher_path)
    path = tmp_path / "beginning.safetensors"
    first = made(config, kept, tiny_teacher_path, store_folder, path).state_dict()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    made(config, kept, tiny_teacher_path, store_folder, path)
    assert path.read_bytes() == whole
    monkeypatch.setattr("distill.beginning.head_start", None)
    again = made(config, kept, tiny_teacher_path, store_folder, path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_the_store_finds_the_example_teacher_by_itself(tiny_teacher_path: Path, kept: Inheritance) -> None:
    """Which is part of the program; of any other the file must be given, and be that one."""
    assert find_teacher(None, kept.info) is None
    assert find_teacher(str(tiny_teacher_path), kept.info) == tiny_teacher_path
    with pytest.raises(UserError, match="not the teacher whose soft targets"):
        find_teacher(str(example_teacher()), kept.info)


def test_run_and_train_give_the_same_student(
    tiny_teacher_path: Path, store_folder: Path, tmp_path: Path
) -> None:
    """Both begin at the teacher's weights, `train` with the teacher's file; nothing of the beginning is left behind."""
    folder = run(short_config(tiny_teacher_path), Places(tmp_path / "run", store_folder), Console())
    settings = [setting for setting in SHORT if not setting.startswith("data.max_length")]
    config = load_config(
        None,
        {"store": str(store_folder), "student.size": "32x1", "teacher.path": str(tiny_teacher_path)},
        settings,
    )
    other = train_from_store(config, tmp_path / "train", Console())
    assert folder.read_config().student.init == other.read_config().student.init == "teacher"
    assert not folder.beginning.exists() and not other.beginning.exists()
    ours, theirs = (load_file(place.student / "model.safetensors") for place in (folder, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert folder.gguf.read_bytes() == other.gguf.read_bytes()


def test_a_wrong_teacher_is_one_line(
    store_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`distill train STORE --teacher OTHER` ends with exit code 2."""
    arguments = ["distill", "train", str(store_folder), "--teacher", str(example_teacher())]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "not the teacher whose soft targets" in " ".join(capsys.readouterr().err.split())
