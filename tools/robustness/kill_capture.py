"""Kills a capture at random moments, again and again, and compares what comes out with an
undisturbed store.

python -m tools.robustness.kill_capture --kills 50
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEXTS = 2000  # eight shards


def command(folder: Path, data: Path) -> list[str]:
    """The capture as a user runs it."""
    return [sys.executable, "-m", "distill", "capture", "--data", str(data), "--store", str(folder)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store but the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def main() -> None:
    """Parse the command line, kill and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as root:
        data = Path(root) / "data.jsonl"
        words = [
            chance.choice(("order", "gloves", "budget", "sample", "tank", "room"))
            for _ in range(40)
        ]
        lines = [" ".join(chance.sample(words, 30)) + f" {index}" for index in range(TEXTS)]
        data.write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
        begin = time.monotonic()
        whole = Path(root) / "whole"
        subprocess.run(command(whole, data), check=True, stdout=subprocess.DEVNULL)
        duration = time.monotonic() - begin
        expected, kills, stores = contents(whole), 0, 0
        while kills < options.kills:
            folder = Path(root) / f"killed-{stores}"
            while True:
                process = subprocess.Popen(
                    command(folder, data), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                try:
                    code = process.wait(timeout=chance.uniform(0.25, 0.75) * duration)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    kills += 1
                    continue
                assert code == 0, f"exit code {code}"
                break
            result = contents(folder)
            left = [name for name in result if name not in expected]
            assert all(name.startswith(".") for name in left), left
            assert {name: result[name] for name in expected} == expected, "a store differs"
            stores += 1
            print(f"{kills} kills, {stores} stores, all equal to the undisturbed one", flush=True)


if __name__ == "__main__":
    main()
