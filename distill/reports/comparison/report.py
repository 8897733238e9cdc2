"""The report of ``distill evaluate``."""

from __future__ import annotations

from distill.evaluation.records import Comparison
from distill.reports.comparison.charts import charts
from distill.reports.comparison.facts import trade_facts, verdict_of
from distill.reports.comparison.sections import sections
from distill.reports.document import Document


def document_of(comparison: Comparison) -> Document:
    """What the page says: the verdict, tables and charts, nothing escaped but names in charts."""
    names = [student.name for student in comparison.students]
    teacher = comparison.teacher.name
    title = (
        f"{names[0]} and {teacher}" if len(names) == 1 else f"{len(names)} students of {teacher}"
    )
    lead = "How near a student comes to its teacher, and what it takes; all on the same text."
    verdict = verdict_of(comparison.students)
    verdicts = [(f"Verdict: {verdict.level}", verdict.facts), ("Cost", trade_facts(comparison))]
    return Document(title, lead, verdicts, sections(comparison), charts(comparison))
