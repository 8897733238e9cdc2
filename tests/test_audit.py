"""The log's chain: every edit is found and its line named, whoever is killed while writing, and whatever is cut off."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distill import audit_log
from distill.audit_log import HEAD, LOG, Head, append, has_log, last_event, plain, read_head
from distill.audit_verify import verify
from distill.errors import UserError

EDITS = 100
CONTENTS: list[dict[str, object]] = [
    {"step": 3, "value": 0.1, "limit": -2.5e-08, "ok": True, "none": None},
    {"settings": {"seed": 0, "name": 'a "quoted" \\ name é 火 \U0001f600 \udc80'}, "list": [1, [2.0, "x"]]},
    {},
    {"bytes": 10**25, "nested": {"a": {"b": {"c": "\n\r\t\x00\x7f"}}}},
]


def make_log(folder: Path, lines: int = 24) -> list[bytes]:
    """A log of so many lines; returns them with their newlines."""
    for number in range(lines):
        append(folder, [(f"event_{number % 3}", CONTENTS[number % len(CONTENTS)])])
    return lines_of(folder)


def lines_of(folder: Path) -> list[bytes]:
    return (folder / LOG).read_bytes().splitlines(keepends=True)


def write_log(folder: Path, lines: list[bytes]) -> None:
    (folder / LOG).write_bytes(b"".join(lines))


def found_lines(folder: Path) -> list[int | None]:
    return [finding.line for finding in verify(folder).findings]


def by_hand(lines: int) -> list[bytes]:
    """A log as its definition says, made without any of the program's code."""
    made: list[bytes] = []
    previous = "0" * 64
    for sequence in range(lines):
        fields = {
            "time": f"2026-01-0{sequence + 1}T00:00:00.000000+00:00",
            "sequence": sequence,
            "previous": previous,
            "event": "é",
            "content": {"b": [1, None, 0.5], "a": "火"},
        }
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        fields["hash"] = hashlib.sha256(text.encode()).hexdigest()
        line = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        previous = hashlib.sha256(line).hexdigest()
        made.append(line + b"\n")
    return made


def head_by_hand(lines: list[bytes]) -> bytes:
    digest = hashlib.sha256(lines[-1][:-1]).hexdigest()
    return f'{{"lines":{len(lines)},"sha256":"{digest}"}}\n'.encode()


# -- what is written ---------------------------------------------------------------------------------------


def test_a_log_made_by_its_definition_alone_is_intact(tmp_path: Path) -> None:
    """Chain, hashes, canonical form and head, from hashlib and json alone; and the program's lines are of it."""
    lines = by_hand(5)
    write_log(tmp_path, lines)
    (tmp_path / HEAD).write_bytes(head_by_hand(lines))
    found = verify(tmp_path)
    assert found.intact and not found.notes and found.events == {"é": 5}
    assert found.head == Head(5, json.loads(head_by_hand(lines))["sha256"])
    append(tmp_path, [("more", {"x": 1})])
    last = json.loads(lines_of(tmp_path)[-1])
    assert last.keys() == {"sequence", "time", "event", "content", "previous", "hash"}
    assert last["sequence"] == 5 and last["previous"] == found.head.sha256 and last["time"].endswith("+00:00")
    digest = last.pop("hash")
    text = json.dumps(last, sort_keys=True, separators=(",", ":"))
    assert digest == hashlib.sha256(text.encode()).hexdigest()
    assert (tmp_path / HEAD).read_bytes() == head_by_hand(lines_of(tmp_path))
    assert verify(tmp_path).intact


def test_values_are_finite_and_say_no_folder() -> None:
    """What is not finite becomes null; of a place only its last part is kept; what JSON has not is refused."""
    content = {
        "a": [float("nan"), float("inf"), -float("inf"), 1.5, True, None, 7, np.float64(0.25)],
        "b": {
            "c": ("/home/somebody/data", "C:\\Users\\somebody\\x.gguf", "runs/stores/desk/", "q8_0", "~/x")
        },
    }
    assert plain(content) == {
        "a": [None, None, None, 1.5, True, None, 7, 0.25],
        "b": {"c": ["data", "x.gguf", "desk", "q8_0", "x"]},
    }
    with pytest.raises(TypeError, match=r"Path in the log"):
        plain({"a": Path("x")})


