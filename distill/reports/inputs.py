"""What a report is made of and where it goes, refused before anything is read; without PyTorch."""

from __future__ import annotations

import json
import stat
from pathlib import Path

from distill.errors import UserError
from distill.runs.folder import INDEX, METRICS, WEIGHTS, RunFolder, nothing_logged, require_run
from teachers.gguf.file import read_gguf

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def weights_among(paths: list[Path]) -> list[Path]:
    """The paths that are to be read as weights: all of them, or none where they are runs' folders.

    Raises:
        UserError: too many paths, one that is neither, files that cannot be weights, or one of
            either kind.
    """
    if len(paths) > 2:
        raise UserError(f"{len(paths)} paths are too many: give one, or two to compare")
    weights = [path for path in paths if holds_weights(path)]
    for path in paths:
        if path in weights:
            files_of_weights(path)
        else:
            require_run(path)
    if weights and len(weights) < len(paths):
        run = next(path for path in paths if path not in weights)
        raise UserError(
            f"{run} is a run's folder and {weights[0]} holds weights alone: they cannot be "
            "compared; give two runs, or "
            f"two of weights (such as {run / 'student'})"
        )
    return weights


def require_logged(path: Path) -> None:
    """See that a run's folder can be reported on: its JSON files can be read, and something is
    logged.

    Raises:
        UserError: a file is damaged, or nothing is there yet.
    """
    folder = RunFolder(path)
    folder.read_json(folder.config_file)
    metrics = path / METRICS
    if folder.results_file.exists():
        folder.read_json(folder.results_file)
    elif not metrics.exists() or metrics.stat().st_size == 0:
        raise nothing_logged(path)


def require_page_path(path: Path) -> None:
    """See that a page can go there.

    Raises:
        UserError: the path is not one for a page.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {path} must end in .html")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}")


def holds_weights(path: Path) -> bool:
    """Whether the path is to be read as weights: a file, or a folder that has some and so is no
    run's."""
    return bool(_files_in(path)) if path.is_dir() else path.exists()


def files_of_weights(path: Path) -> list[Path]:
    """The files with the weights at ``path``, at least one, none of them read.

    Raises:
        UserError: there are none; or one is empty, no plain file, or of another kind.
        TeacherFileError: a GGUF file's header is damaged.
    """
    files = _files_in(path) if path.is_dir() else [path]
    if not files:
        raise UserError(
            f"{path} has no {WEIGHTS}; give a folder that has, or a .safetensors or .gguf file"
        )
    for file in files:
        _require_file(file)
    if is_gguf(files[0]):
        read_gguf(files[0], model=False)
    return files


def _files_in(path: Path) -> list[Path]:
    """The files with a folder's weights."""
    if (path / WEIGHTS).exists():
        return [path / WEIGHTS]
    index = path / INDEX
    if not index.exists():
        return []
    _require_file(index)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is damaged ({error}); copy it again") from None
    for name in names:
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
        ):
            raise UserError(
                f"{index} names {name!r}, which is no safetensors file beside it; copy it again"
            )
    return [path / name for name in names]


def _require_file(path: Path) -> None:
    """Refuse what is not a plain file with something in it: a FIFO would make a reader wait for
    ever."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a regular file; give a .safetensors or .gguf file")
    if status.st_size == 0:
        raise UserError(f"{path} is empty; copy it again")
    if path.suffix.lower() in PICKLES:
        raise UserError(
            f"{path} may be a pickle, which runs code when it is read, so it is not; save the "
            "weights as .safetensors"
        )


def is_gguf(path: Path) -> bool:
    """By its name; another file by its first bytes.

    Raises:
        UserError: it is no file of weights.
    """
    suffix = path.suffix.lower()
    if suffix in (".gguf", ".safetensors"):
        return suffix == ".gguf"
    with path.open("rb") as file:
        begin = file.read(9)
    if begin[:4] == b"GGUF":
        return True
    if begin[8:9] == b"{":  # safetensors: eight bytes of length, then JSON
        return False
    raise UserError(
        f"{path} is no file of weights that can be read; give a .safetensors or .gguf file"
    )


def check_report(paths: list[Path], output: Path | None) -> None:
    """Refuse what ``distill report`` cannot do.

    Raises:
        UserError: paths that are no runs or weights, damaged ones, or no place for a page.
        TeacherFileError: a GGUF file's header is damaged.
    """
    weights = weights_among(paths)
    if output is not None:
        require_page_path(output)
    for path in paths if not weights else ():
        require_logged(path)
