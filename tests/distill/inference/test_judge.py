"""`distill judge`: the numbers of PyTorch from the exported file alone; one line per error."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.errors import UserError
from distill.heads.prompts import built_in_prompts
from distill.inference.judge import ANSWER_TOKENS, Judge
from students.model.decoder import SO8TForCausalLM
from students.model.head_decisions import DECISIONS
from students.model.heads import decide_by_thresholds, head_values
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.tokenizer.conversation import conversation_tokens
from tests.conftest import command, refuses, says
from tests.support.runs import export, student_with_heads
from tests.support.teachers import certainty_of

pytestmark = pytest.mark.usefixtures("llama_here")
THRESHOLDS, TRUST = (0.4, 0.55), 0.75
PROMPTS = [prompt.text for prompt in built_in_prompts()[::900]]
PROMPTS += ["Hi", "[/bold] [red]not markup[/] \\[x]"]


@pytest.fixture(scope="module")
def student() -> SO8TForCausalLM:
    """Lively enough that prompts differ, with heads that are not sure of everything."""
    made = student_with_heads(list(THRESHOLDS), TRUST)
    with torch.no_grad():
        made.verification_head.certainty.fill_(1.0)
        made.verification_head.output.weight.mul_(3.0)
    return made


@pytest.fixture(scope="module")
def file(student: SO8TForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student, exported."""
    return export(student, tmp_path_factory.mktemp("judge") / "student.gguf")


@pytest.fixture(scope="module")
def kept(file: Path) -> Iterator[GGUFTeacher]:
    """The exported student, loaded once."""
    with GGUFTeacher(file, threads=1) as model:
        yield model


@pytest.fixture
def opened(file: Path, monkeypatch: pytest.MonkeyPatch, kept: GGUFTeacher) -> None:
    """Files of this student are not loaded into llama.cpp each anew; their heads are read."""
    monkeypatch.setattr("distill.inference.judge.GGUFTeacher", lambda path: kept)
    monkeypatch.setattr(kept, "close", lambda: None)


def tokens_of(teacher: GGUFTeacher, prompt: str) -> list[int]:
    """A prompt as a conversation that is to be answered."""
    message = {"role": "user", "content": prompt}
    return conversation_tokens(teacher, [message], answer=True).tolist()


@torch.no_grad()
def reference(
    student: SO8TForCausalLM, teacher: GGUFTeacher, prompt: str
) -> tuple[list[float], float]:
    """Probabilities of the decisions, and mean agreement over the greedy answer, from PyTorch."""
    prompt_tokens = torch.tensor([tokens_of(teacher, prompt)])
    room = student.config.max_position_embeddings - prompt_tokens.shape[1]
    said = student.generate(
        prompt_tokens,
        max_new_tokens=max(1, min(ANSWER_TOKENS, room)),
        do_sample=False,
        eos_token_id=list(teacher.info.end_tokens),
    )
    output = student(said[:, :-1])
    places = slice(prompt_tokens.shape[1] - 1, None)
    states, logits = output.last_hidden_state[0, places], output.logits[0, places]
    assert logits.argmax(dim=-1).tolist() == said[0, prompt_tokens.shape[1] :].tolist()
    weight, bias = (p.double() for p in student.safety_head.parameters())
    odds = (weight @ states[0].double() + bias).exp()
    sure = torch.tensor([certainty_of(row) for row in logits.tolist()])
    agreement = student.verification_head(states, sure).double().sigmoid().mean()
    return (odds / odds.sum()).tolist(), float(agreement)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are."""
    monkeypatch.setenv("COLUMNS", "200")


def test_the_numbers_are_pytorchs(
    student: SO8TForCausalLM,
    file: Path,
    kept: GGUFTeacher,
    tiny_teacher: GGUFTeacher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Probabilities, decision, confidence, agreement over its own answer, and the advice."""
    assert tiny_teacher.info.chat_template is not None
    with Judge(file, kept) as judge:
        judgments = judge.judge(PROMPTS)
    for prompt, found in zip(PROMPTS, judgments, strict=True):
        chances, agreement = reference(student, tiny_teacher, prompt)
        assert found.prompt == prompt and found.probabilities is not None
        assert list(found.probabilities) == ["ALLOW", "ESCALATE", "REFUSE"]
        assert list(found.probabilities.values()) == pytest.approx(chances, abs=1e-3)
        wanted = DECISIONS[int(decide_by_thresholds(torch.tensor([chances]), THRESHOLDS))]
        assert found.decision == wanted and found.confidence == found.probabilities[wanted]
        assert found.agreement == pytest.approx(agreement, abs=1e-3)
        assert found.ask_teacher == (agreement < TRUST)
    assert len({judgment.decision for judgment in judgments}) > 1
    assert {judgment.ask_teacher for judgment in judgments} == {True, False}
    agreements = [judgment.agreement or 0.0 for judgment in judgments]
    assert max(agreements) - min(agreements) > 0.1
    # Many together, in several turns, are judged as each alone.
    monkeypatch.setattr("distill.inference.judge.TOGETHER", 4)
    monkeypatch.setattr("distill.heads.gguf_heads.TOGETHER", 3)
    with Judge(file, kept) as judge:
        decisions = [judgment.decision for judgment in judge.judge(PROMPTS)]
        alone = judge.judge([PROMPTS[-1]])[0]
    assert decisions == [judgment.decision for judgment in judgments]
    assert alone.agreement == pytest.approx(judgments[-1].agreement, abs=1e-4)
    assert alone.probabilities == pytest.approx(judgments[-1].probabilities, abs=1e-4)


