"""Files of data → texts, and rows as JSON objects: streamed, bounded, each row with its place.

Parquet and Arrow are read by pyarrow, which is imported where it is needed.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from distill.errors import UserError
from distill.runtime.printable import printable_line

TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
TEXT_SUFFIXES = (".txt", ".md", ".text")
SUFFIXES = TABLE_SUFFIXES + TEXT_SUFFIXES  # each also with .gz behind it
MAX_LINE_BYTES = 64 << 20
# What is packed may unpack to this many bytes, and to this many times the size of its file.
FREE_BYTES, MAX_RATIO = 256 << 20, 200
ROWS_AT_ONCE = 256
GZIP_MAGIC = b"\x1f\x8b"
TRAIN = "train"
# The name of a split, alone or with something behind it, as in train_sft.
SPLIT = re.compile(r"(?:partial-)?(train|test|validation|valid|val|dev|eval)(?![^\W_])")

TellUnread = Callable[[list[str], int], None]


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
    unread: TellUnread = lambda names, count: None,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[str, Any]]:
    """Each row's place, such as ``data file x.jsonl, line 3``, and its value.

    ``columns``: those understood; of Parquet and Arrow only these are read, and ``unread`` gets the
    names of the others and the number of rows. ``split``: of a ``.json`` file of several lists;
    ``note`` is told which are not read.

    Raises:
        UserError: unreadable, damaged or malformed; names file and line or row.
    """
    suffix = suffix_of(file)
    if suffix == ".json":
        yield from _json_rows(file, what, split, columns, note)
    elif suffix in (".csv", ".tsv"):
        yield from _csv_rows(file, what, "\t" if suffix == ".tsv" else ",")
    elif suffix in (".parquet", ".arrow"):
        yield from _arrow_rows(file, what, columns, unread)
    else:
        yield from json_lines(_lines(file, what), f"{what} {file}")


def read_text(file: Path, what: str) -> str:
    """The whole of a text file, without a byte order mark; raises ``UserError`` as ``rows``."""
    return _decoded(_whole(file, what), file, what)


def parse_json(text: str, where: str, hint: str = "") -> Any:
    """A JSON value, whose objects have every key once; ``UserError`` names ``where``."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # also a number with too many digits
        raise UserError(f"{where} is not JSON ({error}){hint}") from None


def json_lines(lines: Iterable[str], source: str) -> Iterator[tuple[str, Any]]:
    """Each line's place and value but for blank lines; ``UserError`` names ``source`` and line."""
    empty = True
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{source}, line {number}"
            if empty and line.lstrip().startswith("["):
                raise UserError(
                    f"{where}: a JSON list; name the file .json, or write one row a line"
                )
            empty = False
            yield where, parse_json(line, where, "; each line must be one JSON object")


def require_size(path: Path, what: str, max_bytes: int) -> None:
    """Raise ``UserError`` for a file that is larger, or is not there."""
    with _opened(path, what):
        pass
    if path.stat().st_size > max_bytes:
        raise UserError(f"{what} {path}: larger than {max_bytes >> 20} MiB; give a smaller file")


def require_unicode(value: Any, where: str) -> None:
    """Raise ``UserError`` for text that UTF-8 cannot encode: JSON may spell half a surrogate
    pair."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: has a lone surrogate (\\ud800 to \\udfff), which is not text; remove it"
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return result


@contextmanager
def _opened(file: Path, what: str, place: Callable[[], str] = str) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked if they are gzip; reading errors become ``UserError`` with the
    ``place`` then."""
    try:
        with file.open("rb") as raw:
            packed = file.name.lower().endswith(".gz") or raw.peek(2).startswith(GZIP_MAGIC)
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{what} {file}{place()} is damaged or cut off: {error}; get it again"
        ) from None
    except OSError as error:
        raise UserError(f"{what} {file} cannot be read: {error.strerror or error}") from None


def _most_unpacked(file: Path) -> int:
    return FREE_BYTES + MAX_RATIO * file.stat().st_size if file.exists() else 0


def _bomb(file: Path, what: str) -> UserError:
    return UserError(
        f"{what} {file} unpacks to more than {MAX_RATIO} times its size; unpack it yourself if it "
        "can be trusted"
    )


def _whole(file: Path, what: str) -> bytes:
    parts, left = [], _most_unpacked(file)
    with _opened(file, what) as stream:
        while part := stream.read(1 << 20):
            parts.append(part)
            if (left := left - len(part)) < 0:
                raise _bomb(file, what)
    return b"".join(parts)


