"""A report as one HTML file that needs nothing else: no network, no other file.

The charts are JSON in the page and Plotly's script is in it once. A content security policy names
the page's own scripts by their hash, so that nothing else could run or be loaded even if a name in
a file had got into the page as more than text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from distill import __version__
from distill.reports.document import Document
from distill.reports.inputs import require_page_path
from teachers.atomic_files import write_whole

TEMPLATE, SCRIPT = "report.html.jinja", "report.js"


def write_page(document: Document, path: Path) -> None:
    """Write the page of a report, whole or not at all.

    Raises:
        UserError: the path is not one for a page.
        OSError: the disk refuses.
    """
    require_page_path(path)
    write_whole(path, render(document).encode())


def render(document: Document) -> str:
    """The page of a report."""
    figures = {chart.key: chart.figure for some in document.charts.values() for chart in some}
    plotly, script = _plotly(), _source(SCRIPT)
    return _template().render(
        title=document.title,
        lead=document.lead,
        verdicts=document.verdicts,
        sections=[(part, document.charts.get(part.key, [])) for part in document.sections],
        figures=Markup(_script_json(figures)),
        plotly=Markup(plotly),
        script=Markup(script),
        script_hashes=[_hash(plotly), _hash(script)],
        version=__version__,
    )


def _script_json(content: Any) -> str:
    """JSON that cannot end the script element it is in."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _hash(script: str) -> Markup:
    """How a content security policy names a script."""
    return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'")


@cache
def _plotly() -> str:
    """Plotly's script."""
    from plotly.offline import get_plotlyjs

    script = str(get_plotlyjs()).replace("\r\n", "\n")  # as a browser reads it, for the hash
    assert "</script" not in script.lower() and "<!--" not in script
    return script


def _source(name: str) -> str:
    return (
        (resources.files("distill.reports.render") / name)
        .read_text(encoding="utf-8")
        .replace("\r\n", "\n")
    )


@cache
def _template() -> Any:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_source(TEMPLATE))
