"""Private reasoning in the log of a run: its SHA-256, and not a word of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from distill.audit import record_capture, record_judgments
from distill.audit_verify import verify
from distill.judge import Judgment
from teachers.gguf_teacher import GGUFTeacher
from tests.capture_child import Source
from tests.test_capture import filled

SECRET = "the key is under the mat"


def test_reasoning_appears_as_its_hash_alone(tiny_teacher: GGUFTeacher, tmp_path: Path) -> None:
    """In the teacher's texts that a run keeps, and in a prompt that is judged; of texts without any there is none."""
    store, _ = filled(tmp_path / "store", tiny_teacher, Source())
    run = tmp_path / "run"
    run.mkdir()
    texts = [
        "plain words",
        f"<think>{SECRET}</think>Hello.",
        f"<think>{SECRET}, too</think><final>Yes.</final>",
    ]
    record_capture(run, store, False, texts)
    (run / "student.gguf").write_bytes(b"a student")
    judged = [
        Judgment(prompt, "ALLOW", None, None, None, None)
        for prompt in (f"<think>{SECRET}</think>May I?", "May I?")
    ]
    assert record_judgments(run / "student.gguf", judged)
    log = (run / "audit.jsonl").read_text()
    assert SECRET not in log and "Hello" not in log and "May I" not in log and verify(run).intact
    captured, first, second = (json.loads(line)["content"] for line in log.splitlines())
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    assert captured["reasoning_sha256"] == [digest, hashlib.sha256(f"{SECRET}, too".encode()).hexdigest()]
    assert first["reasoning_sha256"] == [digest] and second["reasoning_sha256"] == []
