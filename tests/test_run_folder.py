"""A run's folder: whose it is, also after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.config import RunConfig
from distill.run_folder import RunFolder


def test_a_folder_claimed_in_part_is_still_this_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two files that claim it, the same settings may claim it again."""
    folder, config = RunFolder(tmp_path / "run"), RunConfig()
    folder.path.mkdir()
    real = RunFolder._write
    written: list[str] = []

    def once(self: RunFolder, path: Path, content: object) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path.name)
        real(self, path, content)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_write", once)
        with pytest.raises(KeyboardInterrupt):
            folder.claim(config, {"teacher_name": "a"})
    assert len(written) == 1
    folder.claim(config, {"teacher_name": "a"})
    assert folder.read_identity() == {"teacher_name": "a"}
