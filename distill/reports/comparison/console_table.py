"""A comparison in the terminal: one row a model, the teacher's first, in several tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.markup import escape
from rich.table import Table

from distill.evaluation.records import Comparison, Fidelity, ModelEvaluation
from distill.metrics.intervals import Figure, ratios
from distill.metrics.safety import SafetyScore
from distill.reports.render.terminal import printable
from distill.runtime.format import human_bytes, human_count
from distill.runtime.progress import Console

Cell = Callable[[ModelEvaluation], str]
NOTHING = "–"
NAME_WIDTH = 26


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print what the models were compared on, and the tables."""
    rich = console.rich
    words = f"{comparison.sequences:,} sequences, {comparison.positions:,} next tokens: {comparison.text}"
    rich.print(f"\n{escape(printable(words))}", soft_wrap=True)
    if comparison.skipped:
        rich.print(f"{comparison.skipped:,} more sequences were too long for a model's context.")
    for table in tables(comparison):
        rich.print(table)
    rich.print("[dim]Below each mean its 95 % interval, from drawing whole sequences again.[/]")


def tables(comparison: Comparison) -> list[Table]:
    """The tables; those that nothing was measured for are left out."""
    models = [comparison.teacher, *comparison.students]
    found = [
        _table("Fidelity to the teacher (KL in nats per token)", models, _fidelity()),
        _table("As the teacher's draft, and by itself", models, _drafting(comparison)),
        _language(models),
    ]
    if any(model.safety is not None for model in models):
        found.append(_table("Safety head", models, _safety(models)))
    if names := _benchmarks(models):
        found.append(_harness(models, names))
    return [*found, _cost(models)]


def _table(title: str, models: Sequence[ModelEvaluation], columns: Sequence[tuple[str, Cell]]) -> Table:
    """One row a model, so that many of them find room."""
    table = Table(title=title, title_justify="left")
    short = max(len(_words(models[0])) + len(" (teacher)"), *map(len, map(_words, models))) <= NAME_WIDTH
    table.add_column("", overflow="fold", no_wrap=short)
    for words, _ in columns:
        table.add_column(words, justify="right")
    for place, model in enumerate(models):
        table.add_row(_name(model, place), *(cell(model) for _, cell in columns))
    return table


def _words(model: ModelEvaluation) -> str:
    return printable(model.name).removesuffix(".gguf")


def _name(model: ModelEvaluation, place: int) -> str:
    name = escape(_words(model))
    return f"{name} [dim](teacher)[/]" if place == 0 else name


def _of_student(read: Callable[[Fidelity], str], of_teacher: str) -> Cell:
    return lambda model: of_teacher if model.fidelity is None else read(model.fidelity)


def _fidelity() -> list[tuple[str, Cell]]:
    return [
        ("KL", _of_student(lambda f: _number(f.kl), "0")),
        ("reverse KL", _of_student(lambda f: _number(f.reverse_kl), "0")),
        ("top token", _of_student(lambda f: _share(f.top1), "100 %")),
        ("top 5 shared", _of_student(lambda f: _share(f.top5), "100 %")),
    ]


def _drafting(comparison: Comparison) -> list[tuple[str, Cell]]:
    measured = [student.fidelity for student in comparison.students if student.fidelity is not None]
    draft = measured[0].draft_length if measured else 0
    prefix = max((fidelity.prefix_length for fidelity in measured), default=0)
    columns = [
        ("drafted tokens accepted", _of_student(lambda f: _share(f.acceptance), NOTHING)),
        (
            f"tokens a pass, {draft} drafted",
            _of_student(lambda f: f"{f.tokens_per_pass:.2f}", NOTHING),
        ),
    ]
    if prefix:
        columns += [
            (
                f"greedy tokens alike, of {prefix}",
                _of_student(lambda f: _optional(f.greedy_prefix, _length), NOTHING),
            ),
            ("greedy answers alike", _of_student(lambda f: _optional(f.greedy_same, _share), NOTHING)),
        ]
    return columns


