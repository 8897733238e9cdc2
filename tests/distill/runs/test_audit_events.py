"""Private reasoning in the log of a run: its SHA-256, and not a word of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from distill.inference.judge import Judgment
from distill.inference.reasoning import digests
from distill.runs.audit_events import record_capture, record_judgments
from distill.runs.audit_verify import verify
from teachers.llama_cpp.teacher import GGUFTeacher
from tests.support.children.capture_child import Source
from tests.support.stores import filled

SECRET = "the key is under the mat"


def test_reasoning_appears_as_its_hash_alone(tiny_teacher: GGUFTeacher, tmp_path: Path) -> None:
    """In the teacher's texts that a run keeps, and in a prompt that is judged."""
    store, _ = filled(tmp_path / "store", tiny_teacher, Source())
    run = tmp_path / "run"
    run.mkdir()
    texts = ["plain words", f"<think>{SECRET}</think>Hello."]
    texts += [f"<think>{SECRET}, too</think><final>Yes.</final>"]
    record_capture(run, store, False, [digest for text in texts for digest in digests(text)])
    (run / "student.gguf").write_bytes(b"a student")
    prompts = (f"<think>{SECRET}</think>May I?", "May I?")
    judged = [Judgment(prompt, "ALLOW", None, None, None, None) for prompt in prompts]
    assert record_judgments(run / "student.gguf", [judgment.to_audit() for judgment in judged])
    log = (run / "audit.jsonl").read_text()
    for private in (SECRET, "Hello", "May I"):
        assert private not in log
    assert verify(run).intact
    found = [json.loads(line)["content"]["reasoning_sha256"] for line in log.splitlines()]
    one, two = (hashlib.sha256(f"{SECRET}{more}".encode()).hexdigest() for more in ("", ", too"))
    assert found == [[one, two], [one], []]
