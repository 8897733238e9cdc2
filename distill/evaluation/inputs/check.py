"""What ``distill evaluate`` can refuse before PyTorch is imported."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

from distill.capture.data_rows import DataRows, read_rows
from distill.errors import UserError
from distill.evaluation.inputs.files import Files, find_files
from distill.evaluation.inputs.request import Request
from distill.evaluation.inputs.task_file import Task, read_tasks
from distill.heads.prompts import SafetyPrompt, read_given_prompts
from teachers.base import Progress, no_progress


def require_harness() -> None:
    """Raise ``UserError`` unless lm-evaluation-harness is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "lm-evaluation-harness is not installed; its tasks need it: run `python -m pip install "
            "lm_eval` in this environment, or leave them out"
        )


@dataclass(frozen=True)
class EvaluationInputs:
    """What was read for an evaluation: the models' headers, and what the user's files hold."""

    files: Files
    tasks: list[Task]
    prompts: list[SafetyPrompt] | None
    data: DataRows | None


def check_evaluation(request: Request, progress: Progress = no_progress) -> EvaluationInputs:
    """Read the inputs; raises ``UserError`` or ``TeacherFileError`` if one cannot be used.

    ``progress``: of the data, the share that is read.
    """
    if request.harness:
        require_harness()
    tasks = [] if request.tasks is None else read_tasks(request.tasks)
    given = request.text.data is not None
    data = read_rows(request.text.settings(), progress) if given else None
    prompts = read_given_prompts(request.safety_prompts)
    files = find_files(request.students, request.teacher)  # last: it may hash a large teacher
    return EvaluationInputs(files, tasks, prompts, data)
