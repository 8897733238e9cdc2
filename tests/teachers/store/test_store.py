"""The store: whole or not at all, damage noticed, identity respected, reads equal writes.

Over 400 lines because every way to damage a store is tried on the same one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from teachers.atomic_files import StoreError, is_temporary, write_whole
from teachers.store.capture import fit_shared_codec
from teachers.store.manifest import MANIFEST, Manifest, read_manifest
from teachers.store.shard_contents import CONTENTS
from teachers.store.shard_records import OWN_ARRAYS
from teachers.store.store import SHARED_CODEC, SoftTargetStore
from teachers.targets.distributions import Arrays, CompactTargets, DenseTargets, HiddenTargets
from teachers.targets.recipe import Recipe
from teachers.targets.state_codec import PARTS
from teachers.targets.stored_arrays import Answer, reduce
from tests.support.stores import basis_of_format_4, of_format_4, write_store
from tests.support.teachers import BigramTeacher

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


def recipe_manifest(recipe: Recipe) -> Manifest:
    """The same with another recipe."""
    return make_manifest(recipe=recipe.to_json())


def make_content(
    shard: int, vocab_size: int = 50
) -> tuple[list[np.ndarray], CompactTargets, Arrays]:
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


def filled_by_kind(
    folder: Path, kind: str
) -> tuple[BigramTeacher, list[np.ndarray], SoftTargetStore]:
    """A complete store of one of ``KINDS``, what it was made from, opened afresh."""
    teacher, random = BigramTeacher(50, 8), np.random.default_rng(3)
    sequences = [random.integers(0, 50, n).astype(np.int32) for n in LENGTHS]
    store = write_store(folder, teacher, sequences, KINDS[kind], PER_SHARD)
    return teacher, sequences, SoftTargetStore.create_or_open(folder, store.manifest)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def with_flipped_bits(path: Path, every_bit: int, seed: int) -> Iterator[tuple[int, int]]:
    """A file with one bit changed at a time: every bit of the first bytes, one of each other."""
    whole, random = path.read_bytes(), np.random.default_rng(seed)
    flips = [(place, 1 << bit) for place in range(every_bit) for bit in range(8)]
    flips += list(enumerate((1 << random.integers(0, 8, len(whole))).tolist()))[every_bit:]
    with path.open("r+b", buffering=0) as file:
        for place, flip in flips:
            file.seek(place)
            file.write(bytes([whole[place] ^ flip]))
            yield place, flip
            file.seek(place)
            file.write(whole[place : place + 1])
    assert path.read_bytes() == whole


def test_reads_equal_writes(tmp_path: Path) -> None:
    """Every sequence and target across shards, opened afresh; ids as narrow as they fit."""
    for vocab_size, dtype in ((50, np.uint16), (65536, np.uint16), (65537, np.int32)):
        folder = tmp_path / str(vocab_size)
        filled(folder, vocab_size)
        store = SoftTargetStore.create_or_open(folder, make_manifest(vocab_size=vocab_size))
        assert len(store) == 7 and store.lengths().tolist() == list(LENGTHS)
        assert [store.span(shard) for shard in range(3)] == [(0, 3), (3, 6), (6, 7)]
        assert not store.needs_shared_codec and store.shared_codec() is None
        for shard in range(3):
            sequences, targets, arrays = make_content(shard, vocab_size)
            assert arrays["topk_ids"].dtype == dtype and store.state(shard) == "complete"
            assert int(targets.topk_ids.max()) == vocab_size - 1
            row = 0
            for index, sequence in enumerate(sequences, shard * PER_SHARD):
                read = store.targets(index)
                assert np.array_equal(store.tokens(index), sequence), (vocab_size, index)
                wanted = targets.select(slice(row, row + len(sequence) - 1))
                assert isinstance(read, CompactTargets) and read.topk_ids.dtype == torch.int64
                assert read.vocab_size == vocab_size
                assert read.head is None and read.coordinates is None
                for name in ("topk_ids", "topk_logits", "tail"):
                    found, expected = getattr(read, name), getattr(wanted, name)
                    assert torch.equal(found, expected), (vocab_size, index, name)
                row += len(sequence) - 1


@pytest.mark.parametrize("kind", ["sketch", "hidden", "dense"])
def test_other_kinds_read_back(tmp_path: Path, kind: str) -> None:
    """Typed as their recipe says, across shards, with the companion's head and layers."""
    teacher, sequences, store = filled_by_kind(tmp_path / "store", kind)
    assert store.needs_shared_codec == (kind != "dense") and store.manifest.recipe == KINDS[kind]
    shared_codec = store.shared_codec()
    for index, sequence in enumerate(sequences):
        read, logits = store.targets(index), torch.from_numpy(teacher.logits([sequence]))
        found = teacher.states([sequence], KINDS[kind].layers)
        states = {name: torch.from_numpy(rows) for name, rows in found.items()}
        if isinstance(read, DenseTargets):
            assert kind == "dense" and torch.equal(read.logits, logits)
            continue
        assert shared_codec is not None and shared_codec.head is not None
        assert read.coordinates is not None
        if isinstance(read, HiddenTargets):
            assert kind == "hidden"
            assert torch.equal(read.head.matrix, teacher.matrix.half().float())
            step = states["final"].abs().amax(dim=-1, keepdim=True) / 127
            assert bool(((read.coordinates - states["final"]).abs() <= 0.501 * step).all())
        else:
            assert kind == "sketch" and torch.equal(read.topk_ids, logits.topk(4).indices)
            basis = shared_codec.bases["final"]
            wanted = basis.coordinates(*basis.encoded(states["final"]))
            assert read.coordinates.shape[1] > 0 and torch.equal(read.coordinates, wanted)
            assert read.head is not None and torch.equal(read.head.matrix, shared_codec.head.matrix)
        kept = store.layer_states(index)
        assert tuple(kept) == KINDS[kind].layers
        for layer, coordinates in kept.items():
            basis = shared_codec.bases[f"layer{layer}"]
            expected = basis.coordinates(*basis.encoded(states[f"layer{layer}"]))
            assert torch.equal(coordinates, expected), (index, layer)


