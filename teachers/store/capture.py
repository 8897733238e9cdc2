"""Corpus → teacher → store, shard by shard; a rerun does only what is missing or damaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from stability.precision import ieee_float32
from teachers.atomic_files import remove_leftovers
from teachers.base import (
    Floats,
    GenerationRequest,
    Keep,
    LogitRule,
    Progress,
    Teacher,
    Tokens,
    no_progress,
    whole_masks,
)
from teachers.store.manifest import TASKS
from teachers.store.shard_records import is_unchanged, task_names
from teachers.store.shared import SharedCodec
from teachers.store.store import SHARED_CODEC, SoftTargetStore
from teachers.store.tasks import Tasks
from teachers.targets.distributions import Arrays
from teachers.targets.fit_codec import (
    FIT_LEAST,
    FIT_POSITIONS,
    FIT_SHARE,
    fit_basis,
    fit_sketch,
)
from teachers.targets.output_head import OutputHead, soft_capped
from teachers.targets.recipe import Recipe
from teachers.targets.state_codec import Basis, output_parts

Report = Callable[[float, str], None]
"""Called with the number of finished sequences (over the whole store), those of the shard at work
by the share of its tokens, and what is being done."""

PROBE_TOKENS = 65  # of the source's text, on which a teacher is tried
LINEAR_ROWS = 4096
# Of the logits' spread: how far the product with the output matrix may be from them. With hidden
# states rounded as llama.cpp rounds them it is 0.1 %, where a kernel rounds otherwise 1.3 %.
LINEAR_TOLERANCE = 0.02
CAUSAL_TOKENS = 17  # of the probe: the latter half is changed, the former half's logits may then
CAUSAL_TOLERANCE = 0.02  # differ by so much of their spread (0 on a processor)
WRITING_SHARE = 0.5  # of a shard's progress, where the teacher writes it before it scores it


class CaptureError(ValueError):
    """A teacher whose answer cannot be kept as asked; says why and what to choose instead."""


class SequenceSource(Protocol):
    """Where the token sequences come from. ``take`` must give the same sequences every time."""

    def __len__(self) -> int:
        """Number of sequences."""
        ...

    def take(self, teacher: Teacher, start: int, stop: int, progress: Progress) -> list[Tokens]:
        """Sequences ``start`` to ``stop``, ≥ 2 tokens each; the teacher may have to write them."""
        ...

    def generation_request(self, start: int, stop: int) -> GenerationRequest | None:
        """What to ask the teacher for, if it writes all of these sequences."""
        ...

    def keep(self, start: int, stop: int) -> list[Keep] | None:
        """Which predictions of the sequences ``take`` gives are to be learnt; ``None``: all."""
        ...


@dataclass(frozen=True)
class CaptureSummary:
    """Shards taken over from before, written by this process, and of these captured again because
    damaged; and written meanwhile by others."""

    reused: int
    damaged: tuple[int, ...]
    written: int
    others: int = 0


_rules: WeakKeyDictionary[Teacher, LogitRule] = WeakKeyDictionary()  # measured before


def capture(
    teacher: Teacher,
    source: SequenceSource,
    store: SoftTargetStore,
    report: Report,
    tasks: Tasks | None = None,
) -> CaptureSummary:
    """Fill ``store`` with the teacher's soft targets of every sequence of ``source``, together with
    all other processes that do so; ``tasks``: of the store, where they differ from the usual.

    Raises:
        CaptureError: the teacher's logits are not its final hidden state times a matrix, which the
            store's recipe needs.
    """
    tasks = tasks or Tasks(store.folder / TASKS)
    for folder in (store.folder, store.folder / TASKS):
        remove_leftovers(folder)
    names = task_names(store.manifest)
    numbers = {name: shard for shard, name in enumerate(names)}
    records = tasks.records()
    for name in set(names).difference(tasks.undone(names)):
        if not is_unchanged(store.shard_path(numbers[name]), records.get(name)):
            tasks.reopen(name)
    work = _Work(teacher, source, store, report)

    def done() -> int:
        """How many shards are done, by whomever; progress goes on from there."""
        left = [numbers[name] for name in tasks.undone(names)]
        work.finished = len(store) - sum(stop - start for start, stop in map(store.span, left))
        return len(names) - len(left)

    def waiting(count: int) -> None:
        done()
        work.tell(work.finished, f"other processes are at work on {count} shards")

    reused = done()
    if store.needs_shared_codec:
        work.find_codec(tasks)
    written: list[int] = []
    damaged: list[int] = []
    for lease in tasks.each(names, waiting):
        with lease:
            done()
            shard = numbers[lease.name]
            arrays = store.read_shard(shard)
            if arrays is not None:
                reused += 1
                lease.finish(store.record_of(shard, arrays))
                continue
            damaged += [shard] * store.shard_path(shard).exists()
            written.append(shard)
            arrays = work.capture(shard)
            lease.finish(store.record_of(shard, arrays), int(arrays["lengths"].sum()))
            work.tell(work.finished + len(arrays["lengths"]), "saved")
    others = len(names) - reused - len(written)
    return CaptureSummary(reused, tuple(sorted(damaged)), len(written), others)


class _Work:
    """What one process does of a capture: shard after shard, telling how far it is."""

    def __init__(
        self, teacher: Teacher, source: SequenceSource, store: SoftTargetStore, report: Report
    ) -> None:
        self.teacher, self.source, self.store, self.report = teacher, source, store, report
        self.finished, self.reached = 0, 0.0  # sequences of whole shards; the most told
        self.bases: Mapping[str, Basis] = {}
        # The first shard's sequences, generated before it is known how to keep states.
        self.first: list[Tokens] = []

    def tell(self, done: float, text: str) -> None:
        """Report so many finished sequences; never fewer than before."""
        self.reached = max(self.reached, done)
        self.report(self.reached, text)

    def capture(self, shard: int) -> Arrays:
        """Ask the teacher about one shard's sequences and write it; returns what it holds."""
        teacher, source, store = self.teacher, self.source, self.store
        recipe, (start, stop) = store.manifest.recipe, store.span(shard)
        keep = source.keep(start, stop)

        def writing(part: float) -> Progress:
            return lambda done: self.tell(self.finished + part * done, "the teacher writes")

        alone = shard == 0 and store.needs_shared_codec
        request = None if alone else source.generation_request(start, stop)
        if request is not None:
            whole = writing(1.0)
            sequences, arrays = teacher.generate_and_score(request, recipe, self.bases, whole)
        else:
            sequences = self.first if shard == 0 else []
            if not sequences:
                sequences = source.take(teacher, start, stop, writing(WRITING_SHARE))
            begin = max(self.reached, float(self.finished))
            rest = self.finished + (stop - start) - begin
            total = max(1, sum(len(tokens) - 1 for tokens in sequences))

            def scored(positions: float) -> None:
                self.tell(begin + positions * rest / total, "the teacher scores")

            arrays = teacher.score(sequences, recipe, self.bases, scored, keep)
        return store.write_shard(shard, sequences, arrays, keep)

    def find_codec(self, tasks: Tasks) -> None:
        """The store's codec: as it is there, or fitted now, by one process for all."""
        find, waiting = self.store.shared_codec, partial(self.tell, 0, "waiting for the codec")
        self.bases = tasks.once(SHARED_CODEC, find, self._fit_codec, waiting).bases

    def _fit_codec(self) -> SharedCodec:
        """Fit it to the first shard's sequences, which the teacher may have to write for it."""
        teacher, source, store = self.teacher, self.source, self.store
        start, stop = store.span(0)
        if store.state(0) == "complete":
            sequences = [store.tokens(index) for index in range(start, stop)]
        else:
            sequences = self.first = source.take(
                teacher,
                start,
                stop,
                lambda done: self.tell(WRITING_SHARE * done, "the teacher writes"),
            )
        self.tell(0, "fitting what is kept of hidden states")
        # The first shard stands for the others. What it holds alone is known to every process.
        keep = source.keep(start, stop)
        positions = sum(mask.sum() for mask in whole_masks(sequences, keep))
        positions *= store.manifest.shards
        limit = min(FIT_POSITIONS, max(FIT_LEAST, round(FIT_SHARE * positions)))
        codec = fit_shared_codec(teacher, sequences, store.manifest.recipe, keep, limit=limit)
        store.write_shared_codec(codec)
        return codec


