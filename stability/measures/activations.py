"""Measures of outputs, hidden states and attention on a text."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from numerics.precision import float64
from stability.measures.spectrum import effective_rank, fast_singular_values


def output_stats(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Information and entropy of the output, in nats, from ``logits [n, V]``.

    Entropy: mean over the n distributions, from 0 (certain) to log V. Information: entropy of the
    mean distribution minus the mean entropy, i.e. the Jensen–Shannon divergence of the n
    distributions (Lin 1991). It is 0 for a model that predicts the same everywhere, at most log n.
    """
    logs = torch.log_softmax(float64(logits), dim=-1)
    shares = logs.exp()
    entropy = -(shares * logs).sum(dim=-1).mean()
    mean = shares.mean(dim=0)
    return -torch.special.xlogy(mean, mean).sum() - entropy, entropy


def hidden_rank(states: Tensor) -> float:
    """Effective rank of centred states ``[n, D]``: near 0 where all positions look alike."""
    centred = states.float() - states.float().mean(dim=0)
    return float(effective_rank(fast_singular_values(centred)))


def attention_entropy(parts: Iterable[Tensor]) -> Tensor:
    """Mean entropy of attention rows, each divided by its maximum; ``[..., S]`` in each of the
    parts, one of which is looked at at a time.

    0: every query attends to one key; 1: to all visible keys alike. Rows with one key do not count.
    """
    shares, counts = [], []
    for part in parts:
        wide = float64(part)
        entropies = -torch.special.xlogy(wide, wide).sum(dim=-1)
        visible = (wide > 0).sum(dim=-1)
        shares.append((entropies / float64(visible.clamp(min=2)).log()).flatten())
        counts.append((visible > 1).flatten())
    counted = torch.cat(counts)
    return (torch.cat(shares) * counted).sum() / counted.sum().clamp(min=1)


def dead_units(activations: Tensor, threshold: float = 1e-6) -> Tensor:
    """Share of units in ``activations [n, U]`` that stay below ``threshold`` × the largest one."""
    magnitude = activations.abs().amax(dim=0)
    return float64(magnitude <= threshold * magnitude.max()).mean()
