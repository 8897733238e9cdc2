"""The loss over a sample of the vocabulary against its definition, and against the whole one."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.config.schema import LossConfig
from distill.losses import vocabulary_sample
from distill.losses.batch import Batch
from distill.losses.divergences import IGNORE_INDEX
from distill.losses.fused import Weights, divergence_and_cross_entropy
from distill.losses.objective import Objective
from distill.losses.vocabulary_sample import VocabularySample
from students.model.decoder import SO8TForCausalLM
from teachers.targets.distributions import CompactTargets
from teachers.targets.stored_arrays import Targets
from tests.support.objectives import evaluated
from tests.support.references import DEFINITIONS, FAMILY, case, drawn, kl
from tests.support.stores import exact_targets
from tests.support.students import make_student

V, N, K = 400, 12, 3
KINDS = ("buckets", "sketch")
CPU = torch.device("cpu")


def sharp(seed: int) -> Tensor:
    """Seeded logits, float32 ``[N, V]``."""
    return drawn(N, vocab_size=V, scale=1.0, seed=seed)


def case_of(kind: str) -> tuple[Tensor, Tensor, CompactTargets, Tensor, VocabularySample]:
    """Student, teacher, targets, labels of which some are ignored, and a sample that has to hold
    the labels and all top tokens."""
    student, teacher = sharp(1), sharp(0)
    targets = exact_targets(kind, teacher, K)
    assert isinstance(targets, CompactTargets)
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(2))
    certain = torch.zeros(V, dtype=torch.bool)
    certain[targets.topk_ids.flatten()] = certain[labels] = True
    labels[::4] = IGNORE_INDEX
    sample = VocabularySample.draw(certain, 120, seed=3, step=0)
    assert sample is not None and len(sample.ids) == 120
    assert (sample.log_weights == 0).sum() == certain.sum() > 2 * K
    return student, teacher, targets, labels, sample


def weighted(logits: np.ndarray, sample: VocabularySample, temperature: float) -> np.ndarray:
    """w exp(z / T) of the sample's tokens in shares of their sum, by hand in float64."""
    exponent = logits.astype(np.float64) / temperature
    weights = np.exp(exponent - exponent.max(axis=-1, keepdims=True))
    times = np.exp(sample.log_weights.double().numpy())
    shares = weights[:, sample.ids.numpy()] * times
    return shares / shares.sum(axis=-1, keepdims=True)


def in_sample(
    student: Tensor, targets: CompactTargets, labels: Tensor, sample: VocabularySample, how: Weights
) -> tuple[float, float, Tensor]:
    """Both sums, and the gradient in all V logits."""
    found = divergence_and_cross_entropy(
        student[:, sample.ids].clone(),
        sample.of_targets(targets),
        sample.of_labels(labels),
        replace(how, log_tokens=sample.log_weights),
    )
    gradient = torch.zeros(N, V).index_copy_(1, sample.ids, found.gradient)
    return float(found.kd), float(found.ce), gradient


def teacher_shares(
    teacher: Tensor, targets: CompactTargets, sample: VocabularySample, temperature: float
) -> np.ndarray:
    """What a step takes the teacher for: top tokens and the mass of all others are exact; how this
    is spread among the others that are in the sample is estimated."""
    whole = np.exp(teacher.double().numpy() / temperature)
    whole /= whole.sum(axis=-1, keepdims=True)
    shares = weighted(teacher.numpy(), sample, temperature)
    places = sample.places[targets.topk_ids].numpy()
    top = np.take_along_axis(whole, targets.topk_ids.numpy(), axis=-1)
    np.put_along_axis(shares, places, 0.0, axis=-1)
    shares *= (1.0 - top.sum(axis=-1, keepdims=True)) / shares.sum(axis=-1, keepdims=True)
    np.put_along_axis(shares, places, top, axis=-1)
    return shares


