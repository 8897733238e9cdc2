"""PyTorch on one thread for a while."""

from __future__ import annotations

import pytest
import torch

from teachers.targets.threads import one_thread


def test_one_thread_for_a_while() -> None:
    """Whatever ends it, there are as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyError), one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
