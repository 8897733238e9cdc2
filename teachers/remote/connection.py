"""HTTP to one server, which is untrusted: every answer has a limit, and no redirection is followed
(the token would go with it)."""

from __future__ import annotations

import hashlib
import http.client
import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from teachers.base import Progress, no_progress
from teachers.errors import TeacherError
from teachers.names import one_line_name
from teachers.remote.protocol import ROOT, Arrays, Vocabulary, pack, parse_json, unpack

WAITS = (1.0, 4.0, 15.0)  # seconds before each further try
BUSY = (429, 502, 503, 504)
CONNECT_SECONDS = 10.0
SILENT_SECONDS = 60.0  # a server of ours gives a sign of life every two
COMPUTING_SECONDS = 3600.0  # others give none
MAX_JSON_BYTES = 256 << 20
MAX_LINE_BYTES = 4096
MOST_WORDS = 300  # characters of a server's own words
PIECE_BYTES = 1 << 20
TOKEN_VARIABLE = "DISTILL_TEACHER_TOKEN"

Result = TypeVar("Result")


class ServerError(TeacherError):
    """A server that cannot be used, or has gone; names it, the reason and the remedy."""


class _Again(Exception):
    """An answer after which it is worth trying again."""


def is_address(text: str) -> bool:
    """Whether a teacher is behind a server rather than in a file."""
    return text.lower().startswith(("http://", "https://"))


@dataclass(frozen=True)
class Address:
    """Where a server is: ``http://HOST:PORT``; ``/v1``, as OpenAI's clients want it, may follow."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises:
        ServerError: this is no such address.
        """
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError:
            raise ServerError(f"teacher {text!r} is no address; write http://HOST:PORT") from None
        plain = parts.username is None and not parts.query and not parts.fragment
        if not (plain and parts.hostname and text.isascii() and text.isprintable()):
            raise ServerError(
                f"teacher {_shown(text.rpartition('@')[2])} is no plain address; write "
                f"http://HOST:PORT, and the token in {TOKEN_VARIABLE}"
            )
        scheme = parts.scheme.lower()
        path = parts.path.rstrip("/").removesuffix("/v1")
        usual = 443 if scheme == "https" else 80
        return cls(scheme, parts.hostname, usual if port is None else port, path)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


