"""Ctrl-C that a finalizer swallowed is raised again."""

from __future__ import annotations

import subprocess
import sys

SWALLOWED = """
import os, signal, time
from distill.runtime import interrupts
from distill.runtime.progress import Console

interrupts.watch()

class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass

try:
    Swallows()
    time.sleep(60)
    print("not reached")
except KeyboardInterrupt:
    print("raised again")
try:
    with Console().stage("Next"):
        print("not reached")
except KeyboardInterrupt:
    print("and at the next stage")
"""


def test_a_swallowed_interrupt_is_raised_again() -> None:
    """Python prints and drops what a finalizer raises; the program must stop all the same."""
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWED], capture_output=True, text=True, timeout=120
    )
    said = ["raised again", "and at the next stage"]
    assert done.stdout.splitlines() == said and not done.stderr, done.stdout + done.stderr


def test_an_ignored_signal_stays_ignored() -> None:
    """A job in the background is started with SIGINT ignored."""
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from distill.runtime import interrupts; interrupts.watch()\n"
        "print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN); interrupts.check()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.strip() == "True"
