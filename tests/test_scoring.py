"""Scoring many sequences: batches of like length, rows back in order, and the hidden states behind the logits."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from students.model import SO8TForCausalLM
from teachers import example_teacher
from teachers.base import Sampling
from teachers.errors import TeacherError
from teachers.gguf_teacher import GGUFTeacher
from teachers.recipe import Recipe
from teachers.records import Answer, reduce
from teachers.scoring import LIKE_LENGTH, common_prefix, groups_of_like_length
from teachers.sketch import Basis

# Two tokens, some of like length, some not, and two that are longer than a batch of 512 tokens.
MIXED = [2, 60, 59, 5, 200, 61, 3, 17, 513, 18, 2, 64, 640, 7, 190, 33]
SHORT = [9, 30, 2, 28, 12]


def sequences_of(teacher: GGUFTeacher, lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    """Seeded sequences of the given numbers of tokens."""
    random = np.random.default_rng(seed)
    return [random.integers(3, teacher.info.vocab_size, n).astype(np.int32) for n in lengths]


def one_by_one(teacher: GGUFTeacher, sequences: list[np.ndarray]) -> np.ndarray:
    """Logits of each sequence scored alone, ``[N, V]``."""
    return np.concatenate([teacher.logits([tokens], exact=True) for tokens in sequences])


def identity_basis(width: int, reach: float) -> Basis:
    """Keeps a state as it is, a byte for each direction, up to ``reach`` on either side."""
    same = torch.eye(width)
    return Basis(torch.zeros(width), same, same, torch.full((width,), reach), width)


@pytest.fixture(scope="module", params=["tiny", "example"])
def teacher(
    request: pytest.FixtureRequest, tiny_teacher: GGUFTeacher, example_gguf: GGUFTeacher
) -> GGUFTeacher:
    """An F32 and a Q8_0 model."""
    return tiny_teacher if request.param == "tiny" else example_gguf


@pytest.fixture(scope="module", params=["tiny", "example"])
def two_lanes(request: pytest.FixtureRequest, tiny_teacher_path: Path) -> Iterator[tuple[str, GGUFTeacher]]:
    """The same models on two threads: two contexts work side by side."""
    path = tiny_teacher_path if request.param == "tiny" else example_teacher()
    with GGUFTeacher(path, threads=2) as loaded:
        yield request.param, loaded


# --- which sequences are decoded together


def test_groups_fill_batches_with_little_filling_up() -> None:
    """For many draws of lengths: each sequence once, no group too large, its members of like length."""
    random = np.random.default_rng(1)
    for _ in range(300):
        batch_tokens, parallel = int(random.integers(1, 600)), int(random.integers(1, 130))
        longest = int(random.choice([1, 3, 40, 700]))
        lengths = random.integers(1, longest + 1, random.integers(0, 200))
        groups = groups_of_like_length(lengths, batch_tokens, parallel)
        assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
        for group in groups:
            most = int(lengths[group[0]])
            assert group and len(group) <= parallel and most == int(lengths[group].max())
            assert len(group) == 1 or len(group) * most <= batch_tokens
            assert int(lengths[group].min()) >= LIKE_LENGTH * most
        for group, following in itertools.pairwise(groups):
            most, other = int(lengths[group[0]]), int(lengths[following[0]])
            assert other <= int(lengths[group].min()), "longest first"
            full = len(group) == parallel or (len(group) + 1) * most > batch_tokens
            assert full or other < LIKE_LENGTH * most, "a group ends only where the next one does not fit"


def test_groups_of_equal_lengths_fill_the_batch() -> None:
    """Whole batches, the order kept, and nothing else."""
    assert groups_of_like_length(np.full(7, 100), 300, 8) == [[0, 1, 2], [3, 4, 5], [6]]
    assert groups_of_like_length(np.full(5, 100), 1000, 2) == [[0, 1], [2, 3], [4]]
    assert groups_of_like_length(np.array([10, 900, 9, 8]), 512, 8) == [[1], [0, 2], [3]]
    assert groups_of_like_length(np.array([], dtype=np.int64), 512, 8) == []


# --- logits


def test_company_does_not_change_a_row(teacher: GGUFTeacher) -> None:
    """Mixed lengths together, also those that take several batches, score as each does alone, in order."""
    sequences = sequences_of(teacher, MIXED)
    together = teacher.logits(sequences, exact=True)
    assert together.shape == (sum(MIXED) - len(MIXED), teacher.info.vocab_size)
    assert np.abs(together - one_by_one(teacher, sequences)).max() <= 1e-4
    assert together.std(axis=0).min() > 0.1, "rows that differ, so that a wrong order would show"


def test_two_lanes_give_rows_in_order(
    two_lanes: tuple[str, GGUFTeacher], tiny_teacher: GGUFTeacher, example_gguf: GGUFTeacher
) -> None:
    """Whichever lane takes which group, the same rows in the sequences' order, call after call."""
    name, wide = two_lanes
    narrow = tiny_teacher if name == "tiny" else example_gguf
    sequences = sequences_of(narrow, MIXED, seed=1)
    expected = narrow.logits(sequences, exact=True)
    for _ in range(3):
        assert np.abs(wide.logits(sequences, exact=True) - expected).max() <= 1e-4
    states, others = narrow.states(sequences, [0, 1]), wide.states(sequences, [0, 1])
    assert set(states) == set(others) == {"final", "layer0", "layer1"}
    for key, rows in states.items():
        assert np.abs(rows - others[key]).max() <= 1e-4
    backwards = wide.logits(sequences[::-1], exact=True)
    lengths = np.array(MIXED[::-1]) - 1
    pieces = np.split(backwards, np.cumsum(lengths)[:-1])
    assert np.abs(np.concatenate(pieces[::-1]) - expected).max() <= 1e-4


