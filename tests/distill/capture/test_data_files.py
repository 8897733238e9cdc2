"""Every kind of file gives the same rows; damaged and hostile ones are refused with their place."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from distill.capture import data_files, file_text
from distill.capture.data_rows import DataRows, read_rows
from distill.config.loading import load_config
from distill.errors import UserError
from teachers.tokenizer.rows import Conversation, Document

TALK = [{"from": "human", "value": "Hi ☕"}, {"from": "gpt", "value": "Hello\u2028you"}]
ROWS: list[dict[str, Any]] = [
    {"text": None, "conversations": TALK},
    {"text": 'A "quoted", text\nof two lines', "conversations": None},
]
LINES = "\n".join(map(json.dumps, ROWS))
EXPECTED = [("user", "Hi ☕", "assistant", "Hello\u2028you"), (ROWS[1]["text"],)]


def read(path: Path, *settings: str) -> DataRows:
    data = read_rows(load_config(None, {"data.path": str(path)}, settings).data)
    assert data is not None
    return data


def content(data: DataRows) -> list[tuple[str, ...]]:
    """What was read, without its places."""
    found: list[tuple[str, ...]] = []
    for row in data.rows:
        if isinstance(row, Document):
            found.append(("".join(row.text),))
        else:
            found.append(tuple(one[key] for one in row.messages for key in ("role", "content")))
    return found


def parquet_bytes(rows: list[dict[str, Any]] | pa.Table, **options: Any) -> bytes:
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink, **options)
    return bytes(sink.getvalue())


def arrow_bytes(rows: list[dict[str, Any]], new: Callable[..., Any] = ipc.new_stream) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def csv_text(rows: list[dict[str, Any]], path: Path, delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(
            {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows
        )
    return path


def saved(folder: Path, parts: list[list[dict[str, Any]]], **state: Any) -> Path:
    """A folder as ``Dataset.save_to_disk`` writes it, with a cache file that is not of it."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05}-of-{len(parts):05}.arrow" for n in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        (folder / name).write_bytes(arrow_bytes(rows))
    (folder / "cache-1f.arrow").write_bytes(arrow_bytes([{"text": "an intermediate result"}]))
    listed = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": listed, "_split": None} | state))
    (folder / "dataset_info.json").write_text('{"features": {}}')
    return folder


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    """Lines, lists, tables, packed or not, and what ``datasets`` saves."""
    files: dict[str, bytes | str] = {
        "lines.jsonl": LINES,
        "windows.ndjson": "\ufeff" + LINES.replace("\n", "\r\n\r\n"),
        "lines.json": LINES + "\n",
        "list.json": json.dumps(ROWS, indent=2),
        "object.json": json.dumps({"version": 1, "data": ROWS}),
        "rows.parquet": parquet_bytes(ROWS, row_group_size=1),
        "rows.arrow": arrow_bytes(ROWS),
        "file.arrow": arrow_bytes(ROWS, ipc.new_file),
    }
    for name, given in files.items():
        raw = given.encode() if isinstance(given, str) else given
        for path, written in ((name, raw), (f"{name}.GZ", gzip.compress(raw))):
            (tmp_path / path).write_bytes(written)
            assert content(read(tmp_path / path)) == EXPECTED, path
        if not name.endswith((".parquet", ".arrow")):  # gzip by another name
            (tmp_path / name).write_bytes(gzip.compress(raw))
            assert content(read(tmp_path / name)) == EXPECTED, name
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        assert content(read(csv_text(ROWS, tmp_path / name, delimiter))) == EXPECTED, name
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0]))
    assert content(read(tmp_path / "one.json")) == EXPECTED[:1]
    assert content(read(saved(tmp_path / "saved", [ROWS[:1], ROWS[1:]]))) == EXPECTED
    where = [row.where for row in read(tmp_path / "lines.jsonl").rows]
    assert [text.rpartition(", ")[2] for text in where] == ["line 1", "line 2"]


