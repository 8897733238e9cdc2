"""Modelfiles: what Ollama reads in them, and that its template gives what the chat template gives, letter by letter."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType

from distill.chat_segments import ORDINARY, UNUSUAL, placeholders
from distill.modelfile import adds_bos, literal, modelfile, stop_words, write_modelfile
from teachers import example_teacher
from teachers.chat_template import ChatTemplateError, render_chat
from teachers.gguf_file import Field, read_gguf
from teachers.gguf_teacher import GGUFTeacher
from tests.conftest import shared_file
from tests.ollama import GoTemplate, fill_in, read_modelfile
from tests.test_tokenizer_json import edited

Messages = list[dict[str, str]]

# Written for these tests in the manner of well-known families.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
LLAMA2 = """{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set sys = messages[0].content %}
{%- else %}{% set rest = messages %}{% set sys = false %}{% endif %}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}
{%- if loop.index0 == 0 and sys is not false %}{% set words = '<<SYS>>\n' + sys + '\n<</SYS>>\n\n' + m.content %}
{%- else %}{% set words = m.content %}{% endif %}
{%- if m.role == 'user' %}{{ bos_token + '[INST] ' + words.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + words.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ '<|system|>\n' + m.content + '<|end|>\n' }}"
    "{% elif m.role == 'user' %}{{ '<|user|>\n' + m.content + '<|end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|assistant|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3 = """{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}
{%- set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}
{{- m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
ZEPHYR = (
    "{% for m in messages %}\n{% if m.role == 'user' %}\n{{ '<|user|>\n' + m.content + eos_token }}\n"
    "{% elif m.role == 'system' %}\n{{ '<|system|>\n' + m.content + eos_token }}\n"
    "{% elif m.role == 'assistant' %}\n{{ '<|assistant|>\n' + m.content + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
MISTRAL = """{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}
{{- bos_token }}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}
{%- if m.role == 'user' %}
{%- if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}
{%- else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""
DEEPSEEK = """{{ bos_token }}{% set ns = namespace(system='') %}
{%- for m in messages if m.role == 'system' %}{% set ns.system = ns.system + m.content %}{% endfor %}
{{- ns.system }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"""
QWEN_THINK = """{% set ns = namespace(last=0) %}
{%- for m in messages if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' and loop.last %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] }}{% endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
ALPACA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}"
    "{% elif m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
AWKWARD = (  # everything that one of the two languages means something by
    '{% for m in messages %}{{ \'{{ .System }}{"""\' + m.role + \'"" {{- \\\\ }}\\u3000{\' + m.content }}'
    "{{ '\\u200b\"\"\"\"\r\n \\t' }}{% endfor %}{{ '{' if add_generation_prompt }}"
)
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>", ["<|im_end|>", "<|im_start|>user"]),
    "chatml with a default": (CHATML_DEFAULT, "<|im_end|>", ["<|im_end|>", "<|im_start|>user"]),
    "llama 2": (LLAMA2, "</s>", ["</s>", "[INST]"]),
    "llama 3": (LLAMA3, "<|eot_id|>", ["<|eot_id|>", "<|start_header_id|>user<|end_header_id|>"]),
    "phi 3": (PHI3, "<|end|>", ["<|end|>", "<|user|>"]),
    "gemma": (GEMMA, "<end_of_turn>", ["<end_of_turn>", "<start_of_turn>user"]),
    "gemma 3": (GEMMA3, "<end_of_turn>", ["<end_of_turn>", "<start_of_turn>user"]),
    "zephyr": (ZEPHYR, "</s>", ["</s>", "<|user|>"]),
    "mistral": (MISTRAL, "</s>", ["</s>", "[INST]"]),
    "deepseek": (DEEPSEEK, "<eos>", ["<eos>", "<｜User｜>"]),
    "qwen with thoughts": (QWEN_THINK, "<|im_end|>", ["<|im_end|>", "<|im_start|>user"]),
    "alpaca": (ALPACA, "</s>", ["</s>", "\n\n### Instruction:"]),
    "awkward": (AWKWARD, "<end>", ["<end>"]),
}
TRIMS = ("llama 2", "llama 3", "gemma", "gemma 3")
THINKS = ("deepseek", "qwen with thoughts")
# A system message in the middle goes to the front, or is written as if the assistant had said it.
UNORDINARY = ("deepseek", "llama 2", "gemma 3", "mistral")
BOS = "<s>"
END_ID = 2


def fields_of(template: str | None, end: str, *, add_bos: bool = True, **values: Any) -> dict[str, Field]:
    """A GGUF file's metadata: a tokenizer of a few control tokens and some plain ones."""
    special = [
        *(
            "<unk>",
            BOS,
            end,
            "<|im_start|>",
            "<|start_header_id|>",
            "<|user|>",
            "<start_of_turn>",
            "<｜User｜>",
        )
    ]
    tokens = [*special, "a", "b", "user", "[INST]"]
    return edited(
        {},
        tokens=tokens,
        token_type=[3] * len(special) + [1] * 4,
        bos_token_id=1,
        eos_token_id=END_ID,
        add_bos_token=add_bos,
        chat_template=template,
        **{"model": "gpt2", **values},
    )


def made(
    fields: Mapping[str, Field], *, ends: tuple[int, ...] = (END_ID,)
) -> tuple[dict[str, Any], list[str]]:
    """What Ollama reads in the Modelfile, and the warnings."""
    text, notes = modelfile("student.gguf", fields, end_tokens=ends, context_length=512, name="student")
    commands = read_modelfile(text.encode("utf-8"))
    found: dict[str, Any] = {"stop": [value for name, value in commands if name == "stop"]}
    found |= {name: value for name, value in commands if name != "stop"}
    assert len(commands) == len(found) - 1 + len(found["stop"])
    return found, notes


def expected(template: str, messages: Messages, end: str, *, add_bos: bool) -> str | None:
    """What the chat template gives, without the BOS that the runtime puts in front."""
    try:
        text = render_chat(template, messages, add_generation_prompt=True, bos=BOS, eos=end)
    except ChatTemplateError:
        return None
    return text[len(BOS) :] if add_bos and text.startswith(BOS) else text


def compared(
    fields: Mapping[str, Field], template: str, end: str, orders: Any, add_bos: bool
) -> tuple[int, int]:
    """How many conversations the chat template accepts, and of how many Ollama's prompt is another."""
    found, _ = made(fields)
    accepted = wrong = 0
    for number, order in enumerate(orders):
        draw = random.Random(number)
        said = [
            "Grüße, 東京! 👍",
            "two\n\nparagraphs",
            "x = {'a': \"b\"}",
            "{{ .Content }} <|user|>",
            "0",
            "-",
        ]
        messages = [
            {"role": role, "content": f"{draw.choice(said)}{place}"} for place, role in enumerate(order)
        ]
        text = expected(template, messages, end, add_bos=add_bos)
        if text is not None:
            accepted += 1
            wrong += fill_in(found["template"], messages) != text
    return accepted, wrong


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ollamas_prompt_is_the_chat_templates(name: str, add_bos: bool) -> None:
    """In every order that the chat template accepts and that waits for an answer, two of three turns more than seen."""
    template, end, _ = TEMPLATES[name]
    fields = fields_of(template, end, add_bos=add_bos)
    longer = [
        tuple(order)
        for order in (["user", *["assistant", "user"] * 4], ["system", "user", *["assistant", "user"] * 4])
    ]
    accepted, wrong = compared(fields, template, end, [*ORDINARY, *longer], add_bos)
    assert accepted >= (4 if name == "gemma" else 8) and wrong == 0
    refused = ("system",) if name == "gemma" else ()
    waiting = [order for order in UNUSUAL if order[-1] == "user" and not set(refused) & set(order)]
    accepted, wrong = compared(fields, template, end, waiting, add_bos)
    assert (wrong > 0) == (name in UNORDINARY)
    if name not in (*THINKS, *UNORDINARY):
        rest = [order for order in UNUSUAL if order[-1] != "user"]
        assert compared(fields, template, end, rest, add_bos)[1] == 0 or refused


def test_no_more_context_is_asked_for_than_memory_is_there_for() -> None:
    """Ollama takes memory for all of num_ctx, so a model of a very long context does not ask for it."""
    template, end, _ = TEMPLATES["chatml"]
    text, _ = modelfile(
        "student.gguf", fields_of(template, end), end_tokens=[], context_length=131_072, name="student"
    )
    assert "PARAMETER num_ctx 8192\n" in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_said_about_it(name: str) -> None:
    """Stop words, the file, the context, and a warning exactly where the chat template does more."""
    template, end, stops = TEMPLATES[name]
    found, notes = made(fields_of(template, end))
    assert found["stop"] == stops
    assert (found["from"], found["num_ctx"]) == ("./student.gguf", "512")
    assert any("white space" in note for note in notes) == (name in TRIMS)
    assert any("thoughts" in note for note in notes) == (name in THINKS)
    assert any("refuses system" in note for note in notes) == (name == "gemma")
    assert any("reads otherwise" in note for note in notes) == (name in UNORDINARY)
    assert not any("leaves system" in note for note in notes)


def test_the_first_turn_alone_in_full() -> None:
    """Written out by hand, so that the evaluator and the module cannot be wrong together."""
    found, _ = made(fields_of(CHATML, "<|im_end|>"))
    assert found["template"] == (
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )
    found, _ = made(fields_of(LLAMA2, "</s>"))
    said = fill_in(found["template"], [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    assert said == "[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST]"
    found, _ = made(fields_of(MISTRAL, "</s>"))
    roles = zip(("system", "user", "assistant", "user"), "SUAV", strict=True)
    said = fill_in(found["template"], [{"role": role, "content": words} for role, words in roles])
    assert said == "[INST] U[/INST] A</s>[INST] S\n\nV[/INST]"


def test_a_refused_system_message_goes_before_the_users_words() -> None:
    """Not lost: the first paragraph of the turn it stands before, also in the middle."""
    found, _ = made(fields_of(GEMMA, "<end_of_turn>"))

    def said(*roles: str) -> str:
        return fill_in(found["template"], [{"role": role, "content": role[0]} for role in roles])

    turn = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
    assert said("system", "user") == turn.format("s\n\nu")
    assert said("user") == said("user", "assistant", "user")[: len(said("user"))] == turn.format("u")
    middle = turn.format("u") + "a<end_of_turn>\n" + turn.format("s\n\nu")
    assert said("user", "assistant", "system", "user") == middle
    assert said("user", "system", "assistant", "user") == turn.format(
        "u\n\ns"
    ) + "a<end_of_turn>\n" + turn.format("u")
    assert said("system") == turn.format("s")


def test_without_a_chat_template_the_prompt_stands_alone() -> None:
    """As for any base model."""
    found, notes = made(fields_of(None, "</s>"))
    assert (found["template"], found["stop"], notes) == ("{{ .Prompt }}", ["</s>"], [])
    assert GoTemplate(found["template"]).execute({"Prompt": "Once"}) == "Once"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('never') }}",
        "{{ broken",
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{{ messages[-1].content }}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "\udcff{% for m in messages %}{{ m.content }}{% endfor %}",
    ],
)
def test_no_template_where_none_is_right(template: str) -> None:
    """Rather none than a wrong one, and it is said."""
    text, notes = modelfile("s.gguf", fields_of(template, "</s>"), end_tokens=[2], context_length=9, name="s")
    assert len(notes) == 1 and "cannot be written" in notes[0] and f"# Note: {notes[0]}." in text.splitlines()
    assert {name for name, _ in read_modelfile(text.encode("utf-8"))} == {"from", "stop", "num_ctx"}


def test_stop_words() -> None:
    """Every end token once, none empty, quoted so that they come back."""
    odd = ["", "</s>", "a b", 'say "', '"""', "two\nlines", 'x"\ny', "\u3000", " ", "</s>"]
    fields = edited(fields_of(None, "</s>"), tokens=odd, token_type=[3] * len(odd), bos_token_id=None)
    found, notes = made(fields, ends=tuple(range(1, len(odd))))
    assert found["stop"] == ["</s>", "a b", 'say "', "two\nlines", 'x"\ny']
    assert len(notes) == 1 and '\'"""\'' in notes[0]
    both = edited({}, tokens=["<|e", "<|e|>"], token_type=[3, 3])
    assert stop_words(both, (0, 1), "<|e|>Q: ")[0] == ["<|e", "<|e|>", "Q:"]
    bare = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    assert made(fields_of(bare, "</s>"))[0]["stop"] == ["</s>"]
    lines = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{{ 'assistant:' }}"
    assert made(fields_of(lines, "</s>"))[0]["stop"] == ["</s>", "\nuser:"]


def test_literal_text_survives_both_languages() -> None:
    """Random texts of everything that either language might take for its own."""
    draw = random.Random(0)
    parts = [
        "{",
        "}",
        "{{",
        "}}",
        '"',
        '""',
        "\\",
        "-",
        "- ",
        " -",
        " ",
        "\n",
        "\t",
        "\r",
        "\u3000",
        "\u200b",
        "a",
        "#",
        "😀",
    ]
    for _ in range(3000):
        text = "".join(draw.choices(parts, k=draw.randint(0, 9)))
        source = f'FROM x\nTEMPLATE """{{{{ .A }}}}{literal(text)}{{{{ .A }}}}"""\n'
        (_, template) = read_modelfile(source.encode("utf-8"))[1]
        assert GoTemplate(template).execute({"A": "|"}) == f"|{text}|", text
        alone = f'FROM x\nTEMPLATE """{literal(text)}"""\n'
        assert GoTemplate(read_modelfile(alone.encode("utf-8"))[1][1]).execute({}) == text


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"add_bos_token": True}, True),
        ({"add_bos_token": False, "model": "llama"}, False),
        ({"model": "llama"}, True),
        ({"model": "gpt2"}, False),
        ({"model": "gpt2", "pre": "qwen2"}, False),
        ({"model": "gpt2", "pre": "llama-bpe"}, True),
        ({"model": "gpt2", "pre": "unheard-of"}, False),
    ],
)
def test_who_adds_bos(values: dict[str, Any], wanted: bool) -> None:
    """As the file says, or as llama.cpp takes it."""
    assert adds_bos(edited({}, **values)) is wanted


