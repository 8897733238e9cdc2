"""Ctrl-C that is not lost.

Python raises KeyboardInterrupt wherever the main thread is; inside a finalizer or a native
library's callback it is printed or dropped. So it is remembered, and raised again when the program
next reports progress.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

EXIT_INTERRUPTED = 130
AGAIN_SECONDS = 0.05
STARTED_BY = "DISTILL_STARTED_BY"  # number and time of creation of a process
STARTER_SECONDS = 1.0
_seen = False


def watch() -> None:
    """Remember Ctrl-C from now on (in the main thread, where Python handles signals).

    Where Python would print it and go on, it is raised again a little later.
    """
    if threading.current_thread() is not threading.main_thread() or not _is_pythons_own():
        return
    signal.signal(signal.SIGINT, _remember)
    before = sys.unraisablehook

    def raise_again(found: Any) -> None:
        if isinstance(found.exc_value, KeyboardInterrupt):
            threading.Timer(AGAIN_SECONDS, _interrupt).start()
        else:
            before(found)

    sys.unraisablehook = raise_again


def _interrupt() -> None:
    """Raise KeyboardInterrupt in the main thread, also where it waits for something."""
    if sys.platform == "win32":
        _thread.interrupt_main()  # which a wait does not notice before its end
    else:
        ident = threading.main_thread().ident
        assert ident is not None
        signal.pthread_kill(ident, signal.SIGINT)


def starter() -> str:
    """This process, as ``STARTED_BY`` tells a worker."""
    return f"{os.getpid()} {_created(os.getpid())}"


def end_with_starter() -> None:
    """End as by Ctrl-C once the process that ``STARTED_BY`` names is gone: one that is killed takes
    none of its workers with it."""
    number, _, created = os.environ.get(STARTED_BY, "").partition(" ")
    if not created:
        return

    def wait() -> None:
        while str(_created(int(number))) == created:
            time.sleep(STARTER_SECONDS)
        _interrupt()

    threading.Thread(target=wait, daemon=True).start()


def _created(number: int) -> float | None:
    """When that process was created; ``None`` where there is none."""
    import psutil  # with a start of its own, which most commands can do without

    try:
        process = psutil.Process(number)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.NoSuchProcess:
        return None


def ignore() -> None:
    """Take no further Ctrl-C: the program ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
