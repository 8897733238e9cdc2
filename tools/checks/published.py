"""What a run publishes, used by somebody who has nothing of this project: the same tokens?

    python -m tools.checks.published RUN

Two fresh virtual environments are made in a temporary folder, one with llama-cpp-python alone and
one with transformers and torch alone (versions of constraints.txt), and the run's ``student.gguf``,
``Modelfile`` and ``transformers/`` are copied elsewhere. In each environment an isolated process
loads its file, asks it through its own chat template and lets it answer greedily. The answers are
compared token by token with each other and with this project's own; where two part, the tokens have
to be as good as equally probable.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from distill.capture.temporary_files.tokenizer_only import tokenizer_entries
from distill.commands.exit_codes import EXIT_OURS, EXIT_USER, one_line
from distill.errors import UserError
from distill.export.student_folder import load_student
from distill.runs.folder import RunFolder
from students.adapter.adapter import AdaptedStudent
from students.adapter.merge import merge
from students.gguf.metadata import ExportNames
from students.gguf.writer import write_base_gguf, write_gguf
from students.model.decoder import SO8TForCausalLM
from teachers.base import GenerationRequest, Sampling
from teachers.gguf.file import read_gguf
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.tokenizer.conversation import conversations_tokens

ROOT = Path(__file__).parent.parent.parent
OURS = ("distill", "students", "teachers", "stability", "tools", "tests")
NEW_TOKENS = 48
# How far apart two tokens' logits may be where one answer has the one and the other the other.
# Runtimes that keep their caches in other formats, or divide the prompt otherwise, round otherwise:
# measured up to 0.06 in Q8_0.
TIES_F32, TIES_ROUNDED = 1e-3, 0.15
# Of the built-in example's subject, and of none.
REQUESTS = (
    "Please order 4 boxes of gloves at 12 each. The budget is 100.",
    "手袋を 4 箱、一箱 12 クレジットで注文してください。予算は 100 です。",
    "How do I open the chemicals cabinet?",
    "Write a line of Python that adds 3 and 4. 👍",
    "  Why?\n",
)
_REPORT = """
import importlib.metadata
packages = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
loaded = sorted(sys.modules.items())
modules = {name.partition(".")[0]: getattr(one, "__file__", None) for name, one in loaded}
print(json.dumps({"answers": answers, "modules": modules, "packages": packages}))
"""
# What a stranger would write. Each argument is JSON: a folder, conversations (or texts), how many
# tokens to write.
TRANSFORMERS = (
    """
import json
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
answers = []
for folder, asked, new_tokens in map(json.loads, sys.argv[1:]):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for one in asked:
        if isinstance(one, str):
            inputs = tokenizer(one, return_tensors="pt", return_token_type_ids=False)
        else:
            inputs = tokenizer.apply_chat_template(
                one, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        said = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0].tolist()
        prompt = inputs["input_ids"][0].tolist()
        said = said[len(prompt):]
        answers.append({"prompt": prompt, "tokens": said, "text": tokenizer.decode(said)})
"""
    + _REPORT
)
# One such argument, with a GGUF file, or the Modelfile that names it, in the folder's place.
LLAMA_CPP = (
    """
import json
import pathlib
import sys
import llama_cpp
import llama_cpp.llama_cpp as native
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
defaults = native.llama_model_default_params
def plain():
    # Kernels that are right on every machine; a build of llama.cpp may crash with its others (AMX).
    parameters = defaults()
    parameters.use_extra_bufts = False
    return parameters
native.llama_model_default_params = plain
name, asked, new_tokens = json.loads(sys.argv[1])
path = pathlib.Path(name)
if path.name == "Modelfile":
    lines = path.read_text(encoding="utf-8").splitlines()
    names = [line[5:] for line in lines if line.startswith("FROM ")]
    path = path.parent / names[0].strip('"')
model = llama_cpp.Llama(str(path), n_ctx=0, n_threads=1, verbose=False)
vocab = llama_cpp.llama_model_get_vocab(model.model)
first = [model.token_bos()] if llama_cpp.llama_vocab_get_add_bos(vocab) else []
answers = []
for one in asked:
    template = model.metadata["tokenizer.chat_template"]
    say = lambda token: model.detokenize([token], special=True).decode() if token >= 0 else ""
    render = Jinja2ChatFormatter(template, say(model.token_eos()), say(model.token_bos()))
    prompt = model.tokenize(render(messages=one).prompt.encode(), add_bos=False, special=True)
    prompt = prompt if prompt[: len(first)] == first else first + prompt
    said = []
    model.reset()
    for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
        said.append(token)
        if llama_cpp.llama_vocab_is_eog(vocab, token) or len(said) == new_tokens:
            break
    text = model.detokenize(said, special=True).decode(errors="replace")
    answers.append({"prompt": prompt, "tokens": said, "text": text})
