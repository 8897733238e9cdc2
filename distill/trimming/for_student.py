"""A student's vocabulary: the teacher's cut down to what the run's text, and the teacher on it,
need; kept beside the store, so that a run that goes on finds it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from distill.capture.corpus import Corpus, DataRows, build_corpus
from distill.capture.teachers import teacher_paths, teacher_stem
from distill.capture.tokenizer_only import metadata_entries, tokenizer_alone
from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.runtime.launch_environment import process_rank
from distill.runtime.progress import Console, Stage
from distill.trimming.file import require_plain_vocabulary, write_reduced
from teachers.atomic_files import write_whole
from teachers.base import Teacher, Tokens, budget_slices
from teachers.gguf.file import GGUFFile, read_gguf, tokenizer_fields
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.reduced import ReducedTeacher
from teachers.vocabulary.cut import VocabularyCut
from teachers.vocabulary.pieces import Pieces
from teachers.vocabulary.reduced import ReducedVocabulary, VocabularyError
from teachers.vocabulary.selection import Vocabulary, template_tokens
from teachers.vocabulary.size import VocabularySize

if TYPE_CHECKING:
    from teachers.store.store import SoftTargetStore

RULES = 1  # of the choice; to be counted up with whatever changes it
SAMPLE_SHARE = 0.03  # of the text's tokens, on which the teacher is asked for its probabilities,
SAMPLE_LEAST = 1024  # but at least so many,
SAMPLE_SECONDS = 50.0  # and no more than take so long
UNSEEN_EVERY = 8  # one in so many sequences is not looked at by the choice, and judges it
WAIT_SECONDS, PATIENCE_SECONDS = 0.5, 600.0  # for the choice of a launch's first process
LOGITS_BYTES = 64 << 20  # of the sample, held at once
MUCH_IN_BYTES = 0.02  # share of tokens that are parts of characters, from which on that is said


def require_reducible(config: RunConfig) -> None:
    """Refuse a vocabulary that no teacher of this kind can be cut to; needs no model.

    Raises:
        UserError, VocabularyError: there is more than one teacher, or it is no GGUF file; the size
            is none, or its tokenizer or architecture cannot be cut.
    """
    if config.student.vocab is None:
        return
    paths = teacher_paths(config.teacher)
    if len(paths) > 1 or paths[0].is_dir():
        what = f"{paths[0]} is a folder" if paths[0].is_dir() else "teacher.mix_with names others"
        raise UserError(
            f"--vocab {config.student.vocab} needs a single GGUF teacher, whose tokens are cut; "
            f"{what}: leave --vocab out"
        )
    file = read_gguf(paths[0])
    VocabularySize.parse(config.student.vocab).of(len(Vocabulary(tokenizer_fields(file))))
    require_plain_vocabulary(file)


@contextmanager
def fitted(
    teacher: Teacher, config: RunConfig, data: DataRows | None, folder: Path, console: Console
) -> Iterator[Teacher]:
    """The teacher over the vocabulary that the settings ask for, or as it is.

    ``data``: see ``build_corpus``. ``folder``: where the choice, and the teacher's file with that
    vocabulary, are kept and found again.

    Raises:
        UserError, VocabularyError: it cannot be cut so.
    """
    if config.student.vocab is None:
        yield teacher
        return
    assert isinstance(teacher, GGUFTeacher), "see require_reducible"
    with console.stage("Vocabulary", total=100) as stage:
        cut = _cut(teacher, config, data, folder, stage)
        path = trimmed_file(teacher.file, cut, folder, teacher_stem(config.teacher))
        stage.finish(describe(cut))
    if cut.bytes_share > MUCH_IN_BYTES:
        console.warn(
            f"{cut.bytes_share:.1%} of the text's tokens are parts of characters, as their script "
            "has few tokens in this vocabulary; ask for a larger --vocab"
        )
    with reduced(teacher, cut, path) as result:
        yield result


@contextmanager
def reduced(teacher: Teacher, cut: VocabularyCut | None, path: Path | None) -> Iterator[Teacher]:
    """The teacher over the vocabulary ``cut`` of its file ``path``, or without one as it is."""
    if cut is None:
        yield teacher
        return
    assert isinstance(teacher, GGUFTeacher) and path is not None
    file = read_gguf(path)
    entries = metadata_entries(tokenizer_fields(file))
    with tokenizer_alone(entries, len(cut.vocabulary), teacher.info.name) as tokenizer:
        yield ReducedTeacher(teacher, cut, tokenizer, file)


def require_same_vocabulary(
    config: RunConfig, cut: VocabularyCut | None, store: SoftTargetStore
) -> None:
    """See that a store's vocabulary is the one the settings ask for, if they ask for one.

    Raises:
        UserError: it is another.
    """
    asked = config.student.vocab
    if asked is None:
        return
    size = int(store.manifest.identity["vocab_size"])
    if cut is None or asked.strip().lower() != cut.asked:
        wanted = VocabularySize.parse(asked).of(size if cut is None else cut.vocabulary.old_size)
        if wanted != size:
            what = f"all {size} tokens" if cut is None else f"{size} tokens (--vocab {cut.asked})"
            raise UserError(
                f"--vocab {asked}: store {store.folder} holds soft targets over {what}, which the "
                "capture has decided; leave --vocab out, or capture again with it"
            )


def describe(cut: VocabularyCut) -> str:
    """A vocabulary in a line."""
    vocabulary = cut.vocabulary
    return (
        f"{len(vocabulary):,} of {vocabulary.old_size:,} tokens kept; on text not looked at "
        f"{cut.dropped_mass:.2%} of the teacher's probability dropped, {cut.added_tokens:+.2%} "
        "tokens"
    )


def trimmed_file(file: GGUFFile, cut: VocabularyCut, folder: Path, stem: str) -> Path:
    """The teacher's file with that vocabulary, written unless it is in ``folder`` already."""
    key = hashlib.sha256(f"{file.sha256} {cut.key}".encode()).hexdigest()
    path = folder / f"{stem}-{key[:12]}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            write_reduced(file, cut.vocabulary, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def _cut(
    teacher: GGUFTeacher, config: RunConfig, data: DataRows | None, folder: Path, stage: Stage
) -> VocabularyCut:
    """The choice for this teacher, text and size: as an earlier run made it, or made now."""
    assert config.student.vocab is not None
    corpus = build_corpus(config.data, teacher, config.seed, data)
    asked = config.student.vocab.strip().lower()
    parts = [RULES, teacher.info.sha256, corpus.digest(), asked, teacher.runtime]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = folder / f"{teacher_stem(config.teacher)}-{key[:12]}.vocabulary"
    rank, waited = process_rank().rank, 0.0
    while rank > 0 and not path.exists() and waited < PATIENCE_SECONDS:
        stage.update(0, "waiting for the first process")
        time.sleep(WAIT_SECONDS)
        waited += WAIT_SECONDS
    if path.exists():
        try:
            found = VocabularyCut.in_arrays(safetensors.numpy.load_file(path))
            if found is not None and found.vocabulary.old_size == teacher.info.vocab_size:
                return found
        except (safetensors.SafetensorError, VocabularyError):
            path.unlink()  # damaged: made again
    cut = choose(teacher, corpus, asked, stage)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, safetensors.numpy.save(cut.arrays()))
    return cut


