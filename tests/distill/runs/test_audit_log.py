"""The log's chain: every edit is found and its line named, whatever is killed or cut off.

Over 400 lines because every way to damage a log is tried on the same run.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from distill.errors import UserError
from distill.runs import audit_log
from distill.runs.audit_log import HEAD, LOG, Head, append, has_log, last_event, plain, read_head
from distill.runs.audit_verify import verify

EDITS = 100
CONTENTS: list[dict[str, object]] = [
    {"step": 3, "value": 0.1, "limit": -2.5e-08, "ok": True, "none": None},
    {"settings": {"name": 'a "quoted" \\ name é 火 \U0001f600 \udc80'}, "list": [1, [2.0, "x"]]},
    {},
    {"bytes": 10**25, "nested": {"a": {"b": {"c": "\n\r\t\x00\x7f"}}}},
]


def make_log(folder: Path, lines: int) -> list[bytes]:
    """A log of so many lines; returns them with their newlines."""
    for number in range(lines):
        append(folder, [(f"event_{number % 3}", CONTENTS[number % len(CONTENTS)])])
    return lines_of(folder)


def lines_of(folder: Path) -> list[bytes]:
    return (folder / LOG).read_bytes().splitlines(keepends=True)


def write_log(folder: Path, lines: list[bytes], head: bytes | None = None) -> None:
    (folder / LOG).write_bytes(b"".join(lines))
    if head is not None:
        (folder / HEAD).write_bytes(head)


def found_lines(folder: Path) -> list[int | None]:
    return [finding.line for finding in verify(folder).findings]


def canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def by_hand(lines: int) -> list[bytes]:
    """A log as its definition says, made without any of the program's code."""
    made: list[bytes] = []
    previous = "0" * 64
    for sequence in range(lines):
        fields: dict[str, Any] = {"sequence": sequence, "previous": previous, "event": "é"}
        fields["time"] = f"2026-01-0{sequence + 1}T00:00:00.000000+00:00"
        fields["content"] = {"b": [1, None, 0.5], "a": "火"}
        fields["hash"] = hashlib.sha256(canonical(fields)).hexdigest()
        line = canonical(fields)
        previous = hashlib.sha256(line).hexdigest()
        made.append(line + b"\n")
    return made


def digest_of(line: bytes) -> str:
    """Of a line without its newline."""
    return hashlib.sha256(line[:-1]).hexdigest()


def head_by_hand(lines: list[bytes]) -> bytes:
    digest = digest_of(lines[-1])
    return f'{{"lines":{len(lines)},"sha256":"{digest}"}}\n'.encode()


# -- what is written


def test_a_log_made_by_its_definition_alone_is_intact(tmp_path: Path) -> None:
    """Chain, hashes, canonical form and head, from hashlib and json alone; the program goes on."""
    lines = by_hand(5)
    write_log(tmp_path, lines, head_by_hand(lines))
    found = verify(tmp_path)
    assert found.intact and not found.notes and found.events == {"é": 5}
    assert found.head == Head(5, json.loads(head_by_hand(lines))["sha256"])
    append(tmp_path, [("more", {"x": 1})])
    last = json.loads(lines_of(tmp_path)[-1])
    assert last.keys() == {"sequence", "time", "event", "content", "previous", "hash"}
    assert (last["sequence"], last["previous"]) == (5, found.head.sha256)
    assert last["time"].endswith("+00:00")
    digest = last.pop("hash")
    assert digest == hashlib.sha256(canonical(last)).hexdigest()
    assert (tmp_path / HEAD).read_bytes() == head_by_hand(lines_of(tmp_path))
    assert verify(tmp_path).intact


def test_values_are_finite_and_say_no_folder() -> None:
    """What is not finite becomes null, of a place its last part is kept, the rest is refused."""
    numbers = [math.nan, math.inf, -math.inf, 1.5, True, None, 7, np.float64(0.25)]
    places = ("/home/a/data", "C:\\Users\\a\\x.gguf", "runs/stores/desk/", "q8_0", "~/x")
    found = plain({"a": numbers, "b": {"c": places}})
    assert found["a"] == [None, None, None, 1.5, True, None, 7, 0.25]
    assert found["b"] == {"c": ["data", "x.gguf", "desk", "q8_0", "x"]}
    with pytest.raises(TypeError, match=r"Path in the log"):
        plain({"a": Path("x")})


