"""The trimmed file: rows copied as they are stored, everything else untouched, or a refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize

from distill.trimming.file import require_plain_vocabulary, write_reduced
from teachers import example_teacher
from teachers.gguf.file import GGUFFile, read_gguf
from teachers.vocabulary.metadata import reduced_fields
from teachers.vocabulary.reduced import ReducedVocabulary, VocabularyError
from teachers.vocabulary.selection import Vocabulary
from teachers.vocabulary.size import VocabularySize
from tests.support.tiny_models import VOCABULARY, Tiny, canonical, write_tiny


def raw(file: GGUFFile, name: str) -> np.ndarray:
    """A tensor's bytes, by row."""
    tensor = file.tensors[name]
    content = tensor.path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
    return np.frombuffer(content, np.uint8).reshape(tensor.shape[0], -1)


def chosen(file: GGUFFile, count: int = 611) -> ReducedVocabulary:
    """So many tokens, an odd number."""
    vocabulary = Vocabulary(file.fields)
    mass = np.random.default_rng(0).random(len(vocabulary))
    return vocabulary.select(mass, VocabularySize(count))


def test_only_the_vocabulary_changes(tmp_path: Path) -> None:
    """Tied and not, in whole files and split ones, in quantized blocks of several types."""
    tiny = Tiny(width=64)
    ours = canonical(tiny)
    blocks = {
        "token_embd.weight": quantize(ours["embed"], Type.Q4_0),
        "output.weight": quantize(ours["lm_head"], Type.Q8_0),
    }
    types = {"token_embd.weight": Type.Q4_0, "output.weight": Type.Q8_0}
    paths = {
        "example": example_teacher(),
        "untied": write_tiny(tmp_path / "untied.gguf", tiny),
        "blocks": write_tiny(tmp_path / "blocks.gguf", tiny, blocks, types=types),
        "split": write_tiny(tmp_path / "split.gguf", tiny, per_part=5),
    }
    for name, path in paths.items():
        file, shares = read_gguf(path), list[float]()
        reduced = chosen(file)
        out = tmp_path / f"{name}-out.gguf"
        write_reduced(file, reduced, out, {"distill.trim.of": name}, shares.append)
        trimmed = read_gguf(out)
        assert shares == sorted(shares) and shares[-1] == 1, name
        expected = reduced_fields(file.fields, reduced)
        split = {key for key in expected if key.startswith("split.")}
        added = trimmed.fields.pop("distill.trim.of").value
        assert added == name and len(split) == (3 if name == "split" else 0)
        assert trimmed.fields == {k: v for k, v in expected.items() if k not in split}, name
        assert trimmed.tensors.keys() == file.tensors.keys(), name
        for key, tensor in file.tensors.items():
            cut = key in ("token_embd.weight", "output.weight")
            assert trimmed.tensors[key].type == tensor.type, (name, key)
            rows = raw(file, key)[reduced.kept if cut else slice(None)]
            assert np.array_equal(raw(trimmed, key), rows), (name, key)


def test_vocabularies_elsewhere_are_refused(tmp_path: Path) -> None:
    """By the architecture's name and what is in the way."""
    plain = np.zeros(VOCABULARY, np.float32)
    rows: list[tuple[dict[str, object], dict[str, object], str, str]] = [
        ({"per_layer_token_embd.weight": np.zeros((VOCABULARY, 8), np.float32)}, {}, "gemma3n",
         "'gemma3n' cannot be cut: .* 'per_layer_token_embd.weight'"),
        ({"output.bias": plain}, {}, "phi2", "'phi2' cannot be cut: .*'output.bias'"),
        ({"codec.head": np.zeros((3, VOCABULARY), np.float32)}, {}, "llama", "'codec.head'"),
        ({}, {}, "chameleon", "'chameleon' cannot be cut: .*token ids"),
        ({}, {"tokenizer.ggml.weights": [1.0] * VOCABULARY}, "llama", "weights has an entry"),
        ({"output.weight": np.zeros((8, 48), np.float32)}, {}, "llama", "output.weight has 8 rows"),
    ]  # fmt: skip
    for tensors, values, architecture, message in rows:
        path = write_tiny(tmp_path / "one.gguf", Tiny(), tensors, values, architecture)  # type: ignore[arg-type]
        with pytest.raises(VocabularyError, match=message) as refusal:
            require_plain_vocabulary(read_gguf(path))
            pytest.fail(message)
        assert str(path) in str(refusal.value)