def _lines(file: Path, what: str) -> Iterator[str]:
    """The lines of a file with their ends; those longer than ``MAX_LINE_BYTES`` are refused."""
    start, number, most = 0, 0, _most_unpacked(file)
    with _opened(file, what, lambda: f", line {number + 1}") as stream:
        while raw := stream.readline(MAX_LINE_BYTES):
            if start + len(raw) > most:
                raise _bomb(file, what)
            if len(raw) == MAX_LINE_BYTES:
                raise UserError(
                    f"{what} {file}, line {number + 1}: longer than {MAX_LINE_BYTES >> 20} MiB; "
                    "divide it"
                )
            yield _decoded(raw, file, what, number, start)
            number, start = number + 1, start + len(raw)


def _decoded(raw: bytes, file: Path, what: str, lines: int = 0, start: int = 0) -> str:
    """Bytes that stand behind ``lines`` lines and ``start`` bytes, as text."""
    try:
        return raw.decode("utf-8" if start else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = lines + error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{what} {file}, line {line}: not UTF-8 (byte {start + error.start}); convert it"
        ) from None


def _json_rows(
    file: Path,
    what: str,
    split: str | None,
    columns: Collection[str],
    note: Callable[[str], None],
) -> Iterator[tuple[str, Any]]:
    """Of a list of rows, an object with such a list, one row, or one row per line."""
    source, text = f"{what} {file}", read_text(file, what)
    if not text.strip():
        return
    try:
        value = parse_json(text, source)
    except UserError:
        lines = text.split("\n")
        first = next((line for line in lines if line.strip()), "")
        try:
            single = isinstance(parse_json(first, source), dict)
        except UserError:
            single = False
        if not single:
            raise
        yield from json_lines(lines, source)
        return
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
            note(f"{source}: list {printable_line(wanted)}; not read: {names}{chooses}")
        value = lists[wanted]
    elif split is not None:
        raise UserError(f"data.split = {split!r}: {source} has no such lists; leave it out")
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


def _csv_rows(file: Path, what: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.DictReader(_lines(file, what), delimiter=delimiter, strict=True)
    try:
        names = list(reader.fieldnames or [])
        if len(set(names)) < len(names):
            raise UserError(f"{what} {file}, line 1: a column is named twice; rename one")
        for row in reader:
            where = f"{what} {file}, line {reader.line_num}"
            if None in row:
                raise UserError(f"{where}: more cells than the header has columns; quote commas")
            yield where, row
    except csv.Error as error:
        raise UserError(f"{what} {file}, line {reader.reader.line_num}: {error}") from None


def _arrow_rows(
    file: Path, what: str, columns: Collection[str], unread: TellUnread
) -> Iterator[tuple[str, Any]]:
    """Rows of a Parquet or Arrow file; of nested objects without the nulls that stand for what
    other rows have."""
    import pyarrow

    source, number, left = f"{what} {file}", 0, _most_unpacked(file)
    packed = file.name.lower().endswith(".gz")
    raw = _whole(file, what) if packed else None
    try:
        with pyarrow.OSFile(str(file)) if raw is None else pyarrow.BufferReader(raw) as opened:
            names, taken, batches = _arrow_batches(opened, suffix_of(file), columns)
            if len(set(names)) < len(names):
                raise UserError(f"{source}: a column is named twice; rename one")
            for batch in batches:
                if (left := left - batch.nbytes) < 0:
                    raise _bomb(file, what)
                for at in range(batch.num_rows):
                    (row,) = batch.slice(at, 1).to_pylist()
                    number += 1
                    where = f"{source}, row {number}"
                    yield where, {name: _without_nulls(value) for name, value in row.items()}
            unread([name for name in names if name not in taken], number)
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
) -> tuple[list[str], list[str], Iterator[Any]]:
    """Names of all columns; those taken (all, if none is understood); record batches of these."""
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
        return schema.names, taken, reader.iter_batches(batch_size=ROWS_AT_ONCE, columns=taken)

    def checked() -> Iterator[Any]:
        count = getattr(reader, "num_record_batches", None)
        for batch in reader if count is None else map(reader.get_batch, range(count)):
            batch.validate(full=True)  # what the file says of its own layout is not trusted
            yield batch.select(taken)

    return schema.names, taken, checked()


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