def test_appending_reads_only_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the log is, no more than its last lines are read; a line longer than a block is read whole."""
    append(tmp_path, [("many", {"text": "x" * 100}) for _ in range(2000)])
    read: list[int] = []
    real = audit_log._read_at
    monkeypatch.setattr(
        audit_log, "_read_at", lambda f, start, size: read.append(size) or real(f, start, size)
    )
    append(tmp_path, [("one", {})])
    assert (tmp_path / LOG).stat().st_size > 600_000 and sum(read) <= audit_log.BLOCK
    append(tmp_path, [("long", {"text": "y" * 300_000})])
    append(tmp_path, [("after", {})])
    assert verify(tmp_path).intact and len(lines_of(tmp_path)) == 2003
    with pytest.raises(ValueError, match="too long"):
        append(tmp_path, [("endless", {"text": "z" * audit_log.LONGEST})])
    assert verify(tmp_path).intact and len(lines_of(tmp_path)) == 2003


def test_several_at_once_are_put_in_order(tmp_path: Path) -> None:
    """Threads and other processes that write at the same time: every line is there once, in one chain."""
    code = "import sys, pathlib; from distill.audit_log import append\n"
    code += (
        "for n in range(30): append(pathlib.Path(sys.argv[1]), [('child', {'n': n}), ('child', {'n': n})])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment) for _ in range(1)
    ]

    def write() -> None:
        for number in range(30):
            append(tmp_path, [("thread", {"n": number})])

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    write()  # also while the children write, which took longer to start
    assert [child.wait() for child in children] == [0]
    found = verify(tmp_path)
    assert found.intact and not found.notes and found.events == {"thread": 150, "child": 60}


def test_a_log_held_for_long_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not waited for without end."""
    monkeypatch.setattr(audit_log, "PATIENCE_SECONDS", 0.05)
    with audit_log._locked(tmp_path), pytest.raises(UserError, match=r"audit\.jsonl has been held"):
        append(tmp_path, [("a", {})])


# -- edits -------------------------------------------------------------------------------------------------


def line_at(data: bytes, place: int) -> int:
    """The line, from 1, that a byte is of; a newline is of the line it ends."""
    return data.count(b"\n", 0, place) + 1


def test_single_byte_edits_are_found_and_the_line_named(tmp_path: Path) -> None:
    """100 of 100 random ones, and every newline, every byte of a line, and every quote made a newline."""
    make_log(tmp_path)
    data = (tmp_path / LOG).read_bytes()
    draw = random.Random(7)
    edits = [(draw.randrange(len(data)), draw.randrange(1, 256)) for _ in range(EDITS)]
    newlines = [place for place, byte in enumerate(data) if byte == 10]
    edits += [(place, change) for place in newlines for change in (1, 10 ^ 13)]
    edits += [(place, 1) for place in range(newlines[2], newlines[3])]
    edits += [(place, data[place] ^ 10) for place in range(0, len(data), 97) if data[place] != 10]
    found = 0
    for place, change in edits:
        edited = bytearray(data)
        edited[place] ^= change
        (tmp_path / LOG).write_bytes(edited)
        result = verify(tmp_path)
        assert not result.intact and result.findings[0].line == line_at(data, place), (place, change)
        found += 1
    assert found == len(edits) >= 500
    (tmp_path / LOG).write_bytes(data)
    assert verify(tmp_path).intact


def edited_json(line: bytes, change: Callable[[dict[str, object]], None], form: dict[str, object]) -> bytes:
    fields = json.loads(line)
    change(fields)
    return json.dumps(fields, **form).encode() + b"\n"  # type: ignore[arg-type]


CANONICAL = {"sort_keys": True, "separators": (",", ":")}