def test_the_last_rows_alone(two_lanes: tuple[str, GGUFTeacher]) -> None:
    """To the last bit those of all rows: mixed lengths, several batches, with and without a shared beginning."""
    _, wide = two_lanes
    mixed = sequences_of(wide, [2, 60, 59, 5, 513, 18, 640], seed=2)
    begun = [np.concatenate([mixed[1], tokens]) for tokens in mixed[:5]]
    for sequences, numbers in ((mixed, (1, 5, 100)), (begun, (3, 70))):
        edges = np.cumsum([len(tokens) - 1 for tokens in sequences])[:-1]
        whole = {"logits": wide.logits(sequences, exact=True), **wide.states(sequences, [0], exact=True)}
        for last in numbers:
            found = {"logits": wide.logits(sequences, exact=True, last=last)}
            found |= wide.states(sequences, [0], exact=True, last=last)
            assert found.keys() == whole.keys() == {"logits", "final", "layer0"}
            for name, rows in whole.items():
                ends = np.concatenate([piece[-last:] for piece in np.split(rows, edges)])
                assert np.array_equal(found[name], ends), (name, last)


def test_rows_as_they_are_need_no_pytorch() -> None:
    """Loading it takes the worker longer than most answers."""
    program = "import sys, teachers.scoring, teachers.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent).returncode == 0


def test_one_sequence_for_two_lanes(two_lanes: tuple[str, GGUFTeacher]) -> None:
    """Fewer groups than lanes: the other lane has nothing to do, and says so."""
    _, wide = two_lanes
    sequences = sequences_of(wide, [12])
    assert np.array_equal(wide.logits(sequences), wide.logits(sequences))
    assert wide.logits(sequences).shape == (11, wide.info.vocab_size)


@pytest.mark.parametrize("recipe", [Recipe(num_topk=4), Recipe("hidden")], ids=lambda recipe: recipe.kind)
def test_progress_counts_every_row(teacher: GGUFTeacher, recipe: Recipe) -> None:
    """Rising, and complete at the end."""
    counts: list[int] = []
    teacher.score(sequences_of(teacher, MIXED), recipe, {}, counts.append)
    assert counts == sorted(set(counts)) and counts[-1] == sum(MIXED) - len(MIXED)


