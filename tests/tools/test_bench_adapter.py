"""``tools.studies.adapter`` measures what it says, with the same batches in every way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM

from distill.config.loading import load_config
from distill.pipeline.capture import capture_only
from distill.runtime.progress import Console
from tests.support.runs import FEW_PROMPTS
from tools.models.make_base import make_base
from tools.studies.adapter import jobs_of, main, rates_table, ways_table
from tools.studies.adapter_training import FULL, LORA, QLORA, WAYS, Figures, Trial, run_trial
from tools.studies.full_finetune import WholeBase

pytestmark = pytest.mark.usefixtures("llama_here")
SETTINGS = (f"safety.labels={FEW_PROMPTS}", "data.held_out=0.2", "student.lora_rank=8")
STEPS, RATE = 8, 4.0
SAID = torch.tensor([[1, 5, 9, 200, 7]])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small store of the example teacher and a random base."""
    folder = tmp_path_factory.mktemp("adapter")
    config = load_config(None, {"data.samples": 48}, ["data.max_length=24", "safety.labels=none"])
    capture_only(config, folder / "store", Console(quiet=True))
    make_base(folder / "bases" / "qwen2", "qwen2", width=64, layers=2, steps=0)
    return folder


@pytest.fixture(scope="module")
def figures(place: Path) -> dict[str, Figures]:
    """Of LoRA in NF4 and without."""
    bases = {"qwen2": place / "bases" / "qwen2"}
    options = {"steps": STEPS, "batch": 8, "settings": SETTINGS}
    jobs = jobs_of(place / "store", bases, (QLORA, LORA), [RATE], **options)
    found = {}
    for job in jobs:
        (place / job.way).mkdir()
        found[job.way] = run_trial(Trial(job), place / job.way)
    return found


def test_figures_of_lora(figures: dict[str, Figures]) -> None:
    """LoRA, gates and heads alone are trained, KL falls, the file is the merged model."""
    for one in figures.values():
        assert 0 < one.trained < 0.6 * one.parameters
        # Of random weights, whose table of tokens is frozen:
        assert one.kl_after < one.kl_before - 0.03
        assert one.fall == 1 - one.kl_after / one.kl_before
        assert one.learning_rate == RATE * 0.5 / 64
        assert one.tokens_per_second > 0 and one.peak_bytes > one.before_bytes > 0
    four_bits, whole = figures[QLORA], figures[LORA]
    assert (four_bits.parameters, four_bits.trained) == (whole.parameters, whole.trained)
    assert four_bits.kl_before != whole.kl_before
    assert whole.state_bytes == 4 * (whole.parameters + 3 * whole.trained)
    # Numbers whose four bytes become half a one:
    in_layers = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
    saved = whole.state_bytes - four_bits.state_bytes
    assert saved > 3 * in_layers
    assert four_bits.logit_difference is not None and four_bits.logit_difference <= 1e-3
    assert four_bits.checkpoint_bytes is not None and four_bits.file_bytes is not None
    assert 4 * four_bits.trained < four_bits.checkpoint_bytes < four_bits.file_bytes
    assert whole.logit_difference is None


def test_all_weights_from_the_command_line(
    place: Path, figures: dict[str, Figures], capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own, with the base of the working folder and the batches of LoRA."""
    output = place / "figures.json"
    options: dict[str, Any] = {"workdir": place / "bases", "output": output}
    options |= {"steps": STEPS, "batch": 8}
    main(place / "store", "qwen2", FULL, settings=list(SETTINGS), **options)
    assert "100.0%" in capsys.readouterr().out
    (found,) = json.loads(output.read_text())["figures"]
    assert found["trained"] == found["parameters"] < figures[LORA].parameters
    assert found["state_bytes"] == 16 * found["parameters"]
    assert found["kl_before"] == pytest.approx(figures[LORA].kl_before, rel=1e-5)
    assert found["kl_after"] < 0.98 * found["kl_before"]
    assert found["extra_bytes"] == found["peak_bytes"] - found["before_bytes"] > 0
    plans = [Trial(replace(figures[LORA].job, way=way)).plan for way in WAYS]
    assert plans[0] == plans[1] == plans[2] and len(plans[0]) == STEPS


def test_a_whole_base_computes_as_the_base(place: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(place / "bases" / "qwen2", dtype=torch.float32)
    expected = plain(SAID).logits
    student = WholeBase(plain, 1000)
    torch.testing.assert_close(student(SAID).logits, expected[..., :1000])
    assert all(one.requires_grad for one in student.parameters())


def test_tables(figures: dict[str, Figures]) -> None:
    one = figures[QLORA]
    rates = {2.0: 0.5, 0.5: 0.7}
    found = [replace(one, job=replace(one.job, rate=x), kl_after=kl) for x, kl in rates.items()]
    table = rates_table(found, [4.0, 2.0, 0.5])
    headers = [column.header for column in table.columns]
    assert headers == ["kind", "way", "× 0.5", "× 2", "× 4", "best"]
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells[2:] == ["0.7000", "0.5000", "aborted", "× 2 (0.031)"]
    assert ways_table(found).row_count == 2


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    """The option and what to give instead."""
    cases: list[tuple[dict[str, Any], str]] = [
        ({"kinds": "llama,gpt2"}, "--kinds 'gpt2' is unknown; choose among llama"),
        ({"ways": "qlora,none"}, "--ways 'none' is unknown; choose among qlora, lora, full"),
        ({"rates": "1,0"}, "--rates '1,0': give numbers above 0"),
        ({"rates": "one"}, "--rates 'one': give numbers above 0"),
        ({}, "does not exist; give the folder that `distill capture` has filled"),
    ]
    for options, words in cases:
        with pytest.raises(typer.BadParameter) as refused:
            main(tmp_path / "nowhere", workdir=tmp_path, steps=1, batch=1, **options)
            pytest.fail(f"{options} are taken")
        assert words in str(refused.value)


def test_speed_is_of_consecutive_steps(figures: dict[str, Figures]) -> None:
    """A step that the guard took back, and what it skipped, do not count."""
    trial = Trial(figures[LORA].job)
    tokens = [sum(len(trial.store.tokens(one)) - 1 for one in batch) for batch in trial.plan]
    assert trial.speed([(1, 0.0), (2, 2.0), (4, 3.0), (2, 9.0)]) == tokens[1] / 2.0
