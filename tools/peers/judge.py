"""One judge for students of every origin: how far each is from the GGUF teacher of a run of ours,
on the sequences that the run held out.

    python -m tools.peers.judge RUN [FOLDER ...] [--teacher FILE.gguf]

The teacher answers through llama.cpp, each student through plain ``transformers`` in float32, from
a folder that needs nothing of this project: the run's own ``transformers/``, which is always judged
first, and any other, such as one that TRL has saved. KL is of the student from the teacher, in nats
per token at T = 1 over the whole vocabulary, with 95 % intervals over sequences. What the run's own
report says, of its GGUF file, stands beside it: the two agree but for the file's rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.errors import UserError
from distill.evaluation.scorers import Score, Scorer, evaluate
from distill.runs.folder import RunFolder
from teachers.base import Tokens
from teachers.gguf.file import TeacherFileError
from teachers.llama_cpp.teacher import GGUFTeacher

REPORTED = "ours, as its report says"


def folder_scorer(folder: Path, vocab_size: int) -> Scorer:
    """Next-token logits of a transformers folder, in float32.

    Raises:
        UserError: it cannot be loaded, or has other tokens than the teacher.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is no transformers model: {error}; name its folder") from None
    if model.config.vocab_size != vocab_size:
        raise UserError(
            f"{folder} has {model.config.vocab_size} tokens, the teacher {vocab_size}; they cannot "
            "be compared"
        )

    @torch.no_grad()
    def score(sequences: Sequence[Tokens]) -> Tensor:
        rows = [
            model(torch.from_numpy(tokens[:-1].astype(np.int64))[None], use_cache=False).logits[0]
            for tokens in sequences
        ]
        return torch.cat(rows).float()

    return score


def judge(run: Path, students: Mapping[str, Path], teacher: Path | None = None) -> dict[str, Score]:
    """The score of each of ``students`` (transformers folders) by its name, on what ``run`` held
    out; ``teacher``: its file, if it lies elsewhere now.

    Raises:
        UserError, TeacherFileError, TeacherError: something cannot be read or does not belong
            together.
    """
    folder = RunFolder(run)
    if not folder.finished:
        raise UserError(f"{run} is not a finished run; let distill run end there first")
    path = teacher or Path(folder.read_config().teacher.path or "")
    with GGUFTeacher(path) as model:
        sha256 = folder.read_identity()["teacher_sha256"]
        if model.info.sha256 != sha256:
            raise UserError(
                f"{path} is another teacher than the run's (SHA-256 {model.info.sha256[:12]}… "
                f"instead of {sha256[:12]}…); name that one with --teacher"
            )
        held_out = folder.read_held_out(model.info.vocab_size)
        scorers = {
            name: folder_scorer(student, model.info.vocab_size)
            for name, student in students.items()
        }
        return evaluate(model, held_out.sequences, scorers, keep=held_out.keep).models


def reported(run: Path, stage: str = "exported") -> Score:
    """What the run's report says of its student; ``stage``: ``before`` training, or as it was
    ``exported``."""
    result = RunFolder(run).read_results()["evaluation"][stage]
    return Score(result["kl"], result["agreement"], result["cross_entropy"], result["intervals"])


def table_of(scores: Mapping[str, Score]) -> Table:
    """A row for each student."""
    table = Table("student", "KL (nats/token)", "95 %", "same top token", "perplexity")
    for name, score in scores.items():
        between = "–".join(f"{edge:.3f}" for edge in score.intervals.get("kl", ()))
        table.add_row(
            name, f"{score.kl:.4f}", between, f"{score.agreement:.1%}", f"{score.perplexity:.1f}"
        )
    return table


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, judge, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished distill run")
    parser.add_argument("folders", type=Path, nargs="*", help="other students of its teacher")
    parser.add_argument("--teacher", type=Path, help="the teacher's file, if it lies elsewhere now")
    chosen = parser.parse_args(arguments)
    students = {"ours": RunFolder(chosen.run).plain} | {str(path): path for path in chosen.folders}
    try:
        scores = {REPORTED: reported(chosen.run)} if chosen.run.is_dir() else {}
        scores |= judge(chosen.run, students, chosen.teacher)
    except (UserError, TeacherFileError) as error:
        parser.error(str(error))
    Console(width=110).print(table_of(scores))


if __name__ == "__main__":
    main()
