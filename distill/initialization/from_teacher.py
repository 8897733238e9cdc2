"""A head start: the student's first weights are made from those of its GGUF teacher.

Two passes over some training text, both with one layer of the teacher in memory at a time. The
first, on a part of the text, looks at which directions the residual stream uses. The second makes
the student, layer by layer (``distill.initialization.layer_fitting``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from distill.initialization.layer_fitting import HeadStart, stream_scale
from distill.initialization.structured_pruning import (
    HeadLayout,
    Parts,
    Projection,
    cut_layer,
    layer_spans,
    principal_stream,
    stream_moment,
    whole_stream,
)
from distill.initialization.teacher_trace import VOCABULARY_ROWS, final_states, trace
from students.model.build import build_student
from students.model.config import SO8TConfig
from students.model.decoder import SO8TForCausalLM
from teachers.base import Tokens
from teachers.gguf.file import GGUFFile, TeacherFileError
from teachers.gguf.llama_weights import LlamaFacts, LlamaWeights
from teachers.targets.threads import one_thread

# Tokens of text that the regressions see: more are better (docs/benchmarks.md), but a teacher of
# billions of parameters computes for a second on a hundred of them.
MOST_TOKENS, LEAST_TOKENS = 16_384, 4_096
TOKEN_PARAMETERS = 1.5e12
TRACE_BYTES = 512 << 20  # of one layer's activations; about three times as much is in use at once
SURVEY_SHARE = 4  # the first pass sees one part in so many
SOFTENED_ON = 256  # tokens on which the student is made as sure of itself as it should be
LONGEST = 1024  # tokens of a sequence that are looked at

Report = Callable[[int, str], None]
"""Called with the number of student layers that are made, and what is being done."""


class NoHeadStart(TeacherFileError):
    """This teacher's weights cannot be a student's of this shape; the message says why."""


def require_head_start(config: SO8TConfig, file: GGUFFile) -> LlamaWeights:
    """The teacher's weights, if a student of this shape can begin at them.

    Raises:
        NotALlama, NoHeadStart: it cannot; says why.
    """
    teacher = LlamaWeights(file)
    facts = teacher.facts
    if config.vocab_size != facts.vocab_size:
        raise NoHeadStart(
            f"{file.path} has {facts.vocab_size} tokens, the student {config.vocab_size}; a head "
            "start needs the same"
        )
    if not math.isclose(config.rope_theta, facts.rope_theta, rel_tol=1e-6):
        raise NoHeadStart(
            f"{file.path} has the rotary base {facts.rope_theta:g}, the student "
            f"{config.rope_theta:g}; a head start "
            "needs the same"
        )
    return teacher


def head_start(
    config: SO8TConfig, file: GGUFFile, sequences: Sequence[Tokens], seed: int, report: Report
) -> SO8TForCausalLM:
    """A student of shape ``config`` made from the weights of the teacher ``file``; equal arguments
    give equal bytes.

    ``sequences``: training text that the teacher and the student are compared on. What has no
    counterpart in the teacher (the gates, surplus heads and units) is random from ``seed``.

    Raises:
        NotALlama, NoHeadStart: see ``require_head_start``.
        TeacherFileError: a weight cannot be read or is not finite.
        IndexError: a token that the teacher does not have.
    """
    teacher = require_head_start(config, file)
    student = build_student(config, seed)
    text = _some_text(sequences, _token_budget(teacher), seed)
    if not text:
        raise NoHeadStart(
            f"there is no text on which {file.path} and the student could be compared"
        )
    projection = _projection(teacher, config, text, report)
    table_scale = _fill_table(teacher, student, projection)
    tokens = torch.from_numpy(np.concatenate(text).astype(np.int64))
    made = HeadStart(student, projection, tokens, [len(part) for part in text])
    last = _make_layers(teacher, made, text, report)
    _finish(teacher, made, last, table_scale)
    return student


def _fill_table(teacher: LlamaWeights, student: SO8TForCausalLM, projection: Projection) -> float:
    """Fill the student's token embeddings; returns how much larger they are than what the output
    needs.

    Where the student has one matrix for input and output and the teacher two, it gets the output's,
    as large as the input's: the first layers can learn to read other embeddings, but nothing comes
    after the last one that could put its words right (measured: docs/benchmarks.md).
    """
    table = student.model.embed_tokens.weight.data
    outputs = student.config.tie_word_embeddings and not teacher.facts.tied
    squares = [0.0, 0.0]
    for start in range(0, len(table), VOCABULARY_ROWS):
        stop = min(start + VOCABULARY_ROWS, len(table))
        rows = torch.from_numpy(teacher.embedding_rows(start, stop)) @ projection.read
        if outputs:
            squares[0] += float(rows.square().sum(dtype=torch.float64))
            rows = torch.from_numpy(teacher.output_rows(start, stop)) @ projection.read
            squares[1] += float(rows.square().sum(dtype=torch.float64))
        table[start:stop] = rows
    scale = math.sqrt(squares[0] / squares[1]) if min(squares) > 0 else 1.0
    table.mul_(scale)
    return scale


def _finish(teacher: LlamaWeights, made: HeadStart, last: Tensor, table_scale: float) -> None:
    """Set what lies between the last layer and the logits; ``last [N, D]``: the teacher's stream
    after its last."""
    config = made.student.config
    gain = torch.from_numpy(teacher.final_norm())
    with one_thread():
        matrix = made.finish(last, gain, teacher.facts.rms_eps)
    if matrix is None:
        made.student.model.norm.weight.data.div_(table_scale)
    places = made.checked.nonzero()[:, 0]
    places = places[:: max(1, -(-len(places) // SOFTENED_ON))]
    states = final_states(teacher, last[places])
    expected = torch.empty(len(places), config.vocab_size)
    for start in range(0, config.vocab_size, VOCABULARY_ROWS):
        stop = min(start + VOCABULARY_ROWS, config.vocab_size)
        rows = torch.from_numpy(teacher.output_rows(start, stop))
        expected[:, start:stop] = states @ rows.T
        if matrix is not None:
            made.student.lm_head.weight.data[start:stop] = rows @ matrix
    if len(places):
        made.soften(places, expected)


def _make_layers(
    teacher: LlamaWeights, made: HeadStart, text: Sequence[Tokens], report: Report
) -> Tensor:
    """The second pass; returns the teacher's stream after its last layer, ``[N, D]``."""
    config, count = made.student.config, teacher.facts.layers
    layout, spans = _layout(teacher.facts), layer_spans(count, config.num_hidden_layers)
    parts: Parts | None = None
    after = torch.empty(0)
    done = 0
    for layer in trace(teacher, text):
        report(done, f"layer {layer.number + 1} of the teacher's {count}")
        span = spans[done]
        with one_thread():
            if layer.number == span.start:
                parts = cut_layer(layer, layout, made.projection.read, config)
            if layer.number == span.stop - 1:
                assert parts is not None
                made.layer(done, parts, layer.after)
                done += 1
        after = layer.after
    for number in range(done, config.num_hidden_layers):
        made.skip(number)
    report(config.num_hidden_layers, "the student begins at the teacher's weights")
    return after


