"""Data is tokenized once, onto disk, and whoever asks for the same again does not read it."""

from __future__ import annotations

import json
import os
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.capture import corpus as corpus_module
from distill.capture.corpus import Corpus, build_corpus
from distill.capture.sequences import drafts
from distill.capture.sequences.known import StoreLocation, find_sequences
from distill.capture.sequences.stored import stored_corpus
from distill.config.loading import load_config
from distill.config.schema import RunConfig
from teachers.atomic_files import StoreError, is_temporary
from teachers.base import Progress, Sampling, no_progress
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store import sequences
from teachers.store.manifest import MANIFEST, SEQUENCES
from teachers.store.sequence_index import INDEX, Index, Item, Tally, read_index
from teachers.store.sequences import SequenceFiles, part_path, write_sequences

MIXED = [
    {"prompt": "How many?", "completion": "Three."},
    {"prompt": "And now?"},
    {"text": "Plain words, one after another. " * 40},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
]


def settings(path: Path | None, *more: str) -> RunConfig:
    """Settings with this data."""
    return load_config(None, {"data.path": str(path) if path else None}, more)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def alike(one: Item, other: Item) -> bool:
    """Whether two sequences are the same."""
    same = len(one.segments) == len(other.segments) and one.speaks == other.speaks
    masks = (one.keep is None) == (other.keep is None)
    return (
        same
        and masks
        and all(map(np.array_equal, one.segments, other.segments))
        and (one.keep is None or np.array_equal(one.keep, other.keep))  # type: ignore[arg-type]
    )


def at_once(make: Callable[[Progress], Corpus]) -> Corpus:
    return make(no_progress)


def kept(config: RunConfig, teacher: GGUFTeacher, store: Path) -> Corpus:
    """The sequences in a store, from there or put there."""
    place = StoreLocation(store, store.parent, "tiny")
    with stored_corpus(config, teacher, place, at_once, lambda: None) as corpus:
        assert isinstance(corpus.items, SequenceFiles)
        if corpus.items.pending is not None:
            (store / MANIFEST).touch()
            corpus.items.keep_in(store / SEQUENCES)
    return corpus