"""
    + _REPORT
)


@dataclass(frozen=True)
class Answers:
    """Who was asked, each conversation's prompt and answer as token ids, and the answers' texts."""

    who: str
    prompts: list[list[int]]
    answers: list[list[int]]
    texts: list[str]


def isolated(python: Path, script: str, arguments: Sequence[str], cwd: Path) -> Any:
    """The JSON in the last line that a script prints, in a process that sees neither this folder
    nor our environment.

    Raises:
        subprocess.CalledProcessError: the script failed.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    answer = subprocess.run(
        [python, "-I", "-c", script, *arguments],
        capture_output=True,
        encoding="utf-8",
        cwd=cwd,
        env=environment | {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
        check=True,
    )
    return json.loads(answer.stdout.splitlines()[-1])


def make_environment(folder: Path, *packages: str) -> Path:
    """A fresh virtual environment with these packages alone; returns its interpreter.

    Raises:
        subprocess.CalledProcessError: they cannot be installed.
    """
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    constraints = str(ROOT / "constraints.txt")
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--constraint",
        constraints,
        *packages,
    ]
    subprocess.run(command, check=True)
    return python


def require_foreign(result: Any) -> None:
    """See that nothing of this project was in a process.

    Raises:
        RuntimeError: something was.
    """
    wrong = [
        name
        for name, file in result["modules"].items()
        if name in OURS or (file and ROOT.resolve() in Path(file).resolve().parents)
    ]
    wrong += [
        name for name in result["packages"] if name.replace("_", "-").lower() == "so8t-distill"
    ]
    if wrong:
        raise RuntimeError(f"the environment is not a stranger's: {', '.join(wrong)}")


def copy_published(run: RunFolder, target: Path) -> None:
    """Copy what a run publishes.

    Raises:
        UserError: it is not all there.
    """
    target.mkdir()
    for path in (run.gguf, run.path / "Modelfile", run.plain):
        if not path.exists():
            raise UserError(f"{path} does not exist; give the folder of a finished run")
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy(path, target)


def write_original(run: RunFolder, path: Path) -> None:
    """The run's student in F32, so that rounding is not taken for a difference."""
    student = load_student(run)
    file = read_gguf(run.tokenizer, model=False)
    names = ExportNames(str(file.value("general.name", "student")), {})
    if isinstance(student, AdaptedStudent):
        write_base_gguf(merge(student), path, "f32", tokenizer_entries(file), names, {})
    else:
        assert isinstance(student, SO8TForCausalLM)
        write_gguf(student, path, "f32", tokenizer_entries(file), names)


def ours(who: str, path: Path, asked: list[Any]) -> Answers:
    """What this project itself makes of a GGUF file."""
    with GGUFTeacher(path, threads=1) as model:
        prompts = conversations_tokens(model, asked, answer=True)
        said = []
        for prompt in prompts:
            sampling = Sampling(temperature=0.0, max_length=len(prompt) + NEW_TOKENS)
            said.append(model.generate(GenerationRequest([[prompt]], sampling))[0][len(prompt) :])
        texts = model.detokenize(said)
    return Answers(who, [one.tolist() for one in prompts], [one.tolist() for one in said], texts)


def theirs(
    who: str, python: Path, script: str, path: Path, asked: list[Any], console: Console
) -> Answers:
    """What a stranger's environment makes of a published file."""
    cwd = path.parent if path.is_file() else path.parent.parent
    result = isolated(python, script, [json.dumps([str(path), asked, NEW_TOKENS])], cwd)
    require_foreign(result)
    names = ", ".join(f"{name} {version}" for name, version in sorted(result["packages"].items()))
    console.print(f"{who}: {names}; no module of this project was loaded", soft_wrap=True)
    answers = result["answers"]
    prompts, said, texts = ([one[key] for one in answers] for key in ("prompt", "tokens", "text"))
    return Answers(who, prompts, said, texts)


