"""A teacher behind a server that gives the top-k of a prompt's log-probabilities and no more: vLLM.

``POST /v1/completions`` with ``prompt_logprobs``: per position a mapping of token id to
``{"logprob", "rank", "decoded_token"}``, null for the first. What a store keeps of it is truncated,
and says so. Letters: N positions, K tokens asked for, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np

from teachers.base import (
    Floats,
    GenerationRequest,
    Keep,
    Progress,
    Teacher,
    TeacherInfo,
    Tokens,
    budget_slices,
    no_progress,
    whole_masks,
)
from teachers.gguf.file import GGUFFile
from teachers.huggingface.folder import check_tokenizer_folder
from teachers.llama_cpp.teacher import shape_in
from teachers.names import MOST_NAME, one_line_name, ordinary_name
from teachers.remote.connection import Connection, ServerError
from teachers.targets.recipe import TINY_VOCABULARY

if TYPE_CHECKING:
    from teachers.targets.distributions import Arrays
    from teachers.targets.recipe import Recipe
    from teachers.targets.state_codec import Basis

TOGETHER_TOKENS = 8192  # of the prompts of a request
LEAST_LOGPROB = -9000.0  # vLLM writes −9999 for a token of which it knows nothing
MOST_SUM = 1.001  # of the probabilities
MAX_COUNT = 1 << 20
PROBE = "The quick brown fox, 12 of them: über naïve 東京!"
REMEDY = "use --targets compact --set targets.sketch_bytes=0"
NO_PROMPT_LOGPROBS = (
    "knows no prompt_logprobs for /v1/completions (llama-server does not); start `distill serve` "
    "with the same GGUF file, or vLLM"
)


class Reader(Protocol):
    """Turns texts into ids and back, as ``Teacher`` does."""

    def tokenize(
        self, texts: Sequence[str], *, add_special: bool, parse_special: bool
    ) -> list[Tokens]:
        """Token ids of each text."""
        ...

    def detokenize(self, sequences: Sequence[Tokens]) -> list[str]:
        """The text of each token sequence."""
        ...


@dataclass(frozen=True)
class OwnTokenizer:
    """The tokenizer that this side has of a server's model.

    ``info``: what its files say of the model; 0 for what they do not. ``file``: that file, if it is
    GGUF. ``close``: ends the reader.
    """

    reader: Reader
    info: TeacherInfo
    path: Path
    file: GGUFFile | None
    close: Callable[[], None]


def gguf_tokenizer(file: GGUFFile, running: Teacher, close: Callable[[], None]) -> OwnTokenizer:
    """Of a GGUF file, whole or a vocabulary alone, whose tokenizer is ``running``."""
    stated = (
        file.value(f"{file.architecture}.{key}") for key in ("embedding_length", "block_count")
    )
    width, layers = (
        value if type(value) is int and 1 <= value <= MAX_COUNT else 0 for value in stated
    )
    whole = any(name.startswith("blk.") for name in file.tensors)
    info = replace(
        running.info,
        architecture=file.architecture,
        parameters=file.parameters if whole else 0,
        file_bytes=0,
        width=width,
        layers=layers,
        shape=shape_in(file, width),
    )
    return OwnTokenizer(running, info, file.path, file, close)


def folder_tokenizer(path: Path) -> OwnTokenizer:
    """Of a transformers folder: ``tokenizer.json`` with ``config.json``.

    Raises:
        TeacherFileError: it cannot be used.
    """
    from teachers.huggingface.tokenizer import FolderTokenizer  # transformers takes seconds

    found = check_tokenizer_folder(path)
    reader = FolderTokenizer(found.folder, found.vocab_size)
    info = reader.info(
        found.bos,
        found.stops,
        architecture=found.architecture,
        parameters=0,
        file_bytes=0,
        width=found.width,
        layers=found.layers,
        context_length=1,
        sha256="",
    )
    return OwnTokenizer(reader, info, path, None, lambda: None)


class CompletionsTeacher(Teacher):
    """A model behind ``/v1/completions``. Use as a context manager."""

    def __init__(self, connection: Connection, tokenizer: OwnTokenizer) -> None:
        """Raises:
        ServerError: the server gives no prompt_logprobs, or has another tokenizer.
        """
        self.connection, self.tokenizer = connection, tokenizer
        self.model, context = served_model(connection)
        version = connection.get("/version")
        said = version.get("version") if isinstance(version, dict) else None
        self._server = f"vLLM {one_line_name(said, '')}" if said else "OpenAI-compatible server"
        # A server says nothing of weights, so a teacher is what it is called and how it reads.
        identity = repr(("completions", self.model, tokenizer.info.tokenizer_sha256))
        self.info = replace(
            tokenizer.info,
            name=one_line_name(ordinary_name(self.model), "teacher"),
            context_length=context - 1,  # the server writes a token, which needs a place
            sha256=hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest(),
        )
        self._require_same_tokenizer()

    @property
    def file(self) -> GGUFFile | None:
        """The GGUF file whose tokenizer it is, if it is one."""
        return self.tokenizer.file

    def _require_same_tokenizer(self) -> None:
        """Ask for a few tokens, and for the vocabulary's last."""
        (tokens,) = self.tokenize([PROBE], add_special=False, parse_special=False)
        last = np.array([tokens[0], self.info.vocab_size - 1], dtype=np.int32)
        for row in self._answers([tokens, last], 1):
            for token, (_, text) in row.items():
                (own,) = self.detokenize([np.array([token], dtype=np.int32)])
                if text and "\ufffd" not in text + own and text.strip() != own.strip():
                    raise ServerError(
                        f"server {self.connection.address} has another tokenizer: token {token} is "
                        f"{one_line_name(text, '')!r} to it and {own!r} in {self.tokenizer.path}; "
                        "give that of its model with --tokenizer"
                    )

    @property
    def runtime(self) -> str:
        return f"{self._server}, log-probabilities"

    @property
    def truncation(self) -> str:
        return (
            "a server's top-k log-probabilities: the mass of all other tokens is exact at "
            "temperature 1 and estimated by a power law at others, its shape is not known"
        )

    def memory(self) -> int:
        """See ``Teacher.memory``: none of this machine's, but for the tokenizer."""
        return 0

    def tokenize(
        self, texts: Sequence[str], *, add_special: bool, parse_special: bool
    ) -> list[Tokens]:
        return self.tokenizer.reader.tokenize(
            texts, add_special=add_special, parse_special=parse_special
        )

    def detokenize(self, sequences: Sequence[Tokens]) -> list[str]:
        return self.tokenizer.reader.detokenize(sequences)

    def score(
        self,
        sequences: Sequence[Tokens],
        recipe: Recipe,
        bases: Mapping[str, Basis],
        progress: Progress = no_progress,
        keep: Sequence[Keep] | None = None,
    ) -> Arrays:
        """See ``Teacher.score``.

        Raises:
            ServerError: the recipe needs more than the top-k; or the server's answer is none.
        """
        from teachers.remote.tail import estimated_tail

        if recipe.kind != "compact" or recipe.has_sketch or recipe.layers:
            self._refuse("hidden states and whole distributions")
        size = self.info.vocab_size
        count = min(recipe.num_topk, size)
        masks = whole_masks(sequences, keep)
        ids, logprobs = [], []
        done = 0
        lengths = [len(tokens) for tokens in sequences]
        for part in budget_slices(lengths, TOGETHER_TOKENS):
            rows = self._answers(sequences[part], count)
            for wanted in np.concatenate(masks[part]):
                row = next(rows)
                if wanted:
                    some, of_some = self._topk(row, count)
                    ids.append(some)
                    logprobs.append(of_some)
            done += sum(lengths[part]) - len(lengths[part])
            progress(done)
        values = np.array(logprobs, dtype=np.float64).reshape(-1, count)
        kind = np.uint16 if size <= TINY_VOCABULARY else np.int32
        return {
            "topk_ids": np.array(ids, dtype=kind).reshape(-1, count),
            "topk_logits": (values - values[:, :1]).astype(np.float16),
            "tail": estimated_tail(values, size),
        }

    def _topk(self, row: dict[int, tuple[float, str]], count: int) -> tuple[list[int], list[float]]:
        """The greatest of a position; the prompt's own token, which is there too, is not asked
        for."""
        greatest = sorted(row, key=lambda token: (-row[token][0], token))[:count]
        values = [row[token][0] for token in greatest]
        if len(values) < count or values[-1] < LEAST_LOGPROB:
            known = sum(value >= LEAST_LOGPROB for value in values)
            raise ServerError(
                f"server {self.connection.address} gives {known} tokens of a position where "
                f"{count} were asked for; start it with --max-logprobs {count}, or set "
                f"targets.num_topk={known}"
            )
        if (total := math.fsum(map(math.exp, values))) > MOST_SUM:
            raise ServerError(
                f"server {self.connection.address} gives probabilities that add up to {total:.4g}; "
                "they must be those of the model, at temperature 1"
            )
        return greatest, values

    def _answers(
        self, sequences: Sequence[Tokens], count: int
    ) -> Iterator[dict[int, tuple[float, str]]]:
        """The mapping of every position of some sequences: token → log-probability and text."""
        request = {
            "model": self.model,
            "prompt": [tokens.tolist() for tokens in sequences],
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": count,
        }
        answer = self.connection.post("/v1/completions", request)
        if answer is None:
            raise ServerError(f"server {self.connection.address} {NO_PROMPT_LOGPROBS}")
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != len(sequences):
            self._wrong(f"not one choice for each of {len(sequences)} prompts")
        indices = [one.get("index") if isinstance(one, dict) else None for one in choices]
        if sorted(map(repr, indices)) != sorted(map(repr, range(len(sequences)))):
            self._wrong("choices without their index")
        ordered = sorted(choices, key=lambda one: int(one["index"]))
        return self._positions(ordered, sequences)

    def _positions(
        self, choices: list[dict[str, Any]], sequences: Sequence[Tokens]
    ) -> Iterator[dict[int, tuple[float, str]]]:
        for choice, tokens in zip(choices, sequences, strict=True):
            positions = choice.get("prompt_logprobs")
            if positions is None:
                raise ServerError(f"server {self.connection.address} {NO_PROMPT_LOGPROBS}")
            if not isinstance(positions, list) or len(positions) != len(tokens):
                self._wrong(f"no prompt_logprobs of {len(tokens)} tokens")
            for position in positions[1:]:
                if not isinstance(position, dict):
                    self._wrong("a position that is no mapping")
                yield {self._token(key): self._entry(entry) for key, entry in position.items()}

    def _token(self, key: object) -> int:
        plain = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 12
        token = int(str(key)) if plain else -1
        if token < 0:
            self._wrong(f"the token {key!r}")
        if token >= self.info.vocab_size:
            raise ServerError(
                f"server {self.connection.address} has token {token}, the tokenizer in "
                f"{self.tokenizer.path} only {self.info.vocab_size}; give that of its model with "
                "--tokenizer"
            )
        return token

    def _entry(self, entry: object) -> tuple[float, str]:
        logprob = entry.get("logprob") if isinstance(entry, dict) else None
        if type(logprob) not in (int, float) or not -1e5 < logprob < 1e-3:  # type: ignore[operator]
            self._wrong(f"the log-probability {logprob!r}")
        text = entry.get("decoded_token") if isinstance(entry, dict) else None
        return float(logprob), text if isinstance(text, str) else ""  # type: ignore[arg-type]

    def _wrong(self, what: str) -> NoReturn:
        raise ServerError(
            f"server {self.connection.address} answers /v1/completions with "
            f"{one_line_name(what, 'nothing', MOST_NAME)}; is it vLLM?"
        )

    def _refuse(self, what: str) -> NoReturn:
        raise ServerError(
            f"server {self.connection.address} gives top-k log-probabilities alone, no {what}; "
            f"{REMEDY}, or start `distill serve`"
        )

    def generate(
        self, request: GenerationRequest, progress: Progress = no_progress
    ) -> list[Tokens]:
        """Raises:
        ServerError: always; text is asked for by its tokens, which such a server does not give.
        """
        raise ServerError(
            f"server {self.connection.address} is asked to score text, not to write it; give the "
            "text with --data, or start `distill serve`"
        )

    def states(
        self,
        sequences: Sequence[Tokens],
        layers: Sequence[int] = (),
        *,
        keep: Sequence[Keep] | None = None,
    ) -> Mapping[str, Floats]:
        """Raises:
        ServerError: always.
        """
        self._refuse("hidden states")

    def output_rows(self, start: int, stop: int) -> Floats:
        """Raises:
        ServerError: always.
        """
        self._refuse("output matrix")

    def logits(
        self,
        sequences: Sequence[Tokens],
        *,
        exact: bool = False,
        keep: Sequence[Keep] | None = None,
    ) -> Floats:
        """Raises:
        ServerError: always.
        """
        self._refuse("whole distributions")

    def speed(self, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
        """Raises:
        ServerError: always.
        """
        self._refuse("speed of its own")

    def close(self) -> None:
        self.tokenizer.close()


def served_model(connection: Connection) -> tuple[str, int]:
    """The name of the one model of a server, and how many tokens it takes."""
    answer = connection.get("/v1/models", tries=1)
    models = answer.get("data") if isinstance(answer, dict) else None
    first = models[0] if isinstance(models, list) and models else None
    name = first.get("id") if isinstance(first, dict) else None
    if not isinstance(first, dict) or not isinstance(name, str):
        raise ServerError(
            f"server {connection.address} names no model at /v1/models; is it `distill serve` or "
            "vLLM?"
        )
    longest = first.get("max_model_len")
    if type(longest) is not int or not 8 <= longest <= 1 << 30:
        raise ServerError(f"server {connection.address} {NO_PROMPT_LOGPROBS}")
    return name, longest
