"""In what a processor trains faster, tried once."""

from __future__ import annotations

import itertools
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from distill.config.schema import TrainConfig
from distill.runtime import faster_precision
from distill.runtime.device import choose_precision
from distill.runtime.faster_precision import GAIN, LEAST_WIDTH, MOST_WIDTH

CPU = torch.device("cpu")


def test_a_processor_is_tried_once_and_what_it_said_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One trial for each width up to the widest that is tried, in this process and in the next
    ones; narrow students need none; a damaged record, or one that cannot be kept, is no error."""
    monkeypatch.setattr(faster_precision, "cache_folder", lambda: tmp_path)
    tried: list[int] = []

    def measured(width: int) -> float:
        tried.append(width)
        return GAIN if width == 320 else GAIN - 0.01

    monkeypatch.setattr(faster_precision, "measured_gain", measured)

    def chosen(width: int) -> str:
        return choose_precision(TrainConfig(), width, CPU)

    for start in range(2):  # two processes
        faster_precision._remembered.cache_clear()
        found = [chosen(width) for width in (LEAST_WIDTH - 8, 320, 576, 4096, 320)]
        assert found == ["fp32", "bf16", "fp32", "fp32", "bf16"], start
        assert tried == [320, MOST_WIDTH], start
    assert choose_precision(TrainConfig(precision="bf16"), 4096, CPU) == "bf16"
    for damage in ("", "{", "[]", '{"bfloat16": 1}', '{"gain": 9}'):
        for path in tmp_path.glob("precision-*.json"):
            path.write_text(damage)
        faster_precision._remembered.cache_clear()
        tried.clear()
        assert chosen(320) == "bf16" and tried == [320], damage
        texts = [path.read_text() for path in tmp_path.glob("precision-*.json")]
        assert sum('"bfloat16": true' in text and "320" in text for text in texts) == 1, damage

    @contextmanager
    def unwritable(path: Path) -> Iterator[None]:
        raise OSError("read-only file system")
        yield

    with monkeypatch.context() as patch:  # as in an image: what is there counts, without a lock
        patch.setattr(faster_precision, "_alone", unwritable)
        faster_precision._remembered.cache_clear()
        tried.clear()
        assert chosen(320) == "bf16" and tried == []

    def no_home() -> Path:
        raise OSError("there is no home folder")

    monkeypatch.setattr(faster_precision, "cache_folder", no_home)
    faster_precision._remembered.cache_clear()
    tried.clear()
    assert [chosen(320), chosen(320)] == ["bf16", "bf16"] and tried == [320]
    faster_precision._remembered.cache_clear()


def test_the_ratio_is_of_the_first_to_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least of several turns of each."""
    now = 0.0

    def takes(*seconds: float) -> Callable[[], None]:
        turns = itertools.cycle(seconds)

        def work() -> None:
            nonlocal now
            now += next(turns)

        return work

    monkeypatch.setattr(faster_precision.time, "thread_time", lambda: now)
    ratio = faster_precision._ratio(takes(9.0, 3.0, 3.3, 4.0), takes(0.1, 1.5, 1.0, 2.0))
    assert ratio == pytest.approx(3.0)


def test_the_trial_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells a precision that is imitated from one that is not: with oneDNN held to what has no
    bfloat16 (seen at its start, so in a process of its own) products take longer, and threads and
    random numbers stay as they were."""
    ticks = iter(range(1000))
    monkeypatch.setattr(faster_precision.time, "thread_time", lambda: next(ticks) * 0.016)
    calls: list[int] = []
    assert faster_precision._seconds(lambda: calls.append(1)) == pytest.approx(0.016)
    assert len(calls) == 3  # a clock of coarse steps is read until it says something
    monkeypatch.undo()
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert faster_precision.measured_gain(LEAST_WIDTH) > 0.0
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("oneDNN's setting is for other processors")
    code = (
        "from distill.runtime.faster_precision import measured_gain; print(measured_gain(256) < 1)"
    )
    monkeypatch.setenv(faster_precision.ISA, "AVX2")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