def test_rows_are_those_of_the_student(tiny_teacher: GGUFTeacher, tiny_student: SO8TForCausalLM) -> None:
    """Against PyTorch's own forward pass of the model that was exported, also beyond one batch."""
    sequences = sequences_of(tiny_teacher, [40, 2, 600, 39], seed=2)
    found = tiny_teacher.logits(sequences, exact=True)
    with torch.no_grad():
        expected = [
            tiny_student(torch.from_numpy(s[:-1].astype(np.int64))[None]).logits[0] for s in sequences
        ]
    assert np.abs(found - torch.cat(expected).numpy()).max() <= 1e-3


# --- hidden states


def test_final_states_give_the_logits(teacher: GGUFTeacher) -> None:
    """States times the output matrix: F32 to rounding, Q8_0 up to llama.cpp's own rounding of the states."""
    sequences = sequences_of(teacher, MIXED, seed=3)
    states = torch.from_numpy(teacher.states(sequences)["final"])
    rows = torch.from_numpy(teacher.output_rows(0, teacher.info.vocab_size))
    assert rows.shape == (teacher.info.vocab_size, states.shape[1]) == (1024, teacher.info.width)
    logits = torch.from_numpy(teacher.logits(sequences))
    error = states @ rows.T - logits
    if teacher.info.name == "tiny":
        assert float(error.abs().max()) <= 1e-3
    spread = logits.std(dim=-1)
    assert bool((error.std(dim=-1) <= 0.02 * spread).all()) and float(spread.min()) > 0.1


def test_output_rows_are_parts_of_one_matrix(teacher: GGUFTeacher) -> None:
    """Any span of rows, the first and the last ones too, dequantised as in the whole."""
    whole = teacher.output_rows(0, 1024)
    assert whole.dtype == np.float32 and whole.flags.writeable
    for start, stop in ((0, 1), (17, 300), (1023, 1024), (5, 5)):
        assert np.array_equal(teacher.output_rows(start, stop), whole[start:stop])


def test_states_are_those_of_the_student(tiny_teacher: GGUFTeacher, tiny_student: SO8TForCausalLM) -> None:
    """Each layer's output and the final state, against PyTorch's, for sequences of all lengths."""
    sequences = sequences_of(tiny_teacher, MIXED, seed=4)
    seen: dict[str, list[torch.Tensor]] = {"layer0": [], "layer1": [], "final": []}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: seen[name].append(output[0][0])

    hooks = [
        layer.register_forward_hook(keep(f"layer{place}"))
        for place, layer in enumerate(tiny_student.model.layers)
    ]
    with torch.no_grad():
        for tokens in sequences:
            output = tiny_student(torch.from_numpy(tokens[:-1].astype(np.int64))[None], with_logits=False)
            seen["final"].append(output.last_hidden_state[0])
    for hook in hooks:
        hook.remove()
    found = tiny_teacher.states(sequences, [1, 0])
    assert set(found) == set(seen)
    for name, pieces in seen.items():
        expected = torch.cat(pieces).numpy()
        assert found[name].shape == expected.shape == (sum(MIXED) - len(MIXED), 64)
        assert found[name].dtype == np.float32 and expected.std() > 0.1
        assert np.abs(found[name] - expected).max() <= 1e-3, name


def test_states_come_one_by_one_or_together(teacher: GGUFTeacher) -> None:
    """Company changes no state, and asking for layers does not change the final one."""
    sequences = sequences_of(teacher, MIXED, seed=5)
    together = teacher.states(sequences, [0, 1])
    for name in ("final", "layer0", "layer1"):
        alone = np.concatenate([teacher.states([tokens], [0, 1])[name] for tokens in sequences])
        assert np.abs(together[name] - alone).max() <= 1e-4
    assert np.abs(teacher.states(sequences)["final"] - together["final"]).max() <= 1e-4


