"""Checkpoints: safetensors and JSON only, written whole or not at all, the last two kept.

``checkpoints/step-000120/`` holds ``model.safetensors``, ``training.safetensors`` (optimizer moments,
objective state, random state) and ``state.json`` (step, schedule, which data). The folder is renamed into
place when everything is on disk, so a half-written one is never seen.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from distill.errors import UserError
from distill.objective import Objective
from students.model import SO8TForCausalLM
from teachers.store import write_whole

KEEP = 2


@dataclass
class TrainingState:
    """Everything that changes while training, as the loop holds it."""

    student: SO8TForCausalLM
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    objective: Objective
    step: int = 0
    tokens_seen: int = 0


def save_checkpoint(folder: Path, state: TrainingState, data_key: str) -> Path:
    """Write ``folder/step-NNNNNN`` whole or not at all and drop all but the newest two.

    Raises:
        OSError: the disk refuses; earlier checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state.step:06d}"
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write_whole(temporary / "model.safetensors", safetensors.torch.save(plain_weights(state.student)))
        training, optimizer_scalars = _training_tensors(state)
        write_whole(temporary / "training.safetensors", safetensors.torch.save(training))
        content = {
            "step": state.step,
            "tokens_seen": state.tokens_seen,
            "data_key": data_key,
            "schedule": state.schedule.state_dict(),
            "optimizer": optimizer_scalars,
        }
        write_whole(temporary / "state.json", (json.dumps(content, indent=2) + "\n").encode())
        if final.exists():
            shutil.rmtree(final)
        temporary.replace(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _complete(folder)[:-KEEP]:
        shutil.rmtree(old)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    found = _complete(folder)
    return found[-1] if found else None


def load_checkpoint(path: Path, state: TrainingState, data_key: str) -> None:
    """Put a checkpoint's contents into ``state``, so that training continues bit for bit (on CPU).

    Raises:
        UserError: damaged, of another student, or made with other data.
    """
    try:
        content: dict[str, Any] = json.loads((path / "state.json").read_text())
        weights = safetensors.torch.load_file(path / "model.safetensors")
        training = safetensors.torch.load_file(path / "training.safetensors")
        if content["data_key"] != data_key:
            raise UserError(
                f"checkpoint {path} was trained on other soft targets; choose another --out folder"
            )
        missing, unexpected = state.student.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise KeyError(f"tensors do not match: {sorted(unexpected) + sorted(missing)}")
        _restore_optimizer(state.optimizer, training, content["optimizer"])
        state.schedule.load_state_dict(content["schedule"])
        # The schedule writes rates only when it is stepped, so put the current ones back by hand.
        for group, rate in zip(state.optimizer.param_groups, state.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        prefix = "objective."
        objective = {name.removeprefix(prefix): t for name, t in training.items() if name.startswith(prefix)}
        state.objective.load_state({name: t.to(state.student.device) for name, t in objective.items()})
        torch.set_rng_state(training["random.torch"])
        state.step, state.tokens_seen = int(content["step"]), int(content["tokens_seen"])
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"checkpoint {path} is damaged ({error}); delete that folder to use the one before"
        ) from None


def _complete(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if (path / "state.json").exists()]
    return sorted(found, key=lambda path: (len(path.name), path.name))  # by number, also beyond six digits


def plain_weights(student: SO8TForCausalLM) -> dict[str, Tensor]:
    """The student's weights by name; a tied output matrix is left out, as it is the embedding."""
    tied = student.config.tie_word_embeddings
    return {
        name: tensor.detach().contiguous()
        for name, tensor in student.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }


def _training_tensors(state: TrainingState) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Optimizer moments, objective state and random state as tensors; the optimizer's scalars apart."""
    tensors = {"random.torch": torch.get_rng_state()}
    scalars: dict[str, dict[str, float]] = {}
    for index, entries in state.optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value.detach().contiguous()
            else:
                scalars.setdefault(str(index), {})[name] = value
    for name, tensor in state.objective.state().items():
        tensors[f"objective.{name}"] = tensor.contiguous()
    return tensors, scalars


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], scalars: dict[str, dict[str, float]]
) -> None:
    content = optimizer.state_dict()
    entries: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in scalars.items()}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "optimizer":
            index, _, key = rest.partition(".")
            entries.setdefault(int(index), {})[key] = tensor
    content["state"] = entries
    optimizer.load_state_dict(content)
