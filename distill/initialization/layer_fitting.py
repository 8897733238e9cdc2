"""Fit a student's layers to its teacher's activations, one after another.

A student layer starts from a pruned teacher layer (``distill.initialization.structured_pruning``).
Then ridge regression corrects its matrices in the order in which they act, on the student's own
activations: queries, keys, values, gates and ups towards the teacher's, the output matrices towards
the teacher's residual stream. The feed-forward's output aims at the stream after the whole span of
teacher layers, which makes up for dropped layers and earlier errors.

Letters: N tokens, D the teacher's width, S the student's, R rows of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.initialization.products import are_narrow, linear
from distill.initialization.ridge import corrections
from distill.initialization.structured_pruning import (
    Projection,
    PrunedLayer,
    TargetRows,
    root_mean_square,
)
from students.model import so8
from students.model.decoder import (
    DecoderLayer,
    RMSNorm,
    SO8TForCausalLM,
    apply_rotary,
    attend,
    rotary_tables,
)

STRENGTHS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 1.1, 1.2)  # the first of equals wins
ROWS_TOGETHER = 32
# Of the median size of a norm's outputs, to which smaller ones count as equal: what is next to
# silent is not made as loud as the rest.
LEAST_SIZE = 0.25
# One sequence in so many validates the regressions; with fewer sequences, the end of each.
VALIDATION_SHARE = 8


class LayerFitter:
    """Fits ``student`` from bottom to top on the ``tokens [N]`` of sequences of ``lengths``.

    ``strengths``: see ``corrections``.
    """

    def __init__(
        self,
        student: SO8TForCausalLM,
        projection: Projection,
        tokens: Tensor,
        lengths: Sequence[int],
        strengths: Sequence[float] | None = None,
    ) -> None:
        self.student = student
        self.projection = projection
        self.lengths = list(lengths)
        self.strengths = strengths
        self.validation = _validation_tokens(self.lengths)
        self.state = student.model.embed_tokens.weight.detach()[tokens]
        self.narrow = are_narrow(student.config.hidden_size)

    @torch.no_grad()
    def fit(self, number: int, pruned: PrunedLayer, after: Tensor) -> None:
        """Set all weights of layer ``number``; ``after [N, D]``: the teacher's stream at the end of
        its span."""
        layer = self._layer(number)
        self.state = self._attention(layer, pruned, self._projected(pruned.middle))
        self.state = self._feed_forward(layer, pruned, self._projected(after))

    @torch.no_grad()
    def silence(self, number: int) -> None:
        """Let layer ``number``, which has no teacher layer, add nothing initially."""
        layer = self._layer(number)
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()

    @torch.no_grad()
    def finish(self, last: Tensor, gain: Tensor, eps: float) -> Tensor | None:
        """Set the final norm; for an untied student return the output matrix's factor ``[D, S]``.

        ``last [N, D]``: the teacher's stream after its last layer, ``gain [D]`` and ``eps`` of its
        final norm. The student's output matrix is the teacher's times the factor.
        """
        norm = self.student.model.norm
        normed, known = _normed(self.state, norm.eps), last / root_mean_square(last, eps)
        if self.student.config.tie_word_embeddings:
            if self.projection.narrows:
                # The matrix is in coordinates that contain the gain (``stream_scale``).
                target = known @ self.projection.down
                fitted = (normed * target).sum(dim=0) / normed.square().sum(dim=0).clamp_min(1e-30)
                norm.weight.copy_(fitted * self.projection.signs)
            else:
                norm.weight.copy_(self._widened(gain))
            return None
        norm.weight.copy_(self._gain(known, normed, gain))
        inputs = normed * norm.weight
        first = self._folded(torch.eye(len(gain)), gain)
        return first + corrections(inputs, [known * gain - inputs @ first.T], self.validation)[0]

    def _layer(self, number: int) -> DecoderLayer:
        layer = self.student.model.layers[number]
        assert isinstance(layer, DecoderLayer)
        return layer

    @torch.no_grad()
    def calibrate_temperature(self, rows: Tensor, expected: Tensor) -> None:
        """Scale the final norm to the least KL from the teacher.

        ``expected [n, V]``: the teacher's logits at the tokens ``rows [n]``. A confident wrong
        student is worse than a uniform one.
        """
        norm = self.student.model.norm
        states = _normed(self.state[rows], norm.eps) * norm.weight
        cross_entropy = dict.fromkeys(STRENGTHS, 0.0)
        for start in range(0, len(rows), ROWS_TOGETHER):  # a large vocabulary is a megabyte a row
            block = slice(start, start + ROWS_TOGETHER)
            ours = states[block] @ self.student.lm_head.weight.T
            theirs = expected[block].softmax(dim=-1)
            for strength in STRENGTHS:
                ours_log = (strength * ours).log_softmax(dim=-1)
                cross_entropy[strength] -= float((theirs * ours_log).sum(dim=-1).double().sum())
        norm.weight.mul_(min(STRENGTHS, key=cross_entropy.__getitem__))

    # -- one half of a layer -------------------------------------------------------------------

    def _attention(self, layer: DecoderLayer, pruned: PrunedLayer, target: Tensor) -> Tensor:
        """Set attention; returns the student's stream after it."""
        attention = layer.self_attn
        inputs = self._norm(layer.input_layernorm, pruned.before, pruned.input_norm)
        attention.k_proj.weight.zero_()  # rotary pairs that the teacher does not have are silent
        outputs = self._fit_inputs(
            inputs,
            [
                (attention.q_proj, pruned.query),
                (attention.k_proj, pruned.key),
                (attention.v_proj, pruned.value),
            ],
            pruned.input_norm,
            attention.head_dim if pruned.head_norms else None,
        )
        _even_out(
            layer.input_layernorm, inputs, [attention.q_proj, attention.k_proj, attention.v_proj]
        )
        mixed = self._mix(*outputs)
        weight = self._fit_output(mixed, self.projection.down.T @ pruned.output, target)
        # The gate keeps its random rotations: the weight undoes them.
        rotations = attention.gate().detach()
        inverse = (rotations[1].double() @ rotations[0].double()).mT
        attention.o_proj.weight.copy_(so8.rotate_columns(weight, inverse))
        return self.state + self._through(mixed, weight)

    def _feed_forward(self, layer: DecoderLayer, pruned: PrunedLayer, target: Tensor) -> Tensor:
        """Set the feed-forward part; returns the student's stream after the layer."""
        mlp, count = layer.mlp, len(pruned.gate.rows)
        inputs = self._norm(layer.post_attention_layernorm, pruned.middle, pruned.post_norm)
        gate, up = self._fit_inputs(
            inputs, [(mlp.gate_proj, pruned.gate), (mlp.up_proj, pruned.up)], pruned.post_norm
        )
        _even_out(layer.post_attention_layernorm, inputs, [mlp.gate_proj, mlp.up_proj])
        active = (F.silu(gate) * up)[:, :count]
        weight = self._fit_output(active, self.projection.down.T @ pruned.down, target)
        mlp.down_proj.weight.zero_()  # units beyond the teacher's are silent
        mlp.down_proj.weight[:, :count] = weight
        return self.state + self._through(active, weight)

    def _fit_inputs(
        self,
        inputs: Tensor,
        targets: Sequence[tuple[nn.Linear, TargetRows]],
        gain: Tensor,
        head_width: int | None = None,
    ) -> list[Tensor]:
        """Set matrices whose input is the normalized stream; returns their outputs.

        Rows without a counterpart in the teacher keep their random weights. ``head_width``: of
        heads that the teacher normalizes, which one factor a head replaces.
        """
        first, errors = [], []
        for matrix, rows in targets:
            # Weights of directions beyond the teacher's, which are silent, stay random: else these
            # directions could not learn.
            known = min(self.projection.down.shape)
            weight = matrix.weight[rows.rows]
            weight[:, :known] = self._folded(rows.weight, gain)[:, :known]
            output = self._through(inputs, weight)
            if head_width is not None:
                factors = _head_factors(output, rows, head_width)
                weight, output = weight * factors[:, None], output * factors
            first.append(weight)
            errors.append(rows.target - output)
        changes = corrections(inputs, errors, self.validation, strengths=self.strengths)
        for (matrix, rows), weight, change in zip(targets, first, changes, strict=True):
            matrix.weight[rows.rows] = weight + change
        return [self._through(inputs, matrix.weight) for matrix, _ in targets]

    def _fit_output(self, inputs: Tensor, first: Tensor, target: Tensor) -> Tensor:
        """Correct ``first [S, I]``, which adds ``inputs [N, I]`` to the stream, towards ``target``.

        The error of ``target [N, S]`` counts relative to the stream's RMS, as later layers see it
        normalized.
        """
        error = target - self.state - self._through(inputs, first)
        rms = root_mean_square(target)[:, 0].clamp_min(1e-30)
        found = corrections(inputs, [error], self.validation, 1.0 / rms, self.strengths)
        return first + found[0]

    def _through(self, inputs: Tensor, weight: Tensor) -> Tensor:
        return linear(inputs, weight, narrow=self.narrow)

    def _projected(self, states: Tensor) -> Tensor:
        """The teacher's stream ``[N, D]`` in the student's coordinates, ``[N, S]``."""
        down = self.projection.down
        if self.projection.narrows:
            return states @ down
        return F.pad(states, (0, down.shape[1] - len(down)))

    def _mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The student's attention within each sequence, before its output matrix, ``[N, H·W]``."""
        config = self.student.config
        cos, sin = rotary_tables(config, torch.arange(max(self.lengths)))
        grouped = config.num_attention_heads != config.num_key_value_heads
        mixed, start = torch.empty_like(query), 0
        for length in self.lengths:
            rows, start = slice(start, start + length), start + length
            heads = [
                part[rows].view(1, length, -1, config.head_dim).transpose(1, 2)
                for part in (query, key, value)
            ]
            turned = [apply_rotary(part, cos[:length], sin[:length]) for part in heads[:2]]
            output = attend(turned[0], turned[1], heads[2], None, length > 1, grouped)
            mixed[rows] = output[0].transpose(0, 1).flatten(1)
        return mixed

    # -- norms ---------------------------------------------------------------------------------

    def _norm(self, norm: RMSNorm, theirs: Tensor, gain: Tensor) -> Tensor:
        """Set a norm's gain from the teacher's stream and gain; returns the normalized state."""
        normed = _normed(self.state, norm.eps)
        norm.weight.copy_(self._gain(_normed(theirs, norm.eps), normed, gain))
        return normed * norm.weight

    def _gain(self, theirs: Tensor, normed: Tensor, gain: Tensor) -> Tensor:
        """A student norm's gain.

        The teacher's where the coordinates are the same; else one number for all, which restores
        the scale that the projection loses, and the next matrices absorb the teacher's gain.
        """
        if not self.projection.narrows:
            return self._widened(gain)
        target = theirs @ self.projection.down
        factor = (normed * target).sum() / normed.square().sum().clamp_min(1e-30)
        return torch.full((normed.shape[1],), float(factor))

    def _widened(self, gain: Tensor) -> Tensor:
        """The teacher's gain for a wider student, whose norm counts its silent coordinates."""
        width = self.projection.down.shape[1]
        return F.pad(gain, (0, width - len(gain)), value=1.0) * (len(gain) / width) ** 0.5

    def _folded(self, weight: Tensor, gain: Tensor) -> Tensor:
        """``weight [R, D]`` of the teacher's normalized stream for the student's, ``[R, S]``."""
        return (weight * gain if self.projection.narrows else weight) @ self.projection.up


