"""Checkpoints: safetensors and JSON only, written whole or not at all, the last two kept.

``checkpoints/step-000120/`` holds ``model.safetensors``, ``best.safetensors`` (the weights with the
best validation KL so far, where they are not these), ``training.safetensors`` (optimizer moments,
objective, random state of every process) and ``state.json`` (step, schedule, scores, which data).
The folder is renamed into place when everything is on disk, so a partial one is never seen.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor

from distill.errors import UserError
from distill.losses.objective import Objective
from distill.runs.folder import _complete
from distill.training.validation import ValidationScore, best_step
from stability.guard import Guard
from stability.random_state import random_state, restore_random_state
from students.model.interface import Student
from students.weights import (
    Weights,
    as_safetensors,
    full_tensor,
    laid_out_like,
    plain_weights,
    set_weights,
)
from teachers.atomic_files import write_whole
from teachers.llama_cpp.library.build import processor

KEEP = 2
UNREADABLE = (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError)


@dataclass
class TrainingState:
    """Everything that changes while training, as the loop holds it.

    ``best``: the weights with the best validation KL so far, on the CPU; ``None`` where there is no
    score yet, or training is at its planned end and the newest are the best. ``lines_logged``: of
    ``metrics.jsonl``. ``narrow``: training computes in bfloat16.
    """

    student: Student
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    objective: Objective
    step: int = 0
    tokens_seen: int = 0
    scores: dict[int, ValidationScore] = field(default_factory=dict)
    best: Weights | None = None
    guard: Guard | None = None
    lines_logged: int | None = None
    narrow: bool = False


def save_checkpoint(
    folder: Path, state: TrainingState, data_key: str, *, finished: bool = False
) -> Path:
    """Write ``folder/step-NNNNNN`` whole or not at all and drop all but the newest two.

    Every process of a launch takes part; the first one writes. Checkpoints of later steps, from
    which training rolled back, are then quarantined. ``finished``: nothing is trained after it, so
    the optimizer's moments (two thirds of a checkpoint) are left out.

    Raises:
        OSError: the disk refuses; earlier checkpoints stay.
    """
    weights = plain_weights(state.student)
    moments, scalars = ({}, {}) if finished else _optimizer_tensors(state.optimizer)
    training = moments | _objective_tensors(state.objective) | _random_tensors()
    final = folder / f"step-{state.step:06d}"
    apart = state.best is not None and best_step(state.scores) != state.step
    if PartialState().is_main_process:
        content = {
            "step": state.step,
            "tokens_seen": state.tokens_seen,
            "data_key": data_key,
            "finished": finished,
            "computed": _computed(state),
            "best_apart": apart,
            "guard": None if state.guard is None else state.guard.state_dict(),
            "lines_logged": state.lines_logged,
            "schedule": state.schedule.state_dict(),
            "optimizer": scalars,
            "scores": [{"step": step, **asdict(score)} for step, score in state.scores.items()],
        }
        files = {"model": weights, "training": training}
        if apart:
            assert state.best is not None
            files["best"] = state.best
        # Once, for the checksums and the files.
        files = {name: _on_cpu(tensors) for name, tensors in files.items()}
        content["checksums"] = {
            name: {key: checksum(tensor) for key, tensor in tensors.items()}
            for name, tensors in files.items()
        }
        _write(final, files, content)
        # Training rolled back to before the checkpoints of later steps.
        later = [one for one in _complete(folder) if int(one.name.rpartition("-")[2]) > state.step]
        _quarantine(later, "undone")
        for old in _complete(folder)[:-KEEP]:
            shutil.rmtree(_renamed(old))
    return final


def _computed(state: TrainingState) -> list[str]:
    """On what this process computes, and in which precision."""
    device = PartialState().device.type
    return [processor().name if device == "cpu" else device, "bf16" if state.narrow else "fp32"]


def earlier_precision(folder: Path) -> str | None:
    """The precision that the newest checkpoint was computed in, if that was on such a processor;
    what is measured anew may differ, and a training must go on as it began."""
    for path in _complete(folder)[-1:]:
        with suppress(*UNREADABLE):
            name, precision = json.loads((path / "state.json").read_text())["computed"]
            if name == processor().name and precision in ("bf16", "fp32"):
                return str(precision)
    return None


def _on_cpu(tensors: Weights) -> Weights:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _write(final: Path, files: dict[str, Weights], content: dict[str, Any]) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for name, tensors in files.items():
            write_whole(temporary / f"{name}.safetensors", as_safetensors(tensors))
        write_whole(temporary / "state.json", (json.dumps(content, indent=2) + "\n").encode())
        old = _renamed(final) if final.exists() else None
        temporary.replace(final)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _renamed(path: Path) -> Path:
    """Rename a checkpoint to a leftover, which the next start removes if it is still there."""
    leftover = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    path.replace(leftover)
    return leftover


def load_newest(
    folder: Path, state: TrainingState, data_key: str
) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Load the newest sound checkpoint; damaged ones are quarantined as ``refused-step-NNNNNN``.

    Returns:
        The one that was loaded (``None``: there is none at all), and the damaged ones, each with
        what is wrong.

    Raises:
        UserError: none is sound, or it was made with other data.
    """
    refused: list[tuple[Path, str]] = []
    paths = _complete(folder)
    for path in reversed(paths):
        try:
            load_checkpoint(path, state, data_key)
        except DamagedCheckpoint as error:
            refused.append((path, error.reason))
            if path == paths[0]:
                raise
        else:
            if PartialState().is_main_process:
                _quarantine([bad for bad, _ in refused], "refused")
            return path, refused
    return None, []


