"""Readings of the student on a few validation sequences while it trains (see
``stability.measures.probe``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from distill.losses import divergences
from distill.losses.batch import Batch
from distill.losses.chunked_lm_head import head_logits
from stability.measures.activations import attention_entropy, dead_units, hidden_rank, output_stats
from stability.measures.probe import ProbeReading, evaluating
from stability.precision import float64
from students.model.decoder import DecoderLayer, SO8TForCausalLM, apply_rotary, rotary_tables
from students.model.interface import Student

SEQUENCES = 4  # validation sequences that are read ...
ATTENDED = 2  # ... of these, those whose attention is ...
POSITIONS = 128  # ... and positions whose whole output distribution is
ATTENTION_CELLS = 1 << 22  # queries x keys looked at together: 32 MiB in float64


class StudentProbe:
    """Readings of a training module on one batch, on its device; the loss is the KL to the teacher
    in nats per token.

    ``inside``: also look into the layers, at attention and feed-forward units (not where they are
    compiled).
    """

    def __init__(self, model: nn.Module, batch: Batch, *, inside: bool = True) -> None:
        self.model, self.batch, self.inside = model, batch, inside

    @torch.no_grad()
    def __call__(self) -> ProbeReading:
        """Read the student in evaluation mode, in float32."""
        with evaluating(self.model), torch.autocast(self.batch.tokens.device.type, enabled=False):
            reading: ProbeReading = self.model(lambda student, _: self._read(student))
        return reading

    def _read(self, student: Student) -> ProbeReading:
        batch, valid = self.batch, self.batch.valid
        hooks = _Hooks(student, valid) if self.inside else None
        with torch.autocast(batch.tokens.device.type, enabled=False), hooks or ExitStack():
            numbers = range(student.config.num_hidden_layers)
            output = student(batch.tokens, with_logits=False, layers_to_keep=numbers)
        states = output.last_hidden_state[valid]
        count = min(len(states), POSITIONS)
        some = torch.linspace(0, len(states) - 1, count, device=states.device).long()
        logits = head_logits(states[some], student.output_matrix()).float()
        kl = float64(divergences.known_kl(logits, batch.targets.select(some), 1.0)).mean()
        layers = output.layer_states.items()
        ranks = {f"model.layers.{number}": hidden_rank(layer[valid]) for number, layer in layers}
        inside: dict[str, dict[str, float]] = {"hidden_rank": ranks}
        if hooks is not None:
            inside["attention_entropy"] = hooks.attention()
            inside["dead_units"] = {name: float(one) for name, one in hooks.dead_units.items()}
        information, entropy = output_stats(logits)
        return ProbeReading(float(information), float(entropy), float(kl), **inside)


class _Hooks(ExitStack):
    """Hooks that look at the feed-forward units of one forward pass at its ``valid [B, T]``
    positions and, of layers whose attention is known, keep its queries and keys."""

    def __init__(self, student: Student, valid: Tensor) -> None:
        super().__init__()
        self.student = student
        self.valid = valid
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.dead_units: dict[str, Tensor] = {}
        for number, layer in enumerate(student.layers()):
            name = f"model.layers.{number}.mlp.down_proj"
            if isinstance(layer, DecoderLayer):
                self._hook(layer.self_attn.q_proj, lambda _, __, out: self.queries.append(out))
                self._hook(layer.self_attn.k_proj, lambda _, __, out: self.keys.append(out))
            last = layer.get_submodule("mlp.down_proj")
            self._hook(last, lambda _, inputs, __, name=name: self._look_at(name, inputs))

    def _hook(self, module: nn.Module, hook: Any) -> None:
        self.callback(module.register_forward_hook(hook).remove)

    def _look_at(self, name: str, inputs: tuple[Tensor, ...]) -> None:
        self.dead_units[name] = dead_units(inputs[0][self.valid])

    def attention(self) -> dict[str, float]:
        """Entropy of each layer's attention at the valid positions of the first sequences, where
        it is known."""
        if not isinstance(self.student, SO8TForCausalLM):
            return {}
        config, valid = self.student.config, self.valid[:ATTENDED]
        tokens = valid.shape[1]
        rotary = rotary_tables(config, torch.arange(tokens, device=valid.device)[None])
        rotary = (rotary[0][:, None], rotary[1][:, None])
        result = {}
        for number, (query, key) in enumerate(zip(self.queries, self.keys, strict=True)):
            split = (len(valid), tokens, -1, config.head_dim)
            q, k = (
                apply_rotary(part[: len(valid)].view(split).transpose(1, 2), *rotary)
                for part in (query, key)
            )
            entropy = attention_entropy(_attention_rows(q, k, valid))
            result[f"model.layers.{number}.self_attn"] = float(entropy)
        return result


def _attention_rows(queries: Tensor, keys: Tensor, valid: Tensor) -> Iterator[Tensor]:
    """Attention ``[n, H, T]`` of ``queries [B, H, T, W]`` over ``keys [B, K, T, W]`` at the
    ``valid [B, T]`` positions, some at a time: all of it grows with the square of T."""
    tokens, heads = queries.shape[2], queries.shape[1]
    together = max(1, ATTENTION_CELLS // (heads * tokens))
    for query, key, wanted in zip(queries, keys, valid, strict=True):
        key = key.repeat_interleave(heads // len(key), dim=0)
        for start in range(0, tokens, together):
            some = query[:, start : start + together]
            scores = (some @ key.mT) / queries.shape[-1] ** 0.5
            later = torch.ones(scores.shape[1:], dtype=torch.bool, device=key.device)
            scores = scores.masked_fill_(later.triu_(start + 1), -torch.inf)
            yield scores.softmax(dim=-1).transpose(0, 1)[wanted[start : start + together]]
