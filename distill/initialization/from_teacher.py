"""Initialize a student from the weights of its GGUF teacher.

Two passes over some training text, both with one layer of the teacher in memory at a time. The
first, on a part of the text, finds the principal directions of the residual stream and the layers
that change it least. The second fits the student layer by layer
(``distill.initialization.layer_fitting``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.initialization.balance import balance
from distill.initialization.layer_fitting import LayerFitter, stream_scale
from distill.initialization.products import are_narrow
from distill.initialization.structured_pruning import (
    Projection,
    PrunedLayer,
    chosen_spans,
    identity_projection,
    layer_spans,
    principal_projection,
    prune_layer,
    relative_changes,
    stream_moment,
)
from distill.initialization.teacher_trace import (
    VOCABULARY_ROWS,
    final_states,
    logit_blocks,
    trace,
)
from students.model.build import build_student
from students.model.config import SO8TConfig
from students.model.decoder import SO8TForCausalLM
from students.model.sizes import layer_parameters
from teachers.base import Tokens
from teachers.gguf.file import GGUFFile, TeacherFileError
from teachers.gguf.llama_weights import LlamaWeights
from teachers.targets.threads import one_thread

# Tokens of text that the regressions see: more are better (docs/benchmarks.md), but a teacher of
# billions of parameters computes for a second on a hundred of them.
MOST_TOKENS, LEAST_TOKENS = 16_384, 4_096
TOKEN_PARAMETERS = 1.5e12
TRACE_BYTES = 512 << 20  # of one layer's activations; about three times as much is in use at once
SURVEY_SHARE = 4  # the first pass sees one part in so many, where the student is narrower
COMPARED_TOKENS = 512  # on which the first pass compares the teacher's layers
CALIBRATION_TOKENS = 256  # for the temperature
LONGEST = 1024  # tokens of a sequence that are used
PRODUCTS_OF_FIT = 6  # with each of the student's weights for each token: outputs and moments

Report = Callable[[int, str], None]
"""Called with the number of finished student layers and the current step."""


class UnusableTeacher(TeacherFileError):
    """This teacher's weights cannot initialize a student of this shape; says why."""


def require_usable_weights(config: SO8TConfig, file: GGUFFile) -> LlamaWeights:
    """The teacher's weights, if they can initialize a student of this shape.

    Raises:
        NotALlama, UnusableTeacher: they cannot; says why.
    """
    teacher = LlamaWeights(file)
    facts = teacher.facts
    if config.vocab_size != facts.vocab_size:
        raise UnusableTeacher(
            f"{file.path} has {facts.vocab_size} tokens, the student {config.vocab_size}; its "
            "weights need the same"
        )
    if not math.isclose(config.rope_theta, facts.rope_theta, rel_tol=1e-6):
        raise UnusableTeacher(
            f"{file.path} has the rotary base {facts.rope_theta:g}, the student "
            f"{config.rope_theta:g}; its weights need the same"
        )
    return teacher


def student_from_teacher(
    config: SO8TConfig, file: GGUFFile, sequences: Sequence[Tokens], seed: int, report: Report
) -> SO8TForCausalLM:
    """A student of shape ``config`` initialized from the teacher ``file``; it is deterministic.

    ``sequences``: training text on which the student is fitted to the teacher. What has no
    counterpart in the teacher (the gates, surplus heads and units) is random from ``seed``.

    Raises:
        NotALlama, UnusableTeacher: see ``require_usable_weights``.
        TeacherFileError: a weight cannot be read or is not finite.
        IndexError: a token that the teacher does not have.
    """
    teacher = require_usable_weights(config, file)
    student = build_student(config, seed)
    text = _some_text(sequences, _token_budget(teacher), seed)
    if not text:
        raise UnusableTeacher(f"there is no text on which to fit the student to {file.path}")
    plan = _survey(teacher, config, text, report)
    table_scale = _fill_table(teacher, student, plan.projection)
    tokens = torch.from_numpy(np.concatenate(text).astype(np.int64))
    fitter = LayerFitter(student, plan.projection, tokens, [len(part) for part in text])
    last = _fit_layers(teacher, fitter, plan.spans, text, report)
    _finish(teacher, fitter, last, table_scale)
    balance(student)
    return student


