"""The command line's outermost part: Ctrl-C is looked after before what takes long to import."""

from __future__ import annotations

import sys

from distill.runtime import interrupts


def main() -> None:
    """Run the command line and exit with 0 (done), 2 (the user's input), 1 (ours) or 130
    (interrupted)."""
    interrupts.watch()
    interrupts.end_with_starter()
    try:
        from distill.commands.app import run_command

        run_command()
    except KeyboardInterrupt:
        interrupts.ignore()
        print(
            "error: interrupted; everything saved is kept, and the same command goes on from what "
            "is there",
            file=sys.stderr,
        )
        sys.exit(interrupts.EXIT_INTERRUPTED)
