"""A file or folder of data → the files to read, of the split that is wanted."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

from distill.capture.data_files import (
    SPLIT,
    SPLIT_WORDS,
    SUFFIXES,
    TABLE_SUFFIXES,
    TRAIN,
    choose_split,
    lists_of_rows,
    suffix_of,
)
from distill.capture.file_text import read_text
from distill.capture.json_values import parse_json
from distill.errors import UserError
from distill.runtime.printable import printable_line

_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SHARD = re.compile(r"-\d+-of-\d+(?:-[0-9a-f]+)?$")
_NUMBER = re.compile(r"[-_]?\d+$")
# The word for a split between other words of a file's name, as in alpaca_train and my-test-set.
_SPLIT_WORD = re.compile(rf"(?<![a-z])(?:{SPLIT_WORDS})(?![a-z])")
MOST_DESCRIBED = 1 << 20  # bytes; a larger .json file is taken for data unread


def find_files(
    path: Path, split: str | None = None, columns: Collection[str] = ()
) -> tuple[list[Path], list[str]]:
    """The files of ``path``, itself one or a folder, in order; and notes on what is left out.

    Of a folder saved by ``datasets``, and of one whose files or folders are named by split (such as
    ``train.jsonl``, ``train-00000-of-00002``, ``default/train/0000``), only the files of ``split``
    (none: the only one, or ``train``); ``alpaca_train.jsonl`` is of ``train``. Where there are
    tables, text beside them is not data, nor is a JSON object without rows; ``columns``: those
    understood.

    Raises:
        UserError: nothing that can be read is there, or no such split.
    """
    single = path.is_file() and suffix_of(path) != ".json"
    if split is not None and (single or (path / "state.json").is_file()):
        raise UserError(f"data.split = {split!r}: {path} is not divided into splits; leave it out")
    if path.is_file():
        if suffix_of(path) not in SUFFIXES:
            raise UserError(
                f"data file {path} is none of {', '.join(SUFFIXES)}; rename or convert it"
            )
        return [path], []
    if not path.is_dir():
        reason = "is not a regular file or folder" if path.exists() else "does not exist"
        raise UserError(f"data {path} {reason}; give a file of rows or text, or a folder of them")
    if (path / "state.json").is_file():
        return _saved_dataset(path), []
    files = [
        file
        for file in sorted(path.rglob("*"))
        if (file.is_file() or file.is_symlink())  # what a link does not lead to is missed below
        and file.name not in _DESCRIPTIONS
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    present = set(files)
    readable = [
        file
        for file in files
        if suffix_of(file) in SUFFIXES
        and not (file.suffix.lower() == ".gz" and file.with_suffix("") in present)  # a copy
    ]
    if not readable:
        raise UserError(f"data folder {path} has no {', '.join(SUFFIXES)} file")
    tables = [file for file in readable if suffix_of(file) in TABLE_SUFFIXES]
    if len(readable) > 1:
        tables = [file for file in tables if not _is_description(file, columns)]
    texts = [file for file in readable if suffix_of(file) not in TABLE_SUFFIXES]
    readable = tables or texts or readable
    chosen, notes = _of_split(path, readable, split)
    if unread := sorted(present.difference(readable)):
        unread.sort(key=lambda file: suffix_of(file) not in SUFFIXES)  # what could be data first
        names = ", ".join(printable_line(str(file.relative_to(path))) for file in unread[:3])
        names += ", …" * (len(unread) > 3)
        noun = "file" if len(unread) == 1 else "files"
        notes.append(f"not read in {path}: {len(unread)} other {noun} ({names})")
    return chosen, notes


def _is_description(file: Path, columns: Collection[str]) -> bool:
    """Whether a file is one JSON object that is no row and has none, such as ``config.json``."""
    known = suffix_of(file) == ".json" and file.is_file()
    if not known or file.stat().st_size > MOST_DESCRIBED:
        return False
    try:
        value = parse_json(read_text(file, "data file"), str(file))
    except UserError:  # what is wrong with it is said when it is read
        return False
    return (
        isinstance(value, dict)
        and not value.keys() & set(columns)
        and not any(
            isinstance(row, dict) for one in lists_of_rows(value, columns).values() for row in one
        )
    )


def _of_split(folder: Path, files: list[Path], split: str | None) -> tuple[list[Path], list[str]]:
    """The files of one split, where their names or folders tell splits apart."""
    saved = (folder / "dataset_dict.json").is_file()

    def name_of(file: Path) -> str:
        *parents, name = file.relative_to(folder).parts
        if saved:
            return parents[0] if parents else name
        own = _SHARD.sub("", name.partition(".")[0])
        for part in (own, *reversed(parents)):
            if SPLIT.match(bare := _NUMBER.sub("", part)):
                return bare
        words = set(_SPLIT_WORD.findall(name.lower()))
        return words.pop() if len(words) == 1 else own

    names = list(dict.fromkeys(map(name_of, files)))
    kinds = {found[1] for name in names if (found := SPLIT.match(name))}
    sharded = all(_SHARD.search(file.name.partition(".")[0]) for file in files)
    if split is None and not (len(names) > 1 and (saved or sharded or len(kinds) > 1)):
        return files, []
    wanted = choose_split(names, split)
    if wanted is None:
        raise UserError(
            f"data folder {folder} has no split {split or TRAIN!r}; name one of "
            f"{', '.join(map(printable_line, names))} with --set data.split=NAME"
        )
    chosen = [file for file in files if name_of(file) == wanted]
    if saved:
        chosen = _saved_dataset(folder / wanted)
    others = ", ".join(printable_line(name) for name in names if name != wanted)
    note = f"data: split {printable_line(wanted)}; not read: {others} (data.split chooses)"
    return chosen, [note] if others else []


def _saved_dataset(folder: Path) -> list[Path]:
    """The Arrow files of a folder that ``Dataset.save_to_disk`` wrote, in their order."""
    state = parse_json(read_text(folder / "state.json", "data file"), str(folder / "state.json"))
    listed = state.get("_data_files") if isinstance(state, dict) else None
    try:
        names = [Path(one["filename"]).name for one in cast(Any, listed)]
    except (TypeError, KeyError):
        names = []
    if not names:
        raise UserError(f"data file {folder / 'state.json'} names no data files; save it again")
    if state.get("_indices_data_files"):
        raise UserError(
            f"data folder {folder} has an index of its rows, which is not read; save it again "
            "after flatten_indices()"
        )
    return [folder / name for name in names]