def test_a_prompt_may_fill_the_context_and_no_more(
    student: SO8TForCausalLM, file: Path, opened: None, tiny_teacher: GGUFTeacher
) -> None:
    """One that leaves no room for an answer is judged; a longer one is refused with the numbers."""
    room = student.config.max_position_embeddings
    sizes, count = {0: ""}, 0
    while max(sizes) <= room:
        count += 1
        text = "a " * count + "b"
        sizes[len(tokens_of(tiny_teacher, text))] = text
    longest = max(size for size in sizes if size <= room)
    assert longest == room
    with Judge(file) as judge:
        for size in (longest, longest - 1):
            found = judge.judge([sizes[size]])[0]
            chances, agreement = reference(student, tiny_teacher, sizes[size])
            assert found.probabilities is not None
            assert list(found.probabilities.values()) == pytest.approx(chances, abs=1e-3)
            assert found.agreement == pytest.approx(agreement, abs=1e-3)
        told = rf"has {max(sizes)} tokens, the student's context is {room}"
        with pytest.raises(UserError, match=told):
            judge.judge(["short", sizes[max(sizes)]])


def test_no_more_is_asked_for_than_is_looked_at(
    file: Path, kept: GGUFTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of the answer's places alone, and the same to the last bit."""
    ask, sizes = kept.worker.ask, []

    def watched(*request: Any) -> Any:
        answer = ask(*request)
        sizes.extend(len(answer[1][name]) for name in ("logits", "final") if name in answer[1])
        return answer

    prompt = kept.tokenize(["words and " * 40], add_special=True, parse_special=True)[0]
    answer = kept.tokenize(["Yes, of course."], add_special=False, parse_special=True)[0]
    judge = Judge(file, kept)
    for count in (0, 1, 2, len(answer)):
        said = np.concatenate([prompt, answer[:count]])
        longer = np.append(said, said[-1]).astype(np.int32)
        states = torch.from_numpy(kept.states([longer], exact=True)["final"])
        logits = torch.from_numpy(kept.logits([longer], exact=True))
        places = slice(len(prompt) - 1, max(len(prompt), len(said) - 1))
        with monkeypatch.context() as changed:
            changed.setattr(kept.worker, "ask", watched)
            found = judge.agreement(prompt, said)
            assert len(judge.decide([prompt, said])) == 2
        assert sizes == [count + 1, count + 1, 2], count
        sizes.clear()
        assert found == float(judge.heads.agreement(states[places], logits[places]).mean()), count


def test_one_prompt_on_the_command_line(file: Path, opened: None) -> None:
    """As JSON, and as a table that holds the same figures."""
    prompt = "どうやって金庫を開けますか? \U0001f600"
    said = says("judge", file, prompt, "--json")
    found = json.loads(said)
    assert said.count("\n") == 1 and prompt in said
    figures = {"decision", "probabilities", "confidence", "agreement", "ask_teacher"}
    assert found.keys() == figures | {"prompt", "prompt_sha256"}
    assert found["prompt_sha256"] == hashlib.sha256(prompt.encode()).hexdigest()
    assert sum(found["probabilities"].values()) == pytest.approx(1.0)
    table = says("judge", file, prompt)
    assert found["decision"] in table and f"{found['confidence']:.1%}" in table
    assert f"{found['agreement']:.1%} of its tokens" in table
    assert ("ask the teacher" in table) == found["ask_teacher"]


def test_a_file_of_prompts(file: Path, opened: None, tmp_path: Path) -> None:
    """One line for each, in order; what looks like markup is text; labels are not looked at."""
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": text, "label": "?"}) for text in PROMPTS]
    path.write_text("\n".join(lines), "utf-8")
    said = says("judge", file, "--prompts", path, "--json")
    found = [json.loads(line) for line in said.splitlines()]
    assert [entry["prompt"] for entry in found] == PROMPTS
    table = says("judge", file, "--prompts", path)
    assert PROMPTS[-1] in table and f"{len(PROMPTS)} prompts" in table
    assert all(f"{entry['confidence']:.1%}" in table for entry in found)


def test_the_command_itself(file: Path, tmp_path: Path) -> None:
    """As a process in another folder; also of a prompt that is no UTF-8."""
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-m", "distill", "judge", str(file), b"caf\xe9", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert json.loads(done.stdout)["prompt_sha256"] == hashlib.sha256(b"caf\xe9").hexdigest()


def without(student: SO8TForCausalLM, part: str) -> dict[str, Any]:
    """What a file says of the student's heads, without the keys that hold ``part``."""
    return {key: value for key, value in head_values(student.heads()).items() if part not in key}


def export_with(values: dict[str, Any], student: SO8TForCausalLM, path: Path) -> None:
    """The student as a file that says something else of its heads."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr("students.gguf.writer.head_values", lambda heads: values)
        export(student, path)


def test_a_student_with_one_head(student: SO8TForCausalLM, opened: None, tmp_path: Path) -> None:
    """What the missing head would say is left out, in JSON and in both tables."""
    path, prompts = tmp_path / "s.gguf", tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "Hello"}')
    for missing in ("safety", "verification"):
        export_with(without(student, f".{missing}."), student, path)
        decides = missing == "verification"
        for arguments in (["Hello"], ["--prompts", prompts]):
            found = json.loads(says("judge", path, *arguments, "--json"))
            assert (found["decision"] is not None) == decides, missing
            assert (found["agreement"] is None) == decides, missing
            assert (found["ask_teacher"] is None) == decides, missing
            table = says("judge", path, *arguments)
            assert ("of its tokens" not in table) == decides, missing
            assert any(name in table for name in DECISIONS) == decides, missing


W, B, LABELS = "so8t.safety.weight", "so8t.safety.bias", "so8t.safety.labels"
UNITS, TRUST_KEY = "so8t.verification.units", "so8t.verification.trust"
# What becomes of a key (None: it is left out), and what must be said.
HARM: list[tuple[str, Any, str]] = [
    (B, None, "so8t.safety.bias has no values"),
    (LABELS, None, "so8t.safety.labels is None"),
    (TRUST_KEY, None, "so8t.verification.trust has values that are not finite"),
    (W, [0.5] * 5, "so8t.safety.weight has 5 values, 192 are needed"),
    (B, [0.5, math.nan, 0.5], "so8t.safety.bias has values that are not finite"),
    (B, ["a", "b", "c"], "so8t.safety.bias has values that are not finite"),
    (LABELS, ["YES", "NO", "MAYBE"], "so8t.safety.labels is ['YES', 'NO', 'MAYBE']"),
    (UNITS, (1 << 32) - 1, "so8t.verification.units is 4294967295"),
    (UNITS, 65536, "so8t.verification.hidden.weight has 4096 values"),
]


def test_broken_heads_are_refused(student: SO8TForCausalLM, tmp_path: Path) -> None:
    """The file, the key, what is wrong with it, and what to do."""
    path = tmp_path / "broken.gguf"
    for key, value, words in HARM:
        values = without(student, key)
        export_with(values if value is None else values | {key: value}, student, path)
        said = refuses("judge", path, "Hello")
        assert f"{path} has broken heads: {words}" in said, said
        assert "export the student again" in said, said


def test_bad_input_is_refused(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with the command, the prompt or a file is named."""
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_text('{"prompt": "x"}\n')
    Path("bad.jsonl").write_text('{"prompt": "x"}\n{oops}\n')
    Path("long.jsonl").write_text(json.dumps({"prompt": "words and " * 400}))
    cases: list[tuple[list[object], list[str]]] = [
        ([file, "Hello", "--prompts", "good.jsonl"], ["give one prompt to judge, or --prompts"]),
        ([file, ""], ["the prompt is empty"]),
        ([file, " \n"], ["the prompt is empty"]),
        ([file, "words and " * 400], ["prompt 'words and", "tokens", "is 256", "shorten it"]),
        ([file, "--prompts", "long.jsonl"], ["prompt 'words and", "context is 256"]),
        ([file, "--prompts", "none.jsonl"], ["none.jsonl cannot be read"]),
        ([file, "--prompts", "bad.jsonl"], ["bad.jsonl, line 2 is not JSON"]),
        ([".", "Hello"], [". is a directory"]),
    ]
    for arguments, words in cases:
        said = refuses("judge", *arguments)
        assert all(word in said for word in words), (arguments, said)
    ended = command("judge", file, "Hello", "more")
    assert ended.code == 2 and "more" in ended.complaint and not ended.out


def test_bad_label_files_are_refused(
    tiny_teacher_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`distill run --safety-labels FILE` refuses what the head cannot learn from."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{name} {n}", "label": name} for n in range(6) for name in DECISIONS]
    few = [row for row in rows if row["label"] != "REFUSE"]
    files = {
        "few": [*few, {"prompt": "r", "label": "REFUSE"}],
        "long": [*rows, {"prompt": "words and " * 400, "label": "ALLOW"}],
        "odd": [{"prompt": "x", "label": "NO"}],
    }
    for name, entries in files.items():
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, entries)))
    options = ["--samples", "4", "--student-size", "32x1", "--safety-labels"]
    for arguments, words in (
        (["few.jsonl"], ["few.jsonl", "no REFUSE", "at least five scenarios"]),
        (["odd.jsonl"], ["odd.jsonl, line 1", "'NO'", "ALLOW, ESCALATE, REFUSE"]),
        (["long.jsonl"], ["prompt 'words and", "context is 256"]),
        (["builtin", "--set=safety.prompts=few.jsonl"], ["safety.prompts", "safety.labels"]),
        (["builtin", "--set=safety.passes=0"], ["safety.passes"]),
        (["builtin", "--set=loss.lambda_safety=-1"], ["loss.lambda_safety"]),
    ):
        said = command("run", "--teacher", tiny_teacher_path, *options, *arguments).complaint
        assert said.count("\n") == 1 and all(word in said for word in words), (arguments, said)