@pytest.mark.parametrize("name", ["", "wikiphi-q8_0", "stories260K"])
def test_real_teachers(tmp_path: Path, name: str) -> None:
    """The prompt as llama.cpp tokenises it for Ollama is what this project itself gives the model."""
    from teachers.conversation import conversations_tokens

    path = shared_file(f"teachers/{name}.gguf") if name else example_teacher()
    with GGUFTeacher(path, threads=1) as teacher:
        fields = read_gguf(path).fields
        notes = write_modelfile(
            tmp_path / "Modelfile",
            tmp_path / "Student.gguf",
            fields,
            end_tokens=teacher.info.end_tokens,
            context_length=teacher.info.context_length,
        )
        commands = read_modelfile((tmp_path / "Modelfile").read_bytes())
        template = dict(commands)["template"]
        stops = [value for command, value in commands if command == "stop"]
        ends = {teacher.detokenize([[token]])[0] for token in teacher.info.end_tokens}  # type: ignore[list-item]
        assert ends <= set(stops) and len(stops) == len(set(stops))
        if name == "stories260K":
            assert template == "{{ .Prompt }}" and notes == []
            return
        assert stops[-1] == "<|user|>"
        assert len(notes) == (1 if name else 0)  # wikiphi's leaves system messages out
        conversations = [placeholders(order) for order in (*ORDINARY, *UNUSUAL) if order[-1] == "user"]
        prompts = [fill_in(template, messages) for messages in conversations]
        theirs = teacher.tokenize(prompts, add_special=True, parse_special=True)
        ours = conversations_tokens(teacher, conversations, answer=True)
        assert [row.tolist() for row in theirs] == [row.tolist() for row in ours]


