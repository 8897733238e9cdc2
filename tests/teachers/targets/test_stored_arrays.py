"""The recipe, the arrays that are kept of an answer, and back to typed targets."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from teachers.targets.distributions import (
    Arrays,
    CompactTargets,
    DenseTargets,
    HiddenTargets,
)
from teachers.targets.fit_codec import fit_basis
from teachers.targets.output_head import OutputHead
from teachers.targets.recipe import (
    MOST_SKETCH_BYTES,
    SKETCH_KL,
    Recipe,
    compact_bytes,
    compact_recipe,
)
from teachers.targets.state_codec import Basis
from teachers.targets.stored_arrays import Answer, Targets, array_names, reduce, typed

WIDTH, POSITIONS, VOCAB = 24, 7, 100
RECIPES = [
    Recipe(),
    Recipe(num_topk=5, sketch_bytes=11, sketch_kl=0.25),
    Recipe(num_topk=1, sketch_bytes=500, layers=(0, 3), layer_bytes=9),
    Recipe(num_topk=5000),
    Recipe("hidden"),
    Recipe("hidden", layers=(2,), layer_bytes=500),
    Recipe("dense"),
    Recipe("dense", layers=(2, 1)),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Seeded float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def answer_of(vocab_size: int = VOCAB, positions: int = POSITIONS, seed: int = 0) -> Answer:
    """All parts of an answer, whatever the recipe needs of them."""
    logits = 3.0 * normal(positions, vocab_size, seed=seed)
    layers = {layer: normal(positions, WIDTH, seed=seed + 10 + layer) for layer in range(4)}
    return Answer(logits, normal(positions, WIDTH, seed=seed + 1), layers)


def parts_of(answer: Answer) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Its logits, states and layers, all of which ``answer_of`` has made."""
    assert answer.logits is not None and answer.states is not None and answer.layers is not None
    return answer.logits, answer.states, dict(answer.layers)


def bases_for(recipe: Recipe) -> dict[str, Basis]:
    """What the recipe needs, fitted on other positions."""
    _, states, layers = parts_of(answer_of(1, positions=200, seed=50))
    bases = {f"layer{i}": fit_basis(layers[i], None, recipe.layer_bytes) for i in recipe.layers}
    if recipe.has_sketch:
        bases["final"] = fit_basis(states, None, recipe.sketch_bytes)
    return bases


BASES = [bases_for(recipe) for recipe in RECIPES]


def head_of(vocab_size: int, width: int) -> OutputHead:
    """Any output matrix."""
    return OutputHead(normal(vocab_size, width, seed=5), normal(vocab_size, seed=6))


def typed_again(arrays: Arrays, recipe: Recipe, bases: dict[str, Basis]) -> Targets:
    """The targets of ``arrays``, with any output matrix."""
    width = len(bases["final"].steps) if "final" in bases else WIDTH
    return typed(arrays, recipe, VOCAB, bases.get("final"), head_of(VOCAB, width))


# --- the recipe


def test_recipes_survive_json() -> None:
    """Through text and back; what a kind does not use is not written."""
    for recipe in RECIPES:
        content = recipe.to_json()
        again = Recipe.from_json(json.loads(json.dumps(content)))
        assert again == recipe and again.to_json() == content and isinstance(again.layers, tuple)
        compact = recipe.kind == "compact"
        assert (content["num_topk"] is None) == (content["sketch_bytes"] is None) == (not compact)
        assert (content["layer_bytes"] is None) == (not recipe.layers), recipe


def test_different_recipes_have_different_json() -> None:
    """Every setting that changes the bytes is part of a store's identity."""
    compact = Recipe(layers=(1,), sketch_bytes=8)
    changes: list[dict[str, Any]] = [{}, {"num_topk": 15}, {"sketch_bytes": 9}, {"layers": (2,)}]
    changes += [{"sketch_kl": 0.5}, {"layer_bytes": 127}, {"kind": "hidden"}, {"kind": "dense"}]
    written = {json.dumps(replace(compact, **change).to_json()) for change in changes}
    assert len(written) == len(changes)


