"""Whether a run's log is what was written, and the run's files are those that it names.

Every line must be canonical, have its content's hash, and name the line before it; ``audit.head``
and ``results.json`` must name existing ends. That finds every change by somebody who does not
recompute the chain. Who can write to the folder can do that: only a head kept elsewhere
(``expect``) shows it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from distill.errors import UserError
from distill.runs.audit_events import hash_file
from distill.runs.audit_log import (
    HEAD,
    LOG,
    RECOVERED,
    ZEROS,
    Head,
    parse,
    read_head,
    read_lines,
    sealed,
    sha256,
)

RESULTS = "results.json"
SHOWN = 12  # of a hash, in a sentence


@dataclass(frozen=True)
class Finding:
    """A discrepancy, in a ``line`` of the log (from 1) or a ``file`` of the run."""

    problem: str
    line: int | None = None
    file: str | None = None

    @property
    def message(self) -> str:
        """The finding as one sentence."""
        where = f"line {self.line}" if self.line is not None else self.file
        return f"{where}: {self.problem}"


@dataclass(frozen=True)
class Verification:
    """The result. ``events``: lines of each; ``checked``: files that match; ``gone``: files that
    are no longer there, which is no fault; ``notes``: what is odd but no fault."""

    head: Head
    findings: list[Finding]
    notes: list[str]
    events: dict[str, int]
    first_time: str | None
    last_time: str | None
    checked: list[str]
    gone: list[str]

    @property
    def intact(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        return {"intact": self.intact, **asdict(self)}


@dataclass
class _Chain:
    """The lines as they are read."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)  # of every line's bytes, in order
    sound: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # with the line's number
    ends: dict[Head, int] = field(default_factory=dict)  # heads of logs that end at each line
    sequence: int = -1  # of the last sound line
    unsound: int = 0  # lines since

    def blame(self, problem: str, line: int) -> None:
        self.findings.append(Finding(problem, line))

    def blamed(self, line: int) -> bool:
        return any(finding.line == line for finding in self.findings)


def verify(folder: Path, expect: str | None = None) -> Verification:
    """Check a run's log and its files; ``expect``: a hash that the log must contain.

    Raises:
        UserError: the folder holds no run or no log, or ``expect`` is no such hash.
        OSError: something cannot be read.
    """
    if expect is not None and (len(expect) != 64 or not set(expect) <= set("0123456789abcdef")):
        raise UserError(
            f"--expect {expect}: a head is 64 hexadecimal digits, as `distill audit verify` prints "
            "it"
        )
    head = read_head(folder)  # before the log: a run that goes on writes it after
    kept = _kept_in_results(folder)
    if not (folder / LOG).exists():
        raise UserError(_no_log(folder, head, kept))
    chain = _read_chain(folder)
    _check_head(chain, head)
    if kept is not None:
        _check_anchor(chain, kept)
    known = {*chain.hashes, *(line["hash"] for _, line in chain.sound)}
    if expect is not None and expect not in known:
        problem = f"no line of it has the hash {expect}: it is another log, or it was written anew"
        chain.findings.append(Finding(problem, file=LOG))
    checked, gone = _check_files(folder, chain)
    times = [line["time"] for _, line in chain.sound]
    return Verification(
        head=Head(len(chain.hashes), chain.hashes[-1]) if chain.hashes else Head(),
        findings=sorted(chain.findings, key=lambda finding: finding.line or 1 << 60),
        notes=chain.notes,
        events=dict(Counter(line["event"] for _, line in chain.sound)),
        first_time=times[0] if times else None,
        last_time=times[-1] if times else None,
        checked=checked,
        gone=gone,
    )


def _no_log(folder: Path, head: Head | None, kept: dict[str, Any] | None) -> str:
    """Why there is nothing to verify."""
    if head is not None or kept is not None:
        witness = HEAD if head is not None else RESULTS
        return f"{folder / LOG} is gone: {witness} says that there was one; put it back from a copy"
    if not (folder / "config.json").exists():
        return f"{folder} is not a run's folder: it has neither {LOG} nor config.json"
    return (
        f"{folder} has no {LOG}: the run was made before there was a log; there is nothing to "
        "verify it by"
    )


