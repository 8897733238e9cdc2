"""The store: whole or not at all, damage noticed anywhere, identity respected, reads equal writes; frames."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teachers.soft_targets import Arrays, CompactTargets
from teachers.store import (
    MANIFEST,
    Manifest,
    SoftTargetStore,
    StoreError,
    read_manifest,
    write_whole,
)
from teachers.wire import MAX_HEADER_BYTES, pack_ragged, read_frame, unpack_ragged, write_frame

LENGTHS = (2, 7, 3, 5, 2, 4, 9)
PER_SHARD = 3
NODES = (1.0, 3.0)


def make_manifest(**changes: Any) -> Manifest:
    """A manifest of seven sequences in shards of three."""
    identity = {"teacher": "abc", "nodes": list(NODES), "num_topk": 4, "vocab_size": 50, **changes}
    return Manifest(identity, len(LENGTHS), PER_SHARD)


def make_content(shard: int, vocab_size: int = 50) -> tuple[list[np.ndarray], CompactTargets, Arrays]:
    """Seeded sequences and targets of one shard."""
    random = np.random.default_rng([shard, 11])
    lengths = LENGTHS[shard * PER_SHARD : (shard + 1) * PER_SHARD]
    sequences = [random.integers(0, vocab_size, n).astype(np.int32) for n in lengths]
    logits = torch.from_numpy(random.normal(size=(sum(lengths) - len(lengths), 50)).astype(np.float32))
    targets = CompactTargets.from_logits(logits, 4, NODES)
    targets.topk_ids[0, 0] = vocab_size - 1
    return sequences, targets, targets.arrays(vocab_size)


def filled(folder: Path, vocab_size: int = 50) -> SoftTargetStore:
    """A complete store; its shards are written last first."""
    store = SoftTargetStore.create_or_open(folder, make_manifest(vocab_size=vocab_size))
    for shard in (2, 0, 1):
        sequences, _, arrays = make_content(shard, vocab_size)
        store.write_shard(shard, sequences, arrays)
    return store


@pytest.mark.parametrize(("vocab_size", "dtype"), [(50, np.uint16), (65536, np.uint16), (70000, np.int32)])
def test_reads_equal_writes(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    """Every sequence and target across shards, from this store and from one opened afresh."""
    filled(tmp_path / "store", vocab_size)
    store = SoftTargetStore.create_or_open(tmp_path / "store", make_manifest(vocab_size=vocab_size))
    assert len(store) == 7 and store.lengths().tolist() == list(LENGTHS)
    assert [store.span(shard) for shard in range(3)] == [(0, 3), (3, 6), (6, 7)]
    for shard in range(3):
        sequences, targets, arrays = make_content(shard, vocab_size)
        assert arrays["topk_ids"].dtype == dtype and store.state(shard) == "complete"
        row = 0
        for place, sequence in enumerate(sequences):
            read = store.targets(shard * PER_SHARD + place)
            assert np.array_equal(store.tokens(shard * PER_SHARD + place), sequence)
            wanted = targets.select(torch.arange(row, row + len(sequence) - 1))
            assert read.nodes == NODES and read.topk_ids.dtype == torch.int64
            for name in ("topk_ids", "topk_logits", "logsumexp"):
                assert torch.equal(getattr(read, name), getattr(wanted, name))
            row += len(sequence) - 1


@pytest.mark.parametrize("step", ["fsync", "replace", "write"])
def test_a_failing_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """The disk refuses at any point: no shard, no temporary file, and what was there before is intact."""

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store = filled(tmp_path / "store")
    store.shard_path(1).unlink()
    before = {path.name: path.read_bytes() for path in store.folder.iterdir()}
    owner, name = {"fsync": (os, "fsync"), "replace": (Path, "replace"), "write": (Path, "open")}[step]
    sequences, _, arrays = make_content(1)
    with monkeypatch.context() as broken:
        broken.setattr(owner, name, refuse)
        with pytest.raises(OSError, match="No space left"):
            store.write_shard(1, sequences, arrays)
    assert {path.name: path.read_bytes() for path in store.folder.iterdir()} == before
    assert [store.state(shard) for shard in range(3)] == ["complete", "missing", "complete"]


def test_a_failing_overwrite_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is being replaced is the old one until it is the new one; the data is synced before."""
    path, calls = tmp_path / "file", []
    write_whole(path, b"old")
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(path.read_bytes()), fsync(handle)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (calls.append(a.read_bytes()), replace(a, b)))
    write_whole(path, b"new")
    assert calls == [b"old", b"new"] and path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_flipped_byte_anywhere_is_damage(tmp_path: Path) -> None:
    """One bit of every byte of a shard, header and padding included, in turn."""
    store = filled(tmp_path / "store")
    path = store.shard_path(2)
    whole, random = path.read_bytes(), np.random.default_rng(5)
    for place, flip in enumerate((1 << random.integers(0, 8, len(whole))).tolist()):
        data = bytearray(whole)
        data[place] ^= flip
        path.write_bytes(data)
        assert store.state(2) == "damaged", f"byte {place} changed by {flip}"
    path.write_bytes(whole)
    assert store.state(2) == "complete"


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, -1])
def test_a_truncated_shard_is_damaged(tmp_path: Path, kept: int) -> None:
    """Cut anywhere, or lengthened by a byte."""
    store = filled(tmp_path / "store")
    path = store.shard_path(0)
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    assert store.state(0) == "damaged"
    path.write_bytes(whole + b"\0")
    assert store.state(0) == "damaged"