@pytest.mark.parametrize(
    ("change", "form"),
    [
        (lambda fields: fields["content"].update(step=4), CANONICAL),
        (lambda fields: fields.update(event="other"), CANONICAL),
        (lambda fields: fields.update(time="2020-01-01T00:00:00.000000+00:00"), CANONICAL),
        (lambda fields: fields.update(sequence=17), CANONICAL),
        (lambda fields: fields.update(sequence=8.0), CANONICAL),
        (lambda fields: fields.update(previous="f" * 64), CANONICAL),
        (lambda fields: fields.update(hash="f" * 64), CANONICAL),
        (lambda fields: fields.update(extra=1), CANONICAL),
        (lambda fields: fields.pop("time"), CANONICAL),
        (lambda fields: fields.update(content=[]), CANONICAL),
        (lambda fields: None, {"sort_keys": True}),  # spaces alone
        (
            lambda fields: None,
            {"separators": (",", ":"), "sort_keys": False, "indent": None, "default": None},
        ),
    ],
)
def test_an_edit_that_is_still_json_is_found(
    tmp_path: Path, change: Callable[[dict[str, object]], None], form: dict[str, object]
) -> None:
    """Content, every field, a field more or less, another order or spaces: one finding, at that line."""
    lines = make_log(tmp_path, 12)
    fields = json.loads(lines[8])
    if form.get("sort_keys") is False:  # the same in another order
        write = dict(reversed(fields.items()))
        lines[8] = json.dumps(write, separators=(",", ":")).encode() + b"\n"
    else:
        lines[8] = edited_json(lines[8], change, form)
    write_log(tmp_path, lines)
    assert found_lines(tmp_path) == [9]


@pytest.mark.parametrize(
    ("junk"),
    [
        b"\n",
        b"[]\n",
        b"null\n",
        b"{}\n",
        b"[" * 200_000 + b"\n",
        b"9" * 5000 + b"\n",
        b"\xff\xfe\n",
        b'{"a":NaN}\n',
    ],
    ids=["empty", "list", "null", "object", "deep", "long number", "no UTF-8", "NaN"],
)
def test_lines_that_are_none_are_found(tmp_path: Path, junk: bytes) -> None:
    """Whatever they are; and only they are named."""
    lines = make_log(tmp_path, 6)
    write_log(tmp_path, [*lines[:3], junk, *lines[3:]])
    assert found_lines(tmp_path) == [4]
    write_log(tmp_path, [*lines, junk])
    assert found_lines(tmp_path) == [7]


def resealed(line: bytes, **changes: object) -> bytes:
    """A line with other fields and the hash that goes with them."""
    fields = json.loads(line) | changes
    fields.pop("hash")
    digest = hashlib.sha256(json.dumps(fields, **CANONICAL).encode()).hexdigest()  # type: ignore[arg-type]
    return json.dumps({**fields, "hash": digest}, **CANONICAL).encode() + b"\n"  # type: ignore[arg-type]


def test_dropped_doubled_moved_and_inserted_lines_are_named(tmp_path: Path) -> None:
    """Each anywhere in the log: the first line that does not follow is named."""
    lines = make_log(tmp_path, 10)
    for place in range(10):
        write_log(tmp_path, lines[:place] + lines[place + 1 :])
        # Also of the last, which the chain alone cannot show.
        assert found_lines(tmp_path) == [place + 1], place
        write_log(tmp_path, [*lines[:place], lines[place], *lines[place:]])
        assert found_lines(tmp_path) == [place + 2], place
        if place < 9:
            swapped = [*lines]
            swapped[place], swapped[place + 1] = lines[place + 1], lines[place]
            write_log(tmp_path, swapped)
            assert found_lines(tmp_path)[0] == place + 1, place
        # Somebody who knows how: the line put in, or in place of another, is sound by itself.
        forged = resealed(lines[place], content={"forged": True})
        write_log(tmp_path, [*lines[:place], forged, *lines[place:]])
        assert found_lines(tmp_path) == [place + 2], place
        write_log(tmp_path, [*lines[:place], forged, *lines[place + 1 :]])
        assert found_lines(tmp_path) == [place + 1], place
    write_log(tmp_path, lines[:2] + lines[7:])
    assert found_lines(tmp_path) == [3] and "5 lines are missing" in verify(tmp_path).findings[0].problem
    write_log(tmp_path, lines[4:])
    assert found_lines(tmp_path) == [1]


