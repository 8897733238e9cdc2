"""The recipe, the arrays that are kept of an answer, and back to typed targets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from teachers.recipe import Recipe, compact_bytes, default_sketch_bytes
from teachers.records import Answer, array_names, reduce, typed
from teachers.sketch import Basis, fit_basis
from teachers.soft_targets import Arrays, CompactTargets, DenseTargets, HiddenTargets, OutputHead

WIDTH, POSITIONS = 24, 7
RECIPES = [
    Recipe(),
    Recipe(num_topk=5, sketch_bytes=11),
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


def answer_of(vocab_size: int, positions: int = POSITIONS, seed: int = 0) -> Answer:
    """All parts of an answer, whatever the recipe needs of them."""
    layers = {layer: normal(positions, WIDTH, seed=seed + 10 + layer) for layer in range(4)}
    return Answer(
        3.0 * normal(positions, vocab_size, seed=seed), normal(positions, WIDTH, seed=seed + 1), layers
    )


def bases_for(recipe: Recipe) -> dict[str, Basis]:
    """What the recipe needs, fitted on other positions."""
    fitted = answer_of(1, positions=200, seed=50)
    assert fitted.states is not None and fitted.layers is not None
    bases = {f"layer{i}": fit_basis(fitted.layers[i], None, recipe.layer_bytes) for i in recipe.layers}
    if recipe.has_sketch:
        bases["final"] = fit_basis(fitted.states, None, recipe.sketch_bytes)
    return bases


def head_of(vocab_size: int, width: int) -> OutputHead:
    """Any output matrix."""
    return OutputHead(normal(vocab_size, width, seed=5), normal(vocab_size, seed=6))


# --- the recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_survive_json(recipe: Recipe) -> None:
    """Through text and back; what a kind does not use is not written."""
    content = recipe.to_json()
    again = Recipe.from_json(json.loads(json.dumps(content)))
    assert again.to_json() == content and isinstance(again.layers, tuple)
    assert again == recipe
    assert (content["num_topk"] is None) == (content["sketch_bytes"] is None) == (recipe.kind != "compact")
    assert (content["layer_bytes"] is None) == (not recipe.layers)


def test_different_recipes_have_different_json() -> None:
    """Every setting that changes the bytes is part of a store's identity."""
    compact = Recipe(layers=(1,), sketch_bytes=8)
    others = [
        replace(compact, num_topk=15),
        replace(compact, sketch_bytes=9),
        replace(compact, layers=(2,)),
        replace(compact, layer_bytes=127),
        replace(compact, kind="hidden"),
        replace(compact, kind="dense"),
    ]
    written = [json.dumps(recipe.to_json()) for recipe in (compact, *others)]
    assert len(set(written)) == len(written)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"kind": "sparse"}, ValueError),
        ({"kind": None}, ValueError),
        ({"num_topk": -1}, ValueError),
        ({"num_topk": "16"}, ValueError),
        ({"num_topk": 2.5}, ValueError),
        ({"sketch_bytes": -1}, ValueError),
        ({"layer_bytes": -8}, ValueError),
        ({"layers": ["first"]}, ValueError),
        ({"layers": 3}, TypeError),
        ({"layers": None}, TypeError),
    ],
)
def test_what_is_no_recipe_is_refused(changed: dict[str, Any], error: type[Exception]) -> None:
    """Requests and manifests come from outside."""
    content = Recipe(layers=(1,)).to_json()
    Recipe.from_json(content)
    with pytest.raises(error):
        Recipe.from_json(content | changed)


@pytest.mark.parametrize("missing", ["kind", "num_topk", "sketch_bytes", "layers", "layer_bytes"])
def test_a_recipe_names_everything(missing: str) -> None:
    """Nothing is assumed for what is not written."""
    content = Recipe().to_json()
    del content[missing]
    with pytest.raises(KeyError):
        Recipe.from_json(content)


def test_unknown_kinds_are_refused() -> None:
    """The message names the value and the choice."""
    with pytest.raises(ValueError, match="'topk' do not exist; choose one of compact, hidden, dense"):
        Recipe("topk")


@pytest.mark.parametrize(
    ("recipe", "logits", "states", "sketched"),
    [
        (Recipe(), True, False, False),
        (Recipe(sketch_bytes=8), True, True, True),
        (Recipe("hidden", sketch_bytes=8), False, True, False),
        (Recipe("dense", sketch_bytes=8), True, False, False),
    ],
)
def test_what_a_recipe_needs(recipe: Recipe, logits: bool, states: bool, sketched: bool) -> None:
    """``reduce`` looks at nothing else of the answer."""
    assert (recipe.needs_logits, recipe.needs_states, recipe.has_sketch) == (logits, states, sketched)
    full = answer_of(100)
    part = Answer(full.logits if logits else None, full.states if states else None)
    assert set(reduce(part, recipe, bases_for(recipe))) == set(array_names(recipe))


# --- bytes


