"""What needs no model is refused at once: nothing that takes seconds has been imported by then."""

from __future__ import annotations

import importlib
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from distill.capture.data_rows import DataRows
from distill.commands.exit_codes import EXIT_CODES
from distill.config.loading import load_config
from distill.pipeline.preflight import Inputs
from distill.runs.audit_log import append
from teachers import example_teacher
from teachers.store.manifest import Manifest
from teachers.targets.recipe import Recipe
from teachers.tokenizer.rows import Document
from tests.support.children import refusals_child

ROOT = Path(__file__).parents[3]
IDENTITY = {"vocab_size": 8, "recipe": Recipe("dense").to_json()}
# Version, tensors, entries; the one entry's key, type (a string) and value, each after its length.
ENCODER = (3, 0, 1, 20, b"general.architecture", 8, 4, b"bert")
MANIFEST = Manifest(IDENTITY, sequences=4, sequences_per_shard=2).to_json()
ODD_HEADS = "--set student.heads=3"
SAMPLING = "--set data.sampling_temperature=0"
ON_POLICY = "--set train.on_policy=0.5"

# Words in braces are files and folders of ``places``; the last is part of what must be said.
CASES: list[tuple[str, int, str]] = [
    # Nothing at all is wrong
    ("--help", 0, ""),
    ("--version", 0, ""),
    ("run --help", 0, ""),
    ("audit verify {logged}", 0, ""),
    # Settings
    ("run --config {missing}", 2, "cannot be read"),
    ("run --config {bad.yaml}", 2, "is not valid YAML"),
    ("run --config {unknown.json}", 2, "unknown key 'train.speed'"),
    ("run --set train.epochs=0", 2, "train.epochs = 0"),
    ("run --budget soon", 2, "--budget 'soon' is no time; write for example 90s, 20m, 1h or 1h30m"),
    ("run --budget 1h --epochs 2", 2, "--budget decides samples, epochs and steps; leave it out"),
    ("plan --budget 1h --samples 9", 2, "leave it out, or samples"),
    ("run --set epochs", 2, "write section.key=value"),
    ("run --set loss.divergence=other", 2, "loss.divergence = 'other'"),
    ("run --student-size 100x4", 2, "student width 100 is not divisible by 8"),
    ("run --student-size huge", 2, "student size 'huge' is not one"),
    ("plan --student-size 120%", 2, "a share lies between 0% and 100%"),
    (f"run --student-size 64x2 {ODD_HEADS}", 2, "does not split into 3 heads"),
    ("run --quant q9", 2, "export.quant = 'q9'"),
    ("run --vocab many", 2, "--vocab 'many' is no size of a vocabulary"),
    ("plan --vocab 9", 2, "must stay"),
    ("capture --vocab 50% --targets hidden", 2, "targets.kind = hidden keeps no probabilities"),
    ("run --quant q8_0:output=q6_k", 2, "give the type of its rows as embedding="),
    ("run --preset other", 2, "--preset 'other' does not exist"),
    ("run --lora-r 8", 2, "name one with --student-base"),
    ("run --set store=x", 2, "only `distill train` learns from a store"),
    ("capture --targets all", 2, "targets.kind = 'all'"),
    ("plan --memory much", 2, "--memory 'much' is no amount of memory"),
    # Teachers
    ("run --teacher {missing}", 2, "does not exist"),
    ("run --teacher {empty}", 2, "is a folder: not a GGUF file"),
    ("run --teacher {garbage.gguf}", 2, "is not a GGUF file"),
    ("run --teacher {truncated.gguf}", 2, "truncated"),
    ("run --teacher {encoder.gguf}", 2, "is an encoder"),
    ("run --teacher {unloadable.gguf}", 2, "tensor 'output_norm.weight' not found"),
    ("run --set teacher.mix_with=[{missing}]", 2, "does not exist"),
    ("run --set teacher.mix_with=[{empty}]", 2, "has no config.json"),
    ("run --set teacher.weights=[1]", 2, "teacher.weights is for several teachers"),
    ("run --set teacher.load_in_4bit=true", 2, "teacher.load_in_4bit is for transformers folders"),
    ("run --set teacher.tensor_split=[0,0]", 2, "tensor_split = [0.0, 0.0] gives no GPU a share"),
    ("run --set teacher.tensor_split=[1] --set teacher.main_gpu=0", 2, "main_gpu = 0 is one GPU"),
    ("run --set teacher.main_gpu=0 --set teacher.gpu_layers=0", 2, "leave one of them out"),
    ("run --set teacher.cache_type=q3", 2, "cache_type = 'q3'"),
    ("capture --teacher {missing}", 2, "does not exist"),
    ("capture --teacher {empty}", 2, "has no config.json"),
    ("plan --teacher {truncated.gguf}", 2, "truncated"),
    ("plan --teacher {empty} --student-base {empty}", 2, "is a folder: not a GGUF file"),
    ("run --teacher http://127.0.0.1:1", 2, "does not answer"),
    ("capture --teacher http://user:word@there", 2, "is no plain address"),
    ("run --set teacher.token=x", 2, "teacher.token is for a teacher that is behind a server"),
    ("plan --teacher http://127.0.0.1:1 --set teacher.gpu_layers=3", 2, "its server is started"),
    ("serve {missing}", 2, "does not exist"),
    ("serve {empty}", 2, "takes one GGUF file"),
    ("serve {teacher} --host 0.0.0.0 --token short", 2, "reachable by others"),
    # Trimming
    ("trim {teacher} --vocab many --data {odd.jsonl} -o t.gguf", 2, "is no size"),
    ("trim {teacher} --vocab 9 --data {odd.jsonl} -o t.gguf", 2, "tokens must stay"),
    ("trim {teacher} --vocab 300 --data {missing} -o t.gguf", 2, "does not exist"),
    ("trim {encoder.gguf} --vocab 300 --data {odd.jsonl} -o t.gguf", 2, "is an encoder"),
    ("trim {teacher} --vocab 300 --data {broken.jsonl} -o t.gguf", 2, "line 2 is not JSON"),
    # Data
    ("run --data {missing}", 2, "does not exist"),
    ("run --data {empty}", 2, "has no .jsonl"),
    ("run --data {nothing.jsonl}", 2, "is empty"),
    ("run --data {data.pdf}", 2, "is none of .jsonl"),
    ("run --data {broken.jsonl}", 2, "line 2 is not JSON"),
    ("capture --data {odd.jsonl}", 2, "line 1: no column that is understood; there are words"),
    ("plan --data {latin.txt}", 2, "not UTF-8"),
    ("run --data {broken.parquet}", 2, "row 1: damaged"),
    ("run --data {broken.jsonl} --set data.split=test", 2, "is not divided into splits"),
    ("run --data {broken.jsonl} --set data.columns.body=text", 2, "data.columns.body"),
    ("evaluate {copy} --teacher {teacher} --tasks {broken.parquet}", 2, "row 1: damaged"),
    (f"run {SAMPLING}", 2, "lets the teacher say one thing only"),
    # Safety prompts
    ("run --safety-labels {missing}", 2, "cannot be read"),
    ("run --safety-labels {maybe.jsonl}", 2, "label 'MAYBE' is none of"),
    ("capture --safety-labels {few.jsonl}", 2, "no example of"),
    ("run --set safety.prompts={few.jsonl}", 2, "is for safety.labels=teacher"),
    # A base
    ("run --student-base {missing}", 2, "--student-base: "),
    ("run --student-base {garbage.gguf}", 2, "is not a GGUF file"),
    ("plan --student-base {empty}", 2, "has no config.json"),
    # Where it goes, and the launch
    ("run --out {garbage.gguf}", 2, "is a file"),
    ("run --out {others}", 2, "holds other files"),
    ("run --store {others}", 2, "holds other files"),
    ("capture --store {others}", 2, "holds other files"),
    ("run RANK=2 WORLD_SIZE=2", 2, "do not fit together"),
    ("capture RANK=x", 2, "do not fit together"),
    ("capture LOCAL_RANK=x", 2, "LOCAL_RANK='x' in the environment is no number"),
    ("train {store} RANK=1", 2, "do not fit together"),
    (f"run RANK=0 WORLD_SIZE=2 {ON_POLICY}", 2, "works in one process"),
    # From a store
    ("train {missing}", 2, "does not exist"),
    ("train {garbage.gguf}", 2, "is not a folder"),
    ("train {empty}", 2, "is not a store"),
    ("train {damaged}", 2, "manifest.json is damaged"),
    ("train {manifest}", 2, "holds no soft targets yet"),
    (f"train {{store}} {ON_POLICY}", 2, "needs the teacher"),
    ("train {store} --teacher {truncated.gguf}", 2, "truncated"),
    ("train {store} --out {others}", 2, "holds other files"),
    ("train {store} --safety-labels {maybe.jsonl}", 2, "label 'MAYBE' is none of"),
    ("train {store} --student-base {missing}", 2, "does not exist"),
    # Reports and logs
    ("report {missing}", 2, "there is no such folder"),
    ("report {empty}", 2, "it has no config.json"),
    ("report {run}", 2, "nothing is logged yet"),
    ("report {halved}", 2, "results.json is damaged"),
    ("report {truncated.gguf}", 2, "truncated"),
    ("report {run} {run} {run}", 2, "3 paths are too many"),
    ("report {run} {teacher}", 2, "cannot be compared"),
    ("report {run} --output {page.pdf}", 2, "must end in .html"),
    ("report {nothing.jsonl}", 2, "is empty"),
    ("report {weights.bin}", 2, "may be a pickle"),
    ("report {data.pdf}", 2, "is no file of weights"),
    ("audit verify {missing}", 2, ""),
    ("audit verify {empty}", 2, ""),
    ("audit verify {tampered}", 2, "line 1"),
    ("audit verify {logged} --expect 00", 2, ""),
    # Exports
    ("export-gguf {missing}", 2, "is not a run's folder"),
    ("export-gguf {run}", 2, "has no trained student yet"),
    ("export-gguf {exported}", 2, "exports.json is damaged"),
    ("export-gguf {run} --quant q9", 2, "--quant 'q9' is not a file type"),
    # Files that are used as they are
    ("judge {teacher}", 2, "give one prompt to judge"),
    ("judge {missing} hello", 2, "does not exist"),
    ("judge {garbage.gguf} hello", 2, "is not a GGUF file"),
    ("judge {truncated.gguf} hello", 2, "truncated"),
    ("judge {teacher} hello", 2, "carries no heads"),
    ("chat {missing} hello", 2, "does not exist"),
    ("chat /nope/\x1b[31mevil.gguf hello", 2, "␛[31mevil.gguf"),
    ("chat {garbage.gguf} hello", 2, "is not a GGUF file"),
    ("chat {truncated.gguf} hello", 2, "truncated"),
    ("evaluate {missing}", 2, "does not exist"),
    ("evaluate {garbage.gguf}", 2, "is not a GGUF file"),
    ("evaluate {truncated.gguf}", 2, "truncated"),
    ("evaluate {empty}", 2, "is a folder but not a run's"),
    ("evaluate {teacher} {teacher}", 2, "is given twice"),
    ("evaluate {teacher} --teacher {empty}", 2, "is a folder; evaluate needs"),
    ("evaluate {teacher} --lm-eval ,", 2, "names no task"),
    ("evaluate {teacher} --lm-eval-limit 3", 2, "is for the tasks of --lm-eval"),
    ("evaluate {teacher} --output {page.pdf}", 2, "must end in .html"),
    ("evaluate {copy} --teacher {teacher} --tasks {missing}", 2, "cannot be read"),
    ("evaluate {copy} --teacher {teacher} --data {missing}", 2, "does not exist"),
    ("evaluate {copy} --set data.split=test", 2, "data.split and data.columns, of --data"),
    ("evaluate {copy} --data {odd.jsonl} --set seed=1", 2, "takes data.split and data.columns"),
    ("evaluate {copy} --data {odd.jsonl} --set data.split=test", 2, "is not divided into splits"),
    ("evaluate {copy} --data {odd.jsonl} --set data.columns.body=x", 2, "data.columns.body"),
    ("evaluate {copy} --teacher {teacher} --safety-prompts {missing}", 2, "cannot be read"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files and folders that the cases name."""
    root = tmp_path_factory.mktemp("refusals")
    teacher = example_teacher().read_bytes()
    contents: dict[str, str | bytes] = {
        "bad.yaml": "a: [",
        "unknown.json": '{"train": {"speed": 1}}',
        "garbage.gguf": "nothing of the kind",
        "truncated.gguf": teacher[:400],
        "unloadable.gguf": teacher.replace(b"output_norm.weight", b"output_Norm.weight"),
        "encoder.gguf": b"GGUF" + struct.pack("<IQQQ20sIQ4s", *ENCODER),
        "nothing.jsonl": "",
        "data.pdf": "%PDF-1.7 and more",
        "broken.jsonl": '{"text": "one"}\n{"text": \n',
        "odd.jsonl": '{"words": "one"}\n',
        "broken.parquet": "PAR1 and no table",
        "latin.txt": "é".encode("latin-1"),
        "maybe.jsonl": '{"prompt": "hello", "label": "MAYBE"}\n',
        "few.jsonl": '{"prompt": "hello", "label": "ALLOW"}\n',
        "weights.bin": "weights",
        "others/notes.txt": "mine",
        "damaged/manifest.json": "{",
        "manifest/manifest.json": MANIFEST,
        "store/manifest.json": MANIFEST,
        "store/shard-00000.safetensors": "",
        "halved/config.json": "{}",
        "exported/config.json": load_config(None, {}, []).model_dump_json(),
        "exported/student/tokenizer.gguf": "trained",
        "exported/exports.json": "{",
        "halved/results.json": '{"teacher": {',
        "run/config.json": load_config(None, {}, []).model_dump_json(),
        "copy": teacher,
    }
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    (root / "empty").mkdir()
    for name in ("logged", "tampered"):
        append(root / name, [("run_started", {"seed": 1}), ("exported", {})])
    log = root / "tampered" / "audit.jsonl"
    log.write_text(log.read_text().replace('"seed":1', '"seed":2'))
    names = {name.partition("/")[0] for name in contents} | {"empty", "logged", "tampered"}
    found = {name: str(root / name) for name in names | {"missing", "page.pdf"}}
    return found | {"teacher": str(example_teacher())}


def command_line(case: str, places: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Arguments, and variables of the environment, which are written among them in capitals."""
    words = case.split()
    variables = dict(word.split("=") for word in words if re.match("[A-Z_]+=", word))
    arguments = [word for word in words if word.partition("=")[0] not in variables]
    for name, path in places.items():
        arguments = [word.replace(f"{{{name}}}", path) for word in arguments]
    return arguments, variables


def test_refusals_import_nothing_that_takes_seconds(places: dict[str, str], tmp_path: Path) -> None:
    """The very messages, with exit code 2, and by then no module of ``HEAVY`` is there."""
    lines = [command_line(case, places) for case, _, _ in CASES]
    child = subprocess.run(
        [sys.executable, refusals_child.__file__],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,  # what is not refused would begin
        check=False,
    )
    assert child.returncode == 0, child.stderr
    answers = json.loads(child.stdout)
    for (case, code, words), answer in zip(CASES, answers, strict=False):
        for module, lines_of_ours in answer["imported"].items():
            pytest.fail(f"distill {case}: {module} was imported, by {' > '.join(lines_of_ours)}")
        assert answer["code"] == code, (
            f"distill {case}: exit code {answer['code']}; it said: {answer['said']}"
        )
        assert "\x1b" not in answer["said"], f"distill {case!r} steers the terminal"
        assert words in answer["said"], f"distill {case} said: {answer['said']}"
        assert not code or "error:" in answer["said"], f"distill {case} said: {answer['said']}"
    assert len(answers) == len(CASES)
    assert not list(tmp_path.iterdir()), "something was written"


def test_every_error_in_the_table_is_there() -> None:
    """The table has names only, which a renamed or moved class would no longer have."""
    for name in EXIT_CODES:
        module, _, kind = name.rpartition(".")
        found = getattr(importlib.import_module(module), kind)
        assert issubclass(found, Exception) and f"{found.__module__}.{found.__qualname__}" == name


def test_data_is_handed_on_once() -> None:
    """Data may be large: whoever has taken it is the only one that holds it."""
    data = DataRows([Document("words", "here")])
    inputs = Inputs(data=data)
    assert inputs.take_data() is data and inputs.take_data() is None
