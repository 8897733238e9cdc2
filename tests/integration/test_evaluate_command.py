"""`distill evaluate` on tiny models: its scores, which text it takes, and what it refuses.

Over 400 lines because one comparison of the same few files serves all of the tests.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.capture.corpus import build_corpus
from distill.capture.temporary_files.tokenizer_only import tokenizer_entries
from distill.config.loading import load_config
from distill.errors import UserError
from distill.evaluation import cost, greedy, lm_eval_adapter
from distill.evaluation.candidates import Candidate, Candidates, find_candidates
from distill.evaluation.compare import evaluate_files
from distill.evaluation.greedy import NEW_TOKENS, greedy_prompts, greedy_scores
from distill.evaluation.inputs.files import find_files, unique_names
from distill.evaluation.inputs.request import Request, TextRequest
from distill.evaluation.records import Comparison
from distill.evaluation.safety import choose_prompts
from distill.evaluation.text import Text, choose_text
from distill.heads.gguf_heads import chances_of
from distill.heads.prompts import built_in_prompts, digest, split_by_scenario
from distill.reports.comparison.report import document_of
from distill.reports.render.terminal import print_report
from distill.runs.folder import HeldOut, RunFolder
from distill.runtime.format import number
from distill.runtime.progress import Console
from students.gguf.metadata import ExportNames
from students.gguf.writer import write_gguf
from students.model.decoder import SO8TForCausalLM
from students.model.head_decisions import COSTS, DECISIONS
from teachers import example_teacher
from teachers.base import TokenizedLines, Tokens
from teachers.gguf.file import file_sha256, read_gguf
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.tokenizer.conversation import request_tokens
from tests.conftest import command, refuses
from tests.support.students import make_student
from tests.support.teachers import shared_file

pytestmark = [pytest.mark.needs_gguf, pytest.mark.usefixtures("llama_here")]

FEW_TOKENS = 8  # written where how many does not matter

# llama.cpp by its package's high-level interface, which shares no code with ours: it writes logits.
ASK_LLAMA = """
import sys, json, numpy as np
import llama_cpp.llama_cpp as native
from llama_cpp import Llama
defaults = native.llama_model_default_params
def plain():
    # Kernels that are right on every machine; a build of llama.cpp may crash with its others (AMX).
    parameters = defaults()
    parameters.use_extra_bufts = False
    return parameters
native.llama_model_default_params = plain
path, sequences, output = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = Llama(path, n_ctx=256, n_batch=256, n_threads=1, logits_all=True, type_k=0, type_v=0,
              flash_attn=False, verbose=False)
found = {}
for number, tokens in enumerate(sequences):
    model.reset()
    model.eval(tokens)
    found[str(number)] = np.array(model.scores[: len(tokens) - 1])
np.savez(output, **found)
"""


def vocab_size() -> int:
    return len(read_gguf(example_teacher()).value("tokenizer.ggml.tokens"))


def write(student: SO8TForCausalLM, path: Path, **origin: str) -> Path:
    tokenizer = tokenizer_entries(read_gguf(example_teacher()))
    write_gguf(student, path, "f32", tokenizer, ExportNames(path.stem, origin))
    return path


def some_sequences(count: int = 5) -> list[Tokens]:
    draw = np.random.default_rng(0)
    return [draw.integers(3, vocab_size(), 7 + 5 * n).astype(np.int32) for n in range(count)]


def make_run(path: Path, student: Path, sequences: list[Tokens], **settings: str) -> RunFolder:
    """A finished run's folder, as far as an evaluation looks at it."""
    run = RunFolder(path)
    path.mkdir()
    config = load_config(None, dict(settings), [])
    teacher = {"teacher_name": "example", "teacher_sha256": file_sha256(example_teacher())}
    run.claim(config, {**teacher, "safety_prompts": digest(built_in_prompts())})
    run.write_held_out(HeldOut(sequences, TokenizedLines([], [])))
    shutil.copy(student, run.gguf)
    return run


