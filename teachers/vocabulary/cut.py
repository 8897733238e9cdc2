"""A teacher's vocabulary as it was cut down for a student, and what that costs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachers.vocabulary.reduced import ReducedVocabulary, VocabularyError

FACTS = "vocabulary_facts"


@dataclass(frozen=True)
class VocabularyCut:
    """``asked``: the size as the user wrote it. Of text that the choice did not see:
    ``dropped_mass``, the share of the teacher's probability that lies on dropped tokens;
    ``added_tokens``, how many more tokens it has, as a share; ``lost``, by script, the share of its
    letters that are written in bytes from now on, where these are many."""

    vocabulary: ReducedVocabulary
    asked: str
    dropped_mass: float
    added_tokens: float
    lost: dict[str, float]

    @property
    def key(self) -> str:
        """SHA-256 of the kept tokens, in hexadecimal: what tells one vocabulary from another."""
        kept = self.vocabulary.kept.astype("<i8").tobytes()
        return hashlib.sha256(f"{self.vocabulary.old_size} ".encode() + kept).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What a report says of it, as JSON."""
        known = {key: value for key, value in vars(self).items() if key != "vocabulary"}
        return {
            "kept": len(self.vocabulary),
            "of": self.vocabulary.old_size,
            **known,
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As named arrays, for a file."""
        text = json.dumps(self.facts()).encode("ascii")
        return self.vocabulary.arrays() | {FACTS: np.frombuffer(text, dtype=np.uint8)}

    @classmethod
    def in_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> VocabularyCut | None:
        """The inverse of ``arrays``, which are not trusted; ``None``: no vocabulary is there.

        Raises:
            VocabularyError: it is damaged.
        """
        vocabulary = ReducedVocabulary.in_arrays(arrays)
        if vocabulary is None:
            return None
        try:
            facts = json.loads(arrays[FACTS].tobytes())
            lost = {str(name): float(share) for name, share in facts["lost"].items()}
            dropped, added = float(facts["dropped_mass"]), float(facts["added_tokens"])
            if not np.isfinite([dropped, added, *lost.values()]).all():
                raise ValueError("its shares are no numbers")
            return cls(vocabulary, str(facts["asked"]), dropped, added, lost)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise VocabularyError(f"what is known of the vocabulary is damaged ({error})") from None
