"""``distill trim``: the text, the teacher's mass over it, the choice, the file, its proof."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from distill.errors import ProofFailed
from distill.evaluation.cost import SPEED_ROUNDS, measure_speed
from distill.export.ollama_modelfile import write_modelfile
from distill.export.transformers_tokenizer import write_plain_tokenizer
from distill.runtime.format import human_bytes
from distill.runtime.progress import Console
from distill.trimming.card import Measured, Trimmed, card
from distill.trimming.file import write_reduced
from distill.trimming.measure import bits_per_byte, logit_difference, teacher_mass
from distill.trimming.request import TrimInputs
from distill.trimming.scripts import WORTH_A_WARNING, lost_scripts
from distill.trimming.text import Piece, TrimText, counted, spread, text_of, tokenized, windows
from teachers.atomic_files import write_whole
from teachers.base import Teacher, Tokens
from teachers.gguf.file import GGUFFile, file_sha256, read_gguf
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.tokenizer.tokenizer_json import build_tokenizer
from teachers.vocabulary.reduced import ReducedVocabulary
from teachers.vocabulary.selection import template_tokens

TOKEN_LINES = 1000  # pieces of text on which tokenizer.json must agree with llama.cpp


@dataclass(frozen=True)
class _Judged:
    """Held-out text that both files are measured on: some pieces for the bits, all for tokens."""

    pieces: list[Piece]
    every: list[Piece]


def trim(inputs: TrimInputs, console: Console) -> Trimmed:
    """Write the teacher with a smaller vocabulary to its output, prove it, and put a card,
    tokenizer.json and a Modelfile beside it.

    Raises:
        UserError, ChatTemplateError: see ``text_of``.
        VocabularyError: the chat template's tokens leave no room.
        TeacherError: llama.cpp cannot run the teacher.
        ProofFailed: the file is not the original's with fewer tokens; it did not get its name.
        OSError: the disk refuses.
    """
    request, file, vocabulary = inputs.request, inputs.file, inputs.vocabulary
    temporary = request.output.with_name(f".{request.output.name}.tmp.gguf")
    try:
        with GGUFTeacher(request.teacher) as teacher:
            text, reduced, judged, dropped = _choose(inputs, teacher, console)
            original = _measure(teacher, file, judged, console, "original")
        with console.stage("Write", total=100) as stage:
            source = {"distill.trim.source_sha256": file.sha256}
            write_reduced(
                file, reduced, temporary, source, lambda part: stage.update(int(100 * part))
            )
            stage.finish(f"{human_bytes(temporary.stat().st_size)} of {human_bytes(file.size)}")
        trimmed_file = read_gguf(temporary)
        with console.stage("Prove") as stage:
            proof = logit_difference(file.path, temporary, reduced, judged.pieces)
            with GGUFTeacher(temporary) as model:
                lines = _same_ids(model, trimmed_file, text)
            stage.finish(f"kept logits within {proof[0]:.1e} over {proof[1]} positions")
        with GGUFTeacher(temporary) as model:
            trimmed = _measure(model, trimmed_file, judged, console, "trimmed")
            ends, context = model.info.end_tokens, model.info.context_length
        letters = Counter(sign for piece in (*text.training, *text.held_out) for sign in piece.text)
        lost = lost_scripts(vocabulary, reduced.kept.tolist(), letters)
        result = Trimmed(
            original,
            trimmed,
            *dropped,
            *proof,
            lines,
            sum(piece.bytes for piece in judged.pieces),
            str(file.value("general.license", "")),
            [one for one in lost if one.of_text >= WORTH_A_WARNING],
        )
        temporary.replace(request.output)
    finally:
        temporary.unlink(missing_ok=True)
    request.tokenizer.mkdir()
    write_plain_tokenizer(trimmed_file.fields, request.tokenizer)
    notes = write_modelfile(
        request.modelfile,
        request.output,
        trimmed_file.fields,
        end_tokens=ends,
        context_length=context,
    )
    write_whole(request.card, card(result).encode())
    for note in notes:
        console.note(f"Modelfile: {note}")
    return result


def _choose(
    inputs: TrimInputs, teacher: Teacher, console: Console
) -> tuple[TrimText, ReducedVocabulary, _Judged, tuple[float, int]]:
    """The text, the tokens that stay by it, what to judge them on, and the mass that is dropped,
    over how many positions."""
    request, size = inputs.request, teacher.info.vocab_size
    with console.stage("Tokenize") as stage:
        text = text_of(inputs.data, teacher)
        rows = tokenized(teacher, text.training, lambda done: stage.update(done))
        held_out = tokenized(teacher, text.held_out, lambda done: stage.update(done))
        counts = counted(rows, size)
        stage.finish(f"{counts.sum():,} tokens, and {sum(map(len, held_out)):,} held out")
    if not text.whole:
        console.note(f"{request.data} is longer than what is read of it")
    chosen = windows(teacher, [rows[n] for n in spread([*map(len, rows)], request.tokens)])
    with console.stage("Teacher's mass", total=_positions(chosen)) as stage:
        mass = teacher_mass(teacher, chosen, stage.update)
        stage.finish(f"{_positions(chosen):,} positions")
    # As if the teacher had read all of the text.
    total = counts + mass * (counts.sum() / max(1.0, mass.sum()))
    with console.stage("Choose tokens") as stage:
        reduced = inputs.vocabulary.select(
            total,
            request.size,
            always=template_tokens(teacher),
            held_out=counted(held_out, size),
        )
        dropped = 1.0 - float(mass[reduced.kept].sum() / mass.sum())
        stage.finish(f"{len(reduced):,} of {size:,}; {dropped:.3%} of the mass is dropped")
    judged = [text.held_out[n] for n in spread([*map(len, held_out)], request.judged_tokens)]
    return text, reduced, _Judged(judged, text.held_out), (dropped, _positions(chosen))


def _measure(
    model: GGUFTeacher, file: GGUFFile, judged: _Judged, console: Console, which: str
) -> Measured:
    """Bits per byte, tokens and speed of one of the files."""
    rows = tokenized(model, judged.every, lambda done: None)
    sequences = windows(model, tokenized(model, judged.pieces, lambda done: None))
    with console.stage(f"Measure {which}", total=_positions(sequences)) as stage:
        bits = bits_per_byte(model, judged.pieces, stage.update)
        speeds = [measure_speed(model) for _ in range(SPEED_ROUNDS)]
        prompt, generation = (statistics.median(each) for each in zip(*speeds, strict=True))
        stage.finish(f"{bits:.4f} bits per byte, {generation:.1f} tokens/s")
    return Measured(
        model.info.name,
        file_sha256(file.path) if not file.parts else file.sha256,
        model.info.vocab_size,
        file.size,
        file.parameters,
        bits,
        sum(map(len, rows)),
        generation,
        prompt,
    )


def _positions(sequences: Sequence[Tokens]) -> int:
    return sum(len(tokens) - 1 for tokens in sequences)


def _same_ids(model: GGUFTeacher, file: GGUFFile, text: TrimText) -> int:
    """How many pieces of text tokenizer.json and llama.cpp were compared on.

    Raises:
        ProofFailed: they give other ids.
    """
    every = [*text.held_out, *text.training][:TOKEN_LINES]
    tokenizer = build_tokenizer(file.fields)
    rows = tokenized(model, every, lambda done: None)
    for piece, ids in zip(every, rows, strict=True):
        tokenizer.encode_special_tokens = not piece.special
        if tokenizer.encode(piece.text, add_special_tokens=False).ids != ids.tolist():
            raise ProofFailed(
                f"tokenizer.json gives other ids than llama.cpp for {piece.text[:60]!r}; the file "
                "was not written"
            )
    return len(every)
