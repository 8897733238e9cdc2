"""JSON values, and lines of them, with their place; objects have every key once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, cast

from distill.capture import file_text
from distill.errors import UserError

TOO_DEEP = "nested too deeply"
_SPACE = re.compile(r"[ \t\r\n]*")


def parse_json(text: str, where: str, hint: str = "") -> Any:
    """A JSON value, whose objects have every key once; ``UserError`` names ``where``."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise UserError(f"{where} is not JSON ({TOO_DEEP}){hint}") from None
    except ValueError as error:  # also a number with too many digits
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


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


class Values:
    """JSON values one after another, of a text that is read in parts; ``UserError`` names
    ``source`` and the line."""

    def __init__(self, parts: Iterator[str], source: str) -> None:
        self._parts, self._source = parts, source
        self._text, self._at, self._lines = "", 0, 1

    def line(self, at: int | None = None) -> int:
        """The line of a place in the text, by default of what comes next."""
        return self._lines + self._text.count("\n", 0, self._at if at is None else at)

    def next(self) -> str:
        """The sign that comes next after white space; none at the end."""
        while True:
            self._at = cast(re.Match[str], _SPACE.match(self._text, self._at)).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def take(self, sign: str) -> bool:
        """Pass over this sign if it comes next."""
        found = self.next() == sign
        self._at += found
        return found

    def value(self, hint: str = "", most: int | None = None) -> Any:
        """The value that comes next, of ``most`` characters (none: as a line)."""
        self.next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or not self._read():  # a number may go on
                    self._at = end
                    return value
            except RecursionError:
                where = f"{self._source}, line {self.line()}"
                raise UserError(f"{where} is not JSON ({TOO_DEEP}){hint}") from None
            except ValueError as error:  # also a number with too many digits
                cut = isinstance(error, json.JSONDecodeError)
                had = len(self._text) - self._at
                if cut and had >= (most or file_text.MAX_LINE_BYTES):
                    where = f"{self._source}, line {self.line()}"
                    raise file_text.too_long(where, most or file_text.MAX_LINE_BYTES) from None
                if not cut or not self._read(had):
                    at = error.pos if isinstance(error, json.JSONDecodeError) else None
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                    raise UserError(
                        f"{self._source}, line {self.line(at)} is not JSON ({reason}){hint}"
                    ) from None

    def _read(self, least: int = 1) -> bool:
        """Read so many more characters, if there are any."""
        more = ""
        for part in self._parts:
            more += part
            if len(more) >= least:
                break
        if more:
            self._lines += self._text.count("\n", 0, self._at)
            self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)