def test_an_end_that_was_cut_off_is_found(tmp_path: Path) -> None:
    """At every line and at bytes between; also with the head changed, damaged or taken away."""
    lines = make_log(tmp_path, 6)
    data, head = b"".join(lines), (tmp_path / HEAD).read_bytes()
    for keep in range(6):
        write_log(tmp_path, lines[:keep])
        words = [finding.words for finding in verify(tmp_path).findings if finding.line is not None]
        assert words == [
            f"line {keep + 1}: the log ends before it, audit.head names {6 - keep} more: its end was cut off"
        ]
    for size in range(len(data) - len(lines[-1]) + 1, len(data)):
        (tmp_path / LOG).write_bytes(data[:size])
        assert found_lines(tmp_path) == [6]
    for damage in (
        b"",
        b"{}",
        b"\xff",
        head.replace(b":6", b": 6"),
        head[:-1],
        b'{"lines":0,"sha256":""}\n',
        b"[" * 9999,
    ):
        write_log(tmp_path, lines)
        (tmp_path / HEAD).write_bytes(damage)
        assert [finding.words for finding in verify(tmp_path).findings] == ["audit.head: it is damaged"]
    (tmp_path / HEAD).write_bytes(head.replace(b'"sha256":"', b'"sha256":"0')[:-4] + b'"}\n')
    assert found_lines(tmp_path) == [6]
    (tmp_path / HEAD).unlink()
    write_log(tmp_path, lines[:4])
    assert "audit.head: it is missing" in verify(tmp_path).findings[0].words
    (tmp_path / LOG).unlink()
    with pytest.raises(UserError, match=r"is not a run's folder"):
        verify(tmp_path)
    (tmp_path / HEAD).write_bytes(head)
    assert has_log(tmp_path)
    with pytest.raises(UserError, match=r"audit\.jsonl is gone: audit\.head says that there was one"):
        verify(tmp_path)


def test_what_was_cut_off_stays_found_when_the_log_goes_on(tmp_path: Path) -> None:
    """The next line does not hide it: lines cut, a line cut in part, the head or the log gone, the last line edited."""
    lines = make_log(tmp_path / "whole", 6)
    head = (tmp_path / "whole" / HEAD).read_bytes()
    other = head_by_hand([*lines[:4], resealed(lines[4], event="x")])  # of a log that went another way
    cases: dict[str, tuple[list[bytes], bytes | None, str]] = {
        "one": (lines[:5], head, "line 6: when the log was continued here, 1 of 6 lines were gone"),
        "all": ([], head, "line 1: when the log was continued here, 6 of 6 lines were gone"),
        "part": ([*lines[:5], lines[5][:-1]], head, "line 6: when the log was continued here, 1 of 6"),
        "no head": (lines[:5], None, "line 6: when the log was continued here, audit.head was missing"),
        "bad head": (lines[:5], b"x", "line 6: when the log was continued here, audit.head was damaged"),
        "edited": (
            [*lines[:5], resealed(lines[5], event="x")],
            head,
            "line 7: when the log was continued here, it did",
        ),
        "other": (lines, other, "line 7: when the log was continued here, it did not end at the line"),
        "broken": ([*lines[:5], b"x\n"], head, "line 6: it is not a line of a log"),
    }
    for name, (kept, named, words) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        write_log(folder, kept)
        if named is not None:
            (folder / HEAD).write_bytes(named)
        append(folder, [("goes_on", {})])
        append(folder, [("and_on", {})])
        found = verify(folder)
        assert any(finding.words.startswith(words) for finding in found.findings), (name, found.findings)
        assert found.events["recovered"] == 1 and last_event(folder, {"goes_on", "and_on"}) == "and_on"
        assert json.loads(lines_of(folder)[-1])["sequence"] == (
            8 if name in ("edited", "other", "broken") else len(kept[:5]) + 2
        )


# -- kills and disks ---------------------------------------------------------------------------------------


def test_a_line_left_by_a_killed_process_is_cut_off_and_said(tmp_path: Path) -> None:
    """Wherever it was killed: what is left of the line goes, its size and hash are kept, and nothing is amiss."""
    lines = make_log(tmp_path, 3)
    append(tmp_path, [("long", {"text": "x" * 5000})])
    lines, head = lines_of(tmp_path), (tmp_path / HEAD).read_bytes()
    for size in (1, 50, len(lines[3]) - 1):
        write_log(tmp_path, lines[:3])
        (tmp_path / HEAD).write_bytes(head_by_hand(lines[:3]))
        with (tmp_path / LOG).open("ab") as file:
            file.write(lines[3][:size])
        assert found_lines(tmp_path) == [4]  # until the next command puts it right
        append(tmp_path, [("next", {"n": 1})])
        found = verify(tmp_path)
        assert found.intact and found.notes == [
            f"line 4: a killed process had left {size} bytes of a line; they were cut off"
        ]
        told = json.loads(lines_of(tmp_path)[3])
        assert told["event"] == "recovered" and told["content"]["cut_bytes"] == size
        assert told["content"]["cut_sha256"] == hashlib.sha256(lines[3][:size]).hexdigest()
        assert lines_of(tmp_path)[:3] == lines[:3] and json.loads(lines_of(tmp_path)[4])["event"] == "next"
    assert head != (tmp_path / HEAD).read_bytes()


