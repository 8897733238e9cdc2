"""Proof that an exported GGUF file is the trained model: loaded back in llama.cpp and compared.

The F32 file is compared with PyTorch; every other type with the F32 file that it was made from.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.errors import ProofFailed
from distill.evaluation.cost import SPEED_ROUNDS, measure_speed
from distill.evaluation.scorers import llama_scorer, student_scorer
from distill.losses import divergences
from distill.runs.folder import HeldOut
from distill.runs.proof_record import Proof
from students.gguf.file_types import Quantization
from students.gguf.table_gelu import computed_as_llama_cpp, uses_table
from students.mapped_tensors import MappedTensors
from teachers.base import Tokens
from teachers.errors import TeacherError, WorkerDied
from teachers.gguf.file import TeacherFileError
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.teacher_record import first_sequences

PROOF_SEQUENCES = 16
PROOF_TOKENS = 4096
PROOF_BYTES = 1 << 27  # of one sequence's logits in float32; several copies in float64 are compared

MAX_LOGIT_DIFFERENCE = {"f32": 1e-3}
ROUNDINGS = 4.0  # llama.cpp's own rounding beside PyTorch's, in another order of sums
# What the type's own rounding explains, with room for small models, which suffer most.
MAX_MEAN_KL = {
    "f32": 1e-6,
    "f16": 1e-4,
    "bf16": 5e-3,
    "q8_0": 5e-3,
    "q6_k": 2e-2,
    "q5_k_m": 5e-2,
    "q4_k_m": 0.10,
    "q4_0": 0.25,
    "iq4_nl": 0.20,
}


@dataclass(frozen=True)
class Expected:
    """What an F32 file is to give: logits ``[n, V]`` of each sequence of a proof.

    ``allowed``: how far it may be off, in logits at most and in nats on average. Beyond what
    float32 explains that is twice what llama.cpp's table of GELU moves them by: an entry is off by
    half a step at most, and a value beside an entry's edge may get the next one, a whole step away.
    ``rounding``: finds how far PyTorch's own float32 is off, in logits at most. A first token's
    state can be thousands of times as large as others', and cancel in the last layers.
    """

    logits: Sequence[Tensor]
    allowed: tuple[float, float]
    rounding: Callable[[], float]


def expected_of(model: Any, sequences: Sequence[Tokens], kept: MappedTensors) -> Expected:
    """A PyTorch model's answers. They are computed before the file that is to give the same is
    opened: the two are not in memory together."""
    scorer, moved = student_scorer(model), _Sums()
    exact = [kept.keep(scorer([tokens])) for tokens in sequences]
    allowed = MAX_LOGIT_DIFFERENCE["f32"], MAX_MEAN_KL["f32"]
    if not uses_table(model.config):
        return Expected(exact, allowed, lambda: _rounding(model, sequences, exact))
    with computed_as_llama_cpp(model):
        answers = [kept.keep(scorer([tokens])) for tokens in sequences]
    for one, other in zip(exact, answers, strict=True):
        moved.add(one, other)
    found = 2 * moved.max_difference, 4 * moved.kl / max(1, moved.positions)  # a KL is of squares
    return Expected(
        answers, (max(allowed[0], found[0]), max(allowed[1], found[1])), rounding=lambda: 0.0
    )


def _rounding(model: Any, sequences: Sequence[Tokens], answers: Sequence[Tensor]) -> float:
    """How far a model's float32 ``answers`` are from its float64 ones, at most."""
    scorer, sums = student_scorer(copy.deepcopy(model).double()), _Sums()
    for tokens, logits in zip(sequences, answers, strict=True):
        sums.add(scorer([tokens]), logits)
    return sums.max_difference


def prove(
    path: Path,
    expected: Expected,
    held_out: HeldOut,
    kept: MappedTensors,
    *,
    timed: bool = True,
) -> tuple[Proof, list[Tensor]]:
    """Compare an F32 file with PyTorch, with a float32 KV cache; ``timed``: its speed too. Returns
    the file's own answers as well.

    Raises:
        ProofFailed: they differ by more than float32 explains, the tokenizers differ, or llama.cpp
        cannot run the file.
    """
    found: list[Tensor] = []
    rounds = SPEED_ROUNDS if timed else 0
    proof = _prove(
        path, "f32", expected.logits, held_out, rounds, lambda one: found.append(kept.keep(one))
    )
    far, most = expected.allowed
    if proof.max_logit_difference > far and proof.mean_kl <= most:
        far = max(far, ROUNDINGS * expected.rounding())
    _judge(proof, (far, most))
    return proof, found