def test_random_bytes_of_a_student_never_give_a_traceback(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped byte among the head's keys: refused in one line, or still a judgment."""
    whole = file.read_bytes()
    begin = whole.index(b"so8t.safety.labels")
    end = whole.index(b"so8t.verification.trust") + 60
    random = np.random.default_rng(0)
    keys = [place for place in range(begin, end) if whole[place : place + 5] == b"so8t."]
    assert len(keys) == 12

    def load(path: Path) -> None:
        raise UserError("loaded")

    monkeypatch.setattr("distill.inference.judge.GGUFTeacher", load)
    for place in [key + int(random.integers(0, 60)) for key in keys]:
        data = bytearray(whole)
        data[place] ^= 1 << int(random.integers(0, 8))
        (tmp_path / "odd.gguf").write_bytes(data)
        refuses("judge", tmp_path / "odd.gguf", "Hello")


def test_private_reasoning_in_a_prompt_is_not_printed(
    file: Path, opened: None, tmp_path: Path
) -> None:
    """Not as JSON, in a table or by an error; the prompt is judged whole, and so is its digest."""
    prompt = "Open\x1b[31m it <think note=1>secret</think>now\u202e"
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": prompt}), "utf-8")
    said = says("judge", file, "--prompts", path, "--json")
    found = json.loads(said)
    assert found["prompt"] == "Open\x1b[31m it now\u202e" and "secret" not in said
    assert "\x1b" not in said and "\u202e" not in said
    assert found["prompt_sha256"] == hashlib.sha256(prompt.encode()).hexdigest()
    with Judge(file) as judge:
        whole, shown = (judge.judge([text])[0] for text in (prompt, found["prompt"]))
    assert found["probabilities"] == pytest.approx(whole.probabilities)
    assert shown.probabilities != pytest.approx(whole.probabilities, abs=1e-4)
    table = says("judge", file, "--prompts", path)
    assert "Open␛[31m it now\\u202e" in table and "secret" not in table
    said = refuses("judge", file, "<think>secret</think>" + "words and " * 400)
    assert "prompt 'words and" in said and "secret" not in said


def test_a_judge_on_a_model_that_is_open_already(file: Path, kept: GGUFTeacher) -> None:
    """Its heads, its judgments, and it stays open."""
    with Judge(file, kept) as one, Judge(file) as other:
        found, expected = (judge.judge(["Hello"])[0].probabilities for judge in (one, other))
    assert found == pytest.approx(expected, abs=1e-5)
    assert kept.tokenize(["still there"], add_special=False, parse_special=False)