@dataclass(frozen=True)
class Files:
    """A student of the example teacher in a run's folder, and a copy of the teacher's file."""

    run: RunFolder
    copy: Path
    student: SO8TForCausalLM


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    base = tmp_path_factory.mktemp("evaluate")
    student = make_student(32, 2, vocab_size(), seed=4, heads=True)
    made = write(student, base / "made.gguf", teacher_sha256=file_sha256(example_teacher()))
    run = make_run(base / "run", made, some_sequences())
    copy = base / "copy.gguf"
    shutil.copy(example_teacher(), copy)
    return Files(run, copy, student)


def hasten(patch: pytest.MonkeyPatch) -> None:
    """Let models write little."""
    patch.setattr(greedy, "NEW_TOKENS", FEW_TOKENS)
    patch.setattr(cost, "SPEED_NEW_TOKENS", FEW_TOKENS)
    patch.setattr(cost, "SPEED_PROMPT_TOKENS", 16)


@pytest.fixture(scope="module")
def comparison(files: Files) -> Comparison:
    """The run's student and the teacher's copy against the teacher, on what the run held out."""
    request = Request([files.run.path, files.copy], example_teacher())
    with pytest.MonkeyPatch.context() as patch:
        hasten(patch)
        return evaluate_files(request, Console(stderr=True))


# --- the figures


def asked(path: Path, sequences: list[Tokens], folder: Path) -> np.ndarray[Any, Any]:
    """Every logit of all positions by llama_cpp itself, in a process of its own, as float64."""
    output = folder / f"{path.stem}.npz"
    rows = json.dumps([tokens.tolist() for tokens in sequences])
    subprocess.run(
        [sys.executable, "-c", ASK_LLAMA, str(path), rows, str(output)],
        check=True,
        capture_output=True,
    )
    with np.load(output) as found:
        return np.concatenate([found[str(n)] for n in range(len(sequences))]).astype(np.float64)


def test_figures_are_those_of_an_independent_computation(
    files: Files, comparison: Comparison, tmp_path: Path
) -> None:
    """KL, perplexity and the others to 1e-4: from the definitions in float64 and others' logits."""
    sequences = some_sequences()
    rows = [asked(path, sequences, tmp_path) for path in (example_teacher(), files.run.gguf)]
    weights = [np.exp(logits - logits.max(axis=1, keepdims=True)) for logits in rows]
    p, q = (one / one.sum(axis=1, keepdims=True) for one in weights)
    labels = np.concatenate([tokens[1:] for tokens in sequences])
    student = comparison.students[0]
    found = student.fidelity
    assert found is not None
    assert (comparison.positions, comparison.sequences) == (len(labels), len(sequences))
    five = [np.argsort(-one)[:, :5] for one in (p, q)]
    shared = [len({*mine} & {*its}) / 5 for mine, its in zip(*five, strict=True)]
    wanted = {
        "kl": (p * np.log(p / q)).sum(axis=1).mean(),
        "reverse_kl": (q * np.log(q / p)).sum(axis=1).mean(),
        "acceptance": np.minimum(p, q).sum(axis=1).mean(),
        "top1": (p.argmax(axis=1) == q.argmax(axis=1)).mean(),
        "top5": np.mean(shared),
    }
    for name, value in wanted.items():
        assert getattr(found, name).value == pytest.approx(float(value), rel=1e-4, abs=1e-4), name
    assert wanted["kl"] > 1.0  # two models that have little to do with each other
    for model, shares in ((comparison.teacher, p), (student, q)):
        perplexity = np.exp(-np.log(shares[np.arange(len(labels)), labels]).mean())
        assert model.perplexity.value == pytest.approx(float(perplexity), rel=1e-4)
    a = float(wanted["acceptance"])
    assert found.tokens_per_pass == pytest.approx((1 - a**5) / (1 - a), rel=1e-4)
    assert found.draft_length == 4


def test_a_copy_of_the_teacher_is_the_teacher(comparison: Comparison) -> None:
    """KL 0, agreement and acceptance 1, exactly, and all it writes is alike."""
    copy = comparison.students[1]
    teacher, found = comparison.teacher, copy.fidelity
    assert (copy.sha256, copy.perplexity) == (teacher.sha256, teacher.perplexity)
    assert found is not None and found.greedy_prefix is not None and found.greedy_same is not None
    assert (found.kl.value, found.reverse_kl.value) == (0.0, 0.0)
    assert (found.top1.value, found.top5.value, found.acceptance.value) == (1.0, 1.0, 1.0)
    assert (found.kl.low, found.kl.high, found.top1.low) == (0.0, 0.0, 1.0)
    assert found.tokens_per_pass == 5.0 and found.greedy_same.value == 1.0
    assert 1.0 <= found.greedy_prefix.value <= found.prefix_length == FEW_TOKENS