class Connection:
    """Asks one server, each time over a connection of its own; tries again where it is busy or
    gone. The token is in no message and no representation."""

    def __init__(self, address: Address, token: str | None = None) -> None:
        self.address = address
        self._headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if token:
            if not (token.isascii() and token.isprintable()) or " " in token:
                raise ServerError(
                    f"server {address}: the token must be printable ASCII without spaces; give "
                    "the one that the server was started with"
                )
            self._headers["Authorization"] = f"Bearer {token}"

    def get(self, path: str, limit: int = 1 << 20, *, tries: int = len(WAITS) + 1) -> Any:
        """The JSON at ``path``; ``None`` where the server has no such thing.

        Raises:
            ServerError: the server is gone, refuses, or answers with something else.
        """
        return self._request("GET", path, None, lambda answer: self._json(answer, limit), tries)

    def post(self, path: str, content: dict[str, Any]) -> Any:
        """As ``get``, for a JSON request; what is computed for it gives no sign of life."""

        def read(answer: http.client.HTTPResponse) -> Any:
            return self._json(answer, MAX_JSON_BYTES)

        body = json.dumps(content).encode("ascii")
        return self._request("POST", path, body, read, seconds=COMPUTING_SECONDS)

    def ask(
        self,
        operation: str,
        message: dict[str, Any],
        arrays: Arrays | None = None,
        progress: Progress = no_progress,
        limit: int = 16 << 20,
    ) -> tuple[dict[str, Any], Arrays]:
        """One operation of ``teachers.remote.protocol``; the answer has ``limit`` bytes at most."""

        def read(answer: http.client.HTTPResponse) -> tuple[dict[str, Any], Arrays]:
            while True:
                line = answer.readline(MAX_LINE_BYTES)
                if not line.endswith(b"\n"):
                    raise _Again("its answer ends in the middle")
                event = parse_json(line)
                if not isinstance(event, dict) or len(event) != 1:
                    raise ValueError("a line that is none of its protocol")
                ((kind, value),) = event.items()
                if kind == "error":
                    raise ServerError(f"server {self.address}: {_shown(value)}")
                if type(value) not in (int, float) or value < 0:
                    raise ValueError(f"a line with {_shown(kind)} {_shown(value)}")
                if kind == "bytes":
                    if type(value) is not int or value > limit:
                        raise ValueError(f"an answer of {value} bytes instead of at most {limit}")
                    body = answer.read(value)
                    if len(body) < value:
                        raise _Again("its answer ends in the middle")
                    return unpack(body)
                progress(value)

        packed = pack(message, arrays)
        result = self._request("POST", f"{ROOT}/{operation}", packed, read)
        if result is None:
            raise ServerError(f"server {self.address} does not know {operation!r}; update it")
        return result

    def download(self, path: str, expected: Vocabulary, target: Path) -> None:
        """Write a file of known size and digest to ``target``, which another process may have
        written meanwhile."""
        temporary = target.with_name(f".{target.name}.{id(self)}-{time.time_ns()}.tmp")

        def read(answer: http.client.HTTPResponse) -> bool:
            digest, left = hashlib.sha256(), expected.bytes
            with temporary.open("wb") as file:
                while left and (piece := answer.read(min(left, PIECE_BYTES))):
                    digest.update(piece)
                    file.write(piece)
                    left -= len(piece)
            if left:
                raise _Again("the file ends in the middle")
            if digest.hexdigest() != expected.sha256:
                raise ValueError("a file with another digest than it says")
            temporary.replace(target)
            return True

        try:
            if self._request("GET", path, None, read) is None:
                raise ServerError(f"server {self.address} has no {path}; update it")
        finally:
            temporary.unlink(missing_ok=True)

    def _json(self, answer: http.client.HTTPResponse, limit: int) -> Any:
        body = answer.read(limit + 1)
        if len(body) > limit:
            raise ValueError(f"more than {limit} bytes")
        return parse_json(body)

    def _request(
        self,
        method: str,
        path: str,
        body: bytes | None,
        read: Callable[[http.client.HTTPResponse], Result],
        tries: int = len(WAITS) + 1,
        seconds: float = SILENT_SECONDS,
    ) -> Result | None:
        for wait in (*WAITS[: tries - 1], None):
            try:
                with closing(self._open()) as connection:
                    connection.connect()
                    assert connection.sock is not None
                    connection.sock.settimeout(seconds)
                    connection.request(method, self.address.path + path, body, self._headers)
                    answer = connection.getresponse()
                    if answer.status == 404:
                        return None
                    if answer.status in BUSY:
                        raise _Again(f"status {answer.status}")
                    if answer.status != 200:
                        raise self._refusal(answer)
                    return read(answer)
            except (OSError, http.client.HTTPException, _Again) as error:
                if isinstance(error, OSError) and error.filename:
                    raise  # of a file here
                if wait is None:
                    raise self._gone(error) from None
                time.sleep(wait)
            except ValueError as error:
                if isinstance(error, TeacherError):
                    raise
                raise ServerError(
                    f"server {self.address} answers {method} {path} with {_shown(str(error))}; is "
                    "it `distill serve` or vLLM, and of this version?"
                ) from None
        raise AssertionError("the last try returns or raises")

    def _open(self) -> http.client.HTTPConnection:
        secure = self.address.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        return kind(self.address.host, self.address.port, timeout=CONNECT_SECONDS)

    def _refusal(self, answer: http.client.HTTPResponse) -> ServerError:
        if answer.status in (401, 403):
            return ServerError(
                f"server {self.address} refuses the token; give the one that it was started with, "
                f"in {TOKEN_VARIABLE} or with --set teacher.token=…"
            )
        try:
            said = parse_json(answer.read(1 << 16))
            said = said.get("error", said) if isinstance(said, dict) else said
            words = said.get("message", said.get("detail")) if isinstance(said, dict) else said
        except ValueError:
            words = None
        text = f": {_shown(words)}" if words else ""
        return ServerError(f"server {self.address} answers with status {answer.status}{text}")

    def _gone(self, error: Exception) -> ServerError:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return ServerError(
            f"server {self.address} does not answer ({_shown(reason)}); start it, or see whether "
            "the address is right. Nothing saved is lost: run the same command again"
        )


def _shown(words: object) -> str:
    """A server's own words on one line, without anything that steers a terminal."""
    return one_line_name(str(words), "nothing", MOST_WORDS)
