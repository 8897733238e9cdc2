"""Servers in this process: ours, and one that says whatever a test wants."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from distill.serving.app import make_app
from distill.serving.engine import Engine
from distill.serving.serve import web_server
from distill.trimming.file import write_vocabulary
from teachers.gguf.file import file_sha256
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.remote.connection import Address, Connection
from teachers.remote.protocol import Vocabulary

TOKEN = "a token of this test"[2:].replace(" ", "-")

Answer = Callable[[str, bytes], tuple[int, bytes]]
"""From a path and a request's body to status and body."""


@contextmanager
def serving(teacher: GGUFTeacher, folder: Path, port: int = 0) -> Iterator[Connection]:
    """``distill serve`` with this teacher, which it does not close."""
    path = folder / "vocabulary.gguf"
    write_vocabulary(teacher.file, path, teacher.info.name)
    described = Vocabulary(bytes=path.stat().st_size, sha256=file_sha256(path))
    engine = Engine(lambda: teacher)
    bound = socket.create_server(("127.0.0.1", port))
    server = web_server(make_app(engine, path, described, TOKEN))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        yield Connection(Address("http", "127.0.0.1", bound.getsockname()[1], ""), TOKEN)
    finally:
        server.should_exit = True
        thread.join(10.0)
        bound.close()
        engine.thread.shutdown()


def always(status: int, body: bytes) -> Answer:
    """The same answer to everything."""
    return lambda path, asked: (status, body)


@contextmanager
def answering(answer: Answer) -> Iterator[Connection]:
    """A server that answers as told."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            status, said = answer(self.path, body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(said)))
            self.send_header("Location", "http://127.0.0.1:1/")
            self.end_headers()
            self.wfile.write(said)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Connection(Address("http", "127.0.0.1", server.server_address[1], ""), TOKEN)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10.0)


def as_json(content: Any) -> bytes:
    """A JSON body."""
    return json.dumps(content).encode("ascii")