def in_buckets(shares: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The top tokens one by one, and all others as one."""
    top = np.take_along_axis(shares, places, axis=-1)
    return np.concatenate((top, 1.0 - top.sum(axis=-1, keepdims=True)), axis=-1)


def reference(
    logits: Tensor,
    p: np.ndarray,
    targets: CompactTargets,
    labels: Tensor,
    sample: VocabularySample,
    how: Weights,
) -> tuple[float, float]:
    """Both sums by hand: teacher ``p`` and student over the sample, its top tokens and one bucket
    of all others where the targets have no more."""
    q = weighted(logits.numpy(), sample, how.temperature)
    if targets.head is None:
        places = sample.places[targets.topk_ids].numpy()
        p, q = in_buckets(p, places), in_buckets(q, places)
    kd = float(DEFINITIONS[how.divergence.name](p, q, how.divergence).sum())
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(-1)
    plain = weighted(logits.numpy(), sample, 1.0)[rows, sample.places[labels[rows]].numpy()]
    return kd, float(-np.log(plain).sum())


def test_values_against_the_definition() -> None:
    """Every divergence of the weighted distributions and the label's weighted cross-entropy, with
    and without the tail's shape, at each temperature; the gradient by finite differences."""
    direction = torch.randn(N, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for kind, divergence, temperature in product(KINDS, FAMILY, (1.0, 2.0)):
        student, teacher, targets, labels, sample = case_of(kind)
        how = Weights(0.7, 0.3, temperature, divergence)
        p = teacher_shares(teacher, targets, sample, temperature)
        with case(kind, divergence, temperature):
            kd, ce, gradient = in_sample(student, targets, labels, sample, how)
            wanted = reference(student, p, targets, labels, sample, how)
            assert kd == pytest.approx(wanted[0], rel=1e-4)
            assert ce == pytest.approx(wanted[1], rel=1e-5)
            ahead, behind = (
                np.array(reference(moved, p, targets, labels, sample, how))
                for moved in (student + 1e-5 * direction, student - 1e-5 * direction)
            )
            slope = float((np.array([how.kd, how.ce]) * (ahead - behind)).sum() / 2e-5)
            assert float((gradient * direction).sum()) == pytest.approx(slope, rel=2e-3, abs=1e-3)


def draws(first: VocabularySample, count: int) -> list[VocabularySample]:
    """Samples of the same size that hold the same tokens for certain."""
    certain = torch.zeros(V, dtype=torch.bool)
    certain[first.ids[first.log_weights == 0]] = True
    size = len(first.ids)
    found = [VocabularySample.draw(certain, size, seed=0, step=step) for step in range(count)]
    return [sample for sample in found if sample is not None]


def test_equal_distributions_move_nothing_on_average() -> None:
    """A student that says what its teacher says: its KL is that of the sampling alone, and the
    gradients of many samples cancel."""
    for kind in KINDS:
        _, teacher, targets, labels, first = case_of(kind)
        how = Weights(1.0, 0.0, 1.0)
        found = [in_sample(teacher, targets, labels, one, how) for one in draws(first, 400)]
        kds, gradients = [one[0] for one in found], torch.stack([one[2] for one in found])
        assert all(-1e-4 < kd < 0.1 * N for kd in kds), kind
        alone, together = gradients.flatten(1).norm(dim=1).mean(), gradients.mean(dim=0).norm()
        assert float(together) < 0.5 * float(alone), kind


def test_samples_agree_with_the_whole_on_average() -> None:
    """The mean of many samples is the loss over all tokens, and so is that of their gradients."""
    for kind in KINDS:
        student, _, targets, labels, first = case_of(kind)
        how = Weights(1.0, 0.5, 1.0)
        found = [in_sample(student, targets, labels, one, how) for one in draws(first, 400)]
        whole = divergence_and_cross_entropy(student.clone(), targets, labels, how)
        with case(kind):
            for part, wanted in enumerate((whole.kd, whole.ce)):
                each = np.array([one[part] for one in found])
                error = each.std() / len(found) ** 0.5
                # A logarithm's mean is a little below the logarithm of the mean.
                assert abs(each.mean() - float(wanted)) < 4 * error + 0.03 * float(wanted), part
            mean = torch.stack([one[2] for one in found]).mean(dim=0)
            off = (mean - whole.gradient).norm() / whole.gradient.norm()
            assert float(off) < 0.05
            assert (
                torch.nn.functional.cosine_similarity(
                    mean.flatten(), whole.gradient.flatten(), dim=0
                )
                > 0.995
            )


def test_what_is_drawn() -> None:
    """All certain tokens and some others, each as often; the same for the same seed and step."""
    certain = torch.zeros(V, dtype=torch.bool)
    certain[[0, 7, 399]] = True
    count, times = torch.zeros(V), 500
    for step in range(times):
        sample = VocabularySample.draw(certain, 43, seed=1, step=step)
        again = VocabularySample.draw(certain, 43, seed=1, step=step)
        other = VocabularySample.draw(certain, 43, seed=2, step=step)
        assert sample is not None and again is not None and other is not None
        assert torch.equal(sample.ids, again.ids) and not torch.equal(sample.ids, other.ids)
        assert (sample.ids.diff() > 0).all() and len(sample.ids) == 43
        assert torch.equal(sample.places[sample.ids], torch.arange(43))
        assert (sample.places >= 0).sum() == 43
        known = certain[sample.ids]
        assert known.sum() == 3 and not sample.log_weights[known].any()
        assert torch.allclose(sample.log_weights[~known].exp(), torch.tensor(397 / 40))
        count[sample.ids] += 1
    assert (count[certain] == times).all()
    rate, share = count[~certain] / times, 40 / 397
    assert float((rate - share).abs().max()) < 5 * (share * (1 - share) / times) ** 0.5


def test_how_much_is_drawn() -> None:
    """A third at least of the sample is drawn; where that makes it most of the vocabulary, or all
    is asked for, or the targets have no top tokens, there is none."""
    for known, size, expected in ((10, 100, 100), (60, 50, 91), (140, 50, None), (10, 300, None)):
        certain = torch.arange(V) < known
        sample = VocabularySample.draw(certain, size, seed=0, step=0)
        assert (sample and len(sample.ids)) == expected, (known, size)
    teacher = sharp(0)
    targets = exact_targets("sketch", teacher, K)
    assert isinstance(targets, CompactTargets)
    batch = batch_of(targets)
    assert VocabularySample.of_step([batch], 0, CPU) is None
    assert VocabularySample.of_step([batch], None, CPU) is None
    whole = batch_of(exact_targets("hidden", teacher, K))
    assert VocabularySample.of_step([whole], 100, CPU) is None
    sample = VocabularySample.of_step([batch], 100, CPU)
    assert sample is not None
    needed = torch.cat((batch.labels, targets.topk_ids.flatten()))
    assert not sample.log_weights[sample.places[needed]].any()
    assert (sample.places[needed] >= 0).all()


def batch_of(targets: Targets) -> Batch:
    """Two sequences of seven tokens, whose twelve predictions have these targets."""
    tokens = torch.randint(1, V, (2, 7), generator=torch.Generator().manual_seed(4))
    return Batch(tokens, torch.tensor([7, 7]), targets)


def test_micro_batches_and_processes_draw_alike() -> None:
    """The sample of two micro-batches is that of both as one; of two processes, each of which sees
    one of them, too."""
    batch = batch_of(exact_targets("sketch", sharp(0), K))
    halves = [
        Batch(batch.tokens[at : at + 1], batch.lengths[:1], batch.targets.select(rows))
        for at, rows in enumerate((slice(0, 6), slice(6, 12)))
    ]
    whole = VocabularySample.of_step([batch], 100, CPU, seed=5, step=2)
    parts = VocabularySample.of_step(halves, 100, CPU, seed=5, step=2)
    others = torch.zeros(V, dtype=torch.int32)  # of the other process
    of_other = halves[1].targets
    assert isinstance(of_other, CompactTargets)
    others[torch.cat((of_other.topk_ids.flatten(), halves[1].labels))] = 1
    of_one = VocabularySample.of_step(halves[:1], 100, CPU, 5, 2, lambda counts: counts + others)
    alone = VocabularySample.of_step(halves[:1], 100, CPU, 5, 2)
    assert whole is not None and parts is not None and of_one is not None and alone is not None
    assert torch.equal(whole.ids, parts.ids) and torch.equal(whole.ids, of_one.ids)
    assert not torch.equal(whole.ids, alone.ids)
    config = LossConfig(temperature=1.5, alpha=0.7, beta=0.3, lambda_so8t=0.0)
    results = []
    for batches in ([batch], halves):
        student = student_of()
        for part in batches:
            share = part.count() / batch.count()
            loss, _ = Objective(config)(
                student, part, total=batch.count(), share=share, fraction=0.5, sample=whole
            )
            loss.backward()
        results.append([one.grad for one in student.parameters() if one.grad is not None])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def student_of() -> SO8TForCausalLM:
    """A student of this vocabulary with a verification head."""
    return make_student(16, 2, V, heads=True)


def test_the_objective_in_a_sample() -> None:
    """Rows of the output matrix outside the sample get a gradient only as inputs; the verification
    head sees every logit, so that its part of the loss is the same with and without."""
    config = LossConfig(temperature=1.0, alpha=1.0, beta=0.0, lambda_so8t=0.0, lambda_safety=0.0)
    tokens = torch.randint(1, V, (1, N + 1), generator=torch.Generator().manual_seed(4))
    targets = exact_targets("sketch", sharp(0), K)
    batch = Batch(tokens, torch.tensor([N + 1]), targets)
    assert len(batch.layout.verified) == 1
    sample = VocabularySample.of_step([batch], 100, CPU)
    assert sample is not None
    student = make_student(16, 2, V, tied=False, heads=True)
    loss, parts = Objective(config)(
        student, batch, total=batch.count(), share=1.0, fraction=0.5, sample=sample
    )
    loss.backward()
    gradient = student.output_matrix().grad
    assert gradient is not None
    touched = gradient.abs().sum(dim=1) > 0
    assert torch.equal(touched.nonzero().squeeze(-1), sample.ids)
    _, whole = evaluated(student, Objective(config), batch)
    assert float(parts["verification"]) == float(whole["verification"]) > 0.0
    assert float(parts["kd"]) == pytest.approx(float(whole["kd"]), rel=0.3)
    with torch.no_grad():  # by hand: the same states, one position at a time
        states = batch.at_valid(student(batch.tokens).last_hidden_state)
        logits = (states @ student.output_matrix().T).numpy()
    q = weighted(logits, sample, 1.0)
    assert isinstance(batch.targets, CompactTargets)
    p = teacher_shares(sharp(0), batch.targets, sample, 1.0)
    assert float(parts["kd"]) == pytest.approx(kl(p, q).mean(), rel=1e-4)


def test_the_default_is_for_large_vocabularies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a setting, ``SIZE`` tokens where the vocabulary is twice that; on a CPU."""
    batch = batch_of(exact_targets("sketch", sharp(0), K))
    for size, sampled in ((V // 2, True), (V // 2 + 1, False)):
        monkeypatch.setattr(vocabulary_sample, "SIZE", size)
        assert (VocabularySample.of_step([batch], None, CPU) is not None) == sampled, size
    monkeypatch.setattr(vocabulary_sample, "SIZE", V // 2)
    assert VocabularySample.of_step([batch], None, torch.device("meta")) is None
    sample = VocabularySample.of_step([batch], V // 2, torch.device("meta"))
    assert sample is not None and sample.ids.device.type == "meta"