def test_what_is_no_recipe_is_refused() -> None:
    """Requests and manifests come from outside, and must name every setting."""
    content = Recipe(layers=(1,)).to_json()
    Recipe.from_json(content)
    wrong: dict[str, list[object]] = {
        "kind": ["sparse", None],
        "num_topk": [-1, "16", 2.5],
        "sketch_bytes": [-1],
        "sketch_kl": [-0.1, 1, "0.1", float("nan"), float("inf")],
        "layer_bytes": [-8],
        "layers": [["first"], 3, None],
    }
    for name, values in wrong.items():
        for value in values:
            error = TypeError if value in (3, None) and name == "layers" else ValueError
            with pytest.raises(error):
                Recipe.from_json(content | {name: value})
                pytest.fail(f"{name} = {value!r} passes")
        less = Recipe().to_json()
        if name == "sketch_kl":  # which stores of earlier formats lack
            assert name not in less
            continue
        del less[name]
        with pytest.raises(KeyError):
            Recipe.from_json(less)
            pytest.fail(f"{name} may be missing")
    with pytest.raises(ValueError, match=r"'topk'.*choose one of compact, hidden, dense"):
        Recipe("topk")


def test_what_a_recipe_needs() -> None:
    """``reduce`` looks at nothing else of the answer."""
    for recipe, *needs in (
        (Recipe(), True, False, False),
        (Recipe(sketch_bytes=8), True, True, True),
        (Recipe("hidden", sketch_bytes=8), False, True, False),
        (Recipe("dense", sketch_bytes=8), True, False, False),
    ):
        assert [recipe.needs_logits, recipe.needs_states, recipe.has_sketch] == needs, recipe
        full = answer_of()
        part = Answer(full.logits if needs[0] else None, full.states if needs[1] else None)
        assert set(reduce(part, recipe, bases_for(recipe))) == set(array_names(recipe)), recipe


# --- bytes


def test_bytes_per_position_are_those_of_the_arrays() -> None:
    """To the byte, for every kind, also where k > V or a budget exceeds the width."""
    for vocab_size in (1000, 65_536, 65_537):
        answer = answer_of(vocab_size)
        for recipe, bases in zip(RECIPES, BASES, strict=True):
            arrays = reduce(answer, recipe, bases)
            layers = [f"layer{layer}{end}" for layer in recipe.layers for end in ("", "_scale")]
            assert sorted(arrays) == sorted(array_names(recipe) + layers), recipe
            assert {len(array) for array in arrays.values()} == {POSITIONS}, recipe
            expected = POSITIONS * recipe.bytes_per_position(vocab_size, WIDTH)
            assert sum(array.nbytes for array in arrays.values()) == expected, (vocab_size, recipe)


def test_bytes_by_hand() -> None:
    """Sixteen ids of two (or four) bytes, as many float16, six float32; a sketch and its scale."""
    assert compact_bytes(16, 65_536) == 16 * (2 + 2) + 6 * 4
    assert compact_bytes(16, 65_537) == 16 * (4 + 2) + 6 * 4
    for recipe, expected in (
        (Recipe(sketch_bytes=40), 88 + 40 + 2),
        (Recipe("hidden"), 64 + 4),
        (Recipe("dense"), 4000),
        (Recipe("dense", layers=(0, 1), layer_bytes=10), 4000 + 2 * 12),
    ):
        assert recipe.bytes_per_position(1000, 64) == expected, recipe


def test_the_usual_recipe() -> None:
    """A sketch as small as it may be, under a cap and of a byte a direction at most; none where
    there is no tail."""
    for width, count, vocab_size in product((8, 64, 4096), (1, 16, 1000), (10, 1000, 131_072)):
        recipe = compact_recipe(count, vocab_size, width)
        assert recipe.num_topk == count and recipe.has_sketch == (count < vocab_size)
        if recipe.has_sketch:
            assert recipe.sketch_bytes == min(width, MOST_SKETCH_BYTES)
            assert recipe.sketch_kl == SKETCH_KL


# --- compact


