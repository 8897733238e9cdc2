"""What is shown of anything that can be reported on, by terminal and page alike: a run, weights, or two of them."""

from __future__ import annotations

from dataclasses import dataclass

from distill.reports.charts import charts, comparison_charts
from distill.reports.drawing import Chart
from distill.reports.parts import Section
from distill.reports.report import Comparison, Report
from distill.reports.tables import comparison_sections, sections
from distill.reports.verdict import Fact
from distill.reports.weight_charts import weight_charts, weight_comparison_charts
from distill.reports.weight_comparison import WeightsComparison
from distill.reports.weight_tables import weight_comparison_sections, weight_sections
from distill.reports.weights import WeightsReport

Content = Report | Comparison | WeightsReport | WeightsComparison


@dataclass(frozen=True)
class Told:
    """A report in words, tables and charts. ``verdicts``: facts, each under a heading where there are several;
    ``charts``: by the key of the section they go with."""

    title: str
    lead: str
    verdicts: list[tuple[str, list[Fact]]]
    sections: list[Section]
    charts: dict[str, list[Chart]]


def tell(content: Content) -> Told:
    """What is shown of it."""
    if isinstance(content, Report):
        lead = "What the run says, from its own records."
        return Told(content.name, lead, [("", content.verdict)], sections(content), charts(content))
    if isinstance(content, WeightsReport):
        lead = "What the weights say by themselves; no model was run."
        verdicts = [("", content.verdict)]
        return Told(content.name, lead, verdicts, weight_sections(content), weight_charts(content))
    first, second = content.first, content.second
    title = f"{first.name} and {second.name}"
    verdicts = [(f"A: {first.name}", first.verdict), (f"B: {second.name}", second.verdict)]
    if isinstance(content, Comparison):
        lead = "What the runs say, from their own records."
        return Told(title, lead, verdicts, comparison_sections(content), comparison_charts(content))
    lead = "What the weights of two files say by themselves, tensor by tensor; no model was run."
    verdicts.append(("A and B", content.verdict))
    return Told(title, lead, verdicts, weight_comparison_sections(content), weight_comparison_charts(content))