def test_appending_reads_only_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long log only the last lines are read; a line longer than a block is read whole."""
    append(tmp_path, [("many", {"text": "x" * 100}) for _ in range(2000)])
    read: list[int] = []

    class Counted(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            data = super().read(-1 if size is None else size)
            read.append(len(data) if str(self.name).endswith(LOG) else 0)
            return data

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, **_: Counted(path, mode.replace("b", "")))
        append(tmp_path, [("one", {})])
    assert sum(read) > 0
    assert (tmp_path / LOG).stat().st_size > 600_000 and sum(read) <= audit_log.BLOCK
    append(tmp_path, [("long", {"text": "y" * 300_000})])
    append(tmp_path, [("after", {})])
    assert verify(tmp_path).intact and len(lines_of(tmp_path)) == 2003
    with pytest.raises(ValueError, match="too long"):
        append(tmp_path, [("endless", {"text": "z" * audit_log.LONGEST})])
    assert verify(tmp_path).intact and len(lines_of(tmp_path)) == 2003


def test_several_at_once_are_put_in_order(tmp_path: Path) -> None:
    """Threads and another process write at the same time: each line is there once, in one chain."""
    code = "import sys, pathlib; from distill.runs.audit_log import append\n"
    code += "two = lambda n: [('child', {'n': n})] * 2\n"
    code += "for n in range(30): append(pathlib.Path(sys.argv[1]), two(n))"
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)

    def write() -> None:
        for number in range(30):
            append(tmp_path, [("thread", {"n": number})])

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    write()  # also while the child writes, which took longer to start
    assert child.wait() == 0
    found = verify(tmp_path)
    assert found.intact and not found.notes and found.events == {"thread": 150, "child": 60}


def test_a_log_held_for_long_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not waited for without end."""
    monkeypatch.setattr(audit_log, "PATIENCE_SECONDS", 0.05)
    held = filelock.FileLock(tmp_path / ".lock.audit")
    with held, pytest.raises(UserError, match=r"audit\.jsonl has been held"):
        append(tmp_path, [("a", {})])


# -- edits


def test_single_byte_edits_are_found_and_the_line_named(tmp_path: Path) -> None:
    """Random ones, every newline, every byte of a line, and many bytes made a newline."""
    data = b"".join(make_log(tmp_path, 12))
    draw = random.Random(7)
    edits = [(draw.randrange(len(data)), draw.randrange(1, 256)) for _ in range(EDITS)]
    newlines = [place for place, byte in enumerate(data) if byte == 10]
    edits += [(place, change) for place in newlines for change in (1, 10 ^ 13)]
    edits += [(place, 1) for place in range(newlines[2], newlines[3])]
    edits += [(place, data[place] ^ 10) for place in range(0, len(data), 41) if data[place] != 10]
    assert len(edits) >= 500
    for place, change in edits:
        edited = bytearray(data)
        edited[place] ^= change
        (tmp_path / LOG).write_bytes(edited)
        line = data.count(b"\n", 0, place) + 1  # a newline is of the line it ends
        assert found_lines(tmp_path)[:1] == [line], (place, change)
    (tmp_path / LOG).write_bytes(data)
    assert verify(tmp_path).intact


def test_an_edit_that_is_still_json_is_found(tmp_path: Path) -> None:
    """Content, each field, one more or less, another order, spaces: one finding, at that line."""
    lines = make_log(tmp_path, 12)
    fields = json.loads(lines[8])
    changes: list[dict[str, Any]] = [
        {"content": fields["content"] | {"step": 4}},
        {"event": "other"},
        {"time": "2020-01-01T00:00:00.000000+00:00"},
        {"sequence": 17},
        {"sequence": 8.0},
        {"previous": "f" * 64},
        {"hash": "f" * 64},
        {"extra": 1},
        {"content": []},
    ]
    edits = [canonical(fields | change) for change in changes]
    edits += [canonical({key: value for key, value in fields.items() if key != "time"})]
    edits += [json.dumps(fields, sort_keys=True).encode()]  # spaces alone
    edits += [json.dumps(dict(reversed(fields.items())), separators=(",", ":")).encode()]
    for edit in edits:
        write_log(tmp_path, [*lines[:8], edit + b"\n", *lines[9:]])
        assert found_lines(tmp_path) == [9], edit


