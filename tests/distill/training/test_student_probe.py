"""Looking at fixed text: readings against the model written out in float64; what a guard does."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.losses.batch import Batch
from distill.losses.objective import Objective
from distill.training.data import load_batch
from distill.training.distributed import TrainingModule
from distill.training.student_probe import ATTENDED, POSITIONS, SEQUENCES, StudentProbe
from stability import Event, Extra, Guard, Hooks, ModuleProbe, ProbeReading
from students.model.decoder import SO8TForCausalLM
from tests.support.references import reference_bucket_kl
from tests.support.stores import write_store
from tests.support.students import make_student
from tests.support.teachers import BigramTeacher
from tests.support.training import (
    LOSS,
    RECIPES,
    VOCAB,
    WIDTH,
    Plain,
    fresh_student,
    is_finite,
    make_data,
)

TOP = 8  # tokens that the targets of ``make_data`` keep


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    """Held-out text, in sequences of different length."""
    return make_data(tmp_path_factory.mktemp("data")).fixed_text()


@pytest.fixture
def student() -> SO8TForCausalLM:
    return fresh_student()


def probe_of(student: SO8TForCausalLM, batch: Batch, inside: bool = True) -> StudentProbe:
    return StudentProbe(TrainingModule(student, Objective(LOSS)), batch, inside=inside)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def rotated(x: Tensor, position: int, theta: float) -> Tensor:
    """One head's query or key ``[W]``: pairs (i, i + W/2) turned by position · θ^(−2i/W)."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


