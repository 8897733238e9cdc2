"""Proof that an exported GGUF file is the trained model: loaded back in llama.cpp, compared with PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill import losses
from distill.errors import ProofFailed
from distill.evaluation.scores import Scorer, llama_scorer, student_scorer
from students.student import Student
from teachers.base import Tokens
from teachers.gguf_file import TeacherFileError
from teachers.gguf_teacher import GGUFTeacher
from teachers.inheritance import TokenizedLines, first_sequences
from teachers.worker import TeacherError

PROOF_SEQUENCES = 16
PROOF_TOKENS = 4096
MAX_LOGIT_DIFFERENCE = {"f32": 1e-3}
MAX_MEAN_KL = {"f32": 1e-6, "f16": 1e-4, "q8_0": 5e-3}


@dataclass(frozen=True)
class Proof:
    """What was compared and how far apart the two were.

    ``max_logit_difference`` over all positions and tokens; ``mean_kl`` KL(PyTorch ‖ GGUF) in nats per token;
    ``agreement``: share of positions with the same most probable token; ``token_lines``: texts that both
    files' tokenizers turned into the same ids.
    """

    quant: str
    positions: int
    max_logit_difference: float
    mean_kl: float
    agreement: float
    token_lines: int

    def to_json(self) -> dict[str, Any]:
        """For ``results.json``."""
        return asdict(self)


def prove(
    path: Path,
    quant: str,
    student: Student,
    sequences: Sequence[Tokens],
    reference_tokens: TokenizedLines,
) -> Proof:
    """Compare the file with the student on held-out sequences, with a float32 KV cache.

    Raises:
        ProofFailed: they differ by more than the format explains, the tokenizers differ, or llama.cpp cannot
            run the file.
    """
    chosen = proof_sequences(sequences)
    try:
        with GGUFTeacher(path) as exported:
            figures = _compare(student_scorer(student), llama_scorer(exported, exact=True), chosen)
            again = exported.tokenize(reference_tokens.texts, add_special=True, parse_special=True)
    except (TeacherError, TeacherFileError) as error:
        raise ProofFailed(f"llama.cpp does not run the exported file: {error}") from None
    for text, ours, theirs in zip(reference_tokens.texts, again, reference_tokens.tokens, strict=True):
        if ours.tolist() != theirs.tolist():
            raise ProofFailed(f"the exported tokenizer gives other ids than the teacher's for {text[:60]!r}")
    proof = Proof(
        quant=quant,
        positions=figures.positions,
        max_logit_difference=figures.max_difference,
        mean_kl=figures.kl / figures.positions,
        agreement=figures.same / figures.positions,
        token_lines=len(reference_tokens.texts),
    )
    _judge(proof)
    return proof


@dataclass
class _Figures:
    """Sums over the positions compared so far."""

    positions: int = 0
    max_difference: float = 0.0
    kl: float = 0.0
    same: int = 0


def _compare(pytorch: Scorer, llama: Scorer, sequences: Sequence[Tokens]) -> _Figures:
    """Compare two models' logits one sequence at a time, so that no more than two of them are held."""
    figures = _Figures()
    for tokens in sequences:
        expected, found = pytorch([tokens]), llama([tokens])
        figures.positions += len(expected)
        figures.max_difference = max(figures.max_difference, float((expected - found).abs().max()))
        figures.kl += float(losses.dense_forward_kl(expected.double(), found.double()).sum())
        figures.same += int((expected.argmax(-1) == found.argmax(-1)).sum())
    return figures


def proof_sequences(sequences: Sequence[Tokens]) -> list[Tokens]:
    """The first sequences, as many as make a proof."""
    return first_sequences(sequences, PROOF_SEQUENCES, PROOF_TOKENS)


def _judge(proof: Proof) -> None:
    difference, limit = proof.max_logit_difference, MAX_LOGIT_DIFFERENCE.get(proof.quant)
    if limit is not None and not difference <= limit:
        raise ProofFailed(
            f"the {proof.quant} file's logits differ from PyTorch by {difference:.2e}, more than {limit:g}"
        )
    if not proof.mean_kl <= MAX_MEAN_KL[proof.quant]:
        raise ProofFailed(
            f"the {proof.quant} file is {proof.mean_kl:.2e} nats per token from PyTorch, more than "
            f"{MAX_MEAN_KL[proof.quant]:g}"
        )