@pytest.mark.parametrize("kind", ["sketch", "hidden"])
def test_a_companion_reads_as_it_was_written(tmp_path: Path, kind: str) -> None:
    """Every basis to the bit, the head as float16; a flipped bit is damage, told with a remedy."""
    teacher, sequences, store = filled_by_kind(tmp_path / "store", kind)
    written = fit_shared_codec(teacher, sequences, KINDS[kind])  # type: ignore[arg-type]
    read, path = store.shared_codec(), store.folder / SHARED_CODEC
    assert read is not None and written.head is not None and read.head is not None
    assert set(read.bases) == set(written.bases)
    for name, basis in written.bases.items():
        for part in PARTS:
            found, expected = getattr(read.bases[name], part), getattr(basis, part)
            assert torch.equal(found, expected), (name, part)
    assert torch.equal(read.head.matrix, written.head.matrix.half().float())
    assert torch.equal(read.head.bias, written.head.bias)
    assert read.head.matrix.dtype == torch.float32
    for place, flip in with_flipped_bits(path, 0, seed=6):
        opened = SoftTargetStore(store.folder, store.manifest)
        assert opened.shared_codec() is None, f"byte {place} changed by {flip}"
        if place == 9:
            for ask in (opened.targets, opened.layer_states):
                with pytest.raises(StoreError, match="missing or damaged; run the capture") as told:
                    ask(0)
                assert SHARED_CODEC in str(told.value)
    whole = path.read_bytes()
    path.unlink()
    opened = SoftTargetStore(store.folder, store.manifest)
    assert opened.shared_codec() is None
    path.write_bytes(whole)
    assert opened.shared_codec() is not None
    assert len(opened.layer_states(0)) == len(KINDS[kind].layers)


def test_a_sketch_may_be_multiplied_narrowly(tmp_path: Path) -> None:
    """Within ``head_on``, and near what it is otherwise; whole states and later reads are not."""
    for kind, narrow in (("sketch", torch.bfloat16), ("hidden", torch.float32)):
        _, _, store = filled_by_kind(tmp_path / kind, kind)
        before = store.targets(1).log_probs(1.0)
        with store.head_on(torch.device("cpu"), torch.bfloat16):
            read = store.targets(1)
            assert not isinstance(read, DenseTargets) and read.head is not None
            assert read.head.matrix.dtype == narrow and read.head.bias.dtype == torch.float32
            products = read.head_products()
            assert products is not None and products.dtype == narrow
            within = read.log_probs(1.0, read.completed_(products.float()))
        torch.testing.assert_close(within, before, atol=0.05, rtol=0)
        assert torch.equal(store.targets(1).log_probs(1.0), before), kind


