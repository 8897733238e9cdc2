"""Files of data → texts, and rows as JSON objects: streamed, bounded, each row with its place.

Parquet and Arrow are read by pyarrow, which is imported where it is needed.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.capture import file_text
from distill.capture.file_text import bomb, most_unpacked, text_lines, text_parts, unpacked
from distill.capture.json_values import Values, json_lines
from distill.errors import UserError
from distill.runtime.printable import printable_line
from teachers.base import Progress, no_progress

TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
TEXT_SUFFIXES = (".txt", ".md", ".text")
SUFFIXES = TABLE_SUFFIXES + TEXT_SUFFIXES  # each also with .gz behind it
MAX_OBJECT = 256 << 20  # characters of a JSON object with lists of rows, which is read as a whole
ROWS_AT_ONCE = 256
TRAIN = "train"
# The name of a split, alone or with something behind it, as in train_sft.
SPLIT_WORDS = "train(?:ing)?|test(?:ing)?|validation|valid|val|dev|eval(?:uation)?"
SPLIT = re.compile(rf"(?:partial-)?({SPLIT_WORDS})(?![^\W_])")


@dataclass(frozen=True)
class Listener:
    """Who is told while a file is read: the names of columns ``unread`` and the number of rows, a
    ``note`` on what else is not read, and the ``share`` of the file that is."""

    unread: Callable[[list[str], int], None] = lambda names, count: None
    note: Callable[[str], None] = lambda text: None
    share: Progress = no_progress


NOBODY = Listener()


def suffix_of(file: Path) -> str:
    """The file's suffix in lower case, that of the packed file for ``.gz``."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def choose_split(names: Collection[str], split: str | None) -> str | None:
    """``split`` or, without it, the only name, ``train``, or the only kind of ``train``; ``None``
    where there is no such name."""
    if (split or TRAIN) in names:
        return split or TRAIN
    found = list(names) if len(names) == 1 else [one for one in names if one.startswith(TRAIN)]
    return found[0] if split is None and len(found) == 1 else None


def rows(
    file: Path,
    columns: Collection[str],
    what: str = "data file",
    *,
    split: str | None = None,
    listener: Listener = NOBODY,
) -> Iterator[tuple[str, Any]]:
    """Each row's place, such as ``data file x.jsonl, line 3``, and its value.

    ``columns``: those understood; of Parquet and Arrow only these are read. ``split``: of a
    ``.json`` file of several lists.

    Raises:
        UserError: unreadable, damaged or malformed; names file and line or row.
    """
    suffix = suffix_of(file)
    if suffix == ".json":
        yield from _json_rows(file, what, split, columns, listener)
    elif suffix in (".csv", ".tsv"):
        lines = text_lines(file, what, listener.share)
        yield from _csv_rows(lines, f"{what} {file}", "\t" if suffix == ".tsv" else ",")
    elif suffix in (".parquet", ".arrow"):
        yield from _arrow_rows(file, what, columns, listener)
    else:
        yield from json_lines(text_lines(file, what, listener.share), f"{what} {file}")


def _json_rows(
    file: Path, what: str, split: str | None, columns: Collection[str], listener: Listener
) -> Iterator[tuple[str, Any]]:
    """Of a list of rows, an object with such a list, one row, or one row after another."""
    source = f"{what} {file}"
    values = Values(text_parts(file, what, listener.share), source)
    listed = values.take("[")
    if listed and split is not None:
        raise _no_lists(source, split)
    if not values.next() or (listed and values.take("]")):
        return
    line, first = values.line(), values.value(most=None if listed else MAX_OBJECT)
    if listed:
        yield f"{source}, row 1", first
        del first
        number = 1
        while values.take(","):
            number += 1
            yield f"{source}, row {number}", values.value()
        if not values.take("]") or values.next():
            raise UserError(f"{source}, line {values.line()} is not JSON (the list of rows ends)")
    elif values.next():
        if split is not None:
            raise _no_lists(source, split)
        yield f"{source}, line {line}", first
        while values.next():
            line = values.line()
            yield f"{source}, line {line}", values.value("; each line must be one JSON object")
    else:
        yield from _rows_of(first, source, split, columns, listener)


def _no_lists(source: str, split: str) -> UserError:
    return UserError(f"data.split = {split!r}: {source} has no such lists; leave it out")