def _language(models: Sequence[ModelEvaluation]) -> Table:
    rows: list[tuple[str, Cell]] = [
        ("perplexity", lambda model: _perplexity(model.perplexity)),
        ("calibration error", lambda model: f"{model.calibration_error:.4f}"),
    ]
    if (task := models[0].task) is not None:
        name = f"right answers, {escape(printable(task.name))} ({task.prompts})"
        rows.append((name, lambda model: NOTHING if model.task is None else _share(model.task.share)))
    return _table("Language", models, rows)


def _safety(models: Sequence[ModelEvaluation]) -> list[tuple[str, Cell]]:
    def of_score(read: Callable[[SafetyScore], str]) -> Cell:
        return lambda model: NOTHING if model.safety is None else read(model.safety)

    def ratio(place: int) -> Cell:
        def read(score: SafetyScore) -> str:
            found = ratios(score)[place]
            return NOTHING if found.value is None else _share(Figure(found.value, found.low, found.high))

        return of_score(read)

    scores = [model.safety for model in models if model.safety is not None]
    return [
        *((found.name, ratio(place)) for place, found in enumerate(ratios(scores[0])[:3])),
        ("accuracy", of_score(lambda score: f"{score.accuracy:.1%}")),
        ("prompts", of_score(lambda score: f"{score.prompts:,}")),
    ]


def _benchmarks(models: Sequence[ModelEvaluation]) -> list[tuple[str, str]]:
    """Tasks and metrics of the harness that any model has; standard errors stand beside their figure."""
    names = {(task, metric) for model in models for task, found in model.harness.items() for metric in found}
    return sorted((task, metric) for task, metric in names if "_stderr" not in metric)


def _benchmark_row(task: str, metric: str) -> tuple[str, Cell]:
    name, comma, chain = metric.partition(",")
    error_name = f"{name}_stderr{comma}{chain}"

    def cell(model: ModelEvaluation) -> str:
        found = model.harness.get(task, {})
        if metric not in found:
            return NOTHING
        error = found.get(error_name)
        return f"{found[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")

    return f"{escape(printable(task))} {escape(printable(metric))}", cell


def _harness(models: Sequence[ModelEvaluation], names: Sequence[tuple[str, str]]) -> Table:
    """One column a model here: the tasks may be many."""
    table = Table(title="lm-evaluation-harness", title_justify="left")
    table.add_column("")
    for place, model in enumerate(models):
        table.add_column(_name(model, place), justify="right", overflow="fold")
    for words, cell in (_benchmark_row(*name) for name in names):
        table.add_row(words, *(cell(model) for model in models))
    return table


def _cost(models: Sequence[ModelEvaluation]) -> Table:
    rows: list[tuple[str, Cell]] = [
        ("type", lambda model: model.file_type or NOTHING),
        ("weights", lambda model: human_count(model.parameters)),
        ("size", lambda model: human_bytes(model.file_bytes)),
        ("memory", lambda model: human_bytes(model.peak_memory)),
        ("reading", lambda model: f"{model.prompt_speed:,.0f}"),
        ("writing", lambda model: f"{model.generation_speed:,.0f}"),
    ]
    return _table("Size, peak memory of llama.cpp's process, speed in tokens per second", models, rows)


def _optional(figure: Figure | None, write: Callable[[Figure], str]) -> str:
    return NOTHING if figure is None else write(figure)


def _with_interval(figure: Figure, write: Callable[[float], str]) -> str:
    """A mean, and its interval on a line below."""
    if figure.low is None or figure.high is None:
        return write(figure.value)
    return f"{write(figure.value)}\n[dim]{write(figure.low).removesuffix('%')}–{write(figure.high)}[/]"


def _number(figure: Figure) -> str:
    return _with_interval(
        figure, lambda value: f"{value:.4f}" if value >= 0.001 or value == 0 else f"{value:.1e}"
    )


def _share(figure: Figure) -> str:
    return _with_interval(figure, lambda value: f"{value:.1%}")


def _length(figure: Figure) -> str:
    return _with_interval(figure, lambda value: f"{value:.1f}")


def _perplexity(figure: Figure) -> str:
    return _with_interval(figure, lambda value: f"{value:,.2f}")
