"""Fixtures: a tiny GGUF teacher made on the spot, a teacher in ten lines, the example teacher, the shared ones."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What the check of llama.cpp finds is the tests' own, in this process and in those that it starts.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="distill-tests-")

from distill.exporting import tokenizer_entries
from students.builder import build_student, student_config
from students.export import ExportNames, write_gguf
from students.model import SO8TForCausalLM
from students.shape import StudentSize
from teachers import example_teacher
from teachers.base import Floats, Progress, TeacherInfo, Tokens
from teachers.capture import fit_companion
from teachers.gguf_file import read_gguf
from teachers.gguf_teacher import GGUFTeacher
from teachers.manifest import Manifest
from teachers.recipe import Recipe
from teachers.records import Answer, Targets, reduce
from teachers.sketch import Basis
from teachers.soft_targets import Arrays, CompactTargets, DenseTargets, HiddenTargets, OutputHead
from teachers.store import SoftTargetStore

SHARED = Path(__file__).parent.parent.parent / "shared"


def pytest_unconfigure() -> None:
    """Remove the tests' own cache folder."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def shared_file(name: str) -> Path:
    """A file of the shared folder beside the project; skips the test where there is none."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} from the shared folder beside the project, which is not here")
    return path


def make_student(
    width: int = 32,
    layers: int = 2,
    vocab_size: int = 96,
    seed: int = 0,
    *,
    tied: bool = True,
    heads: bool = False,
) -> SO8TForCausalLM:
    """A small student with lively weights, so that differences between computations show."""
    config = student_config(
        StudentSize(width, layers),
        vocab_size=vocab_size,
        context_length=256,
        tie_embeddings=tied,
        bos=0,
        eos=1,
    )
    config.safety_head = config.verification_head = heads
    student = build_student(config, seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "gate." in name or ("_head." in name and parameter.ndim == 1):
                parameter.normal_(generator=generator)
            elif parameter.ndim == 2:
                parameter.mul_(4.0)
    return student


def certainty_of(logits: Sequence[float]) -> tuple[float, float]:
    """Log-odds of the most probable token, and how far its logit is above the second, in float64."""
    first, second, *rest = sorted(logits, reverse=True)
    return -math.log(sum(math.exp(value - first) for value in (second, *rest))), first - second


class BigramTeacher:
    """Knows only the token before: its final state is a row of a random table, its logits that times a matrix.

    ``layers`` further tables stand for the outputs of its layers. Exact and at once, so that what is asked of
    stores, batches and training can be compared with a teacher that everything is known of.
    """

    def __init__(self, vocab_size: int, width: int, layers: int = 2, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.tables = torch.randn(layers + 1, vocab_size, width, generator=draw)
        self.matrix = 2.0 * width**-0.5 * torch.randn(vocab_size, width, generator=draw)
        self.answers = self.tables[-1] @ self.matrix.T
        self.info = TeacherInfo(
            name="bigram",
            architecture="bigram",
            parameters=self.tables.numel() + self.matrix.numel(),
            file_bytes=0,
            vocab_size=vocab_size,
            width=width,
            layers=layers,
            context_length=1 << 16,
            bos=0,
            eos=None,
            end_tokens=(),
            add_bos=True,
            chat_template=None,
            sha256="",
            tokenizer_sha256="",
        )

    def states(self, sequences: Sequence[Tokens], layers: Sequence[int] = ()) -> Mapping[str, Floats]:
        """See ``Teacher.states``."""
        seen = _seen(sequences)
        found = {"final": self.tables[-1][seen].numpy()}
        return found | {f"layer{layer}": self.tables[layer][seen].numpy() for layer in layers}

    def output_rows(self, start: int, stop: int) -> Floats:
        """See ``Teacher.output_rows``."""
        return self.matrix[start:stop].numpy()

    def logits(self, sequences: Sequence[Tokens], *, exact: bool = False) -> Floats:
        """See ``Teacher.logits``."""
        return self.answers[_seen(sequences)].numpy()

    def score(
        self,
        sequences: Sequence[Tokens],
        recipe: Recipe,
        bases: Mapping[str, Basis],
        progress: Progress = lambda done: None,
    ) -> Arrays:
        """See ``Teacher.score``."""
        states = {
            name: torch.from_numpy(rows) for name, rows in self.states(sequences, recipe.layers).items()
        }
        layers = {layer: states[f"layer{layer}"] for layer in recipe.layers}
        logits = torch.from_numpy(self.logits(sequences))
        return reduce(Answer(logits, states["final"], layers), recipe, bases)


class Bent:
    """A teacher whose logits are capped after the output matrix, as Gemma 2's are."""

    def __init__(self, teacher: GGUFTeacher) -> None:
        self.teacher = teacher
        self.info = teacher.info

    def logits(self, sequences: Sequence[Tokens], *, exact: bool = False) -> Floats:
        """Softly capped at ±10."""
        return 10.0 * np.tanh(self.teacher.logits(sequences, exact=exact) / 10.0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)


