"""What a run has decided by measuring, kept in its folder: a run that is continued decides nothing
again.

``decisions.json``: the settings as they were asked for, before anything was decided; and the
budget. What was decided itself is in ``config.json``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.runs.folder import RUNS, RunFolder, RunPaths, first_difference


@dataclass(frozen=True)
class Decisions:
    """``asked``: settings before anything was decided. ``budget``: see
    ``distill.pipeline.budget.budget.Budget.to_json``."""

    asked: dict[str, Any]
    budget: dict[str, Any] | None = None

    @property
    def any(self) -> bool:
        """Whether anything was decided."""
        return self.budget is not None

    def keep_in(self, folder: RunFolder) -> None:
        """Write them, unless they are there: the first process's count."""
        if not folder.decisions_file.exists():
            folder.write_json(folder.decisions_file, asdict(self))


def decided_before(
    config: RunConfig, seconds: float | None, places: RunPaths, stem: str
) -> tuple[RunConfig, Decisions] | None:
    """The settings of the run that these are asked for again, if it decided something: in the
    folder asked for, or in an unfinished one under ``runs/``.

    ``seconds``: of the budget.

    Raises:
        UserError: the folder asked for has decided by other settings.
    """
    out = places.out
    folders = [out] if out is not None else sorted(RUNS.glob(f"{stem}-*"))
    for folder in map(RunFolder, folders):
        if not (folder.decisions_file.exists() and folder.config_file.exists()):
            continue
        try:
            found = Decisions(**folder.read_json(folder.decisions_file))
            asked = RunConfig.model_validate(found.asked)
        except (TypeError, ValueError, UserError) as error:
            if out is None:
                continue
            raise UserError(f"{folder.decisions_file} is damaged ({error})") from None
        before = None if found.budget is None else float(found.budget["seconds"])
        difference = first_difference(asked, config)
        if not difference and before != seconds:
            difference = f"--budget is {_written(before)} there, {_written(seconds)} here"
        if not difference and (out is not None or not folder.finished):
            return folder.read_config(), found
        if difference and out is not None and first_difference(folder.read_config(), config):
            raise UserError(
                f"--out {out} holds another run ({difference}); choose another folder. Nothing in "
                "it was changed"
            )
    return None


def _written(seconds: float | None) -> str:
    return "none" if seconds is None else f"{seconds:g} s"
