"""What the heads add to the loss: against references, however a step is divided."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.config.schema import LossConfig
from distill.heads.prompt_set import PromptSet
from distill.heads.prompts import SafetyPrompt
from distill.losses import chunked_lm_head
from distill.losses.auxiliary_heads import (
    BODY_GRADIENT,
    VerificationTargets,
    safety_loss,
    verification_loss,
)
from distill.losses.batch import VERIFICATION_STRIDE, Prompts
from distill.losses.objective import Objective
from distill.training.data import TrainingData, micro_batches
from distill.training.engine import TrainingJob, train
from distill.training.optimizer import build_optimizer
from students.model.decoder import SO8TForCausalLM
from students.model.heads import VerificationHead
from tests.support.objectives import WEIGHTS, evaluated, make_batch, ready
from tests.support.objectives import make_rows as rows_of
from tests.support.references import case
from tests.support.students import make_student
from tests.support.teachers import certainty_of
from tests.support.training import LOSS, TRAIN, VOCAB, make_data, read_metrics

# With seven positions that the verification head learns from:
LENGTHS = (2, 9, 12, 3, 17, 10, 14, 11, 13)
HEADS = WEIGHTS.model_copy(update={"lambda_safety": 0.3, "lambda_verification": 0.2})
HEAD_NAMES = ("safety_head.", "verification_head.")


make_rows = partial(rows_of, LENGTHS)


def headed() -> SO8TForCausalLM:
    return make_student(heads=True)


def make_prompts(count: int, labels: Tensor | None = None) -> Prompts:
    """Prompts of different lengths; soft labels that differ."""
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, 8, (count,), generator=generator)
    tokens = torch.zeros(count, int(lengths.max()), dtype=torch.int64)
    for row, length in enumerate(lengths.tolist()):
        tokens[row, :length] = torch.randint(1, 96, (length,), generator=generator)
    if labels is None:
        labels = torch.rand(count, 3, generator=generator)
        labels = labels / labels.sum(dim=1, keepdim=True)
    return Prompts(tokens, lengths, labels, torch.full((count,), 1.0 / count))


def chosen_positions(lengths: list[int]) -> list[tuple[int, int]]:
    """(sequence, position) of what the verification head learns from: every 16th, from the end."""
    every = [(row, t) for row, n in enumerate(lengths) for t in range(n - 1)]
    return [(row, t) for row, t in every if (lengths[row] + t) % VERIFICATION_STRIDE == 0]


# -- verification --------------------------------------------------------------------------------


def test_every_sixteenth_position_is_chosen() -> None:
    """In row order, each as the row of the valid positions that it is; whatever the company."""
    lengths = (30, 2, 9, 41, 1)
    batch = make_batch(*rows_of(lengths))
    starts = np.cumsum([0, *(n - 1 for n in lengths)])
    wanted = [int(starts[row]) + t for row, t in chosen_positions(list(lengths))]
    rows = batch.layout.verified.tolist()
    assert VERIFICATION_STRIDE == 16 and rows == wanted and starts[-1] == batch.count()
    assert abs(len(rows) - batch.count() / VERIFICATION_STRIDE) <= 2
    sequences, teacher = make_rows()
    for size, padding in product((1, 2, 3, 8), (0, 5)):
        found = []
        for at in range(0, len(sequences), size):
            part = slice(at, at + size)
            batch = make_batch(sequences[part], teacher[part], padding=padding)
            places = batch.valid.nonzero()[batch.layout.verified]
            found += [(at + int(row), int(t)) for row, t in places]
        assert found == chosen_positions(list(LENGTHS)) and len(found) == 7, (size, padding)


def reference_verification(
    student: SO8TForCausalLM, rows: list[list[int]], teacher: list[Tensor]
) -> tuple[Tensor, Tensor, float]:
    """Labels and certainty at the chosen positions and the summed loss, from every logit."""
    labels, certain, loss = [], [], 0.0
    for row, position in chosen_positions(list(LENGTHS)):
        with torch.no_grad():
            output = student(torch.tensor([rows[row]]))
            logits, state = output.logits[0, position], output.last_hidden_state[0, position]
            sure = torch.tensor(certainty_of(logits.tolist()))
            odds = float(student.verification_head(state, sure))
        certain.append(sure)
        labels.append(float(int(logits.argmax()) == int(teacher[row][position].argmax())))
        loss += math.log1p(math.exp(-odds if labels[-1] else odds))
    assert set(labels) == {0.0, 1.0}
    return torch.tensor(labels), torch.stack(certain), loss


def agreeing() -> tuple[list[list[int]], list[Tensor]]:
    """The rows of ``make_rows`` with a teacher that agrees with the student here and there."""
    rows, teacher = make_rows()
    student = headed()
    for row, logits in zip(rows, teacher, strict=True):
        with torch.no_grad():
            best = student(torch.tensor([row])).logits[0].argmax(dim=-1)
        for position in range(len(row) - 1):
            if (position + len(row)) % (2 * VERIFICATION_STRIDE) == 0:
                logits[position, best[position]] = 20.0
    return rows, teacher


def test_verification_against_a_dense_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels and loss, for every kind of targets and however the logits are divided into chunks."""
    student, (rows, teacher) = headed(), agreeing()
    labels, certain, total = reference_verification(student, rows, teacher)
    noted: list[VerificationTargets] = []

    def note(head: VerificationHead, states: Tensor, verified: VerificationTargets) -> Tensor:
        noted.append(verified)
        return verification_loss(head, states, verified)

    monkeypatch.setattr("distill.losses.objective.verification_loss", note)
    for kind, chunk in product(("buckets", "sketch", "hidden", "dense"), (99, 1, 3)):
        with case(kind, chunk), pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunked_lm_head, "chunk_size", lambda *_, chunk=chunk: chunk)
            batch = make_batch(rows, teacher, kind=kind)
            _, parts = evaluated(student, ready(student, HEADS), batch)
            assert noted[-1].agreed.tolist() == labels.tolist()
            torch.testing.assert_close(noted[-1].certain, certain, rtol=2e-5, atol=2e-5)
            expected = HEADS.lambda_verification * VERIFICATION_STRIDE * total / batch.count()
            assert float(parts["verification"]) == pytest.approx(expected, rel=2e-5)
    assert len(noted) == 12


