"""The command line: parses, calls one function, maps errors to exit codes (0 done, 2 the user's input, 1 ours)."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

# Set before torch and transformers are imported: no telemetry, no look-ups on the network, no progress bars
# of theirs between ours.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Threads that wait for each other give way after a few microseconds instead of milliseconds: nothing lost on a quiet
# machine, and on a busy one a training step is several times as fast (docs/benchmarks.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import typer
from rich.console import Console as RichConsole
from rich.markup import escape

from distill import __version__
from distill.exit_codes import EXIT_INTERRUPTED, exit_code, one_line
from distill.interrupts import watch

if TYPE_CHECKING:
    from distill.console import Console

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Distil a quantized GGUF teacher into a small SO8T student that stock llama.cpp and Ollama load.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"distill {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


Teacher = Annotated[
    Path | None, typer.Option("--teacher", help="GGUF file of the teacher. Default: the example teacher.")
]
StudentSize = Annotated[
    str | None,
    typer.Option(
        "--student-size",
        metavar="WIDTHxLAYERS|SHARE%|NUMBER",
        help="512x4, 25% (of the teacher's parameters) or 50M (parameters; K, M, B). "
        "Default: half the teacher's width and depth.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="JSONL (prompt, messages or text), plain text, or a folder of them. Default: the teacher speaks.",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", help="Sequences at most. Default: all the data; 4096 when the teacher speaks."),
]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the soft targets. Default: 8.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything random. Default: 0.")]
Targets = Annotated[
    str | None,
    typer.Option(
        "--targets", metavar="compact|hidden|dense", help="What is kept of the teacher. Default: compact."
    ),
]
Store = Annotated[
    Path | None,
    typer.Option(
        "--store", help="Folder of the soft targets. Default: beside the run's folder, under stores/."
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run. Default: a new one under runs/.")]
StudentQuant = Annotated[
    str | None,
    typer.Option("--quant", metavar="f32|f16|q8_0", help="Format of student.gguf. Default: q8_0."),
]
Preset = Annotated[
    str,
    typer.Option(
        metavar="recommended|formula",
        help="Where settings start from: what measured best (T = 1), or the loss formula's own defaults (T = 3).",
    ),
]
Init = Annotated[
    str | None,
    typer.Option(
        metavar="auto|teacher|embeddings|random",
        help="Where the student's weights begin. Default: auto, at the teacher's where its architecture allows it.",
    ),
]
StudentBase = Annotated[
    Path | None,
    typer.Option(
        "--student-base",
        metavar="FOLDER",
        help="A transformers model with the teacher's vocabulary (llama, phi3, qwen2, qwen3) that becomes the student: "
        "frozen, with LoRA and SO(8) gates. In place of --student-size.",
    ),
]
LoraRank = Annotated[
    int | None, typer.Option("--lora-r", help="Rank of LoRA, with --student-base. Default: 16.")
]
LoadIn4bit = Annotated[
    bool, typer.Option("--load-in-4bit", help="The base in NF4, through bitsandbytes, with --student-base.")
]
SafetyLabels = Annotated[
    str | None,
    typer.Option(
        metavar="builtin|teacher|FILE|none",
        help="What the safety head learns: the prompts that come with the program, the teacher's own judgment of them, "
        "a JSONL file of prompt and label, or nothing. Default: builtin.",
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="JSON or YAML settings; flags win over it.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Any other setting, for example train.batch_size=32. Repeatable.",
    ),
]


@app.command()
def run(
    teacher: Teacher = None,
    student_size: StudentSize = None,
    student_base: StudentBase = None,
    lora_r: LoraRank = None,
    load_in_4bit: LoadIn4bit = False,
    data: Data = None,
    out: Out = None,
    samples: Samples = None,
    epochs: Epochs = None,
    seed: Seed = None,
    targets: Targets = None,
    quant: StudentQuant = None,
    safety_labels: SafetyLabels = None,
    store: Store = None,
    init: Init = None,
    preset: Preset = "recommended",
    config: ConfigFile = None,
    set_: Settings = None,
) -> None:
    """Teacher in, proved student out: capture, train, export, prove, evaluate."""
    from distill.config import load_config
    from distill.pipeline import Places
    from distill.pipeline import run as run_pipeline

    overrides = _what_to_capture(teacher, data, samples, targets, seed) | {
        "student.size": student_size,
        **_base(student_base, lora_r, load_in_4bit, config),
        "train.epochs": epochs,
        "export.quant": quant,
        "safety.labels": safety_labels,
        "student.init": init,
    }
    run_pipeline(load_config(config, overrides, set_ or [], preset), Places(out, store), _console())


@app.command()
def capture(
    teacher: Teacher = None,
    data: Data = None,
    samples: Samples = None,
    targets: Targets = None,
    store: Store = None,
    seed: Seed = None,
    safety_labels: SafetyLabels = None,
    config: ConfigFile = None,
    set_: Settings = None,
) -> None:
    """Only the teacher's part: fill a store of soft targets, or continue one.

    Under torchrun or accelerate launch each process captures its own shards of the same store.
    """
    from distill.capturing import capture_only
    from distill.config import load_config
    from distill.console import Console

    overrides = _what_to_capture(teacher, data, samples, targets, seed) | {"safety.labels": safety_labels}
    capture_only(load_config(config, overrides, set_ or []), store, Console())


@app.command()
def train(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Folder that `distill capture` has filled.")],
    student_size: StudentSize = None,
    student_base: StudentBase = None,
    lora_r: LoraRank = None,
    load_in_4bit: LoadIn4bit = False,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="The store's own teacher, for the student to begin at its weights. Default: not here."
        ),
    ] = None,
    out: Out = None,
    epochs: Epochs = None,
    seed: Seed = None,
    quant: StudentQuant = None,
    safety_labels: SafetyLabels = None,
    init: Init = None,
    preset: Preset = "recommended",
    config: ConfigFile = None,
    set_: Settings = None,
) -> None:
    """Only the student's part: from a store to a proved student, with no teacher on this machine."""
    from distill.config import load_config
    from distill.pipeline import train_from_store

    overrides = {
        "store": str(store),
        "student.size": student_size,
        **_base(student_base, lora_r, load_in_4bit, config),
        "train.epochs": epochs,
        "seed": seed,
        "export.quant": quant,
        "safety.labels": safety_labels,
        "student.init": init,
        "teacher.path": str(teacher) if teacher else None,
    }
    train_from_store(load_config(config, overrides, set_ or [], preset), out, _console())


