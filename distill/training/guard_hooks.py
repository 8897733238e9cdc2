"""The guard of ``stability`` in the training loop: what it watches, rolls back and logs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from distill.config.schema import TrainConfig
from distill.losses.batch import Batch
from distill.runs.audit_events import record_guard
from distill.runs.metrics_log import MetricsFile
from distill.runtime.launch import Launch
from distill.training.checkpoint import TrainingState
from distill.training.distributed import forget_gathered
from distill.training.optimizer import parameter_groups
from distill.training.student_probe import StudentProbe
from stability import (
    Event,
    Extra,
    Guard,
    GuardSettings,
    Hooks,
    Limit,
    Monitor,
    ProbeReading,
)
from teachers.base import ProcessRank

ROTATION_ERROR = 1e-5  # largest distance of a rotation from orthogonal
WRAPPERS = ("module.", "student.", "_orig_mod.")  # added to parameters' names by wrapping


def build_guard(
    accelerator: Accelerator,
    model: nn.Module,
    state: TrainingState,
    config: TrainConfig,
    probe_text: Batch,
) -> Guard:
    """The guard of a training. ``probe_text``: validation text, on the model's device."""
    launch = Launch(ProcessRank(accelerator.process_index, accelerator.num_processes))
    probe = StudentProbe(model, probe_text, inside=not config.compile)

    def read() -> ProbeReading:
        reading = probe()
        forget_gathered(model)  # the optimizer's step comes next
        return launch.agreed(reading)  # all processes decide by the same values

    # The schedule counts a skipped step too, which may be the very first.
    warnings.filterwarnings(
        "ignore", message=r"Detected call of `lr_scheduler.step\(\)`", category=UserWarning
    )
    settings = config.guard.model_dump(exclude={"enabled"})
    return Guard(
        model,
        state.optimizer,
        schedule=state.schedule,
        settings=GuardSettings(max_norm=config.max_grad_norm, **settings),
        monitor=Monitor(
            model, state.optimizer, clip_groups=parameter_groups(model), rename=_plain_name
        ),
        hooks=Hooks(
            probe=read,
            extra=_extra(state),
            limits=[Limit("rotation_error", ROTATION_ERROR, state.objective.worst_rotation)],
        ),
    )


def write_events(
    guard: Guard,
    plan: Sequence[list[int]],
    metrics: MetricsFile,
    folder: Path | None,
    tell: Callable[[str], None],
) -> None:
    """Write the guard's events to ``metrics.jsonl``, the run's log in ``folder`` and the console.

    ``folder`` is ``None`` in all processes but the first.
    """

    def on_event(event: Event) -> None:
        content = event_line(event)
        if event.action == "set_aside" and event.value is not None:
            content["batch"] = plan[int(event.value)]
        metrics.write("event", event.step, content)
        if folder is not None:
            record_guard(folder, event.step, content)
        tell(
            event.message + (f" (sequences {_some(content['batch'])})" if content["batch"] else "")
        )

    guard.on_event = on_event


def event_line(event: Event) -> dict[str, Any]:
    """An event as logs keep it, without its step; they have its message as ``words``."""
    values = {name: value for name, value in asdict(event).items() if name != "step"}
    return {"words" if name == "message" else name: value for name, value in values.items()}


def tensors_of(batches: Iterable[Batch]) -> Mapping[str, Tensor]:
    """The tensors of an optimizer step's micro-batches, by name."""
    tensors: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        parts = {
            "tokens": batch.tokens,
            **{f"targets.{key}": value for key, value in vars(batch.targets).items()},
        }
        parts |= {f"layers.{layer}": value for layer, value in batch.layers.items()}
        if batch.prompts is not None:
            parts |= {f"prompts.{key}": value for key, value in vars(batch.prompts).items()}
        tag = f" (micro-batch {number})" if number else ""
        tensors |= {
            f"{name}{tag}": value for name, value in parts.items() if isinstance(value, Tensor)
        }
    return tensors


def _extra(state: TrainingState) -> Extra:
    """Data position, scores and the objective's own state, which roll back with the weights."""

    def save() -> dict[str, Any]:
        return {
            "step": state.step,
            "tokens_seen": state.tokens_seen,
            "scores": dict(state.scores),
            "best": state.best,  # never changed in place
            "objective": {name: value.clone() for name, value in state.objective.state().items()},
        }

    def restore(saved: dict[str, Any]) -> None:
        state.step, state.tokens_seen = saved["step"], saved["tokens_seen"]
        state.scores, state.best = dict(saved["scores"]), saved["best"]
        state.objective.load_state(
            {name: value.clone() for name, value in saved["objective"].items()}
        )

    return Extra(save, restore)


def _plain_name(name: str) -> str:
    """A parameter's name in the student, without wrappers."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "") if wrapper == "_orig_mod." else name.removeprefix(wrapper)
    return name


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return f"{shown} and {len(numbers) - 6} more" if len(numbers) > 6 else shown
