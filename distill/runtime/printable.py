"""Terminal output: decisions in color, warnings, and foreign text without control characters."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape

# Control characters but tab and line end, and the signs that reorder what is around them (Unicode's
# bidi controls).
_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")

COLORS = {"ALLOW": "green", "ESCALATE": "yellow", "REFUSE": "red"}


def colored(decision: str | None) -> str:
    """A safety decision as Rich's markup; nothing for none."""
    return "" if decision is None else f"[bold {COLORS[decision]}]{decision}[/]"


def printable(text: str) -> str:
    """``text`` with terminal controls made visible, such as ``␛[31m`` and ``\\u202e``."""
    return _STEERS.sub(lambda match: _sign(match[0]), text)


def markup(text: str) -> str:
    """``text`` from elsewhere for Rich: neither its markup nor terminal controls act."""
    return escape(printable(text))


def printable_line(text: str) -> str:
    """``text`` on one line, as UTF-8 can hold it: each sign that cannot be printed becomes �."""
    return "".join(sign if sign.isprintable() else "�" for sign in text)


def json_line(value: Any) -> str:
    """``value`` as one line of JSON, non-ASCII as it is, terminal controls escaped."""
    line = json.dumps(value, ensure_ascii=False)
    return _STEERS.sub(lambda match: f"\\u{ord(match[0]):04x}", line)


class WarningLines(logging.Handler):
    """Shows what the lower packages log, warnings above all, as lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        text = markup(" ".join(record.getMessage().split()))
        RichConsole(stderr=True, highlight=False).print(f"[yellow]! {text}[/]", soft_wrap=True)


def show_warnings(*, quiet: bool) -> None:
    """Show what ``teachers``, ``students`` and ``stability`` warn of; ``quiet``: errors only."""
    handler = WarningLines(logging.ERROR if quiet else logging.WARNING)
    for package in ("teachers", "students", "stability"):
        logger = logging.getLogger(package)
        logger.handlers, logger.propagate = [handler], False


def _sign(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's pictures of control characters
    return "\u2421" if code == 0x7F else f"\\u{code:04x}"
