"""What a shard says of its own tokens, so that a training can start without reading all of them.

A hash of every sequence tells copies of it, wherever they are in the store; which tokens occur
tells what rows of an embedding are looked up.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from teachers.base import Tokens

if TYPE_CHECKING:  # with PyTorch, which is not needed to see how far a capture is
    from teachers.targets.distributions import Arrays

HASHES, OCCURRING = CONTENTS = ("hashes", "occurring")
HASH_BYTES = 8


def foreign_token(tokens: Tokens, vocab_size: int) -> int | None:
    """The first of some tokens that is not of the vocabulary, if any."""
    if not len(tokens) or (int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size):
        return None
    return int(tokens[(tokens < 0) | (tokens >= vocab_size)][0])


def contents_of(tokens: Tokens, lengths: NDArray[np.int64], vocab_size: int) -> Arrays:
    """From the ``tokens`` of all sequences one after another, all of the vocabulary: the start of
    the BLAKE2b of each sequence's ids (int32) ``[n]``, and a bit for each token that occurs
    ``[V / 8]``."""
    edges = np.concatenate(([0], np.cumsum(lengths))).tolist()
    whole = np.ascontiguousarray(tokens, np.int32).data
    digests = [
        hashlib.blake2b(whole[begin:end], digest_size=HASH_BYTES).digest()
        for begin, end in itertools.pairwise(edges)
    ]
    occurs = np.bincount(tokens, minlength=vocab_size) > 0  # twice as fast as by index
    return {HASHES: np.frombuffer(b"".join(digests), np.int64), OCCURRING: np.packbits(occurs)}


def says_what_it_holds(arrays: Arrays, vocab_size: int) -> bool:
    """Whether a shard's arrays have tokens of the vocabulary alone, and what is said of these, if
    anything is, is true."""
    tokens: NDArray[Any] = arrays["tokens"]
    if foreign_token(tokens, vocab_size) is not None:
        return False
    lengths: NDArray[Any] = arrays["lengths"]
    said = {name: arrays[name] for name in CONTENTS if name in arrays}
    found = contents_of(tokens, lengths, vocab_size) if said else {}
    return all(np.array_equal(array, found[name]) for name, array in said.items())


def hashes_and_tokens(
    arrays: Arrays, sequences: int, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The hashes, and which tokens of the vocabulary occur ``[V]``.

    Raises:
        ValueError: these are not arrays of so many sequences and tokens.
    """
    hashes: NDArray[Any] = arrays[HASHES]
    bits: NDArray[Any] = arrays[OCCURRING]
    if hashes.dtype != np.int64 or hashes.shape != (sequences,):
        raise ValueError("its hashes do not fit its sequences")
    if bits.dtype != np.uint8 or bits.shape != (-(-vocab_size // 8),):
        raise ValueError("what occurs in it does not fit the vocabulary")
    return hashes, np.unpackbits(bits, count=vocab_size).astype(np.bool_)