def test_verification_gradients_equal_those_of_the_whole() -> None:
    """Of the head: as from all states at once, by autograd. Of everything before it: none."""
    zero = {"alpha": 0.0, "beta": 0.0, "lambda_so8t": 0.0, "lambda_safety": 0.0}
    only = HEADS.model_copy(update=zero)
    one, other, (rows, teacher) = headed(), headed(), agreeing()
    batch = make_batch(rows, teacher)
    loss, parts = evaluated(one, ready(one, only), batch)
    loss.backward()
    assert set(parts) == {"verification"}
    states = other(batch.tokens).last_hidden_state
    labels, certain, _ = reference_verification(other, rows, teacher)
    places = zip(chosen_positions(list(LENGTHS)), certain, strict=True)
    odds = torch.stack([other.verification_head(states[place], sure) for place, sure in places])
    chances = 1.0 / (1.0 + torch.exp(-odds))
    plain = -(labels * chances.log() + (1.0 - labels) * (1.0 - chances).log()).sum()
    weighted = only.lambda_verification * VERIFICATION_STRIDE * plain / batch.count()
    weighted.backward()
    assert loss.item() == pytest.approx(weighted.item(), rel=1e-4)
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        if name.startswith("verification_head."):
            assert mine.grad is not None and theirs.grad is not None and theirs.grad.any()
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)
        else:
            assert mine.grad is None or not mine.grad.any(), name


@pytest.mark.parametrize("lengths", [(2, 2), (1, 1), (2,)])
def test_a_micro_batch_without_a_chosen_position(lengths: tuple[int, ...]) -> None:
    """Each parameter of both heads still has a gradient: processes have to agree on them."""
    student = headed()
    batch = make_batch(*rows_of(lengths))
    assert len(batch.layout.verified) == 0
    for prompts in (None, replace(make_prompts(1), weights=torch.zeros(1))):  # nor a prompt
        student.zero_grad()
        batch = replace(batch, prompts=prompts)
        loss, parts = ready(student, HEADS)(student, batch, total=9, share=0.1, fraction=0.5)
        assert float(parts["verification"]) == 0.0 and float(parts["safety"]) == 0.0
        loss.backward()
        for name, parameter in student.named_parameters():
            if name.startswith(HEAD_NAMES):
                assert parameter.grad is not None and not parameter.grad.any(), name


# -- safety --------------------------------------------------------------------------------------


def reference_safety(student: SO8TForCausalLM, prompts: Prompts) -> float:
    """Mean −Σ label · log p at the last token, one prompt at a time, without padding."""
    total = 0.0
    for row, length, label in zip(prompts.tokens, prompts.lengths, prompts.labels, strict=True):
        with torch.no_grad():
            state = student(row[None, : int(length)]).last_hidden_state[0, -1].double().numpy()
        weight, bias = (p.detach().double().numpy() for p in student.safety_head.parameters())
        odds = np.exp(weight @ state + bias)
        total -= float(label.double().numpy() @ np.log(odds / odds.sum()))
    return total / len(prompts.tokens)


