"""Modelfiles: what Ollama reads in them, and that its template gives the chat template's text."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType

from distill.export.ollama_modelfile import (
    adds_bos,
    literal,
    modelfile,
    stop_sequences,
    write_modelfile,
)
from distill.export.ollama_template import ORDINARY, UNUSUAL, placeholders
from teachers import example_teacher
from teachers.gguf.file import Field, read_gguf
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.tokenizer.chat_template import ChatTemplateError, render_chat
from teachers.tokenizer.conversation import conversations_tokens
from tests.support.chat_templates import FAMILIES, family
from tests.support.ollama import GoTemplate, fill_in, read_modelfile
from tests.support.real import real_teacher
from tests.support.teachers import edited, shared_file

Messages = list[dict[str, str]]


def template(name: str) -> str:
    """One of ``chat_templates``, written for these tests in the manner of a well-known family."""
    path = Path(__file__).parent / "chat_templates" / f"{name}.jinja"
    return path.read_text(encoding="utf-8").removesuffix("\n")


AWKWARD = (  # everything that one of the two languages means something by
    '{% for m in messages %}{{ \'{{ .System }}{"""\' + m.role + '
    "'\"\" {{- \\\\ }}\\u3000{' + m.content }}"
    "{{ '\\u200b\"\"\"\"\r\n \\t' }}{% endfor %}{{ '{' if add_generation_prompt }}"
)
STOPS = {  # what ends an answer, and what starts the user's turn
    "chatml": ["<|im_end|>", "<|im_start|>user"],
    "chatml_default": ["<|im_end|>", "<|im_start|>user"],
    "llama2": ["</s>", "[INST]"],
    "llama3": ["<|eot_id|>", "<|start_header_id|>user<|end_header_id|>"],
    "phi3": ["<|end|>", "<|user|>"],
    "gemma": ["<end_of_turn>", "<start_of_turn>user"],
    "gemma3": ["<end_of_turn>", "<start_of_turn>user"],
    "zephyr": ["</s>", "<|user|>"],
    "mistral": ["</s>", "[INST]"],
    "deepseek": ["<eos>", "<｜User｜>"],
    "qwen_think": ["<|im_end|>", "<|im_start|>user"],
    "alpaca": ["</s>", "\n\n### Instruction:"],
}
TEMPLATES = {name: (template(name), stops[0], stops) for name, stops in STOPS.items()}
TEMPLATES["awkward"] = (AWKWARD, "<end>", ["<end>"])
CHATML, GEMMA, LLAMA2, MISTRAL = map(template, ("chatml", "gemma", "llama2", "mistral"))
TRIMS = ("llama2", "llama3", "gemma", "gemma3")
THINKS = ("deepseek", "qwen_think")
# A system message in the middle goes to the front, or is written as if the assistant had said it.
UNORDINARY = ("deepseek", "llama2", "gemma3", "mistral")
BOS, END_ID = "<s>", 2
# Words that one of the two languages might take for its own.
SAID = (
    "Grüße, 東京! 👍",
    "two\n\nparagraphs",
    "x = {'a': \"b\"}",
    "{{ .Content }} <|user|>",
    "0",
    "-",
)


def fields_of(
    template: str | None, end: str, *, add_bos: bool = True, **values: Any
) -> dict[str, Field]:
    """A GGUF file's metadata: a tokenizer of a few control tokens and some plain ones."""
    others = ["<|im_start|>", "<|start_header_id|>", "<|user|>", "<start_of_turn>", "<｜User｜>"]
    special = ["<unk>", BOS, end, *others]
    tokens = [*special, "a", "b", "user", "[INST]"]
    ids = {"bos_token_id": 1, "eos_token_id": END_ID, "add_bos_token": add_bos}
    kinds = [3] * len(special) + [1] * 4
    values = {"model": "gpt2", "tokens": tokens, "token_type": kinds, **ids, **values}
    return edited({}, chat_template=template, **values)


