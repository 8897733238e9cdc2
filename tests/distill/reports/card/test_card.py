"""The model card: true to the run's records, the same each time, whole, and working as it says.

Over 400 lines because every part of the card is checked on the same run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from distill.errors import UserError
from distill.reports.card.card import SEAL, build_card, is_ours, write_card
from distill.reports.render.markdown import escaped
from distill.runs.audit_log import HEAD, append
from distill.runs.audit_verify import verify
from distill.runs.folder import RunFolder
from teachers.gguf.file import TeacherFileError, file_sha256
from tests.support.report_runs import (
    change,
    event_line,
    finished_run,
    headings,
    lines_of_a_run,
    make_run,
    parsed,
    put,
    row,
    section,
    text_of,
    write_file,
)
from tests.support.tiny_models import make_base

RESULT = "Teacher, student and exported file"
HEADINGS = [
    *(
        "How close it is to its teacher",
        "How to run it",
        "What it was made of",
        RESULT,
        "Safety head",
        "Verification head",
    ),
    *("Files", "How training went", "Limits", "License", "Environment"),
]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return finished_run(tmp_path / "first")


def test_front_matter_is_what_the_hub_takes(run: RunFolder) -> None:
    """The Hub's own client reads it back with the scores; nothing is said that it would refuse."""
    put(run.results_file, "evaluation.exported.kl", 0.123456789)
    card = build_card(run)
    data, front = ModelCard(card).data, parsed(card)[0]
    assert data.to_dict() == front
    assert (data.license, data.library_name) == ("unknown", "gguf")
    assert data.pipeline_tag == "text-generation"
    assert {"distillation", "so8t", "gguf", "llama.cpp"} <= set(data.tags)
    scores = {one.metric_type: one.metric_value for one in data.eval_results}
    assert scores == {"kl_divergence": 0.123457, "accuracy": 0.4, "perplexity": 4.5}
    assert all(one.dataset_args == {"positions": 100} for one in data.eval_results)
    assert front.keys().isdisjoint({"base_model", "base_model_relation", "datasets", "language"})


def test_every_section_is_there_and_the_code_fences_close(run: RunFolder) -> None:
    card = build_card(run)
    assert headings(card) == HEADINGS
    assert card.count("```") % 2 == 0 and not re.search(r"\n{4,}", card)
    assert "{{" not in card and "None" not in card


def test_figures_are_those_of_the_records(run: RunFolder) -> None:
    """Each figure is not there before its record says so."""
    llama = {"extra_buffers": False, "reason": "died (signal SIGILL)"}
    rows: list[tuple[str, Any, str]] = [
        ("evaluation.exported.kl", 0.7654, "0.765"),
        ("evaluation.exported.agreement", 0.8765, "87.6%"),
        ("evaluation.exported.agreement", 0.75, "25.0% of these tokens"),
        ("evaluation.before.perplexity", 77.25, "77.250"),
        ("evaluation.after.kl", 0.3219, "0.322"),
        ("evaluation.positions", 54321, "54,321 validation tokens"),
        ("evaluation.teacher.perplexity", 9.875, "9.875"),
        ("teacher.parameters", 3_210_000_000, "3.2 B parameters"),
        ("teacher.sha256", "12" * 32, "12" * 32),
        ("student.parameters", 654_321, "654.3 k parameters"),
        ("soft_targets.sequences", 98_765, "98,765 sequences"),
        ("soft_targets.corpus_sha256", "fe" * 32, "fe" * 32),
        ("training.seconds", 4321.4, "4,321 s"),
        ("training.learning_rate", 0.00345, "0.00345"),
        ("training.precision", "bf16", "precision bf16"),
        ("proof.mean_kl", 7.7e-4, "7.7e-04"),
        ("proof.token_lines", 4242, "4,242"),
        ("environment.packages", {"torch": "9.8.7"}, "9.8.7"),
        ("heads.verification.auroc", 0.654, "AUROC 0.654"),
        ("llama_cpp", llama, "extra CPU buffers, with which it died (signal SIGILL)"),
    ]
    plain, whole = text_of(build_card(run)), run.results_file.read_text()
    for key, value, shown in rows:
        assert shown not in plain, key
        put(run.results_file, key, value)
        assert shown in text_of(build_card(run)), key
        run.results_file.write_text(whole)


