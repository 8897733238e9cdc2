"""From what was named on the command line to its report: document, page or terminal."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console as RichConsole
from rich.markup import escape

from distill.reports.document import Document
from distill.reports.inputs import weights_among
from distill.reports.render.html import write_page
from distill.reports.render.terminal import print_report
from distill.reports.run.charts import charts, comparison_charts
from distill.reports.run.report import Comparison, Report, compare, read_report
from distill.reports.run.sections import comparison_sections, sections
from distill.reports.weights.charts import weight_charts, weight_comparison_charts
from distill.reports.weights.comparison import WeightsComparison, compare_weights
from distill.reports.weights.report import WeightsReport, read_weights
from distill.reports.weights.sections import weight_comparison_sections, weight_sections
from distill.runs.folder import RunFolder
from distill.runtime.printable import printable_line
from distill.runtime.progress import Console

HEALTH = "How training went, which says nothing about use"
Content = Report | Comparison | WeightsReport | WeightsComparison


def document_of(content: Content) -> Document:
    """What is shown of it."""
    if isinstance(content, Report):
        lead = "What the run says, from its own records."
        verdicts = [(f"Verdict: {content.level}", content.verdict), (HEALTH, content.health)]
        return Document(content.name, lead, verdicts, sections(content), charts(content))
    if isinstance(content, WeightsReport):
        lead = "What the weights say by themselves; no model was run."
        verdicts = [("", content.verdict)]
        return Document(
            content.name, lead, verdicts, weight_sections(content), weight_charts(content)
        )
    first, second = content.first, content.second
    title = f"{first.name} and {second.name}"
    heads = (f"A: {first.name}", f"B: {second.name}")
    if isinstance(content, Comparison):
        facts = [[*one.verdict, *one.health] for one in (content.first, content.second)]
        verdicts = list(zip(heads, facts, strict=True))
        lead = "What the runs say, from their own records."
        return Document(
            title, lead, verdicts, comparison_sections(content), comparison_charts(content)
        )
    lead = "What the weights of two files say by themselves, tensor by tensor; no model was run."
    told = (first.verdict, second.verdict, content.verdict)
    verdicts = list(zip((*heads, "A and B"), told, strict=True))
    return Document(
        title,
        lead,
        verdicts,
        weight_comparison_sections(content),
        weight_comparison_charts(content),
    )


def write_run_report(folder: RunFolder, console: Console) -> None:
    """Write the run's ``report.html``.

    The run is complete without it: a failure is said, not raised.
    """
    try:
        write_page(document_of(read_report(folder.path, console)), folder.report)
    except Exception as error:  # whatever it is, it must not spoil a finished run
        words = " ".join(f"{type(error).__name__}: {error}".split())
        console.warn(
            f"{folder.report} could not be written ({words}); everything else of the run is "
            "complete"
        )


def report_paths(paths: list[Path], as_json: bool, output: Path | None) -> None:
    """``distill report``: print what is to be said of one run or file of weights, or of two side by
    side, and write the page where one is asked for.

    Raises:
        UserError, TeacherFileError: not one or two runs or files, nothing logged yet, a damaged
            file, or no place for a page.
        OSError: the disk refuses.
    """
    content = read_content(paths, None if as_json else Console())
    document = document_of(content)
    if output is not None:
        write_page(document, output)
    if as_json:
        print(json.dumps(content.to_json(), ensure_ascii=False, allow_nan=False))
        return
    console = RichConsole(highlight=False)
    print_report(document, console)
    if output is not None:
        console.print(f"\n[bold]Page[/] {escape(printable_line(str(output)))}", soft_wrap=True)


def read_content(paths: list[Path], progress: Console | None = None) -> Content:
    """Read what is to be reported on; ``progress`` shows how far that is, where it takes long.

    Raises:
        UserError, TeacherFileError: see ``report_paths``.
    """
    weights = weights_among(paths)
    if not weights:
        reports = [read_report(path, progress) for path in paths]
        return reports[0] if len(reports) == 1 else compare(*reports)
    return read_weights(paths[0], progress) if len(paths) == 1 else compare_weights(paths, progress)
