"""How many threads small linear algebra runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread. Eigenvectors of a thousand by a thousand numbers take 0.2 s so; on two
    threads, whose many short steps wait for each other, as long on a quiet machine and fifty times
    as long on a busy one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
