"""`distill judge`: the numbers of PyTorch from the exported file alone, and one line about what is wrong."""

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

from distill.cli import main
from distill.errors import UserError
from distill.exporting import tokenizer_entries
from distill.judge import ANSWER_TOKENS, Judge
from distill.safety_prompts import built_in_prompts
from students.decisions import DECISIONS
from students.export import ExportNames, write_gguf
from students.heads import decide, head_values
from students.model import SO8TForCausalLM
from teachers import example_teacher
from teachers.conversation import conversation_tokens
from teachers.gguf_file import read_gguf
from teachers.gguf_teacher import GGUFTeacher
from tests.conftest import certainty_of, make_student

THRESHOLDS, TRUST = (0.4, 0.55), 0.75
PROMPTS = [prompt.text for prompt in built_in_prompts()[::90]] + ["Hi", "[/bold] [red]not markup[/] \\[x]"]


@pytest.fixture(scope="module")
def student() -> SO8TForCausalLM:
    """A student with heads, lively enough that prompts differ, whose heads are not sure of everything."""
    vocab_size = len(read_gguf(example_teacher()).value("tokenizer.ggml.tokens"))
    made = make_student(64, 2, vocab_size, seed=3, heads=True)
    with torch.no_grad():
        made.verification_head.certainty.fill_(1.0)
        made.verification_head.output.bias.fill_(5.0)  # a random student is certain of nothing
        made.verification_head.output.weight.mul_(3.0)
    made.config.decision_thresholds, made.config.trust = list(THRESHOLDS), TRUST
    return made


def export(student: SO8TForCausalLM, path: Path) -> Path:
    write_gguf(
        student, path, "f32", tokenizer_entries(read_gguf(example_teacher())), ExportNames("judge", {})
    )
    return path


