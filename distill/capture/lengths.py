"""How long sequences may become where the settings leave that to the data, and what is cut off."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import psutil

from distill.config.schema import USUAL_LENGTH
from distill.config.sources import DataConfig
from teachers.base import TeacherInfo

WHOLE = 0.995  # of the conversations stay whole
ANSWER_ROOM = 128  # tokens that an answer of the teacher may take at least
MUCH = 0.05  # of the tokens cut off is worth a warning
# A batch of so many sequences fits into this share of the memory. A token of a student with half
# the teacher's width and depth takes about 100 bytes for each of both.
TOGETHER, MEMORY_SHARE, TOKEN_BYTES = 16, 0.25, 25


def cap(config: DataConfig, info: TeacherInfo) -> int:
    """Tokens of a sequence at most, whatever the data: as configured, or as far as the memory for
    training allows (but 256 always); within the teacher's context."""
    chosen = config.max_length
    if chosen is None:
        free = MEMORY_SHARE * psutil.virtual_memory().total
        fitting = free / (TOGETHER * TOKEN_BYTES * max(1, info.width * info.layers))
        # A power of two, so that machines of about the same memory agree.
        chosen = max(USUAL_LENGTH, 1 << max(0, int(fitting).bit_length() - 1))
    return min(chosen, info.context_length)


def most_tokens(config: DataConfig, info: TeacherInfo, wanted: Sequence[int]) -> int:
    """Tokens of a sequence at most: as configured, or so many that 99.5 % of what is ``wanted``
    stay whole (but 256 always); within the ``cap``. ``wanted``: tokens of each conversation, with
    room for an answer.
    """
    most = cap(config, info)
    if config.max_length is not None:
        return most
    whole = int(np.quantile(wanted, WHOLE, method="higher")) if len(wanted) else 0
    return min(most, max(USUAL_LENGTH, whole))


def describe_cut(lengths: Sequence[int], most: int, context: int) -> tuple[str, bool]:
    """What conversations of some lengths lose at ``most`` tokens, in words (none: nothing), and
    whether that is much."""
    cut = [length for length in lengths if length > most]
    if not cut:
        return "", False
    share = sum(length - most for length in cut) / sum(lengths)
    more = "raise data.max_length" if most < context else "the teacher's context is no longer"
    return (
        f"{len(cut):,} of {len(lengths):,} sequences are cut at {most:,} tokens, which leaves out "
        f"{share:.1%} of all tokens; {more}"
    ), share > MUCH
