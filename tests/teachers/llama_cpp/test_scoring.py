"""Scoring many sequences: batches of like length, rows in order, and the states behind them."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from students.model.decoder import SO8TForCausalLM
from teachers.base import GenerationRequest, Sampling, last_predictions
from teachers.errors import TeacherError
from teachers.llama_cpp.scoring import LIKE_LENGTH, common_prefix, groups_of_like_length
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.targets.recipe import Recipe
from teachers.targets.state_codec import Basis
from teachers.targets.stored_arrays import Answer, reduce
from tests.support.teachers import sequences_of

# Two tokens, some of like length, some not, and two that are longer than a batch of 512 tokens.
MIXED = [2, 60, 59, 5, 200, 61, 3, 17, 513, 18, 2, 64, 640, 7, 190, 33]
SHORT = [9, 30, 2, 28, 12]


def together(
    teacher: GGUFTeacher, sequences: list[np.ndarray], layers: list[int]
) -> dict[str, np.ndarray]:
    """States and exact logits of all sequences, ``[N, …]``."""
    logits = teacher.logits(sequences, exact=True)
    return {**teacher.states(sequences, layers), "logits": logits}


def one_by_one(
    teacher: GGUFTeacher, sequences: list[np.ndarray], layers: list[int]
) -> dict[str, np.ndarray]:
    """The same, of each sequence asked for alone."""
    alone = [together(teacher, [tokens], layers) for tokens in sequences]
    return {name: np.concatenate([rows[name] for rows in alone]) for name in alone[0]}


def identity_basis(width: int, reach: float) -> Basis:
    """Keeps a state as it is, a byte for each direction, up to ``reach`` on either side."""
    same = torch.eye(width)
    bits = torch.full((width,), 8, dtype=torch.uint8)
    return Basis(torch.zeros(width), same, same, torch.full((width,), reach / 127), bits)


@pytest.fixture(scope="module", params=["tiny", "example"])
def teacher(
    request: pytest.FixtureRequest, tiny_teacher: GGUFTeacher, example_gguf: GGUFTeacher
) -> GGUFTeacher:
    """An F32 and a Q8_0 model."""
    return tiny_teacher if request.param == "tiny" else example_gguf


@pytest.fixture(scope="module", params=["tiny", "example"])
def two_contexts(
    request: pytest.FixtureRequest, tiny_teacher: GGUFTeacher, example_gguf: GGUFTeacher
) -> Iterator[tuple[GGUFTeacher, GGUFTeacher]]:
    """The same models on two threads, two contexts side by side, and on one."""
    narrow = tiny_teacher if request.param == "tiny" else example_gguf
    with GGUFTeacher(narrow.file.path, threads=2) as wide:
        yield wide, narrow


def test_groups_fill_batches_with_little_padding() -> None:
    """For many lengths: each sequence once, no group too large, its members of like length."""
    assert groups_of_like_length(np.full(7, 100), 300, 8) == [[0, 1, 2], [3, 4, 5], [6]]
    assert groups_of_like_length(np.full(5, 100), 1000, 2) == [[0, 1], [2, 3], [4]]
    assert groups_of_like_length(np.array([10, 900, 9, 8]), 512, 8) == [[1], [0, 2], [3]]
    assert groups_of_like_length(np.array([], dtype=np.int64), 512, 8) == []
    random = np.random.default_rng(1)
    for _ in range(300):
        batch_tokens, parallel = int(random.integers(1, 600)), int(random.integers(1, 130))
        longest = int(random.choice([1, 3, 40, 700]))
        lengths = random.integers(1, longest + 1, random.integers(0, 200))
        groups = groups_of_like_length(lengths, batch_tokens, parallel)
        assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
        for group in groups:
            most = lengths[group[0]]
            assert len(group) <= parallel and most == lengths[group].max()
            assert len(group) == 1 or len(group) * most <= batch_tokens
            assert lengths[group].min() >= LIKE_LENGTH * most
        for group, following in itertools.pairwise(groups):
            most, other = lengths[group[0]], lengths[following[0]]
            assert other <= lengths[group].min(), "longest first"
            full = len(group) == parallel or (len(group) + 1) * most > batch_tokens
            assert full or other < LIKE_LENGTH * most, "the next one would have fitted"


def test_company_changes_no_row_and_no_state(teacher: GGUFTeacher) -> None:
    """Mixed lengths over several batches score as each alone; layers change no final state."""
    sequences = sequences_of(teacher, MIXED)
    rows, alone = together(teacher, sequences, [0, 1]), one_by_one(teacher, sequences, [0, 1])
    assert rows.keys() == alone.keys() == {"final", "layer0", "layer1", "logits"}
    for name, expected in alone.items():
        assert np.abs(rows[name] - expected).max() <= 1e-4, name
    assert rows["logits"].shape == (sum(MIXED) - len(MIXED), teacher.info.vocab_size)
    assert rows["logits"].std(axis=0).min() > 0.1, "rows differ, so that a wrong order would show"
    assert np.abs(teacher.states(sequences)["final"] - rows["final"]).max() <= 1e-4


def test_two_contexts_give_rows_in_order(two_contexts: tuple[GGUFTeacher, GGUFTeacher]) -> None:
    """Whichever context takes which group, the same rows in order, call after call."""
    wide, narrow = two_contexts
    sequences = sequences_of(narrow, MIXED, seed=1)
    expected = narrow.logits(sequences, exact=True)
    for _ in range(3):
        assert np.abs(wide.logits(sequences, exact=True) - expected).max() <= 1e-4
    states, others = narrow.states(sequences, [0, 1]), wide.states(sequences, [0, 1])
    assert set(states) == set(others) == {"final", "layer0", "layer1"}
    for key, rows in states.items():
        assert np.abs(rows - others[key]).max() <= 1e-4, key
    backwards = wide.logits(sequences[::-1], exact=True)
    pieces = np.split(backwards, np.cumsum([len(tokens) - 1 for tokens in sequences[:0:-1]]))
    assert np.abs(np.concatenate(pieces[::-1]) - expected).max() <= 1e-4
    one = [sequences[7][:12]]  # fewer groups than contexts: one has nothing to do
    assert np.array_equal(wide.logits(one), wide.logits(one))
    assert wide.logits(one).shape == (11, wide.info.vocab_size)


def test_the_last_rows_alone(two_contexts: tuple[GGUFTeacher, GGUFTeacher]) -> None:
    """To the last bit those of all rows, with and without a shared beginning."""
    wide, _ = two_contexts
    mixed = sequences_of(wide, [2, 60, 59, 5, 640, 18], seed=2)
    begun = [np.concatenate([mixed[1], tokens]) for tokens in mixed[:5]]
    for sequences, numbers in ((mixed, (1, 5, 100)), (begun, (3, 70))):
        edges = np.cumsum([len(tokens) - 1 for tokens in sequences])[:-1]
        whole = {
            "logits": wide.logits(sequences, exact=True),
            **wide.states(sequences, [0], exact=True),
        }
        for last in numbers:
            keep = last_predictions(sequences, last)
            found = {"logits": wide.logits(sequences, exact=True, keep=keep)}
            found |= wide.states(sequences, [0], exact=True, keep=keep)
            assert found.keys() == whole.keys() == {"logits", "final", "layer0"}
            for name, rows in whole.items():
                ends = np.concatenate([piece[-last:] for piece in np.split(rows, edges)])
                assert np.array_equal(found[name], ends), (name, last)


def test_rows_as_they_are_need_no_pytorch() -> None:
    """Loading it takes the worker longer than most answers."""
    program = "import sys, teachers.llama_cpp.scoring, teachers.llama_cpp.server as _; "
    program += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[3])
    assert done.returncode == 0, "PyTorch is imported"


def test_progress_counts_every_row(teacher: GGUFTeacher) -> None:
    """Rising, and complete at the end."""
    for recipe in (Recipe(num_topk=4), Recipe("hidden")):
        counts: list[int] = []
        teacher.score(sequences_of(teacher, MIXED), recipe, {}, counts.append)
        assert counts == sorted(set(counts)) and counts[-1] == sum(MIXED) - len(MIXED), recipe.kind


def test_final_states_give_the_logits(teacher: GGUFTeacher) -> None:
    """States times the output matrix: F32 to rounding, Q8_0 up to its own rounding of states."""
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
    """Any span of rows, the first and the last ones too, dequantized as in the whole."""
    whole = teacher.output_rows(0, 1024)
    assert whole.dtype == np.float32 and whole.flags.writeable
    for start, stop in ((0, 1), (17, 300), (1023, 1024), (5, 5)):
        assert np.array_equal(teacher.output_rows(start, stop), whole[start:stop])


def test_rows_and_states_are_those_of_the_student(
    tiny_teacher: GGUFTeacher, tiny_student: SO8TForCausalLM
) -> None:
    """Logits, each layer's output and the final state, against PyTorch's, for all lengths."""
    sequences = sequences_of(tiny_teacher, MIXED, seed=4)
    seen: dict[str, list[torch.Tensor]] = {"layer0": [], "layer1": [], "final": [], "logits": []}
    hooks = [
        layer.register_forward_hook(
            lambda module, inputs, output, name=f"layer{place}": seen[name].append(output[0][0])
        )
        for place, layer in enumerate(tiny_student.model.layers)
    ]
    with torch.no_grad():
        for tokens in sequences:
            output = tiny_student(torch.from_numpy(tokens[:-1].astype(np.int64))[None])
            seen["final"].append(output.last_hidden_state[0])
            seen["logits"].append(output.logits[0])
    for hook in hooks:
        hook.remove()
    found = {**tiny_teacher.states(sequences, [1, 0])}
    assert set(found) == set(seen) - {"logits"}
    found["logits"] = tiny_teacher.logits(sequences, exact=True)
    for name, pieces in seen.items():
        expected = torch.cat(pieces).numpy()
        width = 1024 if name == "logits" else 64
        assert found[name].shape == expected.shape == (sum(MIXED) - len(MIXED), width), name
        assert found[name].dtype == np.float32 and expected.std() > 0.1, name
        assert np.abs(found[name] - expected).max() <= 1e-3, name


def test_states_without_the_output_layer_are_the_same(teacher: GGUFTeacher) -> None:
    """Read from the graph that stops before the output layer, and what comes along with logits."""
    sequences, width = sequences_of(teacher, MIXED, seed=6), teacher.info.width
    for layers in ((), (0, 1)):
        names = [f"layer{layer}" for layer in layers]
        states = teacher.states(sequences, layers)
        alone = {name: torch.from_numpy(rows) for name, rows in states.items()}
        bases = {
            name: identity_basis(width, float(rows.abs().max())) for name, rows in alone.items()
        }
        codes = {name: bases[name].encoded(rows)[0] for name, rows in alone.items()}
        recipe = Recipe(num_topk=4, sketch_bytes=width, layers=layers, layer_bytes=width)
        along = teacher.score(sequences, recipe, bases)
        for name in ("final", *names):
            found = along["sketch" if name == "final" else name].astype(int)
            apart = np.abs(codes[name].astype(int) - found)
            assert apart.max() <= 1 and (apart > 0).mean() < 1e-3, f"{name}: more than ties"
        recipe = Recipe("hidden", layers=layers, layer_bytes=width)
        hidden = teacher.score(sequences, recipe, bases)
        expected = reduce(Answer(states=alone["final"]), Recipe("hidden"), {})
        for name, rows in (expected | {name: codes[name] for name in names}).items():
            assert np.array_equal(hidden[name], rows), name


def test_a_layer_that_does_not_exist(tiny_teacher: GGUFTeacher) -> None:
    """A clear error, with and without logits; the worker goes on working."""
    sequences, basis = sequences_of(tiny_teacher, [5, 6]), identity_basis(64, 1.0)
    refused = r"tiny\.gguf.*no such hidden states"
    for layer in (2, 6, 99, -1):
        with pytest.raises(TeacherError, match=refused):
            tiny_teacher.states(sequences, [0, layer])
            pytest.fail(f"layer {layer} is taken")
    for layer in (2, 6, 99):
        recipe = Recipe(num_topk=2, layers=(layer,))
        with pytest.raises(TeacherError, match=refused):
            tiny_teacher.score(sequences, recipe, {f"layer{layer}": basis})
            pytest.fail(f"layer {layer} is taken with logits")
    assert tiny_teacher.states(sequences, [0, 1])["layer1"].shape == (9, 64)


def test_kept_arrays_have_a_row_for_each_position(teacher: GGUFTeacher) -> None:
    """Shapes and types of every kind; dense is the logits themselves, compact their reduction."""
    sequences, width = sequences_of(teacher, SHORT, seed=7), teacher.info.width
    rows = sum(SHORT) - len(SHORT)
    logits = teacher.logits(sequences)
    bases = {name: identity_basis(width, 50.0) for name in ("final", "layer0", "layer1")}
    sketched = Recipe(num_topk=5, sketch_bytes=width, layers=(0, 1), layer_bytes=width)
    state: dict[str, tuple[tuple[int, ...], str]] = {}
    for name in ("sketch", "layer0", "layer1"):
        state |= {name: ((rows, width), "u1"), f"{name}_scale": ((rows,), "f2")}
    layer0 = {name: shape for name, shape in state.items() if name.startswith("layer0")}
    topk = {
        "topk_ids": ((rows, 5), "u2"),
        "topk_logits": ((rows, 5), "f2"),
        "tail": ((rows, 6), "f4"),
    }
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
        shapes = {name: (array.shape, array.dtype.str[1:]) for name, array in found.items()}
        assert shapes == expected, recipe
        if recipe.kind == "dense":
            assert np.array_equal(found["logits"], logits)
        if recipe.kind == "compact":
            reduced = reduce(Answer(torch.from_numpy(logits)), Recipe(num_topk=5), {})
            for name in topk:
                assert np.array_equal(found[name], reduced[name]), name


def test_a_common_beginning_changes_nothing(tiny_teacher: GGUFTeacher) -> None:
    """Sequences that begin alike score as each does alone, and so do their states.

    Identical ones share all but their last two tokens; one alone shares nothing.
    """
    tokens = np.arange(50, dtype=np.int32)
    assert common_prefix([tokens, tokens.copy()]) == 48
    assert common_prefix([tokens]) == common_prefix([tokens, tokens[:33]]) == 0
    assert common_prefix([tokens, tokens[:34]]) == 32
    for shared in (0, 31, 32, 100, 700):
        random = np.random.default_rng(shared)
        beginning = random.integers(3, 1024, shared).astype(np.int32)
        tails = [random.integers(3, 1024, n).astype(np.int32) for n in (2, 40, 3, 41, 17, 2)]
        sequences = [np.concatenate((beginning, tail))[:256] for tail in tails]
        if shared < 254:
            assert common_prefix(sequences) == (shared if shared >= 32 else 0), shared
        found = together(tiny_teacher, sequences, [0])
        expected = one_by_one(tiny_teacher, sequences, [0])
        assert found.keys() == expected.keys() == {"final", "layer0", "logits"}
        for name, rows in expected.items():
            np.testing.assert_allclose(found[name], rows, atol=1e-4, err_msg=f"{name}, {shared}")


def test_targets_kept_while_generating_are_those_of_scoring(tiny_teacher: GGUFTeacher) -> None:
    """One pass gives what two do: shared beginnings, forced segments, cut prompts."""
    dense, compact = Recipe("dense"), Recipe("compact", 8)
    for shared in (4, 60):
        random = np.random.default_rng(5)
        beginning = random.integers(3, 1024, shared).astype(np.int32)
        tails = [random.integers(3, 1024, n).astype(np.int32) for n in (1, 5, 90, 2, 30)]
        prompts = [[np.concatenate((beginning, tail)), beginning[:3]] for tail in tails]
        request = GenerationRequest(prompts, Sampling(max_length=100, seed=3), 7)
        generated, arrays = tiny_teacher.generate_and_score(request, dense, {})
        plain = tiny_teacher.generate(request)
        assert len(generated) == len(plain) == len(prompts)
        for index, prompt in enumerate(prompts):
            single = replace(request, prompts=[prompt], first_index=7 + index)
            alone = tiny_teacher.generate(single)[0]
            assert generated[index].tolist() == plain[index].tolist() == alone.tolist(), shared
        logits = tiny_teacher.logits(generated, exact=True)
        np.testing.assert_allclose(arrays["logits"], logits, atol=1e-4, err_msg=str(shared))
        kept = tiny_teacher.generate_and_score(request, compact, {})[1]
        scored = tiny_teacher.score(generated, compact, {})
        assert np.array_equal(kept["topk_ids"], scored["topk_ids"]), shared
        np.testing.assert_allclose(kept["tail"], scored["tail"], atol=1e-4, err_msg=str(shared))
