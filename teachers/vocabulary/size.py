"""How large a reduced vocabulary is asked to be: ``16k``, ``12.5%``, ``auto``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from teachers.vocabulary.reduced import VocabularyError

KEPT_MASS = 0.999  # of ``auto``
MORE_TOKENS = 0.01  # that ``auto`` may add to a text, as a share


@dataclass(frozen=True)
class VocabularySize:
    """So many tokens, or such a share of them; without either ``auto``: the smallest vocabulary
    that keeps ``KEPT_MASS`` of the mass and adds at most ``MORE_TOKENS`` to held-out text."""

    count: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> VocabularySize:
        """From ``16384``, ``16k`` (k: 1,024), ``12.5%`` or ``auto``.

        Raises:
            VocabularyError: it is none of these.
        """
        plain = text.strip().lower()
        if plain == "auto":
            return cls()
        number = re.fullmatch(r"(\d{1,9})(k?)", plain, re.ASCII)
        if number and (count := int(number[1]) << (10 if number[2] else 0)):
            return cls(count=count)
        share = re.fullmatch(r"(\d{1,3}(?:\.\d{1,9})?)\s*%", plain, re.ASCII)
        if share and 0 < (percent := float(share[1])) <= 100:
            return cls(share=percent / 100)
        raise VocabularyError(
            f"--vocab {text!r} is no size of a vocabulary; write a number of tokens such as 16k "
            "(k is 1,024), a share such as 25%, or auto"
        )

    def of(self, old_size: int) -> int | None:
        """The number of tokens to keep of ``old_size``; ``None``: ``auto``.

        Raises:
            VocabularyError: there are not so many.
        """
        if self.share is not None:
            return math.ceil(self.share * old_size)
        if self.count is not None and self.count > old_size:
            raise VocabularyError(
                f"--vocab {self.count}: the teacher's vocabulary has {old_size} tokens; ask for "
                "fewer"
            )
        return self.count
