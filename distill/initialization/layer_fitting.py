"""Weights that let a student begin near its teacher: layer by layer, from what the teacher
computes.

A student layer starts from the weights of one teacher layer, cut down
(``distill.initialization.structured_pruning``). Then each of its matrices is corrected by ridge
regression, in the order in which they act, on what the student itself computes up to there:
queries, keys, values, gates and ups towards the teacher's own, the output matrices towards the
teacher's residual stream. The last of them aims at the stream after the whole span of teacher
layers that the student layer stands for, so that it takes over what it can of those that are left
out, and repairs what went wrong before.

Letters: N tokens, D the teacher's width, S the student's, R rows of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.initialization.ridge import corrections
from distill.initialization.structured_pruning import Part, Parts, Projection, root_mean_square
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
LEFT_OUT = (
    8  # every so many'th sequence judges the regressions; where there are fewer, the end of each
)


class HeadStart:
    """Fills ``student`` from the bottom to the top; ``tokens [N]`` are those of all sequences of
    these ``lengths``."""

    def __init__(
        self,
        student: SO8TForCausalLM,
        projection: Projection,
        tokens: Tensor,
        lengths: Sequence[int],
    ) -> None:
        self.student = student
        self.projection = projection
        self.lengths = list(lengths)
        self.checked = _left_out(self.lengths)
        self.state = student.model.embed_tokens.weight.detach()[tokens]

    @torch.no_grad()
    def layer(self, number: int, parts: Parts, after: Tensor) -> None:
        """Set all weights of layer ``number``; ``after [N, D]`` is the teacher's stream where
        its span ends."""
        layer, read = self._layer(number), self.projection.read
        middle = self._attention(layer, parts, parts.middle @ read)
        self.state = self._feed_forward(layer, parts, middle, after @ read)

    @torch.no_grad()
    def skip(self, number: int) -> None:
        """Let layer ``number``, which no teacher layer stands behind, add nothing as training
        begins."""
        layer = self._layer(number)
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()

    @torch.no_grad()
    def finish(self, last: Tensor, gain: Tensor, eps: float) -> Tensor | None:
        """Set the final norm; for an untied student return ``[D, S]``, what the teacher's output
        matrix is to be multiplied by.

        ``last [N, D]``: the teacher's stream after its last layer, ``gain [D]`` and ``eps`` of its
        final norm.
        """
        norm = self.student.model.norm
        normed, known = self._normed(self.state, norm.eps), last / root_mean_square(last, eps)
        if self.student.config.tie_word_embeddings:
            if self.projection.narrows:
                # The matrix reads coordinates in which the gain is already shared out
                # (``stream_scale``).
                wanted = known @ self.projection.read
                fitted = (normed * wanted).sum(dim=0) / normed.square().sum(dim=0).clamp_min(1e-30)
                norm.weight.copy_(fitted)
            else:
                norm.weight.copy_(self._widened(gain))
            return None
        norm.weight.copy_(self._gain(known, norm.eps, gain))
        inputs = normed * norm.weight
        first = self._folded(torch.eye(len(gain)), gain)
        return first + corrections(inputs, [known * gain - inputs @ first.T], self.checked)[0]

    def _layer(self, number: int) -> DecoderLayer:
        layer = self.student.model.layers[number]
        assert isinstance(layer, DecoderLayer)
        return layer

    @torch.no_grad()
    def soften(self, rows: Tensor, expected: Tensor) -> None:
        """Make the student as sure as it should be: scale its final norm to the least KL from the
        teacher.

        ``rows [n]``: tokens that are looked at; ``expected [n, V]``: the teacher's logits there. A
        student that is sure and wrong is worse than one that knows nothing.
        """
        norm = self.student.model.norm
        states = self._normed(self.state[rows], norm.eps) * norm.weight
        ours, theirs = states @ self.student.lm_head.weight.T, expected.softmax(dim=-1)

        def cross_entropy(strength: float) -> float:
            return float(
                -(theirs * (strength * ours).log_softmax(dim=-1)).sum(dim=-1).double().mean()
            )

        norm.weight.mul_(min(STRENGTHS, key=cross_entropy))

    # -- one half of a layer ---------------------------------------------------------------------------------------

    def _attention(self, layer: DecoderLayer, parts: Parts, target: Tensor) -> Tensor:
        """Set attention; returns the student's stream after it."""
        attention = layer.self_attn
        inputs = self._norm(layer.input_layernorm, self.state, parts.before, parts.input_norm)
        attention.k_proj.weight.zero_()  # rotary pairs that the teacher has not begin silent
        answers = self._read_in(
            inputs,
            [
                (attention.q_proj, parts.query),
                (attention.k_proj, parts.key),
                (attention.v_proj, parts.value),
            ],
            parts.input_norm,
            attention.head_dim if parts.head_norms else None,
        )
        mixed = self._mix(*answers)
        first = self.projection.read.T @ parts.output
        weight = self._write_out(mixed, first, target)
        # The gate's rotations stay as they were drawn: what they will do is taken back in the
        # weight.
        rotations = attention.gate().detach()
        undone = (rotations[1].double() @ rotations[0].double()).mT
        attention.o_proj.weight.copy_(so8.rotate_columns(weight, undone))
        return self.state + mixed @ weight.T

    def _feed_forward(
        self, layer: DecoderLayer, parts: Parts, middle: Tensor, target: Tensor
    ) -> Tensor:
        """Set the feed-forward part; returns the student's stream after the layer."""
        mlp, count = layer.mlp, len(parts.gate.rows)
        inputs = self._norm(layer.post_attention_layernorm, middle, parts.middle, parts.post_norm)
        gate, up = self._read_in(
            inputs, [(mlp.gate_proj, parts.gate), (mlp.up_proj, parts.up)], parts.post_norm
        )
        active = (F.silu(gate) * up)[:, :count]
        self.state = middle
        weight = self._write_out(active, self.projection.read.T @ parts.down, target)
        mlp.down_proj.weight.zero_()  # units beyond the teacher's begin silent
        mlp.down_proj.weight[:, :count] = weight
        return middle + active @ weight.T

    def _read_in(
        self,
        inputs: Tensor,
        wanted: Sequence[tuple[nn.Linear, Part]],
        gain: Tensor,
        head_width: int | None = None,
    ) -> list[Tensor]:
        """Set the rows of matrices that read the normalised stream; returns what the matrices
        answer.

        Rows that stand for nothing of the teacher's keep their random weights. ``head_width``: of
        heads that the teacher normalises, for which one factor a head stands.
        """
        first, errors = [], []
        for linear, part in wanted:
            # What reads directions beyond the teacher's, which are silent, stays random: else they
            # would stay silent.
            known = min(self.projection.read.shape)
            weight = linear.weight[part.rows]
            weight[:, :known] = self._folded(part.weight, gain)[:, :known]
            answer = inputs @ weight.T
            if head_width is not None:
                weight = weight * _head_factors(answer, part, head_width)[:, None]
                answer = inputs @ weight.T
            first.append(weight)
            errors.append(part.target - answer)
        for (linear, part), weight, change in zip(
            wanted, first, corrections(inputs, errors, self.checked), strict=True
        ):
            linear.weight[part.rows] = weight + change
        return [inputs @ linear.weight.T for linear, _ in wanted]

    def _write_out(self, inputs: Tensor, first: Tensor, target: Tensor) -> Tensor:
        """A matrix from ``inputs [N, I]`` into the stream that brings it near ``target [N, S]``,
        from ``first [S, I]``.

        What is missing counts relative to the stream's size, for all that follows sees it
        normalised.
        """
        missing = target - self.state - inputs @ first.T
        loudness = root_mean_square(target)[:, 0].clamp_min(1e-30)
        return first + corrections(inputs, [missing], self.checked, 1.0 / loudness)[0]

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
            answer = attend(turned[0], turned[1], heads[2], None, length > 1, grouped)
            mixed[rows] = answer[0].transpose(0, 1).flatten(1)
        return mixed

    # -- norms -----------------------------------------------------------------------------------------------------

    def _norm(self, norm: RMSNorm, state: Tensor, theirs: Tensor, gain: Tensor) -> Tensor:
        """Set a norm's gain; returns what it makes of the student's ``state``."""
        norm.weight.copy_(
            self._gain(theirs / root_mean_square(theirs, norm.eps), norm.eps, gain, state)
        )
        return self._normed(state, norm.eps) * norm.weight

    def _gain(
        self, theirs: Tensor, eps: float, gain: Tensor, state: Tensor | None = None
    ) -> Tensor:
        """A student norm's gain: the teacher's where the coordinates are the same, else one number
        for all, which makes up for what the projection has lost of the stream; the teacher's gain
        is then part of what reads it.
        """
        if not self.projection.narrows:
            return self._widened(gain)
        normed = self._normed(self.state if state is None else state, eps)
        wanted = theirs @ self.projection.read
        factor = (normed * wanted).sum() / normed.square().sum().clamp_min(1e-30)
        return torch.full((normed.shape[1],), float(factor))

    def _widened(self, gain: Tensor) -> Tensor:
        """The teacher's gain for a student at least as wide; its new coordinates are silent but
        counted in the norm."""
        width = self.projection.read.shape[1]
        return F.pad(gain, (0, width - len(gain)), value=1.0) * (len(gain) / width) ** 0.5

    def _folded(self, weight: Tensor, gain: Tensor) -> Tensor:
        """``weight [R, D]`` on the teacher's normalised stream as one on the student's, ``[R,
        S]``."""
        return (weight * gain if self.projection.narrows else weight) @ self.projection.lift

    def _normed(self, state: Tensor, eps: float) -> Tensor:
        return state / root_mean_square(state, eps)


