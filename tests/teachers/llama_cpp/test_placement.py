"""Where a model is computed: the parameters that llama.cpp gets, and what is refused."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from distill.commands.exit_codes import exit_code
from teachers.errors import SettingRefused
from teachers.llama_cpp import worker
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.teacher import GGUFTeacher
from tests.conftest import in_its_own_process
from tests.support.llama.recorded import MadeContext, recorded

pytestmark = [pytest.mark.needs_gguf, pytest.mark.usefixtures("llama_here")]
SEQUENCE = np.arange(5, 25, dtype=np.int32)
F32, F16, BF16 = 0, 1, 30  # ggml's types
NONE, BY_LAYER = 0, 1  # llama.cpp's split modes
GB = 10**9


def scored(path: Path, options: LoadOptions) -> np.ndarray:
    """Open and ask for what is not exact."""
    with GGUFTeacher(path, options, threads=1) as teacher:
        return teacher.logits([SEQUENCE])


def test_without_layers_on_a_gpu_nothing_is(tiny_teacher_path: Path) -> None:
    """Neither weights nor cache, nor a product; no GPU is even opened to ask for its memory."""
    with recorded(24 * GB, 24 * GB) as seen:
        scored(tiny_teacher_path, LoadOptions())
    assert {model[:4] for model in map(hashable, seen.models)} == {(0, (), NONE, -1)}
    assert not any(one.op_offload or one.offload_kqv for one in seen.contexts)
    assert not seen.opened


def hashable(model: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(tuple(part) if isinstance(part, list) else part for part in model)


# Environment, options, the devices, the split mode, and the share of each.
PLACES = [
    ({}, {}, [0, 1, 2], BY_LAYER, [0.4, 0.4, 0.2]),
    ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}, {}, [1], NONE, []),
    ({"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "6"}, {}, [1], NONE, []),
    ({"LOCAL_RANK": "1"}, {"main_gpu": 2}, [2], NONE, []),
    ({}, {"tensor_split": (3.0, 0.0, 1.0)}, [0, 2], BY_LAYER, [0.75, 0.25]),
    ({}, {"tensor_split": (0.0, 1.0, 0.0)}, [1], NONE, []),
]


def test_which_gpus(tiny_teacher_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process of a launch its own, in turn; one alone all, by free memory; or as set. No other
    GPU is opened: each process would take some memory of it."""
    for environment, options, devices, mode, shares in PLACES:
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with recorded(20 * GB, 20 * GB, 10 * GB + (1 << 28)) as seen:
            scored(tiny_teacher_path, LoadOptions(gpu_layers=-1, **options))
        row = (environment, options)
        model = seen.models[0]
        assert (model.gpu_layers, model.devices, model.split_mode) == (-1, devices, mode), row
        assert model.main_gpu == 0 and np.allclose(model.tensor_split, shares, atol=0.02), row
        assert seen.opened == set(devices), row
        # What it is compared with, once, is computed on the processor alone.
        assert all(other.devices == [] for other in seen.models[1:]), row


def test_processes_that_share_a_gpu_share_its_memory(
    tiny_teacher_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes it that the others take as much."""
    rooms = []
    for world in ("1", "4"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", world)
        with (
            recorded(20 * GB, 20 * GB),
            GGUFTeacher(tiny_teacher_path, LoadOptions(-1, main_gpu=0), threads=1) as teacher,
        ):
            rooms.append(teacher.worker._process.server.model.sizes.pools[0].room)  # type: ignore[attr-defined]
    assert 4 * rooms[1] < rooms[0] < 5 * rooms[1]


def test_settings_reach_llama_cpp(tiny_teacher_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Type of cache, tokens of a batch and sequences, on a GPU and without one; what is exact keeps
    its float32 cache. Beside a GPU the processor's part has this process's share of the cores."""
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 12)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(24), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    options = LoadOptions(cache_type="bf16", batch_tokens=64, sequences=2)
    for gpu_layers, threads in ((0, 1), (-1, 4)):
        with (
            recorded(24 * GB) as seen,
            GGUFTeacher(
                tiny_teacher_path,
                LoadOptions(**vars(options) | {"gpu_layers": gpu_layers}),
                threads=1,
            ) as teacher,
        ):
            assert ", bf16 cache" in teacher.runtime and "main" not in teacher.runtime
            teacher.logits([SEQUENCE] * 9)
            offload = gpu_layers != 0
            assert seen.contexts[-1] == MadeContext(offload, offload, (BF16, BF16), 64, 2, threads)
            teacher.logits([SEQUENCE], exact=True)
            assert seen.contexts[-1].cache == (F32, F32)
    with recorded(24 * GB) as seen:
        scored(tiny_teacher_path, LoadOptions(gpu_layers=-1))
    # A new type of tensor is compared with the usual cache, whatever the settings.
    assert seen.contexts[-1].cache == (F16, F16) and seen.contexts[-1].batch == 2048