def _read_chain(folder: Path) -> _Chain:
    """Read every line and see that it is whole, is what was written, and follows the one before."""
    chain = _Chain()
    for number, data in enumerate(read_lines(folder), 1):
        line = data.removesuffix(b"\n")
        fields = parse(line)
        if problem := _problem_of(data, line, fields):
            chain.blame(problem, number)
            chain.unsound += 1
        elif fields is not None:
            _check_order(chain, number, fields)
            chain.sequence, chain.unsound = fields["sequence"], 0
            chain.sound.append((number, fields))
            _check_recovery(chain, number, fields)
        chain.hashes.append(sha256(line))
        chain.ends[Head(chain.sequence + 1 + chain.unsound, chain.hashes[-1])] = number
    if not chain.hashes:
        chain.findings.append(Finding("it is empty", file=LOG))
    return chain


def _problem_of(data: bytes, line: bytes, fields: dict[str, Any] | None) -> str:
    """What is wrong with a line by itself, if anything."""
    if line == data:
        return (
            "it has no end: a process was killed while writing it (the next one puts that "
            "right), or it was cut"
        )
    if fields is None:
        return (
            "it is not a line of a log: not one object in canonical form with the fields of a line"
        )
    if sealed({name: value for name, value in fields.items() if name != "hash"}) != line:
        return (
            "its content is not what was written: it does not have the hash "
            f"{fields['hash'][:SHOWN]}…"
        )
    return ""


def _check_order(chain: _Chain, number: int, fields: dict[str, Any]) -> None:
    """Check that a sound line follows the one before; consequences of a fault are not repeated."""
    due = chain.sequence + 1 + chain.unsound
    sequence = fields["sequence"]
    if sequence > due:
        missing = "a line is" if sequence == due + 1 else f"{sequence - due} lines are"
        problem = f"{missing} missing before it, or it was moved"
        chain.blame(f"{problem}: its sequence is {sequence}, not {due}", number)
    elif sequence <= chain.sequence:
        problem = "it or the one before it is there twice, was put in or was moved"
        chain.blame(f"{problem}: its sequence is {sequence}, not {due}", number)
    elif not chain.unsound and fields["previous"] != (chain.hashes[-1] if chain.hashes else ZEROS):
        if number == 1:
            chain.blame("it is not the first line of a log", number)
        else:
            problem = (
                f"it is not the one that line {number} followed: it was changed, and its hash "
                "with it"
            )
            chain.blame(problem, number - 1)


def _check_recovery(chain: _Chain, number: int, fields: dict[str, Any]) -> None:
    """What a line says of how the log was found when it was continued after a break."""
    content = fields["content"]
    if fields["event"] != RECOVERED:
        return
    lines, digest = content.get("head_lines"), content.get("head_sha256")
    cut = content.get("cut_bytes")
    here = Head(fields["sequence"], fields["previous"])
    resumed = "when the log was continued here"
    if type(lines) is not int or type(cut) is not int:
        chain.blame("it says that the log was broken before, and not how", number)
    elif lines > here.lines:
        chain.blame(f"{resumed}, {lines - here.lines} of {lines} lines were gone", number)
    elif lines < 0 or (lines == 0 and here.lines > 1):
        chain.blame(f"{resumed}, {HEAD} was {'damaged' if lines else 'missing'}", number)
    elif not cut or (lines == here.lines and digest != here.sha256):
        chain.blame(f"{resumed}, it did not end at the line that {HEAD} named", number)
    else:
        chain.notes.append(
            f"line {number}: a killed process had left {cut} bytes of a line; they were cut off"
        )


def _check_head(chain: _Chain, head: Head | None) -> None:
    """See that the log ends where ``audit.head`` says, or goes on from there."""
    lines = len(chain.hashes)
    if head is None and lines > 1:
        problem = "it is missing: the end of the log may be missing too"
        chain.findings.append(Finding(problem, file=HEAD))
    elif head is not None and head.lines < 0:
        chain.findings.append(Finding("it is damaged", file=HEAD))
    elif head is not None:
        _check_end(chain, head, HEAD)
    known = head.lines if head else 0
    if known < lines and not chain.findings:
        problem = f"{HEAD} names line {known} as the last of {lines}"
        chain.notes.append(f"{problem}: a process was killed before it could write it")


