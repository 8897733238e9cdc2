"""Proof that an exported GGUF file is the trained model: loaded back in llama.cpp and compared.

The F32 file is compared with PyTorch; every other type with the F32 file that it was made from.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from distill.errors import ProofFailed
from distill.evaluation.cost import SPEED_ROUNDS, measure_speed
from distill.evaluation.scorers import Scorer, llama_scorer, student_scorer
from distill.losses import divergences
from distill.runs.folder import HeldOut
from distill.runs.proof_record import Proof
from students.model.interface import Student
from teachers.base import Tokens
from teachers.errors import TeacherError, WorkerDied
from teachers.gguf.file import TeacherFileError
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.teacher_record import first_sequences

PROOF_SEQUENCES = 16
PROOF_TOKENS = 4096
PROOF_BYTES = 1 << 27  # of one sequence's logits in float32; several copies in float64 are compared
REMEMBERED_BYTES = 1 << 30

MAX_LOGIT_DIFFERENCE = {"f32": 1e-3}
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


def prove(
    path: Path,
    student: Student,
    held_out: HeldOut,
    *,
    timed: bool = True,
) -> Proof:
    """Compare an F32 file with the student, with a float32 KV cache; ``timed``: its speed too.

    Raises:
        ProofFailed: they differ by more than float32 explains, the tokenizers differ, or llama.cpp
        cannot run the file.
    """
    rounds = SPEED_ROUNDS if timed else 0
    return _prove(path, "f32", student_scorer(student), "PyTorch", held_out, rounds)


def prove_quantized(path: Path, quant: str, original: Scorer, held_out: HeldOut) -> Proof:
    """Compare a quantized file with the F32 file that it was made from (``original``: with a
    float32 KV cache too).

    Raises:
        ProofFailed: they differ by more than the type explains, the tokenizers differ, or llama.cpp
        cannot run it.
    """
    return _prove(path, quant, original, "the F32 file", held_out, SPEED_ROUNDS)


def remembering(scorer: Scorer) -> Scorer:
    """A scorer that keeps its answers, as far as they fit, for the next file that is compared
    with it."""
    kept: dict[bytes, Tensor] = {}

    def score(sequences: Sequence[Tokens]) -> Tensor:
        key = b"|".join(tokens.tobytes() for tokens in sequences)
        if key not in kept:
            logits = scorer(sequences)
            if sum(one.nbytes for one in kept.values()) + logits.nbytes > REMEMBERED_BYTES:
                return logits
            kept[key] = logits
        return kept[key]

    return score


def _prove(
    path: Path,
    quant: str,
    reference: Scorer,
    against: str,
    held_out: HeldOut,
    rounds: int,
) -> Proof:
    lines = held_out.lines
    try:
        with GGUFTeacher(path) as exported:
            chosen = proof_sequences(held_out.sequences, exported.info.vocab_size)
            sums = _compare(reference, llama_scorer(exported, exact=True), chosen)
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
    proof = Proof(
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
    _judge(proof)
    return proof


@dataclass
class _Sums:
    """Sums over the positions compared so far."""

    positions: int = 0
    max_difference: float = 0.0
    kl: float = 0.0
    same: int = 0


def _compare(reference: Scorer, llama: Scorer, sequences: Sequence[Tokens]) -> _Sums:
    """Compare two models' logits one sequence at a time, so that no more than two of them are
    held."""
    sums = _Sums()
    for tokens in sequences:
        expected, exported = reference([tokens]), llama([tokens])
        difference = float((expected - exported).abs().max())
        sums.positions += len(expected)
        sums.max_difference = max(sums.max_difference, difference)
        sums.kl += float(divergences.dense_forward_kl(expected.double(), exported.double()).sum())
        sums.same += int((expected.argmax(-1) == exported.argmax(-1)).sum())
    return sums


def proof_sequences(sequences: Sequence[Tokens], vocab_size: int) -> list[Tokens]:
    """The first sequences, as many as make a proof, each cut to what is compared at once."""
    longest = max(2, PROOF_BYTES // (4 * vocab_size))
    return first_sequences(
        (tokens[:longest] for tokens in sequences), PROOF_SEQUENCES, PROOF_TOKENS
    )


def _judge(proof: Proof) -> None:
    difference, limit = proof.max_logit_difference, MAX_LOGIT_DIFFERENCE.get(proof.quant)
    if limit is not None and not difference <= limit:
        raise ProofFailed(
            f"the {proof.quant} file's logits differ from {proof.against} by {difference:.2e}, "
            f"more than {limit:g}"
        )
    if not proof.mean_kl <= MAX_MEAN_KL[proof.quant]:
        raise ProofFailed(
            f"the {proof.quant} file is {proof.mean_kl:.2e} nats per token from {proof.against}, "
            f"more than {MAX_MEAN_KL[proof.quant]:g}"
        )