def test_sequences_on_disk_are_those_in_memory(
    tmp_path: Path, tiny_teacher: GGUFTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every kind of data, across the parts' borders, and also where tokens are spooled to a
    temporary file."""
    monkeypatch.setattr(sequences, "PART_TOKENS", 300)
    monkeypatch.setattr(drafts, "IN_MEMORY", 100)
    data = write_lines(tmp_path / "mixed.jsonl", MIXED * 8)
    for number, (path, *more) in enumerate(
        (
            (data, "data.max_length=32"),
            (data, "data.max_length=32", "data.train_on=all"),
            (data, "data.samples=9"),
            (None, "data.samples=50"),
        )
    ):
        config = settings(path, *more)
        expected = build_corpus(config.data, tiny_teacher, config.seed)
        corpus = kept(config, tiny_teacher, tmp_path / f"store-{number}")
        assert len(corpus) == len(expected) > 2 and corpus.digest() == expected.digest(), number
        assert corpus.tally == expected.tally and corpus.notes == expected.notes, number
        assert corpus.sampling == expected.sampling and corpus.masked == expected.masked, number
        assert all(map(alike, corpus.items, expected.items)), number
        assert all(map(alike, corpus.items[3:7], expected.items[3:7])), number
        assert isinstance(corpus.items, SequenceFiles)
        assert len(corpus.items.about.parts) > 1 or number == 2
        again = SequenceFiles(corpus.items.folder, corpus.items.about)
        assert alike(again[len(again) - 1], expected.items[-1]), number


def test_a_worker_that_joins_does_not_read_the_data(
    tmp_path: Path, tiny_teacher: GGUFTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor tokenizes it; also after the files were copied. Of other data, settings or another
    teacher it makes its own."""
    path, store = write_lines(tmp_path / "a.jsonl", MIXED * 3), tmp_path / "store"
    first = kept(settings(path), tiny_teacher, store)
    made: list[int] = []
    plan = corpus_module.plan_corpus

    def counted(*given: Any, **more: Any) -> Any:
        made.append(1)
        return plan(*given, **more)

    monkeypatch.setattr("distill.capture.sequences.stored.plan_corpus", counted)
    place = StoreLocation(store, tmp_path, "tiny")
    os.utime(path, (1, 1))
    for _ in range(2):
        assert (
            kept(settings(path, "data.held_out=0.1"), tiny_teacher, store).digest()
            == first.digest()
        )
    assert find_sequences(place, settings(path)) is not None and not made
    changed = [settings(path, "data.max_length=20"), settings(path, "seed=4"), settings(None)]
    path.write_text(path.read_text().replace("Three", "Seven"))
    changed.append(settings(path))
    for config in changed:
        assert find_sequences(place, config) is None
        kept(config, tiny_teacher, tmp_path / f"other-{len(made)}")
    assert len(made) == len(changed)


def test_one_process_reads_the_data_for_all(tmp_path: Path, tiny_teacher: GGUFTeacher) -> None:
    """The others wait; a process that fails over it leaves nothing, and its last words."""
    config, store = settings(write_lines(tmp_path / "a.jsonl", MIXED * 3)), tmp_path / "store"
    place, begun, read = StoreLocation(store, tmp_path, "tiny"), threading.Event(), list[int]()

    def failing(make: Callable[[Progress], Corpus]) -> Corpus:
        make(no_progress)
        raise ValueError("no more")

    with (
        pytest.raises(ValueError),
        stored_corpus(config, tiny_teacher, place, failing, lambda: None),
    ):
        pytest.fail("it is there")
    assert {path.name for path in store.iterdir()} == {"tasks"}
    assert {path.name for path in (store / "tasks").iterdir()} == {f"{SEQUENCES}.failed"}

    def once(make: Callable[[Progress], Corpus]) -> Corpus:
        read.append(1)
        begun.set()
        return make(no_progress)

    found: list[str] = []

    def work() -> None:
        with stored_corpus(config, tiny_teacher, place, once, lambda: None) as corpus:
            assert isinstance(corpus.items, SequenceFiles)
            corpus.items.keep_in(store / SEQUENCES)
            found.append(corpus.digest())

    lock = threading.Thread(target=work)
    lock.start()
    begun.wait()
    work()
    lock.join()
    assert len(read) == 1 and len(found) == 2 and found[0] == found[1]
    assert not [path for path in store.iterdir() if is_temporary(path)]


def test_damage_is_told(tmp_path: Path, tiny_teacher: GGUFTeacher) -> None:
    """The file, and what to do; of each part when it is first looked at."""
    config, store = settings(write_lines(tmp_path / "a.jsonl", MIXED * 3)), tmp_path / "store"
    corpus = kept(config, tiny_teacher, store)
    index, part = store / SEQUENCES / INDEX, part_path(store / SEQUENCES, 0)
    whole, place = part.read_bytes(), StoreLocation(store, tmp_path, "tiny")
    for data in (b"", whole[:-1], whole[:-3] + b"abc", None):
        part.unlink()
        if data is not None:
            part.write_bytes(data)
        else:
            part.mkdir()
            part.rmdir()
        files = SequenceFiles(store / SEQUENCES, corpus.items.about)  # type: ignore[attr-defined]
        with pytest.raises(StoreError, match=r"part-00000.* is missing or damaged; move"):
            files[0]
        part.write_bytes(whole)
    known = json.loads(index.read_text())
    for content in ("", "{}", "[]", json.dumps(known | {"parts": [[1, ""]]})):
        index.write_text(content)
        with pytest.raises(StoreError, match=r"sequences\.json is damaged .*move"):
            find_sequences(place, config)
    index.write_text(json.dumps(known | {"format": 9}))
    with pytest.raises(StoreError, match="has format 9"):
        read_index(store / SEQUENCES)


def test_memory_does_not_grow_with_the_sequences(tmp_path: Path) -> None:
    """Neither of writing nor of reading some of them."""
    item = Item((np.arange(512, dtype=np.int32),), False)
    peaks = []
    for count in (20_000, 80_000):
        folder = tmp_path / f"{count}"
        folder.mkdir()
        tracemalloc.start()
        index = write_sequences(
            folder, (item for _ in range(count)), Index(Sampling(), Tally(), [])
        )
        assert len(SequenceFiles(folder, index)[count - 300 : count - 1]) == 299
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] < 150 << 20, peaks