def test_a_shard_of_another_store_or_place_is_refused(tmp_path: Path) -> None:
    """Intact in itself, but with another store's key, or under another shard's name."""
    store, other = filled(tmp_path / "store"), SoftTargetStore(tmp_path / "other", make_manifest(teacher="x"))
    other.folder.mkdir()
    shutil.copy(store.shard_path(0), other.shard_path(0))
    assert other.state(0) == "damaged"
    shutil.copy(store.shard_path(0), store.shard_path(1))
    assert store.state(1) == "damaged"


def test_a_rewritten_shard_is_read_anew(tmp_path: Path) -> None:
    """Writing a shard again replaces what was read from it before."""
    store = filled(tmp_path / "store")
    sequences, targets, _ = make_content(0)
    assert np.array_equal(store.tokens(1), sequences[1])
    changed = [sequences[1], sequences[0], sequences[2]]
    store.write_shard(0, changed, targets.arrays(50))
    assert np.array_equal(store.tokens(0), sequences[1])
    assert len(store.targets(0).topk_ids) == len(sequences[1]) - 1


def test_content_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Too few sequences, or arrays with another number of positions."""
    store = filled(tmp_path / "store")
    sequences, _, arrays = make_content(0)
    with pytest.raises(StoreError, match="2 sequences"):
        store.write_shard(0, sequences[:2], arrays)
    with pytest.raises(StoreError, match="9 positions"):
        store.write_shard(0, sequences, {**arrays, "logsumexp": arrays["logsumexp"][:-1]})
    assert store.state(0) == "complete"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "xyz"}, "teacher 'abc', not 'xyz'"),
        ({"num_topk": 8}, "num_topk 4, not 8"),
        ({"nodes": [1.0]}, r"nodes \[1.0, 3.0\], not \[1.0\]"),
        ({"extra": 1}, "extra None, not 1"),
    ],
)
def test_another_identity_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """The difference is named, and the store stays as it was."""
    store = filled(tmp_path / "store")
    before = {path.name: path.read_bytes() for path in store.folder.iterdir()}
    with pytest.raises(StoreError, match=message):
        SoftTargetStore.create_or_open(store.folder, make_manifest(**change))
    assert {path.name: path.read_bytes() for path in store.folder.iterdir()} == before


def test_another_number_of_sequences_is_refused(tmp_path: Path) -> None:
    """The same identity over fewer sequences is another store."""
    store = filled(tmp_path / "store")
    with pytest.raises(StoreError, match="7 sequences, not 6"):
        SoftTargetStore.create_or_open(store.folder, Manifest(store.manifest.identity, 6, PER_SHARD))


def test_another_shard_size_is_named(tmp_path: Path) -> None:
    """The message names what differs, here how many sequences a shard holds."""
    store = filled(tmp_path / "store")
    with pytest.raises(StoreError, match=r"3 .*not 4"):
        SoftTargetStore.create_or_open(store.folder, Manifest(store.manifest.identity, 7, 4))


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    """Nothing is written beside files that are not a store's; an empty folder is fine."""
    (tmp_path / "note").write_text("mine")
    with pytest.raises(StoreError, match="other files"):
        SoftTargetStore.create_or_open(tmp_path, make_manifest())
    assert [entry.name for entry in tmp_path.iterdir()] == ["note"]
    (tmp_path / "note").unlink()
    assert SoftTargetStore.create_or_open(tmp_path, make_manifest()).state(0) == "missing"