def test_facts_of_the_files(files: Files, comparison: Comparison) -> None:
    """Names, sizes, types, speeds; the teacher has no fidelity."""
    teacher, (student, copy) = comparison.teacher, comparison.students
    names = [model.name for model in (teacher, student, copy)]
    assert names == ["teacher.gguf", "student.gguf", "copy.gguf"]
    assert (teacher.architecture, teacher.file_type, student.file_type) == ("phi3", "Q8_0", "F32")
    assert student.file_bytes == files.run.gguf.stat().st_size and teacher.fidelity is None
    for model in (teacher, student, copy):
        assert model.prompt_speed > 0 and model.generation_speed > 0, model.name
        assert model.peak_memory > model.file_bytes, model.name
    assert comparison.skipped == 0 and len(comparison.text_sha256) == 64
    assert "validation sequences of" in comparison.text
    assert "whether copy.gguf was trained on them is not known" in comparison.text


# --- greedy continuations


def test_greedy_prefixes_against_a_loop(
    example_gguf: GGUFTeacher, tiny_teacher: GGUFTeacher
) -> None:
    """One token at a time from all logits; turns that end are not written beyond."""
    texts = ["Please order 4 boxes of", "Good morning, what"]
    prompts = example_gguf.tokenize(texts, add_special=True, parse_special=True)
    sequences = [np.concatenate((prompt, prompt)).astype(np.int32) for prompt in prompts]
    start = greedy_prompts(sequences, 512)
    assert start is not None and [len(p) for p in start.prompts] == [len(p) for p in prompts]

    def continued(model: GGUFTeacher, prompt: Tokens) -> list[int]:
        tokens = prompt.tolist()
        while len(tokens) < len(prompt) + NEW_TOKENS:
            longer = np.array([*tokens, 0], dtype=np.int32)
            tokens.append(int(model.logits([longer])[-1].argmax()))
            if tokens[-1] in model.info.end_tokens:
                break
        return tokens[len(prompt) :]

    def shared(one: list[int], other: list[int]) -> int:
        """How many first tokens are alike."""
        pairs = zip(one, other, strict=False)
        return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

    students = {"tiny": tiny_teacher, "itself": example_gguf}
    done: list[int] = []
    scores = greedy_scores(example_gguf, students, start, done.append)
    assert max(done) == 6 and done == sorted(done)
    own, others = (
        [continued(model, prompt) for prompt in prompts] for model in (example_gguf, tiny_teacher)
    )
    for name, texts in (("itself", own), ("tiny", others)):
        alike = [shared(*pair) for pair in zip(own, texts, strict=True)]
        assert scores[name].prefix.value == sum(alike) / 2, name
    assert (scores["itself"].same.value, scores["tiny"].same.value) == (1.0, 0.0)


# --- which text


def chosen(*students: Path) -> Candidates:
    return find_candidates(find_files(students, example_teacher()))


def narrow_run(path: Path, context: int, sequences: list[Tokens]) -> RunFolder:
    """A run whose student has a context of this length."""
    student = make_student(32, 1, vocab_size())
    student.config.max_position_embeddings = context
    return make_run(path, write(student, path.with_suffix(".gguf")), sequences)