def test_lines_that_are_none_are_found(tmp_path: Path) -> None:
    """Empty, no object, too deep, a long number, no UTF-8: only they are named."""
    lines = make_log(tmp_path, 6)
    junks = [b"", b"[]", b"null", b"{}", b"[" * 200_000, b"9" * 5000, b"\xff\xfe", b'{"a":NaN}']
    for junk in junks:
        write_log(tmp_path, [*lines[:3], junk + b"\n", *lines[3:]])
        assert found_lines(tmp_path) == [4], junk[:20]
        write_log(tmp_path, [*lines, junk + b"\n"])
        assert found_lines(tmp_path) == [7], junk[:20]


def resealed(line: bytes, **changes: object) -> bytes:
    """A line with other fields and the hash that goes with them."""
    fields = json.loads(line) | changes
    fields.pop("hash")
    digest = hashlib.sha256(canonical(fields)).hexdigest()
    return canonical({**fields, "hash": digest}) + b"\n"


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
    assert found_lines(tmp_path) == [3]
    assert "5 lines are missing" in verify(tmp_path).findings[0].problem
    write_log(tmp_path, lines[4:])
    assert found_lines(tmp_path) == [1]


def test_an_end_that_was_cut_off_is_found(tmp_path: Path) -> None:
    """At every line and at bytes between; also with the head changed, damaged or taken away."""
    lines = make_log(tmp_path, 6)
    data, head = b"".join(lines), (tmp_path / HEAD).read_bytes()
    for keep in range(6):
        write_log(tmp_path, lines[:keep])
        found = [finding for finding in verify(tmp_path).findings if finding.line is not None]
        assert [finding.line for finding in found] == [keep + 1]
        assert f"audit.head names {6 - keep} more" in found[0].message, keep
    for size in range(len(data) - len(lines[-1]) + 1, len(data)):
        (tmp_path / LOG).write_bytes(data[:size])
        assert found_lines(tmp_path) == [6]
    damages = [b"", b"{}", b"\xff", head.replace(b":6", b": 6"), head[:-1], b"[" * 9999]
    for damage in (*damages, b'{"lines":0,"sha256":""}\n'):
        write_log(tmp_path, lines, damage)
        words = [finding.message for finding in verify(tmp_path).findings]
        assert words == ["audit.head: it is damaged"], damage[:20]
    (tmp_path / HEAD).write_bytes(head.replace(b'"sha256":"', b'"sha256":"0')[:-4] + b'"}\n')
    assert found_lines(tmp_path) == [6]
    (tmp_path / HEAD).unlink()
    write_log(tmp_path, lines[:4])
    assert "audit.head: it is missing" in verify(tmp_path).findings[0].message
    (tmp_path / LOG).unlink()
    with pytest.raises(UserError, match=r"is not a run's folder"):
        verify(tmp_path)
    (tmp_path / HEAD).write_bytes(head)
    assert has_log(tmp_path)
    with pytest.raises(UserError, match=r"audit\.jsonl is gone: audit\.head says"):
        verify(tmp_path)


def test_what_was_cut_off_stays_found_when_the_log_goes_on(tmp_path: Path) -> None:
    """The next line does not hide it: lines cut or cut in part, no head, an edited last line."""
    lines = make_log(tmp_path / "whole", 6)
    head = (tmp_path / "whole" / HEAD).read_bytes()
    other = head_by_hand([*lines[:4], resealed(lines[4], event="x")])  # a log that went another way
    edited = [*lines[:5], resealed(lines[5], event="x")]
    cases: dict[str, tuple[list[bytes], bytes | None, int, str]] = {
        "one": (lines[:5], head, 6, "1 of 6 lines were gone"),
        "all": ([], head, 1, "6 of 6 lines were gone"),
        "part": ([*lines[:5], lines[5][:-1]], head, 6, "1 of 6"),
        "no head": (lines[:5], None, 6, "audit.head was missing"),
        "bad head": (lines[:5], b"x", 6, "audit.head was damaged"),
        "edited": (edited, head, 7, "it did not end at the line"),
        "other": (lines, other, 7, "it did not end at the line"),
        "broken": ([*lines[:5], b"x\n"], head, 6, "it is not a line of a log"),
    }
    for name, (kept, named, line, words) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        write_log(folder, kept, named)
        append(folder, [("goes_on", {})])
        append(folder, [("and_on", {})])
        found = verify(folder)
        start = f"line {line}: {'' if name == 'broken' else 'when the log was continued here, '}"
        said = [one.message for one in found.findings if one.message.startswith(start)]
        assert any(words in one for one in said), (name, found.findings)
        assert found.events["recovered"] == 1, name
        assert last_event(folder, {"goes_on", "and_on"}) == "and_on", name
        last = 8 if name in ("edited", "other", "broken") else len(kept[:5]) + 2
        assert json.loads(lines_of(folder)[-1])["sequence"] == last, name


