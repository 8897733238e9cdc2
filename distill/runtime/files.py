"""Folders that appear whole or not at all, and text files of the user, read line by line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.errors import UserError


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that replaces ``final`` once everything is in it."""
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if final.exists():
            shutil.rmtree(final)  # from an earlier, interrupted end of this same run
        temporary.replace(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_text(path: Path, what: str, max_bytes: int | None = None) -> str:
    """A user's text file; ``what`` names it in errors.

    Raises:
        UserError: unreadable, larger than ``max_bytes``, or not UTF-8.
    """
    try:
        if max_bytes is not None and path.stat().st_size > max_bytes:
            raise UserError(
                f"{what} {path}: larger than {max_bytes >> 20} MiB; give a smaller file"
            )
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{what} {path}, line {line}: not UTF-8 (byte {error.start}); convert it"
        ) from None


def json_lines(text: str, source: str) -> Iterator[tuple[int, Any]]:
    """Each line's number and value but for blank lines; ``UserError`` names ``source`` and line."""
    for number, line in enumerate(text.split("\n"), 1):  # JSON may contain other line ends
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number with too many digits
            raise UserError(
                f"{source}, line {number} is not JSON ({error}); each line must be one JSON object"
            ) from None
        yield number, value


def require_unicode(value: Any, where: str) -> None:
    """Raise ``UserError`` for text that UTF-8 cannot encode: JSON may spell half a surrogate
    pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: has a lone surrogate (\\ud800 to \\udfff), which is not text; remove it"
        ) from None
