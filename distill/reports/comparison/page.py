"""A comparison as one HTML file that opens offline: the page of ``distill.reports.render.html``, with what is told here."""

from __future__ import annotations

from pathlib import Path

from distill.evaluation.records import Comparison
from distill.reports.comparison.charts import charts
from distill.reports.comparison.tables import sections
from distill.reports.comparison.verdict import verdict
from distill.reports.document import Told
from distill.reports.inputs import require_page_path
from distill.reports.render.html import render
from teachers.atomic_files import write_whole


def write_page(comparison: Comparison, path: Path) -> None:
    """Write the page of a comparison (of ≥ 1 student), whole or not at all.

    Raises:
        UserError: the path is not one for a page.
        OSError: the disk refuses.
    """
    require_page_path(path)
    write_whole(path, render(told(comparison)).encode())


def told(comparison: Comparison) -> Told:
    """What the page says: the verdict, tables and charts, nothing escaped but names in charts."""
    names = [student.name for student in comparison.students]
    teacher = comparison.teacher.name
    title = f"{names[0]} and {teacher}" if len(names) == 1 else f"{len(names)} students of {teacher}"
    lead = "How near a student comes to its teacher, and what it takes; all on the same text."
    return Told(title, lead, [("", verdict(comparison))], sections(comparison), charts(comparison))