def test_compact_survives_storage() -> None:
    """As from the logits at once: ids and masses exact, logits to float16, also the last token."""
    recipe = Recipe(num_topk=16)
    for row in product((50, 1000, 65_536, 65_537), (1, 4, 5, 9)):
        vocab_size, positions = row
        logits = answer_of(vocab_size, positions).logits
        assert logits is not None
        logits[0, vocab_size - 1] = 40.0
        arrays = reduce(Answer(logits=logits), recipe, {})
        assert arrays["topk_ids"].dtype == (np.uint16 if vocab_size <= 65_536 else np.int32), row
        assert arrays["topk_logits"].dtype == np.float16 and arrays["tail"].dtype == np.float32
        targets = typed(arrays, recipe, vocab_size, None, None)
        exact = CompactTargets.from_logits(logits, 16)
        assert isinstance(targets, CompactTargets) and targets.vocab_size == vocab_size
        assert targets.head is None and targets.coordinates is None
        assert targets.topk_ids.dtype == torch.int64 and targets.topk_ids[0, 0] == vocab_size - 1
        assert torch.equal(targets.topk_ids, exact.topk_ids), row
        assert targets.topk_logits.dtype == targets.tail.dtype == torch.float32
        torch.testing.assert_close(targets.tail, exact.tail, rtol=0, atol=2e-6)
        torch.testing.assert_close(targets.topk_logits, exact.topk_logits, rtol=2.0**-11, atol=0)
        assert bool((targets.topk_logits[:, 0] == 0.0).all()), row


def test_the_sketch_survives_storage() -> None:
    """Coordinates as the basis rounds them, with the head they belong to."""
    recipe, answer = RECIPES[1], answer_of()
    basis, states = BASES[1]["final"], parts_of(answer)[1]
    head = head_of(VOCAB, len(basis.steps))
    targets = typed(reduce(answer, recipe, BASES[1]), recipe, VOCAB, basis, head)
    assert isinstance(targets, CompactTargets) and targets.head is head
    assert targets.coordinates is not None
    assert torch.equal(targets.coordinates, basis.coordinates(*basis.encoded(states)))
    sums = targets.log_probs(2.0).exp().sum(dim=-1).numpy()
    np.testing.assert_allclose(sums, 1.0, atol=1e-5)


def test_layers_survive_storage() -> None:
    """Each layer with its own basis and under its own name."""
    recipe, answer = Recipe(layers=(3, 0), layer_bytes=24), answer_of()
    bases = bases_for(recipe)
    arrays: dict[str, Any] = reduce(answer, recipe, bases)
    for layer in (0, 3):
        basis = bases[f"layer{layer}"]
        codes, scales = arrays[f"layer{layer}"], arrays[f"layer{layer}_scale"]
        assert codes.dtype == np.uint8 and scales.dtype == np.float16
        back = basis.coordinates(codes, scales) @ basis.decode + basis.mean
        assert float((back - parts_of(answer)[2][layer]).abs().max()) < 0.1, layer


# --- hidden and dense


def test_hidden_states_are_rounded_within_half_a_step() -> None:
    """127 steps to the greatest entry of each position, whatever its size; zero stays zero."""
    states = normal(6, 40) * torch.tensor([1e-6, 1.0, 1e4, 0.0, 30.0, 1.0])[:, None]
    states[5, :] = 0.0
    states[5, 7] = -3.0
    arrays = reduce(Answer(states=states), Recipe("hidden"), {})
    assert arrays["hidden"].dtype == np.int8 and arrays["hidden_scale"].dtype == np.float32
    assert int(np.abs(arrays["hidden"].astype(np.int64)).max()) == 127
    head = head_of(30, 40)
    targets = typed(arrays, Recipe("hidden"), 30, None, head)
    assert isinstance(targets, HiddenTargets) and targets.head is head
    assert targets.coordinates.dtype == torch.float32
    step = states.abs().amax(dim=-1, keepdim=True) / 127.0
    error = (targets.coordinates - states).abs()
    assert bool((error <= 0.5001 * step).all())
    assert float((error / step.clamp(min=1e-30)).max()) > 0.4, "eight bits, no more"
    assert bool((targets.coordinates[3] == 0.0).all())
    torch.testing.assert_close(targets.coordinates[5], states[5])


def test_hidden_targets_are_near_the_dense_ones() -> None:
    """Through bytes and the output matrix to probabilities."""
    states = normal(20, 64)
    head = OutputHead(0.4 * normal(500, 64, seed=5), 0.3 * normal(500, seed=6))
    recipe = Recipe("hidden")
    targets = typed(reduce(Answer(states=states), recipe, {}), recipe, 500, None, head)
    true = DenseTargets(head.logits(states)).log_probs(1.0)
    kl = (true.exp() * (true - targets.log_probs(1.0))).sum(dim=-1)
    assert 0.0 <= float(kl.mean()) < 1e-3