def test_safety_against_a_plain_reference() -> None:
    """Hard labels and probabilities; from the last real token, whatever the padding."""
    student = headed()
    for labels in (torch.eye(3)[[0, 1, 2, 2, 0]], None):
        prompts = make_prompts(5, labels)
        filled = prompts.tokens.clone()
        for row, length in enumerate(prompts.lengths.tolist()):
            filled[row, length:] = 77
        filled = torch.nn.functional.pad(filled, (0, 3), value=5)
        expected = pytest.approx(reference_safety(student, prompts), rel=2e-5)
        for given in (prompts, replace(prompts, tokens=filled)):
            assert float(safety_loss(student, given).detach()) == expected, labels
        tokens, lengths = prompts.tokens[:1], prompts.lengths[:1]
        first = replace(prompts, tokens=tokens, lengths=lengths, labels=prompts.labels[:1])
        some = replace(prompts, weights=torch.tensor([0.5, 0.0, 0.0, 0.0, 0.0]))
        half = 0.5 * reference_safety(student, first)
        assert float(safety_loss(student, some).detach()) == pytest.approx(half, rel=2e-5), labels


def test_safety_gradients_against_autograd_alone() -> None:
    """The head's is that of the plain loss; the layers get it at ``BODY_GRADIENT``."""
    one, other, prompts = headed(), headed(), make_prompts(5)
    safety_loss(one, prompts).backward()
    rows = [row[:n][None] for row, n in zip(prompts.tokens, prompts.lengths, strict=True)]
    states = torch.stack([other(row).last_hidden_state[0, -1] for row in rows])
    (-(prompts.labels * other.safety_head(states).softmax(dim=-1).log()).sum() / 5).backward()
    assert 0.0 < BODY_GRADIENT < 1.0
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        if theirs.grad is None:
            assert mine.grad is None, name
        else:
            assert mine.grad is not None and theirs.grad.any(), name
            factor = 1.0 if name.startswith("safety_head.") else BODY_GRADIENT
            wanted = factor * theirs.grad
            torch.testing.assert_close(mine.grad, wanted, rtol=1e-3, atol=1e-6, msg=name)


def test_every_part_is_reported_and_adds_up() -> None:
    """All seven parts and their sum; those of the distillation are what they are without heads."""
    student, plain = headed(), make_student()
    bare = make_batch(*make_rows())
    batch = replace(bare, prompts=make_prompts(5))
    loss, parts = evaluated(student, ready(student, HEADS), batch)
    bend = parts.pop("second_difference")
    usual = {"kd", "ce", "pet", "inertia", "non_commutation"}
    assert set(parts) == usual | {"verification", "safety"}
    assert all(float(part) > 1e-3 and not part.requires_grad for part in parts.values())
    assert loss.item() == pytest.approx(sum(float(part) for part in parts.values()), rel=1e-5)
    expected = HEADS.lambda_safety * reference_safety(student, make_prompts(5))
    assert float(parts["safety"]) == pytest.approx(expected, rel=2e-5)
    _, without = evaluated(plain, ready(plain, HEADS), bare)
    assert set(without) == usual | {"second_difference"}
    assert all(float(without[name]) == float(parts.get(name, bend)) for name in without)
    loss, lacking = evaluated(student, ready(student, HEADS), bare)
    assert float(lacking["safety"]) == 0.0
    loss.backward()  # a gradient of 0, not none
    for parameter in student.safety_head.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("name", ["safety", "verification"])
def test_a_weight_of_zero_removes_the_term(name: str) -> None:
    """It is not reported, its head has no gradient, and the others are as before."""
    student = headed()
    batch = replace(make_batch(*make_rows()), prompts=make_prompts(5))
    config = HEADS.model_copy(update={f"lambda_{name}": 0.0})
    loss, parts = evaluated(student, ready(student, config), batch)
    _, whole = evaluated(student, ready(student, HEADS), batch)
    assert parts == {key: value for key, value in whole.items() if key != name}
    loss.backward()
    for key, parameter in student.named_parameters():
        if key.startswith(f"{name}_head."):
            assert parameter.grad is None or not parameter.grad.any()


# -- a step in parts -----------------------------------------------------------------------------


