"""How right stored soft targets are: KL from the teacher's own distribution, and the error of the
LM-head gradient against the dense one, at T = 1, 2, 3.

    python -m tools.studies.fidelity [TEACHER.gguf] [TEXT] [--student RUN/student] [--positions N]

Without a text the teacher speaks; without a teacher it is the example teacher.

Every way of storing gets the same positions of validation text and the same student; what is
compared is ‖g − g_dense‖ / ‖g_dense‖ for the gradient of the KL in the output matrix (weight) and
in the student's hidden states (hidden). The student is the one a run would begin with, or a trained
one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.initialization.embeddings import initialize_embeddings
from students.model.build import build_student, student_config
from students.model.shape import StudentSize
from teachers import example_teacher
from teachers.base import GenerationRequest, Sampling, Tokens
from teachers.gguf.embeddings import principal_scores
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.capture import fit_shared_codec
from teachers.targets.distributions import CompactTargets, HiddenTargets
from teachers.targets.recipe import Recipe, compact_recipe
from teachers.targets.stored_arrays import Answer, Targets, reduce, typed
from teachers.tokenizer.conversation import opening_segments

FITTED = 6144  # positions of other text, for the codes; of them as many as a capture takes
LENGTH = 257
SIZES = (64, 110, 160, 208, 256, 320)  # bytes of a sketch
TEMPERATURES = (1.0, 2.0, 3.0)
ROWS = 128

Probabilities = Callable[[slice, float, Tensor], Tensor]
"""Target distribution of some positions at T, ``[C, V]``; also given the student's own, ``[C,
V]``."""


def bucketed(targets: CompactTargets) -> Probabilities:
    """Top-k and one bucket: within the tail the student is left as it is."""

    def probabilities(rows: slice, temperature: float, student: Tensor) -> Tensor:
        some = targets.select(rows)
        tail = student.scatter(-1, some.topk_ids, 0.0)
        mass = some.tail_mass(temperature)[:, None] / tail.sum(dim=-1, keepdim=True)
        return (tail * mass).scatter(-1, some.topk_ids, some.topk_log_probs(temperature).exp())

    return probabilities


def truncated(logits: Tensor, count: int) -> Probabilities:
    """Top-k log-probabilities of T = 1 tempered and renormalised as if there were nothing else."""

    def probabilities(rows: slice, temperature: float, student: Tensor) -> Tensor:
        values, ids = logits[rows].topk(count, dim=-1)
        return torch.zeros_like(student).scatter(-1, ids, (values / temperature).softmax(dim=-1))

    return probabilities


def sampled(
    targets: CompactTargets, logits: Tensor, count: int, *, sketched: bool, seed: int
) -> Probabilities:
    """Top-k, and tokens drawn from the tail at T: alone, or correcting the sketch where it is drawn
    from.

    Drawn from the sketch's tail s, a token stands for mass · p_v / s_v relative to it; the sketch
    plus the mean of those corrections is unbiased, whatever the sketch.
    """

    def probabilities(rows: slice, temperature: float, student: Tensor) -> Tensor:
        some = targets.select(rows)
        random = torch.Generator().manual_seed(seed)
        true = (logits[rows] / temperature).softmax(dim=-1).scatter(-1, some.topk_ids, 0.0)
        kept = some.topk_log_probs(temperature).exp()
        source = (
            some.log_probs(temperature).exp().scatter(-1, some.topk_ids, 0.0) if sketched else true
        )
        drawn = torch.multinomial(source, count, replacement=True, generator=random)
        mass = source.sum(dim=-1, keepdim=True) / count
        if sketched:
            ratio = true.gather(-1, drawn) / source.gather(-1, drawn).clamp(min=1e-30) - 1.0
            result = source.scatter_add(-1, drawn, mass * ratio)
        else:
            result = torch.zeros_like(true).scatter_add(-1, drawn, mass.expand(-1, count))
        return result.scatter(-1, some.topk_ids, kept)

    return probabilities


def errors(
    student: Tensor, matrix: Tensor, logits: Tensor, ways: Probabilities
) -> list[tuple[float, float, float]]:
    """At each temperature the KL(teacher ‖ what is stored) in nats, and the relative gradient
    errors (weight, hidden): ``student [N, D]``, ``matrix [V, D]``."""
    result = []
    for temperature in TEMPERATURES:
        weight, exact = torch.zeros_like(matrix), torch.zeros_like(matrix)
        off = size = lost = 0.0
        for start in range(0, len(student), ROWS):
            rows = slice(start, start + ROWS)
            own = (student[rows] @ matrix.T / temperature).softmax(dim=-1)
            teacher = (logits[rows] / temperature).softmax(dim=-1)
            stored = ways(rows, temperature, own)
            lost += float(
                (teacher * (teacher / stored.clamp(min=1e-30)).clamp(min=1e-30).log()).sum()
            )
            dense, values = own - teacher, own - stored
            exact += dense.T @ student[rows]
            weight += values.T @ student[rows]
            off += float((((values - dense) @ matrix) ** 2).sum())
            size += float(((dense @ matrix) ** 2).sum())
        gradient = float((weight - exact).norm() / exact.norm())
        result.append((lost / len(student), gradient, (off / size) ** 0.5))
    return result


def student_states(
    path: Path | None, teacher: GGUFTeacher, sequences: list[Tokens], width: int
) -> tuple[Tensor, Tensor, str]:
    """Final hidden states ``[N, D]`` and output matrix of a trained or an untrained student."""
    if path is None:
        info = teacher.info
        shape = student_config(
            StudentSize(width, 2),
            vocab_size=info.vocab_size,
            context_length=info.context_length,
            bos=0,
            eos=0,
        )
        model = build_student(shape, 0)
        initialize_embeddings(model, principal_scores(teacher.file))
    else:
        model = AutoModelForCausalLM.from_pretrained(path)
    model.eval()
    with torch.no_grad():
        rows = [
            model(
                torch.from_numpy(tokens[:-1].astype(np.int64))[None], with_logits=False
            ).last_hidden_state[0]
            for tokens in sequences
        ]
    return torch.cat(rows), model.lm_head.weight.detach(), "trained" if path else "untrained"


def read_sequences(teacher: GGUFTeacher, text: Path | None, positions: int) -> list[Tokens]:
    """Enough sequences to fit on some (``FITTED`` positions) and test on the others."""
    if text is None:
        opening = opening_segments(teacher)
        assert opening is not None, "this teacher has no token to start from; give it a text"
        return teacher.generate(GenerationRequest([opening] * 100, Sampling(max_length=LENGTH)))
    tokens = teacher.tokenize(
        [text.read_text(encoding="utf-8")], add_special=False, parse_special=False
    )[0]
    pieces = range(0, FITTED + positions + LENGTH, LENGTH)
    sequences = [tokens[start : start + LENGTH] for start in pieces]
    return [piece for piece in sequences if len(piece) > 1]


def measure(
    path: Path, text: Path | None, student: Path | None, width: int, positions: int
) -> None:
    """Compare the ways of storing and print the table."""
    with GGUFTeacher(path) as teacher:
        info = teacher.info
        sequences = read_sequences(teacher, text, positions)
        share = FITTED / (FITTED + positions)
        fitting = sequences[: round(share * len(sequences))]
        testing = sequences[len(fitting) :]
        logits = torch.from_numpy(teacher.logits(testing))[:positions]
        states = torch.from_numpy(teacher.states(testing)["final"])[:positions]
        hidden, matrix, kind = student_states(student, teacher, testing, width)
        ways: list[tuple[str, int, Probabilities]] = []
        usual = compact_recipe(16, info.vocab_size, info.width)
        asked = [usual, replace(usual, num_topk=8)]
        asked += [Recipe("compact", 16, size) for size in SIZES if size <= info.width]
        for number, recipe in enumerate(asked):
            made = fit_shared_codec(teacher, fitting, recipe)
            arrays = reduce(Answer(logits, states), recipe, made.bases)
            targets = typed(arrays, recipe, info.vocab_size, made.bases["final"], made.head)
            assert isinstance(targets, CompactTargets) and targets.coordinates is not None
            size = sum(rows[0].nbytes for rows in arrays.values())
            directions = f"{targets.coordinates.shape[1]} directions"
            name = f"compact: top-{recipe.num_topk}, {arrays['sketch'].shape[1]} on {directions}"
            ways.append((name, size, _exact(targets)))
            if not number:
                samples = sampled(targets, logits, 8, sketched=True, seed=0)
                ways.append(("  + 8 samples correcting the sketch", size + 32, samples))
        recipe = Recipe("hidden")
        made = fit_shared_codec(teacher, fitting, recipe)
        arrays = reduce(Answer(None, states), recipe, {})
        whole = typed(arrays, recipe, info.vocab_size, None, made.head)
        head = whole.head if isinstance(whole, HiddenTargets) else None
        assert head is not None
        floor = _exact(HiddenTargets(states, head))
        ways.append(("final state in float32 (llama.cpp rounds it)", 4 * info.width, floor))
        size = recipe.bytes_per_position(info.vocab_size, info.width)
        ways.append(("hidden", size, _exact(whole)))
        plain, few = (CompactTargets.from_logits(logits, count) for count in (32, 16))
        ways.append(("top-32 + tail bucket", 32 * 4 + 24, bucketed(plain)))
        samples = sampled(few, logits, 48, sketched=False, seed=0)
        ways.append(("top-16 + 48 tail samples", 16 * 4 + 24 + 96, samples))
        ways.append(("top-32, renormalised", 32 * 4, truncated(logits, 32)))
    columns = (f"T={t:g} KL · weight · hidden" for t in TEMPERATURES)
    table = Table("stored", "bytes/token", *columns)
    for name, size, way in ways:
        result = errors(hidden[:positions], matrix, logits, way)
        table.add_row(name, str(size), *(" · ".join(f"{one:.4f}" for one in row) for row in result))
    console = Console(width=140)
    console.print(
        f"{info.name}, {len(logits)} positions, {kind} student of width {matrix.shape[1]}"
    )
    console.print(table)


def _exact(targets: Targets) -> Probabilities:
    """Targets that know every token's probability."""
    return lambda rows, temperature, student: targets.select(rows).log_probs(temperature).exp()


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path, nargs="?", default=example_teacher())
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--student", type=Path, help="folder of a trained student")
    parser.add_argument("--width", type=int, default=128, help="width of the untrained student")
    parser.add_argument("--positions", type=int, default=2048, help="of text to compare on")
    options = parser.parse_args()
    measure(options.teacher, options.text, options.student, options.width, options.positions)


if __name__ == "__main__":
    main()