def _projection(
    teacher: LlamaWeights, config: SO8TConfig, text: Sequence[Tokens], report: Report
) -> Projection:
    """The first pass; none where the student has all of the teacher's directions."""
    facts = teacher.facts
    if config.hidden_size >= facts.width:
        return whole_stream(facts.width, config.hidden_size)
    scale = stream_scale(torch.from_numpy(teacher.final_norm()), config.tie_word_embeddings)
    moment = torch.zeros(facts.width, facts.width, dtype=torch.float64)
    for layer in trace(teacher, _beginning(text, sum(map(len, text)) // SURVEY_SHARE)):
        report(0, f"looks at layer {layer.number + 1} of the teacher's {facts.layers}")
        if layer.number == 0:
            moment += stream_moment(layer.before, scale)
        moment += stream_moment(layer.after, scale)
    with one_thread():
        return principal_stream(moment, scale, config.hidden_size)


def _layout(facts: LlamaFacts) -> HeadLayout:
    return HeadLayout(
        facts.heads, facts.kv_heads, facts.head_width, facts.frequencies, facts.rotary_scale
    )


def _token_budget(teacher: LlamaWeights) -> int:
    """How many tokens of text to look at with this teacher."""
    facts = teacher.facts
    each = 4 * (7 * facts.width + 3 * facts.feed_forward)
    affordable = min(TOKEN_PARAMETERS / teacher.file.parameters, TRACE_BYTES / each)
    return int(min(MOST_TOKENS, max(LEAST_TOKENS, affordable)))


def _some_text(sequences: Sequence[Tokens], budget: int, seed: int) -> list[Tokens]:
    """Random ones of the sequences, about ``budget`` tokens together."""
    order = np.random.default_rng([seed, 5]).permutation(len(sequences))
    return _beginning(
        [sequences[int(place)][:LONGEST] for place in order if len(sequences[int(place)])], budget
    )


def _beginning(sequences: Sequence[Tokens], budget: int) -> list[Tokens]:
    """The first sequences with ``budget`` tokens or a little less together, one at least."""
    chosen: list[Tokens] = []
    total = 0
    for tokens in sequences:
        if chosen and total + len(tokens) > budget:
            break
        chosen.append(tokens)
        total += len(tokens)
    return chosen