def step_in_parts(accumulation: int, world: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Parts and gradients of a step over all rows, divided among micro-batches and processes."""
    student, prompts = headed(), prompt_set()
    rows, teacher = make_rows()
    total, sums = sum(LENGTHS) - len(LENGTHS), dict[str, float]()
    for rank in range(world):
        for part in micro_batches(range(len(rows)), accumulation, rank, world):
            batch = make_batch([rows[i] for i in part.indices], [teacher[i] for i in part.indices])
            batch = replace(batch, prompts=prompts.batch(3, 3, part.number, part.count))
            share, objective = batch.count() / total, ready(student, HEADS)
            loss, parts = objective(student, batch, total=total, share=share, fraction=0.5)
            (loss * float(part.counts)).backward()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float(value) * part.counts
    return sums, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def prompt_set(vocab_size: int = 96) -> PromptSet:
    """Seven prompts of different lengths with soft labels."""
    made = make_prompts(7)
    rows = zip((made.tokens % vocab_size).numpy().astype(np.int32), made.lengths, strict=True)
    labels = [(float(a), float(e), float(r)) for a, e, r in made.labels]
    prompts = [SafetyPrompt(str(n), str(n), "", row) for n, row in enumerate(labels)]
    return PromptSet(prompts, [row[:n] for row, n in rows], 0)


def test_parts_of_a_step_do_not_matter() -> None:
    """Sequences at once, one by one, or among processes of which some have none: one step."""
    whole, gradients = step_in_parts(1, 1)
    assert gradients.keys() == dict(headed().named_parameters()).keys()
    assert {"safety", "verification"} <= whole.keys()
    for accumulation, world in ((8, 1), (3, 1), (1, 3), (2, 2), (4, 3)):
        parts, mine = step_in_parts(accumulation, world)
        with case(accumulation, world):
            assert parts == pytest.approx(whole, rel=1e-4) and mine.keys() == gradients.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def with_prompts(data: TrainingData) -> TrainingData:
    """The same data, and three prompts in every step."""
    return replace(data, prompts=prompt_set(VOCAB), prompts_together=3)


def trained(
    data: TrainingData, folder: Path, accumulation: int = 1, loss: LossConfig = LOSS
) -> tuple[SO8TForCausalLM, list[dict]]:
    """A student with heads after training, and its metrics."""
    student = make_student(16, 2, VOCAB, heads=True)
    folder.mkdir()
    config = TRAIN.model_copy(update={"batch_size": 8, "accumulation": accumulation})
    train(TrainingJob(student, data, Objective(loss), config, folder), lambda step, text: None)
    lines = read_metrics(folder / "metrics.jsonl")
    return student, [line for line in lines if line["kind"] == "train"]


def test_accumulation_does_not_change_training(tmp_path: Path) -> None:
    """1 × 8 and 8 × 1: the same losses in every step, the same student; all of it learns."""
    data = with_prompts(make_data(tmp_path))
    (one, lines), (other, parts) = (trained(data, tmp_path / f"{n}", n) for n in (1, 8))
    for line, part in zip(lines, parts, strict=True):
        assert line.keys() == part.keys()
        assert line.keys() >= {"safety", "verification", "rotation_drift", "second_difference"}
        numbers, found = (
            # Padding is of each part.
            {name: value for name, value in one.items() if name not in ("kind", "padding")}
            for one in (line, part)
        )
        assert found == pytest.approx(numbers, rel=1e-4, abs=1e-6)
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, msg=name)
    assert all(line["safety"] > 0.0 for line in lines)
    assert lines[-1]["safety"] < lines[0]["safety"]
    json.dumps(lines)
    student = make_student(16, 2, VOCAB, heads=True)
    groups = build_optimizer(student, TRAIN, 16).param_groups
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(student.parameters()))
    after = dict(one.named_parameters())
    for name, parameter in student.named_parameters():
        if name.startswith(HEAD_NAMES):
            assert not torch.equal(parameter, after[name]), name


def test_heads_are_clipped_by_themselves(tmp_path: Path) -> None:
    """However steep the verification term is, the rest learns the same, to the bit."""
    data, weights = make_data(tmp_path), []
    for factor in (0.2, 1e5):
        loss = LOSS.model_copy(update={"lambda_verification": factor, "lambda_safety": 0.0})
        student, _ = trained(data, tmp_path / str(factor), loss=loss)
        weights.append(student.state_dict())
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]) or name.startswith(HEAD_NAMES), name
    assert not torch.equal(*(found["verification_head.output.weight"] for found in weights))


def test_a_batch_moves_with_its_prompts() -> None:
    """To another device, every tensor of them."""
    batch = replace(make_batch(*make_rows()), prompts=make_prompts(3))
    moved = batch.to(torch.device("meta")).prompts
    assert moved is not None and set(vars(moved)) == {"tokens", "lengths", "labels", "weights"}
    assert all(part.device.type == "meta" for part in vars(moved).values())
