"""A step's loss over a part of the vocabulary: the tokens that matter in it, and a sample of all
others.

The output layer takes half of a small student's step, and at each of its positions nearly all of
the vocabulary is improbable. So a step looks at the tokens that follow in its text or are among the
stored top ones of any of its positions, and at as many of the others as make up its size, drawn
alike: each of these stands for w = others / drawn of them. Σ exp z over the vocabulary is then
estimated by Σ w exp z over the sample, without bias (Bengio and Senécal 2008; Jean et al. 2015,
arXiv:1412.2007): the student's, and of the teacher, whose top tokens and whose mass of all others
are stored, how this mass is spread.

Letters: V vocabulary, S tokens of the sample, N positions, K stored top tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from distill.losses.batch import Batch
from teachers.targets.distributions import CompactTargets, each_tensor

SIZE = 12_288  # tokens, if the settings do not say (docs/benchmarks.md) ...
MOST = 0.5  # ... where that is at most this share of the vocabulary: else it saves too little
LEAST_DRAWN = 1 / 3  # of the sample; where more is needed for certain the sample is larger
DRAWN = 14  # stream of random numbers
SIZES = 32  # of samples that had to be larger: each has its own kernels and buffers


@dataclass(frozen=True)
class VocabularySample:
    """Tokens that stand for the vocabulary.

    ``ids [S]``, ascending; ``log_weights [S]``, float32: log w of the drawn ones, 0 of those that
    were certain; ``places [V]``: where each token is among ``ids``, −1 for those left out.
    """

    ids: Tensor
    log_weights: Tensor
    places: Tensor

    @classmethod
    def draw(cls, certain: Tensor, size: int, seed: int, step: int) -> VocabularySample | None:
        """At least ``size`` tokens: all that are set in ``certain [V]``, and some of the others.
        Nothing where that would be most of the vocabulary."""
        known, unit = int(certain.sum()), -(-len(certain) // SIZES)
        size = max(size, math.ceil(known / (1.0 - LEAST_DRAWN) / unit) * unit)
        if size > MOST * len(certain):
            return None
        others = (~certain).nonzero().squeeze(-1)
        order = np.random.default_rng([seed, DRAWN, step]).permutation(len(others))[: size - known]
        drawn = others[torch.from_numpy(order)]
        log_weights = torch.full((len(certain),), math.log(len(others) / len(drawn)))
        log_weights[certain] = 0.0
        ids = torch.cat((certain.nonzero().squeeze(-1), drawn)).sort().values
        places = torch.full((len(certain),), -1, dtype=torch.int64)
        places[ids] = torch.arange(size)
        return cls(ids, log_weights[ids], places)

    @classmethod
    def of_step(
        cls,
        batches: Iterable[Batch],
        size: int | None,
        device: torch.device,
        seed: int = 0,
        step: int = 0,
        all_together: Callable[[Tensor], Tensor] = lambda counts: counts,
    ) -> VocabularySample | None:
        """The sample of an optimizer step, from the micro-batches of this process, in main memory.

        Args:
            batches: the micro-batches.
            size: tokens to take; ``None``: ``SIZE`` on a CPU, where it was measured; 0: the whole
                vocabulary.
            device: where the loss is computed.
            seed: of the training.
            step: the number of the step; each draws others.
            all_together: sums counts ``[V]`` over all processes, which then draw alike.

        Returns:
            Nothing where the loss is to be taken over the whole vocabulary.
        """
        wanted = (SIZE if device.type == "cpu" else 0) if size is None else size
        counts: Tensor | None = None
        for batch in batches:
            targets = batch.targets
            if not wanted or not isinstance(targets, CompactTargets):
                return None
            if counts is None:
                counts = torch.zeros(targets.vocab_size, dtype=torch.int32)
            for tokens in (targets.topk_ids, batch.labels.clamp(min=0)):
                counts[tokens.flatten().cpu()] = 1  # what a student wrote lies on its device
        if counts is None or len(counts) * MOST < wanted:
            return None
        sample = cls.draw(all_together(counts) > 0, wanted, seed, step)
        return sample and each_tensor(sample, lambda part: part.to(device))

    def of_targets(self, targets: CompactTargets) -> CompactTargets:
        """Targets whose tokens are places in the sample. Masses are still the vocabulary's."""
        head = targets.head
        return replace(
            targets,
            topk_ids=self.places[targets.topk_ids],
            head=None if head is None else head.of_tokens(self.ids),
        )

    def of_labels(self, labels: Tensor) -> Tensor:
        """``labels [N]`` as places in the sample; those that are no token stay as they are."""
        return torch.where(labels < 0, labels, self.places[labels.clamp(min=0)])
