"""The command line called in this process, and students to call it with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from distill.capture.tokenizer_only import tokenizer_entries
from distill.cli import main
from students.gguf.metadata import ExportNames
from students.gguf.writer import write_gguf
from students.model.decoder import SO8TForCausalLM
from teachers import example_teacher
from teachers.gguf.file import read_gguf
from tests.support.students import make_student


def student_with_heads(thresholds: list[float], trust: float) -> SO8TForCausalLM:
    """A student for the example teacher's tokenizer, with heads."""
    vocab_size = len(read_gguf(example_teacher()).value("tokenizer.ggml.tokens"))
    made = make_student(64, 2, vocab_size, seed=3, heads=True)
    with torch.no_grad():
        made.verification_head.output.bias.fill_(5.0)  # a random student is certain of nothing
    made.config.decision_thresholds, made.config.trust = thresholds, trust
    return made


def export(student: SO8TForCausalLM, path: Path, name: str = "judge") -> Path:
    """The student as a file, with the example teacher's tokenizer and chat template."""
    entries = tokenizer_entries(read_gguf(example_teacher()))
    write_gguf(student, path, "f32", entries, ExportNames(name, {}))
    return path


class CommandLine:
    """Runs commands in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> tuple[int | str | None, str, str]:
        """The exit code, standard output and standard error."""
        self.monkeypatch.setattr(sys, "argv", ["distill", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = self.capsys.readouterr()
        assert "Traceback" not in said.err, (arguments, said.err)
        return stopped.value.code, said.out, said.err

    def says(self, *arguments: object) -> str:
        """What a command that works prints, with nothing on standard error."""
        code, out, err = self(*arguments)
        assert (code, err) == (0, ""), (arguments, code, err)
        return out

    def refuses(self, *arguments: object) -> str:
        """Why a command exits with 2, in one line on standard error, with nothing else printed."""
        code, out, err = self(*arguments)
        assert code == 2 and err.count("\n") == 1 and not out, (arguments, code, out, err)
        return err