def test_another_codec_is_refused(tmp_path: Path) -> None:
    """One that its shards were not written with: whole and of this store, it decodes them wrongly.
    It is refused where it is read, and where it would be written in the lost one's place."""
    for kind in ("sketch", "hidden"):
        _, _, store = filled_by_kind(tmp_path / kind, kind)
        codec, path = store.shared_codec(), store.folder / SHARED_CODEC
        assert codec is not None
        turned = {
            name: replace(basis, encode=-basis.encode, decode=-basis.decode)
            for name, basis in codec.bases.items()
        }
        path.unlink()
        opened = SoftTargetStore(store.folder, store.manifest)
        with pytest.raises(StoreError, match=f"{SHARED_CODEC} is lost.* put that file back"):
            opened.write_shared_codec(replace(codec, bases=turned))
        assert not path.exists()
        opened.write_shared_codec(codec)
        assert len(opened.targets(6).best()) == LENGTHS[6] - 1
        # As nobody would write it: past the check.
        opened.write_file(SHARED_CODEC, replace(codec, bases=turned).arrays())
        for ask in (SoftTargetStore.state, SoftTargetStore.targets, SoftTargetStore.layer_states):
            with pytest.raises(StoreError, match=r"another companion.* put the right one back"):
                ask(SoftTargetStore(store.folder, store.manifest), 0)


def test_a_store_of_an_earlier_format_stays_one(tmp_path: Path) -> None:
    """Its shards do not name their codec: read and filled up as they are, but a lost codec cannot
    be shown to be the one."""
    for kind, masked in (("sketch", False), ("hidden", True)):
        _, _, newer = filled_by_kind(tmp_path / "new" / kind, kind)
        assert json.loads((newer.folder / MANIFEST).read_text())["format"] == 5
        identity = newer.manifest.identity | ({"train_on": "assistant"} if masked else {})
        earlier = replace(newer.manifest, identity=identity, names_codec=False)
        folder, codec = tmp_path / kind, newer.shared_codec()
        folder.mkdir()
        (folder / MANIFEST).write_text(earlier.to_json())
        assert json.loads(earlier.to_json())["format"] == (3 if masked else 2)
        wanted = replace(earlier, names_codec=True)  # as a capture asks for it today
        store = SoftTargetStore.create_or_open(folder, wanted)
        assert codec is not None and not store.manifest.names_codec
        store.write_shared_codec(codec)
        arrays = newer.read_file(newer.shard_path(0).name)
        assert arrays is not None
        sequences = [newer.tokens(index) for index in range(PER_SHARD)]
        targets = {name: rows for name, rows in arrays.items() if name not in OWN_ARRAYS}
        store.write_shard(0, sequences, targets)
        with safetensors.safe_open(store.shard_path(0), framework="numpy") as file:
            seal = file.metadata()["sha256"].split()
        assert seal[1:] == ["store", earlier.key, "shard-00000"]
        again = SoftTargetStore(folder, read_manifest(folder))
        assert again.state(0) == "complete" and len(again.targets(0).best()) == LENGTHS[0] - 1
        (folder / SHARED_CODEC).unlink()
        with pytest.raises(StoreError, match="is not for all that is known the one"):
            SoftTargetStore(folder, read_manifest(folder)).write_shared_codec(codec)


