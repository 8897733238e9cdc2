"""What the heads add to the loss: against plain references, and the same however a step is divided."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distill import head_loss
from distill.batches import micro_batches
from distill.engine import TrainingData, train
from distill.head_terms import BODY_GRADIENT, VERIFIED_EVERY, Verified, safety_loss, verification_loss
from distill.objective import Objective, Prompts
from distill.prompt_set import PromptSet
from distill.safety_prompts import SafetyPrompt
from distill.schedule import build_optimizer
from students.model import SO8TForCausalLM
from tests.conftest import certainty_of, make_student
from tests.test_engine import LOSS, TRAIN, VOCAB, make_data, read_metrics
from tests.test_objective import WEIGHTS, make_batch, ready
from tests.test_objective import make_rows as rows_of

LENGTHS = (2, 9, 12, 3, 17, 10, 14, 11, 13)  # seven positions that the verification head learns from
HEADS = WEIGHTS.model_copy(update={"lambda_safety": 0.3, "lambda_verification": 0.2})
KINDS = ["buckets", "sketch", "hidden", "dense"]
HEAD_NAMES = ("safety_head.", "verification_head.")


def make_rows(lengths: tuple[int, ...] = LENGTHS) -> tuple[list[list[int]], list[Tensor]]:
    """Seeded sequences and the teacher's dense logits ``[n − 1, V]`` of each."""
    return rows_of(lengths)


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


def chosen_places(lengths: list[int]) -> list[tuple[int, int]]:
    """(sequence, position) of what the verification head learns from: every sixteenth, counted from the end."""
    return [(row, t) for row, n in enumerate(lengths) for t in range(n - 1) if (n + t) % VERIFIED_EVERY == 0]


# -- verification ------------------------------------------------------------------------------------------


def test_every_sixteenth_position_is_chosen() -> None:
    """About a sixteenth of all valid ones, in row order, each as the row of the valid positions that it is."""
    batch = make_batch(*make_rows((30, 2, 9, 41, 1)))
    rows, count = Verified.of(batch).rows.tolist(), 0
    wanted = []
    for sequence, n in enumerate((30, 2, 9, 41, 1)):
        wanted += [count + t for row, t in chosen_places([0] * sequence + [n]) if row == sequence]
        count += n - 1
    assert VERIFIED_EVERY == 16 and rows == wanted and count == batch.count()
    assert abs(len(rows) - count / VERIFIED_EVERY) <= 2


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("padding", [0, 5])
def test_the_choice_does_not_depend_on_company(size: int, padding: int) -> None:
    """However sequences are divided into micro-batches and padded, the same positions are chosen."""
    rows, teacher = make_rows()
    found = []
    for at in range(0, len(rows), size):
        batch = make_batch(rows[at : at + size], teacher[at : at + size], padding=padding)
        places = batch.valid.nonzero()[Verified.of(batch).rows]
        found += [(at + int(row), int(t)) for row, t in places]
    assert found == chosen_places(list(LENGTHS)) and len(found) == 7


def reference_verification(student: SO8TForCausalLM) -> tuple[list[float], Tensor, float]:
    """Labels and certainty at the chosen positions and the summed loss, from every logit, one sequence at a time."""
    rows, teacher = make_rows()
    labels, certain, loss = [], [], 0.0
    for row, position in chosen_places(list(LENGTHS)):
        with torch.no_grad():
            output = student(torch.tensor([rows[row]]))
            state = output.last_hidden_state[0, position]
            sure = torch.tensor(certainty_of(output.logits[0, position].tolist()))
            odds = float(student.verification_head(state, sure))
        certain.append(sure)
        mine = int(np.argmax(output.logits[0, position].numpy()))
        label = float(mine == int(np.argmax(teacher[row][position].numpy())))
        labels.append(label)
        loss += math.log1p(math.exp(-odds if label else odds))
    return labels, torch.stack(certain), loss


def agreeing() -> tuple[list[list[int]], list[Tensor]]:
    """The rows of ``make_rows`` with a teacher that agrees with the student here and there."""
    rows, teacher = make_rows()
    student = headed()
    for row, logits in zip(rows, teacher, strict=True):
        with torch.no_grad():
            best = student(torch.tensor([row])).logits[0].argmax(dim=-1)
        for position in range(0, len(row) - 1):
            if (position + len(row)) % (2 * VERIFIED_EVERY) == 0:
                logits[position, best[position]] = 20.0
    return rows, teacher


