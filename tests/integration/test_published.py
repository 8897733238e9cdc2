"""The published files need no file of this project: plain transformers gives llama.cpp's own
tokens, in a process where nothing of ours can be imported."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from distill.capture.temporary_files.tokenizer_only import metadata_entries
from distill.export.ollama_modelfile import write_modelfile
from distill.export.transformers_folder import publish_plain
from distill.export.transformers_tokenizer import write_plain_tokenizer
from students.gguf.metadata import ExportNames
from students.gguf.writer import write_gguf
from students.model.decoder import SO8TForCausalLM
from students.model.fold import to_llama
from teachers import example_teacher
from teachers.base import GenerationRequest, Sampling
from teachers.gguf.file import Field, read_gguf, tokenizer_fields
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.tokenizer.conversation import conversations_tokens
from tests.support.students import make_student
from tests.support.teachers import LINES, SHARED, different, edited, example_fields, shared_file
from tools.checks.published import (
    LLAMA_CPP,
    OURS,
    TRANSFORMERS,
    Answers,
    compare,
    isolated,
    ours,
    require_foreign,
    widest_tie,
)

pytestmark = pytest.mark.usefixtures("llama_here")
CONVERSATIONS = [
    [{"role": "user", "content": "Please order 4 boxes of gloves at 12 each. The budget is 100."}],
    [{"role": "user", "content": " 手袋を 4 箱、\n一箱 12 で 👍 "}],
    [
        {"role": "user", "content": "What is 12 + 7?"},
        {"role": "assistant", "content": "19."},
        {"role": "user", "content": "def f(x):\n    return x**2"},
    ],
]
TEXTS = ["Once upon a time", "彼は 3 + 4"]
NEW_TOKENS = 12
MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors"}
SHARED_TEACHERS = ("wikiphi-q8_0", "stories260K")


@dataclass(frozen=True)
class Published:
    """A student's plain folder, and what llama.cpp makes of the same student in F32."""

    folder: Path
    fields: dict[str, Field]
    student: SO8TForCausalLM
    gguf: Path
    end_tokens: tuple[int, ...]


def published(fields: Mapping[str, Field], folder: Path, *, tied: bool = True) -> Published:
    """A student with lively weights and this tokenizer."""
    student = make_student(64, 2, len(fields["tokenizer.ggml.tokens"].value), tied=tied)
    gguf = folder / "student.gguf"
    whole = metadata_entries(fields).items()
    entries = {key: entry for key, entry in whole if key.startswith("tokenizer.")}
    write_gguf(student, gguf, "f32", entries, ExportNames("a student", {}))
    with GGUFTeacher(gguf, threads=1) as teacher:
        ends = teacher.info.end_tokens
    written = publish_plain(student, fields, folder / "plain", end_tokens=ends, warn=pytest.fail)
    assert written == (folder / "plain" / "model.safetensors").stat().st_size
    return Published(folder / "plain", dict(fields), student, gguf, ends)


@pytest.fixture(scope="module")
def plains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Published]:
    """Students with a byte-level tokenizer and, where they are, two SentencePiece ones."""
    paths = {"example": example_teacher()}
    shared = {name: SHARED / f"teachers/{name}.gguf" for name in SHARED_TEACHERS}
    paths |= {name: path for name, path in shared.items() if path.exists()}
    found = {}
    for name, path in paths.items():
        fields, folder = tokenizer_fields(read_gguf(path)), tmp_path_factory.mktemp(name)
        found[name] = published(fields, folder, tied=name != "stories260K")
    return found


@pytest.fixture(params=["example", *SHARED_TEACHERS])
def plain(request: pytest.FixtureRequest, plains: dict[str, Published]) -> Published:
    """Each of them."""
    if request.param != "example":
        shared_file(f"teachers/{request.param}.gguf")
    return plains[request.param]


def elsewhere(script: str, *arguments: str, cwd: Path) -> Any:
    """What a script prints in an isolated process that cannot have this project's packages."""
    blocked = (*OURS, "gguf")
    hook = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {blocked!r}:\n"
        "            raise AssertionError(f'{name} is imported')\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    answer = isolated(Path(sys.executable), hook + script, arguments, cwd)
    assert not [name for name in answer["modules"] if name in blocked]
    return answer


def test_the_hook_blocks(tmp_path: Path) -> None:
    """An import of this project fails there, or the tests below would show nothing."""
    names = ["distill", "students.model.decoder", "teachers", "gguf"]
    script = (
        "import importlib, json\n"
        "answers = []\n"
        f"for name in {names}:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except AssertionError:\n"
        "        answers.append(name)\n"
        "print(json.dumps({'answers': answers, 'modules': {}}))\n"
    )
    assert elsewhere(script, cwd=tmp_path)["answers"] == names


