"""The shape of a teacher's layers: read from files that are not trusted, kept in stores, believed where it can be."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType

from distill.capturing import keep_inheritance
from distill.console import Console
from students.model import SO8TForCausalLM
from teachers import example_teacher
from teachers.base import TeacherShape
from teachers.ensemble import EnsembleTeacher
from teachers.gguf_file import Field, GGUFFile, read_gguf
from teachers.gguf_teacher import GGUFTeacher, shape_in
from teachers.huggingface import HuggingFaceTeacher
from teachers.inheritance import TEACHER, find_inheritance, need_inheritance
from teachers.store import SoftTargetStore
from tests.capture_child import Source
from tests.test_capture import filled
from tests.tiny_checkpoint import make_folder

U32, F32 = GGUFValueType.UINT32, GGUFValueType.FLOAT32
WHOLE: dict[str, Field] = {
    "attention.head_count": Field(16, U32),
    "attention.head_count_kv": Field(8, U32),
    "attention.key_length": Field(128, U32),
    "attention.value_length": Field(128, U32),
    "feed_forward_length": Field(3072, U32),
    "rope.freq_base": Field(1e6, F32),
    "attention.layer_norm_rms_epsilon": Field(float(np.float32(1e-6)), F32),
}
EXPECTED = TeacherShape(16, 8, 128, 3072, 1e6, 1e-6)


def header(**changes: Field | None) -> GGUFFile:
    """A header with some keys changed (dots written as ``__``) or taken out."""
    fields = WHOLE | {key.replace("__", "."): field for key, field in changes.items()}  # type: ignore[operator]
    kept = {f"qwen3.{key}": field for key, field in fields.items() if field is not None}
    return GGUFFile(
        Path("none.gguf"), 0, {"general.architecture": Field("qwen3", GGUFValueType.STRING), **kept}, {}
    )


def test_metadata_as_it_stands() -> None:
    """Every value; a float32 as the decimal that was meant."""
    found = shape_in(header(), 1024)
    assert found == EXPECTED and repr(found.rms_norm_eps) == "1e-06"


def test_what_llama_cpp_assumes_where_a_key_is_missing() -> None:
    """As many key/value heads as heads, heads that fill the width, and a rotary base of 10000."""
    bare = dict.fromkeys(key.replace(".", "__") for key in WHOLE if key != "attention.head_count")
    assert shape_in(header(**bare), 1024) == TeacherShape(16, 16, 64, None, 10000.0, None)
    bare["attention__head_count"] = None
    assert shape_in(header(**bare), 1024) == TeacherShape(rope_theta=10000.0)
    lengths = {"attention__key_length": None, "attention__value_length": None}
    assert shape_in(header(**lengths), 1000).head_width is None  # 16 does not divide 1000


def test_keys_and_values_of_different_width_have_no_width() -> None:
    """As in DeepSeek's attention; and a value width that is not said is that of heads that fill the width."""
    assert shape_in(header(attention__value_length=Field(64, U32)), 1024).head_width is None
    assert shape_in(header(attention__value_length=None), 1024).head_width is None
    assert shape_in(header(attention__value_length=None), 2048).head_width == 128


NAMES = {
    "attention__head_count_kv": "kv_heads",
    "feed_forward_length": "ffn_width",
    "rope__freq_base": "rope_theta",
    "attention__layer_norm_rms_epsilon": "rms_norm_eps",
}


@pytest.mark.parametrize(
    "field",
    [
        Field(0, U32),
        Field(-1, GGUFValueType.INT32),
        Field(True, GGUFValueType.BOOL),
        Field("8", GGUFValueType.STRING),
        Field([8, 8, 0, 8], GGUFValueType.ARRAY, U32),
        Field(float("nan"), F32),
        Field(float("inf"), F32),
        Field(-0.5, F32),
        Field(1 << 60, GGUFValueType.UINT64),
    ],
    ids=lambda field: f"{field.value}",
)
@pytest.mark.parametrize("key", NAMES)
def test_values_that_no_model_has_are_not_known(key: str, field: Field) -> None:
    """Wrong type, one per layer, zero, negative, not finite, absurd: that value alone is not known."""
    assert shape_in(header(**{key: field}), 1024) == replace(EXPECTED, **{NAMES[key]: None})


def test_nonsense_heads_take_nothing_else_along() -> None:
    """Heads per layer, or none: what is said of the rest still holds."""
    for wrong in (Field([16, 8], GGUFValueType.ARRAY, U32), Field(0, U32), Field(False, GGUFValueType.BOOL)):
        assert shape_in(header(attention__head_count=wrong), 1024) == replace(EXPECTED, heads=None)