def test_a_store_of_format_4_is_read(tmp_path: Path) -> None:
    """Bytes and half bytes for the directions of states, as its own version wrote them."""
    _, _, newer = filled_by_kind(tmp_path / "new", "sketch")
    folder, random, names = (
        tmp_path / "old",
        np.random.default_rng(4),
        ("final", "layer0", "layer1"),
    )
    folder.mkdir()
    content = json.loads((newer.folder / MANIFEST).read_text()) | {"format": 4}
    (folder / MANIFEST).write_text(json.dumps(content))
    store = SoftTargetStore(folder, read_manifest(folder))
    codec: Arrays = {
        "head_matrix": np.ones((50, 7), np.float16),
        "head_bias": np.zeros(50, np.float32),
    }
    for name in names:
        codec |= basis_of_format_4(name, 8, 3, 4, random)
    store.write_file(SHARED_CODEC, codec)
    arrays = newer.read_file(newer.shard_path(0).name)
    assert arrays is not None
    rows = len(arrays["tail"])
    for name in ("sketch", "layer0", "layer1"):
        arrays[name] = random.integers(0, 256, (rows, 5)).astype(np.uint8)
        arrays[f"{name}_scale"] = np.full(rows, 1.5, np.float16)
    targets = {name: array for name, array in arrays.items() if name not in OWN_ARRAYS}
    store.write_shard(0, [newer.tokens(index) for index in range(PER_SHARD)], targets)
    store = SoftTargetStore(folder, read_manifest(folder))
    assert store.state(0) == "complete" and store.manifest.names_codec
    read, states = store.targets(0), store.layer_states(0)
    assert isinstance(read, CompactTargets) and read.coordinates is not None
    for name, found in (("final", read.coordinates), ("layer0", states[0]), ("layer1", states[1])):
        codes = arrays["sketch" if name == "final" else name][: LENGTHS[0] - 1].tolist()
        expected = 1.5 * np.array(of_format_4(codes, 3, codec[f"{name}_ranges"].tolist()))
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_sealed_by_others_but_damaged(tmp_path: Path) -> None:
    """Checksums prove what was written, not that it makes sense: a codec with impossible bits, or
    of another vocabulary, counts as damaged; codes of another length are refused."""
    _, _, store = filled_by_kind(tmp_path / "store", "sketch")
    codec = store.read_file(SHARED_CODEC)
    assert codec is not None
    for change in (
        {"final_bits": np.full_like(codec["final_bits"], 9)},
        {"final_bits": codec["final_bits"][:-1]},
        {"layer1_steps": -codec["layer1_steps"]},  # type: ignore[operator]
        {"head_matrix": codec["head_matrix"][:, :-1]},
        {"head_matrix": codec["head_matrix"][:-1], "head_bias": codec["head_bias"][:-1]},
        {"final_mean": None},
    ):
        changed = {name: rows for name, rows in (codec | change).items() if rows is not None}
        store.write_file(SHARED_CODEC, changed)
        with pytest.raises(StoreError, match=f"{SHARED_CODEC} is missing or damaged"):
            SoftTargetStore(store.folder, store.manifest)._need_codec()
    store.write_file(SHARED_CODEC, codec)
    opened = SoftTargetStore(store.folder, store.manifest)
    arrays = opened.read_shard(0)
    assert arrays is not None
    arrays["sketch"], arrays["layer0"] = arrays["sketch"][:, :-1], arrays["layer0"][:, :-1]
    targets = {name: rows for name, rows in arrays.items() if name not in OWN_ARRAYS}
    opened.write_shard(0, [opened.tokens(index) for index in range(PER_SHARD)], targets)
    again = SoftTargetStore(store.folder, store.manifest)
    for ask in (again.targets, again.layer_states):
        with pytest.raises(StoreError, match="of another basis"):
            ask(0)


def test_what_shards_say_of_their_tokens(tmp_path: Path) -> None:
    """Copies share a hash and nothing else does, over all shards, and the tokens that occur are
    those that do; the same of shards that an earlier version wrote without it."""
    same = np.array([4, 9, 4], np.int32)
    sequences = [same, same[:2], same, same[::-1].copy(), same, np.array([0, 49], np.int32), same]
    sequences[3][0] = 7
    manifest = replace(make_manifest(), sequences=len(sequences))
    seen = []
    for earlier in (False, True):
        store = SoftTargetStore.create_or_open(tmp_path / str(earlier), manifest)
        for shard in range(3):
            own = sequences[shard * PER_SHARD : (shard + 1) * PER_SHARD]
            rows = sum(map(len, own)) - len(own)
            arrays = reduce(Answer(torch.zeros(rows, 50)), RECIPE, {})
            arrays = store.write_shard(shard, own, arrays)
            if earlier:
                plain = {name: rows for name, rows in arrays.items() if name not in CONTENTS}
                store.write_file(store.shard_path(shard).name, plain)
        overview = SoftTargetStore(store.folder, manifest).files.overview
        first = overview.hashes == overview.hashes[0]
        assert first.tolist() == [True, False, True, False, True, False, True]
        assert len(set(overview.hashes.tolist())) == 4
        assert np.flatnonzero(overview.occurring).tolist() == [0, 4, 7, 9, 49]
        assert overview.lengths.tolist() == [3, 2, 3, 3, 3, 2, 3] and overview.positions == 12
        seen.append(overview.hashes.tolist())
    assert seen[0] == seen[1]


