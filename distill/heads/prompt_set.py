"""Prompts of the safety head in training, augmented: it never sees one twice alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from distill.heads.prompts import SafetyPrompt
from distill.losses.batch import Prompts, padded
from students.model.head_decisions import DECISIONS
from teachers.base import Tokens

CHANGED_SHARE = 0.2  # of a prompt's tokens, in training
JOINED_SHARE = 0.5  # of the prompts
JOINED_TOKENS = 128  # two prompts are joined up to this length, or that of the longest there is
GRAVITY = np.arange(len(DECISIONS), dtype=np.float32)  # ALLOW 0, ESCALATE 1, REFUSE 2
ORDER, VARIATION = 6, 7  # streams of random numbers


class PromptSet:
    """Tokenized prompts of one part of the split, and their augmentation for training.

    Some tokens are replaced by other prompts' tokens, and some prompts are joined with another one,
    under the graver of both labels. So the head learns what prompts of a label have in common, not
    which prompt it is. The template around the words stays as it is.
    """

    def __init__(
        self, prompts: Sequence[SafetyPrompt], tokens: Sequence[Tokens], seed: int
    ) -> None:
        self.prompts = list(prompts)
        self.tokens = list(tokens)
        self.labels: NDArray[np.float32] = np.array([one.label for one in prompts], np.float32)
        self.seed = seed
        self.room = max(JOINED_TOKENS, *map(len, tokens))
        before, behind = shared_ends(tokens)
        self.before, self.behind = tokens[0][:before], tokens[0][len(tokens[0]) - behind :]
        self.words = [row[before : len(row) - behind] for row in tokens]
        self.all_words = np.concatenate(self.words)

    def __len__(self) -> int:
        return len(self.prompts)

    def some(self, chosen: Sequence[int]) -> PromptSet:
        """The prompts of these numbers."""
        return PromptSet(
            [self.prompts[one] for one in chosen], [self.tokens[one] for one in chosen], self.seed
        )

    def batch(self, turn: int, count: int, part: int, parts: int) -> Prompts:
        """What micro-batch ``part`` of ``parts`` gets of the ``count`` prompts of turn ``turn``.

        Over the parts every prompt of the turn occurs once. A part without one gets a stand-in of
        weight 0, so that every process takes part in the same computation.
        """
        numbers = range(turn * count, (turn + 1) * count)
        mine = numbers[part::parts]
        weight = 1.0 / count if mine else 0.0
        varied = [self.varied(number) for number in mine or numbers[:1]]
        tokens, lengths = padded([row for row, _ in varied])
        labels = torch.from_numpy(np.stack([label for _, label in varied]))
        return Prompts(tokens, lengths, labels, torch.full((len(varied),), weight))

    def varied(self, number: int) -> tuple[Tokens, NDArray[np.float32]]:
        """Tokens and label ``[3]`` of number ``number`` in training, augmented; each prompt passes
        once before any comes again."""
        turn, position = divmod(number, len(self))
        index = int(self._order(turn)[position])
        random = np.random.default_rng([self.seed, VARIATION, number])
        words, label = self.words[index], self.labels[index]
        if random.random() < JOINED_SHARE:
            other = int(random.integers(len(self)))
            both = [words, self.words[other]]
            joined = np.concatenate(both if random.random() < 0.5 else both[::-1])
            if len(joined) + len(self.before) + len(self.behind) <= self.room:
                words = joined
                label = max(label, self.labels[other], key=lambda chances: float(chances @ GRAVITY))
        words = words.copy()
        changed = random.random(len(words)) < CHANGED_SHARE
        words[changed] = random.choice(self.all_words, int(changed.sum()))
        return np.concatenate((self.before, words, self.behind)).astype(np.int32), label

    def _order(self, turn: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, ORDER, turn]).permutation(len(self))


def shared_ends(rows: Sequence[Tokens]) -> tuple[int, int]:
    """Lengths of the rows' common prefix and suffix; at least one token of each row is left."""
    room = min(map(len, rows)) - 1
    starts = np.stack([row[:room] for row in rows])
    before = int((starts == starts[0]).all(axis=0).cumprod().sum())
    room -= before
    ends = np.stack([row[len(row) - room :][::-1] for row in rows])
    return before, int((ends == ends[0]).all(axis=0).cumprod().sum())
