"""How many threads small linear algebra runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_outside: list[int] = []  # threads before each ``one_thread`` that this process is in


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread. Eigenvectors of a thousand by a thousand numbers take 0.2 s so; on two
    threads, whose many short steps wait for each other, as long on a quiet machine and fifty times
    as long on a busy one.
    """
    _outside.append(torch.get_num_threads())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_outside.pop())


@contextmanager
def every_thread() -> Iterator[None]:
    """Within ``one_thread`` as many threads as outside, for a single large product."""
    now = torch.get_num_threads()
    torch.set_num_threads(_outside[0] if _outside else now)
    try:
        yield
    finally:
        torch.set_num_threads(now)
