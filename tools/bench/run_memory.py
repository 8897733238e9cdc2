"""Peak main memory of every stage of a run with a base model, beside what ``distill plan`` says.

    python -m tools.bench.run_memory [--width 1536 --layers 12] [--four-bits] [--json FILE]

The base has Phi-3.5-mini's proportions and random weights; the teacher is small and has the same
vocabulary. All processes of the run are looked at together, every twentieth of a second: what they
cannot give back (anonymous memory), and that with the files they have mapped, of which the system
takes back what it needs. A page that several share counts once. Linux only.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from tools.machine import Timing, child_command, machine, machine_line, timed, write_json
from tools.models.make_base import make_large
from tools.models.random_teacher import shape_of, write

VOCABULARY = 32064
# The line that a stage of the run ends with, and the stage of the plan that it belongs to.
STAGES = {
    "Capture": "capture",
    "Load base": "initialization",
    "Train": "training",
    "Importance": "export",
    "Export and prove": "export",
    "Plain folder": "export",
    "Evaluate": "evaluation",
    "Score heads": "evaluation",
}


@dataclass(frozen=True)
class Sample:
    """Bytes of all processes at a moment: what they cannot give back, and with mapped files."""

    moment: float
    kept: int
    whole: int


def sample(process: int, begin: float) -> Sample:
    """Look at a process and all below it."""
    kept = whole = 0
    try:
        tree = [psutil.Process(process), *psutil.Process(process).children(recursive=True)]
    except psutil.NoSuchProcess:
        tree = []
    for one in tree:
        try:
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        except OSError:  # it has just ended
            continue
        sizes = {
            name: int(rest.split()[0]) << 10
            for name, _, rest in (line.partition(":") for line in lines[1:])
        }
        whole += sizes["Pss"]
        kept += sizes["Pss_Anon"] + sizes["Pss_Shmem"]
    return Sample(time.time() - begin, kept, whole)


def by_line(samples: list[Sample], timing: Timing) -> dict[str, tuple[int, int]]:
    """The peaks of each stage that prints a line when it is over, gaps counted to the next one."""
    ends = {
        name: moment
        for name in STAGES
        for line, moment in timing.lines.items()
        if line.startswith(f"✓ {name} ")
    }
    peaks: dict[str, tuple[int, int]] = {}
    for (_, start), (name, end) in pairwise([("", 0.0), *sorted(ends.items(), key=lambda e: e[1])]):
        some = [one for one in samples if start < one.moment <= end]
        if some:
            peaks[name] = max(one.kept for one in some), max(one.whole for one in some)
    return peaks


def main() -> None:
    """Make base and teacher, run, and print the peaks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--four-bits", action="store_true", help="the base in NF4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workdir", type=Path, help="where base and teacher are kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*", help="SECTION.KEY=VALUE of the run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kept = options.workdir or folder
        teacher, base = kept / "teacher.gguf", kept / f"base-{options.width}x{options.layers}"
        if not teacher.exists():
            write(teacher, shape_of("256x2", VOCABULARY), "q8_0", 0)
        if not base.exists():
            make_large(base, teacher=teacher, width=options.width, layers=options.layers)
        data = folder / "data.txt"
        data.write_text("\n\n".join(chr(0x4E00 + n) * 120 for n in range(24)), encoding="utf-8")
        settings = ["data.max_length=128", "train.evaluations=2", "safety.labels=none"]
        settings += ["data.held_out=0.2", "train.epochs=1", *options.settings]
        command = child_command(
            "distill",
            "run",
            "--teacher",
            teacher,
            "--student-base",
            base,
            "--data",
            data,
            "--quant",
            "q4_k_m",
            "--out",
            folder / "run",
            *(word for setting in settings for word in ("--set", setting)),
            *(["--load-in-4bit"] if options.four_bits else []),
        )
        samples: list[Sample] = []
        begin = time.time()
        timing = timed(
            command,
            folder,
            options.threads,
            folder / "run" / "student.gguf",
            lambda process: samples.append(sample(process, begin)),
        )
        size = 2 * sum(file.stat().st_size for file in base.glob("*.safetensors"))
        peaks = by_line(samples, timing)
    console = Console()
    console.print(machine_line(machine(options.threads)))
    table = Table("stage", "cannot be given back", "of the model", "with mapped files")
    for name, (own, whole) in peaks.items():
        table.add_row(name, f"{own / 1e9:.2f} GB", f"{own / size:.2f}", f"{whole / 1e9:.2f} GB")
    console.print(f"The model in float32: {size / 1e9:.2f} GB", table)
    if options.json:
        write_json(options.json, {"model_bytes": size, "peaks": peaks, "lines": asdict(timing)})


if __name__ == "__main__":
    main()