def test_settings_are_those_of_the_run(run: RunFolder, tmp_path: Path) -> None:
    """Each is another by default."""
    plain = build_card(run)
    for key, value in (
        ("loss.temperature", "3"),
        ("loss.divergence", "jensen_shannon"),
        ("loss.beta", "0.45"),
        ("train.schedule", "wsd"),
        ("train.epochs", "17"),
        ("train.on_policy", "0.25"),
        ("data.held_out", "0.125"),
    ):
        other = RunFolder(make_run(tmp_path / key, settings=(f"{key}={value}",)))
        before, after = (row(card, escaped(key))[1] for card in (plain, build_card(other)))
        assert before != escaped(value) and after == escaped(value), key
    settings = ("data.path=corpus.txt", "seed=77", "data.max_length=96")
    named = RunFolder(make_run(tmp_path / "named", settings=settings))
    card = build_card(named)
    assert "corpus.txt" in row(card, "text")[1] and row(card, "seed")[1] == "77"
    assert row(card, escaped("data.max_length"))[1] == "96"


def test_an_interval_is_claimed_only_where_one_is_recorded(run: RunFolder) -> None:
    card = build_card(run)
    assert "95 %" not in section(card, RESULT)
    assert "interval" not in card.split("## How to run it")[0]
    found = {"kl": [1.25, 1.75], "agreement": [0.375, 0.4321], "perplexity": [4.0, None]}
    put(run.results_file, "evaluation.exported.intervals", found)
    card = build_card(run)
    assert row(card, "KL (nats/token)")[-1] == "95 %: 1.250–1.750"
    assert row(card, "same top token")[-1] == "95 %: 37.5–43.2%"
    assert row(card, "perplexity")[-1] == ""
    assert "(95 % interval 37.5–43.2%)" in card
    put(run.results_file, "evaluation.exported.intervals", {"kl": [1.75, 1.25]})
    assert "1.750–1.250" not in build_card(run)


def test_before_and_after_stand_under_their_own_heads(run: RunFolder) -> None:
    for place, model in enumerate(("before", "after", "exported")):
        for key, value in (("kl", 1.0), ("agreement", 0.1), ("perplexity", 10.0)):
            put(run.results_file, f"evaluation.{model}.{key}", (place + 1) * value)
    card = build_card(run)
    assert "| teacher | before training | trained | exported file |" in section(card, RESULT)
    assert row(card, "KL (nats/token)")[1:5] == ["0", "1.000", "2.000", "3.000"]
    assert row(card, "same top token")[1:5] == ["100%", "10.0%", "20.0%", "30.0%"]
    assert row(card, "perplexity")[1:5] == ["1.200", "10.000", "20.000", "30.000"]