def test_tokens_beyond_the_vocabulary_are_damage(tmp_path: Path) -> None:
    """Sealed by others: they reach no embedding; what is said of tokens must have its shape."""
    store = filled(tmp_path)
    arrays = store.read_shard(1)
    assert arrays is not None
    damaged = r"1 file damaged \(shard-00001"
    for token in (-1, 50):
        tokens = arrays["tokens"].copy()
        tokens[0] = token
        store.write_file("shard-00001.safetensors", arrays | {"tokens": tokens})
        with pytest.raises(StoreError, match=damaged):
            SoftTargetStore(tmp_path, store.manifest).tokens(PER_SHARD)
        plain = {name: rows for name, rows in arrays.items() if name not in CONTENTS}
        store.write_file("shard-00001.safetensors", plain | {"tokens": tokens})
        with pytest.raises(StoreError, match=damaged):
            _ = SoftTargetStore(tmp_path, store.manifest).files.overview
    for name, wrong in (
        ("hashes", arrays["hashes"][:-1]),
        ("hashes", arrays["hashes"].astype(np.int32)),
        ("occurring", arrays["occurring"][:-1]),
        ("occurring", arrays["occurring"].astype(np.int16)),
        ("occurring", np.array(1, np.uint8)),
        ("hashes", np.array(1, np.int64)),
    ):
        store.write_file("shard-00001.safetensors", arrays | {name: wrong})
        with pytest.raises(StoreError, match=damaged):
            _ = SoftTargetStore(tmp_path, store.manifest).files.overview
    for name in CONTENTS:  # of the right shape, and false: found where the shard is read back
        false = arrays[name].copy()
        false[0] ^= 1
        store.write_file("shard-00001.safetensors", arrays | {name: false})
        opened = SoftTargetStore(tmp_path, store.manifest)
        assert opened.state(1) == "damaged", name
        with pytest.raises(StoreError, match=damaged):
            opened.targets(PER_SHARD)
    sequences, _, targets = make_content(1)
    for token in (-1, 50):
        sequences[1][0] = token
        with pytest.raises(StoreError, match=f"token {token} is none of the teacher's 50"):
            store.write_shard(1, sequences, targets)


def test_a_store_is_not_its_machines(tmp_path: Path) -> None:
    """Earlier versions counted threads and GPUs to its identity: it is the same store without, is
    continued under its own key, and what does change numbers still tells stores apart."""
    runtime = "llama-cpp-python 0.3.36"
    earlier = make_manifest(
        runtime=f"{runtime}, 2 threads, gpu_layers -1, q8_0 cache; t, 8 threads"
    )
    store = SoftTargetStore.create_or_open(tmp_path, earlier)
    wanted = make_manifest(runtime=f"{runtime}, q8_0 cache; t")
    again = SoftTargetStore.create_or_open(tmp_path, wanted)
    assert again.manifest.key == store.manifest.key == earlier.key != wanted.key
    for other in (runtime, "llama-cpp-python 0.3.37, q8_0 cache; t"):
        with pytest.raises(StoreError, match=f"runtime '{runtime}, q8_0 cache; t', not '{other}'"):
            SoftTargetStore.create_or_open(tmp_path, make_manifest(runtime=other))


def test_a_failing_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk refuses at any point: no shard, no temporary file; the rest is intact."""

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store = filled(tmp_path / "store")
    store.shard_path(1).unlink()
    before = contents(store.folder)
    sequences, _, arrays = make_content(1)
    steps: list[tuple[Any, str]] = [(os, "fsync"), (Path, "replace"), (Path, "open")]
    for owner, name in steps:
        with monkeypatch.context() as broken:
            broken.setattr(owner, name, refuse)
            with pytest.raises(OSError, match="No space left"):
                store.write_shard(1, sequences, arrays)
        assert contents(store.folder) == before, name
        found = [store.state(shard) for shard in range(3)]
        assert found == ["complete", "missing", "complete"], name


def test_a_file_is_old_until_it_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is being replaced is the old one until the new one is on the disk."""
    path, calls = tmp_path / "file", []
    write_whole(path, b"old")
    fsync, replace = os.fsync, Path.replace
    noted = lambda file: calls.append(file.read_bytes())  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda handle: (noted(path), fsync(handle)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (noted(a), replace(a, b)))
    write_whole(path, b"new")
    assert calls == [b"old", b"new"] and path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_flipped_bit_anywhere_is_damage(tmp_path: Path) -> None:
    """One bit of every byte of a shard, padding included, in turn; every bit of its header."""
    for kind in KINDS:
        _, _, store = filled_by_kind(tmp_path / kind, kind)
        path = store.shard_path(2)
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        for place, flip in with_flipped_bits(path, header, seed=5):
            assert store.state(2) == "damaged", f"{kind}: byte {place} changed by {flip}"
        assert store.state(2) == "complete", kind