@pytest.mark.parametrize("vocab_size", [1000, 65_536, 65_537])
@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_per_position_are_those_of_the_arrays(recipe: Recipe, vocab_size: int) -> None:
    """To the byte, for every kind, also where k > V or a budget exceeds the width; one row a position."""
    arrays = reduce(answer_of(vocab_size), recipe, bases_for(recipe))
    layers = [f"layer{layer}{end}" for layer in recipe.layers for end in ("", "_scale")]
    assert sorted(arrays) == sorted(array_names(recipe) + layers)
    assert all(len(array) == POSITIONS for array in arrays.values())
    expected = POSITIONS * recipe.bytes_per_position(vocab_size, WIDTH)
    assert sum(array.nbytes for array in arrays.values()) == expected


def test_bytes_by_hand() -> None:
    """Sixteen ids of two (or four) bytes, as many float16, six float32; a sketch and its scale."""
    assert compact_bytes(16, 65_536) == 16 * (2 + 2) + 6 * 4
    assert compact_bytes(16, 65_537) == 16 * (4 + 2) + 6 * 4
    assert Recipe(sketch_bytes=40).bytes_per_position(1000, 64) == 88 + 40 + 2
    assert Recipe("hidden").bytes_per_position(1000, 64) == 64 + 4
    assert Recipe("dense").bytes_per_position(1000, 64) == 4000
    assert Recipe("dense", layers=(0, 1), layer_bytes=10).bytes_per_position(1000, 64) == 4000 + 2 * 12


@pytest.mark.parametrize("vocab_size", [10, 1000, 65_536, 131_072])
@pytest.mark.parametrize("count", [1, 16, 29, 48, 1000])
@pytest.mark.parametrize("width", [8, 64, 4096])
def test_the_default_sketch_fills_two_hundred_bytes(width: int, count: int, vocab_size: int) -> None:
    """Never more; exactly, where the width allows; never negative; none where there is no tail."""
    given = default_sketch_bytes(count, vocab_size, width)
    total = Recipe(num_topk=count, sketch_bytes=given).bytes_per_position(vocab_size, width)
    assert 0 <= given <= width
    assert given == 0 or total <= 200
    left = 200 - (count * (4 if vocab_size <= 65_536 else 6) + 24 + 2)
    assert given == (min(left, width) if left > 0 and count < vocab_size else 0)


# --- compact


@pytest.mark.parametrize("vocab_size", [50, 1000, 65_536, 65_537])
@pytest.mark.parametrize("positions", [1, 4, 5, 9])
def test_compact_survives_storage(positions: int, vocab_size: int) -> None:
    """As from the logits at once: ids and masses exact, logits to float16, also the vocabulary's last token."""
    logits = answer_of(vocab_size, positions).logits
    assert logits is not None
    logits[0, vocab_size - 1] = 40.0
    recipe = Recipe(num_topk=16)
    arrays = reduce(Answer(logits=logits), recipe, {})
    assert arrays["topk_ids"].dtype == (np.uint16 if vocab_size <= 65_536 else np.int32)
    assert arrays["topk_logits"].dtype == np.float16 and arrays["tail"].dtype == np.float32
    targets, exact = typed(arrays, recipe, vocab_size, None, None), CompactTargets.from_logits(logits, 16)
    assert isinstance(targets, CompactTargets)
    assert targets.vocab_size == vocab_size and targets.head is None and targets.coordinates is None
    assert targets.topk_ids.dtype == torch.int64 and torch.equal(targets.topk_ids, exact.topk_ids)
    assert targets.topk_ids[0, 0] == vocab_size - 1
    assert targets.topk_logits.dtype == targets.tail.dtype == torch.float32
    torch.testing.assert_close(targets.tail, exact.tail, rtol=0, atol=2e-6)
    torch.testing.assert_close(targets.topk_logits, exact.topk_logits, rtol=2.0**-11, atol=0)
    assert bool((targets.topk_logits[:, 0] == 0.0).all())


def test_the_sketch_survives_storage() -> None:
    """Coordinates as the basis rounds them, with the head they belong to."""
    recipe = Recipe(num_topk=5, sketch_bytes=11)
    answer, bases = answer_of(90), bases_for(recipe)
    assert answer.states is not None
    head = head_of(90, len(bases["final"].ranges))
    targets = typed(reduce(answer, recipe, bases), recipe, 90, bases["final"], head)
    assert isinstance(targets, CompactTargets) and targets.head is head and targets.coordinates is not None
    expected = bases["final"].coordinates(*bases["final"].encoded(answer.states))
    assert torch.equal(targets.coordinates, expected)
    np.testing.assert_allclose(targets.log_probs(2.0).exp().sum(dim=-1).numpy(), 1.0, atol=1e-5)


