"""The shape of a teacher's layers: read from untrusted files, kept in stores."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType

from distill.capture.capture import keep_teacher_record
from distill.runtime.progress import Console
from students.model.decoder import SO8TForCausalLM
from teachers import example_teacher
from teachers.base import TeacherShape
from teachers.ensemble import EnsembleTeacher
from teachers.gguf.file import Field, GGUFFile, read_gguf
from teachers.huggingface.teacher import HuggingFaceTeacher
from teachers.llama_cpp.teacher import GGUFTeacher, shape_in
from teachers.llama_cpp.wire import Arrays
from teachers.store.store import SoftTargetStore
from teachers.store.teacher_record import TEACHER, find_teacher_record, require_teacher_record
from tests.support.children.capture_child import Source
from tests.support.stores import filled
from tests.support.tiny_checkpoint import make_folder

U32, F32, ARRAY = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.ARRAY
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


def shape_of(changes: dict[str, Field | None], width: int = 1024) -> TeacherShape:
    """The shape in a header with some keys changed or taken out."""
    fields = {"general.architecture": Field("qwen3", GGUFValueType.STRING)}
    for key, field in (WHOLE | changes).items():
        if field is not None:
            fields[f"qwen3.{key}"] = field
    return shape_in(GGUFFile(Path("none.gguf"), 0, fields, {}), width)


def test_metadata_as_it_stands() -> None:
    """Every value; a float32 as the decimal that was meant."""
    found = shape_of({})
    assert found == EXPECTED and repr(found.rms_norm_eps) == "1e-06"


def test_what_llama_cpp_assumes_where_a_key_is_missing() -> None:
    """As many key/value heads as heads, heads that fill the width, a rotary base of 10000."""
    bare: dict[str, Field | None] = dict.fromkeys(WHOLE)
    assert shape_of(bare) == TeacherShape(rope_theta=10000.0)
    bare["attention.head_count"] = Field(16, U32)
    assert shape_of(bare) == TeacherShape(16, 16, 64, None, 10000.0, None)
    key, value = "attention.key_length", "attention.value_length"
    assert shape_of({key: None, value: None}, 1000).head_width is None  # 16 does not divide 1000
    # Keys and values of different width, as in DeepSeek's attention, have no width.
    assert shape_of({value: Field(64, U32)}).head_width is None
    assert shape_of({value: None}).head_width is None
    assert shape_of({value: None}, 2048).head_width == 128


def test_values_that_no_model_has_are_not_known() -> None:
    """Wrong type, one per layer, not positive, not finite, absurd: that value is not known."""
    wrong = [
        Field(0, U32),
        Field(-1, GGUFValueType.INT32),
        Field(True, GGUFValueType.BOOL),
        Field(False, GGUFValueType.BOOL),
        Field("8", GGUFValueType.STRING),
        Field([8, 8, 0, 8], ARRAY, U32),
        Field(float("nan"), F32),
        Field(float("inf"), F32),
        Field(-0.5, F32),
        Field(1 << 60, GGUFValueType.UINT64),
    ]
    names = {
        "attention.head_count": "heads",
        "attention.head_count_kv": "kv_heads",
        "feed_forward_length": "ffn_width",
        "rope.freq_base": "rope_theta",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    }
    for (key, name), field in product(names.items(), wrong):
        assert shape_of({key: field}) == replace(EXPECTED, **{name: None}), (key, field.value)


def test_the_example_teacher(example_gguf: GGUFTeacher) -> None:
    """Against its header, read with the gguf package's own reader."""
    keys = (*WHOLE, "embedding_length")
    fields = GGUFReader(example_teacher()).fields
    value = {key: fields[f"phi3.{key}"].contents() for key in keys if f"phi3.{key}" in fields}
    shape = example_gguf.info.shape
    assert shape.heads == value["attention.head_count"]
    assert shape.kv_heads == value["attention.head_count_kv"]
    assert shape.head_width == value["embedding_length"] // value["attention.head_count"]
    assert shape.ffn_width == value["feed_forward_length"]
    assert shape.rope_theta == value["rope.freq_base"]
    epsilon = np.float32(value["attention.layer_norm_rms_epsilon"])
    assert np.float32(shape.rms_norm_eps) == epsilon


def test_an_exported_student_is_a_teacher_of_its_own_shape(
    tiny_teacher: GGUFTeacher, tiny_student: SO8TForCausalLM
) -> None:
    """What export writes is what is read back, from the file itself too."""
    config = tiny_student.config
    assert tiny_teacher.info.shape == TeacherShape(
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.intermediate_size,
        config.rope_theta,
        config.rms_norm_eps,
    )
    assert shape_in(read_gguf(tiny_teacher.file.path), 64).heads == config.num_attention_heads == 4


def test_transformers_folders_and_mixtures(tmp_path: Path) -> None:
    """From the configuration; heads with their own width; a mixture has the first one's shape."""
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


@pytest.fixture
def kept(tmp_path: Path, tiny_teacher: GGUFTeacher) -> SoftTargetStore:
    """A store with what it keeps of the tiny teacher."""
    store, _ = filled(tmp_path / "store", tiny_teacher, Source())
    keep_teacher_record(tiny_teacher, tiny_teacher.file.path, store, Console())
    return store


def rewrite(store: SoftTargetStore, arrays: Arrays, shape: object) -> None:
    """Put something else where the store keeps the teacher's shape, or nothing at all."""
    card = json.loads(arrays["card"].tobytes())
    card["info"]["shape"] = shape
    if shape is None:
        del card["info"]["shape"]
    content = np.frombuffer(json.dumps(card).encode("ascii"), dtype=np.uint8)
    store.write_file(TEACHER, {**arrays, "card": content})


def test_a_store_keeps_the_shape_and_one_of_an_older_version_is_completed(
    kept: SoftTargetStore, tiny_teacher: GGUFTeacher
) -> None:
    """Value for value; of one without a shape nothing is known until a rerun beside the teacher."""
    assert require_teacher_record(kept).info.shape == tiny_teacher.info.shape != TeacherShape()
    rewrite(kept, require_teacher_record(kept).arrays(), None)
    assert require_teacher_record(kept).info == replace(tiny_teacher.info, shape=TeacherShape())
    keep_teacher_record(tiny_teacher, tiny_teacher.file.path, kept, Console())
    assert require_teacher_record(kept).info == tiny_teacher.info


def test_nonsense_in_a_store_is_damage(kept: SoftTargetStore) -> None:
    """This program would not have written it."""
    whole = require_teacher_record(kept)
    sound = asdict(whole.info.shape)
    changes: list[dict[str, object]] = [
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
    ]
    for shape in (*(sound | change for change in changes), [], [1], "4", 4, False):
        rewrite(kept, whole.arrays(), shape)
        assert find_teacher_record(kept) is None, shape
    rewrite(kept, whole.arrays(), sound)
    assert require_teacher_record(kept).info == whole.info


def test_peak_memory_is_the_workers_own(tiny_teacher_path: Path) -> None:
    """Not what the process that started it has, and at least what it has now."""
    ballast = np.ones(200 << 17)  # 200 MiB, all of it touched
    with GGUFTeacher(tiny_teacher_path, threads=1) as model:
        before = model.peak_memory()
        assert 1 << 20 < model.memory() <= before < ballast.nbytes
        model.logits([np.arange(200, dtype=np.int32)] * 60)  # 49 MB of logits
        assert model.peak_memory() > before + (40 << 20)