def written(
    fields: Mapping[str, Field], *, ends: Sequence[int] = (END_ID,), context_length: int = 512
) -> tuple[str, list[str]]:
    """The Modelfile, and the warnings."""
    name, length = "student.gguf", context_length
    return modelfile(name, fields, end_tokens=ends, context_length=length, name="student")


def made(fields: Mapping[str, Field], **options: Any) -> tuple[dict[str, Any], list[str]]:
    """What Ollama reads in the Modelfile, and the warnings."""
    text, notes = written(fields, **options)
    commands = read_modelfile(text.encode("utf-8"))
    found: dict[str, Any] = {"stop": [value for name, value in commands if name == "stop"]}
    found |= {name: value for name, value in commands if name != "stop"}
    assert len(commands) == len(found) - 1 + len(found["stop"])
    return found, notes


def expected(template: str, messages: Messages, end: str, *, add_bos: bool) -> str | None:
    """What the chat template gives, without the BOS that the runtime puts in front."""
    try:
        text = render_chat(template, messages, add_generation_prompt=True, bos=BOS, eos=end).text
    except ChatTemplateError:
        return None
    return text[len(BOS) :] if add_bos and text.startswith(BOS) else text


def talk(roles: Iterable[str], words: Iterable[str]) -> Messages:
    """A conversation."""
    return [{"role": role, "content": one} for role, one in zip(roles, words, strict=True)]


def compared(name: str, orders: Iterable[Sequence[str]], add_bos: bool) -> tuple[int, int]:
    """How many orders a chat template accepts, and of how many Ollama's prompt is another."""
    template, end, _ = TEMPLATES[name]
    found, _ = made(fields_of(template, end, add_bos=add_bos))
    accepted = wrong = 0
    for number, order in enumerate(orders):
        draw = random.Random(number)
        messages = talk(order, [f"{draw.choice(SAID)}{place}" for place, _ in enumerate(order)])
        text = expected(template, messages, end, add_bos=add_bos)
        if text is not None:
            accepted += 1
            wrong += fill_in(found["template"], messages) != text
    return accepted, wrong


@pytest.mark.parametrize("add_bos", [True, False])
def test_ollamas_prompt_is_the_chat_templates(add_bos: bool) -> None:
    """In every order that the chat template accepts and that waits for an answer, two of three
    turns more than seen."""
    turns = ["user", *["assistant", "user"] * 4]
    for name in TEMPLATES:
        accepted, wrong = compared(name, [*ORDINARY, turns, ["system", *turns]], add_bos)
        assert accepted >= (4 if name == "gemma" else 8) and wrong == 0, name
        refused = {"system"} if name == "gemma" else set()
        waiting = [order for order in UNUSUAL if order[-1] == "user" and not refused & {*order}]
        assert (compared(name, waiting, add_bos)[1] > 0) == (name in UNORDINARY), name
        if name not in (*THINKS, *UNORDINARY, "gemma"):
            rest = [order for order in UNUSUAL if order[-1] != "user"]
            assert compared(name, rest, add_bos)[1] == 0, name


ENDS = {  # of the families that transformers' rendering is tested with
    "chatml_bos": "<|im_end|>",
    "command_r": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "gemma3": "<end_of_turn>",
    "granite": "<|end_of_text|>",
    "hermes": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "phi3": "<|end|>",
    "phi4": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "smollm": "<|im_end|>",
    "zephyr": "</s>",
}
ORDINARY_ANSWERS = (
    "The user and the assistant said: user: hi\nassistant: ho\nUSER: system",
    "### Steps\n\n1. `[x for x in y if x < 3]`\n\n## End\n\n> quote | [1] <b>bold</b>\n\nQ: A:",
)


