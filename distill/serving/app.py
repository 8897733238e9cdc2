"""The server's routes: OpenAI's, and those of ``teachers.remote.protocol``. Errors are JSON, in a
line; nothing a client sends is trusted."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from distill.serving.access import allows
from distill.serving.completions import CompletionRequest, complete, require_answerable
from distill.serving.engine import Engine
from distill.serving.requests import parse, require_valid
from teachers.errors import LibraryError, TeacherError
from teachers.remote.protocol import (
    HEARTBEAT_SECONDS,
    MAX_BODY_BYTES,
    OPERATIONS,
    ROOT,
    Vocabulary,
    pack,
    parse_json,
    unpack,
)

BODY_SECONDS = 120.0  # that a request's body may take
MOST_WORDS = 1000  # characters of an error
OPEN = ("/health",)  # to everybody

_log = logging.getLogger("distill.serving")


class Guard:
    """Lets only requests with the token through."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http" and scope["path"] not in OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            if not allows(given, self._token):
                await _error(401, "the token is missing or wrong")(scope, receive, send)
                return
        await self.app(scope, receive, send)


def make_app(engine: Engine, vocabulary: Path, described: Vocabulary, token: str) -> ASGIApp:
    """The server of ``engine``'s teacher; ``vocabulary``: the file that clients copy."""
    facts = engine.facts(described).model_dump()
    info = engine.teacher.info

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(request: Request) -> Response:
        model = {"id": info.name, "object": "model", "created": 0, "owned_by": "distill"}
        return JSONResponse(
            {"object": "list", "data": [model | {"max_model_len": info.context_length}]}
        )

    async def teacher(request: Request) -> Response:
        return JSONResponse(facts)

    async def vocabulary_file(request: Request) -> Response:
        return FileResponse(vocabulary, media_type="application/octet-stream")

    async def completions(request: Request) -> Response:
        content = parse_json(await _body(request))
        asked: CompletionRequest = parse(CompletionRequest, content)
        require_answerable(asked, engine)
        body = await _in_thread(engine, lambda: _encoded(complete(asked, engine)))
        return Response(body, media_type="application/json")

    async def operate(request: Request) -> Response:
        operation = request.path_params["operation"]
        if operation not in OPERATIONS:
            raise HTTPException(404)
        message, arrays = unpack(await _body(request))
        require_valid(operation, message, arrays, engine.model)
        done = [0]

        def work() -> bytes:
            def progress(count: int) -> None:
                done[0] = count

            return pack(*engine.ask(operation, message, arrays, progress))

        return StreamingResponse(_lines(engine, work, done), media_type="application/octet-stream")

    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/completions", completions, methods=["POST"]),
            Route(f"{ROOT}/teacher", teacher),
            Route(f"{ROOT}/vocabulary", vocabulary_file),
            Route(f"{ROOT}/{{operation}}", operate, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _refused, ValueError: _invalid, LibraryError: _broken},
    )
    return Guard(app, token)


async def _body(request: Request) -> bytes:
    """A request's body.

    Raises:
        HTTPException: it is too large, or does not come.
    """

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > MAX_BODY_BYTES:
                raise HTTPException(413, f"a body of more than {MAX_BODY_BYTES} bytes")
        return b"".join(parts)

    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and int(stated) > MAX_BODY_BYTES:
        raise HTTPException(413, f"a body of more than {MAX_BODY_BYTES} bytes")
    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except (asyncio.TimeoutError, ClientDisconnect):
        raise HTTPException(408, "the body does not come") from None


async def _lines(
    engine: Engine, work: Callable[[], bytes], done: list[int]
) -> AsyncIterator[bytes]:
    """The answer to an operation: signs of life, then what ``work`` gives in the engine's thread.

    A client that has gone ends this; work that has not begun is then left out.
    """
    future = _in_thread(engine, work)
    try:
        while not (await asyncio.wait({future}, timeout=HEARTBEAT_SECONDS))[0]:
            yield _line({"progress": done[0]})
        body = future.result()
    except (ValueError, LibraryError) as error:
        yield _line({"error": _shortly(error)})
    except Exception:
        _log.exception("a request failed")
        yield _line({"error": "the server failed by a mistake of its own; its output says more"})
    else:
        yield _line({"bytes": len(body)})
        yield body
    finally:
        future.cancel()


def _in_thread(engine: Engine, work: Callable[[], bytes]) -> asyncio.Future[bytes]:
    return asyncio.get_running_loop().run_in_executor(engine.thread, work)


def _shortly(error: Exception) -> str:
    return " ".join(str(error).split())[:MOST_WORDS]


def _encoded(content: dict[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event).encode("ascii") + b"\n"


def _error(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse(content, status, headers)


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail)


def _invalid(request: Request, error: Exception) -> Response:
    """What a client asks that cannot be; or what this teacher cannot do."""
    return _error(500 if isinstance(error, TeacherError) else 400, _shortly(error))


def _broken(request: Request, error: Exception) -> Response:
    return _error(500, _shortly(error))
