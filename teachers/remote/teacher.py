"""A GGUF teacher behind ``distill serve``: its tokenizer, embeddings and output are copied once,
everything else is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from teachers.base import budget_slices
from teachers.cache import cache_folder
from teachers.gguf.file import GGUFFile, file_sha256, read_gguf
from teachers.llama_cpp.teacher import WorkerTeacher, info_of
from teachers.llama_cpp.wire import pack_ragged, unpack_ragged
from teachers.remote.answers import answer_limit, require_right
from teachers.remote.connection import Connection, ServerError
from teachers.remote.protocol import ROOT, VERSION, Arrays, Facts

TEXT_BYTES, LEAST_BYTES = 4 << 20, 64  # of texts in one request; counted for one at least


def facts_of(connection: Connection) -> Facts | None:
    """What a server says of its teacher; ``None`` where it is no ``distill serve``.

    Raises:
        ServerError: nothing answers there, or something else.
    """
    content = connection.get(f"{ROOT}/teacher", tries=1)
    if content is None:
        return None
    if isinstance(content, dict) and content.get("version") not in (None, VERSION):
        raise ServerError(
            f"server {connection.address} speaks version {content['version']!r} of the protocol, "
            f"this program {VERSION}; update the older one"
        )
    try:
        return Facts.model_validate(content)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ServerError(
            f"server {connection.address} says nothing that a teacher is ({where})"
        ) from None


def vocabulary_of(connection: Connection, facts: Facts) -> GGUFFile:
    """The teacher's file without its layers: copied once, and kept by its digest in this user's
    cache.

    Raises:
        ServerError: it is not what the server says, or there is nowhere to keep it.
        TeacherFileError: it is no such file.
    """
    try:
        folder = cache_folder() / "vocabularies"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ServerError(
            f"the vocabulary of server {connection.address} cannot be kept ({error}); set "
            "XDG_CACHE_HOME to a folder that can be written to"
        ) from None
    path = folder / f"{facts.vocabulary.sha256}.gguf"
    if not path.exists() or file_sha256(path) != facts.vocabulary.sha256:
        connection.download(f"{ROOT}/vocabulary", facts.vocabulary, path)
    file, model = read_gguf(path), facts.model
    tokens, width = file.tensors["token_embd.weight"].shape
    special = [model.bos, model.eos, *model.end_tokens]
    if (tokens, width) != (model.vocab_size, model.width) or max(special) >= tokens:
        raise ServerError(
            f"server {connection.address} says that its teacher has {model.vocab_size} tokens and "
            f"width {model.width}; its file has {tokens} and {width}"
        )
    return file


class RemoteWorker:
    """Asks the worker of ``distill serve``, and checks what it answers."""

    def __init__(self, connection: Connection, facts: Facts) -> None:
        self.connection, self.facts = connection, facts

    def ask(
        self,
        operation: str,
        arguments: dict[str, Any] | None = None,
        arrays: Arrays | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> tuple[dict[str, Any], Arrays]:
        """See ``Worker.ask``.

        Raises:
            ServerError: the server is gone, refuses, or answers with something else.
        """
        message, arrays = arguments or {}, arrays or {}
        if operation == "tokenize":
            return self._tokenized(message)
        if operation == "detokenize":
            return self._detokenized(arrays)
        return self._asked(operation, message, arrays, progress)

    def _tokenized(self, message: dict[str, Any]) -> tuple[dict[str, Any], Arrays]:
        """Of many texts, some at a time."""
        texts = message["texts"]
        sizes = [LEAST_BYTES + len(text) for text in texts]
        parts = [
            self._asked("tokenize", message | {"texts": texts[part]}, {})[1]
            for part in budget_slices(sizes, TEXT_BYTES)
        ]
        sequences = [tokens for part in parts for tokens in unpack_ragged(part, "tokens")]
        return {}, pack_ragged(sequences, "tokens")

    def _detokenized(self, arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        """Of many sequences, some at a time."""
        sequences = unpack_ragged(arrays, "tokens")
        texts: list[str] = []
        for part in budget_slices([LEAST_BYTES + len(one) for one in sequences], TEXT_BYTES):
            some = pack_ragged(sequences[part], "tokens")
            texts += self._asked("detokenize", {}, some)[0]["texts"]
        return {"texts": texts}, {}

    def _asked(
        self,
        operation: str,
        message: dict[str, Any],
        arrays: Arrays,
        progress: Callable[[int], None] = lambda done: None,
    ) -> tuple[dict[str, Any], Arrays]:
        request, model = (message, arrays), self.facts.model
        limit = answer_limit(operation, *request, model)
        answer = self.connection.ask(operation, *request, lambda done: progress(int(done)), limit)
        try:
            require_right(operation, request, answer, model)
        except ValueError as error:
            raise ServerError(
                f"server {self.connection.address} answers {operation} with {error}; its targets "
                "cannot be used"
            ) from None
        return answer

    def close(self) -> None:
        """Nothing stays open."""


class ServedTeacher(WorkerTeacher):
    """A teacher behind ``distill serve``: the same answers to the last bit as from its file on the
    server's machine."""

    def __init__(self, connection: Connection) -> None:
        """Raises:
        ServerError, TeacherFileError: the server or what it says cannot be used.
        """
        facts = facts_of(connection)
        if facts is None:
            raise ServerError(f"server {connection.address} is no `distill serve`")
        self.file = vocabulary_of(connection, facts)
        self.worker = RemoteWorker(connection, facts)
        self._facts = facts
        info = info_of(self.file, facts.model.model_dump(), facts.sha256)
        self.info = replace(info, parameters=facts.parameters, file_bytes=facts.file_bytes)

    @property
    def runtime(self) -> str:
        return self._facts.runtime

    def memory(self) -> int:
        """See ``Teacher.memory``: none of this machine's."""
        return 0