def test_plain_transformers_speaks_like_llama_cpp(
    plains: dict[str, Published], tmp_path: Path
) -> None:
    """Through its own chat template and greedily, the very same tokens, end tokens included."""
    template = "tokenizer.chat_template"
    asked = {
        name: CONVERSATIONS if template in one.fields else TEXTS for name, one in plains.items()
    }
    whole = [[str(plain.folder), asked[name], NEW_TOKENS] for name, plain in plains.items()]
    jobs = map(json.dumps, whole)
    answers = iter(elsewhere(TRANSFORMERS, *jobs, cwd=tmp_path)["answers"])
    for name, plain in plains.items():
        with GGUFTeacher(plain.gguf, threads=1) as teacher:
            if asked[name] is TEXTS:
                prompts = teacher.tokenize(TEXTS, add_special=True, parse_special=True)
            else:
                prompts = conversations_tokens(teacher, CONVERSATIONS, answer=True)
            for prompt in prompts:
                answer = next(answers)
                assert answer["prompt"] == prompt.tolist()
                sampling = Sampling(temperature=0.0, max_length=len(prompt) + NEW_TOKENS)
                (said,) = teacher.generate(GenerationRequest([[prompt]], sampling))
                assert answer["tokens"] == said[len(prompt) :].tolist() and answer["tokens"]
    assert next(answers, None) is None


def test_the_modelfiles_weights_speak_the_same_without_this_project(
    plains: dict[str, Published], tmp_path: Path
) -> None:
    """llama-cpp-python alone finds the file through the Modelfile and renders its template."""
    plain = plains["example"]
    folder = tmp_path / "else where"
    folder.mkdir()
    gguf = folder / "my student.gguf"
    gguf.write_bytes(plain.gguf.read_bytes())
    options = {"end_tokens": plain.end_tokens, "context_length": 256}
    write_modelfile(folder / "Modelfile", gguf, plain.fields, **options)
    job = json.dumps([str(folder / "Modelfile"), CONVERSATIONS, NEW_TOKENS])
    found = elsewhere(LLAMA_CPP, job, cwd=tmp_path)["answers"]
    parts = [[one[key] for one in found] for key in ("prompt", "tokens", "text")]
    theirs = Answers("theirs", *parts)
    mine = ours("mine", plain.gguf, CONVERSATIONS)
    assert theirs.prompts == mine.prompts
    # Tokens may be as good as equally probable: the two keep their caches in other formats.
    cut = Answers("cut", mine.prompts, [said[:NEW_TOKENS] for said in mine.answers], mine.texts)
    assert widest_tie(plain.gguf, theirs, cut) < 0.02


def test_differences_are_counted_and_weighed(plains: dict[str, Published]) -> None:
    """Where answers part: how far apart the model itself has the two tokens."""
    path = plains["example"].gguf
    prompt = [0, 1, 70, 71]
    with GGUFTeacher(path, threads=1) as teacher:
        logits = teacher.logits([np.array([*prompt, 9, 9], dtype=np.int32)])[-1]
    one = Answers("one", [prompt, prompt], [[9, 80, 7], [5]], ["", ""])
    two = Answers("two", [prompt, prompt], [[9, 90, 7], [5]], ["", ""])
    assert widest_tie(path, one, one) == 0.0
    between = abs(float(logits[80] - logits[90]))
    assert widest_tie(path, one, two) == pytest.approx(between, abs=1e-3)
    assert compare(one, two) == "1 of 2 answers, 3 of 4 tokens"
    shorter = Answers("shorter", two.prompts, [[9, 80], [5]], ["", ""])
    assert widest_tie(path, one, shorter) == np.inf
    asked_otherwise = Answers("other", [prompt, prompt[:-1]], one.answers, one.texts)
    assert widest_tie(path, one, asked_otherwise) == np.inf
    assert compare(one, asked_otherwise).endswith("the prompts differ")


def test_an_environment_with_this_project_in_it_is_refused() -> None:
    """By name, by file, and installed."""
    require_foreign({"modules": {"json": json.__file__, "sys": None}, "packages": {"numpy": "2"}})
    for modules, packages in (
        ({"distill": None}, {}),
        ({"other": str(Path(__file__).parents[1] / "conftest.py")}, {}),
        ({}, {"so8t_distill": "0.1.0"}),
    ):
        with pytest.raises(RuntimeError, match="not a stranger's"):
            require_foreign({"modules": modules, "packages": packages})
            pytest.fail(f"{modules}, {packages} are taken")