@app.command()
def plan(
    teacher: Teacher = None,
    student_size: StudentSize = None,
    student_base: StudentBase = None,
    lora_r: LoraRank = None,
    load_in_4bit: LoadIn4bit = False,
    data: Data = None,
    samples: Samples = None,
    epochs: Epochs = None,
    targets: Targets = None,
    seed: Seed = None,
    init: Init = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory that training is to fit into, such as 12GiB; says what would help."),
    ] = None,
    preset: Preset = "recommended",
    config: ConfigFile = None,
    set_: Settings = None,
) -> None:
    """Say before a run what it will take: tokens, disk, time and memory, from a short measured probe."""
    from distill.adapter_memory import parse_memory
    from distill.config import load_config
    from distill.console import Console
    from distill.errors import UserError
    from distill.plan import plan_run

    overrides = _what_to_capture(teacher, data, samples, targets, seed) | {
        "student.size": student_size,
        **_base(student_base, lora_r, load_in_4bit, config),
        "student.init": init,
        "train.epochs": epochs,
    }
    try:
        limit = None if memory is None else parse_memory(memory)
    except ValueError as error:
        raise UserError(f"--memory {error}") from None
    plan_run(load_config(config, overrides, set_ or [], preset), Console(), limit)


def _console() -> Console:
    """Where a command prints; in a launch of several processes the first one speaks."""
    from distill.console import Console
    from distill.launch import launched_share

    return Console(quiet=launched_share().rank > 0)


def _base(
    folder: Path | None, rank: int | None, load_in_4bit: bool, config: Path | None
) -> dict[str, object]:
    """The flags of a student made of a base, as settings; without a file of settings it must be named here."""
    if folder is None and config is None and (rank is not None or load_in_4bit):
        from distill.errors import UserError

        raise UserError(
            "--lora-r and --load-in-4bit are for a student made of a base; name one with --student-base"
        )
    return {
        "student.base": str(folder) if folder else None,
        "student.lora_rank": rank,
        "student.load_in_4bit": load_in_4bit or None,
    }


