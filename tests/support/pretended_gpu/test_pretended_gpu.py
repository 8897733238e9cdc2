"""The pretended GPU computes what the processor does, refuses what CUDA refuses, and counts."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.support.pretended_gpu import DEVICE, on_gpu, to_gpu, watch


def tied() -> nn.Sequential:
    """An embedding whose matrix is also that of the last layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8, bias=False))
    model[2].weight = model[0].weight
    return model


def trained(model: nn.Sequential, device: torch.device) -> list[Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        model(torch.arange(8, device=device)).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [one.detach().cpu() for one in model.parameters()]


def test_trains_as_the_processor_does_and_leaves_nothing_behind() -> None:
    expected, pin_memory = trained(tied(), torch.device("cpu")), torch.Tensor.pin_memory
    with watch() as seen:
        for moved in (to_gpu(tied()), tied().to(DEVICE)):
            assert moved[2].weight is moved[0].weight and moved[0].weight.device == DEVICE
            assert all(map(torch.equal, trained(moved, DEVICE), expected))
        held = seen.bytes_alive
        assert seen.peak > held > 4 * 8 * 4
        del moved
        assert seen.bytes_alive < held
    assert torch.Tensor.pin_memory is pin_memory
    assert not torch.__future__.get_swap_module_params_on_conversion()


REFUSED: list[Callable[[Tensor, Tensor], object]] = [
    lambda here, there: here + there,
    lambda here, there: torch.cat((here, there)),
    lambda here, there: torch.stack((here.sum(), there.sum())),
    lambda here, there: there @ here,
    lambda here, there: there.normal_(generator=torch.Generator()),
    lambda here, there: there.numpy(),
]


def test_refuses_what_cuda_refuses() -> None:
    here, there = torch.ones(2, 2), on_gpu(torch.ones(2, 2))
    for operation in REFUSED:
        with pytest.raises((RuntimeError, TypeError)):
            operation(here, there)
    assert (there * torch.tensor(2.0)).tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert there[torch.tensor([0])].device == DEVICE


WAITED_FOR: list[tuple[str, Callable[[Tensor], object], int, int]] = [
    ("nothing", lambda x: x.square().sum(), 0, 0),
    ("a number", lambda x: float(x.sum()), 1, 0),
    ("a list", lambda x: x.tolist(), 1, 16),
    ("to main memory", lambda x: x.cpu(), 1, 16),
    ("from main memory", lambda x: torch.ones(4).to(DEVICE), 1, 16),
    ("not pinned", lambda x: torch.ones(4).to(DEVICE, non_blocking=True), 1, 16),
    ("pinned, but blocking", lambda x: torch.ones(4).pin_memory().to(DEVICE), 1, 16),
    ("pinned", lambda x: torch.ones(4).pin_memory().to(DEVICE, non_blocking=True), 0, 16),
    ("made of a list", lambda x: torch.tensor([1.0, 2.0], device=DEVICE), 1, 8),
    ("made of a number", lambda x: x.new_tensor(1.0), 1, 4),
    ("made there", lambda x: torch.zeros(4, device=DEVICE), 0, 0),
    ("a mask", lambda x: x[x > 0], 1, 0),
    ("filled by a mask", lambda x: x.__setitem__(x > 0, 2.0), 0, 0),
    ("indices", lambda x: x[torch.arange(2, device=DEVICE)], 0, 0),
    ("indices in main memory", lambda x: x[torch.arange(2)], 1, 16),
    ("nonzero", lambda x: x.nonzero(), 1, 0),
    ("eigenvalues", lambda x: torch.linalg.eigvalsh(x.outer(x)), 1, 0),
    ("repeats", lambda x: x.repeat_interleave(torch.ones_like(x).long()), 1, 0),
    (
        "as many repeats",
        lambda x: x.repeat_interleave(torch.ones_like(x).long(), output_size=4),
        0,
        0,
    ),
]


def test_counts_what_is_waited_for_and_what_crosses_the_bus() -> None:
    for name, operation, syncs, size in WAITED_FOR:
        x = on_gpu(torch.ones(4))
        with watch() as seen:
            operation(x)
        crossed = sum(seen.bytes.values())
        if name == "a number":
            crossed = 0  # four bytes or eight: whatever
        assert (sum(seen.syncs.values()), crossed) == (syncs, size), (name, seen)


def test_what_is_not_waited_for_comes_later() -> None:
    there = on_gpu(torch.ones(4))
    with watch() as seen:
        here = there.to("cpu", non_blocking=True)
        assert here.tolist() != [1.0] * 4 and not seen.syncs
        torch.pretended.Event().synchronize()  # type: ignore[attr-defined]
        assert here.tolist() == [1.0] * 4 and len(seen.syncs) == 1


def test_copies_of_modules_stay_on_the_device() -> None:
    model = to_gpu(tied())
    other = copy.deepcopy(model)
    assert other[0].weight is other[2].weight is not model[0].weight
    assert other[0].weight.device == DEVICE