def test_stops_end_a_turn_and_nothing_else() -> None:
    """Each stands between an answer and the next user's words, none in an ordinary answer, also
    where what begins every turn is the BOS; the template gives the chat template's text."""
    families = {name: (family(name), end) for name, end in ENDS.items()}
    assert set(FAMILIES) == set(families)
    families |= {f"simple {name}": TEMPLATES[name][:2] for name in STOPS}
    messages = talk(("user", "assistant", "user"), ("Go on?", "Yes, on.", "And then?"))
    for name, (text, end) in families.items():
        start = "<|im_start|>" if name == "chatml_bos" else BOS
        tokens = ["<unk>", start, end, "a", "user", "assistant", ","]
        kinds = [3, 3, 3, 1, 1, 1, 1]
        given = {"add_bos": True, "tokens": tokens, "token_type": kinds}
        found, _ = made(fields_of(text, end, **given), ends=[END_ID, 6])
        shown = render_chat(text, messages, add_generation_prompt=True, bos=start, eos=end).text
        assert fill_in(found["template"], messages) == shown.removeprefix(start), name
        between = shown.partition("Yes, on.")[2].partition("And then?")[0]
        turns = [stop for stop in found["stop"] if stop != end or end in shown]  # alpaca has none
        assert turns and all(stop in between for stop in turns), (name, turns)
        for answer in ORDINARY_ANSWERS:
            assert not any(stop in answer for stop in found["stop"]), (name, found["stop"])


def test_what_is_said_about_it() -> None:
    """Stop words, the file, the context, and a warning where the chat template does more."""
    warned = {
        "white space": TRIMS,
        "thoughts": THINKS,
        "refuses system": ("gemma",),
        "reads otherwise": UNORDINARY,
        "leaves system": (),
    }
    for name, (template, end, stops) in TEMPLATES.items():
        found, notes = made(fields_of(template, end))
        assert found["stop"] == stops, name
        assert (found["from"], found["num_ctx"]) == ("./student.gguf", "512"), name
        for words, names in warned.items():
            assert any(words in note for note in notes) == (name in names), (name, notes)
    # Ollama takes memory for all of num_ctx, so a model of a very long context does not ask for it.
    text, _ = written(fields_of(CHATML, "<|im_end|>"), ends=[], context_length=131_072)
    assert "PARAMETER num_ctx 8192\n" in text


def test_the_first_turn_alone_in_full() -> None:
    """Written out by hand, so that the evaluator and the module cannot be wrong together."""
    found, _ = made(fields_of(CHATML, "<|im_end|>"))
    assert found["template"] == (
        "{{ range .Messages }}"
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )
    found, _ = made(fields_of(LLAMA2, "</s>"))
    said = fill_in(found["template"], talk(("system", "user"), "SU"))
    assert said == "[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST]"
    found, _ = made(fields_of(MISTRAL, "</s>"))
    said = fill_in(found["template"], talk(("system", "user", "assistant", "user"), "SUAV"))
    assert said == "[INST] U[/INST] A</s>[INST] S\n\nV[/INST]"


def test_a_refused_system_message_goes_before_the_users_words() -> None:
    """Not lost: the first paragraph of the turn it stands before, also in the middle."""
    found, _ = made(fields_of(GEMMA, "<end_of_turn>"))

    def said(*roles: str) -> str:
        return fill_in(found["template"], talk(roles, [role[0] for role in roles]))

    turn = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
    assert said("system", "user") == turn.format("s\n\nu")
    assert said("user") == turn.format("u")
    assert said("user", "assistant", "user").startswith(turn.format("u"))
    middle = turn.format("u") + "a<end_of_turn>\n" + turn.format("s\n\nu")
    assert said("user", "assistant", "system", "user") == middle
    middle = turn.format("u\n\ns") + "a<end_of_turn>\n" + turn.format("u")
    assert said("user", "system", "assistant", "user") == middle
    assert said("system") == turn.format("s")


