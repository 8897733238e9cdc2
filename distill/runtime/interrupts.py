"""Ctrl-C that is not lost.

Python raises KeyboardInterrupt wherever the main thread is; inside a finalizer or a native
library's callback it is printed or dropped. So it is remembered, and raised again when the program
next reports progress.
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
    """Whether SIGINT has Python's handler: one that is ignored (in the background) stays so."""
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _remember(number: int, frame: FrameType | None) -> None:
    global _seen
    _seen = True
    raise KeyboardInterrupt