def test_dense_is_exact() -> None:
    """Bit for bit."""
    recipe = Recipe("dense")
    for vocab_size in (50, 65_537):
        logits = parts_of(answer_of(vocab_size))[0]
        arrays = reduce(Answer(logits=logits), recipe, {})
        targets = typed(arrays, recipe, vocab_size, None, None)
        assert isinstance(targets, DenseTargets) and torch.equal(targets.logits, logits), vocab_size


# --- all kinds


def test_arrays_are_copies() -> None:
    """llama.cpp's buffers are used again; what was kept must not follow, nor be changed."""
    for recipe, bases in zip(RECIPES, BASES, strict=True):
        answer = answer_of()
        logits, states, layers = parts_of(answer)
        parts = [logits, states, *layers.values()]
        originals = [part.clone() for part in parts]
        arrays = reduce(answer, recipe, bases)
        assert all(map(torch.equal, parts, originals)), recipe
        kept = {name: array.copy() for name, array in arrays.items()}
        for part in parts:
            part.fill_(7.0)
        for name, array in arrays.items():
            assert np.array_equal(array, kept[name]), (recipe, name)


def test_parts_equal_the_whole() -> None:
    """Batches of any size give the same record, the same call the same bytes."""
    for recipe, bases in zip(RECIPES, BASES, strict=True):
        answer = answer_of()
        logits, states, layers = parts_of(answer)
        whole, again = reduce(answer, recipe, bases), reduce(answer, recipe, bases)
        pieces: list[Arrays] = []
        for rows in (slice(0, 1), slice(1, 6), slice(6, 7)):
            some = {layer: values[rows] for layer, values in layers.items()}
            pieces.append(reduce(Answer(logits[rows], states[rows], some), recipe, bases))
        for name, array in whole.items():
            row = f"{recipe} {name}"
            assert array.tobytes() == again[name].tobytes(), row
            joined = np.concatenate([piece[name] for piece in pieces]).astype(np.float64)
            expected = array.astype(np.float64)
            np.testing.assert_allclose(joined, expected, rtol=0, atol=2e-6, err_msg=row)
        nothing = reduce(answer_of(positions=0), recipe, bases)
        assert all(len(array) == 0 for array in nothing.values()), recipe
        assert typed_again(nothing, recipe, bases).best().shape == (0,), recipe


@pytest.mark.filterwarnings("error")
def test_arrays_may_be_mapped_from_a_file(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A store maps its files read-only; targets are as from memory, without a warning."""
    warned_always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else only the first in a process
    request.addfinalizer(lambda: torch.set_warn_always(warned_always))
    for recipe, bases in zip(RECIPES, BASES, strict=True):
        arrays = reduce(answer_of(), recipe, bases)
        mapped: Arrays = {}
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}.npy", array)
            mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
        found, expected = (typed_again(source, recipe, bases) for source in (mapped, arrays))
        for name, value in vars(expected).items():
            if isinstance(value, Tensor):
                assert torch.equal(getattr(found, name), value), (recipe, name)


def test_damage_is_refused() -> None:
    """One such number in any part that is kept; what is not kept is not looked at."""
    parts = ("logits", "states", "layers")
    for (recipe, bases), part, value in product(
        zip(RECIPES, BASES, strict=True), parts, (np.nan, np.inf, -np.inf)
    ):
        answer = answer_of()
        logits, states, layers = parts_of(answer)
        layer = layers[recipe.layers[-1] if recipe.layers else 0]
        {"logits": logits[:, 30:], "states": states, "layers": layer}[part][5, 3] = value
        needed = (recipe.needs_logits, recipe.needs_states, bool(recipe.layers))
        # Compact targets allow −∞ for a token outside the top-k.
        compact = recipe.kind == "compact" and recipe.num_topk < VOCAB
        if needed[parts.index(part)] and not (part == "logits" and compact and value < 0):
            with pytest.raises(ValueError, match="not finite"):
                reduce(answer, recipe, bases)
                pytest.fail(f"{value} in the {part} passes: {recipe}")
        else:
            reduce(answer, recipe, bases)