def test_no_template_where_none_is_right() -> None:
    """Rather none than a wrong one, and it is said; without a chat template the prompt alone."""
    found, notes = made(fields_of(None, "</s>"))
    assert (found["template"], found["stop"], notes) == ("{{ .Prompt }}", ["</s>"], [])
    assert GoTemplate(found["template"]).execute({"Prompt": "Once"}) == "Once"
    for template in (
        "{{ raise_exception('never') }}",
        "{{ broken",
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{{ messages[-1].content }}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "\udcff{% for m in messages %}{{ m.content }}{% endfor %}",
    ):
        text, notes = written(fields_of(template, "</s>"))
        assert len(notes) == 1 and "cannot be written" in notes[0], ascii(template)
        assert f"# Note: {notes[0]}." in text.splitlines(), ascii(template)
        commands = {name for name, _ in read_modelfile(text.encode("utf-8"))}
        assert commands == {"from", "stop", "num_ctx"}, ascii(template)


def test_stop_sequences() -> None:
    """Every end token once, none empty, quoted so that they come back."""
    odd = ["", "</s>", "a b", 'say "', '"""', "two\nlines", 'x"\ny', "\u3000", " ", "</s>"]
    fields = fields_of(None, "</s>", tokens=odd, token_type=[3] * len(odd), bos_token_id=None)
    found, notes = made(fields, ends=tuple(range(1, len(odd))))
    assert found["stop"] == ["</s>", "a b", 'say "', "two\nlines", 'x"\ny']
    assert len(notes) == 1 and '\'"""\'' in notes[0]
    both = edited({}, tokens=["<|e", "<|e|>"], token_type=[3, 3])
    for opening, turn in (("<|e|>Q: ", []), ("<|e|><|e|>\n[Q] ", ["\n[Q]"]), ("\nQ: ", ["\nQ:"])):
        assert stop_sequences(both, (0, 1), opening)[0] == ["<|e", "<|e|>", *turn], opening
    words = ["</s>", "user", "END", "<reponame>", "<|end|>", ","]
    for eos, ends in ((0, ["</s>", "<|end|>"]), (1, ["<|end|>"]), (5, ["<|end|>"])):
        fields = edited({}, tokens=words, token_type=[1, 1, 3, 3, 3, 1], eos_token_id=eos)
        assert stop_sequences(fields, range(6), "\nuser\n")[0] == ends, eos
    bare = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    assert made(fields_of(bare, "</s>"))[0]["stop"] == ["</s>"]
    lines = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}assistant:"
    assert made(fields_of(lines, "</s>"))[0]["stop"] == ["</s>", "\nuser:"]


def test_literal_text_survives_both_languages() -> None:
    """Random texts of everything that either language might take for its own."""
    draw = random.Random(0)
    parts = ["{", "}", "{{", "}}", '"', '""', "\\", "-", "- ", " -", " ", "a", "#", "😀"]
    parts += ["\n", "\t", "\r", "\u3000", "\u200b"]
    for _ in range(3000):
        text = "".join(draw.choices(parts, k=draw.randint(0, 9)))
        source = f'FROM x\nTEMPLATE """{{{{ .A }}}}{literal(text)}{{{{ .A }}}}"""\n'
        (_, template) = read_modelfile(source.encode("utf-8"))[1]
        assert GoTemplate(template).execute({"A": "|"}) == f"|{text}|", text
        alone = f'FROM x\nTEMPLATE """{literal(text)}"""\n'
        assert GoTemplate(read_modelfile(alone.encode("utf-8"))[1][1]).execute({}) == text


def test_who_adds_bos() -> None:
    """As the file says, or as llama.cpp takes it."""
    cases: list[tuple[dict[str, Any], bool]] = [
        ({"add_bos_token": True}, True),
        ({"add_bos_token": False, "model": "llama"}, False),
        ({"model": "llama"}, True),
        ({"model": "gpt2"}, False),
        ({"model": "gpt2", "pre": "qwen2"}, False),
        ({"model": "gpt2", "pre": "llama-bpe"}, True),
        ({"model": "gpt2", "pre": "unheard-of"}, False),
    ]
    for values, wanted in cases:
        assert adds_bos(edited({}, **values)) is wanted, values