def test_held_out_sequences_are_cut_or_left_out(
    files: Files, example_gguf: GGUFTeacher, tmp_path: Path
) -> None:
    """Cut at a length that is asked for; without one, those that no context holds are left out."""

    def lengths(text: Text) -> list[int]:
        return [len(row) for row in text.sequences(example_gguf, print)]

    sequences, own = some_sequences(), chosen(files.run.path)
    text = choose_text(TextRequest(max_length=10), own, example_gguf)
    cut = [row[:10].tolist() for row in sequences]
    assert [row.tolist() for row in text.sequences(example_gguf, print)] == cut
    assert "4 cut at 10 tokens" in text.description
    few = choose_text(TextRequest(samples=2), own, example_gguf)
    assert "2 of the 5" in few.description and len(few.items) == 2
    short = narrow_run(tmp_path / "short", 16, sequences).gguf
    text = choose_text(TextRequest(), chosen(short), example_gguf)
    assert lengths(text) == [7, 12] and text.skipped == 3
    long = chosen(make_run(tmp_path / "long", short, sequences[2:]).gguf)
    with pytest.raises(UserError, match=r"every validation sequence is longer .* --max-length 16"):
        choose_text(TextRequest(), long, example_gguf)
    text = choose_text(TextRequest(max_length=20), long, example_gguf)
    assert "16 tokens" in text.notes[0] and set(lengths(text)) == {16}
    whole = [np.full(600, 5, dtype=np.int32)]  # fits both contexts, but is more than is looked at
    wide = narrow_run(tmp_path / "wide", 1024, whole).gguf
    candidates = find_candidates(find_files([wide], wide.parent.with_suffix(".gguf")))
    text = choose_text(TextRequest(), candidates, example_gguf)
    assert len(text.items[0].segments[0]) == 512
    assert text.skipped == 0 and "1 cut at 512" in text.description


def test_runs_must_share_what_they_held_out(
    files: Files, example_gguf: GGUFTeacher, tmp_path: Path
) -> None:
    """Two runs with the same sequences use them; with others the teacher says something new."""
    run = files.run.path
    same = make_run(tmp_path / "same", files.run.gguf, some_sequences()).path
    other = make_run(tmp_path / "other", files.run.gguf, some_sequences(4)).path
    text = choose_text(TextRequest(), chosen(run, same), example_gguf)
    assert str(run) in text.description and str(same) in text.description and not text.warnings
    stranger = choose_text(TextRequest(), chosen(run, files.copy), example_gguf)
    assert "copy.gguf lies in no run's folder" in stranger.warnings[0]
    wanted = TextRequest(samples=4, max_length=24)
    spoken = choose_text(wanted, chosen(run, other), example_gguf)
    assert "teacher's own words" in spoken.description
    said = spoken.sequences(example_gguf, lambda done: None)
    assert len(said) == 4 and max(map(len, said)) <= 24
    config = load_config(None, {"data.samples": 4, "data.max_length": 24}, [])
    corpus = build_corpus(config.data, example_gguf, config.seed)
    of_a_run = corpus.take(example_gguf, 0, 4, lambda done: None)
    assert [row.tolist() for row in said] != [row.tolist() for row in of_a_run]


def test_data_that_a_run_was_trained_on(
    files: Files, example_gguf: GGUFTeacher, tmp_path: Path
) -> None:
    """It is warned of; other data is not suspected, and answers are the teacher's."""
    data, new = tmp_path / "data" / "mine.jsonl", tmp_path / "new.jsonl"
    data.parent.mkdir()
    lines = [{"prompt": f"Order {n} boxes."} for n in range(3)]
    for path in (data, new):
        path.write_text("\n".join(map(json.dumps, [*lines, {"text": "Boxes have been ordered."}])))
    run = make_run(tmp_path / "run", files.run.gguf, some_sequences(), **{"data.path": str(data)})
    for given in (data, data.parent):
        text = choose_text(TextRequest(data=given), chosen(run.path), example_gguf)
        assert "the run of student.gguf was given the same data" in text.description
        assert "is what the run of student.gguf was trained on" in text.warnings[0]
    splits = tmp_path / "splits"
    splits.mkdir()
    for split, count in (("train", 3), ("test", 2)):
        rows = [json.dumps({"body": f"Order {n} boxes."}) for n in range(count)]
        (splits / f"{split}-00000-of-00001.jsonl").write_text("\n".join(rows))
    own = make_run(tmp_path / "own", files.run.gguf, some_sequences(), **{"data.path": str(splits)})
    for chosen_split, count, words in (
        (None, 3, "was given the same data"),
        ("train", 3, "was given the same data"),
        ("test", 2, "whether the students were trained on it is not known"),
    ):
        wanted = TextRequest(splits, split=chosen_split, columns={"text": "body"})
        text = choose_text(wanted, chosen(own.path), example_gguf)
        assert len(text.items) == count and words in text.description, chosen_split
    text = choose_text(TextRequest(data=new), chosen(run.path), example_gguf)
    assert "3 of them with the teacher's answers" in text.description and not text.warnings
    assert "were given other data" in text.description
    prompt = text.items[0].segments[0]
    answered = text.sequences(example_gguf, lambda done: None)[0]
    assert len(answered) > len(prompt) and answered[: len(prompt)].tolist() == prompt.tolist()
    unknown = choose_text(TextRequest(data=new), chosen(files.copy), example_gguf)
    assert "whether the students were trained on it is not known" in unknown.description


