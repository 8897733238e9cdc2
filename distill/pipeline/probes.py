"""Short measurements of teacher and student for ``distill plan``; together about a minute at most,
however slow they are."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from distill.base_models.memory_estimate import DIRECTIONS
from distill.capture.corpus import Corpus
from distill.capture.store_setup import largest_size, store_manifest
from distill.config.schema import LossConfig, RunConfig
from distill.losses.batch import Batch, arrange, padded
from distill.losses.objective import Objective
from distill.losses.vocabulary_sample import VocabularySample
from distill.runtime.cpu import keep_freed_memory
from distill.runtime.device import choose_precision
from distill.runtime.progress import Stage
from distill.training.distributed import TrainingModule, float32_products
from distill.training.optimizer import build_optimizer
from distill.training.validation import validation_score
from students.model.interface import Student
from teachers.base import GenerationRequest, Teacher, Tokens, whole_masks
from teachers.store.capture import fit_shared_codec
from teachers.store.shared import SharedCodec
from teachers.targets.distributions import Arrays
from teachers.targets.fit_codec import FIT_LEAST
from teachers.targets.recipe import Recipe
from teachers.targets.stored_arrays import typed

TEACHER_SECONDS, STUDENT_SECONDS = 12.0, 12.0  # that one pass of a probe may take, about
FIRST_TOKENS = 8  # by which a teacher's speed is guessed
FIRST_GROUP = 4  # sequences that a teacher writes first, so that it is seen how fast it is
SHORTEST = 32  # tokens that sequences are cut to where that many would take too long
FIT_WORK = 2e12  # multiplications of a metric V·D² that take too long for a probe
READ_ROWS, READ_TOKENS = 64, 64
READ_WORK = 5e10  # operations of one reading, at most
FULL_STEPS = 2
WARM_SECONDS = 2.0  # that short steps are repeated for


@dataclass(frozen=True)
class TeacherProbe:
    """What was measured of the teacher on the sequences of a batch.

    ``length``: average tokens of a generated sequence; ``kept_share``: of positions, that are
    learnt; ``position_bytes``: of the store for each of these, and ``store_limit`` of it as a whole
    at most; ``codec_bytes``: of its shared codec. ``faster``: how many times as fast as the file
    what captures is.
    """

    batch: Batch
    sequences: list[Tokens]
    length: float
    kept_share: float
    seconds_per_token: float
    memory_bytes: int
    position_bytes: int
    store_limit: int
    codec_bytes: int
    faster: float = 1.0


def probe_teacher(
    teacher: Teacher,
    corpus: Corpus,
    recipe: Recipe,
    stage: Stage,
    most: float = TEACHER_SECONDS,
) -> TeacherProbe:
    """Capture a few sequences as the run would, and time it: as many, and as much of each, as
    ``most`` seconds are enough for."""
    info, longest = teacher.info, corpus.sampling.max_length
    some, sequences = _sequences(teacher, corpus, recipe, stage, most)
    room, count = some.sampling.max_length, len(sequences)
    request = some.generation_request(0, count)
    keep = some.keep(0, count)
    codec, fitted = SharedCodec({}, None), recipe
    if recipe.has_sketch and info.vocab_size * info.width**2 > FIT_WORK:
        fitted = replace(recipe, sketch_bytes=0)
    if fitted.needs_states or fitted.layers:
        stage.update(50, "fitting what is kept of hidden states")
        codec = fit_shared_codec(teacher, sequences, fitted, keep, limit=FIT_LEAST)
    start, total = time.perf_counter(), sum(len(tokens) for tokens in sequences)
    if request is not None:
        sequences, arrays = teacher.generate_and_score(
            request, fitted, codec.bases, lambda done: _tell(stage, (1 + done / count) / 2)
        )
    else:
        arrays = teacher.score(
            sequences, fitted, codec.bases, lambda done: _tell(stage, (1 + done / total) / 2), keep
        )
    seconds = time.perf_counter() - start
    targets = typed(arrays, fitted, info.vocab_size, codec.bases.get("final"), codec.head)
    tokens, lengths = padded(sequences)
    masks = None if keep is None else np.concatenate(whole_masks(sequences, keep))
    kept = None if masks is None else torch.from_numpy(masks)
    batch = Batch(tokens, lengths, targets, keep=kept)
    ends = [longest if len(one) == room else len(one) for one in sequences]
    return TeacherProbe(
        batch=batch,
        sequences=sequences,
        length=float(np.mean(ends)),
        kept_share=batch.count() / int((lengths - 1).sum()),
        seconds_per_token=seconds / max(1, int(lengths.sum())),
        memory_bytes=teacher.memory(),
        position_bytes=recipe.bytes_per_position(info.vocab_size, info.width)
        if fitted is not recipe
        else -(-_bytes(arrays) // batch.count()),
        store_limit=largest_size(corpus, recipe, teacher),
        codec_bytes=_bytes(codec.arrays())
        + (0 if fitted is recipe else _sketch_bytes(recipe, info.vocab_size, info.width)),
    )


def _tell(stage: Stage, share: float) -> None:
    """Report a share of the probe, in percent."""
    stage.update(round(100 * share))


def _bytes(arrays: Arrays) -> int:
    return sum(rows.nbytes for rows in arrays.values())


def _sketch_bytes(recipe: Recipe, vocab_size: int, width: int) -> int:
    """The shared codec of a sketch, without fitting it: the output matrix on its directions, their
    way there and back."""
    directions = min(width, round(DIRECTIONS * recipe.sketch_bytes))
    return vocab_size * (2 * directions + 4) + 8 * width * directions


def _sequences(
    teacher: Teacher, corpus: Corpus, recipe: Recipe, stage: Stage, most: float
) -> tuple[Corpus, list[Tokens]]:
    """The corpus cut to what the time is enough for, and its sequences. What the teacher writes is
    written in growing groups, each as long as those before allow."""
    tokens = int(most / _first_speed(teacher, corpus, recipe, stage))
    longest = corpus.sampling.max_length
    items = corpus.items[: store_manifest(teacher, corpus, recipe).sequences_per_shard]
    room = longest
    if tokens < FIRST_GROUP * longest:
        room = min(longest, max(SHORTEST, tokens // FIRST_GROUP), max(FIRST_TOKENS, tokens))
        cut = [tuple(part[: room - 1] for part in one.segments) for one in items]
        items = [replace(one, segments=parts) for one, parts in zip(items, cut, strict=True)]
    some = Corpus(items, replace(corpus.sampling, max_length=room), [], [])
    if not some.spoken:
        lengths = np.cumsum([len(one.segments[0]) for one in items])
        count = max(1, int((lengths <= tokens).sum()))
        return some, some.take(teacher, 0, count, lambda done: None)
    sequences: list[Tokens] = []
    start, size = time.perf_counter(), max(1, min(FIRST_GROUP, tokens // room, len(items)))

    def used() -> float:
        return (time.perf_counter() - start) / most

    while size > 0:
        first = len(sequences)
        sequences += some.take(
            teacher, first, first + size, lambda done: _tell(stage, min(0.5, used() / 2))
        )
        count = len(sequences)
        size = min(len(items) - count, 2 * count, int(count / used()) - count)
    return some, sequences


def _first_speed(teacher: Teacher, corpus: Corpus, recipe: Recipe, stage: Stage) -> float:
    """Seconds of a token, by a first few of them."""
    item, longest = corpus.items[0], corpus.sampling.max_length
    first = item.segments[0][: min(FIRST_TOKENS, longest - 1)]
    for _ in range(2):  # the first time a context is set up
        stage.update(0, "the first few tokens")
        start = time.perf_counter()
        if item.speaks:
            few = replace(corpus.sampling, max_length=min(longest, len(first) + FIRST_TOKENS))
            count = len(teacher.generate(GenerationRequest([[first]], few))[0]) - len(first)
        else:
            some = item.segments[0][: FIRST_TOKENS + 1]
            if teacher.truncation:
                teacher.score([some], recipe, {})
            else:
                teacher.logits([some])
            count = len(some) - 1
        seconds = (time.perf_counter() - start) / max(1, count)
    return seconds


def step_seconds(
    student: Student, batch: Batch, config: RunConfig, most: float = STUDENT_SECONDS
) -> float:
    """Seconds of a token in an optimizer step of the run's size. ``batch``: not packed yet;
    ``most``: that measuring may take, about.

    Where a whole step takes too long, one of fewer sequences stands for it: its forward and
    backward pass take as long for each token, its update (Muon's products) as long in all. The
    first steps are slower (memory is asked for, kernels are chosen), so it is what most of the
    later ones take.
    """
    whole = sequences_together(config, batch)
    together = min(whole, len(batch.lengths))
    device, width = student.device, student.config.hidden_size
    if device.type == "cpu":
        keep_freed_memory()  # as training does
    narrow = choose_precision(config.train, width, device) == "bf16"
    objective = Objective(config.loss)
    tokens = whole * float(batch.lengths[:together].float().mean())
    optimizer = build_optimizer(student, config.train, width, tokens, narrow=narrow)
    student.checkpoint_activations(bool(config.train.gradient_checkpointing))
    student.train()

    def step(rows: int) -> float:
        """Seconds of a token, in a step of all sequences."""
        start = time.perf_counter()
        part = _part(batch, rows, student.packs).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=narrow):
            sample = VocabularySample.of_step([part], config.loss.vocabulary_sample, device)
            count = max(1, part.count())
            loss, _ = objective(student, part, total=count, share=1.0, fraction=0.5, sample=sample)
        loss.backward()
        loss.item()  # a device has then done it all
        passed = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.after_step()
        loss.item()
        update = time.perf_counter() - passed
        return (passed - start) / int(part.lengths.sum()) + update / tokens

    start = time.perf_counter()
    with float32_products(batch.lengths.numpy(), student, device):
        step(1)
        alone = time.perf_counter() - start
        rows = min(together, max(1, int(most / FULL_STEPS / alone)))
        times = [step(rows)]
        while len(times) <= FULL_STEPS or time.perf_counter() - start < WARM_SECONDS:
            if time.perf_counter() - start > most:
                break
            times.append(step(rows))
    return float(np.median(times[len(times) // 2 :]))


def scoring_seconds(student: Student, batch: Batch) -> float:
    """Seconds of a token in a scoring of validation sequences, by one of a batch."""
    one, times = _part(batch, 1, student.packs).to(student.device), []
    module = TrainingModule(student, Objective(LossConfig()))
    for _ in range(2):  # the first time more has to be set up
        start = time.perf_counter()
        validation_score(module, [one])
        times.append((time.perf_counter() - start) / int(one.lengths.sum()))
    return min(times)


@torch.no_grad()
def reading_seconds(student: Student) -> float:
    """Seconds of a token in the student's layers, by rows as long as a prompt."""
    layers = sum(parameter.numel() for parameter in student.layers().parameters())
    rows = max(1, min(READ_ROWS, int(READ_WORK / (2 * layers * READ_TOKENS))))
    tokens = torch.zeros(rows, READ_TOKENS, dtype=torch.int64, device=student.device)
    student.eval()
    times = []
    for _ in range(3):  # the first time more has to be set up
        start = time.perf_counter()
        student(tokens, with_logits=False).last_hidden_state.sum().item()
        times.append((time.perf_counter() - start) / tokens.numel())
    return min(times)


def sequences_together(config: RunConfig, batch: Batch) -> int:
    """How many sequences an optimizer step learns from, if they are as long as these."""
    if config.train.batch_tokens is None:
        return config.train.batch_size
    lengths = batch.lengths
    return max(1, round(config.train.batch_tokens * len(lengths) / int(lengths.sum())))


def _part(batch: Batch, rows: int, pack: bool) -> Batch:
    """The first rows of a batch, no longer than they are, as a step computes them."""
    assert batch.rooms is None, "a packed batch's rows are not its sequences"
    lengths = batch.lengths[:rows].tolist()
    count = sum(lengths) - len(lengths)
    keep = None if batch.keep is None else batch.keep[:count]
    targets = batch.targets.select(slice(0, count if keep is None else int(keep.sum())))
    cut = [row[:length].numpy() for row, length in zip(batch.tokens, lengths, strict=False)]
    tokens, sizes, rooms = arrange(cut, pack)
    return Batch(tokens, sizes, targets, rooms=rooms, keep=keep)


def first_of(sequences: list[Tokens], count: int) -> list[Tokens]:
    """So many sequences, those of a probe standing for the others."""
    return list(itertools.islice(itertools.cycle(sequences), count))