def _quarantine(paths: Sequence[Path], why: str) -> None:
    """Rename checkpoints so that nothing continues from them; those of an earlier time go."""
    for old in paths[0].parent.glob(f"{why}-step-*") if paths else ():
        shutil.rmtree(old)
    for path in paths:
        path.replace(path.with_name(f"{why}-{path.name}"))


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    content: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(content)


def _read_sound(path: Path, file: str, checksums: Mapping[str, Any]) -> Weights:
    """The tensors of one file of a checkpoint, if they are what was saved.

    Raises:
        ValueError: names the tensor that is not.
        SafetensorError: the file is not whole.
    """
    tensors: Weights = safetensors.torch.load_file(path / f"{file}.safetensors")
    known = checksums.get(file, {})
    if gone := known.keys() - tensors.keys():
        raise ValueError(f"{file}.safetensors: {min(gone)} is missing")
    for name, tensor in tensors.items():
        if name in known and known[name] != checksum(tensor):
            raise ValueError(f"{file}.safetensors: {name} is not what was saved")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{file}.safetensors: {name} has values that are not finite")
    return tensors


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be used; ``reason`` says what is wrong with it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"checkpoint {path} is damaged ({reason}); delete that folder to use the one before"
        )
        self.reason = reason


def load_checkpoint(path: Path, state: TrainingState, data_key: str) -> None:
    """Put a checkpoint's contents into ``state``, so that training continues bit for bit (on CPU).

    Raises:
        DamagedCheckpoint: its files are not whole, not what was saved, or of another student.
        UserError: made with other data.
    """
    try:
        content: dict[str, Any] = json.loads((path / "state.json").read_text())
        checksums = content.get("checksums", {})
        weights = _read_sound(path, "model", checksums)
        training = _read_sound(path, "training", checksums)
        best = _read_sound(path, "best", checksums) if content["best_apart"] else None
        if content["data_key"] != data_key:
            raise UserError(
                f"checkpoint {path} was trained on other soft targets; choose another --out folder"
            )
        set_weights(state.student, weights)
        if not content["finished"]:
            _restore_optimizer(state.optimizer, _under(training, "optimizer"), content["optimizer"])
        state.schedule.load_state_dict(content["schedule"])
        # The schedule writes rates only when it is stepped, so put the current ones back by hand.
        rates = state.schedule.get_last_lr()
        for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        _restore_objective(state.objective, _under(training, "objective"), state.student.device)
        if own := _under(training, f"random.{PartialState().process_index}"):
            restore_random_state(own)  # none where the run is continued with more processes
        state.step, state.tokens_seen = int(content["step"]), int(content["tokens_seen"])
        scores = content["scores"]
        state.scores = {int(score.pop("step")): ValidationScore(**score) for score in scores}
        if content["best_apart"]:
            state.best = best
        elif state.scores and not content["finished"]:  # the weights of this very step
            state.best = {name: value.clone() for name, value in weights.items()}
        else:
            state.best = None
        state.lines_logged = content.get("lines_logged")
        if state.guard is not None and content.get("guard") is not None:
            state.guard.load_state_dict(content["guard"])
        elif state.guard is not None:
            state.guard.state.steps = state.step
    except UserError:
        raise
    except (*UNREADABLE, SafetensorError) as error:
        raise DamagedCheckpoint(path, str(error)) from None


def _optimizer_tensors(
    optimizer: torch.optim.Optimizer,
) -> tuple[Weights, dict[str, dict[str, float]]]:
    """Moments as tensors; scalars apart."""
    tensors: Weights = {}
    scalars: dict[str, dict[str, float]] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = full_tensor(value.detach()).contiguous()
            else:
                scalars.setdefault(str(index), {})[name] = value
    return tensors, scalars


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Weights, scalars: dict[str, dict[str, float]]
) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Any]] = {int(index): dict(one) for index, one in scalars.items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            tensor = laid_out_like(tensor, parameter)
        entries.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": entries})


def _objective_tensors(objective: Objective) -> Weights:
    named = objective.named_parameters()
    tensors = objective.state() | {f"parameter.{name}": value.detach() for name, value in named}
    return {f"objective.{name}": full_tensor(value).contiguous() for name, value in tensors.items()}


@torch.no_grad()
def _restore_objective(objective: Objective, tensors: Weights, device: torch.device) -> None:
    saved = _under(tensors, "parameter")
    for name, parameter in objective.named_parameters():
        parameter.copy_(laid_out_like(saved[name], parameter))
    state = {name: one for name, one in tensors.items() if not name.startswith("parameter.")}
    objective.load_state({name: value.to(device) for name, value in state.items()})


def _random_tensors() -> Weights:
    """The random state of every process."""
    states: list[Weights] = gather_object([random_state()])
    return {
        f"random.{rank}.{name}": value
        for rank, state in enumerate(states)
        for name, value in state.items()
    }


def _under(tensors: Weights, prefix: str) -> Weights:
    """The tensors whose names start with ``prefix`` and a dot, without it."""
    start = f"{prefix}."
    named = {name: value for name, value in tensors.items() if name.startswith(start)}
    return {name.removeprefix(start): value for name, value in named.items()}
