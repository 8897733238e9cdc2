"""Pareto fronts: the students that no other one beats in both KL and a cost."""

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
    """Indices of the points on the Pareto front, both costs the lower the better, by the first.

    A point is off the front if another is at least as good in both and better in one.
    """
    order = sorted(range(len(costs)), key=costs.__getitem__)
    indices: list[int] = []
    best = float("inf")
    for (_, cost), equal in groupby(order, key=costs.__getitem__):
        if cost < best:
            best = cost
            indices += equal
    return indices


def size_front(students: Sequence[ModelEvaluation]) -> list[int]:
    """Indices of the students of which none is both smaller and nearer."""
    return front([(float(student.file_bytes), kl_of(student)) for student in students])


def speed_front(students: Sequence[ModelEvaluation]) -> list[int]:
    """Indices of the students of which none is both faster and nearer; the fastest first."""
    return front([(-student.generation_speed, kl_of(student)) for student in students])


def quantizations(students: Sequence[ModelEvaluation]) -> list[list[ModelEvaluation]]:
    """Students that seem to be one model in several file types (same architecture and number of
    parameters, all file types different), the largest file first; groups of two at least."""
    groups: dict[tuple[str, int], list[ModelEvaluation]] = {}
    for student in students:
        groups.setdefault((student.architecture, student.parameters), []).append(student)
    families = []
    for group in groups.values():
        types = {student.file_type for student in group}
        if len(group) > 1 and len(types) == len(group) and "" not in types:
            families.append(sorted(group, key=lambda student: -student.file_bytes))
    return families
