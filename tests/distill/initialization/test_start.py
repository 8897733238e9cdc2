"""Where a run's student begins: what is chosen, what is said; interruptions change nothing."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distill.capture.ready_store import find_teacher, open_full_store
from distill.cli import main
from distill.config.loading import load_config
from distill.config.schema import LossConfig, RunConfig, TrainConfig
from distill.errors import UserError
from distill.initialization.shape import student_shape
from distill.initialization.start import begin
from distill.losses.objective import Objective
from distill.pipeline.capture import capture_only
from distill.pipeline.resolve import resolve
from distill.pipeline.run import run, train_from_store
from distill.runs.folder import RunPaths
from distill.runtime.launch import Launch
from distill.runtime.progress import Console
from distill.training.data import load_batch
from distill.training.distributed import TrainingModule
from distill.training.optimizer import initial_learning_rate
from distill.training.validation import ValidationScore, validation_score
from students.model.build import build_student, student_config
from students.model.shape import StudentSize
from teachers import example_teacher
from teachers.base import SINGLE_PROCESS
from teachers.gguf.file import GGUFFile
from teachers.gguf.llama_weights import NotALlama
from teachers.store.teacher_record import TeacherRecord

SHORT = ["data.held_out=0.2", "train.epochs=1", "train.evaluations=2", "safety.labels=none"]


@dataclass(frozen=True)
class Setting:
    """A teacher's file and a store of what it says."""

    teacher: Path
    store: Path

    def config(self, *settings: str) -> RunConfig:
        overrides = {"teacher.path": str(self.teacher), "student.size": "32x1", "data.samples": 24}
        return load_config(None, overrides, [*SHORT, "data.max_length=24", *settings])

    @property
    def kept(self) -> TeacherRecord:
        return open_full_store(self.store)[1]

    def settled(self, *settings: str, here: bool = True) -> RunConfig:
        """The settings with a beginning, where the teacher's file is here or not."""
        info = self.kept.info
        gguf = self.teacher if here else None
        return resolve(self.config(*settings), info, self.kept.tokenizer, gguf, Console()).config

    def begun(self, config: RunConfig, path: Path) -> dict[str, Tensor]:
        """The weights that a student begins at."""
        texts = [open_full_store(self.store)[0].tokens(index) for index in range(8)]
        launch = Launch(SINGLE_PROCESS)
        return begin(config, self.kept, self.teacher, texts, path, launch, Console()).state_dict()