def test_the_example_teacher(example_gguf: GGUFTeacher) -> None:
    """Against its header, read with the gguf package's own reader."""
    from gguf import GGUFReader

    fields = GGUFReader(example_teacher()).fields

    def value(key: str) -> Any:
        return fields[f"phi3.{key}"].contents()

    shape = example_gguf.info.shape
    assert shape.heads == value("attention.head_count") and shape.kv_heads == value("attention.head_count_kv")
    assert shape.head_width == value("embedding_length") // value("attention.head_count")
    assert shape.ffn_width == value("feed_forward_length") and shape.rope_theta == value("rope.freq_base")
    assert np.float32(shape.rms_norm_eps) == np.float32(value("attention.layer_norm_rms_epsilon"))


def test_an_exported_student_is_a_teacher_of_its_own_shape(
    tiny_teacher: GGUFTeacher, tiny_student: SO8TForCausalLM
) -> None:
    """What export writes is what is read back."""
    config = tiny_student.config
    assert tiny_teacher.info.shape == TeacherShape(
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.intermediate_size,
        config.rope_theta,
        config.rms_norm_eps,
    )


def test_transformers_folders_and_mixtures(tmp_path: Path) -> None:
    """From the configuration; heads with a width of their own; a mixture has the first one's shape."""
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    one = HuggingFaceTeacher(
        make_folder(tmp_path / "one", head_dim=24, rope_parameters=rope, rms_norm_eps=1e-4)
    )
    assert one.info.shape == TeacherShape(4, 2, 24, 128, 5000.0, 1e-4)
    other = HuggingFaceTeacher(make_folder(tmp_path / "other", kind="gpt2"))
    assert other.info.shape.heads == 4 and other.info.shape.head_width == 16
    assert other.info.shape.rms_norm_eps is None
    assert EnsembleTeacher([one, other], [1, 1]).info.shape == one.info.shape
    assert EnsembleTeacher([other, one], [1, 1]).info.shape == other.info.shape


# --- in stores


@pytest.fixture
def kept(tmp_path: Path, tiny_teacher: GGUFTeacher) -> SoftTargetStore:
    """A store with what it keeps of the tiny teacher."""
    store, _ = filled(tmp_path / "store", tiny_teacher, Source())
    keep_inheritance(tiny_teacher, tiny_teacher.file.path, store, Console())
    return store


def rewrite(store: SoftTargetStore, shape: object) -> None:
    """Put something else where the store keeps the teacher's shape, or nothing at all."""
    arrays = need_inheritance(store).arrays()
    card = json.loads(arrays["card"].tobytes())
    if shape is None:
        del card["info"]["shape"]
    else:
        card["info"]["shape"] = shape
    card_bytes = np.frombuffer(json.dumps(card).encode("ascii"), dtype=np.uint8)
    store.write_file(TEACHER, {**arrays, "card": card_bytes})


def test_a_store_keeps_the_shape(kept: SoftTargetStore, tiny_teacher: GGUFTeacher) -> None:
    """Value for value."""
    assert need_inheritance(kept).info.shape == tiny_teacher.info.shape != TeacherShape()


def test_a_store_of_an_older_version_loads_and_is_completed(
    kept: SoftTargetStore, tiny_teacher: GGUFTeacher
) -> None:
    """Without a shape it is one of which nothing is known; a rerun beside the teacher adds what it is."""
    rewrite(kept, None)
    assert need_inheritance(kept).info == replace(tiny_teacher.info, shape=TeacherShape())
    keep_inheritance(tiny_teacher, tiny_teacher.file.path, kept, Console())
    assert need_inheritance(kept).info == tiny_teacher.info


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 0},
        {"heads": 4.0},
        {"heads": True},
        {"heads": "4"},
        {"heads": [4]},
        {"kv_heads": -1},
        {"ffn_width": 1 << 40},
        {"rope_theta": float("nan")},
        {"rope_theta": float("inf")},
        {"rms_norm_eps": 0.0},
        {"rms_norm_eps": "1e-5"},
        {"legs": 4},
    ],
    ids=str,
)
def test_nonsense_in_a_store_is_damage(kept: SoftTargetStore, change: dict[str, object]) -> None:
    """This program would not have written it."""
    rewrite(kept, asdict(need_inheritance(kept).info.shape) | change)
    assert find_inheritance(kept) is None


@pytest.mark.parametrize("shape", [[], [1], "4", 4, False])
def test_a_shape_that_is_no_mapping_is_damage(kept: SoftTargetStore, shape: object) -> None:
    """Nor that."""
    rewrite(kept, shape)
    assert find_inheritance(kept) is None


def test_the_real_header_is_read(tiny_teacher_path: Path) -> None:
    """Through the file's own reader too, so that types are those of real files."""
    assert shape_in(read_gguf(tiny_teacher_path), 64).heads == 4