# -- kills and disks


def test_a_line_left_by_a_killed_process_is_cut_off_and_said(tmp_path: Path) -> None:
    """What is left of the line goes, its size and hash are kept, and nothing is amiss."""
    lines = make_log(tmp_path, 3)
    append(tmp_path, [("long", {"text": "x" * 5000})])
    lines, head = lines_of(tmp_path), (tmp_path / HEAD).read_bytes()
    for size in (1, 50, len(lines[3]) - 1):
        write_log(tmp_path, [*lines[:3], lines[3][:size]], head_by_hand(lines[:3]))
        assert found_lines(tmp_path) == [4]  # until the next command puts it right
        append(tmp_path, [("next", {"n": 1})])
        found = verify(tmp_path)
        assert found.intact and len(found.notes) == 1, size
        assert found.notes[0].startswith(f"line 4: a killed process had left {size} bytes")
        now = lines_of(tmp_path)
        told, after = (json.loads(line) for line in now[3:])
        assert (told["event"], after["event"]) == ("recovered", "next"), size
        content = told["content"]
        assert content["cut_bytes"] == size and now[:3] == lines[:3]
        assert content["cut_sha256"] == hashlib.sha256(lines[3][:size]).hexdigest(), size
    assert head != (tmp_path / HEAD).read_bytes()


def test_killed_between_a_line_and_its_head_nothing_is_amiss(tmp_path: Path) -> None:
    """One line or several further than the head; the next line puts that right without a word."""
    lines = make_log(tmp_path, 6)
    for known in (5, 3, 1):
        write_log(tmp_path, lines, head_by_hand(lines[:known]))
        found = verify(tmp_path)
        assert found.intact and len(found.notes) == 1, known
        assert f"audit.head names line {known} as the last of 6" in found.notes[0]
        append(tmp_path, [("next", {})])
        found = verify(tmp_path)
        assert found.intact and not found.notes and found.head.lines == 7
    write_log(tmp_path, lines[:1])
    (tmp_path / HEAD).unlink()  # the very first line
    assert verify(tmp_path).intact
    append(tmp_path, [("next", {})])
    assert verify(tmp_path).intact and len(lines_of(tmp_path)) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on a file's size is POSIX")
def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """The system takes half a line and refuses: an OSError with the file; the log is as before."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for torn in (b"", b'{"content":'):
        folder = tmp_path / str(len(torn))
        folder.mkdir()
        log = folder / LOG
        whole = b"".join(make_log(folder, 4))
        log.write_bytes(whole + torn)
        head, size = (folder / HEAD).read_bytes(), len(whole + torn)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limits[1]))
        try:
            with pytest.raises(OSError, match="too large") as raised:
                append(folder, [("big", {"text": "x" * 1000})])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        now = log.read_bytes()
        assert raised.value.filename == str(log)
        assert len(now) == size and now.startswith(whole), torn
        assert (folder / HEAD).read_bytes() == head and (torn or verify(folder).intact), torn
        append(folder, [("small", {})])
        found = verify(folder)
        assert found.intact and found.events.get("recovered", 0) == bool(torn), torn


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
    assert read_head(tmp_path) == Head(2, digest_of(lines_of(tmp_path)[1]))
    append(tmp_path, [("b", {})])
    found = verify(tmp_path)
    assert found.intact and not found.notes and found.head.lines == 4


def test_a_head_kept_elsewhere_shows_a_log_written_anew(tmp_path: Path) -> None:
    """Each line of a log that went on is known by hash or SHA-256; another log's is not."""
    lines = make_log(tmp_path, 5)
    heads = [*map(digest_of, lines), *(json.loads(line)["hash"] for line in lines)]
    assert verify(tmp_path).head.sha256 == heads[4]
    append(tmp_path, [("more", {})])
    assert all(verify(tmp_path, head).intact for head in heads)
    (tmp_path / LOG).unlink()
    (tmp_path / HEAD).unlink()
    make_log(tmp_path, 6)
    assert verify(tmp_path).intact
    words = [finding.message for finding in verify(tmp_path, heads[4]).findings]
    assert len(words) == 1 and f"audit.jsonl: no line of it has the hash {heads[4]}" in words[0]
    for wrong in ("", "abc", "g" * 64):
        with pytest.raises(UserError, match="64 hexadecimal digits"):
            verify(tmp_path, wrong)