def choose(teacher: GGUFTeacher, corpus: Corpus, asked: str, stage: Stage) -> VocabularyCut:
    """Choose tokens for ``corpus`` by the teacher's probabilities on a sample of it and by how
    often they occur in the whole.

    Raises:
        VocabularyError: fewer than must stay are asked for, or more than there are.
    """
    fields = tokenizer_fields(teacher.file)
    whole, size = Vocabulary(fields), VocabularySize.parse(asked)
    seen, unseen = _sequences(teacher, corpus, stage)
    tokens = sum(map(len, seen))
    wanted = max(SAMPLE_LEAST, round(SAMPLE_SHARE * tokens))
    mass = _mass(teacher, _evenly(seen, wanted), stage)
    counts, later = (_counts(part, len(whole)) for part in (seen, unseen))
    both = mass / max(mass.sum(), 1e-30) + counts / max(1, counts.sum())
    always = template_tokens(teacher)
    vocabulary = whole.select(both, size, always=always, held_out=later)
    judged = _mass(teacher, _evenly(unseen, wanted // 4), stage)
    dropped = 1.0 - float(judged[vocabulary.kept].sum() / max(judged.sum(), 1e-30))
    added = whole.added_tokens(vocabulary.kept.tolist(), later)
    return VocabularyCut(
        vocabulary, asked, dropped, added, _bytes_share(teacher, whole, vocabulary, later)
    )


def _sequences(
    teacher: GGUFTeacher, corpus: Corpus, stage: Stage
) -> tuple[list[Tokens], list[Tokens]]:
    """What the choice looks at, and what judges it. Where the teacher writes the text, a sample."""
    count = len(corpus)
    if corpus.spoken:
        count = min(count, max(16, -(-2 * SAMPLE_LEAST // corpus.sampling.max_length)))
    stage.update(0, "the teacher writes" if corpus.spoken else "")
    sequences = corpus.take(teacher, 0, count, lambda done: stage.update(int(50 * done / count)))
    later = set(range(UNSEEN_EVERY - 1, count, UNSEEN_EVERY)) or {count - 1}
    seen = [one for place, one in enumerate(sequences) if place not in later]
    return seen or sequences, [sequences[place] for place in sorted(later)]


def _evenly(sequences: Sequence[Tokens], wanted: int) -> list[Tokens]:
    """Sequences from the first to the last with about so many tokens together."""
    average = max(1.0, float(np.mean([len(tokens) for tokens in sequences])))
    count = min(len(sequences), max(1, round(wanted / average)))
    return [sequences[place] for place in np.linspace(0, len(sequences) - 1, count).astype(int)]


def _counts(sequences: Sequence[Tokens], size: int) -> NDArray[np.float64]:
    return np.bincount(np.concatenate(sequences), minlength=size).astype(np.float64)


def _mass(teacher: Teacher, sequences: Sequence[Tokens], stage: Stage) -> NDArray[np.float64]:
    """The teacher's probability of each token ``[V]``, summed over the positions of sequences, or
    of as many as there is time for."""
    total = np.zeros(teacher.info.vocab_size)
    lengths = [len(tokens) for tokens in sequences]
    start, done = time.perf_counter(), 0
    for part in budget_slices(lengths, LOGITS_BYTES // (4 * teacher.info.vocab_size)):
        for row in teacher.logits(sequences[part]):
            shares = np.exp(row - row.max())
            total += shares / shares.sum(dtype=np.float64)
        done += sum(lengths[part])
        stage.update(50 + int(50 * done / sum(lengths)), "the teacher's probabilities")
        if time.perf_counter() - start > SAMPLE_SECONDS:
            break
    return total


def _bytes_share(
    teacher: Teacher,
    whole: Vocabulary,
    vocabulary: ReducedVocabulary,
    counts: NDArray[np.float64],
) -> float:
    """How many tokens of a text are parts of characters, where each occurs ``counts`` times."""
    occurring = np.flatnonzero(counts).tolist()
    pieces = Pieces(whole.tokenizer, vocabulary.kept.tolist())
    spelled = {number: pieces.split(number) for number in occurring}
    used = sorted({piece for parts in spelled.values() for piece in parts})
    texts = teacher.detokenize([np.array([piece], dtype=np.int32) for piece in used])
    partial = {piece for piece, text in zip(used, texts, strict=True) if "\ufffd" in text}
    many = sum(counts[one] * sum(piece in partial for piece in spelled[one]) for one in occurring)
    return float(many / max(1.0, sum(counts[one] * len(spelled[one]) for one in occurring)))
