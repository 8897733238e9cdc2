"""What `run` and `capture` share: the recipe, the part of the work, one store for a launch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.capture import capture
from distill.capture.store_setup import recipe_for
from distill.config.loading import load_config
from distill.config.schema import TargetsConfig
from distill.errors import UserError
from distill.pipeline.capture import capture_only
from distill.runtime.launch_environment import process_rank
from distill.runtime.progress import Console
from teachers.base import ProcessRank
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.teacher_record import TEACHER, require_teacher_record
from teachers.targets.recipe import Recipe
from tests.support.children.capture_child import Source
from tests.support.teachers import Bent


def test_the_default_recipe(example_gguf: GGUFTeacher, capsys: pytest.CaptureFixture[str]) -> None:
    """Said once, and captured without; a sketch that was asked for is not taken away silently.

    Text that the teacher writes is tried on its beginning.
    """
    bent: Any = Bent(example_gguf)
    for spoken in (False, True):
        source = Source(spoken)
        assert recipe_for(TargetsConfig(), example_gguf, source, Console()).sketch_bytes > 0
        assert not capsys.readouterr().out
        recipe = recipe_for(TargetsConfig(), bent, source, Console())
        assert recipe == Recipe(num_topk=16, sketch_bytes=0)
        said = " ".join(capsys.readouterr().out.split())
        assert "no sketch of the tail" in said and "!" not in said
    assert recipe_for(TargetsConfig(sketch_bytes=30), bent, source, Console()).sketch_bytes == 30
    dense = TargetsConfig(kind="dense", layers=(3, 0, 3))
    assert recipe_for(dense, bent, source, Console()).layers == (0, 3)
    with pytest.raises(UserError, match=r"targets\.layers = 6.*layers 0 to 5"):
        recipe_for(TargetsConfig(layers=(0, 6)), example_gguf, source, Console())


def test_data_without_variety_is_refused_at_once(tiny_teacher: GGUFTeacher, tmp_path: Path) -> None:
    """Named, before anything is captured; what the teacher writes may still differ."""
    for name, row in (("same", {"text": "The same line."}), ("asked", {"prompt": "Hi"})):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(f"{json.dumps(row)}\n" * 3)
        config = load_config(None, {"teacher.path": "t.gguf", "data.path": str(path)}, [])
        if name == "asked":
            assert len(capture.read_data(config, tiny_teacher, Console(quiet=True))) == 3
            continue
        with pytest.raises(UserError, match=r"same\.jsonl.*all 3 sequences"):
            capture.read_data(config, tiny_teacher, Console(quiet=True))


def test_the_launcher_gives_each_process_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK and WORLD_SIZE as torchrun sets them; without them, everything; no wrong share."""
    shares = {(None, None): ProcessRank(0, 1), ("0", "1"): ProcessRank(0, 1)}
    shares |= {("2", "3"): ProcessRank(2, 3), (None, "4"): ProcessRank(0, 4)}
    wrong = [("3", "3"), ("-1", "2"), ("x", "2"), ("1", ""), ("0", "0")]
    for row in (*shares, *wrong):
        for name, value in zip(("RANK", "WORLD_SIZE"), row, strict=True):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        if row in shares:
            assert process_rank() == shares[row], row
        else:
            with pytest.raises(UserError, match=r"RANK='.*WORLD_SIZE='"):
                process_rank()
                pytest.fail(f"{row} is accepted")


def test_ranks_capture_one_store(
    tiny_teacher: GGUFTeacher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`distill capture` by two ranks: one complete store, which a third capture only looks at, and
    what is missing of it beside soft targets is made by any."""
    monkeypatch.chdir(tmp_path)
    # The one that runs already stands for the teacher that each capture would start and close.
    monkeypatch.setattr(capture, "open_teacher", lambda config: tiny_teacher)
    monkeypatch.setattr(GGUFTeacher, "__exit__", lambda *_: None)
    flags = {"teacher.path": str(tiny_teacher.file.path), "data.samples": 600}
    config = load_config(None, flags, ["data.max_length=24"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        store = capture_only(config, None, Console())
    assert [store.state(shard) for shard in range(3)] == ["complete"] * 3
    (store.folder / TEACHER).unlink()
    capture_only(config, None, Console())  # whoever finds it missing
    assert require_teacher_record(store).info == tiny_teacher.info
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    capsys.readouterr()
    assert capture_only(config, None, Console()).folder == store.folder
    said = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "skipped" in said and "sequences 600" in said
    codec = store.shared_codec()
    assert codec is not None and codec.sketch is not None
    each, kl = int(codec.sketch["bytes"]), codec.sketch["kl"]
    assert f"bytes per position {16 * 4 + 24 + 2 + each} of that, the tail's shape {each}," in said
    assert f"to a KL of {kl:.2g} every" in said
