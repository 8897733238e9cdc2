"""The store: whole or not at all, damage noticed anywhere, identity respected, reads equal writes; frames."""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from teachers.capture import fit_companion
from teachers.files import StoreError, is_temporary, write_whole
from teachers.manifest import MANIFEST, Manifest, read_manifest
from teachers.recipe import Recipe
from teachers.records import Answer, reduce
from teachers.soft_targets import Arrays, CompactTargets, DenseTargets, HiddenTargets
from teachers.store import COMPANION, SoftTargetStore
from teachers.wire import MAX_HEADER_BYTES, pack_ragged, read_frame, unpack_ragged, write_frame
from tests.conftest import BigramTeacher, write_store

LENGTHS = (2, 7, 3, 5, 2, 4, 9)
PER_SHARD = 3
RECIPE = Recipe(num_topk=4)
KINDS = {
    "buckets": RECIPE,
    "sketch": Recipe(num_topk=4, sketch_bytes=6, layers=(0, 1), layer_bytes=5),
    "hidden": Recipe("hidden", layers=(1,), layer_bytes=3),
    "dense": Recipe("dense"),
}


def make_manifest(**changes: Any) -> Manifest:
    """A manifest of seven sequences in shards of three."""
    identity = {"teacher": "abc", "recipe": RECIPE.to_json(), "vocab_size": 50, **changes}
    return Manifest(identity, len(LENGTHS), PER_SHARD)


def make_content(shard: int, vocab_size: int = 50) -> tuple[list[np.ndarray], CompactTargets, Arrays]:
    """Seeded sequences and targets of one shard; logits are stored to half precision."""
    random = np.random.default_rng([shard, 11])
    lengths = LENGTHS[shard * PER_SHARD : (shard + 1) * PER_SHARD]
    sequences = [random.integers(0, vocab_size, n).astype(np.int32) for n in lengths]
    rows = sum(lengths) - len(lengths)
    logits = torch.from_numpy(random.normal(size=(rows, vocab_size)).astype(np.float32))
    logits[0, vocab_size - 1] = 9.0  # the greatest id occurs
    targets = CompactTargets.from_logits(logits, 4)
    stored = replace(targets, topk_logits=targets.topk_logits.half().float())
    return sequences, stored, reduce(Answer(logits), RECIPE, {})


def filled(folder: Path, vocab_size: int = 50) -> SoftTargetStore:
    """A complete store; its shards are written last first."""
    store = SoftTargetStore.create_or_open(folder, make_manifest(vocab_size=vocab_size))
    for shard in (2, 0, 1):
        sequences, _, arrays = make_content(shard, vocab_size)
        store.write_shard(shard, sequences, arrays)
    return store


def filled_by_kind(folder: Path, kind: str) -> tuple[BigramTeacher, list[np.ndarray], SoftTargetStore]:
    """A complete store of one of ``KINDS``, what it was made from, opened afresh."""
    teacher, random = BigramTeacher(50, 8), np.random.default_rng(3)
    sequences = [random.integers(0, 50, n).astype(np.int32) for n in LENGTHS]
    store = write_store(folder, teacher, sequences, KINDS[kind], PER_SHARD)
    return teacher, sequences, SoftTargetStore.create_or_open(folder, store.manifest)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(50, np.uint16), (65536, np.uint16), (65537, np.int32)])