@pytest.fixture
def some_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both labels occur."""
    rows, teacher = agreeing()
    monkeypatch.setattr("tests.test_head_terms.make_rows", lambda: (rows, teacher))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_verification_against_a_dense_reference(
    some_agree: None, kind: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels, loss and gradients, for every kind of targets and however the logits are divided into chunks."""
    if chunk is not None:
        monkeypatch.setattr(head_loss, "chunk_size", lambda vocab_size: chunk)
    student = headed()
    batch = make_batch(*make_rows(), kind=kind)
    labels, certain, total = reference_verification(student)
    assert set(labels) == {0.0, 1.0}
    noted: list[Verified] = []
    monkeypatch.setattr(
        "distill.objective.verification_loss",
        lambda head, states, verified: (noted.append(verified), verification_loss(head, states, verified))[1],
    )
    _, parts = ready(student, HEADS)(student, batch, total=batch.count(), share=1.0, fraction=0.5)
    assert noted[0].agreed.tolist() == labels
    torch.testing.assert_close(noted[0].certain, certain, rtol=2e-5, atol=2e-5)
    expected = HEADS.lambda_verification * VERIFIED_EVERY * total / batch.count()
    assert float(parts["verification"]) == pytest.approx(expected, rel=2e-5)


def test_verification_gradients_equal_those_of_the_whole(some_agree: None) -> None:
    """Of the head: as from all states at once, with autograd alone. Of everything before it: none."""
    only = HEADS.model_copy(update={"alpha": 0.0, "beta": 0.0, "lambda_so8t": 0.0, "lambda_safety": 0.0})
    one, other = headed(), headed()
    batch = make_batch(*make_rows())
    loss, parts = ready(one, only)(one, batch, total=batch.count(), share=1.0, fraction=0.5)
    loss.backward()
    assert set(parts) == {"verification"}
    output = other(batch.tokens)
    places = chosen_places(list(LENGTHS))
    found, certain, _ = reference_verification(other)
    labels = torch.tensor(found)
    odds = torch.stack(
        [
            other.verification_head(output.last_hidden_state[row, t], sure)
            for (row, t), sure in zip(places, certain, strict=True)
        ]
    )
    chances = 1.0 / (1.0 + torch.exp(-odds))
    plain = -(labels * chances.log() + (1.0 - labels) * (1.0 - chances).log()).sum()
    weighted = only.lambda_verification * VERIFIED_EVERY * plain / batch.count()
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
    """Every parameter of both heads still has a gradient: several processes must agree on what is exchanged."""
    student = headed()
    batch = make_batch(*make_rows(lengths))
    assert len(Verified.of(batch).rows) == 0
    batch = replace(batch, prompts=replace(make_prompts(1), weights=torch.zeros(1)))
    loss, parts = ready(student, HEADS)(student, batch, total=9, share=0.1, fraction=0.5)
    assert float(parts["verification"]) == 0.0 and float(parts["safety"]) == 0.0
    loss.backward()
    for name, parameter in student.named_parameters():
        if name.startswith(HEAD_NAMES):
            assert parameter.grad is not None and not parameter.grad.any(), name


# -- safety ------------------------------------------------------------------------------------------------


def reference_safety(student: SO8TForCausalLM, prompts: Prompts) -> float:
    """Mean −Σ label · log p at the last token, one prompt at a time, without padding."""
    total = 0.0
    for row, length, label in zip(prompts.tokens, prompts.lengths, prompts.labels, strict=True):
        with torch.no_grad():
            state = student(row[None, : int(length)]).last_hidden_state[0, -1].double().numpy()
        weight, bias = (p.detach().double().numpy() for p in student.safety_head.parameters())
        odds = np.exp(weight @ state + bias)
        total -= sum(float(share) * math.log(p) for share, p in zip(label, odds / odds.sum(), strict=True))
    return total / len(prompts.tokens)


@pytest.mark.parametrize("hard", [True, False])
def test_safety_against_a_plain_reference(hard: bool) -> None:
    """Cross-entropy with hard labels and with probabilities; from the last real token, whatever the padding."""
    student = headed()
    labels = torch.eye(3)[[0, 1, 2, 2, 0]] if hard else None
    prompts = make_prompts(5, labels)
    expected = reference_safety(student, prompts)
    assert float(safety_loss(student, prompts).detach()) == pytest.approx(expected, rel=2e-5)
    filled = prompts.tokens.clone()
    for row, length in enumerate(prompts.lengths.tolist()):
        filled[row, length:] = 77
    filled = torch.nn.functional.pad(filled, (0, 3), value=5)
    again = safety_loss(student, replace(prompts, tokens=filled))
    assert float(again.detach()) == pytest.approx(expected, rel=2e-5)
    weights = torch.tensor([0.5, 0.0, 0.0, 0.0, 0.0])
    first = replace(
        prompts, tokens=prompts.tokens[:1], lengths=prompts.lengths[:1], labels=prompts.labels[:1]
    )
    some = safety_loss(student, replace(prompts, weights=weights))
    assert float(some.detach()) == pytest.approx(0.5 * reference_safety(student, first), rel=2e-5)