def test_other_shards_are_damaged(tmp_path: Path) -> None:
    """Cut, lengthened, of unheard-of types, or with arrays that the seal was not made of."""
    store = filled(tmp_path / "store")
    path = store.shard_path(0)
    whole = path.read_bytes()
    arrays = safetensors.numpy.load(whole)
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    others = [whole[:kept] for kept in (0, 1, 7, 8, 100, -1)] + [whole + b"\0"]
    for dtype in ("BF16", "F8_E4M3", "F4", "U128"):
        tokens = {"dtype": dtype, "shape": [4], "data_offsets": [0, 8]}
        header = json.dumps({"tokens": tokens}).encode()
        others.append(len(header).to_bytes(8, "little") + header + bytes(8))
    for changed in (
        {name: rows for name, rows in arrays.items() if name != "tail"},
        {**arrays, "extra": np.zeros(3, np.float32)},
        {**arrays, "tail": arrays["tail"].reshape(2, -1)},
        {**arrays, "topk_ids": arrays["topk_ids"].astype(np.int32)},
    ):
        others.append(safetensors.numpy.save(changed, metadata=metadata))
    for number, data in enumerate(others):
        path.write_bytes(data)
        assert store.state(0) == "damaged", (number, data[:200])
    path.write_bytes(safetensors.numpy.save(arrays, metadata=metadata))
    assert store.state(0) == "complete"


def test_files_of_another_store_or_place_are_refused(tmp_path: Path) -> None:
    """Intact in themselves, but with another store's key, or under another file's name."""
    _, _, store = filled_by_kind(tmp_path / "store", "sketch")
    identity = {**store.manifest.identity, "teacher": "x"}
    other = SoftTargetStore.create_or_open(tmp_path / "other", Manifest(identity, 7, PER_SHARD))
    for path in (store.folder / SHARED_CODEC, store.shard_path(0)):
        shutil.copy(path, other.folder)
    assert other.shared_codec() is None and other.state(0) == "damaged"
    for path in (store.folder / SHARED_CODEC, store.shard_path(1)):
        shutil.copy(store.shard_path(0), path)
    again = SoftTargetStore(store.folder, store.manifest)
    assert again.shared_codec() is None
    assert [again.state(shard) for shard in (0, 1)] == ["complete", "damaged"]


def test_a_rewritten_shard_is_read_anew(tmp_path: Path) -> None:
    """Writing one again replaces what was read before; content that does not fit is refused."""
    store = filled(tmp_path / "store")
    sequences, _, arrays = make_content(0)
    assert np.array_equal(store.tokens(1), sequences[1])
    store.write_shard(0, [sequences[1], sequences[0], sequences[2]], arrays)
    assert np.array_equal(store.tokens(0), sequences[1])
    assert len(store.targets(0).best()) == len(sequences[1]) - 1
    with pytest.raises(StoreError, match="2 sequences"):
        store.write_shard(0, sequences[:2], arrays)
    with pytest.raises(StoreError, match="9 positions"):
        store.write_shard(0, sequences, {**arrays, "tail": arrays["tail"][:-1]})
    assert store.state(0) == "complete"


