"""A run's folder: what is in it, whose it is, and reading it back.

``config.json`` (as resolved), ``identity.json`` (teacher and soft targets), ``decisions.json`` (if
something was decided by measuring: ``distill.runs.decisions``), ``metrics.jsonl``,
``beginning.safetensors`` (weights that training begins at, until the run is finished),
``checkpoints/``, ``student/`` (PyTorch weights and ``tokenizer.gguf``), ``held_out.json``,
``imatrix.gguf``, ``student.gguf``, ``exports.json`` (what is known of it and of later exports),
``Modelfile``, ``transformers/`` (the plain model), and last ``results.json``: a folder with results
is a finished run. ``report.html`` shows all of it, ``README.md`` is the model card, ``audit.jsonl``
the log.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.config.loading import flatten, parse_config
from distill.config.schema import RunConfig
from distill.errors import UserError
from teachers.atomic_files import is_temporary, write_whole
from teachers.base import Keep, TokenizedLines, Tokens

RUNS = Path("runs")
METRICS = "metrics.jsonl"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class RunPaths:
    """Where a run keeps its things, as the user asked: none means the default."""

    out: Path | None = None
    store: Path | None = None


@dataclass(frozen=True)
class HeldOut:
    """Validation sequences, and texts with the teacher's ids that check an exported tokenizer.

    ``keep``: the predictions that count; ``None``: all.
    """

    sequences: list[Tokens]
    lines: TokenizedLines
    keep: list[Keep] | None = None


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.identity_file = path / "identity.json"
        self.decisions_file = path / "decisions.json"
        self.results_file = path / "results.json"
        self.held_out_file = path / "held_out.json"
        self.student = path / "student"
        self.tokenizer = self.student / "tokenizer.gguf"
        self.gguf = path / "student.gguf"
        self.plain = path / "transformers"
        self.beginning = path / "beginning.safetensors"
        self.report = path / "report.html"
        self.importance = path / "imatrix.gguf"
        self.exports = path / "exports.json"
        self.modelfile = path / "Modelfile"
        self.card = path / "README.md"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end and its student is still there."""
        return self.results_file.exists() and self.gguf.exists() and self.tokenizer.exists()

    def require_usable(self) -> None:
        """Raise ``UserError`` if the folder holds other files than a run's; changes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path} is a file; give a new or empty folder")
        others = self.path.exists() and any(not is_temporary(path) for path in self.path.iterdir())
        # After the listing: another process of the same launch may write its settings just now.
        if others and not self.config_file.exists():
            raise UserError(f"--out {self.path} holds other files; give a new or empty folder")

    def check(self, config: RunConfig) -> None:
        """Raise ``UserError`` unless the folder is, or can become, this run's; changes nothing."""
        self.require_usable()
        if self.config_file.exists() and (
            difference := first_difference(self.read_config(), config)
        ):
            raise UserError(
                f"--out {self.path} holds another run ({difference}); choose another folder. "
                "Nothing in it was changed"
            )

    def claim(self, config: RunConfig, identity: dict[str, str]) -> None:
        """Make the folder this run's, or raise ``UserError`` if its settings, teacher or data
        differ."""
        self.check(config)
        self._remove_leftovers()
        if not self.config_file.exists() or not self.identity_file.exists():
            # In this order: a folder with settings and no identity yet is still known to be this
            # run's.
            self.write_json(self.config_file, config.model_dump(mode="json"))
            self.write_json(self.identity_file, identity)
            return
        recorded = self.read_json(self.identity_file)
        for key, value in identity.items():
            if recorded.get(key) != value:
                what = "base's folder" if key.startswith("base_") else "teacher file or the data"
                raise UserError(
                    f"--out {self.path} holds a run with another {key.replace('_', ' ')} "
                    f"({str(recorded.get(key))[:12]}… instead of {value[:12]}…): the {what} has "
                    "changed since; choose another folder. Nothing in it was changed"
                )

    def _remove_leftovers(self) -> None:
        """Delete what a killed process of this run had not finished writing."""
        for path in [*self.path.glob(".*.tmp*"), *(self.path / "checkpoints").glob(".*.tmp*")]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def read_identity(self) -> dict[str, str]:
        """What ``claim`` recorded."""
        return {key: str(value) for key, value in self.read_json(self.identity_file).items()}

    def read_config(self) -> RunConfig:
        """The run's configuration; raises ``UserError`` if it is missing or damaged."""
        if not self.config_file.exists():
            raise UserError(f"{self.path} is not a run's folder: it has no config.json")
        return parse_config(self.read_json(self.config_file), f" in {self.config_file}")

    def write_results(self, results: dict[str, Any]) -> None:
        """Write ``results.json``, which finishes the run."""
        self.write_json(self.results_file, results)

    def is_of(self, config: RunConfig) -> bool:
        """Whether the folder is a run with these settings; an unreadable one is not."""
        try:
            return not first_difference(self.read_config(), config)
        except UserError:
            return False

    def read_results(self) -> dict[str, Any]:
        """What ``write_results`` wrote."""
        return self.read_json(self.results_file)

    def write_held_out(self, held_out: HeldOut) -> None:
        """Keep the validation sequences, so that a later export can be proved without the store."""
        content = {
            "sequences": [tokens.tolist() for tokens in held_out.sequences],
            "texts": held_out.lines.texts,
            "text_tokens": [tokens.tolist() for tokens in held_out.lines.tokens],
        }
        if held_out.keep is not None:
            content["keep"] = [mask.astype(int).tolist() for mask in held_out.keep]
        write_whole(self.held_out_file, json.dumps(content).encode())

    def read_held_out(self, vocab_size: int) -> HeldOut:
        """The content of ``held_out.json``; raises ``UserError`` if it is missing or damaged."""
        content = self.read_json(self.held_out_file)
        try:
            sequences = [_tokens(ids, vocab_size) for ids in content["sequences"]]
            tokens = [_tokens(ids, vocab_size) for ids in content["text_tokens"]]
            if not sequences or min(map(len, sequences)) < 2:
                raise ValueError("it holds no sequence of two tokens")
            texts = [str(text) for text in content["texts"]]
            if len(tokens) != len(texts):
                raise ValueError(f"it has {len(texts)} texts and the tokens of {len(tokens)}")
            keep = None
            if "keep" in content:
                keep = [np.array(mask, dtype=np.bool_) for mask in content["keep"]]
                shapes = [mask.shape for mask in keep]
                if shapes != [(len(ids) - 1,) for ids in sequences] or not all(map(np.any, keep)):
                    raise ValueError("its masks do not fit its sequences")
            return HeldOut(sequences, TokenizedLines(texts, tokens), keep)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{self.held_out_file} is damaged ({error}); run distill again"
            ) from None

    def write_json(self, path: Path, content: Any) -> None:
        """Write one of the run's JSON files."""
        write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    def read_json(self, path: Path) -> dict[str, Any]:
        """One of the run's JSON files; raises ``UserError`` if it is missing or damaged."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path} is missing; is {self.path} a finished run's folder?") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged ({error})") from None
        if not isinstance(content, dict):
            raise UserError(f"{path} is damaged (not an object)")
        return content


def choose_folder(config: RunConfig, stem: str) -> RunFolder:
    """The folder of a run without ``--out``: a new one, or an unfinished one of this run."""
    number = 1
    while True:
        suffix = f"-{number}" if number > 1 else ""
        folder = RunFolder(RUNS / f"{stem}-{config.student.label}{suffix}")
        if not folder.path.exists():
            return folder
        if folder.config_file.exists() and not folder.finished and folder.is_of(config):
            return folder
        number += 1


def _tokens(ids: Any, vocab_size: int) -> Tokens:
    tokens = np.array(ids, dtype=np.int32)
    if tokens.ndim != 1 or len(tokens) < 1 or tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"a sequence has tokens outside 0 to {vocab_size - 1}")
    return tokens


def first_difference(existing: RunConfig, wanted: RunConfig) -> str:
    """The first setting that differs, as a message; empty where all are equal."""
    there, here = (flatten(config.model_dump(mode="json")) for config in (existing, wanted))
    for key in {**here, **there}:
        if there.get(key) != here.get(key):
            return f"{key} is {there.get(key)!r} there, {here.get(key)!r} here"
    return ""


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    return next(reversed(_complete(folder)), None)


def _complete(folder: Path) -> list[Path]:
    """Whole checkpoints as they were written, which after a rollback is not by step."""
    paths = [path for path in folder.glob("step-*") if (path / "state.json").exists()]
    paths.sort(key=lambda path: (len(path.name), path.name))  # by number, also beyond six digits
    logged = {path: _logged(path) for path in paths}
    return paths if None in logged.values() else sorted(paths, key=lambda path: logged[path] or 0)


def _logged(path: Path) -> int | None:
    """How many lines were logged when a checkpoint was written, if it says so."""
    try:
        lines = json.loads((path / "state.json").read_text()).get("lines_logged")
    except (OSError, ValueError, AttributeError):
        return None
    return lines if isinstance(lines, int) else None


def require_run(path: Path) -> None:
    """Raise ``UserError`` unless a path is a run's folder."""
    if not path.is_dir():
        raise UserError(
            f"{path} is not a run's folder: there is no such folder, nor a file; check the path"
        )
    if not RunFolder(path).config_file.exists():
        raise UserError(
            f"{path} is not a run's folder: it has no config.json, and no {WEIGHTS} either; give a "
            "run's folder, a checkpoint's, or a .safetensors or .gguf file"
        )


def nothing_logged(path: Path) -> UserError:
    """The error for a run that has logged nothing."""
    return UserError(
        f"{path}: nothing is logged yet; training has not begun. Try again when it has"
    )