def _rows_of(
    value: Any, source: str, split: str | None, columns: Collection[str], listener: Listener
) -> Iterator[tuple[str, Any]]:
    """The rows of one of the lists in a JSON object, or the object itself as a row."""
    lists = lists_of_rows(value, columns)
    if lists:
        wanted = choose_split(lists, split)
        if wanted is None:
            names = ", ".join(map(printable_line, lists))
            raise UserError(
                f"{source} has the lists {names}; choose one with --set data.split=NAME"
            )
        if others := [name for name in value if name != wanted and name in (*lists, *columns)]:
            names = ", ".join(map(printable_line, others))
            chooses = " (data.split chooses)" if len(lists) > 1 else ""
            listener.note(f"{source}: list {printable_line(wanted)}; not read: {names}{chooses}")
        value = lists[wanted]
    elif split is not None:
        raise _no_lists(source, split)
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield f"{source}, row {number}", row


def lists_of_rows(value: Any, columns: Collection[str]) -> dict[str, list[Any]]:
    """The lists of rows in a JSON object; none where it is a row itself: beside columns that are
    understood only what has such columns, and is no list of messages, is a list of rows."""
    if not isinstance(value, dict):
        return {}
    lists = {name: one for name, one in value.items() if isinstance(one, list)}
    if value.keys() & set(columns):
        return {
            name: one
            for name, one in lists.items()
            if name not in columns
            and one
            and isinstance(one[0], dict)
            and one[0].keys() & set(columns)
            and not one[0].keys() & {"role", "from"}
        }
    tables = {
        name: one
        for name, one in lists.items()
        if all(isinstance(row, dict) for row in one) and (one or SPLIT.match(name))
    }
    return tables if any(tables.values()) else lists


def _require_different(names: list[str], where: str) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        name = printable_line(twice[0]) or "without a name"
        raise UserError(f"{where}: a column ({name}) is there twice; rename one")


def _csv_rows(lines: Iterator[str], source: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(file_text.MAX_LINE_BYTES)
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        _require_different(list(reader.fieldnames or []), f"{source}, line 1")
        for row in reader:
            where = f"{source}, line {reader.line_num}"
            if None in row:
                raise UserError(f"{where}: more cells than the header has columns; quote commas")
            yield where, row
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.reader.line_num}: {error}") from None


def _arrow_rows(
    file: Path, what: str, columns: Collection[str], listener: Listener
) -> Iterator[tuple[str, Any]]:
    """Rows of a Parquet or Arrow file; of nested objects without the nulls that stand for what
    other rows have."""
    import pyarrow

    source, number, left = f"{what} {file}", 0, most_unpacked(file)
    packed = file.name.lower().endswith(".gz")
    raw = b"".join(unpacked(file, what)) if packed else None
    try:
        with pyarrow.OSFile(str(file)) if raw is None else pyarrow.BufferReader(raw) as opened:
            names, taken, batches, share = _arrow_batches(opened, suffix_of(file), columns)
            _require_different(names, source)
            for batch in batches:
                if (left := left - batch.nbytes) < 0:
                    raise bomb(file, what)
                for at in range(batch.num_rows):
                    (row,) = batch.slice(at, 1).to_pylist()
                    number += 1
                    where = f"{source}, row {number}"
                    yield where, {name: _without_nulls(value) for name, value in row.items()}
                listener.share(share(number))
            listener.share(1.0)
            listener.unread([name for name in names if name not in taken], number)
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{source}, row {number + 1}: not UTF-8; convert it") from None
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, RecursionError) as error:
        reason = printable_line(str(error).strip().partition("\n")[0])
        raise UserError(
            f"{source}, row {number + 1}: damaged, or no such file ({reason}); get it again"
        ) from None


def _arrow_batches(
    opened: Any, suffix: str, columns: Collection[str]
) -> tuple[list[str], list[str], Iterator[Any], Callable[[int], float]]:
    """Names of all columns; those taken (all, if none is understood); record batches of these; what
    share of the file so many rows are."""
    from pyarrow import ipc, parquet

    reader: Any
    if suffix == ".parquet":
        reader = parquet.ParquetFile(opened)
        schema = reader.schema_arrow
    else:
        in_file_format = opened.read(6) == b"ARROW1"
        opened.seek(0)
        reader = ipc.open_file(opened) if in_file_format else ipc.open_stream(opened)
        schema = reader.schema
    taken = [name for name in schema.names if name in columns] or schema.names
    if suffix == ".parquet":
        batches = reader.iter_batches(batch_size=ROWS_AT_ONCE, columns=taken)
        total = max(1, reader.metadata.num_rows)
        return schema.names, taken, batches, lambda number: min(1.0, number / total)

    def checked() -> Iterator[Any]:
        count = getattr(reader, "num_record_batches", None)
        for batch in reader if count is None else map(reader.get_batch, range(count)):
            batch.validate(full=True)  # what the file says of its own layout is not trusted
            yield batch.select(taken)

    return schema.names, taken, checked(), lambda number: opened.tell() / max(1, opened.size())


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