def test_another_identity_is_refused(tmp_path: Path) -> None:
    """The difference is named, also of sequences or of those in a shard; nothing changes."""
    store = filled(tmp_path / "store")
    before, identity = contents(store.folder), store.manifest.identity
    other_layers = Recipe(num_topk=4, layers=(1,))
    for manifest, message in (
        (make_manifest(teacher="xyz"), "teacher 'abc', not 'xyz'"),
        (recipe_manifest(Recipe(num_topk=8)), r"recipe .*'num_topk': 4.*, not .*'num_topk': 8"),
        (recipe_manifest(Recipe("dense")), r"recipe .*'kind': 'compact'.*, not .*'kind': 'dense'"),
        (recipe_manifest(other_layers), r"recipe .*'layers': \[\].*, not .*\[1\]"),
        (make_manifest(vocab_size=51), "vocab_size 50, not 51"),
        (make_manifest(extra=1), "extra None, not 1"),
        (Manifest(identity, 6, PER_SHARD), "7 sequences, not 6"),
        (Manifest(identity, 7, 4), r"3 .*not 4"),
    ):
        with pytest.raises(StoreError, match=message):
            SoftTargetStore.create_or_open(store.folder, manifest)
            pytest.fail(f"accepted, where it should say {message}")
        assert contents(store.folder) == before, message


def test_manifest_round_trip(tmp_path: Path) -> None:
    """What is read is what was written; the key depends on the identity alone, in any order."""
    store = filled(tmp_path / "store")
    assert read_manifest(store.folder) == store.manifest
    backwards = Manifest(dict(reversed(store.manifest.identity.items())), 1, 1)
    assert backwards.key == store.manifest.key != make_manifest(teacher="x").key
    assert [Manifest({}, count, 3).shards for count in (1, 3, 4, 6, 7)] == [1, 1, 2, 2, 3]


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    """No JSON, count or recipe, another format, no file: refused, and left as it is."""
    store, whole = filled(tmp_path / "store"), json.loads(make_manifest().to_json())
    recipe = RECIPE.to_json()
    recipes: list[Any] = [None, {}, {**recipe, "kind": "sparse"}, {**recipe, "sketch_bytes": 1.5}]
    recipes += [{**recipe, "num_topk": count} for count in ("four", -4)]
    recipes += [{**recipe, "layers": layers} for layers in (["last"], None)]
    changes: list[dict[str, Any]] = [
        *({"sequences": count} for count in ("many", 0, float("inf"))),
        *({"sequences_per_shard": count} for count in (None, -3)),
        {"identity": []},
        {"identity": {"recipe": recipe}},
        *({"identity": {"recipe": recipe, "vocab_size": size}} for size in (0, "all")),
        {"identity": {"vocab_size": 50}},
        *({"identity": {"vocab_size": 50, "recipe": other}} for other in recipes),
    ]
    damaged = [b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe", b'{"format": 2}']
    for content in [*damaged, *(json.dumps(whole | change).encode() for change in changes)]:
        (store.folder / MANIFEST).write_bytes(content)
        for read in (
            lambda: read_manifest(store.folder),
            lambda: SoftTargetStore.create_or_open(store.folder, make_manifest()),
        ):
            with pytest.raises(StoreError, match="damaged"):
                read()
                pytest.fail(f"accepted: {content!r}")
        assert (store.folder / MANIFEST).read_bytes() == content
    (store.folder / MANIFEST).write_text(json.dumps({"format": 1}))
    with pytest.raises(StoreError, match="format 1, this version reads 2"):
        read_manifest(store.folder)
    with pytest.raises(StoreError, match="not a store"):
        read_manifest(tmp_path)


def test_other_files_are_refused_but_temporary_ones(tmp_path: Path) -> None:
    """Nothing is written beside files that are not a store's; a killed writer's do not count."""
    (tmp_path / "note").write_text("mine")
    with pytest.raises(StoreError, match="other files"):
        SoftTargetStore.create_or_open(tmp_path, make_manifest())
    assert [entry.name for entry in tmp_path.iterdir()] == ["note"]
    (tmp_path / "note").unlink()
    for name in (".lock", ".lock.3", f".{MANIFEST}.77.tmp", ".shard-00000.safetensors.77.tmp"):
        (tmp_path / name).write_bytes(b"half")
        assert is_temporary(tmp_path / name)
    for name in (MANIFEST, SHARED_CODEC, "shard-00000.safetensors"):
        assert not is_temporary(tmp_path / name)
    assert SoftTargetStore.create_or_open(tmp_path, make_manifest()).state(0) == "missing"
    store = filled(tmp_path)
    assert [store.state(shard) for shard in range(3)] == ["complete"] * 3
    sizes = [store.shard_path(shard).stat().st_size for shard in range(3)]
    assert store.bytes_on_disk() == sum(sizes)