@pytest.mark.parametrize("name", ["", "wikiphi-q8_0", "stories260K"])
def test_real_teachers(tmp_path: Path, name: str) -> None:
    """The prompt as llama.cpp tokenises it for Ollama is what this project gives the model."""
    path = shared_file(f"teachers/{name}.gguf") if name else example_teacher()
    with GGUFTeacher(path, threads=1) as teacher:
        fields = read_gguf(path).fields
        info, gguf = teacher.info, tmp_path / "Student.gguf"
        options = {"end_tokens": info.end_tokens, "context_length": info.context_length}
        notes = write_modelfile(tmp_path / "Modelfile", gguf, fields, **options)
        commands = read_modelfile((tmp_path / "Modelfile").read_bytes())
        template = dict(commands)["template"]
        stops = [value for command, value in commands if command == "stop"]
        ids: list[Any] = [[token] for token in info.end_tokens]
        ends = set(teacher.detokenize(ids))
        assert ends <= set(stops) and len(stops) == len(set(stops))
        if name == "stories260K":
            assert template == "{{ .Prompt }}" and notes == []
            return
        assert stops[-1] == "<|user|>"
        assert len(notes) == (1 if name else 0)  # wikiphi's leaves system messages out
        orders = [order for order in (*ORDINARY, *UNUSUAL) if order[-1] == "user"]
        conversations = list(map(placeholders, orders))
        prompts = [fill_in(template, messages) for messages in conversations]
        theirs = teacher.tokenize(prompts, add_special=True, parse_special=True)
        ours = conversations_tokens(teacher, conversations, answer=True)
        assert [row.tolist() for row in theirs] == [row.tolist() for row in ours]


def test_downloaded_teachers() -> None:
    """BOS begins every turn of one; the other's base has no template, and </s> among its words."""
    for name, ends, stops in (
        ("smollm2", (0, 2, 4), ["<|endoftext|>", "<|im_end|>", "<|im_start|>user"]),
        ("gemma3", (1, 106, 212), ["<eos>", "<end_of_turn>"]),
    ):
        fields = read_gguf(real_teacher(name)).fields
        found, notes = made(fields, ends=ends)
        assert found["stop"] == stops and notes == [], name
        if name == "smollm2":
            messages = talk(("user", "assistant", "user"), ("東京?", "<b>Yes</b>", "And?"))
            text = fields["tokenizer.chat_template"].value
            shown = render_chat(text, messages, add_generation_prompt=True).text
            assert fill_in(found["template"], messages) == shown


def test_the_file(tmp_path: Path) -> None:
    """Where the weights are, what they are called, and the licence; nothing else is left."""
    licence = {"general.license": Field('MIT "as is"', GGUFValueType.STRING, None)}
    fields, folder = fields_of(CHATML, "<|im_end|>") | licence, tmp_path / "a folder"
    folder.mkdir()
    options = {"end_tokens": [2], "context_length": 64}
    write_modelfile(tmp_path / "Modelfile", folder / "My student.gguf", fields, **options)
    commands = dict(read_modelfile((tmp_path / "Modelfile").read_bytes()))
    assert commands["from"] == "./a folder/My student.gguf" and commands["license"] == 'MIT "as is"'
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["Modelfile"]


def test_gos_trimming() -> None:
    """The evaluator of these tests against what Go's documentation says."""
    assert GoTemplate('{{ "23" -}} < {{- "45" }}').execute({}) == "23<45"
    branches = "a \n{{- if .A }} b {{ else -}}\n c {{ end }} d"
    assert GoTemplate(branches).execute({"A": ""}) == "ac  d"
    loop = '{{ $seen := "" }}{{ range $i, $m := .M }}{{ if eq $i 1 }}{{ $seen = $m.R }}{{ end }}'
    loop += "{{ end }}{{ $seen }}"
    assert GoTemplate(loop).execute({"M": [{"R": "a"}, {"R": "b"}, {"R": "c"}]}) == "b"
    nested = "{{ if and .A (eq (len (slice .M 1)) 2) }}x{{ end }}"
    assert GoTemplate(nested).execute({"A": "1", "M": "abc"}) == "x"
