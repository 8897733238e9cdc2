"""The comparison of recipes: rows differ in what they say, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distill.errors import UserError
from distill.training.data import split
from teachers.targets.recipe import Recipe
from tests.support.teachers import BigramTeacher
from tests.tools.test_objective_tools import make_store
from tools.studies import recipe as recipes
from tools.studies.results import Results, run_missing


def test_a_recipe_differs_in_what_it_says_alone(tmp_path: Path) -> None:
    """The same settings, the same result; the text it learns from is as short as it says."""
    store = make_store(tmp_path / "store", Recipe(num_topk=16))
    data = recipes.ShortData(store, split(store, 0.2, 0), 0, tokens=150)
    info = replace(BigramTeacher(60, 16, layers=4).info, vocab_size=60)
    teacher: Any = SimpleNamespace(info=info, embeddings=np.zeros((0, 0), dtype=np.float16))
    usual = ["train.batch_size=4", "train.precision=fp32", "begin=random"]

    def row(name: str, *settings: str) -> recipes.Recipe:
        return recipes.recipe(name, [*usual, *settings], "16x1")

    rows = [
        row("usual"),
        row("smaller", "train.batch_size=2"),
        row("faster", "rate=2"),
        row("short", "text=30"),
    ]
    no_file: Any = None
    bench = recipes.Bench(data, teacher, no_file, rows[0])
    results = Results(None, bench.settings())
    run_missing(bench, rows, [0, 1], results, lambda text: None)
    made = {(line["row"], line["seed"]): line for line in results.lines}
    assert len({line["kl_before"] for line in results.lines}) == 2  # one for each seed
    assert len({line["kl"] for line in results.lines}) == 8
    first = made["usual", 0]
    again = bench.measure(rows[0], 0)
    assert {name: first[name] for name in again if name != "seconds"} == {
        name: value for name, value in again.items() if name != "seconds"
    }
    assert made["smaller", 0]["steps"] > first["steps"]
    assert made["faster", 0]["peak_rate"] == pytest.approx(2 * first["peak_rate"])
    short = replace(data, text=30)
    learnt = {index for batch in short.batches(1, 4) for index in batch}
    few = [int(index) for index in data.split.train[: len(learnt)]]
    assert learnt == set(few) and int((store.lengths()[few] - 1).sum()) <= 30
    table = recipes.results_table(rows, [0, 1], results)
    change = [made["faster", seed]["kl"] / made["usual", seed]["kl"] - 1 for seed in (0, 1)]
    assert list(table.columns[3].cells)[2] == f"{change[0]:+.1%} {change[1]:+.1%}"


def test_a_recipes_figures_are_of_its_last_step(tmp_path: Path) -> None:
    """Also where the first weights were better."""
    store = make_store(tmp_path / "store", Recipe("dense"))
    data = recipes.ShortData(store, split(store, 0.2, 0), 0, tokens=100)
    info = replace(BigramTeacher(60, 16, layers=4).info, vocab_size=60)
    teacher: Any = SimpleNamespace(info=info)
    no_file: Any = None
    row = recipes.recipe("wild", ["train.precision=fp32", "begin=random", "rate=400"], "16x1")
    made = recipes.Bench(data, teacher, no_file, row).measure(row, 0)
    assert made["kl"] > 1.5 * made["kl_before"]
    assert made["kl_over_all"] == pytest.approx(made["kl"], rel=1e-3)


def test_a_recipe_that_means_nothing_is_refused() -> None:
    for bad in ("rate=fast", "rate=0", "rate=nan", "text=-1", "begin=nowhere", "unknown=1"):
        with pytest.raises(UserError, match=bad.partition("=")[0]):
            recipes.recipe(bad, [bad], "16x1")
    with pytest.raises(UserError, match=r"unknown key 'train\.nothing'"):
        recipes.recipe("wrong", ["train.nothing=1"], "16x1")
    for idle in (
        "train.epochs=3",
        "train.on_policy=0.5",
        "data.max_length=8",
        "student.init=random",
    ):
        with pytest.raises(UserError, match="changes nothing here"):
            recipes.recipe(idle, [idle], "16x1")
    with pytest.raises(UserError, match="all rows train one student"):
        recipes.varied("student.heads=2", [], "16x1")