def test_layers_survive_storage() -> None:
    """Each layer with its own basis and under its own name."""
    recipe = Recipe(layers=(3, 0), layer_bytes=24)
    answer, bases = answer_of(90), bases_for(recipe)
    assert answer.layers is not None
    arrays = reduce(answer, recipe, bases)
    for layer in (0, 3):
        basis = bases[f"layer{layer}"]
        codes, scales = arrays[f"layer{layer}"], arrays[f"layer{layer}_scale"]
        assert codes.dtype == np.uint8 and scales.dtype == np.float16
        rounded = basis.coordinates(codes.astype(np.uint8), scales.astype(np.float16))
        back = rounded @ basis.decode + basis.mean
        assert float((back - answer.layers[layer]).abs().max()) < 0.1


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
    states, head = normal(20, 64), OutputHead(0.4 * normal(500, 64, seed=5), 0.3 * normal(500, seed=6))
    recipe = Recipe("hidden")
    targets = typed(reduce(Answer(states=states), recipe, {}), recipe, 500, None, head)
    true = DenseTargets(head.logits(states)).log_probs(1.0)
    kl = (true.exp() * (true - targets.log_probs(1.0))).sum(dim=-1)
    assert 0.0 <= float(kl.mean()) < 1e-3


@pytest.mark.parametrize("vocab_size", [50, 65_537])
def test_dense_is_exact(vocab_size: int) -> None:
    """Bit for bit."""
    logits = answer_of(vocab_size).logits
    assert logits is not None
    recipe = Recipe("dense")
    targets = typed(reduce(Answer(logits=logits), recipe, {}), recipe, vocab_size, None, None)
    assert isinstance(targets, DenseTargets) and torch.equal(targets.logits, logits)


# --- all kinds


@pytest.mark.parametrize("recipe", RECIPES)
def test_arrays_are_copies(recipe: Recipe) -> None:
    """llama.cpp's buffers are used again for the next batch; what was kept must not follow, nor be changed."""
    answer = answer_of(100)
    assert answer.logits is not None and answer.states is not None and answer.layers is not None
    parts = [answer.logits, answer.states, *answer.layers.values()]
    originals = [part.clone() for part in parts]
    arrays = reduce(answer, recipe, bases_for(recipe))
    assert all(torch.equal(part, original) for part, original in zip(parts, originals, strict=True))
    kept = {name: array.copy() for name, array in arrays.items()}
    for part in parts:
        part.fill_(7.0)
    for name, array in arrays.items():
        assert np.array_equal(array, kept[name]), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_parts_equal_the_whole(recipe: Recipe) -> None:
    """Positions are independent: batches of any size give the same record; the same call the same bytes."""
    answer, bases = answer_of(100), bases_for(recipe)
    assert answer.logits is not None and answer.states is not None and answer.layers is not None
    whole, again = reduce(answer, recipe, bases), reduce(answer, recipe, bases)
    pieces: list[Arrays] = []
    for rows in (slice(0, 1), slice(1, 6), slice(6, 7)):
        layers = {layer: states[rows] for layer, states in answer.layers.items()}
        pieces.append(reduce(Answer(answer.logits[rows], answer.states[rows], layers), recipe, bases))
    for name, array in whole.items():
        assert array.tobytes() == again[name].tobytes()
        joined = np.concatenate([piece[name] for piece in pieces])
        np.testing.assert_allclose(joined.astype(np.float64), array.astype(np.float64), rtol=0, atol=2e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_positions(recipe: Recipe) -> None:
    """An empty batch is kept as empty arrays and comes back as no targets."""
    bases = bases_for(recipe)
    arrays = reduce(answer_of(100, positions=0), recipe, bases)
    assert all(len(array) == 0 for array in arrays.values())
    width = len(bases["final"].ranges) if "final" in bases else WIDTH
    targets = typed(arrays, recipe, 100, bases.get("final"), head_of(100, width))
    assert targets.best().shape == (0,)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("recipe", RECIPES)
def test_arrays_may_be_mapped_from_a_file(
    recipe: Recipe, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A store maps its files and allows no writing; targets are as from memory, without a warning."""
    warned_always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else only the first in a process
    request.addfinalizer(lambda: torch.set_warn_always(warned_always))
    arrays, bases = reduce(answer_of(100), recipe, bases_for(recipe)), bases_for(recipe)
    mapped: Arrays = {}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
        mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    width = len(bases["final"].ranges) if "final" in bases else WIDTH
    found, expected = (
        typed(source, recipe, 100, bases.get("final"), head_of(100, width)) for source in (mapped, arrays)
    )
    for name, value in vars(expected).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(found, name), value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["logits", "states", "layers"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_damage_is_refused(recipe: Recipe, part: str, value: float) -> None:
    """One such number in any part that is kept; what is not kept is not looked at."""
    answer, bases = answer_of(100), bases_for(recipe)
    assert answer.logits is not None and answer.states is not None and answer.layers is not None
    if part == "logits":
        answer.logits[5, 33] = value
    elif part == "states":
        answer.states[5, 3] = value
    else:
        answer.layers[recipe.layers[-1] if recipe.layers else 0][5, 3] = value
    kept = {"logits": recipe.needs_logits, "states": recipe.needs_states, "layers": bool(recipe.layers)}[part]
    excluded = part == "logits" and recipe.kind == "compact" and value < 0 and recipe.num_topk < 100
    if kept and not excluded:  # compact targets allow −∞ for a token outside the top-k
        with pytest.raises(ValueError, match="not finite"):
            reduce(answer, recipe, bases)
    else:
        reduce(answer, recipe, bases)