def test_reads_equal_writes(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    """Every sequence and target across shards, from this store and from one opened afresh."""
    filled(tmp_path / "store", vocab_size)
    store = SoftTargetStore.create_or_open(tmp_path / "store", make_manifest(vocab_size=vocab_size))
    assert len(store) == 7 and store.lengths().tolist() == list(LENGTHS)
    assert [store.span(shard) for shard in range(3)] == [(0, 3), (3, 6), (6, 7)]
    assert not store.needs_companion and store.companion() is None
    for shard in range(3):
        sequences, targets, arrays = make_content(shard, vocab_size)
        assert arrays["topk_ids"].dtype == dtype and store.state(shard) == "complete"
        assert int(targets.topk_ids.max()) == vocab_size - 1
        row = 0
        for place, sequence in enumerate(sequences):
            read = store.targets(shard * PER_SHARD + place)
            assert np.array_equal(store.tokens(shard * PER_SHARD + place), sequence)
            wanted = targets.select(slice(row, row + len(sequence) - 1))
            assert isinstance(read, CompactTargets) and read.topk_ids.dtype == torch.int64
            assert read.vocab_size == vocab_size and read.head is None and read.coordinates is None
            for name in ("topk_ids", "topk_logits", "tail"):
                assert torch.equal(getattr(read, name), getattr(wanted, name))
            row += len(sequence) - 1


@pytest.mark.parametrize("kind", ["sketch", "hidden", "dense"])
def test_other_kinds_read_back(tmp_path: Path, kind: str) -> None:
    """Typed as their recipe says, row by row across shards, with the head and the layers of the companion."""
    teacher, sequences, store = filled_by_kind(tmp_path / "store", kind)
    assert store.needs_companion == (kind != "dense") and store.manifest.recipe == KINDS[kind]
    companion = store.companion()
    for index, sequence in enumerate(sequences):
        read, logits = store.targets(index), torch.from_numpy(teacher.logits([sequence]))
        found = teacher.states([sequence], KINDS[kind].layers)
        states = {name: torch.from_numpy(rows) for name, rows in found.items()}
        if isinstance(read, DenseTargets):
            assert kind == "dense" and torch.equal(read.logits, logits)
            continue
        assert companion is not None and companion.head is not None and read.coordinates is not None
        if isinstance(read, HiddenTargets):
            assert kind == "hidden" and torch.equal(read.head.matrix, teacher.matrix.half().float())
            step = states["final"].abs().amax(dim=-1, keepdim=True) / 127
            assert bool(((read.coordinates - states["final"]).abs() <= 0.501 * step).all())
        else:
            assert kind == "sketch" and torch.equal(read.topk_ids, logits.topk(4).indices)
            basis = companion.bases["final"]
            wanted = basis.coordinates(*basis.encoded(states["final"]))
            assert read.coordinates.shape[1] > 0 and torch.equal(read.coordinates, wanted)
            assert read.head is not None and torch.equal(read.head.matrix, companion.head.matrix)
        kept = store.layer_states(index)
        assert tuple(kept) == KINDS[kind].layers
        for layer, coordinates in kept.items():
            basis = companion.bases[f"layer{layer}"]
            assert torch.equal(coordinates, basis.coordinates(*basis.encoded(states[f"layer{layer}"])))


@pytest.mark.parametrize("kind", ["sketch", "hidden"])
def test_a_companion_reads_as_it_was_written(tmp_path: Path, kind: str) -> None:
    """Every basis to the bit; the head's matrix as float16 has it."""
    teacher, sequences, store = filled_by_kind(tmp_path / "store", kind)
    written, read = fit_companion(teacher, sequences, KINDS[kind]), store.companion()  # type: ignore[arg-type]
    assert read is not None and written.head is not None and read.head is not None
    assert set(read.bases) == set(written.bases)
    for name, basis in written.bases.items():
        assert read.bases[name].wide == basis.wide
        for part in ("mean", "encode", "decode", "ranges"):
            assert torch.equal(getattr(read.bases[name], part), getattr(basis, part)), (name, part)
    assert torch.equal(read.head.matrix, written.head.matrix.half().float())
    assert torch.equal(read.head.bias, written.head.bias) and read.head.matrix.dtype == torch.float32


@pytest.mark.parametrize("kind", ["sketch", "hidden"])
def test_a_flipped_byte_anywhere_in_the_companion_is_damage(tmp_path: Path, kind: str) -> None:
    """One bit of every byte in turn: nothing is read with it, and the refusal says what to do."""
    _, _, store = filled_by_kind(tmp_path / "store", kind)
    path, random = store.folder / COMPANION, np.random.default_rng(6)
    whole = path.read_bytes()
    for place, flip in enumerate((1 << random.integers(0, 8, len(whole))).tolist()):
        data = bytearray(whole)
        data[place] ^= flip
        path.write_bytes(data)
        opened = SoftTargetStore(store.folder, store.manifest)
        assert opened.companion() is None, f"byte {place} changed by {flip}"
    for read in (opened.targets, opened.layer_states):
        with pytest.raises(
            StoreError, match=r"companion\.safetensors is missing or damaged; run the capture"
        ):
            read(0)
    path.unlink()
    assert opened.companion() is None
    path.write_bytes(whole)
    assert opened.companion() is not None and len(opened.layer_states(0)) == len(KINDS[kind].layers)


def test_a_companion_of_another_store_is_refused(tmp_path: Path) -> None:
    """Intact in itself, but with another store's key; nor is a shard taken for one."""
    _, _, store = filled_by_kind(tmp_path / "store", "sketch")
    other = SoftTargetStore.create_or_open(
        tmp_path / "other", Manifest({**store.manifest.identity, "teacher": "x"}, 7, PER_SHARD)
    )
    shutil.copy(store.folder / COMPANION, other.folder / COMPANION)
    assert other.companion() is None
    shutil.copy(store.shard_path(0), store.folder / COMPANION)
    assert SoftTargetStore(store.folder, store.manifest).companion() is None


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_anywhere_is_damage(tmp_path: Path, kind: str) -> None:
    """One bit of every byte of a shard, padding included, in turn; every bit of its header."""
    _, _, store = filled_by_kind(tmp_path / "store", kind)
    path = store.shard_path(2)
    whole, random = path.read_bytes(), np.random.default_rng(5)
    header = 8 + int.from_bytes(whole[:8], "little")
    flips = [(place, 1 << bit) for place in range(header) for bit in range(8)]
    flips += list(enumerate((1 << random.integers(0, 8, len(whole))).tolist()))[header:]
    for place, flip in flips:
        data = bytearray(whole)
        data[place] ^= flip
        path.write_bytes(data)
        assert store.state(2) == "damaged", f"byte {place} changed by {flip}"
    path.write_bytes(whole)
    assert store.state(2) == "complete"


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F4", "U128"])
def test_a_shard_of_unheard_of_numbers_is_damaged(tmp_path: Path, dtype: str) -> None:
    """A header may name types that numpy, or nobody, has."""
    store = filled(tmp_path / "store")
    header = json.dumps({"tokens": {"dtype": dtype, "shape": [4], "data_offsets": [0, 8]}}).encode()
    store.shard_path(0).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert store.state(0) == "damaged"


def test_a_shard_with_other_arrays_is_damaged(tmp_path: Path) -> None:
    """Right in its own checksum, key and name counts only as far as the checksum was made with the arrays."""
    store = filled(tmp_path / "store")
    path = store.shard_path(0)
    arrays = safetensors.numpy.load(path.read_bytes())
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    for changed in (
        {name: rows for name, rows in arrays.items() if name != "tail"},
        {**arrays, "extra": np.zeros(3, np.float32)},
        {**arrays, "tail": arrays["tail"].reshape(2, -1)},
        {**arrays, "topk_ids": arrays["topk_ids"].astype(np.int32)},
    ):
        path.write_bytes(safetensors.numpy.save(changed, metadata=metadata))
        assert store.state(0) == "damaged"
    path.write_bytes(safetensors.numpy.save(arrays, metadata=metadata))
    assert store.state(0) == "complete"


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
    sequences, _, arrays = make_content(0)
    assert np.array_equal(store.tokens(1), sequences[1])
    changed = [sequences[1], sequences[0], sequences[2]]
    store.write_shard(0, changed, arrays)
    assert np.array_equal(store.tokens(0), sequences[1])
    assert len(store.targets(0).best()) == len(sequences[1]) - 1


def test_content_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Too few sequences, or arrays with another number of positions."""
    store = filled(tmp_path / "store")
    sequences, _, arrays = make_content(0)
    with pytest.raises(StoreError, match="2 sequences"):
        store.write_shard(0, sequences[:2], arrays)
    with pytest.raises(StoreError, match="9 positions"):
        store.write_shard(0, sequences, {**arrays, "tail": arrays["tail"][:-1]})
    assert store.state(0) == "complete"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "xyz"}, "teacher 'abc', not 'xyz'"),
        ({"recipe": Recipe(num_topk=8).to_json()}, r"recipe .*'num_topk': 4.*, not .*'num_topk': 8"),
        ({"recipe": Recipe("dense").to_json()}, r"recipe .*'kind': 'compact'.*, not .*'kind': 'dense'"),
        ({"recipe": Recipe(num_topk=4, layers=(1,)).to_json()}, r"recipe .*'layers': \[\].*, not .*\[1\]"),
        ({"vocab_size": 51}, "vocab_size 50, not 51"),
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


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe", b'{"format": 2}'])
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
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 1}))
    with pytest.raises(StoreError, match="format 1, this version reads 2"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"sequences": "many"},
        {"sequences": 0},
        {"sequences": float("inf")},
        {"sequences_per_shard": None},
        {"sequences_per_shard": -3},
        {"identity": []},
        {"identity": {"recipe": RECIPE.to_json()}},
        {"identity": {"recipe": RECIPE.to_json(), "vocab_size": 0}},
        {"identity": {"recipe": RECIPE.to_json(), "vocab_size": "all"}},
        {"identity": {"vocab_size": 50}},
        *(
            {"identity": {"vocab_size": 50, "recipe": recipe}}
            for recipe in (
                None,
                {},
                {**RECIPE.to_json(), "kind": "sparse"},
                {**RECIPE.to_json(), "num_topk": "four"},
                {**RECIPE.to_json(), "num_topk": -4},
                {**RECIPE.to_json(), "sketch_bytes": 1.5},
                {**RECIPE.to_json(), "layers": ["last"]},
                {**RECIPE.to_json(), "layers": None},
            )
        ),
    ],
    ids=str,
)
def test_a_manifest_of_nonsense_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """A count that is no number, a recipe that is none: damage like any other."""
    content = json.loads(make_manifest().to_json()) | change
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(StoreError, match="damaged"):
        read_manifest(tmp_path)


def test_temporary_files_are_known(tmp_path: Path) -> None:
    """What a killed writer or a lock leaves does not keep a store from being begun in a folder."""
    for name in (".lock", ".lock.3", f".{MANIFEST}.77.tmp", ".shard-00000.safetensors.77.tmp"):
        (tmp_path / name).write_bytes(b"half")
        assert is_temporary(tmp_path / name)
    assert not any(is_temporary(tmp_path / name) for name in (MANIFEST, COMPANION, "shard-00000.safetensors"))
    store = filled(tmp_path)
    assert [store.state(shard) for shard in range(3)] == ["complete"] * 3
    assert store.bytes_on_disk() == sum(store.shard_path(shard).stat().st_size for shard in range(3))


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
