"""A student's vocabulary: the teacher's cut down to what the run's text, and the teacher on it,
need; kept beside the store, so that a run that goes on finds it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from distill.capture.corpus import Corpus, build_corpus
from distill.capture.data_rows import DataRows
from distill.capture.teachers import teacher_stem
from distill.capture.temporary_files.tokenizer_only import metadata_entries, tokenizer_alone
from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.runtime.progress import Console, Stage
from distill.trimming.file import write_reduced
from distill.trimming.measure import teacher_mass
from distill.trimming.request import TOKENS
from distill.trimming.scripts import WORTH_A_WARNING, lost_scripts
from distill.trimming.text import counted, spread
from students.gguf.architectures import EMBEDDING
from teachers.atomic_files import temporary_name, write_whole
from teachers.base import Teacher, Tokens
from teachers.gguf.file import GGUFFile, read_gguf, tokenizer_fields
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.reduced import ReducedTeacher
from teachers.store.manifest import TASKS
from teachers.store.store import SoftTargetStore
from teachers.store.tasks import Tasks
from teachers.vocabulary.cut import VocabularyCut
from teachers.vocabulary.reduced import VocabularyError
from teachers.vocabulary.selection import Vocabulary, template_tokens
from teachers.vocabulary.size import VocabularySize

RULES = 1  # of the choice; to be counted up with whatever changes it
SAMPLE_SHARE = 0.03  # of the text's tokens, on which the teacher is asked for its probabilities,
SAMPLE_LEAST = 1024  # but at least so many, and at most as many as `distill trim` takes
UNSEEN_EVERY = 8  # one in so many sequences is not looked at by the choice, and judges it


@contextmanager
def fitted(
    teacher: Teacher,
    config: RunConfig,
    data: DataRows | None,
    folder: Path,
    console: Console,
    known: str = "",
) -> Iterator[Teacher]:
    """The teacher over the vocabulary that the settings ask for, or as it is.

    ``data``: see ``build_corpus``. ``folder``: where the choice, and the teacher's file with that
    vocabulary, are kept and found again. ``known``: the key of the choice for this data, if a store
    has it; then the data is not read for it.

    Raises:
        UserError, VocabularyError: it cannot be cut so.
    """
    if config.student.vocab is None:
        yield teacher
        return
    assert isinstance(teacher, GGUFTeacher), "see check_student_vocabulary"
    with console.stage("Vocabulary", total=100) as stage:
        cut = _kept(teacher, folder, known) or _cut(teacher, config, data, folder, stage)
        path = trimmed_file(teacher.file, cut, folder, teacher_stem(config.teacher))
        stage.finish(describe(cut))
    for script, share in cut.lost.items():
        console.warn(
            f"{share:.1%} of the text's {script} letters have no token any more and are written in "
            "bytes; ask for a larger --vocab"
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
        temporary = temporary_name(path)
        try:
            write_reduced(file, cut.vocabulary, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def with_cut_base(config: RunConfig, cut: VocabularyCut | None, folder: Path) -> RunConfig:
    """The settings with a base model in a GGUF file cut to the student's vocabulary as well, which
    is kept in ``folder``.

    Raises:
        UserError: the base has not as many tokens as the teacher.
        TeacherFileError, VocabularyError: it cannot be cut.
    """
    base = config.student.base
    if cut is None or base is None or not (path := Path(base)).is_file():
        return config
    file, size = read_gguf(path), cut.vocabulary.old_size
    rows = file.tensors[EMBEDDING].shape[0]
    if rows == len(cut.vocabulary):  # as an earlier run has cut it, perhaps: will be compared
        return config
    if rows != size:
        raise UserError(
            f"--student-base {path} has {rows:,} tokens, the teacher {size:,}: --vocab cuts both "
            "alike; use a base with the teacher's vocabulary"
        )
    student = {"base": str(trimmed_file(file, cut, folder, path.stem).absolute())}
    return config.model_copy(update={"student": config.student.model_copy(update=student)})


def _kept(teacher: GGUFTeacher, folder: Path, known: str) -> VocabularyCut | None:
    """The choice of this key, if it is kept."""
    for path in folder.glob("*.vocabulary") if known else ():
        if (cut := _stored(path, teacher)) is not None and cut.key == known:
            return cut
    return None


def _stored(path: Path, teacher: GGUFTeacher) -> VocabularyCut | None:
    """A choice for this teacher; ``None`` where there is none, or it is damaged."""
    if not path.exists():
        return None
    try:
        found = VocabularyCut.in_arrays(safetensors.numpy.load_file(path))
    except (safetensors.SafetensorError, VocabularyError):
        return None
    fits = found is not None and found.vocabulary.old_size == teacher.info.vocab_size
    return found if fits else None


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

    def make() -> VocabularyCut:
        cut = choose(teacher, corpus, asked, stage)
        write_whole(path, safetensors.numpy.save(cut.arrays()))
        return cut

    def waiting() -> None:
        stage.update(0, "another process chooses")

    folder.mkdir(parents=True, exist_ok=True)
    return Tasks(folder / TASKS).once(path.name, lambda: _stored(path, teacher), make, waiting)


def choose(teacher: GGUFTeacher, corpus: Corpus, asked: str, stage: Stage) -> VocabularyCut:
    """Choose tokens for ``corpus`` by the teacher's probabilities on a sample of it and by how
    often they occur in the whole.

    Raises:
        VocabularyError: fewer than must stay are asked for, or more than there are.
    """
    whole, size = Vocabulary(tokenizer_fields(teacher.file)), teacher.info.vocab_size
    seen, unseen = _sequences(teacher, corpus, stage)
    wanted = round(SAMPLE_SHARE * sum(map(len, seen)))
    wanted = min(max(wanted, SAMPLE_LEAST), TOKENS)
    counts, later = counted(seen, size), counted(unseen, size)
    mass = _mass(teacher, seen, wanted, stage)
    vocabulary = whole.select(
        counts + mass * (counts.sum() / max(1.0, mass.sum())),  # as if it had read all of the text
        VocabularySize.parse(asked),
        always=template_tokens(teacher),
        held_out=later,
    )
    judged, kept = _mass(teacher, unseen, wanted // 4, stage), vocabulary.kept.tolist()
    lost = lost_scripts(whole, kept, Counter("".join(teacher.detokenize(unseen))))
    return VocabularyCut(
        vocabulary,
        asked,
        dropped_mass=1.0 - float(judged[kept].sum() / max(1e-30, judged.sum())),
        added_tokens=whole.added_tokens(kept, later),
        lost={one.name: one.share for one in lost if one.of_text >= WORTH_A_WARNING},
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


def _mass(
    teacher: GGUFTeacher, sequences: Sequence[Tokens], wanted: int, stage: Stage
) -> NDArray[np.float64]:
    """The teacher's probability of each token ``[V]``, summed over about so many positions, spread
    over the sequences."""
    chosen = [sequences[place] for place in spread([len(one) for one in sequences], wanted)]
    total = sum(len(tokens) - 1 for tokens in chosen)
    return teacher_mass(
        teacher, chosen, lambda done: stage.update(50 + 50 * done // total, "the teacher reads")
    )
