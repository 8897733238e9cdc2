"""The chunked LM-head loss equals the plain one, value and gradients, for every chunk size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill.losses import chunked_lm_head, divergences
from distill.losses.chunked_lm_head import (
    LOGITS_BYTES,
    ChunkLoss,
    chunk_size,
    chunked_head_loss,
)
from teachers.targets.distributions import CompactTargets
from tests.support.references import case

N, D, V = 37, 12, 50
PlainLoss = Callable[[Tensor, slice], Tensor]


def by_autograd(chunk_loss: PlainLoss) -> ChunkLoss:
    """A chunk's loss, whose gradient it leaves in the logits."""

    def loss_(logits: Tensor, span: slice) -> Tensor:
        with torch.enable_grad():
            wide = logits.detach().float().requires_grad_()
            loss = chunk_loss(wide, span)
        logits.copy_(torch.autograd.grad(loss, wide)[0])
        return loss.detach()

    return loss_


def problem(seed: int = 0) -> tuple[Tensor, Tensor, PlainLoss]:
    """Hidden states, output matrix, and a loss of soft targets and labels, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    targets = CompactTargets.from_logits(torch.randn(N, V, generator=generator) * 2, 7)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::5] = divergences.IGNORE_INDEX

    def chunk_loss(logits: Tensor, span: slice) -> Tensor:
        kl = divergences.divergence(logits, targets.select(span), 2.0).sum()
        return 4.0 * kl + 0.3 * divergences.cross_entropy(logits, labels[span]).sum()

    return hidden, weight, chunk_loss


def test_logits_of_narrow_factors_stay_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device adds up products in float32 they are not rounded to bfloat16 after it; on a
    CPU, which has no such product, they are as they were."""
    hidden, weight, chunk_loss = problem()
    narrow = hidden.bfloat16(), weight.bfloat16()
    exact = narrow[0].double() @ narrow[1].double().T

    def logits() -> Tensor:
        seen = []

        def keep(found: Tensor, span: slice) -> Tensor:
            seen.append(found.clone())
            return by_autograd(chunk_loss)(found, span)

        with torch.autocast("cpu", torch.bfloat16):
            chunked_head_loss(hidden, weight, keep, 10)
        return torch.cat(seen)

    before = logits()
    assert torch.equal(before, narrow[0] @ narrow[1].T) and before.dtype == torch.bfloat16
    with torch.library._scoped_library("aten", "IMPL") as library:
        wide = lambda left, right, out_dtype: left.to(out_dtype) @ right.to(out_dtype)  # noqa: E731
        library.impl("mm.dtype", wide, "CPU")
        monkeypatch.setattr("distill.losses.chunked_lm_head.WIDENING", {"cpu"})
        found = logits()
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max()) < 1e-5 < 1e-2 < float((before - exact).abs().max())


def test_equals_the_unchunked_loss() -> None:
    """Value and both gradients, with a factor on the result to see backward's own factor."""
    hidden, weight, chunk_loss = problem()
    plain = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = chunk_loss(plain[0] @ plain[1].T, slice(0, N))
    (3.0 * expected).backward()
    for chunk in (1, 2, 7, 36, 37, 1000):
        ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        found = chunked_head_loss(ours[0], ours[1], by_autograd(chunk_loss), chunk)
        (3.0 * found).backward()
        assert torch.allclose(found, expected, rtol=1e-5), chunk
        for mine, theirs in zip(ours, plain, strict=True):
            assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5), chunk


def test_tied_weights_get_both_gradients() -> None:
    """The same matrix as embedding and output: its gradient is the sum of both uses."""
    _, weight, chunk_loss = problem(1)
    tokens = torch.arange(N) % V
    plain, ours = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    chunk_loss(plain[tokens] @ plain.T, slice(0, N)).backward()
    chunked_head_loss(ours[tokens], ours, by_autograd(chunk_loss), 5).backward()
    assert torch.allclose(ours.grad, plain.grad, rtol=1e-4, atol=1e-5)


