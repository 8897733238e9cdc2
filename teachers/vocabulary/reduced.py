"""A part of a vocabulary, and where the probability of the tokens left out goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class VocabularyError(ValueError):
    """A vocabulary that cannot be cut as asked: what was wrong, its value, what to do."""


@dataclass(frozen=True, eq=False)
class ReducedVocabulary:
    """M of V tokens: ``kept``, their old ids ``[M]`` in rising order. The new id of a token is its
    place in ``kept``.

    ``first_piece``: ``[V]``, for every old token the new id at which its text now begins: a kept
    token's own, and of a dropped one that of the first piece its text falls into. So it is also
    where a dropped token's probability goes.
    """

    kept: Ids
    first_piece: Ids

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def old_size(self) -> int:
        """V."""
        return len(self.first_piece)

    @cached_property
    def new_ids(self) -> Ids:
        """The new id of each old one, −1 for a dropped one, ``[V]``."""
        numbers = np.full(self.old_size, -1, dtype=np.int64)
        numbers[self.kept] = np.arange(len(self.kept))
        return numbers

    @cached_property
    def _runs(self) -> tuple[Ids, Ids]:
        """Old ids ordered by first piece, and where in that order each new token's begin. None is
        without: a kept token is its own first piece."""
        order = np.argsort(self.first_piece, kind="stable")
        return order, np.searchsorted(self.first_piece[order], np.arange(len(self.kept)))

    def fold(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Probabilities (or other amounts) of the old tokens, ``[…, V]``, as those of the new
        ones, ``[…, M]``: a dropped token's is added to its first piece's, so the sum stays."""
        order, starts = self._runs
        summed: NDArray[np.float64] = np.add.reduceat(
            np.asarray(values, dtype=np.float64)[..., order], starts, axis=-1
        )
        return summed

    def fold_logs(self, values: NDArray[Any]) -> NDArray[Any]:
        """``fold`` of log-probabilities or logits, of the same kind of numbers: log-sum-exp over
        each new token's old ones, summed in float64. A token without dropped ones keeps its own."""
        rows = values.reshape(-1, self.old_size)
        result: NDArray[Any] = rows[:, self.kept]
        for row, kept in zip(rows, result, strict=True):
            most = row.max()
            shares = np.exp(row - most)
            shares[self.kept] = 0.0
            more = np.bincount(self.first_piece, weights=shares, minlength=len(self))
            with np.errstate(divide="ignore"):  # a probability of 0
                both = np.log(np.exp(kept.astype(np.float64) - most) + more) + most
            np.copyto(kept, both, where=more > 0, casting="same_kind")
        return result.reshape(*values.shape[:-1], len(self))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As named arrays, for a store or the worker."""
        return {"kept": self.kept, "first_piece": self.first_piece}

    @classmethod
    def in_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> ReducedVocabulary | None:
        """The vocabulary among named arrays, which are not trusted, if there is one.

        Raises:
            VocabularyError: it is damaged.
        """
        if "kept" not in arrays:
            return None
        return check_reduced(arrays["kept"], arrays.get("first_piece", arrays["kept"]))


def check_reduced(kept: NDArray[Any], first_piece: NDArray[Any]) -> ReducedVocabulary:
    """A reduced vocabulary from arrays that are not trusted.

    Raises:
        VocabularyError: ``kept`` does not rise within the vocabulary, or ``first_piece`` is not a
            new id each, a kept token's its own.
    """
    whole = all(part.ndim == 1 and part.dtype.kind in "iu" for part in (kept, first_piece))
    if whole and len(kept):
        rising = bool((np.diff(kept) > 0).all())
        inside = kept[0] >= 0 and kept[-1] < len(first_piece)
        known = bool(((first_piece >= 0) & (first_piece < len(kept))).all())
        if rising and inside and known:
            own = first_piece[kept] == np.arange(len(kept))
            if bool(own.all()):
                return ReducedVocabulary(kept.astype(np.int64), first_piece.astype(np.int64))
    raise VocabularyError("the list of kept tokens is damaged; make it again from the teacher")