@pytest.mark.parametrize("layers", [(), (0, 1)])
def test_states_without_the_output_layer_are_the_same(teacher: GGUFTeacher, layers: tuple[int, ...]) -> None:
    """What is read from the graph that stops before the output layer, and what comes along with logits."""
    sequences, width = sequences_of(teacher, MIXED, seed=6), teacher.info.width
    alone = {name: torch.from_numpy(rows) for name, rows in teacher.states(sequences, layers).items()}
    bases = {name: identity_basis(width, float(rows.abs().max())) for name, rows in alone.items()}
    recipe = Recipe(num_topk=4, sketch_bytes=width, layers=layers, layer_bytes=width)
    along = teacher.score(sequences, recipe, bases)
    for name, key in (("final", "sketch"), *((f"layer{layer}", f"layer{layer}") for layer in layers)):
        codes, _ = bases[name].encoded(alone[name])
        apart = np.abs(codes.view(np.int8).astype(int) - along[key].view(np.int8).astype(int))
        assert apart.max() <= 1 and (apart > 0).mean() < 1e-3, "no more than a tie in rounding"
    hidden = teacher.score(sequences, Recipe("hidden", layers=layers, layer_bytes=width), bases)
    expected = reduce(Answer(states=alone["final"]), Recipe("hidden"), {})
    assert np.array_equal(hidden["hidden"], expected["hidden"])
    assert np.array_equal(hidden["hidden_scale"], expected["hidden_scale"])
    for layer in layers:
        assert np.array_equal(
            hidden[f"layer{layer}"], bases[f"layer{layer}"].encoded(alone[f"layer{layer}"])[0]
        )


@pytest.mark.parametrize("layer", [2, 6, 99])
def test_a_layer_that_does_not_exist(tiny_teacher: GGUFTeacher, layer: int) -> None:
    """A clear error, with and without logits; the worker goes on working."""
    sequences = sequences_of(tiny_teacher, [5, 6])
    with pytest.raises(TeacherError, match=r"tiny\.gguf.*no such hidden states"):
        tiny_teacher.states(sequences, [0, layer])
    basis = identity_basis(64, 1.0)
    with pytest.raises(TeacherError, match=r"tiny\.gguf.*no such hidden states"):
        tiny_teacher.score(sequences, Recipe(num_topk=2, layers=(layer,)), {f"layer{layer}": basis})
    with pytest.raises(TeacherError, match=r"tiny\.gguf.*no such hidden states"):
        tiny_teacher.states(sequences, [-1])
    assert tiny_teacher.states(sequences, [0, 1])["layer1"].shape == (9, 64)


# --- what is kept


def test_kept_arrays_have_a_row_for_each_position(teacher: GGUFTeacher) -> None:
    """Shapes and types of every kind; dense is the logits themselves, compact what they reduce to."""
    sequences, width = sequences_of(teacher, SHORT, seed=7), teacher.info.width
    rows = sum(SHORT) - len(SHORT)
    logits = teacher.logits(sequences)
    bases = {name: identity_basis(width, 50.0) for name in ("final", "layer0", "layer1")}
    sketched = Recipe(num_topk=5, sketch_bytes=width, layers=(0, 1), layer_bytes=width)
    state: dict[str, tuple[tuple[int, ...], str]] = {}
    for name in ("sketch", "layer0", "layer1"):
        state |= {name: ((rows, width), "u1"), f"{name}_scale": ((rows,), "f2")}
    layer0 = {name: shape for name, shape in state.items() if name.startswith("layer0")}
    topk = {"topk_ids": ((rows, 5), "u2"), "topk_logits": ((rows, 5), "f2"), "tail": ((rows, 6), "f4")}
    dense = {"logits": ((rows, 1024), "f4")}
    hidden = {"hidden": ((rows, width), "i1"), "hidden_scale": ((rows,), "f4")}
    for recipe, expected in (
        (Recipe(num_topk=5), topk),
        (sketched, topk | state),
        (Recipe("hidden"), hidden),
        (Recipe("hidden", layers=(0,), layer_bytes=width), hidden | layer0),
        (Recipe("dense"), dense),
        (Recipe("dense", layers=(0,), layer_bytes=width), dense | layer0),
    ):
        found = teacher.score(sequences, recipe, bases)
        assert {name: (array.shape, array.dtype.str[1:]) for name, array in found.items()} == expected
        if recipe.kind == "dense":
            assert np.array_equal(found["logits"], logits)
        if recipe.kind == "compact":
            reduced = reduce(Answer(torch.from_numpy(logits)), Recipe(num_topk=5), {})
            for name in topk:
                assert np.array_equal(found[name], reduced[name]), name


