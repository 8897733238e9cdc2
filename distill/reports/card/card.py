"""``README.md`` of a run's folder: the model card, as the Hugging Face Hub reads it.

Every figure comes from the run's own records, and what they do not hold is not said. No prompt, no
text that a model wrote and no path of the machine gets in; names out of files are shown as text and
can be nothing else.

Front matter: https://huggingface.co/docs/hub/model-cards and the model card specification in
huggingface/hub-docs.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from distill.metrics.closeness import kl_name
from distill.reports.card.facts import CardFacts, License, read_facts
from distill.reports.card.sections import (
    checksums,
    data_name,
    files_section,
    license_text,
    limits,
    model_id,
    origin_section,
    student_name,
    summary,
    teacher_name,
)
from distill.reports.render.markdown import Markdown, code, escaped, one_line, section
from distill.reports.run.sections import (
    environment_section,
    result_section,
    safety_section,
    verification_section,
)
from distill.runs.folder import RunFolder
from distill.runtime.progress import Console
from teachers.atomic_files import write_whole

TEMPLATE = "model_card.md.jinja"
# Identifiers that the Hub knows (https://huggingface.co/docs/hub/repositories-licenses); others are
# "other" and a name.
_HUB_IDENTIFIERS = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-
sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc
lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 gemma
"""
HUB_LICENSES = frozenset(_HUB_IDENTIFIERS.split())

SEAL = "\n<!-- written by distill; SHA-256 of what stands above: "


def write_card(folder: RunFolder) -> Path:
    """Write the model card of a finished run, whole or not at all, in place of one that is there;
    returns where.

    Raises:
        UserError, TeacherFileError: see ``build_card``.
        OSError: the disk refuses.
    """
    text = build_card(folder)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_whole(folder.card, f"{text}{SEAL}{digest} -->\n".encode())
    return folder.card


def is_ours(folder: RunFolder) -> bool:
    """Whether the card is as this program wrote it: what people have added is theirs."""
    try:
        text, seal, digest = folder.card.read_text(encoding="utf-8").rpartition(SEAL)
    except (OSError, UnicodeDecodeError):
        return False
    return bool(seal) and digest == f"{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def update_card(folder: RunFolder, console: Console) -> None:
    """Write the card again, unless somebody has edited it.

    Raises:
        UserError, TeacherFileError, OSError: see ``write_card``.
    """
    if folder.card.exists() and not is_ours(folder):
        console.note(
            f"{folder.card} has been edited and is left as it is; delete it to have it written "
            "again"
        )
        return
    write_card(folder)


def build_card(folder: RunFolder) -> str:
    """The model card of a finished run; the same records give the same text.

    Raises:
        UserError: the run is not finished, or a file of it is damaged.
        TeacherFileError: the exported file is damaged.
    """
    facts = read_facts(folder)
    results = facts.results
    parts = [origin_section(facts), result_section(results)]
    parts += [safety_section(results.heads.safety)] if results.heads.safety else []
    parts += (
        [verification_section(results.heads.verification)] if results.heads.verification else []
    )
    parts += [files_section(facts.files)] if facts.files else []
    seed = facts.setting("seed")
    text: str = _template().render(
        facts=facts,
        front_matter=Markdown(front_matter(facts).to_yaml()),
        title=f"{student_name(facts)}, distilled from {teacher_name(facts)}",
        model_id=Markdown(model_id(facts)),
        summary=summary(facts),
        sections=[section(part) for part in parts],
        checksums=Markdown(checksums(facts.files)),
        limits=limits(facts),
        license=license_text(facts),
        environment=section(environment_section(results, seed if isinstance(seed, int) else None)),
    )
    return text


def front_matter(facts: CardFacts) -> ModelCardData:
    """What the Hub reads of the card.

    ``base_model`` is there only where the exported file names a model of the Hub. Its relation is
    "finetune" then: the Hub knows adapter, finetune, merge and quantized, no distilled ones, and
    would guess "quantized" from the format. No data set is named, for a file's name is not one of
    the Hub's.
    """
    metadata = facts.metadata
    identifier, name, link = _hub_license(metadata.license)
    results = _eval_results(facts)
    return ModelCardData(
        base_model=metadata.base_models or None,
        base_model_relation="finetune" if metadata.base_models else None,
        language=metadata.languages or None,
        library_name="gguf" if facts.plain is None else "transformers",
        license=identifier,
        license_name=name,
        license_link=link,
        model_name=f"{student_name(facts)}, distilled from {teacher_name(facts)}"
        if results
        else None,
        pipeline_tag="text-generation",
        tags=["distillation", "knowledge-distillation", "so8t", "gguf", "llama.cpp"],
        eval_results=results or None,
    )


def _hub_license(stated: License | None) -> tuple[str, str | None, str | None]:
    """Identifier, name and link as the Hub takes them."""
    if stated is None:
        return "unknown", None, None
    if stated.identifier.lower() in HUB_LICENSES:
        return stated.identifier.lower(), None, None
    name = stated.name or stated.identifier
    link = stated.link if stated.link and stated.link.startswith("https://") else None
    return "other", one_line(name), None if link is None else one_line(link)


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    """The exported file's scores as the Hub's ``model-index`` has them; figures that are not
    finite are left out."""
    evaluation = facts.results.evaluation
    kl = kl_name(evaluation.kl_over)
    scores = (
        (
            "kl_divergence",
            f"{kl} to the {evaluation.against} (nats per token)",
            evaluation.exported.kl,
        ),
        ("accuracy", f"same top token as the {evaluation.against}", evaluation.exported.agreement),
        ("perplexity", "perplexity", evaluation.exported.perplexity),
    )
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name=f"{data_name(facts)}, the part kept out of training",
            dataset_args={"positions": evaluation.positions},
            metric_type=kind,
            metric_name=name,
            metric_value=float(f"{value:.6g}"),
        )
        for kind, name, value in scores
        if value is not None
    ]


@cache
def _template() -> Any:
    """The card's template; whatever is put into it is text, unless it is ``Markdown``."""
    source = (
        (resources.files("distill.reports.card") / TEMPLATE)
        .read_text(encoding="utf-8")
        .replace("\r\n", "\n")
    )
    environment = Environment(
        finalize=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["code"] = code
    return environment.from_string(source)