def test_the_file(tmp_path: Path) -> None:
    """Where the weights are, what they are called, and the licence; nothing of an interrupted write stays."""
    fields = fields_of(CHATML, "<|im_end|>") | {
        "general.license": Field('MIT "as is"', GGUFValueType.STRING, None)
    }
    folder = tmp_path / "a folder"
    folder.mkdir()
    write_modelfile(
        tmp_path / "Modelfile", folder / "My student.gguf", fields, end_tokens=[2], context_length=64
    )
    commands = dict(read_modelfile((tmp_path / "Modelfile").read_bytes()))
    assert commands["from"] == "./a folder/My student.gguf" and commands["license"] == 'MIT "as is"'
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["Modelfile"]


def test_gos_trimming() -> None:
    """The evaluator of these tests against what Go's documentation says."""
    assert GoTemplate('{{ "23" -}} < {{- "45" }}').execute({}) == "23<45"
    assert GoTemplate("a \n{{- if .A }} b {{ else -}}\n c {{ end }} d").execute({"A": ""}) == "ac  d"
    loop = '{{ $seen := "" }}{{ range $i, $m := .M }}{{ if eq $i 1 }}{{ $seen = $m.R }}{{ end }}{{ end }}{{ $seen }}'
    assert GoTemplate(loop).execute({"M": [{"R": "a"}, {"R": "b"}, {"R": "c"}]}) == "b"
    assert (
        GoTemplate("{{ if and .A (eq (len (slice .M 1)) 2) }}x{{ end }}").execute({"A": "1", "M": "abc"})
        == "x"
    )
    assert list(itertools.pairwise("abc")) == [("a", "b"), ("b", "c")]
