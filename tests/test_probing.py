"""Looking at fixed text: readings of the student against the whole model written out in float64, and what a guard makes
of readings."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.objective import Batch, Objective
from distill.probing import ATTENDED, POSITIONS, SEQUENCES, StudentProbe
from distill.training_module import TrainingModule
from stability import Event, Extra, Guard, ModuleProbe, ProbeReading
from students.model import SO8TForCausalLM
from tests.conftest import BigramTeacher, make_student
from tests.test_engine import LOSS, VOCAB, WIDTH, make_data
from tests.test_guard import Plain, is_finite
from tests.test_losses import reference_bucket_kl

TOP = 8  # tokens that the targets of ``make_data`` keep


def fixed_text(tmp_path: Path) -> Batch:
    return make_data(tmp_path).fixed_text()


def probe_of(student: SO8TForCausalLM, batch: Batch, inside: bool = True) -> StudentProbe:
    return StudentProbe(TrainingModule(student, Objective(LOSS)), batch, inside=inside)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def rotated(x: Tensor, position: int, theta: float) -> Tensor:
    """One head's query or key ``[W]`` at a position: pairs (i, i + W/2) turned by position · θ^(−2i/W)."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


class Written:
    """One sequence through a student in float64. Per layer: outputs ``[T, D]``, attention rows ``[T][H][visible]``,
    feed-forward units ``[T, U]``."""

    def __init__(self, student: SO8TForCausalLM, tokens: list[int]) -> None:
        config = student.config
        self.layers: list[Tensor] = []
        self.rows: list[list[list[Tensor]]] = []
        self.units: list[Tensor] = []
        rotations = student.rotations().detach().double()
        wide = copy.deepcopy(student).double()
        x = wide.model.embed_tokens.weight.detach()[tokens]
        for number, layer in enumerate(wide.model.layers):
            weights = {name: one.detach() for name, one in layer.named_parameters()}
            inner = normed(x, weights["input_layernorm.weight"], config.rms_norm_eps)
            mixed = self._attend(inner, weights, config)
            gate = torch.block_diag(*(rotations[number, 1] @ rotations[number, 0]))
            x = x + mixed @ (weights["self_attn.o_proj.weight"] @ gate).T
            inner = normed(x, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
            gates = inner @ weights["mlp.gate_proj.weight"].T
            units = gates / (1 + (-gates).exp()) * (inner @ weights["mlp.up_proj.weight"].T)
            x = x + units @ weights["mlp.down_proj.weight"].T
            self.layers.append(x)
            self.units.append(units)
        final = normed(x, wide.model.norm.weight.detach(), config.rms_norm_eps)
        self.logits = final @ wide.lm_head.weight.detach().T

    def _attend(self, x: Tensor, weights: dict[str, Tensor], config: object) -> Tensor:
        width, heads = config.head_dim, config.num_attention_heads  # type: ignore[attr-defined]
        shared, theta = heads // config.num_key_value_heads, config.rope_theta  # type: ignore[attr-defined]
        q, k, v = (
            (x @ weights[f"self_attn.{kind}_proj.weight"].T).unflatten(1, (-1, width)) for kind in "qkv"
        )
        mixed, rows = [], []
        for t in range(len(x)):
            rows.append([])
            parts = []
            for head in range(heads):
                mine = rotated(q[t, head], t, theta)
                scores = [
                    float(mine @ rotated(k[s, head // shared], s, theta)) / math.sqrt(width)
                    for s in range(t + 1)
                ]
                powers = [math.exp(score - max(scores)) for score in scores]
                row = torch.tensor([power / sum(powers) for power in powers], dtype=torch.float64)
                rows[-1].append(row)
                parts.append(sum(share * v[s, head // shared] for s, share in enumerate(row)))
            mixed.append(torch.cat(parts))
        self.rows.append(rows)
        return torch.stack(mixed)


def entropy(row: Tensor) -> float:
    return -sum(value * math.log(value) for value in row.tolist() if value > 0)


def expected(student: SO8TForCausalLM, batch: Batch) -> dict[str, float]:
    """Everything a reading holds, from the definitions."""
    lengths = batch.lengths.tolist()
    runs = [Written(student, row[:n].tolist()) for row, n in zip(batch.tokens, lengths, strict=True)]
    found: dict[str, float] = {}
    for number in range(student.config.num_hidden_layers):
        shares = [
            entropy(row) / math.log(len(row))
            for run, n in zip(runs[:ATTENDED], lengths, strict=False)
            for at_position in run.rows[number][1 : n - 1]
            for row in at_position
        ]
        found[f"attention_entropy:model.layers.{number}.self_attn"] = sum(shares) / len(shares)
        units = torch.cat([run.units[number][: n - 1] for run, n in zip(runs, lengths, strict=True)]).abs()
        dead = (units.amax(dim=0) <= 1e-6 * units.max()).double().mean()
        found[f"dead_units:model.layers.{number}.mlp.down_proj"] = float(dead)
        states = torch.cat([run.layers[number][: n - 1] for run, n in zip(runs, lengths, strict=True)])
        values = np.linalg.svd((states - states.mean(dim=0)).numpy(), compute_uv=False)
        found[f"hidden_rank:model.layers.{number}"] = math.exp(
            entropy(torch.from_numpy(values / values.sum()))
        )
    logits = torch.cat([run.logits[: n - 1] for run, n in zip(runs, lengths, strict=True)])
    tokens = torch.cat([row[: n - 1] for row, n in zip(batch.tokens, lengths, strict=True)])
    places = np.linspace(0, len(logits) - 1, min(len(logits), POSITIONS)).astype(int)
    said = logits[places].softmax(dim=-1)
    found["output_entropy"] = sum(map(entropy, said)) / len(places)
    found["information"] = entropy(said.mean(dim=0)) - found["output_entropy"]
    answers = BigramTeacher(VOCAB, WIDTH, seed=0).answers[tokens].double()
    kls = [reference_bucket_kl(answers[place].numpy(), logits[place].numpy(), TOP, 1.0) for place in places]
    found["loss"] = float(np.mean(kls))
    return found


@pytest.mark.parametrize("positions", [POSITIONS, 5])
def test_a_reading_is_what_the_definitions_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positions: int
) -> None:
    """Attention, units, hidden rank, output and KL to the teacher, in every layer; with all positions and with some."""
    monkeypatch.setattr("distill.probing.POSITIONS", positions)
    monkeypatch.setattr("tests.test_probing.POSITIONS", positions)
    batch, student = fixed_text(tmp_path), make_student(16, 2, VOCAB)
    assert batch.tokens.shape[0] == SEQUENCES and len(set(batch.lengths.tolist())) > 1  # some are padded
    found, wanted = probe_of(student, batch)().flat(), expected(student, batch)
    assert found.keys() == wanted.keys()
    loss = found.pop("loss")
    assert loss == pytest.approx(wanted.pop("loss"), abs=1e-3)  # logits are kept in half precision
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_dead_units_are_counted(tmp_path: Path) -> None:
    """Units whose gate or whose input is gone, in the layer where they are."""
    student = make_student(16, 2, VOCAB)
    mlp = student.model.layers[1].mlp
    units = mlp.down_proj.in_features
    with torch.no_grad():
        mlp.gate_proj.weight[3] = 0.0
        mlp.up_proj.weight[7] = 0.0
    reading = probe_of(student, fixed_text(tmp_path))()
    assert reading.dead_units == {
        "model.layers.0.mlp.down_proj": 0.0,
        "model.layers.1.mlp.down_proj": pytest.approx(2 / units),
    }


def test_a_constant_model_says_nothing(tmp_path: Path) -> None:
    """Where all tokens look alike there is nothing to tell; what is inside is left out where that is asked for."""
    student = make_student(16, 2, VOCAB)
    with torch.no_grad():
        student.model.embed_tokens.weight[:] = student.model.embed_tokens.weight[:1].clone()
    reading = probe_of(student, fixed_text(tmp_path))()
    assert reading.information == pytest.approx(0.0, abs=1e-6)
    assert reading.output_entropy == pytest.approx(
        math.log(VOCAB), rel=1e-6
    )  # tied: all logits are alike too
    reading = probe_of(student, fixed_text(tmp_path), inside=False)()
    assert reading.attention_entropy == reading.dead_units == {} and len(reading.hidden_rank) == 2


def test_looking_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """Modes of all parts, weights, gradients, hooks and random numbers; the same reading twice."""
    student = make_student(16, 2, VOCAB)
    probe = probe_of(student, fixed_text(tmp_path))
    probe.model.train()
    student.model.layers[1].mlp.eval()
    gradient = torch.ones_like(student.model.norm.weight)
    student.model.norm.weight.grad = gradient
    modes = [module.training for module in probe.model.modules()]
    weights = {name: one.clone() for name, one in student.state_dict().items()}
    before = (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist())
    first, second = probe(), probe()
    after = (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist())
    assert isinstance(first, ProbeReading) and first == second and before == after
    assert [module.training for module in probe.model.modules()] == modes
    assert all(torch.equal(one, weights[name]) for name, one in student.state_dict().items())
    assert not any(module._forward_hooks for module in probe.model.modules())
    assert student.model.norm.weight.grad is gradient
    assert all(one.grad is None for name, one in student.named_parameters() if name != "model.norm.weight")


def test_a_probe_that_fails_leaves_no_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the model in the mode it was in."""
    student = make_student(16, 2, VOCAB)
    probe = probe_of(student, fixed_text(tmp_path))
    probe.model.train()
    monkeypatch.setattr("distill.probing.hidden_rank", lambda states: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        probe()
    assert probe.model.training and not any(module._forward_hooks for module in probe.model.modules())


# -- what a guard makes of it ------------------------------------------------------------------------------------------


def test_a_collapse_is_found_by_the_probe() -> None:
    """Learning that all answers are alike, step by step, while the loss looks fine."""
    loop = Plain()
    fixed = torch.randn(32, 8, generator=torch.Generator().manual_seed(7))
    probe = ModuleProbe(loop.model, lambda: 5.0 * loop.model(fixed))
    found = probe()
    assert {f"hidden_rank:{place}" for place in range(6)} | {
        "dead_units:1",
        "dead_units:4",
    } <= found.flat().keys()
    assert loop.model.training
    readings: list[int] = []
    loop.guard = Guard(
        loop.model,
        loop.optim,
        probe=probe,
        on_event=loop.events.append,
        on_probe=lambda step, reading: readings.append(step),
    )

    def harm(loop: Plain) -> None:
        if loop.tried[-1] >= 60 and not loop.events:
            loop.optim.zero_grad()
            loop.model(fixed).square().mean().backward()

    loop.harm = harm
    loop.run(160)
    assert readings[:3] == [0, 25, 50]
    event = loop.events[0]
    assert (event.action, event.signal) == ("rollback", "output information") and event.step <= 150
    assert event.to_step is not None and event.to_step < event.step


def careful_guard(losses: list[float]) -> tuple[Plain, list[Event]]:
    """A loop whose fixed text has these losses, one by one, after a collapse at the fourth reading."""
    loop, readings = Plain(), iter([*losses, *[losses[-1]] * 1000])
    count = iter(range(100_000))
    loop.guard = Guard(
        loop.model,
        loop.optim,
        probe=lambda: ProbeReading(0.1 if next(count) == 3 else 2.0, 1.0, next(readings)),
        on_event=loop.events.append,
    )
    return loop, loop.events


@pytest.mark.parametrize("loss", [-2.0, 0.0, 2.0])
def test_a_loss_below_zero_is_no_collapse(loss: float) -> None:
    """After a collapse the fixed text is watched closely; a loss there that does not change is no trouble."""
    loop, events = careful_guard([loss])
    loop.run(150)
    assert [event.action for event in events if event.action != "set_aside"] == ["rollback"]


def test_a_loss_that_no_batch_is_to_blame_for_does_not_end_training() -> None:
    """After a collapse the loss on the fixed text rises a little, whatever batches are taken: the same steps are not
    done again and again until there is nothing left but to give up."""
    loop = Plain(extra=Extra(lambda: None, lambda saved: None))
    collapsed = iter([True])

    def probe() -> ProbeReading:
        gone = loop.guard.steps == 100 and next(collapsed, False)
        return ProbeReading(0.1 if gone else 2.0, 1.0, 1.0 if loop.guard.steps <= 90 else 1.2)

    loop.guard.probe = probe
    loop.run(150)
    assert len(loop.tried) < 600 and loop.tried.count(94) <= 10


def test_a_guard_loaded_while_it_is_careful_can_go_back() -> None:
    """Killed after going back because of the data, and continued: the first damage is undone, not the end."""
    loop, events = careful_guard([2.0])
    loop.run(52)
    while not events:
        loop.run(loop.guard.steps + 1)
    loop.run(loop.guard.steps + 3)
    state = json.loads(json.dumps(loop.guard.state_dict()))
    second, events = careful_guard([2.0])
    second.model.load_state_dict(loop.model.state_dict())
    second.optim.load_state_dict(loop.optim.state_dict())
    second.guard.load_state_dict(state)
    assert second.guard.steps % 5

    def harm(loop: Plain) -> None:
        if len(loop.tried) == 2:
            loop.model[3].weight.data[0] = loop.loss = torch.tensor(math.nan)

    second.harm = harm
    second.run(second.guard.steps + 4)
    assert [event.action for event in events] == ["rollback"] and is_finite(second.model)
