"""The importance matrix: measured when a quantizer takes one, on training text that a run keeps."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import UserError
from distill.runs.folder import RunFolder
from distill.runtime.progress import Console
from students.gguf.architectures import architecture_of, to_gguf_name
from students.gguf.imatrix import measure_importance, read_mean_squares, write_importance
from students.model.decoder import SO8TForCausalLM
from students.model.fold import to_llama
from teachers.base import Tokens
from teachers.gguf.file import TeacherFileError, read_gguf
from teachers.store.store import SoftTargetStore

MeanSquares = Mapping[str, NDArray[np.float32]]
ImportanceOf = Callable[[Any], MeanSquares]
"""Gives the mean squares, by matrix of the file, of the model that is to be quantized."""

DATASET = "training text of the run"
# Enough for means of squares, and not more than a minute or two of computing even for a large base.
TOKENS, LEAST, FLOPS = 16_384, 2_048, 2e13


def calibration_tokens(parameters: int) -> int:
    """How many tokens a model of so many parameters is measured on."""
    return min(TOKENS, max(LEAST, int(FLOPS / (2 * parameters))))


def calibration_text(
    store: SoftTargetStore, train: NDArray[np.int64], parameters: int
) -> list[Tokens]:
    """Training sequences, evenly from the first to the last, on which a model of so many
    parameters is to be measured."""
    some = evenly_spaced(store.lengths()[train], calibration_tokens(parameters))
    return [store.tokens(int(index)) for index in train[some]]


def evenly_spaced(lengths: NDArray[np.int32], tokens: int) -> NDArray[np.int64]:
    """About as many sequences as make so many tokens, evenly from the first to the last."""
    count = min(len(lengths), max(1, round(tokens / float(lengths.mean()))))
    return np.linspace(0, len(lengths) - 1, count).astype(np.int64)


def importance_of(
    folder: RunFolder, vocab_size: int, console: Console, *, keep: bool
) -> ImportanceOf | None:
    """How to get the importance matrix of a run's student: as it was measured once, or on the
    text that the run keeps; ``keep``: write down what is measured. Nothing where an older run has
    neither.

    Raises:
        UserError: either file is damaged.
    """
    if folder.importance.exists():
        known = _read(folder)
        return lambda model: known
    if not folder.calibration_file.exists():
        console.note(
            "this run has no text to measure an importance matrix on, so the quantizer goes without"
        )
        return None
    sequences = folder.read_calibration(vocab_size)
    return lambda model: _measured(model, sequences, folder if keep else None)


def _measured(model: Any, sequences: Sequence[Tokens], folder: RunFolder | None) -> MeanSquares:
    if isinstance(model, SO8TForCausalLM):
        importance = measure_importance(to_llama(model), sequences, to_gguf_name)
    else:
        names = architecture_of(model.config)
        importance = measure_importance(model, sequences, names.to_gguf_name)
    if folder is not None:
        temporary = folder.importance.with_name(f".{folder.importance.name}.{os.getpid()}.tmp")
        write_importance(importance, temporary, [DATASET])
        temporary.replace(folder.importance)
    return importance.mean_squares()


def _read(folder: RunFolder) -> MeanSquares:
    try:
        file = read_gguf(folder.importance, model=False)
        return read_mean_squares({name: file.tensor(name) for name in file.tensors})
    except (TeacherFileError, ValueError) as error:
        raise UserError(
            f"{folder.importance} is damaged ({error}); delete it, or leave it out with "
            "--no-imatrix"
        ) from None
