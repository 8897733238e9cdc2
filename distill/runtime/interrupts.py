"""Ctrl-C that is not lost.

Python raises KeyboardInterrupt wherever the main thread happens to be. Inside a finaliser or a
callback of a native library it is printed or dropped, and the program goes on as if nobody had
pressed anything. So it is remembered, and raised again at the next place where the program says how
far it is.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

_seen = False


def watch() -> None:
    """Remember Ctrl-C from now on (in the main thread, where Python handles signals)."""
    if threading.current_thread() is threading.main_thread() and _is_pythons_own():
        signal.signal(signal.SIGINT, _remember)


def check() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed."""
    if _seen:
        raise KeyboardInterrupt


def _is_pythons_own() -> bool:
    """Whether SIGINT is handled as Python does by itself: one that is ignored (in the
    background) stays so."""
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _remember(number: int, frame: FrameType | None) -> None:
    global _seen
    _seen = True
    raise KeyboardInterrupt
