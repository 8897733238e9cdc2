"""The chunked LM-head loss equals the plain one, value and gradients, for every chunk size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill import losses
from distill.head_loss import LOGITS_BYTES, by_autograd, chunk_size, chunked_head_loss
from teachers.soft_targets import CompactTargets

N, D, V = 37, 12, 50


def problem(seed: int = 0) -> tuple[Tensor, Tensor, CompactTargets, Tensor]:
    """Hidden states, output matrix, soft targets and labels (some ignored)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    targets = CompactTargets.from_logits(torch.randn(N, V, generator=generator) * 2, 7)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::5] = losses.IGNORE_INDEX
    return hidden, weight, targets, labels


def chunk_loss_of(targets: CompactTargets, labels: Tensor):
    def chunk_loss(logits: Tensor, span: slice) -> Tensor:
        kl = losses.forward_kl(logits, targets.select(span), 2.0).sum()
        return 4.0 * kl + 0.3 * losses.cross_entropy(logits, labels[span]).sum()

    return chunk_loss


@pytest.mark.parametrize("chunk", [1, 2, 7, 36, 37, 1000])
def test_equals_the_unchunked_loss(chunk: int) -> None:
    """Value and both gradients, with a factor on the result so that backward's own factor is seen."""
    hidden, weight, targets, labels = problem()
    chunk_loss = chunk_loss_of(targets, labels)
    plain = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = chunk_loss(plain[0] @ plain[1].T, slice(0, N))
    (3.0 * expected).backward()
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    found = chunked_head_loss(ours[0], ours[1], by_autograd(chunk_loss), chunk)
    (3.0 * found).backward()
    assert torch.allclose(found, expected, rtol=1e-5)
    for mine, theirs in zip(ours, plain, strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_tied_weights_get_both_gradients() -> None:
    """The same matrix as embedding and output: its gradient is the sum of both uses."""
    _, weight, targets, labels = problem(1)
    chunk_loss = chunk_loss_of(targets, labels)
    tokens = torch.arange(N) % V
    plain, ours = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    chunk_loss(plain[tokens] @ plain.T, slice(0, N)).backward()
    chunked_head_loss(ours[tokens], ours, by_autograd(chunk_loss), 5).backward()
    assert torch.allclose(ours.grad, plain.grad, rtol=1e-4, atol=1e-5)


def test_autocast_narrows_the_products_only() -> None:
    """Under bfloat16 autocast the result is near the float32 one, and float32 itself."""
    hidden, weight, targets, labels = problem(2)
    hidden.requires_grad_()
    chunk_loss = chunk_loss_of(targets, labels)
    exact = chunked_head_loss(hidden, weight, by_autograd(chunk_loss), 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = chunked_head_loss(hidden, weight, by_autograd(chunk_loss), 8)
    narrow.backward()
    assert narrow.dtype == torch.float32 and hidden.grad is not None and hidden.grad.dtype == torch.float32
    assert 0 < abs(float(narrow - exact)) < 0.02 * float(exact)


@pytest.mark.parametrize("chunk", [1, 5, 8, N])
def test_gradients_under_autocast(chunk: int) -> None:
    """In bfloat16, with one chunk or several, both gradients are float32 and near the exact ones."""
    hidden, weight, targets, labels = problem(2)
    chunk_loss = chunk_loss_of(targets, labels)
    found = []
    for narrow in (False, True):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            loss = chunked_head_loss(*inputs, by_autograd(chunk_loss), chunk)
        loss.backward()
        found.append([tensor.grad for tensor in inputs])
    for exact, rounded in zip(*found, strict=True):
        assert exact is not None and rounded is not None and rounded.dtype == torch.float32
        assert float((rounded - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("chunk", [5, N])
def test_a_frozen_matrix_costs_no_gradient(chunk: int, narrow: bool) -> None:
    """The output matrix of a frozen base gets none, and the states the same as otherwise."""
    hidden, weight, targets, labels = problem(2)
    chunk_loss = chunk_loss_of(targets, labels)
    found = []
    for trained in (True, False):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            loss = chunked_head_loss(*inputs, by_autograd(chunk_loss), chunk)
        assert (loss.grad_fn.gradients[1] is not None) == trained  # type: ignore[union-attr]  # not even worked out
        (2 * loss).backward()
        found.append((loss.detach(), inputs[0].grad))
        assert (inputs[1].grad is not None) == trained
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] is not None and found[1][1] is not None and torch.equal(found[0][1], found[1][1])


def test_no_positions_give_zero() -> None:
    """An empty batch of positions has loss 0 and gradient 0."""
    hidden, weight = torch.zeros(0, D, requires_grad=True), torch.ones(V, D, requires_grad=True)
    loss = chunked_head_loss(hidden, weight, by_autograd(lambda logits, span: logits.sum()))
    loss.backward()
    assert float(loss) == 0 and weight.grad is not None and not weight.grad.any()


def test_chunks_are_bounded_by_the_vocabulary() -> None:
    """No chunk's logits exceed the limit; every vocabulary makes progress."""
    for vocab_size in (1, 512, 32064, 262144, 10**9):
        assert chunk_size(vocab_size) >= 16
    assert chunk_size(32064) * 32064 * 4 <= LOGITS_BYTES