def _check_end(chain: _Chain, known: Head, witness: str) -> None:
    """See that the log has the line that it once ended at, as another file says."""
    end = max((head.lines for head in chain.ends), default=0)
    if known.lines > end:
        number = len(chain.hashes) + 1
        if not chain.blamed(number):
            problem = f"the log ends before it, {witness} names {known.lines - end} more"
            chain.blame(f"{problem}: its end was cut off", number)
    elif known not in chain.ends:
        numbers = [number for head, number in chain.ends.items() if head.lines == known.lines]
        # Without such a line, it is among those that are missing.
        if numbers and not chain.blamed(number := numbers[0]):
            chain.blame(f"it is not the one that {witness} names", number)


def _kept_in_results(folder: Path) -> dict[str, Any] | None:
    """Where ``results.json`` says that the log was when the run ended."""
    try:
        kept = json.loads((folder / RESULTS).read_bytes())["audit"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return kept if isinstance(kept, dict) else None


def _check_anchor(chain: _Chain, kept: dict[str, Any]) -> None:
    """See that the log goes on from where it was when the run's results were written."""
    lines, digest = kept.get("lines"), kept.get("sha256")
    if type(lines) is not int or lines < 1 or not isinstance(digest, str):
        chain.findings.append(Finding("what it says of the log is damaged", file=RESULTS))
    else:
        _check_end(chain, Head(lines, digest), RESULTS)


def _check_files(folder: Path, chain: _Chain) -> tuple[list[str], list[str]]:
    """Compare files with the newest line about each; returns the equal and the missing ones."""
    newest: dict[str, tuple[int, Any]] = {}
    for number, line in chain.sound:
        for name, described in _named(line, "read"):
            if name in newest and newest[name][1] != described:
                problem = f"it was given another {name} than line {newest[name][0]} names"
                chain.blame(problem, number)
        newest |= {name: (number, described) for name, described in _named(line, "files")}
    checked, gone, linked = [], [], []
    for name, (number, described) in newest.items():
        path = _inside(folder, name)
        if path is None or not isinstance(described, dict):
            chain.blame(f"it names {name!r}, which is no file within the run", number)
        elif not path.is_file():
            gone.append(name)
        elif problem := _difference(path, described):
            problem = f"it is not the file that line {number} names ({problem})"
            chain.findings.append(Finding(problem, file=name))
        else:
            checked.append(name)
        if path is not None and not path.resolve().is_relative_to(folder.resolve()):
            linked.append(name)
    if linked:
        chain.notes.append(f"links in the folder lead out of it, to {', '.join(sorted(linked))}")
    strangers = sorted(
        path.name
        for path in folder.glob("*.gguf")
        if path.name not in newest and not path.name.startswith(".")  # being written just now
    )
    if strangers:
        chain.notes.append(f"the log does not know {', '.join(strangers)}")
    return checked, gone


def _named(line: dict[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    """Files that a line names, with what it says of them."""
    files = line["content"].get(key)
    if isinstance(files, dict):
        yield from files.items()


def _inside(folder: Path, name: str) -> Path | None:
    """Where a file of the run lies; a log that was not written by us may name anything. Nothing in
    its name leads out of the folder; a link that somebody has put there may, and is followed."""
    parts = PurePosixPath(name).parts
    if not parts or {"..", "/"} & set(parts) or "\\" in name or ":" in name or "\0" in name:
        return None
    return folder / name


def _difference(path: Path, described: dict[str, Any]) -> str:
    """How a file differs from what a line says of it; empty where it does not."""
    size, digest = hash_file(path)
    if size != described.get("bytes"):
        return f"{size} bytes instead of {described.get('bytes')}"
    if digest != described.get("sha256"):
        return f"SHA-256 {digest[:SHOWN]}… instead of {str(described.get('sha256'))[:SHOWN]}…"
    return ""
