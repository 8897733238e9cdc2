"""A run's folder: whose it is, also after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.config.schema import RunConfig
from distill.runs import folder
from distill.runs.folder import RunFolder
from teachers.atomic_files import write_whole


def test_a_folder_claimed_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two files that claim it, the same settings may claim it again."""
    run, config, written = RunFolder(tmp_path), RunConfig(), list[str]()

    def once(path: Path, data: bytes) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path.name)
        write_whole(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_whole", once)
        with pytest.raises(KeyboardInterrupt):
            run.claim(config, {"teacher_name": "a"})
    assert [path.name for path in tmp_path.iterdir()] == written and len(written) == 1
    run.claim(config, {"teacher_name": "a"})
    assert run.read_identity() == {"teacher_name": "a"}