@pytest.mark.parametrize("shared", [0, 31, 32, 100, 700])
def test_a_common_beginning_changes_nothing(tiny_teacher: GGUFTeacher, shared: int) -> None:
    """Sequences that begin alike score as each does alone, and so do their states; also one of prefix length."""
    random = np.random.default_rng(shared)
    beginning = random.integers(3, 1024, shared).astype(np.int32)
    tails = [random.integers(3, 1024, n).astype(np.int32) for n in (2, 40, 3, 41, 17, 2)]
    sequences = [np.concatenate((beginning, tail))[:256] for tail in tails]
    if shared < 254:
        assert common_prefix(sequences) == (shared if shared >= 32 else 0)
    together = tiny_teacher.logits(sequences, exact=True)
    alone = np.concatenate([tiny_teacher.logits([tokens], exact=True) for tokens in sequences])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    states = tiny_teacher.states(sequences, [0])
    for name in ("final", "layer0"):
        one_by_one = np.concatenate([tiny_teacher.states([tokens], [0])[name] for tokens in sequences])
        np.testing.assert_allclose(states[name], one_by_one, atol=1e-4)


def test_the_common_prefix_leaves_something_to_decode() -> None:
    """Identical sequences share all but their last two tokens; one alone shares nothing."""
    tokens = np.arange(50, dtype=np.int32)
    assert common_prefix([tokens, tokens.copy()]) == 48
    assert common_prefix([tokens]) == 0
    assert common_prefix([tokens, tokens[:33]]) == 0
    assert common_prefix([tokens, tokens[:34]]) == 32


@pytest.mark.parametrize("shared", [4, 60])
def test_targets_kept_while_speaking_are_those_of_scoring(tiny_teacher: GGUFTeacher, shared: int) -> None:
    """One pass says and keeps what two passes do: with forced segments, long prompts, and cut ones."""
    random = np.random.default_rng(5)
    beginning = random.integers(3, 1024, shared).astype(np.int32)
    requests = [
        [np.concatenate((beginning, random.integers(3, 1024, n).astype(np.int32))), beginning[:3]]
        for n in (1, 5, 90, 2, 30)
    ]
    sampling = Sampling(max_length=100, seed=3)
    recipe = Recipe("dense")
    said, arrays = tiny_teacher.speak_and_score(requests, sampling, recipe, {}, first_index=7)
    plain = tiny_teacher.speak(requests, sampling, first_index=7)
    assert [tokens.tolist() for tokens in said] == [tokens.tolist() for tokens in plain]
    alone = [
        tiny_teacher.speak([request], sampling, first_index=7 + i)[0] for i, request in enumerate(requests)
    ]
    assert [tokens.tolist() for tokens in said] == [tokens.tolist() for tokens in alone]
    np.testing.assert_allclose(arrays["logits"], tiny_teacher.logits(said, exact=True), atol=1e-4)
    compact = Recipe("compact", 8)
    kept = tiny_teacher.speak_and_score(requests, sampling, compact, {}, first_index=7)[1]
    scored = tiny_teacher.score(said, compact, {})
    assert np.array_equal(kept["topk_ids"], scored["topk_ids"])
    np.testing.assert_allclose(kept["tail"], scored["tail"], atol=1e-4)
