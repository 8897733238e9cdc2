"""``distill serve``: load the teacher, write what clients copy, answer until Ctrl-C."""

from __future__ import annotations

import contextlib
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from distill.capture.capture import describe_teacher
from distill.capture.teachers import open_teacher
from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.runtime.format import human_bytes
from distill.runtime.progress import Console
from distill.serving.access import is_local
from distill.serving.app import make_app
from distill.serving.engine import Engine
from distill.trimming.file import write_vocabulary
from teachers.gguf.file import file_sha256
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.remote.connection import TOKEN_VARIABLE
from teachers.remote.protocol import Vocabulary

MOST_CONNECTIONS = 256


@dataclass(frozen=True)
class Listening:
    """Where the server listens (port 0: a free one), and its token; ``made``: only now, so that
    it has to be shown."""

    host: str
    port: int
    token: str
    made: bool


def serve(config: RunConfig, listening: Listening, console: Console) -> None:
    """Answer requests until Ctrl-C; ``check_serve`` was called.

    Raises:
        UserError: the address cannot be used.
        TeacherFileError, TeacherError: the teacher cannot be used.
    """

    def load() -> GGUFTeacher:
        teacher = open_teacher(config.teacher)
        assert isinstance(teacher, GGUFTeacher)
        return teacher

    with (
        contextlib.closing(_socket(listening)) as bound,
        tempfile.TemporaryDirectory() as folder,
    ):
        with console.stage("Load teacher") as stage:
            engine = Engine(load)
            info = engine.teacher.info
            stage.finish(describe_teacher(info))
        with engine:
            with console.stage("Write vocabulary") as stage:
                path = Path(folder) / "vocabulary.gguf"
                write_vocabulary(engine.teacher.file, path, info.name)
                described = Vocabulary(bytes=path.stat().st_size, sha256=file_sha256(path))
                stage.finish(f"{human_bytes(described.bytes)}, which each client copies once")
            _announce(listening, bound, console)
            web_server(make_app(engine, path, described, listening.token)).run(sockets=[bound])


def _socket(listening: Listening) -> socket.socket:
    """Raises:
    UserError: nothing can listen there.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            listening.host, listening.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=MOST_CONNECTIONS)
    except OSError as error:
        raise UserError(
            f"--host {listening.host} --port {listening.port}: {error.strerror or error}; choose "
            "another"
        ) from None


def _announce(listening: Listening, bound: socket.socket, console: Console) -> None:
    host = f"[{listening.host}]" if ":" in listening.host else listening.host
    console.note(f"listening at http://{host}:{bound.getsockname()[1]}; Ctrl-C ends it")
    if listening.made:
        console.note(f"token for clients, shown only here: {TOKEN_VARIABLE}={listening.token}")
    if not is_local(listening.host):
        console.warn(
            "what is sent, the token too, can be read on the way; use it in a network that you "
            "trust, or behind a proxy with TLS, or over ssh -L"
        )


def web_server(app: ASGIApp) -> uvicorn.Server:
    """What answers for ``app``; it writes no log of requests."""
    config = uvicorn.Config(
        app,
        access_log=False,
        log_level="error",
        lifespan="off",
        limit_concurrency=MOST_CONNECTIONS,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config)