def compare(one: Answers, two: Answers) -> str:
    """How many answers and tokens are alike, in words."""
    pairs = list(zip(one.answers, two.answers, strict=True))
    alike = sum(mine == other for mine, other in pairs)
    tokens = sum(
        first == second for mine, other in pairs for first, second in zip(mine, other, strict=False)
    )
    longest = sum(max(len(mine), len(other)) for mine, other in pairs)
    prompts = "" if one.prompts == two.prompts else "; the prompts differ"
    return f"{alike} of {len(pairs)} answers, {tokens} of {longest} tokens{prompts}"


def widest_tie(path: Path, one: Answers, two: Answers) -> float:
    """Over the answers that differ, how far apart in logit the model at ``path`` has the first
    tokens in which they do; infinite where the prompts differ, or where one is only shorter; 0
    where nothing differs."""
    if one.prompts != two.prompts:
        return math.inf
    widest = 0.0
    with GGUFTeacher(path, threads=1) as model:
        for prompt, mine, other in zip(one.prompts, one.answers, two.answers, strict=True):
            if mine == other:
                continue
            common = zip(mine, other, strict=False)
            place = next((at for at, (first, second) in enumerate(common) if first != second), None)
            if place is None:
                return math.inf
            seen = np.array([*prompt, *mine[:place], mine[place]], dtype=np.int32)
            logits = model.logits([seen])[-1]
            widest = max(widest, abs(float(logits[mine[place]] - logits[other[place]])))
    return widest


def check(run: RunFolder, console: Console) -> bool:
    """Make everything anew, ask, compare; whether all that has to be alike is.

    Raises:
        UserError: the run's files are not there.
        subprocess.CalledProcessError: an environment cannot be made, or a script failed in it.
    """
    asked = [[{"role": "user", "content": words}] for words in REQUESTS]
    with tempfile.TemporaryDirectory(prefix="published-") as temporary:
        folder = Path(temporary)
        copy_published(run, folder / "files")
        write_original(run, folder / "files" / "original.gguf")
        files = folder / "files"
        begin = time.perf_counter()
        llama_cpp = make_environment(folder / "llama", "llama-cpp-python")
        transformers = make_environment(folder / "hf", "transformers", "torch")
        console.print(f"environments made in {time.perf_counter() - begin:.0f} s")
        small = theirs(
            "student.gguf elsewhere", llama_cpp, LLAMA_CPP, files / "Modelfile", asked, console
        )
        exact = theirs(
            "F32 file elsewhere", llama_cpp, LLAMA_CPP, files / "original.gguf", asked, console
        )
        plain = theirs(
            "transformers/ elsewhere",
            transformers,
            TRANSFORMERS,
            files / "transformers",
            asked,
            console,
        )
        small_here = ours("student.gguf here", files / "student.gguf", asked)
        exact_here = ours("F32 file here", files / "original.gguf", asked)
        dtype = json.loads((files / "transformers" / "config.json").read_text())["dtype"]
        ties = TIES_F32 if dtype == "float32" else TIES_ROUNDED
        table = Table("one", "other", "alike", "where they part, logits differ by", "")
        passed = True
        for one, two, path, allowed in (
            (small, small_here, "student.gguf", TIES_ROUNDED),
            (exact, exact_here, "original.gguf", TIES_F32),
            (plain, exact, "original.gguf", ties),
            (plain, exact_here, "original.gguf", ties),
            (small, plain, "student.gguf", None),
        ):
            widest = widest_tie(files / path, one, two)
            verdict = "information" if allowed is None else "yes" if widest <= allowed else "NO"
            table.add_row(
                one.who, two.who, compare(one, two), f"{widest:.3f}" if widest else "—", verdict
            )
            passed = passed and verdict != "NO"
    console.print(table)
    for request, text in zip(REQUESTS, plain.texts, strict=True):
        console.print(f"{request!r} → {text!r}", markup=False, highlight=False, soft_wrap=True)
    return passed


def main(run: Annotated[Path, typer.Argument(help="Folder of a finished run.")]) -> None:
    """Check that a run's published files work without this project."""
    console = Console(width=160)
    try:
        passed = check(RunFolder(run), console)
    except UserError as error:
        console.print(one_line(error), markup=False)
        raise typer.Exit(EXIT_USER) from None
    except subprocess.CalledProcessError as error:
        console.print(f"{error}\n{error.stderr or ''}", markup=False)
        raise typer.Exit(EXIT_OURS) from None
    if not passed:
        raise typer.Exit(EXIT_OURS)


if __name__ == "__main__":
    typer.run(main)
