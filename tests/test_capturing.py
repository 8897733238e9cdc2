"""What `run` and `capture` share: which recipe, which part of the work, and one store for all of a launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill.capturing import capture_only, launched_share, recipe_for
from distill.config import TargetsConfig, load_config
from distill.console import Console
from distill.errors import UserError
from teachers.base import TeacherInfo
from teachers.gguf_teacher import GGUFTeacher
from teachers.inheritance import TEACHER, need_inheritance
from teachers.recipe import Recipe
from teachers.share import Share
from tests.conftest import Bent


def test_the_default_has_no_sketch_where_states_cannot_stand_for_logits(
    example_gguf: GGUFTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said once, and captured without; a sketch that was asked for is not taken away silently."""
    bent: Any = Bent(example_gguf)
    assert recipe_for(TargetsConfig(), example_gguf, Console()).sketch_bytes > 0
    assert not capsys.readouterr().out
    assert recipe_for(TargetsConfig(), bent, Console()) == Recipe(num_topk=16, sketch_bytes=0)
    assert "no sketch of the tail" in " ".join(capsys.readouterr().out.split())
    assert recipe_for(TargetsConfig(sketch_bytes=30), bent, Console()).sketch_bytes == 30
    assert recipe_for(TargetsConfig(kind="dense", layers=(3, 0, 3)), bent, Console()).layers == (0, 3)
    with pytest.raises(UserError, match=r"targets\.layers = 6.*layers 0 to 5"):
        recipe_for(TargetsConfig(layers=(0, 6)), example_gguf, Console())


@pytest.mark.parametrize(
    ("rank", "world", "share"),
    [(None, None, Share(0, 1)), ("0", "1", Share(0, 1)), ("2", "3", Share(2, 3)), (None, "4", Share(0, 4))],
)
def test_the_launcher_gives_each_process_its_share(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, world: str | None, share: Share
) -> None:
    """RANK and WORLD_SIZE as torchrun sets them; without them, everything."""
    set_environment(monkeypatch, rank, world)
    assert launched_share() == share


@pytest.mark.parametrize(("rank", "world"), [("3", "3"), ("-1", "2"), ("x", "2"), ("1", ""), ("0", "0")])
def test_a_share_that_does_not_exist_is_refused(
    monkeypatch: pytest.MonkeyPatch, rank: str, world: str
) -> None:
    """Rather than capture nothing, or everything twice."""
    set_environment(monkeypatch, rank, world)
    with pytest.raises(UserError, match=r"RANK='.*WORLD_SIZE='"):
        launched_share()


def set_environment(monkeypatch: pytest.MonkeyPatch, rank: str | None, world: str | None) -> None:
    """As a launcher would, or not at all."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


def read_info(path: Path) -> TeacherInfo:
    """The facts about a teacher file."""
    with GGUFTeacher(path, threads=1) as teacher:
        return teacher.info


def test_ranks_capture_one_store(
    tiny_teacher_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`distill capture` by two ranks of a launch: one complete store, which a third capture only looks at."""
    monkeypatch.chdir(tmp_path)
    config = load_config(
        None, {"teacher.path": str(tiny_teacher_path), "data.samples": 600}, ["data.max_length=24"]
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        store = capture_only(config, None, Console())
    assert [store.state(shard) for shard in range(3)] == ["complete"] * 3
    # Only the first process keeps what is the teacher's; the second leaves that to it.
    (store.folder / TEACHER).unlink()
    for rank, there in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        capture_only(config, None, Console())
        assert (store.folder / TEACHER).exists() == there
    assert need_inheritance(store).info == read_info(tiny_teacher_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    capsys.readouterr()
    assert capture_only(config, None, Console()).folder == store.folder
    said = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "skipped" in said and "sequences 600" in said
    assert f"bytes per position {store.manifest.recipe.bytes_per_position(1024, 64)} every" in said