def test_the_same_numbers_wherever_the_batches_end(tiny_teacher_path: Path) -> None:
    """Sizes change no result but by rounding."""
    sequences = [np.arange(5 + n, 60 + n, dtype=np.int32) for n in range(9)]
    results = []
    for options in (LoadOptions(cache_type="f32", batch_tokens=64, sequences=1), LoadOptions()):
        with GGUFTeacher(tiny_teacher_path, options, threads=1) as teacher:
            results.append(teacher.logits(sequences, exact=True))
    assert np.abs(results[0] - results[1]).max() < 1e-4


# Options, free bytes of the GPUs, and what the error says.
REFUSED = [
    ({"main_gpu": 2}, [GB, GB], ["main_gpu = 2", "0: GPU 0, 1: GPU 1", "Choose one"]),
    ({"main_gpu": 0}, [], ["main_gpu = 0", "sees none", "Leave it out"]),
    ({"tensor_split": (1.0,)}, [GB, GB], ["has 1 shares", "2 GPUs (GPU 0, GPU 1)", "give each"]),
    ({"tensor_split": (1.0, 1.0)}, [], ["0 GPUs (none)", "leave it out"]),
    ({}, [GB // 4], ["does not fit on GPU 0", "0.25 GB are free", "gpu_layers=0"]),
    ({"batch_tokens": 1 << 16}, [GB], ["a batch of 65536 tokens", "GPU 0"]),
]


def test_what_is_refused(tiny_teacher_path: Path) -> None:
    """With the value and what to do, at once: no other way to run the file is tried."""
    for options, free, words in REFUSED:
        with recorded(*free) as seen, pytest.raises(SettingRefused) as refused:
            scored(tiny_teacher_path, LoadOptions(gpu_layers=-1, **options))
        said = str(refused.value)
        assert all(word in said for word in [*words, "tiny.gguf"]), (options, said)
        assert not seen.models, options


def test_a_refusal_comes_out_of_the_worker_as_what_it_is(tiny_teacher_path: Path) -> None:
    """By its own process, where this build of llama.cpp has no GPU: the user's mistake."""
    with pytest.raises(SettingRefused, match=r"tiny\.gguf: teacher\.main_gpu = 1") as refused:
        in_its_own_process(tiny_teacher_path, LoadOptions(gpu_layers=-1, main_gpu=1))
    assert exit_code(refused.value) == 2


def test_layers_for_a_gpu_that_is_not_there_are_said(
    tiny_teacher_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In one line; the default, all layers where there is a GPU, says nothing."""
    monkeypatch.setattr(worker, "already_logged", set())
    with recorded() as seen, caplog.at_level(logging.WARNING):
        scored(tiny_teacher_path, LoadOptions(gpu_layers=-1))
        assert not caplog.records
        scored(tiny_teacher_path, LoadOptions(gpu_layers=20))
    [line] = [record.getMessage() for record in caplog.records]
    assert "gpu_layers = 20 has no effect" in line and "no GPU" in line
    assert all(model.gpu_layers == 0 and not model.devices for model in seen.models)