def _what_to_capture(
    teacher: Path | None, data: Path | None, samples: int | None, targets: str | None, seed: int | None
) -> dict[str, object]:
    """The flags that decide the soft targets, as settings."""
    return {
        "teacher.path": str(teacher) if teacher else None,
        "data.path": str(data) if data else None,
        "data.samples": samples,
        "targets.kind": targets,
        "seed": seed,
    }


@app.command("export-gguf")
def export_gguf(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    quant: Annotated[str, typer.Option(metavar="f32|f16|q8_0", help="Format of the weights.")] = "f16",
    output: Annotated[
        Path | None, typer.Option(help="File to write. Default: RUN/student-QUANT.gguf.")
    ] = None,
) -> None:
    """Export a run's student again in another format, proved against PyTorch before it gets its name."""
    from distill.config import ExportConfig, parse_quant
    from distill.console import Console, human_bytes
    from distill.exporting import export_run
    from distill.run_folder import RunFolder

    console = Console()
    wanted: ExportConfig = parse_quant(quant)
    with console.stage("Export and prove") as stage:
        path, proof = export_run(RunFolder(run_folder), wanted.quant, output)
        stage.finish(
            f"{path}, {human_bytes(path.stat().st_size)}; against PyTorch over {proof.positions} positions: max logit "
            f"difference {proof.max_logit_difference:.1e}, KL {proof.mean_kl:.1e}"
        )


@app.command()
def judge(
    student: Annotated[
        Path, typer.Argument(metavar="STUDENT.gguf", help="A student that `distill run` has made.")
    ],
    prompt: Annotated[str | None, typer.Argument(help="What to judge.")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="JSONL file; its prompt of every line is judged.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per prompt.")] = False,
) -> None:
    """ALLOW, ESCALATE or REFUSE, and whether to ask the teacher: from the exported file alone."""
    from distill.console import Console
    from distill.errors import UserError
    from distill.judge import judge_file, judge_one

    if (prompt is None) == (prompts is None):
        raise UserError("give one prompt to judge, or --prompts FILE.jsonl")
    if prompts is not None:
        judge_file(student, prompts, as_json, Console())
    elif prompt is not None:
        judge_one(student, prompt, as_json, Console())


@app.command()
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH [PATH]",
            help="Folder of a run, finished or not; or weights: a checkpoint's folder, a .safetensors or .gguf file. "
            "Two of a kind are compared.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="HTML file to write, which opens without a network.")
    ] = None,
) -> None:
    """Say how a run went, from its own records, or what a model's weights look like; or compare two."""
    from distill.report_text import report_paths

    report_paths(paths, as_json, output)


@app.command()
def chat(
    model: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="Any GGUF language model.")],
    prompt: Annotated[
        str | None, typer.Argument(help="One message. Default: a conversation, one line each.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the most probable token.")
    ] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
) -> None:
    """Talk to a GGUF file through llama.cpp."""
    from distill.chat import Conversation
    from teachers.gguf_teacher import GGUFTeacher

    with GGUFTeacher(model) as loaded:
        conversation = Conversation(loaded, temperature=temperature, max_new_tokens=max_tokens, seed=seed)
        if prompt is not None:
            print(conversation.say(prompt))
            return
        print(f"{loaded.info.name}. An empty line or Ctrl-D ends the conversation.")
        while line := _read_line():
            print(conversation.say(line))


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""


def main() -> NoReturn:
    """Run the command line and exit with 0 (done), 2 (the user's input), 1 (ours) or 130 (interrupted)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a redirected Windows console cannot write every sign
            stream.reconfigure(errors="replace")
    watch()
    try:
        app()
    except SystemExit as stop:
        if stop.code == EXIT_INTERRUPTED:  # typer's own answer to Ctrl-C, without a word
            _complain("interrupted; everything saved is kept, and the same command continues from there")
        raise
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise  # a defect of ours: the traceback is what a report needs (Python exits with 1)
        _complain(one_line(error))
        sys.exit(code)
    sys.exit(0)


def _complain(message: str) -> None:
    RichConsole(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