def test_safety_ratios_come_with_wilsons_interval(run: RunFolder) -> None:
    """Against the roots of Wilson's quadratic (p − q)² = z² q (1 − q) / n, solved here."""
    card = build_card(run)
    for words, right, cases in (
        ("Refuse Recall", 4, 4),
        ("Escalate Precision", 2, 3),
        ("Allow Precision", 1, 1),
        ("Allow Recall", 1, 4),  # not only what the head is tuned for
        ("Escalate Recall", 2, 4),
        ("Refuse Precision", 4, 8),
    ):
        share, square = right / cases, 1.959963984540054**2 / cases
        roots = np.sort(np.roots([1 + square, -(2 * share + square), share**2]).real)
        line = next(line for line in card.splitlines() if line.startswith(f"| {words}"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[2] == f"{right} of {cases}"
        ends = [float(part) for part in cells[3].rstrip("%").split("–")]
        assert ends == pytest.approx(100 * roots, abs=0.051), words
    assert "English" in section(card, "Safety head") and "42 prompts" not in card
    assert "52 prompts in all" in card


def test_the_verdict_is_the_reports(run: RunFolder, tmp_path: Path) -> None:
    """The report's sentences, the guard's deeds among them, and warnings marked as such."""
    words = section(build_card(run), "How training went")
    assert "60 steps over 6.0 k tokens" in words and "from 6.000 to 1.500" in words
    assert "**Worth a look:** Safety head on 12" in words and "No guard" in words
    deeds = [event_line(60, action) for action in ("clip", "clip", "skip_step")]
    guarded = RunFolder(make_run(tmp_path / "guarded", lines=[*lines_of_a_run(), *deeds]))
    words = section(build_card(guarded), "How training went")
    assert "2 steps clipped harder, 1 step skipped" in words and "No guard" not in words


def test_only_what_is_there_is_offered(run: RunFolder) -> None:
    card = build_card(run)
    assert "llama-cli -m student.gguf" in card
    assert "ollama" not in card and "AutoModel" not in card and "audit" not in card
    run.modelfile.write_text("FROM ./student.gguf\n")
    run.plain.mkdir()
    (run.plain / "config.json").write_text("{}")
    card = build_card(run)
    assert "ollama create so8t-64x2 -f Modelfile && ollama run so8t-64x2" in card
    assert "AutoTokenizer" not in card and "takes token ids" in card
    assert ModelCard(card).data.library_name == "transformers"
    run.gguf.unlink()
    assert "Files" not in headings(build_card(run))


def test_the_transformers_snippet_runs(
    run: RunFolder,
    tiny_teacher_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the card says to type is run in the run's folder, with a small model in it."""
    make_base(run.plain, tiny_teacher_path, "llama")
    monkeypatch.chdir(run.path)
    chat = run.plain / "chat_template.jinja"
    for template in (None, "{% for m in messages %}{{ m['content'] }}{% endfor %}"):
        chat.unlink(missing_ok=True)
        if template is not None:
            chat.write_text(template)
        card = build_card(run)
        assert ("apply_chat_template" in card) == (template is not None)
        snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)
        assert snippet is not None, template
        exec(snippet[1], {})
        assert "Hello" in capsys.readouterr().out or template is not None


def test_exported_files(run: RunFolder) -> None:
    """Those that are there, with their own figures; a list of another folder's files is refused."""
    name, digest = "student-q4_k_m.gguf", "9f" * 32
    known = {"quant": "q4_k_m", "bytes": 123_456, "bits_per_weight": 4.85, "sha256": digest}
    known |= {"agreement": 0.915, "prompt": 900.0, "generation": 321.0, "imatrix": True}
    known |= {"types": {"F32": 3, "Q4_K": 12}, "max_logit_difference": 0.5, "positions": 64}
    known |= {"kl": 0.0321}
    files = [{"file": file, **known} for file in (name, "gone.gguf")]
    run.exports.write_text(json.dumps({"files": files}))
    (run.path / name).write_bytes(b"")
    card = build_card(run)
    words = section(card, "Files")
    assert "gone.gguf" not in words
    kind = escaped("q4_k_m (importance matrix)")
    figures = ["123.5 kB", "4.85", "3.2e-02", "91.50%", "321"]
    assert row(words, name.replace("_", "\\_"))[1:] == [kind, *figures]
    assert "12 Q4\\_K, 3 F32 tensors" in words and f"{digest}  {name}" in card
    assert f"{file_sha256(run.gguf)}  student.gguf" in card
    own = row(words, "student.gguf")
    assert (own[1], own[3:]) == (escaped("q8_0"), ["32.00", "–", "–", "500"])
    run.exports.write_text(json.dumps({"files": [{"file": "../first/config.json", **known}]}))
    with pytest.raises(UserError, match=r"exports\.json is damaged .*config\.json"):
        build_card(run)
    run.exports.unlink()
    assert "against the same student" not in section(build_card(run), "Files")

    def measured_once(results: dict[str, Any]) -> None:
        del results["training"]["held_out"][1:]

    change(run.results_file, measured_once)
    assert "best step was chosen" in card and "best step was chosen" not in build_card(run)


def test_licence_and_origin_are_what_the_file_says(run: RunFolder) -> None:
    def front(**general: str) -> dict[str, Any]:
        write_file(run.gguf, **general)
        found: dict[str, Any] = ModelCard(build_card(run)).data.to_dict()
        return found

    card = build_card(run)
    assert "Unknown" in section(card, "License") and "Apache" not in card
    assert front(license="Apache-2.0")["license"] == "apache-2.0"
    assert "Apache-2.0" in section(build_card(run), "License")
    link, hub = "https://example.org/terms", "https://huggingface.co/some-one/Teacher-7B"
    origin = {"base_model__0__repo_url": hub, "base_model__1__repo_url": "https://example.org/a/b"}
    data = front(license="other", license__name="tiny-terms", license__link=link, **origin)
    names = ("license", "license_name", "license_link", "base_model", "base_model_relation")
    base = (["some-one/Teacher-7B"], "finetune")
    assert tuple(data[name] for name in names) == ("other", "tiny-terms", link, *base)
    data = front(license__link="javascript:alert(1)", license="my own")
    assert data["license_name"] == "my own" and "license_link" not in data


def test_a_run_without_its_teacher_says_so(tmp_path: Path) -> None:
    """Trained from a store: measured against stored targets, over text that is not named."""
    store = "store=/home/somebody/stores/one"
    folder = RunFolder(make_run(tmp_path / "stored", settings=(store,)))
    put(folder.results_file, "evaluation.against", "stored soft targets")
    put(folder.results_file, "evaluation.kl_over", "16 top tokens and the rest")
    change(folder.results_file, lambda results: results["evaluation"].pop("teacher"))
    card = build_card(folder)
    assert "The teacher was not there" in card and "16 top tokens and the rest" in card
    assert row(card, "perplexity")[1] == "–" and "stored targets" in card
    assert "do not name" in row(card, "text")[1]
    for absent in ("generated by the teacher", "somebody"):
        assert absent not in card
    names = [one.metric_name for one in ModelCard(card).data.eval_results]
    assert "same top token as the stored soft targets" in names


def test_a_student_made_of_a_base(run: RunFolder) -> None:
    """Its name, what of it was trained, its hash and its licence; not the folder it lay in."""
    base, digest = "small-qwen", "77" * 32
    student = {"size": f"{base}-lora8", "parameters": 2_000_000, "file_bytes": 9, "quant": "q8_0"}
    student |= {
        "base": f"/home/somebody/models/{base}",
        "architecture": "qwen2",
        "load_in_4bit": True,
    }
    student |= {"lora": {"rank": 8, "alpha": 32.0, "dropout": 0.0}, "trained_parameters": 45_600}
    put(run.results_file, "student", {**student, "gradients": {"loss": 1.0}})
    put(run.identity_file, "base_sha256", digest)
    put(run.identity_file, "base_name", base)
    card = build_card(run)
    assert "# SO8T small-qwen-lora8, distilled from example" in card
    words = row(card, "student")[1]
    parts = (base, "2.0 M", "qwen2", "4 bits (NF4)", "LoRA of rank 8", "45.6 k trained parameters")
    assert [part for part in parts if part not in words] == []
    assert "Llama decoder" not in words and "somebody" not in card
    assert row(card, "base model's SHA-256")[1] == digest
    assert "base model" in section(card, "License")


def test_what_it_learnt_from(run: RunFolder) -> None:
    for recipe, shown, sketch in (
        ({"kind": "hidden", "layers": []}, "teacher's final hidden state", False),
        ({"kind": "dense", "layers": [1, 3]}, "every token; hidden states", False),
        ({"kind": "compact", "num_topk": 24, "sketch_bytes": 9}, "24 most probable", True),
        ({}, "is not recorded", False),
    ):
        put(run.results_file, "soft_targets.recipe", recipe)
        card = build_card(run)
        learnt = row(card, "soft targets")[1]
        assert shown in learnt and ("low-rank code" in learnt) == sketch, recipe


def test_without_heads(run: RunFolder) -> None:
    put(run.results_file, "heads", {})
    card = build_card(run)
    assert headings(card) == [title for title in HEADINGS if not title.endswith(" head")]
    assert "no safety head, and its safety was not measured" in card and "judge" not in card


def test_older_and_poorer_records(run: RunFolder) -> None:
    """What an older version did not write is left out; figures that were not finite are none."""

    def poorer(results: dict[str, Any]) -> None:
        del results["heads"], results["evaluation"]["against"], results["evaluation"]["kl_over"]
        results["teacher"] = {"name": "example"}
        results["student"] = {"size": None}
        results["tokens_per_second"] = {}
        results["evaluation"]["exported"] |= {
            "kl": None,
            "agreement": None,
            "perplexity": float("nan"),
        }

    change(run.results_file, poorer)
    run.config_file.write_text("{}")
    card = build_card(run)
    assert "# SO8T, distilled from example" in card
    for absent in ("model-index", "model_name", "quantized itself", "loss.alpha"):
        assert absent not in card
    assert ModelCard(card).data.eval_results is None
    assert row(card, "KL (nats/token)")[-2] == "–"
    assert row(card, "teacher")[1] == "example"
    assert "do not name" in row(card, "text")[1]
    assert "precision fp32; the weights are those of step 60" in row(card, "training")[1]


def test_a_quantised_teacher_is_a_limit(run: RunFolder) -> None:
    for bits in (4.5, 8.5, 16.0, 32.0):
        put(run.results_file, "teacher.file_bytes", int(4_787_456 * bits / 8))
        card = build_card(run)
        assert ("quantized itself" in card) == (bits < 16), bits
        assert (f"about {bits:.1f} bits per weight" in card) == (bits < 16), bits


def test_the_audit_log(run: RunFolder) -> None:
    """The head is one that `audit verify --expect` takes; a damaged one is not shown."""
    first = append(run.path, [("one", {})])
    last = append(run.path, [("two", {}), ("three", {})])
    card = build_card(run)
    assert "distill audit verify ." in card and last.sha256 in card and first.sha256 not in card
    assert verify(run.path, last.sha256).intact
    head, evil = run.path / HEAD, '{"lines":3,"sha256":"```\\n# evil"}\n'
    for broken in ("", "not json\n", evil, "[1]\n", head.read_text().replace("3", "0", 1), None):
        head.unlink()
        if broken is not None:
            head.write_text(broken)
        assert "last line could not be read" in build_card(run), broken


def test_the_same_records_give_the_same_bytes(run: RunFolder, tmp_path: Path) -> None:
    """Also in another folder; written twice, it is there once and nothing else is left."""
    path = write_card(run)
    first, files = path.read_bytes(), sorted(run.path.iterdir())
    assert path == run.card and write_card(run).read_bytes() == first
    assert sorted(run.path.iterdir()) == files
    copy = shutil.copytree(run.path, tmp_path / "elsewhere" / "copy")
    again = build_card(RunFolder(copy))
    assert first.decode() == f"{again}{SEAL}{hashlib.sha256(again.encode()).hexdigest()} -->\n"
    assert is_ours(run)
    path.write_bytes(first.replace(b"teacher", b"Teacher", 1))
    assert not is_ours(run)


def test_a_card_is_written_whole_or_not_at_all(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = write_card(run).read_bytes()
    put(run.results_file, "training.seconds", 999.0)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_card(run)
    assert run.card.read_bytes() == before and not list(run.path.glob(".*"))
    assert write_card(run).read_bytes() != before


def test_what_cannot_be_told_of_is_refused_in_one_line(run: RunFolder, tmp_path: Path) -> None:
    """Damaged records, and a run that is not finished; no card is written."""

    def refused(folder: RunFolder, words: str) -> None:
        with pytest.raises(UserError) as caught:
            write_card(folder)
        said = str(caught.value)
        assert words in said and "\n" not in said and not folder.card.exists(), said

    refused(RunFolder(make_run(tmp_path / "unfinished", finished=False)), "no results.json yet")
    whole = run.results_file.read_text()
    damages = (("training.steps", "many"), ("student.lora", 3), ("training.learning_rate", "fast"))
    for key, value in damages:
        put(run.results_file, key, value)
        refused(run, f"results.json is damaged ({key}")
        run.results_file.write_text(whole)
    run.results_file.write_text(whole[:-20])
    refused(run, "results.json is damaged")
    run.results_file.write_text(whole)
    for broken, where in (('{"files": [{"file": "a"}]}', "0.quant"), ("{}", "")):
        run.exports.write_text(broken)
        refused(run, f"exports.json is damaged ({where}")
    run.exports.unlink()
    run.gguf.write_bytes(run.gguf.read_bytes()[:100])
    with pytest.raises(TeacherFileError, match="truncated or damaged"):
        write_card(run)