def test_manifest_round_trip(tmp_path: Path) -> None:
    """What is read is what was written; the key depends on the identity alone, in any order."""
    store = filled(tmp_path / "store")
    assert read_manifest(store.folder) == store.manifest
    backwards = Manifest(dict(reversed(store.manifest.identity.items())), 1, 1)
    assert backwards.key == store.manifest.key != make_manifest(teacher="x").key
    assert [Manifest({}, count, 3).shards for count in (1, 3, 4, 6, 7)] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe", b'{"format": 1}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    """Whatever is wrong with it: refused by name, and left as it is."""
    store = filled(tmp_path / "store")
    (store.folder / MANIFEST).write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        SoftTargetStore.create_or_open(store.folder, make_manifest())
    assert (store.folder / MANIFEST).read_bytes() == content


def test_a_missing_or_foreign_manifest_is_refused(tmp_path: Path) -> None:
    """No manifest is no store; another format is named."""
    with pytest.raises(StoreError, match="not a store"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 2}))
    with pytest.raises(StoreError, match="format 2"):
        read_manifest(tmp_path)


def test_a_manifest_with_a_word_for_a_number_is_refused(tmp_path: Path) -> None:
    """A count that is not a number is damage like any other."""
    content = json.loads(make_manifest().to_json()) | {"sequences": "many"}
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(StoreError, match="damaged"):
        read_manifest(tmp_path)


def frame_bytes(message: dict[str, Any], arrays: Arrays) -> bytes:
    """One frame as it goes over the pipe."""
    stream = io.BytesIO()
    write_frame(stream, message, arrays)
    return stream.getvalue()


def test_frames_round_trip() -> None:
    """Messages and arrays of any shape, type and memory order, one frame after another."""
    grid = np.arange(12, dtype=np.int64).reshape(3, 4)
    arrays: Arrays = {
        "transposed": grid.T,
        "ids": np.array([0, 65535], dtype=np.uint16),
        "none": np.empty((0, 5), dtype=np.float32),
        "scalar": np.array(2.5),
    }
    messages = [({"text": "漢字 \n"}, arrays), ({}, {}), ({"deep": {"list": [1, None, 0.5]}}, {"x": grid})]
    stream = io.BytesIO(b"".join(frame_bytes(*message) for message in messages))
    for message, sent in messages:
        got, received = read_frame(stream)
        assert got == message and list(received) == list(sent)
        for name, array in sent.items():
            assert received[name].dtype == array.dtype and received[name].shape == array.shape
            assert np.array_equal(received[name], array)
    with pytest.raises(EOFError):
        read_frame(stream)


def test_a_truncated_stream_is_the_end() -> None:
    """Cut after any byte: EOFError, never a partial frame; so is a header of impossible length."""
    whole = frame_bytes({"kind": "x"}, {"a": np.arange(5, dtype=np.int32)})
    for kept in range(len(whole)):
        with pytest.raises(EOFError):
            read_frame(io.BytesIO(whole[:kept]))
    assert read_frame(io.BytesIO(whole))[0] == {"kind": "x"}
    with pytest.raises(EOFError, match="out of step"):
        read_frame(io.BytesIO((MAX_HEADER_BYTES + 1).to_bytes(4, "little") + whole))


@pytest.mark.parametrize("lengths", [(), (3,), (2, 0, 4), (0,)])
def test_ragged_sequences_round_trip(lengths: tuple[int, ...]) -> None:
    """Sequences of any lengths, empty ones too, come back apart as they were."""
    sequences = [np.arange(10 * n, 11 * n, dtype=np.int32) for n in lengths]
    back = unpack_ragged(pack_ragged(sequences, "rows"), "rows")
    assert [row.tolist() for row in back] == [row.tolist() for row in sequences]
    assert all(row.dtype == np.int32 for row in back)