def stream_scale(gain: Tensor, tied: bool) -> Tensor:
    """What the teacher's stream is multiplied by, by coordinate, before a narrower student's are
    chosen, ``[D]``.

    A tied matrix E is input and output at once, but between stream and output lies the final norm's
    gain g. A stream of x·√g begins at E·√g and ends before E·√g too, so one matrix does for both.
    """
    return gain.abs().clamp_min(1e-3).sqrt() if tied else torch.ones_like(gain)


def _left_out(lengths: Sequence[int]) -> Tensor:
    """Which tokens judge regressions that are made without them, ``[N]``."""
    if len(lengths) >= LEFT_OUT:
        parts = [
            torch.full((length,), place % LEFT_OUT == LEFT_OUT - 1)
            for place, length in enumerate(lengths)
        ]
    else:
        parts = [torch.arange(length) >= length - length // LEFT_OUT for length in lengths]
    return torch.cat(parts)


def _head_factors(answer: Tensor, part: Part, head_width: int) -> Tensor:
    """For each row of ``part`` the number that brings its head's ``answer [N, R]`` nearest to
    the target, ``[R]``."""
    heads = part.rows // head_width
    count = int(heads.max()) + 1
    products = torch.zeros(count).index_add(0, heads, (answer * part.target).sum(dim=0))
    squares = torch.zeros(count).index_add(0, heads, answer.square().sum(dim=0))
    return (products / squares.clamp_min(1e-30))[heads]