def prove_quantized(path: Path, quant: str, expected: Sequence[Tensor], held_out: HeldOut) -> Proof:
    """Compare a quantized file with the F32 file that it was made from (``expected``: that file's
    answers, with a float32 KV cache too).

    Raises:
        ProofFailed: they differ by more than the type explains, the tokenizers differ, or llama.cpp
        cannot run it.
    """
    proof = _prove(path, quant, expected, held_out, SPEED_ROUNDS)
    most = max(MAX_MEAN_KL[name] for name in Quantization.parse(quant).rounding)
    _judge(proof, (math.inf, most))
    return proof


def _prove(
    path: Path,
    quant: str,
    expected: Sequence[Tensor],
    held_out: HeldOut,
    rounds: int,
    keep: Callable[[Tensor], None] = lambda logits: None,
) -> Proof:
    against = "PyTorch" if quant == "f32" else "the F32 file"
    lines, sums = held_out.lines, _Sums()
    try:
        # F32 weights are computed with as they lie in the file.
        with GGUFTeacher(path, LoadOptions(mapped=quant == "f32")) as exported:
            scorer = llama_scorer(exported, exact=True)
            chosen = proof_sequences(held_out.sequences, exported.info.vocab_size)
            for tokens, reference in zip(chosen, expected, strict=True):
                logits = scorer([tokens])
                sums.add(reference, logits)
                keep(logits)
            speeds = [measure_speed(exported) for _ in range(rounds)] or [(0.0, 0.0)]
            again = exported.tokenize(lines.texts, add_special=True, parse_special=True)
    except WorkerDied:
        raise  # after its first decode: no fault of the file
    except (TeacherError, TeacherFileError) as error:
        raise ProofFailed(f"llama.cpp does not run the exported {quant} file: {error}") from None
    for text, ours, theirs in zip(lines.texts, again, lines.tokens, strict=True):
        if ours.tolist() != theirs.tolist():
            raise ProofFailed(
                f"the exported tokenizer gives other ids than the teacher's for {text[:60]!r}"
            )
    return Proof(
        quant=quant,
        positions=sums.positions,
        max_logit_difference=sums.max_difference,
        mean_kl=sums.kl / sums.positions,
        agreement=sums.same / sums.positions,
        token_lines=len(lines.texts),
        against=against,
        prompt_speed=statistics.median(prompt for prompt, _ in speeds),
        generation_speed=statistics.median(generation for _, generation in speeds),
        unsteady_speed=max(one for _, one in speeds) / max(1e-9, min(one for _, one in speeds)),
    )


@dataclass
class _Sums:
    """Sums over the positions compared so far."""

    positions: int = 0
    max_difference: float = 0.0
    kl: float = 0.0
    same: int = 0

    def add(self, expected: Tensor, found: Tensor) -> None:
        """Compare two models' logits ``[n, V]`` of a sequence."""
        difference = float((expected - found).abs().max())
        self.positions += len(expected)
        self.max_difference = max(self.max_difference, difference)
        self.kl += float(divergences.dense_forward_kl(expected.double(), found.double()).sum())
        self.same += int((expected.argmax(-1) == found.argmax(-1)).sum())


def proof_sequences(sequences: Sequence[Tokens], vocab_size: int) -> list[Tokens]:
    """The first sequences, as many as make a proof, each cut to what is compared at once."""
    longest = max(2, PROOF_BYTES // (4 * vocab_size))
    return first_sequences(
        (tokens[:longest] for tokens in sequences), PROOF_SEQUENCES, PROOF_TOKENS
    )


def _judge(proof: Proof, allowed: tuple[float, float]) -> None:
    """``allowed``: see ``Expected``."""
    far, most = allowed
    if not proof.max_logit_difference <= far:
        raise ProofFailed(
            f"the {proof.quant} file's logits differ from {proof.against} by "
            f"{proof.max_logit_difference:.2e}, more than {far:.2g}"
        )
    if not proof.mean_kl <= most:
        raise ProofFailed(
            f"the {proof.quant} file is {proof.mean_kl:.2e} nats per token from {proof.against}, "
            f"more than {most:.2g}"
        )