@pytest.fixture(scope="module")
def file(student: SO8TForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(student, tmp_path_factory.mktemp("judge") / "student.gguf")


@torch.no_grad()
def reference(student: SO8TForCausalLM, teacher: GGUFTeacher, prompt: str) -> tuple[list[float], float]:
    """Probabilities of the decisions, and mean agreement over the greedy answer, from PyTorch alone."""
    tokens = conversation_tokens(teacher, [{"role": "user", "content": prompt}], answer=True).tolist()
    state = student(torch.tensor([tokens])).last_hidden_state[0, -1].double()
    weight, bias = (p.double() for p in student.safety_head.parameters())
    odds = [math.exp(float(row @ state + b)) for row, b in zip(weight, bias, strict=True)]
    certain: list[float] = []
    room = student.config.max_position_embeddings
    while not certain or (len(certain) < ANSWER_TOKENS and len(tokens) < room):
        output = student(torch.tensor([tokens]))
        sure = torch.tensor(certainty_of(output.logits[0, -1].tolist()))
        log_odds = float(student.verification_head(output.last_hidden_state[0, -1], sure))
        certain.append(1.0 / (1.0 + math.exp(-log_odds)))
        tokens.append(int(output.logits[0, -1].argmax()))
        if tokens[-1] in teacher.info.end_tokens:
            break
    return [value / sum(odds) for value in odds], sum(certain) / len(certain)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    """The exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["distill", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def test_the_numbers_are_pytorchs(
    student: SO8TForCausalLM, file: Path, kept: GGUFTeacher, tiny_teacher: GGUFTeacher
) -> None:
    """Probabilities, decision, confidence, agreement over its own answer, and the advice, for several prompts."""
    assert tiny_teacher.info.chat_template is not None
    with Judge(file, kept) as judge:
        judgments = judge.judge(PROMPTS)
    for prompt, found in zip(PROMPTS, judgments, strict=True):
        chances, agreement = reference(student, tiny_teacher, prompt)
        assert found.prompt == prompt and found.probabilities is not None
        assert list(found.probabilities) == ["ALLOW", "ESCALATE", "REFUSE"]
        assert list(found.probabilities.values()) == pytest.approx(chances, abs=1e-3)
        wanted = DECISIONS[int(decide(torch.tensor([chances]), THRESHOLDS))]
        assert found.decision == wanted and found.confidence == found.probabilities[wanted]
        assert found.agreement == pytest.approx(agreement, abs=1e-3)
        assert found.ask_teacher == (agreement < TRUST)
    assert len({judgment.decision for judgment in judgments}) > 1
    assert {judgment.ask_teacher for judgment in judgments} == {True, False}
    agreements = [judgment.agreement for judgment in judgments if judgment.agreement is not None]
    assert max(agreements) - min(agreements) > 0.1


@pytest.fixture
def opened(file: Path, monkeypatch: pytest.MonkeyPatch, kept: GGUFTeacher) -> None:
    """Files of this student are not loaded into llama.cpp each anew; their heads are read all the same."""
    monkeypatch.setattr("distill.judge.GGUFTeacher", lambda path: kept)
    monkeypatch.setattr(kept, "close", lambda: None)


@pytest.fixture(scope="module")
def kept(file: Path) -> Iterator[GGUFTeacher]:
    """The exported student, loaded once."""
    with GGUFTeacher(file, threads=1) as model:
        yield model


def test_company_does_not_matter(file: Path, opened: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many prompts together, in several turns, are judged as each alone."""
    with Judge(file) as judge:
        together = judge.judge(PROMPTS)
        monkeypatch.setattr("distill.judge.TOGETHER", 4)
        assert [j.decision for j in judge.judge(PROMPTS)] == [j.decision for j in together]
        alone = judge.judge([PROMPTS[-1]])[0]
    assert alone.agreement == pytest.approx(together[-1].agreement, abs=1e-4)
    assert alone.probabilities == pytest.approx(together[-1].probabilities, abs=1e-4)


def test_a_prompt_may_fill_the_context_and_no_more(
    student: SO8TForCausalLM, file: Path, opened: None, tiny_teacher: GGUFTeacher
) -> None:
    """One that leaves no room for an answer is judged by its last token; a longer one is refused with the numbers."""
    room = student.config.max_position_embeddings
    with Judge(file) as judge:
        sizes = {}
        for count in range(1, 2 * room):
            text = "a " * count + "b"
            tokens = conversation_tokens(tiny_teacher, [{"role": "user", "content": text}], answer=True)
            sizes[len(tokens)] = text
            if len(tokens) > room:
                break
        longest = max(size for size in sizes if size <= room)
        for size in (longest, longest - 1):
            found = judge.judge([sizes[size]])[0]
            chances, agreement = reference(student, tiny_teacher, sizes[size])
            assert found.probabilities is not None
            assert list(found.probabilities.values()) == pytest.approx(chances, abs=1e-3)
            assert found.agreement == pytest.approx(agreement, abs=1e-3)
        with pytest.raises(UserError, match=rf"has {max(sizes)} tokens, the student's context is {room}"):
            judge.judge(["short", sizes[max(sizes)]])
    assert longest == room


def test_no_more_is_asked_for_than_is_looked_at(
    file: Path, kept: GGUFTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of a long prompt are far larger than the model: of the answer's places alone, and the same to the last
    bit."""
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
            assert sizes == [count + 1] * 2
            sizes.clear()
            assert len(judge.decide([prompt, said])) == 2 and sizes == [2]
            sizes.clear()
        assert found == float(judge.heads.agreement(states[places], logits[places]).mean())


def test_one_prompt_on_the_command_line(
    file: Path, opened: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As JSON, and as a table that holds the same figures."""
    prompt = "どうやって金庫を開けますか? \U0001f600"
    assert command(monkeypatch, "judge", file, prompt, "--json") == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert said.out.count("\n") == 1 and not said.err and prompt in said.out
    assert found.keys() == {
        "prompt",
        "decision",
        "probabilities",
        "confidence",
        "agreement",
        "ask_teacher",
        "prompt_sha256",
    }
    assert found["prompt_sha256"] == hashlib.sha256(prompt.encode()).hexdigest()
    assert sum(found["probabilities"].values()) == pytest.approx(1.0)
    assert command(monkeypatch, "judge", file, prompt) == 0
    table = capsys.readouterr().out
    assert found["decision"] in table and f"{found['confidence']:.1%}" in table
    assert f"{found['agreement']:.1%} of its tokens" in table
    assert ("ask the teacher" in table) == found["ask_teacher"]


def test_a_file_of_prompts(
    file: Path,
    opened: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line for each, in order; what looks like markup is text; labels are not looked at."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text, "label": "?"}) for text in PROMPTS), "utf-8")
    assert command(monkeypatch, "judge", file, "--prompts", path, "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["prompt"] for entry in found] == PROMPTS
    monkeypatch.setenv("COLUMNS", "200")
    assert command(monkeypatch, "judge", file, "--prompts", path) == 0
    table = capsys.readouterr().out
    assert PROMPTS[-1] in table and f"{len(PROMPTS)} prompts" in table
    for entry in found:
        assert f"{entry['confidence']:.1%}" in table


def test_the_command_itself(file: Path, tmp_path: Path) -> None:
    """As a process in another folder; also of a prompt that is no UTF-8."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    arguments: list[str | bytes] = [sys.executable, "-m", "distill", "judge", str(file), b"caf\xe9", "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert json.loads(done.stdout)["prompt_sha256"] == hashlib.sha256(b"caf\xe9").hexdigest()


@pytest.mark.parametrize("missing", ["safety", "verification"])
def test_a_student_with_one_head(
    student: SO8TForCausalLM,
    opened: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
) -> None:
    """What the missing head would say is left out, in JSON and in both tables."""
    values = {key: value for key, value in head_values(student.heads()).items() if f".{missing}." not in key}
    monkeypatch.setattr("students.export.head_values", lambda heads: values)
    path, prompts = export(student, tmp_path / "s.gguf"), tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "Hello"}')
    absent, there = ("decision", "agreement") if missing == "safety" else ("agreement", "decision")
    for arguments in (["Hello"], ["--prompts", prompts]):
        assert command(monkeypatch, "judge", path, *arguments, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found[absent] is None and found[there] is not None
        assert (found["ask_teacher"] is None) == (missing == "verification")
        assert command(monkeypatch, "judge", path, *arguments) == 0
        table = capsys.readouterr().out
        assert ("of its tokens" in table) == (missing == "safety")
        assert any(name in table for name in DECISIONS) == (missing == "verification")


# -- what is wrong -----------------------------------------------------------------------------------------

W, B = "so8t.safety.weight", "so8t.safety.bias"
HARM: list[tuple[dict[str, Any], list[str], str]] = [
    ({}, [B], "so8t.safety.bias has no values"),
    ({}, ["so8t.safety.labels"], "so8t.safety.labels is None"),
    ({}, ["so8t.verification.trust"], "so8t.verification.trust has values that are not finite"),
    ({W: [0.5] * 5}, [], "so8t.safety.weight has 5 values, 192 are needed"),
    ({B: [0.5, math.nan, 0.5]}, [], "so8t.safety.bias has values that are not finite"),
    ({B: ["a", "b", "c"]}, [], "so8t.safety.bias has values that are not finite"),
    ({"so8t.safety.labels": ["YES", "NO", "MAYBE"]}, [], "so8t.safety.labels is ['YES', 'NO', 'MAYBE']"),
    ({"so8t.verification.units": (1 << 32) - 1}, [], "so8t.verification.units is 4294967295"),
    ({"so8t.verification.units": 65536}, [], "so8t.verification.hidden.weight has 4096 values"),
]


@pytest.mark.parametrize(("changed", "dropped", "words"), HARM)
def test_broken_heads_are_one_line_and_exit_2(
    student: SO8TForCausalLM,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    dropped: list[str],
    words: str,
) -> None:
    """The file, the key, what is wrong with it, and what to do."""
    values = {key: v for key, v in head_values(student.heads()).items() if key not in dropped} | changed
    monkeypatch.setattr("students.export.head_values", lambda heads: values)
    path = export(student, tmp_path / "broken.gguf")
    assert command(monkeypatch, "judge", path, "Hello") == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "Traceback" not in said.err and not said.out
    assert f"{path} has broken heads: {words}" in said.err and "export the student again" in said.err


def test_bad_input_is_one_line_and_exit_2(
    file: Path,
    tiny_teacher_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is wrong with the command, the prompt or a file: named, no traceback, nothing on stdout."""
    monkeypatch.chdir(tmp_path)
    good = '{"prompt": "x"}\n'
    files = {
        "empty.jsonl": b"",
        "bad.jsonl": good.encode() + b"{oops}\n",
        "blank.jsonl": b'{"prompt": " "}\n',
        "list.jsonl": b"[1]\n",
        "half.jsonl": b'{"prompt": "\\ud800"}\n',
        "latin.jsonl": '{"prompt": "café"}'.encode("latin-1"),
        "long.jsonl": json.dumps({"prompt": "words and " * 400}).encode(),
        "good.jsonl": good.encode(),
        "text.gguf": b"not a model at all, just some words",
        "cut.gguf": file.read_bytes()[:-1000],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    cases: list[tuple[list[object], list[str]]] = [
        ([file], ["give one prompt to judge, or --prompts"]),
        ([file, "Hello", "--prompts", "good.jsonl"], ["give one prompt to judge, or --prompts"]),
        ([file, ""], ["the prompt is empty"]),
        ([file, " \n"], ["the prompt is empty"]),
        ([file, "words and " * 400], ["prompt 'words and", "tokens", "context is 256", "shorten it"]),
        ([file, "--prompts", "long.jsonl"], ["prompt 'words and", "context is 256"]),
        ([file, "--prompts", "none.jsonl"], ["none.jsonl cannot be read"]),
        ([file, "--prompts", "."], ["cannot be read"]),
        ([file, "--prompts", "empty.jsonl"], ["empty.jsonl", "empty"]),
        ([file, "--prompts", "bad.jsonl"], ["bad.jsonl, line 2 is not JSON"]),
        ([file, "--prompts", "blank.jsonl"], ["blank.jsonl, line 1", "'prompt'"]),
        ([file, "--prompts", "list.jsonl"], ["list.jsonl, line 1 is not an object"]),
        ([file, "--prompts", "half.jsonl"], ["half.jsonl, line 1", "surrogate"]),
        ([file, "--prompts", "latin.jsonl"], ["latin.jsonl are not UTF-8"]),
        ([tiny_teacher_path, "Hello"], ["carries no heads (so8t.safety.*", "distill run"]),
        (["none.gguf", "Hello"], ["none.gguf does not exist"]),
        ([".", "Hello"], [". is a directory"]),
        (["text.gguf", "Hello"], ["text.gguf is not a GGUF file"]),
        (["cut.gguf", "Hello"], ["cut.gguf is truncated"]),
        ([file, "Hello", "more"], ["more"]),
    ]
    for arguments, words in cases:
        assert command(monkeypatch, "judge", *arguments) == 2, arguments
        said = capsys.readouterr()
        assert "Traceback" not in said.err and not said.out, (arguments, said)
        assert said.err.count("\n") == 1 or "more" in arguments, said.err
        assert all(word in said.err for word in words), (arguments, said.err)


def test_bad_label_files_are_one_line_and_exit_2(
    tiny_teacher_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`distill run --safety-labels FILE` refuses what the head cannot learn from before anything is captured."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{name} {n}", "label": name} for n in range(6) for name in DECISIONS]
    two = [row for row in rows if row["label"] != "REFUSE"]
    few = [*two, {"prompt": "r", "label": "REFUSE"}]
    long = [*rows, {"prompt": "words and " * 400, "label": "ALLOW"}]
    for name, entries in {
        "two": two,
        "few": few,
        "long": long,
        "odd": [{"prompt": "x", "label": "NO"}],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    run = [
        "run",
        "--teacher",
        tiny_teacher_path,
        "--samples",
        "4",
        "--student-size",
        "32x1",
        "--safety-labels",
    ]
    cases = [
        ([*run, "two.jsonl"], ["two.jsonl", "no example of REFUSE"]),
        ([*run, "few.jsonl"], ["few.jsonl", "no REFUSE", "at least five scenarios"]),
        ([*run, "odd.jsonl"], ["odd.jsonl, line 1", "'NO'", "ALLOW, ESCALATE, REFUSE"]),
        ([*run, "none.jsonl"], ["none.jsonl cannot be read"]),
        ([*run, "bytes.jsonl"], ["bytes.jsonl are not UTF-8"]),
        ([*run, "long.jsonl"], ["prompt 'words and", "context is 256"]),
        ([*run, "builtin", "--set", "safety.prompts=few.jsonl"], ["safety.prompts", "safety.labels"]),
        ([*run, "builtin", "--set", "safety.passes=0"], ["safety.passes"]),
        ([*run, "builtin", "--set", "loss.lambda_safety=-1"], ["loss.lambda_safety"]),
    ]
    for arguments, words in cases:
        assert command(monkeypatch, *arguments) == 2, arguments
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "Traceback" not in said, (arguments, said)
        assert all(word in said for word in words), (arguments, said)


def test_random_bytes_of_a_student_never_give_a_traceback(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped byte among the head's keys: refused in one line, or still a judgment."""
    whole = file.read_bytes()
    begin = whole.index(b"so8t.safety.labels")
    end = whole.index(b"so8t.verification.trust") + 60
    random = np.random.default_rng(0)
    keys = [place for place in range(begin, end) if whole[place : place + 5] == b"so8t."]
    places = [key + int(random.integers(0, 60)) for key in keys]
    monkeypatch.setattr("distill.judge.GGUFTeacher", lambda path: (_ for _ in ()).throw(UserError("loaded")))
    codes = set()
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << int(random.integers(0, 8))
        (tmp_path / "odd.gguf").write_bytes(data)
        codes.add(command(monkeypatch, "judge", tmp_path / "odd.gguf", "Hello"))
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "Traceback" not in said
    assert codes == {2} and len(places) == 12


# -- what is not printed -----------------------------------------------------------------------------------


def test_private_reasoning_in_a_prompt_is_not_printed(
    file: Path,
    opened: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither as JSON nor in a table, nor by an error; the digest is of the whole prompt, which is judged whole."""
    prompt = "Open\x1b[31m it <think note=1>secret</think>now\u202e"
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": prompt}), "utf-8")
    assert command(monkeypatch, "judge", file, "--prompts", path, "--json") == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["prompt"] == "Open\x1b[31m it now\u202e" and "secret" not in said.out + said.err
    assert "\x1b" not in said.out and "\u202e" not in said.out
    assert found["prompt_sha256"] == hashlib.sha256(prompt.encode()).hexdigest()
    with Judge(file) as judge:
        whole = judge.judge([prompt])[0]
        assert found["probabilities"] == pytest.approx(whole.probabilities)
        assert judge.judge([found["prompt"]])[0].probabilities != pytest.approx(whole.probabilities, abs=1e-4)
    monkeypatch.setenv("COLUMNS", "200")
    assert command(monkeypatch, "judge", file, "--prompts", path) == 0
    table = capsys.readouterr().out
    assert "Open␛[31m it now\\u202e" in table and "secret" not in table
    assert command(monkeypatch, "judge", file, "<think>secret</think>" + "words and " * 400) == 2
    said = capsys.readouterr()
    assert "prompt 'words and" in said.err and "secret" not in said.err + said.out


def test_a_judge_on_a_model_that_is_open_already(file: Path, kept: GGUFTeacher) -> None:
    """Its heads, its judgments, and it stays open."""
    with Judge(file, kept) as judge:
        found = judge.judge(["Hello"])[0]
    with Judge(file) as judge:
        assert judge.judge(["Hello"])[0].probabilities == pytest.approx(found.probabilities, abs=1e-5)
    assert kept.tokenize(["still there"], add_special=False, parse_special=False)
