"""An Ollama Modelfile for an exported student: weights, chat template, stop sequences.

Format and template language (Go's text/template) follow Ollama's documentation and parser: a value
in three quotation marks ends at the next three, and characters that do not print are dropped.
Ollama gives the template the conversation as ``.Messages`` (a run of messages of one role joined by
an empty line) and all system messages as ``.System``; its result is tokenized with control tokens,
after BOS where the GGUF file says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from gguf import TokenType

from distill.export.ollama_template import (
    ROLES,
    START,
    Render,
    Segments,
    choose,
    find_segments,
    stand_in,
)
from teachers.atomic_files import write_whole
from teachers.gguf.file import Field
from teachers.tokenizer.chat_template import ChatTemplateError, Message, render_chat
from teachers.tokenizer.gguf_metadata import (
    INFILL_TOKENS,
    SENTENCEPIECE,
    chat_templates,
    read_roles,
    token_text,
)
from teachers.tokenizer.pre_tokenizers import PRE_TOKENIZERS

MOST_CONTEXT = 8192  # tokens in num_ctx: Ollama takes memory for all of them at once
_QUOTES = '"""'
_SPECIAL = (TokenType.CONTROL, TokenType.USER_DEFINED)
_END_ROLES = [f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom")]
_LONE = re.compile("[\ud800-\udfff]")  # the GGUF reader's sign for a byte that is not UTF-8
# How special tokens and headings of turns begin, and no sentence.
_MARKER = re.compile(r"_?[<\[＜【]\S|#{2,} ")
# What would start an action, by itself or together with one that follows, or end the value.
_UNSAFE = re.compile(r'(\{+|"""+)')


def modelfile(
    gguf_name: str,
    fields: Mapping[str, Field],
    *,
    end_tokens: Sequence[int],
    context_length: int,
    name: str,
) -> tuple[str, list[str]]:
    """The text of a Modelfile, and warnings: where it does not follow the teacher's chat template.

    ``fields``: the GGUF file's metadata, of which ``tokenizer.*`` and ``general.license`` are read.
    ``end_tokens``: ids that end an answer. ``name``: of the model in the example command.
    """
    template, opening, notes = _template(fields)
    stops, unwritten = stop_sequences(fields, end_tokens, opening)
    notes += unwritten
    name = "".join(one if one.isalnum() or one in "._-" else "-" for one in name)
    lines = [f"# ollama create {name} -f Modelfile && ollama run {name}"]
    lines += [f"# Note: {note}." for note in notes]
    path, plain = f"./{gguf_name}", not re.search(r'[\s"]', gguf_name)
    lines.append(f"FROM {path if plain else _quoted(path)}")
    if template is not None:
        lines.append(f"TEMPLATE {_QUOTES}{template}{_QUOTES}")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    lines.append(f"PARAMETER num_ctx {min(context_length, MOST_CONTEXT)}")
    stated = fields.get("general.license")
    licence = stated.value if stated is not None else None
    if isinstance(licence, str) and licence and _quotable(licence):
        lines.append(f"LICENSE {_quoted(licence)}")
    return "\n".join(lines) + "\n", notes


def write_modelfile(
    path: Path,
    gguf: Path,
    fields: Mapping[str, Field],
    *,
    end_tokens: Sequence[int],
    context_length: int,
) -> list[str]:
    """Write a Modelfile for ``gguf``, which may lie anywhere below the Modelfile's folder; returns
    the warnings.

    Raises:
        OSError: the disk refuses.
    """
    text, warnings = modelfile(
        Path(os.path.relpath(gguf, path.parent)).as_posix(),
        fields,
        end_tokens=end_tokens,
        context_length=context_length,
        name=gguf.stem.lower(),
    )
    write_whole(path, text.encode("utf-8"))
    return warnings


def adds_bos(fields: Mapping[str, Field]) -> bool:
    """Whether llama.cpp puts BOS before a text, by the file or its tokenizer's default."""
    stated = fields.get("tokenizer.ggml.add_bos_token")
    if stated is not None:
        return bool(stated.value)
    model, pre = (fields.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model is not None and model.value == SENTENCEPIECE:
        return True
    kind = PRE_TOKENIZERS.get(pre.value if pre is not None and isinstance(pre.value, str) else "")
    return kind is not None and kind.add_bos


def chat_renderer(fields: Mapping[str, Field], template: str) -> Render:
    """Render conversations with the file's chat template, without the BOS that a runtime adds."""
    tokens = fields["tokenizer.ggml.tokens"].value
    roles = read_roles(fields, len(tokens))
    bos, eos = (
        token_text(tokens[roles[role]], 0) if role in roles else "" for role in ("bos", "eos")
    )
    surplus = bos if adds_bos(fields) else ""

    def render(messages: Sequence[Message], answer: bool) -> str | None:
        try:
            text = render_chat(
                template, messages, add_generation_prompt=answer, bos=bos, eos=eos
            ).text
        except ChatTemplateError:
            return None
        return text.removeprefix(surplus)

    return render


def _template(fields: Mapping[str, Field]) -> tuple[str | None, str, list[str]]:
    """The template if there can be one, the text between an answer and the next user message,
    and notes."""
    template = chat_templates(fields)[0]
    if template is None:
        return "{{ .Prompt }}", "", []
    segments: Segments | None = None
    notes: list[str] = []
    if not _LONE.search(template):
        segments, notes = find_segments(chat_renderer(fields, template))
    if segments is None:
        note = (
            "the teacher's chat template cannot be written in Ollama's template language, so there "
            "is no TEMPLATE here and Ollama takes one of its own; use the student through "
            "llama.cpp, which reads the one in the file"
        )
        return None, "", [note]
    if "strftime_now" in template:
        notes.append("the date in the template is that of the export")
    opening = segments.after["assistant"] + choose(segments.before["user"], "assistant")
    return go_template(segments), opening, notes


def go_template(segments: Segments) -> str:
    """Segments in Go's template language, as Ollama fills it in."""
    roles = [role for role in ROLES if role in segments.before]
    body = ""
    for role in roles:
        if role != "system" or not segments.late_system:
            word = "else if" if body else "if"
            body += f'{{{{ {word} eq .Role "{role}" }}}}{_message(segments, role, ".Content")}'
    body += "{{ end }}"
    loop = "{{ range .Messages }}"
    if segments.late_system:
        loop = "{{ range $place, $_ := .Messages }}"
        last = '(eq .Role "user") (eq (len (slice $.Messages $place)) 1)'
        system = _message(segments, "system", "$.System")
        body = f"{{{{ if and $.System {last} }}}}{system}{{{{ end }}}}{body}"
    whole = f"{loop}{body}{{{{ end }}}}{_by_previous(segments.final)}"
    if "eq $previous" not in whole:  # nothing depends on the role before
        return re.sub(r"\{\{ \$previous = \S+ \}\}", "", whole)
    return f'{{{{ $previous := "{START}" }}}}{whole}'


def _message(segments: Segments, role: str, content: str) -> str:
    """One message with the texts around it."""
    return (
        f"{_by_previous(segments.before[role])}{{{{ {content} }}}}{literal(segments.after[role])}"
        f'{{{{ $previous = "{role}" }}}}'
    )


def _by_previous(entries: Mapping[str, str]) -> str:
    """A text that depends on the previous role; a common end is written once, outside."""
    usual = entries[stand_in(entries)]
    shortest = min(entries.values(), key=len)
    shared = shortest if all(text.endswith(shortest) for text in entries.values()) else ""
    groups: dict[str, list[str]] = {}
    for role, text in entries.items():
        if text != usual:
            groups.setdefault(text, []).append(role)
    parts: list[str] = []
    for text, roles in groups.items():
        names = " ".join(f'"{role}"' for role in roles)
        word = "else if" if parts else "if"
        parts.append(f"{{{{ {word} eq $previous {names} }}}}{literal(text.removesuffix(shared))}")
    if parts:
        rest = usual.removesuffix(shared)
        parts.append(("{{ else }}" + literal(rest) if rest else "") + "{{ end }}")
    return "".join(parts) + literal(shared if parts else usual)


def literal(text: str) -> str:
    """Plain text in a Go template inside a Modelfile; what has a meaning there becomes a string."""
    parts = []
    for part in _UNSAFE.split(text):
        if _UNSAFE.fullmatch(part):
            parts.append(f'{{{{ "{"".join(map(_escape, part))}" }}}}')
        else:
            parts += [one if _survives(one) else f'{{{{ "{_escape(one)}" }}}}' for one in part]
    return "".join(parts)


def _survives(character: str) -> bool:
    """Whether Ollama's reader of Modelfiles keeps a character inside quotation marks."""
    return character.isprintable() or character in "\n\t"


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def stop_sequences(
    fields: Mapping[str, Field], end_tokens: Sequence[int], opening: str
) -> tuple[list[str], list[str]]:
    """Texts at which an answer is cut off, none empty and none twice, and notes.

    They are the end tokens, and the text that starts the next user turn, which stops a small
    student that does not stop; but nothing that an ordinary answer may contain, such as the name of
    a role. ``opening``: everything between an answer and the next user message.
    """
    tokens = fields["tokenizer.ggml.tokens"].value
    stated = fields.get("tokenizer.ggml.token_type")
    kinds = stated.value if stated is not None else []
    special = [one for one, kind in zip(tokens, kinds, strict=False) if kind in _SPECIAL and one]
    roles = read_roles(fields, len(tokens))
    bos = tokens[roles["bos"]] if "bos" in roles else ""
    named = {fields[key].value for key in _END_ROLES if key in fields}
    ends = []
    for number in end_tokens:
        text = token_text(tokens[number], number)
        # llama.cpp goes by the text alone: in a vocabulary with tags of HTML </s> is one.
        tag = text.startswith("</") and kinds[number : number + 1] != [TokenType.CONTROL]
        tag = tag and number not in named and text not in opening and f"<{text[2:]}" != bos
        if not tag and text not in INFILL_TOKENS and _is_marker(text, special):
            ends.append(text)
    turn = _turn(opening, ends, special, bos)
    stops = [text for text in dict.fromkeys([*ends, turn]) if text.strip()]
    notes = [
        f"the stop sequence {text!a} cannot be written here"
        for text in stops
        if not _quotable(text)
    ]
    return [text for text in stops if _quotable(text)], notes


def _is_marker(text: str, special: Sequence[str]) -> bool:
    """Whether a text stands in no ordinary answer: it begins with a special token, or as one does;
    a word never is one."""
    bare = text.strip()
    return not bare.isalnum() and (_MARKER.match(bare) is not None or bare.startswith((*special,)))


def _turn(opening: str, ends: Sequence[str], special: Sequence[str], bos: str) -> str:
    """The start of the user's turn, without what ends the answer, white space, and a BOS in front
    of a marker; empty where an answer may contain it and something else ends the answer.

    A line of its own is part of it, unless it starts with a token that no other text has.
    """
    turn = opening
    while matching := [end for end in ends if turn.lstrip().startswith(end)]:
        turn = turn.lstrip().removeprefix(max(matching, key=len))
    begun, _, rest = turn.partition(bos) if bos else ("", "", "")
    if not begun.strip() and _is_marker(rest, special):
        turn = rest
    if turn.lstrip().startswith((*special,)):
        return turn.strip()
    alone = turn == opening and turn[:1] == "\n" and not turn.rstrip()[-1:].isalnum()
    return turn.rstrip() if alone or _is_marker(turn, special) else ""


def _quotable(text: str) -> bool:
    return _QUOTES not in text and all(map(_survives, text))


def _quoted(text: str) -> str:
    """A value of a Modelfile; it has no escapes."""
    marks = _QUOTES if '"' in text or "\n" in text else '"'
    return f"{marks}{text}{marks}"
