"""Chat templates written for these tests, with the features of those of well-known families."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent
FAMILIES = tuple(sorted(path.stem for path in _FOLDER.glob("*.jinja")))


def family(name: str) -> str:
    """One of the templates."""
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")
