"""The importance matrix against its definition, and as a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.publishing import spread
from students.architectures import architecture_of
from students.base_export import write_base_gguf
from students.export import ExportNames, write_gguf
from students.fold import to_llama
from students.gguf_names import to_gguf_name
from students.importance import Importance, measure_importance, read_mean_squares, write_importance
from students.model import SO8TForCausalLM
from teachers import example_teacher
from teachers.gguf_file import read_gguf
from tests.conftest import make_student
from tests.test_base_export import made

SEQUENCES = [np.array([5, 9, 2, 40], np.int32), np.array([7], np.int32), np.array([1, 3], np.int32)]


def measured(student: SO8TForCausalLM) -> Importance:
    return measure_importance(to_llama(student), SEQUENCES, to_gguf_name)


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_sum_of_squares_of_what_a_matrix_is_multiplied_with(tied: bool) -> None:
    """By hand, in float64: what goes into the first layer's query, and into the output matrix."""
    student = make_student(32, 2, tied=tied)
    found = measured(student)
    assert found.tokens == 7 and found.sequences == 3
    expected_first, expected_last = np.zeros(32), np.zeros(32)
    llama = to_llama(student).double()
    for tokens in SEQUENCES:
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        with torch.no_grad():
            embedded = llama.model.embed_tokens(ids)[0]
            scale = (embedded.square().mean(-1, keepdim=True) + student.config.rms_norm_eps).rsqrt()
            first = embedded * scale * llama.model.layers[0].input_layernorm.weight
            last = llama.model(ids).last_hidden_state[0]
        expected_first += (first.numpy() ** 2).sum(axis=0)
        expected_last += (last.numpy() ** 2).sum(axis=0)
    np.testing.assert_allclose(found.sums["blk.0.attn_q.weight"], expected_first, rtol=1e-5)
    output = "token_embd.weight" if tied else "output.weight"
    np.testing.assert_allclose(found.sums[output], expected_last, rtol=1e-4)
    assert ("output.weight" in found.sums) is not tied
    mean = found.mean_squares()["blk.0.attn_q.weight"]
    np.testing.assert_allclose(mean, expected_first / 7, rtol=1e-5)


def test_every_matrix_of_the_file_has_one(tmp_path: Path) -> None:
    """Names and widths are those of the exported file's matrices."""
    entries = {key: (field.value, field.type, field.element_type) for key, field in _tokenizer().items()}
    student = make_student(32, 2, len(entries["tokenizer.ggml.tokens"][0]))
    write_gguf(student, tmp_path / "s.gguf", "f32", entries, ExportNames("s", {}))
    matrices = {
        name: info.shape[1]
        for name, info in read_gguf(tmp_path / "s.gguf").tensors.items()
        if len(info.shape) == 2
    }
    assert {name: len(values) for name, values in measured(student).sums.items()} == matrices


@pytest.mark.parametrize("kind", ["llama", "phi3", "qwen2", "qwen3"])
def test_every_matrix_of_a_base_has_one(tmp_path: Path, kind: str) -> None:
    """Also where queries, keys and values are one matrix (phi3)."""
    entries = {key: (field.value, field.type, field.element_type) for key, field in _tokenizer().items()}
    model = made(kind, len(entries["tokenizer.ggml.tokens"][0]))
    found = measure_importance(model, SEQUENCES, architecture_of(model.config).to_gguf_name)
    write_base_gguf(model, tmp_path / "b.gguf", "f32", entries, ExportNames("b", {}), {})
    matrices = {
        name: info.shape[1]
        for name, info in read_gguf(tmp_path / "b.gguf").tensors.items()
        if len(info.shape) == 2
    }
    del matrices["token_embd.weight"]  # looked up, not multiplied with, where there is an output matrix
    assert {name: len(values) for name, values in found.sums.items()} == matrices


def test_the_file_gives_back_the_same(tmp_path: Path) -> None:
    """Written as llama-imatrix does, read through the checked reader."""
    found = measured(make_student(32, 1))
    write_importance(found, tmp_path / "imatrix.gguf", ["some text"])
    file = read_gguf(tmp_path / "imatrix.gguf", model=False)
    assert file.value("general.type") == "imatrix" and file.value("imatrix.datasets") == ["some text"]
    assert file.value("imatrix.chunk_count") == 3 and file.value("imatrix.chunk_size") == 2
    again = read_mean_squares({name: file.tensor(name) for name in file.tensors})
    assert again.keys() == found.sums.keys()
    for name, values in found.mean_squares().items():
        assert np.array_equal(again[name], values)  # or later exports would differ from the run's


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "no tensor"),
        ({"a.in_sum2": np.ones((1, 4), np.float32)}, "no count"),
        ({"a.in_sum2": np.ones((1, 4), np.float32), "a.counts": np.zeros((1, 1), np.float32)}, "no count"),
        (
            {"a.in_sum2": np.ones((1, 4), np.float32), "a.counts": np.full((1, 1), np.nan, np.float32)},
            "no count",
        ),
        (
            {"a.in_sum2": -np.ones((1, 4), np.float32), "a.counts": np.ones((1, 1), np.float32)},
            "no mean squares",
        ),
        (
            {"a.in_sum2": np.full((1, 4), np.inf, np.float32), "a.counts": np.ones((1, 1), np.float32)},
            "no mean",
        ),
    ],
)
def test_what_is_none_is_refused(tensors: dict, words: str) -> None:
    """Nothing of a damaged file reaches the quantizer."""
    with pytest.raises(ValueError, match=words):
        read_mean_squares(tensors)


@pytest.mark.parametrize(("count", "tokens", "expected"), [(20_000, 16_384, 32), (10, 16_384, 10), (9, 3, 1)])
def test_text_is_taken_from_beginning_to_end(count: int, tokens: int, expected: int) -> None:
    """Data may be in order of topics: what is looked at comes from all of it, and is about as much as was asked for."""
    places = spread(np.full(count, 512), tokens)
    assert len(places) == len(set(places.tolist())) == expected and places[0] == 0
    if expected > 1:
        steps = np.diff(places)
        assert places[-1] == count - 1 and steps.max() - steps.min() <= 1


def _tokenizer() -> dict:
    fields = read_gguf(example_teacher()).fields
    return {key: field for key, field in fields.items() if key.startswith("tokenizer.")}