def test_autocast_narrows_the_products_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, in any chunks, also of as many bytes as are allowed, loss and gradients are
    float32 and near the exact ones."""
    hidden, weight, chunk_loss = problem(2)
    monkeypatch.setattr(chunked_lm_head, "LOGITS_BYTES", 20 * 2 * V)
    for chunk in (1, 5, 8, N, None):
        found = []
        for narrow in (False, True):
            inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
                loss = chunked_head_loss(*inputs, by_autograd(chunk_loss), chunk)
            loss.backward()
            found.append((loss.detach(), [tensor.grad for tensor in inputs]))
        with case(chunk):
            (exact, gradients), (rounded, narrow_gradients) = found
            assert rounded.dtype == torch.float32
            assert 0 < abs(float(rounded - exact)) < 0.02 * float(exact)
            for mine, theirs in zip(narrow_gradients, gradients, strict=True):
                assert mine is not None and theirs is not None and mine.dtype == torch.float32
                assert float((mine - theirs).norm() / theirs.norm()) < 0.02


def test_chunks_fill_the_bytes_they_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as many positions where logits are narrow; float32 ones of a GPU count as such."""
    hidden, weight = torch.randn(50, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    monkeypatch.setattr(chunked_lm_head, "LOGITS_BYTES", 4 * V * 20)
    seen: list[int] = []

    def loss(logits: Tensor, span: slice) -> Tensor:
        seen.append(len(logits))
        return logits.zero_().sum().float()

    for widening, narrow, expected in (
        (set(), False, [20, 20, 10]),
        (set(), True, [40, 10]),
        ({"cpu"}, True, [20, 20, 10]),
    ):
        seen.clear()
        with pytest.MonkeyPatch.context() as changed, case(widening, narrow):
            changed.setattr(chunked_lm_head, "WIDENING", widening)
            plain = lambda states, matrix: states @ matrix.T  # noqa: E731
            changed.setattr(chunked_lm_head, "head_logits", plain)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
                chunked_head_loss(hidden, weight, loss)
            assert seen == expected


def test_a_frozen_matrix_costs_no_gradient() -> None:
    """The output matrix of a frozen base gets none, and the states the same as otherwise."""
    hidden, weight, chunk_loss = problem(2)
    for chunk, narrow in ((5, False), (5, True), (N, False), (N, True)):
        found = []
        for trained in (True, False):
            inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
                loss = chunked_head_loss(*inputs, by_autograd(chunk_loss), chunk)
            worked_out = loss.grad_fn.gradients[1]  # type: ignore[union-attr]
            (2 * loss).backward()
            found.append((loss.detach(), inputs[0].grad))
            with case(chunk, narrow, trained):
                assert (worked_out is not None) == (inputs[1].grad is not None) == trained
        (whole, ours), (frozen, theirs) = found
        with case(chunk, narrow):
            assert torch.equal(whole, frozen)
            assert ours is not None and theirs is not None and torch.equal(ours, theirs)


def test_no_positions_give_zero() -> None:
    """An empty batch of positions has loss 0 and gradient 0."""
    hidden, weight = torch.zeros(0, D, requires_grad=True), torch.ones(V, D, requires_grad=True)
    loss = chunked_head_loss(hidden, weight, by_autograd(lambda logits, span: logits.sum()))
    loss.backward()
    assert float(loss) == 0 and weight.grad is not None and not weight.grad.any()


def test_chunks_are_bounded_by_the_vocabulary() -> None:
    """No chunk's logits exceed the limit; every vocabulary makes progress."""
    for vocab_size in (1, 512, 32064, 262144, 10**9):
        assert chunk_size(vocab_size, LOGITS_BYTES) >= 16
    assert chunk_size(32064, LOGITS_BYTES) * 32064 * 4 <= LOGITS_BYTES