def test_files_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the parts end there are the same rows, and the share that is read goes up to all; a
    list may be larger than what a row or an object may be."""
    said = 'é☕ \\ " ] }} {{ [ '
    rows = [{"text": said * n, "n": n * 10**n, "x": [{"a": n}, {"b": None}]} for n in range(9)]
    expected = [(one["text"],) for one in rows if one["text"]]
    lists = {"train": rows, "version": 1.5}
    files: dict[str, str] = {
        "list.json": json.dumps(rows, ensure_ascii=False, indent=1),
        "short.json": json.dumps(rows),
        "object.json": "\ufeff" + json.dumps(lists, ensure_ascii=False),
        "lines.json": "\n\n".join(map(json.dumps, rows)),
        "shown.json": "\n".join(json.dumps(one, indent=2) for one in rows),
        "rows.jsonl": "\r\n".join(map(json.dumps, rows)),
    }
    (tmp_path / "text.txt").write_text("\ufeffnaïve\r\n☕" * 9, "utf-8", newline="")
    (tmp_path / "rows.parquet").write_bytes(parquet_bytes(rows))
    (tmp_path / "rows.arrow").write_bytes(arrow_bytes(rows))
    for name, text in files.items():
        (tmp_path / name).write_text(text, "utf-8", newline="")
    for size in (1, 2, 3, 5, 64, 1 << 20):
        monkeypatch.setattr(file_text, "AT_ONCE", size)
        for name in (*files, "rows.parquet", "rows.arrow"):
            told: list[float] = []
            config = load_config(None, {"data.path": str(tmp_path / name)}, []).data
            data = read_rows(config, told.append)
            assert data is not None and content(data) == expected, (name, size)
            assert told == sorted(told) and told[-1] == 1.0, (name, size, told)
        assert content(read(tmp_path / "text.txt")) == [("naïve\r\n☕\ufeff" * 8 + "naïve\r\n☕",)]
    where = [row.where for row in read(tmp_path / "shown.json").rows]
    assert where[:2] == [f"data file {tmp_path}/shown.json, line {n}" for n in (13, 25)]
    monkeypatch.setattr(file_text, "MAX_LINE_BYTES", 1 << 9)
    monkeypatch.setattr(data_files, "MAX_OBJECT", 1 << 9)
    monkeypatch.setattr(file_text, "AT_ONCE", 64)
    for name in ("short.json", "list.json", "lines.json"):
        assert content(read(tmp_path / name)) == expected, name
    with pytest.raises(UserError, match=r"object\.json.*JSONL"):
        read(tmp_path / "object.json")


def test_nulls_of_a_table_are_absent(tmp_path: Path) -> None:
    """Arrow gives every object the keys of all: those that only others have are not there."""
    calls = [[{"function": {"name": name, "arguments": {key: 1}}}] for name, key in ("fx", "gy")]
    rows = [{"messages": [{"role": "assistant", "tool_calls": one}]} for one in calls]
    (tmp_path / "rows.parquet").write_bytes(parquet_bytes(rows))
    found = [row for row in read(tmp_path / "rows.parquet").rows if isinstance(row, Conversation)]
    arguments = [row.messages[0]["tool_calls"][0]["function"]["arguments"] for row in found]
    assert arguments == [{"x": 1}, {"y": 1}]


def test_splits(tmp_path: Path) -> None:
    """``train`` or the named one, of saved data, of files named by split, of a JSON object."""
    parts = {name: [{"text": f"{name} {n}"} for n in range(2)] for name in ("test", "train")}
    for name, rows in parts.items():
        saved(tmp_path / "saved" / name, [rows])
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        file = tmp_path / "hub" / "data" / f"{name}-00000-of-00001.parquet"
        file.write_bytes(parquet_bytes(rows))
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    (tmp_path / "hub" / "README.md").write_text("# What this data is")
    (tmp_path / "hub" / ".git").mkdir()
    (tmp_path / "hub" / ".git" / "notes.txt").write_text("not data")
    (tmp_path / "lists.json").write_text(json.dumps(parts))
    for name in ("saved", "hub", "lists.json"):
        path = tmp_path / name
        assert content(read(path)) == [("train 0",), ("train 1",)], name
        assert content(read(path, "data.split=test")) == [("test 0",), ("test 1",)], name
        with pytest.raises(UserError, match=r"(test, train|train, test).*data\.split"):
            read(path, "data.split=dev")
            pytest.fail(f"{name} has no such split")
    assert any("test" in note for note in read(tmp_path / "saved").notes)
    assert any("README.md" in note for note in read(tmp_path / "hub").notes)
    with pytest.raises(UserError, match=r"data\.split = 'test'.*not divided"):
        read(tmp_path / "saved" / "train", "data.split=test")


def test_files_that_are_named_by_split(tmp_path: Path) -> None:
    """What is read of each folder, and what its notes say is not."""
    cases: list[tuple[str, tuple[str, ...], str, tuple[str, ...] | None, tuple[str, ...]]] = [
        ("train.jsonl test.jsonl validation.jsonl", (), "train", None, ("test", "validation")),
        ("train.txt val.txt", (), "train", None, ("val",)),
        ("train_1.jsonl train_2.jsonl dev.jsonl", (), "train_1 train_2", None, ("dev",)),
        ("train_sft.jsonl test_sft.jsonl", (), "train_sft", None, ("test_sft",)),
        ("train_sft.jsonl test_sft.jsonl", ("test_sft",), "test_sft", None, ("train_sft",)),
        ("default/train/0000.jsonl default/train/0001.jsonl default/test/0000.jsonl", (),
         "default/train/0000 default/train/0001", None, ("test",)),
        ("train-00000-of-00001-a1b2.jsonl test-00000-of-00001-c3d4.jsonl", (),
         "train-00000-of-00001-a1b2", None, ("test",)),
        ("train.json test.json", ("test",), "test", None, ("train",)),
        ("training.jsonl validation.jsonl", (), "training", None, ("validation",)),
        ("my_train.jsonl my-test-set.jsonl my.val.jsonl", (), "my_train", None, ("test", "val")),
        ("a_train.jsonl b-train2.jsonl Eval_b.jsonl", (), "a_train b-train2", None, ("eval",)),
        ("a_train.jsonl b_test.jsonl", ("test",), "b_test", None, ("train",)),
        ("valid.jsonl test.jsonl", (), "", ("'train'", "valid", "test", "data.split"), ()),
        ("train_a.jsonl train_b.jsonl test.jsonl", (), "", ("train_a", "train_b"), ()),
        # Not splits: a folder of files
        ("a.jsonl b.jsonl", (), "a b", None, ()),
        ("test.jsonl", (), "test", None, ()),
        ("trains.jsonl testimony.jsonl", (), "testimony trains", None, ()),
        ("constraint.jsonl latest.jsonl", (), "constraint latest", None, ()),
        ("a_train_test.jsonl b_train.jsonl", (), "a_train_test b_train", None, ()),
        ("train_de.jsonl train_en.jsonl", (), "train_de train_en", None, ()),
    ]  # fmt: skip
    for number, (names, split, read_names, error, unread) in enumerate(cases):
        folder = tmp_path / str(number)
        for name in names.split():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            text = name.rpartition(".")[0]
            row = text if name.endswith(".txt") else json.dumps({"text": text})
            (folder / name).write_text(row)
        settings = [f"data.split={one}" for one in split]
        if error is not None:
            with pytest.raises(UserError) as caught:
                read(folder, *settings)
                pytest.fail(f"{names} is accepted")
            assert all(word in str(caught.value) for word in error), (names, str(caught.value))
            continue
        data = read(folder, *settings)
        assert content(data) == [(one,) for one in read_names.split()], names
        assert len(data.notes) == bool(unread), (names, data.notes)
        assert all(one in note.partition("not read")[2] for note in data.notes for one in unread)


def test_lists_of_rows_in_an_object(tmp_path: Path) -> None:
    """The list of rows is found beside other keys; what is not read is said."""
    rows, turns = [{"text": "a"}], [{"role": "user", "content": "b"}]
    cases: list[tuple[dict[str, Any], list[tuple[str, ...]], tuple[str, ...]]] = [
        ({"train": rows, "test": [{"text": "c"}]}, [("a",)], ("train", "test")),
        ({"train_sft": rows, "test_sft": rows}, [("a",)], ("test_sft",)),
        ({"system": "Be brief.", "data": rows}, [("a",)], ("data", "system")),
        ({"train": rows, "prompt": "x"}, [("a",)], ("prompt",)),
        ({"license": ["mit"], "data": rows, "errors": []}, [("a",)], ()),
        ({"messages": turns, "votes": [{"id": 1}]}, [("user", "b")], ("votes",)),
        ({"prompt": "b", "history": turns}, [("user", "b")], ("history",)),
    ]
    for value, expected, words in cases:
        (tmp_path / "a.json").write_text(json.dumps(value))
        data = read(tmp_path / "a.json")
        assert content(data) == expected, value
        assert len(data.notes) == bool(words), (value, data.notes)
        assert all(word in note for note in data.notes for word in words), (value, data.notes)


def test_what_lies_beside_tables_is_not_data(tmp_path: Path) -> None:
    """Text, a description, a packed copy are named in a note; alone they are read or refused."""
    beside = {
        "requirements.txt": "numpy",
        "CITATION.md": "@misc{}",
        "config.json": '{"layers": 2, "names": ["x"]}',
        "a.jsonl.gz": gzip.compress(b'{"text": "a"}'),
    }
    for name, given in beside.items():
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / "a.jsonl").write_text('{"text": "a"}')
        (folder / name).write_bytes(given if isinstance(given, bytes) else given.encode())
        data = read(folder)
        assert content(data) == [("a",)], name
        assert len(data.notes) == 1 and name in data.notes[0], (name, data.notes)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "a.jsonl").write_text('{"text": "a"}')
    (linked / "more").symlink_to(linked, target_is_directory=True)
    assert content(read(linked)) == [("a",)] and "more" in str(read(linked).notes)
    for target in ("nowhere", "b.json"):
        (linked / "b.json").unlink(missing_ok=True)
        (linked / "b.json").symlink_to(target)
        with pytest.raises(UserError, match=r"b\.json cannot be read"):
            read(linked)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "config.json").write_text(str(beside["config.json"]))
    with pytest.raises(UserError, match=r"config\.json"):
        read(notes)
    (notes / "b.md").write_text("Text.")
    assert content(read(notes)) == [("Text.",)]


def test_columns_that_are_not_used_are_not_read(tmp_path: Path) -> None:
    """They are counted; where none is understood the error lists those that are there."""
    rows = [{"text": "a", "image": b"\xff\xfe"}, {"text": "", "image": None}]
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(rows))
    data = read(tmp_path / "a.parquet")
    assert content(data) == [("a",)]
    assert any("image (2" in note for note in data.notes)
    assert any("1 rows" in note and "a.parquet, row 2" in note for note in data.notes)
    with pytest.raises(UserError, match=r"row 1: no column.*there are text, image"):
        read(tmp_path / "a.parquet", "data.columns.text=null")
    assert content(read(tmp_path / "a.parquet", "data.columns={content: text, text: null}")) == [
        ("a",)
    ]


def test_damaged_and_hostile_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error with the file and the line or row; nothing unpacks without bounds."""
    monkeypatch.setattr(file_text, "FREE_BYTES", 1 << 12)
    monkeypatch.setattr(file_text, "MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(file_text, "MOST_BLANK", 1 << 10)
    packed, table = gzip.compress(LINES.encode() * 99), parquet_bytes(ROWS)
    latin = parquet_bytes(
        pa.table({"text": pa.array([b"fine", b"caf\xe9"]).cast(pa.binary()).view(pa.string())})
    )
    bad_stream = bytearray(arrow_bytes([{"text": "fine"}, {"text": "caf\u00e9"}]))
    at = bad_stream.index("é".encode())
    bad_stream[at : at + 2] = b"\xe9\xe9"
    bomb = [{"text": "x" * (1 << 12)}] * 2_000
    cases: list[tuple[str, bytes, tuple[str, ...]]] = [
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', ("line 2", "UTF-8", "byte 27")),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b", "text": "c"}', ("line 2", "'text'", "twice")),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, ("line 1", "deep")),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-le"), ("line 1", "NUL")),
        ("a.csv", b"text\nb\0\n", ("line 2", "NUL")),
        ("a.txt", b"text\nb\0\n", ("line 2", "NUL")),
        ("a.jsonl.gz", gzip.compress(b"\n" * 3_000), ("line 1025", "blank lines")),
        ("a.jsonl", b'{"text": "' + b"x" * (2 << 20), ("line 1", "longer")),
        ("a.jsonl", b'{"text": NaN}', ("every row is blank",)),
        ("a.json", b'[{"text": "a"},\n {"text": }]', ("JSON", "line 2")),
        ("a.json", b'{"text": "a"}\n{"text": }', ("line 2", "JSON")),
        ("a.json", b"[]", ("empty",)),
        ("a.json", b'[{"text": "a"}\n {"text": "b"}]', ("line 2", "JSON")),
        ("a.json", b'[{"text": "a"},\n', ("line 2", "JSON")),
        ("a.json", b'[{"text": "a"}]\n{"text": "b"}', ("line 2", "JSON")),
        ("a.json", b'[{"text": "' + b"x" * (2 << 20), ("line 1", "longer")),
        ("a.json", b"[" * 100_000, ("line 1", "deep")),
        ("a.json", '[{"text": "a"}]'.encode("utf-16"), ("line 1", "UTF-16")),
        ("a.json", b" \n", ("is empty",)),
        ("a.jsonl", b'\n[{"text": "a"}]', ("line 2", ".json,")),
        ("a.jsonl", b'[\n{"text": "a"}\n]', ("line 1", ".json,")),
        ("a.json", b"7", ("row 1", "7")),
        ("a.csv", b'text\n"a\nb"\nc,d\n', ("line 4", "more cells")),
        ("a.csv", b"text,text\na,b\n", ("line 1", "(text)", "twice")),
        ("a.csv", b'text\n"a', ("line 2",)),
        ("a.csv", b"text\n", ("empty",)),
        ("a.jsonl.gz", LINES.encode(), ("line 1", "damaged")),
        ("a.jsonl.gz", packed[: len(packed) // 2], ("line ", "cut off")),
        ("a.txt.gz", packed[:-9], ("cut off",)),
        ("a.jsonl.gz", gzip.compress((json.dumps(bomb[0]) + "\n").encode() * 500), ("unpacks",)),
        ("a.txt.gz", gzip.compress(b"x" * (1 << 20)), ("unpacks",)),
        ("a.parquet", b"PAR1" + b"no table" * 9, ("damaged",)),
        ("a.parquet", table[:-20], ("damaged",)),
        ("a.parquet", table[:4] + bytes(len(table) // 2) + table[len(table) // 2 + 4 :], ()),
        ("a.parquet", b"", ()),
        ("a.parquet", latin, ("row 2", "UTF-8")),
        ("a.parquet", parquet_bytes(bomb), ("unpacks",)),
        ("a.arrow", arrow_bytes(ROWS)[:-40], ("row ",)),
        ("a.arrow", bytes(bad_stream), ("row 1", "UTF")),
        ("a.arrow", LINES.encode(), ("row 1",)),
        ("a.pdf", b"%PDF", (".parquet",)),
    ]
    for name, raw, words in cases:
        path = tmp_path / name
        path.write_bytes(raw)
        with pytest.raises(UserError) as caught:
            read(path)
            pytest.fail(f"{name} {raw[:40]!r} is accepted")
        for word in (name, *words):
            assert word in str(caught.value), (name, raw[:40], str(caught.value))
        assert "\n" not in str(caught.value), str(caught.value)
    with pytest.raises(UserError, match="flatten_indices"):
        read(saved(tmp_path / "indexed", [ROWS], _indices_data_files=[{"filename": "i.arrow"}]))
    with pytest.raises(UserError, match="names no data files"):
        read(saved(tmp_path / "broken", [ROWS], _data_files=3))
    away = [{"filename": "../../etc/passwd"}]
    with pytest.raises(UserError, match="saved/passwd"):
        read(saved(tmp_path / "saved", [ROWS], _data_files=away))