class Written:
    """One sequence through a student in float64.

    Per layer: outputs ``[T, D]``, attention ``[T][H][visible]``, feed-forward units ``[T, U]``.
    """

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
        shared = heads // config.num_key_value_heads  # type: ignore[attr-defined]
        theta = config.rope_theta  # type: ignore[attr-defined]
        q, k, v = (
            (x @ weights[f"self_attn.{kind}_proj.weight"].T).unflatten(1, (-1, width))
            for kind in "qkv"
        )
        turned = [[rotated(one, s, theta) for one in row] for s, row in enumerate(k)]
        mixed, rows = [], []
        for t in range(len(x)):
            rows.append([])
            parts = []
            for head in range(heads):
                mine = rotated(q[t, head], t, theta)
                seen = [row[head // shared] for row in turned[: t + 1]]
                scores = [float(mine @ key) / math.sqrt(width) for key in seen]
                powers = [math.exp(score - max(scores)) for score in scores]
                row = torch.tensor([power / sum(powers) for power in powers], dtype=torch.float64)
                rows[-1].append(row)
                parts.append(sum(share * v[s, head // shared] for s, share in enumerate(row)))
            mixed.append(torch.cat(parts))
        self.rows.append(rows)
        return torch.stack(mixed)


def entropy(row: Tensor) -> float:
    return -sum(value * math.log(value) for value in row.tolist() if value > 0)


def expected(runs: list[Written], batch: Batch, positions: int) -> dict[str, float]:
    """Everything a reading holds, from the definitions; the output at so many positions."""
    lengths = [len(run.logits) for run in runs]
    found: dict[str, float] = {}
    for number in range(len(runs[0].layers)):
        layer = f"model.layers.{number}"
        shares = [
            entropy(row) / math.log(len(row))
            for run, n in zip(runs[:ATTENDED], lengths, strict=False)
            for at_position in run.rows[number][1 : n - 1]
            for row in at_position
        ]
        found[f"attention_entropy:{layer}.self_attn"] = sum(shares) / len(shares)
        units = torch.cat([run.units[number][:-1] for run in runs]).abs()
        dead = (units.amax(dim=0) <= 1e-6 * units.max()).double().mean()
        found[f"dead_units:{layer}.mlp.down_proj"] = float(dead)
        states = torch.cat([run.layers[number][:-1] for run in runs])
        values = np.linalg.svd((states - states.mean(dim=0)).numpy(), compute_uv=False)
        found[f"hidden_rank:{layer}"] = math.exp(entropy(torch.from_numpy(values / values.sum())))
    logits = torch.cat([run.logits[:-1] for run in runs])
    tokens = torch.cat([row[: n - 1] for row, n in zip(batch.tokens, lengths, strict=True)])
    places = np.linspace(0, len(logits) - 1, min(len(logits), positions)).astype(int)
    said = logits[places].softmax(dim=-1)
    found["output_entropy"] = sum(map(entropy, said)) / len(places)
    found["information"] = entropy(said.mean(dim=0)) - found["output_entropy"]
    pairs = zip(
        BigramTeacher(VOCAB, WIDTH, seed=0).answers[tokens].double()[places],
        logits[places],
        strict=True,
    )
    kls = [reference_bucket_kl(theirs.numpy(), ours.numpy(), TOP, 1.0) for theirs, ours in pairs]
    found["loss"] = float(np.mean(kls))
    return found


def test_a_reading_is_what_the_definitions_say(
    monkeypatch: pytest.MonkeyPatch, text: Batch, student: SO8TForCausalLM
) -> None:
    """Attention, units, rank, output and KL to the teacher; with all positions and with some."""
    lengths = text.lengths.tolist()
    assert len(lengths) == SEQUENCES and len(set(lengths)) > 1  # some are padded
    pairs = zip(text.tokens, lengths, strict=True)
    runs = [Written(student, row[:length].tolist()) for row, length in pairs]
    for positions in (POSITIONS, 5):
        monkeypatch.setattr("distill.training.student_probe.POSITIONS", positions)
        found, wanted = probe_of(student, text)().flat(), expected(runs, text, positions)
        assert found.keys() == wanted.keys()
        loss = found.pop("loss")  # logits are kept in half precision
        assert loss == pytest.approx(wanted.pop("loss"), abs=1e-3), positions
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6), positions


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        result = operation(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self.bytes = max(self.bytes, one.untyped_storage().nbytes())
        return result


def test_long_text_is_looked_at_a_part_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No table of all queries and keys is made, in any precision; the reading is the same."""
    draw = np.random.default_rng(0)
    rows = [draw.integers(VOCAB, size=size).astype(np.int32) for size in (600, 560, 80, 590)]
    store = write_store(tmp_path, BigramTeacher(VOCAB, WIDTH, seed=0), rows, RECIPES["buckets"], 4)
    student = make_student(64, 2, VOCAB)
    probe = probe_of(student, load_batch(store, range(4)))
    table = student.config.num_attention_heads * 599 * 599
    module, found = "distill.training.student_probe.ATTENTION_CELLS", []
    for cells in (1 << 30, 1 << 16, 1):
        monkeypatch.setattr(module, cells)
        with Largest() as largest:
            found.append((probe().flat(), largest.bytes))
    (whole, most), (parts, some), (each, _) = found
    assert most >= 8 * table > 4 * table > some
    for reading in (parts, each):
        assert reading == pytest.approx(whole, rel=1e-6)


def test_dead_units_are_counted(text: Batch, student: SO8TForCausalLM) -> None:
    """Units whose gate or whose input is gone, in the layer where they are."""
    mlp = student.model.layers[1].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[3] = 0.0
        mlp.up_proj.weight[7] = 0.0
    assert probe_of(student, text)().dead_units == {
        "model.layers.0.mlp.down_proj": 0.0,
        "model.layers.1.mlp.down_proj": pytest.approx(2 / mlp.down_proj.in_features),
    }


def test_a_constant_model_says_nothing(text: Batch, student: SO8TForCausalLM) -> None:
    """Where all tokens look alike there is nothing to tell; what is inside may be left out."""
    with torch.no_grad():
        student.model.embed_tokens.weight[:] = student.model.embed_tokens.weight[:1].clone()
    reading = probe_of(student, text)()
    assert reading.information == pytest.approx(0.0, abs=1e-6)
    # The embeddings are tied: all logits are alike too.
    assert reading.output_entropy == pytest.approx(math.log(VOCAB), rel=1e-6)
    reading = probe_of(student, text, inside=False)()
    assert reading.attention_entropy == reading.dead_units == {} and len(reading.hidden_rank) == 2


def random_states() -> list[Any]:
    numpy = np.random.get_state()[1].tobytes()
    return [random.getstate(), numpy, torch.get_rng_state().tolist()]


def test_looking_leaves_everything_as_it_was(text: Batch, student: SO8TForCausalLM) -> None:
    """Modes of all parts, weights, gradients, hooks, random numbers; the same reading twice."""
    probe = probe_of(student, text)
    probe.model.train()
    student.model.layers[1].mlp.eval()
    gradient = torch.ones_like(student.model.norm.weight)
    student.model.norm.weight.grad = gradient
    modes = [module.training for module in probe.model.modules()]
    weights = {name: one.clone() for name, one in student.state_dict().items()}
    before = random_states()
    first, second = probe(), probe()
    assert isinstance(first, ProbeReading) and first == second and before == random_states()
    assert [module.training for module in probe.model.modules()] == modes
    for name, one in student.state_dict().items():
        assert torch.equal(one, weights[name]), name
    assert not any(module._forward_hooks for module in probe.model.modules())
    assert student.model.norm.weight.grad is gradient
    grown = {name for name, one in student.named_parameters() if one.grad is not None}
    assert grown == {"model.norm.weight"}


def test_a_probe_that_fails_leaves_no_hook(
    monkeypatch: pytest.MonkeyPatch, text: Batch, student: SO8TForCausalLM
) -> None:
    """And the model in the mode it was in."""
    probe = probe_of(student, text)
    probe.model.train()
    monkeypatch.setattr("distill.training.student_probe.hidden_rank", lambda states: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        probe()
    assert probe.model.training
    assert not any(module._forward_hooks for module in probe.model.modules())


def test_a_collapse_is_found_by_the_probe() -> None:
    """Learning that all answers are alike, step by step, while the loss looks fine."""
    loop = Plain()
    fixed = torch.randn(32, 8, generator=torch.Generator().manual_seed(7))
    probe = ModuleProbe(loop.model, lambda: 5.0 * loop.model(fixed))
    ranks = {f"hidden_rank:{place}" for place in range(6)}
    assert ranks | {"dead_units:1", "dead_units:4"} <= probe().flat().keys()
    assert loop.model.training
    readings: list[int] = []
    loop.guard = Guard(
        loop.model,
        loop.optim,
        hooks=Hooks(
            probe=probe,
            on_event=loop.events.append,
            on_probe=lambda step, reading: readings.append(step),
        ),
    )

    def harm(loop: Plain) -> None:
        if loop.tried[-1] >= 60 and not loop.events:
            loop.optim.zero_grad()
            loop.model(fixed).square().mean().backward()

    loop.harm = harm
    loop.run(160)
    assert readings[:3] == [0, 25, 50]
    event = loop.events[0]
    assert (event.action, event.signal) == ("rollback", "output information")
    assert event.to_step is not None and event.to_step < event.step <= 150


def careful_guard(loss: float) -> tuple[Plain, list[Event]]:
    """A loop whose fixed text always has this loss, after a collapse at the fourth reading."""
    loop, count = Plain(), itertools.count()
    loop.guard = Guard(
        loop.model,
        loop.optim,
        hooks=Hooks(
            probe=lambda: ProbeReading(0.1 if next(count) == 3 else 2.0, 1.0, loss),
            on_event=loop.events.append,
        ),
    )
    return loop, loop.events


def test_a_loss_below_zero_is_no_collapse() -> None:
    """After a collapse the fixed text is watched closely; a loss that stays is no trouble."""
    for loss in (-2.0, 0.0, 2.0):
        loop, events = careful_guard(loss)
        loop.run(150)
        actions = [event.action for event in events if event.action != "set_aside"]
        assert actions == ["rollback"], loss


def test_a_loss_that_no_batch_is_to_blame_for_does_not_end_training() -> None:
    """After a collapse the loss on the fixed text rises a little, whatever batches are taken.

    The same steps are not done again and again until all that is left is to give up.
    """
    loop = Plain(extra=Extra(lambda: None, lambda saved: None))
    collapsed = iter([True])

    def probe() -> ProbeReading:
        gone = loop.guard.state.steps == 100 and next(collapsed, False)
        return ProbeReading(0.1 if gone else 2.0, 1.0, 1.0 if loop.guard.state.steps <= 90 else 1.2)

    loop.guard.probe = probe
    loop.run(150)
    assert len(loop.tried) < 600 and loop.tried.count(94) <= 10


def test_a_guard_loaded_while_it_is_careful_can_go_back() -> None:
    """Killed after going back because of the data, and continued: the first damage is undone."""
    loop, events = careful_guard(2.0)
    loop.run(52)
    while not events:
        loop.run(loop.guard.state.steps + 1)
    loop.run(loop.guard.state.steps + 3)
    state = json.loads(json.dumps(loop.guard.state_dict()))
    second, events = careful_guard(2.0)
    second.model.load_state_dict(loop.model.state_dict())
    second.optim.load_state_dict(loop.optim.state_dict())
    second.guard.load_state_dict(state)
    assert second.guard.state.steps % 5

    def harm(loop: Plain) -> None:
        if len(loop.tried) == 2:
            loop.model[3].weight.data[0] = loop.loss = torch.tensor(math.nan)

    second.harm = harm
    second.run(second.guard.state.steps + 4)
    assert [event.action for event in events] == ["rollback"] and is_finite(second.model)
