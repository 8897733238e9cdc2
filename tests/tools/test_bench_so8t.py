"""``tools.studies.so8t`` compares what it says: one thing changed, all else the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from students.model.fold import fold
from tests.support.runs import PLAIN_PROMPTS
from tests.support.students import make_student
from tools.bench.so8t_cost import SIDES, freeze_identity, ratios, take_gates_out
from tools.studies.so8t import command_line, main, open_ablation
from tools.studies.so8t_ablation import all_variants, effective_rank, rises, verdict

pytestmark = pytest.mark.usefixtures("llama_here")
TOY = ["--size", "16x1", "--samples", "24", "--max-length", "24"]
TOY += ["--set", f"safety.labels={PLAIN_PROMPTS}"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a store, which the first of the tests fills."""
    return [*TOY, "--store", str(tmp_path_factory.mktemp("bench") / "store")]


def test_variants_begin_alike(store: list[str]) -> None:
    """The same weights but for gates and heads that are taken out; the same data."""
    bench = open_ablation(command_line().parse_args(["ablation", *store]))
    variants = all_variants(bench.run.loss)
    assert len({variant.name for variant in variants}) == len(variants) == 12
    assert len({str(variant.loss) for variant in variants[2:]}) == 10
    whole = bench.initial(variants[0], 1)
    full, folded = whole.state_dict(), fold(whole)
    for variant in variants[1:]:
        student = bench.initial(variant, 1)
        weights = student.state_dict()
        missing = {name.split("_head")[0] for name in full.keys() - weights.keys()}
        wanted = {"safety"} if variant.name in ("no-safety", "no-heads") else set()
        if variant.loss.lambda_verification == 0:
            wanted = wanted | {"verification"}
        assert missing == wanted, variant.name
        for name, value in weights.items():
            if not variant.gates and "o_proj" in name:  # does what the gate did to it
                torch.testing.assert_close(value, folded[name], rtol=1e-5, atol=1e-6)
                assert not torch.equal(value, full[name])
                continue
            same = variant.gates or "gate." not in name or "gate_proj" in name
            assert torch.equal(value, full[name] if same else torch.zeros_like(value)), name
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(bench.initial(variants[0], 2).state_dict()[name], full[name])


def test_ablation_runs_and_is_not_made_again(
    store: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.jsonl"
    options = "--epochs 2 --only full,no-gates,no-heads --seeds 0"
    options += " --set train.batch_size=2 --set train.precision=fp32"
    command = ["ablation", *store, *options.split(), "--json", str(path)]
    main(command)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["row"]: line for line in lines if "row" in line}
    assert set(found) == {"full", "no-gates", "no-heads"}
    assert len({line["tokens"] for line in found.values()}) == 1
    assert len({line["kl"] for line in found.values()}) == 3
    rotations = ("rotation_error", "rotation_drift", "largest_drift", "from_identity")
    for name in ("min_commutator", *rotations):
        assert found["no-gates"][name] == 0.0 < found["full"][name], name
    assert {"refuse_recall", "accuracy", "auroc"} <= found["full"].keys() - found["no-heads"].keys()
    assert 1.0 <= found["full"]["effective_rank"] <= 16.0
    assert found["no-gates"]["second_difference"] > 0
    capsys.readouterr()
    main(command)
    said = capsys.readouterr().out
    assert "3 of 3 results are there already" in said and "spread not known" in said
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum("row" in line for line in lines) == 3


def test_cost_runs(store: list[str], tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    options = "--large-size 32x1 --batch 2 --tokens 16 --vocab 300 --teacher-width 8"
    options += " --rounds 2 --warmup 1 --speed-rounds 1"
    main(["cost", *store, *options.split(), "--json", str(path)])
    found: dict[str, Any] = json.loads(path.read_text())
    assert len(found["steps"]) == len(found["files"]) == 2
    for steps in found["steps"]:
        assert {len(seconds) for seconds in steps["seconds"].values()} == {2}
        counts = [steps["parameters"][side] for side in SIDES]
        assert counts[0] == counts[1] < counts[2] < counts[3]
    for files in found["files"]:
        assert files["same_tensors"] and files["ratio_to_plain"]["generation"]["median"] > 0


def test_plain_attention_is_a_gate_at_the_identity() -> None:
    """The same logits; and gradients for everything but the gates, which are gone."""
    frozen, plain = make_student(32), make_student(32)
    freeze_identity(frozen)
    take_gates_out(plain)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 96, (2, 9)))
    torch.testing.assert_close(plain(tokens).logits, frozen(tokens).logits, rtol=1e-5, atol=1e-5)
    names = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert {name for name, _ in plain.named_parameters()} == names
    assert not plain.gates()


def test_figures() -> None:
    calm = [1.0, 1.1, 0.9] * 10
    assert rises([*calm, 1.05], 30) == pytest.approx((0.05, 0))
    assert rises([*calm, 9.0, 1.0], 8) == pytest.approx((8.0, 1))
    states = torch.zeros(64, 8)
    states[torch.arange(64), torch.arange(64) % 4] = 1.0
    rank = effective_rank(states)  # four corners lie in three dimensions
    assert rank == pytest.approx(3.0, rel=1e-6)
    said = verdict({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0, 2: 9.0})
    assert said == "+1.4 spreads (+1.0000; higher in 2 of 2)"
    assert ratios([2.0, 6.0, 3.0], [1.0, 2.0, 1.0])["median"] == 3.0
