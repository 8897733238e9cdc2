"""The importance matrix against its definition, and as a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.export.importance import evenly_spaced
from students.gguf.architectures import architecture_of, to_gguf_name
from students.gguf.imatrix import (
    Importance,
    measure_importance,
    read_mean_squares,
    write_importance,
)
from students.gguf.writer import write_gguf
from students.model.decoder import SO8TForCausalLM
from students.model.fold import to_llama
from teachers.gguf.file import read_gguf
from tests.support.students import make_student
from tests.support.tiny_models import NAMES, TOKENIZER, VOCAB, export, made

SEQUENCES = [np.array([5, 9, 2, 40], np.int32), np.array([7], np.int32), np.array([1, 3], np.int32)]


def measured(student: SO8TForCausalLM) -> Importance:
    return measure_importance(to_llama(student), SEQUENCES, to_gguf_name)


def test_it_is_the_sum_of_squares_of_what_a_matrix_is_multiplied_with() -> None:
    """By hand, in float64: what goes into the first layer's query, and into the output matrix."""
    for tied, output in ((True, "token_embd.weight"), (False, "output.weight")):
        student = make_student(32, 2, tied=tied)
        result = measured(student)
        assert result.tokens == 7 and result.sequences == 3
        expected_first, expected_last = np.zeros(32), np.zeros(32)
        llama = to_llama(student).double()
        for tokens in SEQUENCES:
            ids = torch.from_numpy(tokens.astype(np.int64))[None]
            with torch.no_grad():
                embedded = llama.model.embed_tokens(ids)[0]
                square = embedded.square().mean(-1, keepdim=True)
                scale = (square + student.config.rms_norm_eps).rsqrt()
                first = embedded * scale * llama.model.layers[0].input_layernorm.weight
                last = llama.model(ids).last_hidden_state[0]
            expected_first += (first.numpy() ** 2).sum(axis=0)
            expected_last += (last.numpy() ** 2).sum(axis=0)
        query = "blk.0.attn_q.weight"
        np.testing.assert_allclose(result.sums[query], expected_first, rtol=1e-5, err_msg=output)
        np.testing.assert_allclose(result.sums[output], expected_last, rtol=1e-4, err_msg=output)
        assert ("output.weight" in result.sums) is not tied
        mean = result.mean_squares()[query]
        np.testing.assert_allclose(mean, expected_first / 7, rtol=1e-5, err_msg=output)


def widths(path: Path) -> dict[str, int]:
    """Of every matrix of a file."""
    tensors = read_gguf(path).tensors
    return {name: info.shape[1] for name, info in tensors.items() if len(info.shape) == 2}


def test_every_matrix_of_the_file_has_one(tmp_path: Path) -> None:
    """Names and widths are the file's; of a base too, also where queries, keys and values are one
    matrix (phi3)."""
    student = make_student(32, 2, VOCAB)
    write_gguf(student, tmp_path / "s.gguf", "f32", TOKENIZER, NAMES)
    result = {name: len(values) for name, values in measured(student).sums.items()}
    assert result == widths(tmp_path / "s.gguf")
    for kind in ("llama", "phi3", "qwen2", "qwen3"):
        model = made(kind)
        sums = measure_importance(model, SEQUENCES, architecture_of(model.config).to_gguf_name).sums
        wanted = widths(export(model, tmp_path / f"{kind}.gguf"))
        del wanted["token_embd.weight"]  # looked up, not multiplied with: there is an output matrix
        assert {name: len(values) for name, values in sums.items()} == wanted, kind


def test_the_file_gives_back_the_same(tmp_path: Path) -> None:
    """Written as llama-imatrix does, read through the checked reader."""
    result = measured(make_student(32, 1))
    write_importance(result, tmp_path / "imatrix.gguf", ["some text"])
    file = read_gguf(tmp_path / "imatrix.gguf", model=False)
    expected = {"general.type": "imatrix", "imatrix.datasets": ["some text"]}
    expected |= {"imatrix.chunk_count": 3, "imatrix.chunk_size": 2}
    assert {key: file.value(key) for key in expected} == expected
    again = read_mean_squares({name: file.tensor(name) for name in file.tensors})
    assert again.keys() == result.sums.keys()
    for name, values in result.mean_squares().items():
        assert np.array_equal(again[name], values)  # or later exports would differ from the run's


def test_what_is_none_is_refused() -> None:
    """Nothing of a damaged file reaches the quantizer."""
    ones, one = np.ones((1, 4), np.float32), np.ones((1, 1), np.float32)
    cases: list[tuple[dict, str]] = [
        ({}, "no tensor"),
        ({"a.in_sum2": ones}, "no count"),
        ({"a.in_sum2": ones, "a.counts": 0 * one}, "no count"),
        ({"a.in_sum2": ones, "a.counts": np.nan * one}, "no count"),
        ({"a.in_sum2": -ones, "a.counts": one}, "no mean squares"),
        ({"a.in_sum2": np.inf * ones, "a.counts": one}, "no mean"),
    ]
    for tensors, message in cases:
        with pytest.raises(ValueError, match=message):
            pytest.fail(f"{tensors} is read as {read_mean_squares(tensors)}")


def test_text_is_taken_from_beginning_to_end() -> None:
    """Data may be in order of topics: what is looked at comes from all of it, as much as asked."""
    for count, tokens, expected in ((20_000, 16_384, 32), (10, 16_384, 10), (9, 3, 1)):
        indices = evenly_spaced(np.full(count, 512), tokens)
        assert len(indices) == len(set(indices.tolist())) == expected and indices[0] == 0, count
        if expected > 1:
            steps = np.diff(indices)
            assert indices[-1] == count - 1 and steps.max() - steps.min() <= 1, count
