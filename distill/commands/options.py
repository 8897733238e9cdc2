"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        metavar="FILE|ADDRESS",
        help="GGUF file of the teacher, or http://HOST:PORT of `distill serve` or vLLM. Default: "
        "the example teacher.",
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.gguf",
        help="The teacher's tokenizer, where it is behind a server that does not give it (vLLM): a "
        "GGUF file of the model, or of its vocabulary alone.",
    ),
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
Vocab = Annotated[
    str | None,
    typer.Option(
        metavar="N|SHARE%|auto",
        help="Tokens in the student's vocabulary, which is the teacher's cut down to them: 16k, "
        "25% or auto (99.9 % of the teacher's probability, 1 % more tokens at most). Default: all.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Rows (JSON, Parquet, CSV) of conversations, prompts or text; plain text; or a folder "
        "of them. Default: the teacher generates it.",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples",
        help="Sequences at most. Default: all the data; 4096 when the teacher generates it.",
    ),
]
Epochs = Annotated[
    int | None, typer.Option("--epochs", help="Passes over the soft targets. Default: 8.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything random. Default: 0.")]
Targets = Annotated[
    str | None,
    typer.Option(
        "--targets",
        metavar="compact|hidden|dense",
        help="What is kept of the teacher. Default: compact.",
    ),
]
Store = Annotated[
    Path | None,
    typer.Option(
        "--store",
        help="Folder of the soft targets. Default: beside the run's folder, under stores/.",
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder of the run. Default: a new one under runs/.")
]
StudentQuant = Annotated[
    str | None,
    typer.Option(
        "--quant",
        metavar="TYPE[:embedding=ROWS]",
        help="File type of student.gguf, such as q4_k_m, and what the rows of tokens are stored "
        "as, such as q4_k_m:embedding=q8_0. Default: q8_0.",
    ),
]
Preset = Annotated[
    str,
    typer.Option(
        metavar="recommended|formula",
        help="Where settings start from: what measured best (T = 1, the teacher alone), or the "
        "loss formula's own defaults (T = 3, α = 0.7, β = 0.3).",
    ),
]
Init = Annotated[
    str | None,
    typer.Option(
        metavar="auto|teacher|embeddings|random",
        help="What the student's weights start from. Default: auto, the teacher's where its "
        "architecture allows it.",
    ),
]
StudentBase = Annotated[
    Path | None,
    typer.Option(
        "--student-base",
        metavar="FOLDER|FILE",
        help="A model with the teacher's vocabulary that becomes the student: frozen, with LoRA "
        "and SO(8) gates, in place of --student-size. A transformers folder or a GGUF file (llama, "
        "phi3, qwen2, qwen3, gemma3), the teacher's own too; --vocab cuts that of a file.",
    ),
]
LoraRank = Annotated[
    int | None, typer.Option("--lora-r", help="Rank of LoRA, with --student-base. Default: 16.")
]
LoadIn4bit = Annotated[
    bool,
    typer.Option(
        "--load-in-4bit", help="The base in NF4, through bitsandbytes, with --student-base."
    ),
]
SafetyLabels = Annotated[
    str | None,
    typer.Option(
        metavar="builtin|teacher|FILE|none",
        help="What the safety head learns: the prompts that come with the program, the teacher's "
        "own judgment of them, "
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
        help="Any other setting, for example train.batch_size=32; `evaluate` takes data.split and "
        "data.columns.NAME, of --data. Repeatable.",
    ),
]
StorePath = Annotated[
    Path, typer.Argument(metavar="STORE", help="Folder that `distill capture` has filled.")
]
StoreTeacher = Annotated[
    Path | None,
    typer.Option(
        "--teacher",
        help="The store's own teacher, for the student to start from its weights. Default: not "
        "here.",
    ),
]
BudgetTime = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="TIME",
        help="What the whole run may take, such as 90s, 20m, 1h or 1h30m: decides --samples and "
        "--epochs by a short probe.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="Memory that training is to fit into, such as 12GiB; lists what would help.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")]
Page = Annotated[
    Path | None, typer.Option("--output", help="HTML file to write, which opens without a network.")
]
Executor = Annotated[
    str | None,
    typer.Option(
        metavar="local|slurm|ray",
        help="Have several workers fill the store, started by datatrove: on this machine, as Slurm "
        "jobs or on a Ray cluster. Default: this process alone.",
    ),
]
Workers = Annotated[
    int | None, typer.Option("--workers", help="How many workers, with --executor. Default: 1.")
]
Engine = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        metavar="NAME=VALUE",
        help="An option of datatrove's executor, such as partition=gpu, time=24:00:00 or "
        "cpus_per_task=32. Repeatable.",
    ),
]
WorkedStore = Annotated[
    Path, typer.Argument(metavar="STORE", help="Folder that `distill capture` fills.")
]