def fit_work(config: SO8TConfig, file: GGUFFile) -> float:
    """About how many operations ``student_from_teacher`` takes, given enough text."""
    teacher = require_usable_weights(config, file)
    facts, tokens = teacher.facts, _token_budget(teacher)
    theirs = file.parameters - (1 if facts.tied else 2) * facts.vocab_size * facts.width
    ours = config.num_hidden_layers * layer_parameters(config)
    surveyed = _surveyed_tokens(teacher, config, tokens)
    return 2.0 * ((tokens + surveyed) * theirs + tokens * PRODUCTS_OF_FIT * ours)


def _fill_table(teacher: LlamaWeights, student: SO8TForCausalLM, projection: Projection) -> float:
    """Fill the student's token embeddings; returns their scale relative to the output's.

    A tied student of an untied teacher gets the output matrix at the input's scale: the first
    layers can learn to read other embeddings, but no layer follows the output (measured:
    docs/benchmarks.md). Of a tied teacher the scale is that of its embeddings.
    """
    table = student.model.embed_tokens.weight.data
    outputs = student.config.tie_word_embeddings and not teacher.facts.tied
    squares = [0.0, 0.0]
    for start in range(0, len(table), VOCABULARY_ROWS):
        stop = min(start + VOCABULARY_ROWS, len(table))
        rows = torch.from_numpy(teacher.embedding_rows(start, stop)) @ projection.down
        if outputs:
            squares[0] += float(rows.square().sum(dtype=torch.float64))
            rows = torch.from_numpy(teacher.output_rows(start, stop)) @ projection.down
            squares[1] += float(rows.square().sum(dtype=torch.float64))
        table[start:stop] = rows
    if not outputs:
        return teacher.facts.embedding_scale
    scale = math.sqrt(squares[0] / squares[1]) if min(squares) > 0 else 1.0
    table.mul_(scale)
    return scale