@ieee_float32()
def fit_shared_codec(
    teacher: Teacher,
    sequences: Sequence[Tokens],
    recipe: Recipe,
    keep: Sequence[Keep] | None = None,
    *,
    limit: int = FIT_POSITIONS,
) -> SharedCodec:
    """Fit how hidden states are encoded to ``limit`` kept positions at most; with the output
    matrix.

    Raises:
        CaptureError: see ``capture``.
    """
    chosen, masks = _first_positions(sequences, whole_masks(sequences, keep), limit)
    vocab_size = teacher.info.vocab_size
    rule = logit_rule(teacher, chosen[0]) if recipe.needs_states else LogitRule()

    def rows(start: int, stop: int) -> Floats:
        return rule.scale * teacher.output_rows(start, stop)

    rows_of = teacher.states(chosen, recipe.layers, keep=None if keep is None else masks)
    states = {name: torch.from_numpy(values) for name, values in rows_of.items()}
    bases: dict[str, Basis] = {}
    head = known = None
    if recipe.has_sketch:
        sketch = fit_sketch(states["final"], rows, vocab_size, recipe, rule.cap)
        bases["final"], head, known = sketch.basis, sketch.head, sketch.kl
    elif recipe.needs_states:
        matrix = torch.cat([part.half() for _, part in output_parts(rows, vocab_size)])
        # As it will be read back.
        head = OutputHead(matrix.float(), torch.zeros(vocab_size), rule.cap)
    for layer in recipe.layers:
        name = f"layer{layer}"
        bases[name] = fit_basis(states[name], None, min(recipe.layer_bytes, states[name].shape[1]))
    return SharedCodec(bases, head, known)


