"""The teacher of a server: one at a time is answered, in a thread of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from teachers.errors import WorkerDefect, WorkerDied
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.remote.protocol import VERSION, Arrays, Facts, Model, Vocabulary


class Engine:
    """A teacher that is loaded again where its worker has ended, so that one bad request does not
    end the server. Use as a context manager."""

    def __init__(self, load: Callable[[], GGUFTeacher]) -> None:
        self._load = load
        self.teacher = load()
        self._closed = False
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")

    def facts(self, vocabulary: Vocabulary) -> Facts:
        """What clients are told of the teacher."""
        info = self.teacher.info
        return Facts(
            version=VERSION,
            runtime=self.teacher.runtime,
            sha256=info.sha256,
            parameters=info.parameters,
            file_bytes=info.file_bytes,
            model=self.model,
            vocabulary=vocabulary,
        )

    @functools.cached_property
    def model(self) -> Model:
        """What llama.cpp says of the model."""
        said = self.teacher.worker.description
        return Model(**{name: said[name] for name in Model.model_fields})

    def ask(
        self,
        operation: str,
        message: dict[str, Any],
        arrays: Arrays,
        progress: Callable[[int], None] = lambda done: None,
    ) -> tuple[dict[str, Any], Arrays]:
        """A checked request to the worker; in ``thread`` alone.

        Raises:
            TeacherError, LibraryError, WorkerDefect: it failed.
        """
        try:
            return self.teacher.worker.ask(operation, message, arrays, progress)
        except (WorkerDied, WorkerDefect):
            self.teacher.close()
            if not self._closed:
                self.teacher = self._load()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self.teacher.close()  # ends what it is being asked, too
        self.thread.shutdown(cancel_futures=True)