def test_killed_between_a_line_and_its_head_nothing_is_amiss(tmp_path: Path) -> None:
    """One line or several further than the head; the next line puts that right without a word."""
    lines = make_log(tmp_path, 6)
    for known in (5, 3, 1):
        write_log(tmp_path, lines)
        (tmp_path / HEAD).write_bytes(head_by_hand(lines[:known]))
        found = verify(tmp_path)
        words = f"audit.head names line {known} as the last of 6"
        assert found.intact and found.notes == [f"{words}: a process was killed before it could write it"]
        append(tmp_path, [("next", {})])
        found = verify(tmp_path)
        assert found.intact and not found.notes and found.head.lines == 7
    write_log(tmp_path, lines[:1])
    (tmp_path / HEAD).unlink()  # the very first line
    assert verify(tmp_path).intact
    append(tmp_path, [("next", {})])
    assert verify(tmp_path).intact and len(lines_of(tmp_path)) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on a file's size is POSIX")
@pytest.mark.parametrize("torn", [b"", b'{"content":'])
def test_a_full_disk_loses_nothing(tmp_path: Path, torn: bytes) -> None:
    """The system takes half a line and then refuses: an OSError that names the file, and the log as before."""
    import resource

    make_log(tmp_path, 4)
    with (tmp_path / LOG).open("ab") as file:
        file.write(torn)
    before, head = (tmp_path / LOG).read_bytes(), (tmp_path / HEAD).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        with pytest.raises(OSError, match="too large") as raised:
            append(tmp_path, [("big", {"text": "x" * 1000})])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.filename == str(tmp_path / LOG)
    now = (tmp_path / LOG).read_bytes()
    assert len(now) == len(before) and now[: len(before) - len(torn)] == before[: len(before) - len(torn)]
    assert (tmp_path / HEAD).read_bytes() == head and (torn or verify(tmp_path).intact)
    append(tmp_path, [("small", {})])
    assert verify(tmp_path).intact and verify(tmp_path).events.get("recovered", 0) == bool(torn)


def test_a_head_that_cannot_be_written_is_an_error_and_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line is in the log by then; the next one goes on from it."""
    make_log(tmp_path, 2)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(audit_log, "write_whole", full)
        with pytest.raises(OSError, match="No space"):
            append(tmp_path, [("a", {})])
    assert read_head(tmp_path) == Head(2, hashlib.sha256(lines_of(tmp_path)[1][:-1]).hexdigest())
    append(tmp_path, [("b", {})])
    found = verify(tmp_path)
    assert found.intact and not found.notes and found.head.lines == 4


def test_a_head_kept_elsewhere_shows_a_log_written_anew(tmp_path: Path) -> None:
    """Every line of a log that has gone on is known by its hash or SHA-256; another log's is not."""
    lines = make_log(tmp_path, 5)
    heads = [hashlib.sha256(line[:-1]).hexdigest() for line in lines] + [
        json.loads(line)["hash"] for line in lines
    ]
    assert verify(tmp_path).head.sha256 == heads[4]
    append(tmp_path, [("more", {})])
    assert all(verify(tmp_path, head).intact for head in heads)
    (tmp_path / LOG).unlink()
    (tmp_path / HEAD).unlink()
    make_log(tmp_path, 6)
    assert verify(tmp_path).intact
    words = [finding.words for finding in verify(tmp_path, heads[4]).findings]
    assert words == [
        f"audit.jsonl: no line of it has the hash {heads[4]}: it is another log, or it was written anew"
    ]
    for wrong in ("", "abc", "g" * 64):
        with pytest.raises(UserError, match="64 hexadecimal digits"):
            verify(tmp_path, wrong)