@pytest.fixture(scope="module")
def setting(tiny_teacher_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    found = Setting(tiny_teacher_path, tmp_path_factory.mktemp("beginning") / "store")
    capture_only(found.config(), found.store, Console())
    return found


def test_auto_takes_the_teachers_weights(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default where the file is there; else it falls back, but an explicit wish does not."""
    config = setting.settled()
    assert config.student.init == "teacher" and config.train.learning_rate is None
    assert setting.settled("student.init=random").student.init == "random"
    assert setting.settled(here=False).student.init == "embeddings"
    assert "its file is not here" in capsys.readouterr().out
    with pytest.raises(UserError, match="--teacher"):
        setting.settled("student.init=teacher", here=False)


def test_another_layout_falls_back_and_says_why(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An architecture whose weights cannot be read is no error, but it is said."""

    def refuse(config: object, file: GGUFFile) -> None:
        raise NotALlama(f"{file.path} is of architecture gemma")

    monkeypatch.setattr("distill.initialization.start.require_usable_weights", refuse)
    for init in ("auto", "teacher"):
        assert setting.settled(f"student.init={init}").student.init == "embeddings", init
        assert "architecture gemma" in " ".join(capsys.readouterr().out.split()), init


def test_the_nearer_to_the_teacher_the_lower_the_rate(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """√KL / 2 of the usual one from a teacher's weights, between a fiftieth and a half, and less
    where there are few steps; √KL of it for a base, whatever the steps."""
    store = open_full_store(setting.store)[0]
    batches = [load_batch(store, range(4))]
    vocab_size = int(store.manifest.identity["vocab_size"])
    shape = student_config(StudentSize(32, 1), vocab_size=vocab_size, context_length=64)
    student = build_student(shape, 0)
    usual = 0.5 / 32

    def rate(init: str = "teacher", given: float | None = None, steps: int = 64) -> float:
        config = TrainConfig(learning_rate=given)
        return initial_learning_rate(config, student, init, batches, steps)

    kl = validation_score(TrainingModule(student, Objective(LossConfig())), batches).kl
    assert kl > 0
    assert rate() == pytest.approx(usual * min(0.5, max(0.02, 0.5 * kl**0.5)))
    assert rate("random") == usual
    assert rate(given=0.003) == 0.003
    assert rate(steps=10_000) == rate()
    assert rate(steps=16) == pytest.approx(rate() / 2)
    assert rate("random", steps=1) == usual
    for kl, share in ((4.0, 0.5), (0.25, 0.25), (1e-6, 0.02), (-1e-9, 0.02)):
        score = ValidationScore(kl, 1.0, 1.0)
        monkeypatch.setattr(
            "distill.training.optimizer.validation_score", lambda *_, score=score: score
        )
        assert rate() == pytest.approx(share * usual), kl
        of_base = max(0.02, min(1.0, 2 * share)) if kl > 0.01 else 0.02
        assert rate("base") == rate("base", steps=2) == pytest.approx(of_base * usual), kl


def test_every_beginning_is_what_it_says(setting: Setting, tmp_path: Path) -> None:
    """Random weights are those of the seed; the others change embeddings, or everything."""
    changed = {}
    for init in ("random", "embeddings", "teacher"):
        config = setting.settled(f"student.init={init}")
        found = setting.begun(config, tmp_path / init)
        plain = build_student(student_shape(config, setting.kept.info), config.seed).state_dict()
        changed[init] = {name for name in plain if not torch.equal(found[name], plain[name])}
    assert changed["random"] == set()
    assert changed["embeddings"] == {"model.embed_tokens.weight", "lm_head.weight"}
    for part in ("self_attn.q_proj", "mlp.down_proj"):
        assert f"model.layers.0.{part}.weight" in changed["teacher"]


def test_a_head_start_is_computed_once(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rerun takes it from the file; a damaged file is made again, to the same bytes."""
    config = setting.settled()
    path = tmp_path / "beginning.safetensors"
    first = setting.begun(config, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    setting.begun(config, path)
    assert path.read_bytes() == whole
    monkeypatch.setattr("distill.initialization.start.student_from_teacher", None)
    again = setting.begun(config, path)
    for name, value in first.items():
        assert torch.equal(again[name], value), name


def test_run_and_train_give_the_same_student(setting: Setting, tmp_path: Path) -> None:
    """Both begin at the teacher's weights, and nothing of the beginning is left behind."""
    folder = run(setting.config(), RunPaths(tmp_path / "run", setting.store), Console())
    given = {"store": setting.store, "student.size": "32x1", "teacher.path": setting.teacher}
    config = load_config(None, {key: str(value) for key, value in given.items()}, SHORT)
    other = train_from_store(config, tmp_path / "train", Console())
    for place in (folder, other):
        assert place.read_config().student.init == "teacher" and not place.beginning.exists()
    ours, theirs = (load_file(place.student / "model.safetensors") for place in (folder, other))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert folder.gguf.read_bytes() == other.gguf.read_bytes()


def test_the_teacher_of_a_store_is_found(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example teacher by itself; of any other the file must be given, and be that one."""
    info, other = setting.kept.info, str(example_teacher())
    assert find_teacher(None, info) is None
    assert find_teacher(str(setting.teacher), info) == setting.teacher
    with pytest.raises(UserError, match="not the teacher whose soft targets"):
        find_teacher(other, info)
    arguments = ["distill", "train", str(setting.store), "--teacher", other]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "not the teacher whose soft targets" in " ".join(capsys.readouterr().err.split())