def test_safety_gradients_against_autograd_alone() -> None:
    """The head's is that of the plain loss; what goes on into the layers is that at ``BODY_GRADIENT``."""
    one, other, prompts = headed(), headed(), make_prompts(5)
    safety_loss(one, prompts).backward()
    states = torch.stack(
        [
            other(row[None, : int(length)]).last_hidden_state[0, -1]
            for row, length in zip(prompts.tokens, prompts.lengths, strict=True)
        ]
    )
    (-(prompts.labels * other.safety_head(states).softmax(dim=-1).log()).sum() / 5).backward()
    assert 0.0 < BODY_GRADIENT < 1.0
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        if theirs.grad is None:
            assert mine.grad is None, name
        else:
            assert mine.grad is not None and theirs.grad.any(), name
            factor = 1.0 if name.startswith("safety_head.") else BODY_GRADIENT
            torch.testing.assert_close(mine.grad, factor * theirs.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_every_part_is_reported_and_adds_up() -> None:
    """All seven parts and their sum; the parts of the distillation are what they are without heads."""
    student, plain = headed(), make_student()
    bare = make_batch(*make_rows())
    batch = replace(bare, prompts=make_prompts(5))
    loss, parts = ready(student, HEADS)(student, batch, total=batch.count(), share=1.0, fraction=0.5)
    bend = parts.pop("second_difference")
    assert set(parts) == {"kd", "ce", "pet", "inertia", "non_commutation", "verification", "safety"}
    assert all(float(part) > 1e-3 and not part.requires_grad for part in parts.values())
    assert loss.item() == pytest.approx(sum(float(part) for part in parts.values()), rel=1e-5)
    expected = HEADS.lambda_safety * reference_safety(student, make_prompts(5))
    assert float(parts["safety"]) == pytest.approx(expected, rel=2e-5)
    _, without = ready(plain, HEADS)(plain, bare, total=batch.count(), share=1.0, fraction=0.5)
    assert set(without) == {"kd", "ce", "pet", "inertia", "non_commutation", "second_difference"}
    assert all(float(without[name]) == float(parts.get(name, bend)) for name in without)


def test_a_step_without_prompts() -> None:
    """The safety term is 0, and every parameter of its head has a gradient of 0, not none."""
    student, batch = headed(), make_batch(*make_rows())
    loss, parts = ready(student, HEADS)(student, batch, total=batch.count(), share=1.0, fraction=0.5)
    assert float(parts["safety"]) == 0.0
    loss.backward()
    for parameter in student.safety_head.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("name", ["safety", "verification"])
def test_a_weight_of_zero_removes_the_term(name: str) -> None:
    """It is not reported, its head has no gradient, and the others are as before."""
    student = headed()
    batch = replace(make_batch(*make_rows()), prompts=make_prompts(5))
    config = HEADS.model_copy(update={f"lambda_{name}": 0.0})
    loss, parts = ready(student, config)(student, batch, total=batch.count(), share=1.0, fraction=0.5)
    whole = ready(student, HEADS)(student, batch, total=batch.count(), share=1.0, fraction=0.5)[1]
    assert parts == {key: value for key, value in whole.items() if key != name}
    loss.backward()
    for key, parameter in student.named_parameters():
        if key.startswith(f"{name}_head."):
            assert parameter.grad is None or not parameter.grad.any()


# -- a step in parts ---------------------------------------------------------------------------------------


def step_in_parts(accumulation: int, world: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Parts and gradients of a step over all rows, divided among micro-batches and processes."""
    student, prompts = headed(), prompt_set()
    rows, teacher = make_rows()
    total, sums = sum(LENGTHS) - len(LENGTHS), dict[str, float]()
    for rank in range(world):
        for part in micro_batches(range(len(rows)), accumulation, rank, world):
            batch = make_batch([rows[i] for i in part.indices], [teacher[i] for i in part.indices])
            batch = replace(batch, prompts=prompts.batch(3, 3, part.place, part.places))
            loss, parts = ready(student, HEADS)(
                student, batch, total=total, share=batch.count() / total, fraction=0.5
            )
            (loss * float(part.counts)).backward()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float(value) * part.counts
    return sums, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def prompt_set(vocab_size: int = 96) -> PromptSet:
    """Seven prompts of different lengths with soft labels."""
    made = make_prompts(7)
    tokens = [
        (row[: int(n)].numpy() % vocab_size).astype(np.int32)
        for row, n in zip(made.tokens, made.lengths, strict=True)
    ]
    labels = [(float(a), float(e), float(r)) for a, e, r in made.labels]
    return PromptSet([SafetyPrompt(str(n), str(n), "", row) for n, row in enumerate(labels)], tokens, 0)


@pytest.mark.parametrize(("accumulation", "world"), [(8, 1), (3, 1), (1, 3), (2, 2), (4, 3)])
def test_parts_of_a_step_do_not_matter(accumulation: int, world: int) -> None:
    """Eight sequences at once, one by one, or among processes of which some have none: the same step."""
    whole, gradients = step_in_parts(1, 1)
    parts, mine = step_in_parts(accumulation, world)
    assert parts == pytest.approx(whole, rel=1e-4) and {"safety", "verification"} <= parts.keys()
    assert mine.keys() == gradients.keys() == dict(headed().named_parameters()).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def with_prompts(data: TrainingData) -> TrainingData:
    """The same data, and three prompts in every step."""
    return replace(data, prompts=prompt_set(VOCAB), prompts_together=3)


def trained(data: TrainingData, folder: Path, accumulation: int) -> tuple[SO8TForCausalLM, list[dict]]:
    """A student with heads after training, and its metrics."""
    student = make_student(16, 2, VOCAB, heads=True)
    folder.mkdir()
    config = TRAIN.model_copy(update={"batch_size": 8, "accumulation": accumulation})
    train(student, data, Objective(LOSS), config, folder, lambda step, text: None)
    return student, [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


def test_accumulation_does_not_change_training(tmp_path: Path) -> None:
    """1 × 8 and 8 × 1: the same losses of both heads in every step and the same student in the end."""
    data = with_prompts(make_data(tmp_path))
    (one, lines), (other, parts) = (
        trained(data, tmp_path / str(accumulation), accumulation) for accumulation in (1, 8)
    )
    for line, part in zip(lines, parts, strict=True):
        assert line.keys() == part.keys() >= {"safety", "verification", "rotation_drift", "second_difference"}
        numbers = {name: value for name, value in line.items() if name != "kind"}
        found = {name: value for name, value in part.items() if name != "kind"}
        assert found == pytest.approx(numbers, rel=1e-4, abs=1e-6)
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, msg=name)
    assert all(line["safety"] > 0.0 for line in lines) and lines[-1]["safety"] < lines[0]["safety"]
    json.dumps(lines)


def test_heads_are_clipped_by_themselves(tmp_path: Path) -> None:
    """However steep the verification term is, the rest of the student learns the same, to the bit."""
    data, weights = make_data(tmp_path), []
    for factor in (0.2, 1e5):
        student = make_student(16, 2, VOCAB, heads=True)
        (tmp_path / str(factor)).mkdir()
        loss = LOSS.model_copy(update={"lambda_verification": factor, "lambda_safety": 0.0})
        train(student, data, Objective(loss), TRAIN, tmp_path / str(factor), lambda step, text: None)
        weights.append(student.state_dict())
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]) or name.startswith(HEAD_NAMES), name
    assert not torch.equal(*(found["verification_head.output.weight"] for found in weights))


def test_matrices_of_the_heads_are_trained(tmp_path: Path) -> None:
    """Each parameter of a head is in one group of the optimizer and has moved by the end."""
    student = make_student(16, 2, VOCAB, heads=True)
    groups = build_optimizer(student, TRAIN, 16).param_groups
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(student.parameters()))
    after, _ = trained(with_prompts(make_data(tmp_path)), tmp_path / "run", 1)
    for name, parameter in student.named_parameters():
        if name.startswith(HEAD_NAMES):
            assert not torch.equal(parameter, dict(after.named_parameters())[name]), name


def test_a_batch_moves_with_its_prompts() -> None:
    """To another device, every tensor of them."""
    batch = replace(make_batch(*make_rows()), prompts=make_prompts(3))
    moved = batch.to(torch.device("meta")).prompts
    assert moved is not None and set(vars(moved)) == {"tokens", "lengths", "labels", "weights"}
    assert all(part.device.type == "meta" for part in vars(moved).values())
