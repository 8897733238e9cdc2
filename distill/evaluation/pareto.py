"""Which students are worth having: those that no other one beats in both of two figures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from distill.evaluation.records import Fidelity, ModelEvaluation


def fidelity_of(student: ModelEvaluation) -> Fidelity:
    """How near a student is; only the teacher has none."""
    assert student.fidelity is not None, f"{student.name} is no student"
    return student.fidelity


def kl_of(student: ModelEvaluation) -> float:
    """KL(teacher ‖ student), nats per token."""
    return fidelity_of(student).kl.value


def front(costs: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points on the Pareto front, both figures the lower the better, by rising first
    figure.

    A point is off the front if another is at least as good in both and better in one; equal points
    are all on it.
    """
    order = sorted(range(len(costs)), key=lambda place: costs[place])
    found, best = [], float("inf")
    for _, alike in groupby(order, key=lambda place: costs[place]):
        places = list(alike)
        if costs[places[0]][1] < best:
            best = costs[places[0]][1]
            found += places
    return found


def size_front(students: Sequence[ModelEvaluation]) -> list[int]:
    """Places of the students of which none is both smaller and nearer."""
    return front([(float(student.file_bytes), kl_of(student)) for student in students])


def speed_front(students: Sequence[ModelEvaluation]) -> list[int]:
    """Places of the students of which none both writes faster and is nearer; the fastest first."""
    return front([(-student.generation_speed, kl_of(student)) for student in students])


def quantisations(students: Sequence[ModelEvaluation]) -> list[list[ModelEvaluation]]:
    """Students that seem to be one model in several file types (same architecture and number of
    parameters, all file types different), the largest file first; groups of two at least."""
    groups: dict[tuple[str, int], list[ModelEvaluation]] = {}
    for student in students:
        groups.setdefault((student.architecture, student.parameters), []).append(student)
    found = []
    for group in groups.values():
        types = {student.file_type for student in group}
        if len(group) > 1 and len(types) == len(group) and "" not in types:
            found.append(sorted(group, key=lambda student: -student.file_bytes))
    return found