# --- the safety head


def test_safety_counts_only_what_the_run_has_not_seen(
    files: Files, comparison: Comparison, tmp_path: Path
) -> None:
    """The run's own test part; of given prompts those of no scenario that it has used."""
    parts = split_by_scenario(built_in_prompts())
    found, copy = comparison.students[0].safety, comparison.students[1].safety
    assert copy is None and found is not None and found.prompts == len(parts["test"])
    with GGUFTeacher(files.run.gguf, threads=1) as model:
        tokens = request_tokens(model, [prompt.text for prompt in parts["test"]])
        shares = chances_of(model, files.student.heads(), tokens).numpy().astype(np.float64)
    taken = (shares @ np.array(COSTS)).argmin(axis=1)
    labels = np.array([prompt.decision for prompt in parts["test"]])
    assert found.accuracy == pytest.approx(float((taken == labels).mean()))
    assert [sum(row) for row in found.confusion] == [int((labels == n).sum()) for n in range(3)]

    student = chosen(files.run.path).students[0]
    new = [prompt for part in parts.values() for prompt in part[:4]]
    test = choose_prompts(student, new)
    assert test.prompts == parts["test"][:4] and "8 of 12 safety prompts do not count" in test.note
    # The same scenarios in other words, and the same prompts under other names.
    reworded = [replace(prompt, text=f"{prompt.text} Now.") for prompt in new]
    renamed = [replace(prompt, scenario=f"new {prompt.scenario}") for prompt in new]
    for changed in (reworded, renamed):
        assert choose_prompts(student, changed).prompts == changed[8:]
    seen = choose_prompts(student, parts["train"])
    assert not seen.prompts and "there are no safety figures" in seen.note
    outside = Candidate("student.gguf", student.file, None, student.heads)
    assert choose_prompts(outside, new).prompts == new
    assert choose_prompts(outside, None).prompts == parts["test"]
    other = make_run(tmp_path / "other", files.run.gguf, some_sequences())
    other.identity_file.write_text(json.dumps({"safety_prompts": "other"}))
    unknown = choose_prompts(Candidate("s", student.file, other, student.heads), None)
    assert not unknown.prompts and "have changed since" in unknown.note


# --- the command