def probe_text(teacher: Teacher, source: SequenceSource) -> Tokens:
    """``PROBE_TOKENS`` tokens of the first sequence, or of its beginning written by the teacher;
    from the start again where it is shorter."""
    size = min(PROBE_TOKENS, teacher.info.context_length)
    request = source.generation_request(0, 1)
    if request is None:
        tokens = source.take(teacher, 0, 1, no_progress)[0]
    elif len(tokens := request.prompts[0][0]) < size:
        sampling = replace(request.sampling, max_length=size)
        tokens = teacher.generate(replace(request, sampling=sampling))[0]
    return np.resize(tokens, size)


def require_causal(teacher: Teacher, tokens: Tokens) -> None:
    """Check on one text that no logits depend on later tokens.

    Raises:
        CaptureError: they do, so they would tell a student what it has to predict.
    """
    if teacher.truncation:
        return  # whole distributions are not to be had, from a server that writes text
    one = tokens[:CAUSAL_TOKENS]
    half = len(one) // 2
    other = np.append(one[:half], (one[half:] + 1) % teacher.info.vocab_size).astype(np.int32)
    first, second = (torch.from_numpy(teacher.logits([text])[:half]) for text in (one, other))
    if (error := _difference(second, first)) > CAUSAL_TOLERANCE:  # what is no number, capture names
        raise CaptureError(
            f"{teacher.info.name} ({teacher.info.architecture}) is no causal language model: its "
            f"logits change by {error:.0%} with tokens that come later. Give a model that predicts "
            "each token from those before it alone"
        )


def logit_rule(teacher: Teacher, tokens: Tokens) -> LogitRule:
    """How logits follow from final states and output matrix, measured on one text.

    Raises:
        CaptureError: in no way that the teacher's file may mean.
    """
    if teacher in _rules:
        return _rules[teacher]
    some = [tokens[:PROBE_TOKENS]]
    states = torch.from_numpy(teacher.rounded_states(teacher.states(some)["final"]))
    rows = torch.from_numpy(teacher.output_rows(0, min(LINEAR_ROWS, teacher.info.vocab_size)))
    logits = torch.from_numpy(teacher.product_logits(some))[:, : len(rows)]
    errors = {
        rule: _difference(soft_capped(states @ rows.T * rule.scale, rule.cap), logits)
        for rule in teacher.logit_rules()
    }
    rule = min(errors, key=errors.__getitem__)
    if not errors[rule] <= LINEAR_TOLERANCE:
        raise CaptureError(
            f"{teacher.info.name} ({teacher.info.architecture}): its logits differ by "
            f"{errors[rule]:.0%} from its final hidden state times its output matrix, so hidden "
            "states cannot stand for them; choose targets.kind=compact with "
            "targets.sketch_bytes=0, or targets.kind=dense"
        )
    return _rules.setdefault(teacher, rule)


def _difference(logits: Tensor, reference: Tensor) -> float:
    """Standard deviation of the difference of logits ``[N, V]``, of their spread; a constant of
    each position does not count."""
    spread = float(reference.std(dim=-1).mean())
    return float((logits - reference).std(dim=-1).mean()) / max(spread, 1e-9)


def _first_positions(
    sequences: Sequence[Tokens], masks: Sequence[Keep], limit: int
) -> tuple[list[Tokens], list[Keep]]:
    """Evenly chosen sequences with about ``limit`` kept positions together, the last one cut, and
    their masks."""
    average = max(1, int(sum(mask.sum() for mask in masks)) // len(sequences))
    count = min(len(sequences), max(1, -(-limit // average)))
    chosen: list[Tokens] = []
    kept: list[Keep] = []
    room = limit
    for index in np.linspace(0, len(sequences) - 1, count).round().astype(int):
        if room < 1:
            break
        stop = int(np.flatnonzero(masks[index])[:room][-1]) + 1
        chosen.append(sequences[index][: stop + 1])
        kept.append(masks[index][:stop])
        room -= int(kept[-1].sum())
    return chosen, kept