def _seen(sequences: Sequence[Tokens]) -> torch.Tensor:
    """The token that each position follows, ``[N]``."""
    return torch.from_numpy(np.concatenate([tokens[:-1] for tokens in sequences]).astype(np.int64))


def write_store(
    folder: Path,
    teacher: BigramTeacher,
    sequences: Sequence[Tokens],
    recipe: Recipe,
    per_shard: int,
    **identity: Any,
) -> SoftTargetStore:
    """A complete store of what ``teacher`` says about ``sequences``."""
    content = {"recipe": recipe.to_json(), "vocab_size": teacher.info.vocab_size, **identity}
    store = SoftTargetStore.create_or_open(folder, Manifest(content, len(sequences), per_shard))
    bases: Mapping[str, Basis] = {}
    if store.needs_companion:
        companion = fit_companion(teacher, sequences, recipe)  # type: ignore[arg-type]
        store.write_companion(companion)
        bases = companion.bases
    for shard in range(store.manifest.shards):
        start, stop = store.span(shard)
        store.write_shard(shard, sequences[start:stop], teacher.score(sequences[start:stop], recipe, bases))
    return store


def exact_targets(kind: str, logits: torch.Tensor, num_topk: int) -> Targets:
    """Typed targets that lose nothing of ``logits [N, V]``: ``buckets``, ``sketch``, ``hidden`` or ``dense``.

    The head of ``sketch`` and ``hidden`` gives the logits up to a bias of each token and, in ``sketch``, a
    constant of each position, neither of which is in the coordinates.
    """
    if kind == "dense":
        return DenseTargets(logits)
    bias = torch.linspace(-1.0, 2.0, logits.shape[1], dtype=logits.dtype)
    head = OutputHead(torch.eye(logits.shape[1], dtype=logits.dtype), bias)
    if kind == "hidden":
        return HiddenTargets(logits - bias, head)
    targets = CompactTargets.from_logits(logits, num_topk)
    if kind == "buckets":
        return targets
    constant = torch.arange(len(logits), dtype=logits.dtype)[:, None] % 7
    return replace(targets, coordinates=logits - bias + constant, head=head)


@pytest.fixture(scope="session")
def tiny_student() -> SO8TForCausalLM:
    """The student that the tiny teacher is an export of."""
    return make_student(64, 2, len(read_gguf(example_teacher()).value("tokenizer.ggml.tokens")))


@pytest.fixture(scope="session")
def tiny_teacher_path(tmp_path_factory: pytest.TempPathFactory, tiny_student: SO8TForCausalLM) -> Path:
    """A 64×2 GGUF model with random weights and the example teacher's tokenizer and chat template."""
    path = tmp_path_factory.mktemp("teacher") / "tiny.gguf"
    example = read_gguf(example_teacher())
    write_gguf(tiny_student, path, "f32", tokenizer_entries(example), ExportNames("tiny", {}))
    return path


@pytest.fixture(scope="session")
def tiny_teacher(tiny_teacher_path: Path) -> Iterator[GGUFTeacher]:
    """The tiny teacher, loaded once for all tests."""
    with GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
        yield teacher


@pytest.fixture(scope="session")
def example_gguf() -> Iterator[GGUFTeacher]:
    """The example teacher (Q8_0), loaded once for all tests."""
    with GGUFTeacher(example_teacher(), threads=1) as teacher:
        yield teacher