def _normed(state: Tensor, eps: float) -> Tensor:
    return state / root_mean_square(state, eps)


def _even_out(norm: RMSNorm, inputs: Tensor, matrices: Sequence[nn.Linear]) -> None:
    """Give all coordinates that a norm puts out the same size, and the matrices behind it the rest:
    together they compute what they did.

    ``inputs [N, S]``: the norm's outputs. A few coordinates of a teacher's stream are twenty times
    as large as the others; a step as large as any other in the weights that read them changes the
    layer twenty times as much, and training loses its way (docs/benchmarks.md).
    """
    sizes = root_mean_square(inputs.T)[:, 0]
    heard = sizes[sizes > 0.0]
    if len(heard):
        sizes = sizes.clamp_min(LEAST_SIZE * float(heard.median()))
        norm.weight.div_(sizes)
        for matrix in matrices:
            matrix.weight.mul_(sizes)


def stream_scale(gain: Tensor, tied: bool) -> tuple[Tensor, Tensor]:
    """Factors ``[D]`` of the teacher's stream before a narrower student's directions are chosen,
    and signs ``[D]`` that the student's final gain has to restore.

    A tied matrix E is input and output at once, but between stream and output lies the final norm's
    gain g. A stream of x·√|g| starts at E·√|g| and ends before E·√|g|, so one matrix serves both.
    Some teachers have negative gains (two of SmolLM2-135M's 576, which carry half of the stream).
    """
    if not tied:
        return torch.ones_like(gain), torch.ones_like(gain)
    return gain.abs().clamp_min(1e-3).sqrt(), torch.where(gain < 0, -1.0, 1.0)


def _validation_tokens(lengths: Sequence[int]) -> Tensor:
    """Which tokens validate the regressions, ``[N]``."""
    share = VALIDATION_SHARE
    if len(lengths) >= share:
        chosen = torch.arange(len(lengths)) % share == share - 1
        return chosen.repeat_interleave(torch.tensor(lengths))
    return torch.cat([torch.arange(length) >= length - length // share for length in lengths])


def _head_factors(output: Tensor, rows: TargetRows, head_width: int) -> Tensor:
    """For each row the factor that brings its head's ``output [N, R]`` nearest to the target."""
    heads = rows.rows // head_width
    count = int(heads.max()) + 1
    products = torch.zeros(count).index_add(0, heads, (output * rows.target).sum(dim=0))
    squares = torch.zeros(count).index_add(0, heads, output.square().sum(dim=0))
    return (products / squares.clamp_min(1e-30))[heads]