def _finish(teacher: LlamaWeights, fitter: LayerFitter, last: Tensor, table_scale: float) -> None:
    """Set final norm and output matrix; ``last [N, D]``: the teacher's stream after its layers."""
    student, config = fitter.student, fitter.student.config
    gain = torch.from_numpy(teacher.final_norm())
    with one_thread():
        matrix = fitter.finish(last, gain, teacher.facts.rms_eps)
    if matrix is None:
        student.model.norm.weight.data.div_(table_scale)
    tokens = fitter.validation.nonzero()[:, 0]
    tokens = tokens[:: max(1, -(-len(tokens) // CALIBRATION_TOKENS))]
    states = final_states(teacher, last[tokens])
    expected, start = torch.empty(len(tokens), config.vocab_size), 0
    for rows, part in logit_blocks(teacher, states):
        block, start = slice(start, start + len(rows)), start + len(rows)
        expected[:, block] = part
        if matrix is not None:
            student.lm_head.weight.data[block] = rows @ matrix
    if len(tokens):
        fitter.calibrate_temperature(tokens, expected)


def _fit_layers(
    teacher: LlamaWeights,
    fitter: LayerFitter,
    spans: Sequence[range],
    text: Sequence[Tokens],
    report: Report,
) -> Tensor:
    """The second pass; returns the teacher's stream after its last layer, ``[N, D]``."""
    config, count = fitter.student.config, teacher.facts.layers
    pruned: PrunedLayer | None = None
    after = torch.empty(0)
    done = 0
    for layer in trace(teacher, text, narrow=are_narrow(teacher.facts.width)):
        report(done, f"layer {layer.number + 1} of the teacher's {count}")
        span = spans[done]
        with one_thread():
            if layer.number == span.start:
                pruned = prune_layer(layer, teacher.facts, fitter.projection, config)
            if layer.number == span.stop - 1:
                assert pruned is not None
                fitter.fit(done, pruned, layer.after)
                done += 1
        after = layer.after
    for number in range(done, config.num_hidden_layers):
        fitter.silence(number)
    report(config.num_hidden_layers, "the student starts from the teacher's weights")
    return after


@dataclass(frozen=True)
class _Plan:
    """What the first pass finds: the student's directions, and the teacher layers that each of its
    layers stands for."""

    projection: Projection
    spans: list[range]


def _survey(
    teacher: LlamaWeights, config: SO8TConfig, text: Sequence[Tokens], report: Report
) -> _Plan:
    """The first pass, which a student as wide and as deep as its teacher does not need."""
    facts, count = teacher.facts, config.num_hidden_layers
    narrows = config.hidden_size < facts.width
    projection = identity_projection(facts.width, max(facts.width, config.hidden_size))
    surveyed = _surveyed_tokens(teacher, config, sum(map(len, text)))
    if not surveyed:
        return _Plan(projection, layer_spans(facts.layers, count))
    gain = torch.from_numpy(teacher.final_norm())
    scale, signs = stream_scale(gain, config.tie_word_embeddings)
    moment = torch.zeros(facts.width, facts.width, dtype=torch.float64)
    compared, states = _compared_tokens(teacher), list[Tensor]()
    for layer in trace(teacher, _first(text, surveyed), narrow=are_narrow(facts.width)):
        report(0, f"looks at layer {layer.number + 1} of the teacher's {facts.layers}")
        for state in (layer.before, layer.after) if layer.number == 0 else (layer.after,):
            states.append(state[:compared].clone())
            if narrows:
                moment += stream_moment(state, scale)
    with one_thread():
        if narrows:
            projection = principal_projection(moment, scale, signs, config.hidden_size)
        return _Plan(projection, chosen_spans(relative_changes(states), count))


def _surveyed_tokens(teacher: LlamaWeights, config: SO8TConfig, tokens: int) -> int:
    """Of so many tokens of text, those that the first pass looks at."""
    if config.hidden_size < teacher.facts.width:
        return max(1, tokens // SURVEY_SHARE)
    return _compared_tokens(teacher) if config.num_hidden_layers < teacher.facts.layers else 0


def _compared_tokens(teacher: LlamaWeights) -> int:
    """Tokens whose states before and after every layer are in memory at once."""
    each = 4 * (teacher.facts.layers + 1) * teacher.facts.width
    return max(1, min(COMPARED_TOKENS, TRACE_BYTES // each))


def _token_budget(teacher: LlamaWeights) -> int:
    """How many tokens of text to use with this teacher."""
    facts = teacher.facts
    each = 4 * (7 * facts.width + 3 * facts.feed_forward)
    affordable = min(TOKEN_PARAMETERS / teacher.file.parameters, TRACE_BYTES / each)
    return int(min(MOST_TOKENS, max(LEAST_TOKENS, affordable)))


def _some_text(sequences: Sequence[Tokens], budget: int, seed: int) -> list[Tokens]:
    """A random sample of the sequences with about ``budget`` tokens."""
    order = np.random.default_rng([seed, 5]).permutation(len(sequences))
    return _first(
        [sequences[int(index)][:LONGEST] for index in order if len(sequences[int(index)])], budget
    )


def _first(sequences: Sequence[Tokens], budget: int) -> list[Tokens]:
    """The first sequences with at most ``budget`` tokens together, but at least one."""
    chosen: list[Tokens] = []
    total = 0
    for tokens in sequences:
        if chosen and total + len(tokens) > budget:
            break
        chosen.append(tokens)
        total += len(tokens)
    return chosen