def test_the_folders_tokenizer_has_the_teachers_ids(plain: Published) -> None:
    """A thousand lines of mixed English, Japanese, code, emoji and odd spaces."""
    loaded = AutoTokenizer.from_pretrained(plain.folder)
    assert type(loaded) is PreTrainedTokenizerFast
    with GGUFTeacher(plain.gguf, threads=1) as teacher:
        assert len(LINES) == 1000 and different(loaded, teacher, LINES) == []


def test_what_is_in_the_folder(plain: Published) -> None:
    """Nothing but plain files, of a plain Llama, in float32, with the ids of the tokenizer."""
    names = {path.name for path in plain.folder.iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    chat = {"chat_template.jinja"} if "tokenizer.chat_template" in plain.fields else set()
    assert names == MODEL_FILES | tokenizer | chat
    config = json.loads((plain.folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert config["dtype"] == "float32" and "auto_map" not in config
    generation = json.loads((plain.folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == sorted(plain.end_tokens)
    said = plain.fields
    bos, eos = (said[f"tokenizer.ggml.{one}_token_id"].value for one in ("bos", "eos"))
    assert config["bos_token_id"] == generation["bos_token_id"] == bos
    special = json.loads((plain.folder / "special_tokens_map.json").read_text())
    tokens = said["tokenizer.ggml.tokens"].value
    assert (special["bos_token"], special["eos_token"]) == (tokens[bos], tokens[eos])


def test_generation_stops_at_every_end_token(tmp_path: Path) -> None:
    """A student that can say nothing but one of them says it once."""
    fields = example_fields()
    for number, end in enumerate((0, 4)):
        student = make_student(64, 1, 1024, tied=False)
        with torch.no_grad():
            weight = student.lm_head.weight
            weight.zero_()
            weight[end, :] = 1.0
            student.model.norm.weight.fill_(1.0)
            for layer in student.model.layers:
                layer.mlp.down_proj.weight.zero_()
                layer.self_attn.o_proj.weight.zero_()
            student.model.embed_tokens.weight.fill_(0.5)
        folder = tmp_path / str(number)
        publish_plain(student, fields, folder, end_tokens=(0, 4))
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        assert model.generate(torch.tensor([[7, 8]]), max_new_tokens=5).tolist() == [[7, 8, end]]


def test_a_tokenizer_that_cannot_be_carried_over_is_left_out(tmp_path: Path) -> None:
    """With the reason; the model is there all the same, and stops where it should."""
    fields = edited(example_fields(), pre="unheard-of")
    student = make_student(64, 2, 1024)
    said: list[str] = []
    folder = tmp_path / "plain"
    assert publish_plain(student, fields, folder, end_tokens=(4, 0), warn=said.append) > 0
    assert len(said) == 1 and "no tokenizer" in said[0] and "unheard-of" in said[0]
    names = {path.name for path in folder.iterdir()}
    assert names == MODEL_FILES
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_weights_are_the_folded_ones(plain: Published) -> None:
    """To the last bit, and the same bytes every time."""
    found = safetensors.torch.load_file(plain.folder / "model.safetensors")
    expected = to_llama(plain.student).state_dict()
    tied = plain.student.config.tie_word_embeddings
    assert set(found) == {name for name in expected if not (tied and name == "lm_head.weight")}
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
    first = {path.name: path.read_bytes() for path in plain.folder.iterdir()}
    publish_plain(plain.student, plain.fields, plain.folder, end_tokens=plain.end_tokens)
    assert {path.name: path.read_bytes() for path in plain.folder.iterdir()} == first


def test_one_bos_through_the_chat_template(tmp_path: Path) -> None:
    """Where llama.cpp puts one, and none more."""
    turn = "{% for m in messages %}{{ '<|user|>' + m.content }}{% endfor %}"
    bos, asked = "<|endoftext|>", [{"role": "user", "content": "hi"}]
    for template, add_bos, bosses in (
        (turn, True, 1),
        (turn, False, 0),
        ("{{ bos_token }}" + turn, True, 1),
        (bos + turn, True, 1),
        ("{{ bos_token }}" + turn, False, 1),
        (" \t" + turn, True, 1),
        (" {{- '' }}" + turn, True, 1),
    ):
        fields = edited(example_fields(), chat_template=template, add_bos_token=add_bos)
        write_plain_tokenizer(fields, tmp_path)
        loaded: Any = AutoTokenizer.from_pretrained(tmp_path)
        said = loaded.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert said == bos * bosses + "<|user|>hi", (template, add_bos)
        ids = loaded.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        assert np.count_nonzero(np.array(ids) == 0) == bosses, (template, add_bos)