def test_json_page_and_tasks(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One object on standard output, even if the harness prints; the page; the example teacher."""

    def run_harness(model: GGUFTeacher, tasks: list[str], limit: int) -> dict[str, Any]:
        print("the harness says hello")
        return {task: {"acc": 0.5, "acc_stderr": 0.01, "limit": float(limit)} for task in tasks}

    hasten(monkeypatch)
    monkeypatch.setattr("distill.evaluation.compare.UNSTEADY", 0.0)
    monkeypatch.setattr("distill.evaluation.inputs.check.require_harness", lambda: None)
    monkeypatch.setattr(lm_eval_adapter, "require_tasks", lambda tasks: None)
    monkeypatch.setattr(lm_eval_adapter, "run_harness", run_harness)
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "2 + 2 =", "answer": "4"}\n{"prompt": "1 + 1 =", "answer": "2"}\n')
    safety = tmp_path / "safety.jsonl"
    some = split_by_scenario(built_in_prompts())["test"][::7]
    lines = [{"prompt": prompt.text, "label": DECISIONS[prompt.decision]} for prompt in some]
    safety.write_text("\n".join(map(json.dumps, lines)))
    page = tmp_path / "page.html"
    given = ["--tasks", tasks, "--lm-eval", "one, two", "--lm-eval-limit", 3]
    given += ["--safety-prompts", safety, "--json", "--output", page, "--draft-length", 2]
    ended = command("evaluate", files.run.path, *given)
    out, err, found = ended.out, ended.complaint, json.loads(ended.out)
    assert ended.code == 0 and out.count("\n") == 1 and "hello" in err and "KL" in err
    assert "differed from trial to trial" in " ".join(err.split())
    assert found["kind"] == "evaluation" and found["teacher"]["path"] == str(example_teacher())
    student = found["students"][0]
    assert student["task"]["prompts"] == 2 and student["fidelity"]["draft_length"] == 2
    assert student["harness"]["two"] == {"acc": 0.5, "acc_stderr": 0.01, "limit": 3.0}
    assert student["safety"]["prompts"] == len(some)
    assert "float32 KV cache" in found["environment"]["arithmetic"]
    assert page.stat().st_size > 1000 and "<html" in page.read_text(encoding="utf-8")[:1000].lower()


def test_tables_side_by_side(comparison: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    """The teacher first, every student below it, and the numbers that were measured."""
    print_report(document_of(comparison), Console().rich)
    said = capsys.readouterr().out
    student = comparison.students[0]
    assert student.fidelity is not None and student.safety is not None
    flat = " ".join(said.split())
    kl, perplexity = number(student.fidelity.kl.value), number(student.perplexity.value)
    for text in ("(teacher)", kl, perplexity, "Safety decisions", "95 % interval", "copy"):
        assert text in flat, text


def test_what_is_refused(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded: one line that says what to do, and exit code 2.

    What is wrong with a file or an option by itself: ``test_preflight``.
    """
    monkeypatch.setattr("distill.evaluation.compare.GGUFTeacher", None)
    run, teacher = files.run.path, ("--teacher", example_teacher())
    other = write(make_student(32, 1, vocab_size()), tmp_path / "plain.gguf")
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, words in (
        ([run, files.run.gguf], "is given twice"),
        ([example_teacher(), *teacher], "is given twice"),
        ([other], "it names none); name its teacher with --teacher"),
        ([run, "--teacher", __file__], "is not a GGUF file"),
        ([run, "--output", tmp_path / "no" / "x.html"], "there is no folder"),
    ):
        ended = command("evaluate", *arguments)
        assert ended.code == 2 and not ended.out, (arguments, ended)
        assert words in " ".join(ended.complaint.split()), (arguments, ended)
    shutil.copy(files.run.config_file, empty / "config.json")
    shutil.copy(files.run.identity_file, empty / "identity.json")
    assert "has no student.gguf yet" in refuses("evaluate", empty)


def test_other_vocabularies_and_teachers(
    files: Files, tiny_teacher_path: Path, tmp_path: Path
) -> None:
    """Other tokens are refused; other settings of a tokenizer, or another teacher, are said."""
    stories = shared_file("teachers/stories260K.gguf")
    with pytest.raises(UserError, match=r"vocabulary .* 512 tokens against 1024, the first"):
        find_files([stories], example_teacher())
    found = find_files([files.run.path], tiny_teacher_path)
    assert len(found.warnings) == 1 and "was made of another teacher" in found.warnings[0]
    tokenizer = tokenizer_entries(read_gguf(example_teacher()))
    template = tokenizer["tokenizer.chat_template"]
    changed = tmp_path / "changed.gguf"
    tokenizer["tokenizer.chat_template"] = ("{{ messages }}", *template[1:])
    write_gguf(
        make_student(32, 1, vocab_size()), changed, "f32", tokenizer, ExportNames("changed", {})
    )
    said = find_files([changed], example_teacher()).warnings
    assert len(said) == 1 and "differs in tokenizer.chat_template" in said[0]


def test_names_are_told_apart(tmp_path: Path) -> None:
    """By as many folders as it takes."""
    names = ["a/run/student.gguf", "b/run/student.gguf", "x.gguf", "b/x.gguf"]
    paths = [tmp_path / name for name in names]
    assert unique_names(paths) == [*names[:2], f"{tmp_path.name}/x.gguf", names[3]]
    assert unique_names(paths[::2]) == ["student.gguf", "x.gguf"]
