"""An Ollama Modelfile for an exported student: where the weights are, how a conversation reads,
where an answer ends.

The format and its template language (Go's text/template) are those of Ollama's own documentation
and parser: a value in three quotation marks ends at the next three, and characters that do not
print are dropped. Ollama hands the template the conversation as ``.Messages`` (a run of messages of
one role joined by an empty line) and all that system messages say as ``.System``; what the template
gives is tokenised with control tokens, and BOS is put in front where the GGUF file says so.
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
from teachers.tokenizer.gguf_metadata import SENTENCEPIECE, read_roles, token_text
from teachers.tokenizer.pre_tokenizers import PRE_TOKENIZERS

MOST_CONTEXT = (
    8192  # tokens that Ollama is asked to make room for: memory is taken for all of them at once
)
_QUOTES = '"""'
_SPECIAL = (TokenType.CONTROL, TokenType.USER_DEFINED)
_LONE = re.compile("[\ud800-\udfff]")  # the GGUF reader's sign for a byte that is not UTF-8
# What would begin an action, by itself or together with one that follows, or end the value.
_UNSAFE = re.compile(r'(\{+|"""+)')


def modelfile(
    gguf_name: str,
    fields: Mapping[str, Field],
    *,
    end_tokens: Sequence[int],
    context_length: int,
    name: str,
) -> tuple[str, list[str]]:
    """The text of a Modelfile, and warnings: where the teacher's chat template could not be
    followed.

    ``fields``: the GGUF file's metadata, of which ``tokenizer.*`` and ``general.license`` are read.
    ``end_tokens``: ids of the tokens with which an answer ends. ``name``: what the model is called
    in the example command.
    """
    template, opening, notes = _template(fields)
    stops, unwritten = stop_words(fields, end_tokens, opening)
    notes += unwritten
    lines = [f"# ollama create {name} -f Modelfile && ollama run {name}"]
    lines += [f"# Note: {note}." for note in notes]
    lines.append(f"FROM {_quoted(f'./{gguf_name}') if ' ' in gguf_name else f'./{gguf_name}'}")
    if template is not None:
        lines.append(f"TEMPLATE {_QUOTES}{template}{_QUOTES}")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    lines.append(f"PARAMETER num_ctx {min(context_length, MOST_CONTEXT)}")
    stated = fields.get("general.license")
    if (
        stated is not None
        and isinstance(stated.value, str)
        and stated.value
        and _quotable(stated.value)
    ):
        lines.append(f"LICENSE {_quoted(stated.value)}")
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
    place = Path(os.path.relpath(gguf, path.parent)).as_posix()
    text, warnings = modelfile(
        place, fields, end_tokens=end_tokens, context_length=context_length, name=gguf.stem.lower()
    )
    write_whole(path, text.encode("utf-8"))
    return warnings


def adds_bos(fields: Mapping[str, Field]) -> bool:
    """Whether llama.cpp puts BOS before a text: as the file says, or as is usual for its
    tokenizer."""
    stated = fields.get("tokenizer.ggml.add_bos_token")
    if stated is not None:
        return bool(stated.value)
    model, pre = (fields.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model is not None and model.value == SENTENCEPIECE:
        return True
    kind = PRE_TOKENIZERS.get(pre.value if pre is not None and isinstance(pre.value, str) else "")
    return kind is not None and kind.add_bos


def chat_renderer(fields: Mapping[str, Field], template: str) -> Render:
    """Render conversations with the file's chat template, without the BOS that a runtime adds by
    itself."""
    tokens = fields["tokenizer.ggml.tokens"].value
    roles = read_roles(fields, len(tokens))
    bos, eos = (
        token_text(tokens[roles[role]], 0) if role in roles else "" for role in ("bos", "eos")
    )
    surplus = bos if adds_bos(fields) else ""

    def render(messages: Sequence[Message], answer: bool) -> str | None:
        try:
            text = render_chat(template, messages, add_generation_prompt=answer, bos=bos, eos=eos)
        except ChatTemplateError:
            return None
        return text.removeprefix(surplus)

    return render


def _template(fields: Mapping[str, Field]) -> tuple[str | None, str, list[str]]:
    """The template if there can be one, the text between an answer and the next user's words,
    and notes."""
    stated = fields.get("tokenizer.chat_template")
    if stated is None or not stated.value:
        return "{{ .Prompt }}", "", []
    segments: Segments | None = None
    notes: list[str] = []
    if isinstance(stated.value, str) and not _LONE.search(stated.value):
        segments, notes = find_segments(chat_renderer(fields, stated.value))
    if segments is None:
        note = (
            "the teacher's chat template cannot be written in Ollama's template language, so there "
            "is no TEMPLATE here "
            "and Ollama takes one of its own; talk to the student through llama.cpp, which reads "
            "the one in the file"
        )
        return None, "", [note]
    opening = segments.after["assistant"] + choose(segments.before["user"], "assistant")
    return go_template(segments), opening, notes


def go_template(segments: Segments) -> str:
    """Segments in Go's template language, as Ollama fills it in."""
    roles = [role for role in ROLES if role in segments.before]
    spoken = [role for role in roles if not (segments.late_system and role == "system")]
    branches = "".join(
        f'{{{{ {"else if" if number else "if"} eq .Role "{role}" }}}}{_said(segments, role, ".Content")}'
        for number, role in enumerate(spoken)
    )
    body = branches + "{{ end }}"
    loop = "{{ range .Messages }}"
    if segments.late_system:
        loop = "{{ range $place, $_ := .Messages }}"
        last = '(eq .Role "user") (eq (len (slice $.Messages $place)) 1)'
        body = f"{{{{ if and $.System {last} }}}}{_said(segments, 'system', '$.System')}{{{{ end }}}}{body}"
    whole = f"{loop}{body}{{{{ end }}}}{_by_speaker(segments.final)}"
    if "eq $previous" not in whole:  # nobody asks who spoke before
        return re.sub(r"\{\{ \$previous = \S+ \}\}", "", whole)
    return f'{{{{ $previous := "{START}" }}}}{whole}'


def _said(segments: Segments, role: str, words: str) -> str:
    """One message's words with the texts around them."""
    return (
        f"{_by_speaker(segments.before[role])}{{{{ {words} }}}}{literal(segments.after[role])}"
        f'{{{{ $previous = "{role}" }}}}'
    )


def _by_speaker(entries: Mapping[str, str]) -> str:
    """A text that depends on who spoke before, where it does; what all have in common stands
    outside."""
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
    """Plain text in a Go template inside a Modelfile: what would be read as something else
    becomes a string's value."""
    parts = []
    for part in _UNSAFE.split(text):
        if _UNSAFE.fullmatch(part):
            parts.append(f'{{{{ "{"".join(map(_escape, part))}" }}}}')
        else:
            parts += [one if _survives(one) else f'{{{{ "{_escape(one)}" }}}}' for one in part]
    return "".join(parts)


def _survives(character: str) -> bool:
    """Whether a character inside quotation marks comes through Ollama's reader of Modelfiles."""
    return character.isprintable() or character in "\n\t"


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def stop_words(
    fields: Mapping[str, Field], end_tokens: Sequence[int], opening: str
) -> tuple[list[str], list[str]]:
    """Texts at which an answer is cut off, none empty and none twice, and notes.

    They are the end tokens, and the text with which the next user's turn would begin, so that a
    small student that does not stop is stopped. ``opening``: everything between an answer and the
    words of the next user.
    """
    tokens = fields["tokenizer.ggml.tokens"].value
    ends = [token_text(tokens[number], number) for number in end_tokens]
    found = dict.fromkeys([*ends, _turn(fields, opening, ends)])
    words = [word for word in found if word.strip()]
    notes = [
        f"the stop word {word!a} cannot be written here" for word in words if not _quotable(word)
    ]
    return [word for word in words if _quotable(word)], notes


def _turn(fields: Mapping[str, Field], opening: str, ends: Sequence[str]) -> str:
    """The beginning of the user's turn: without what ends the answer, white space, and BOS.

    A line of its own is part of it, unless it begins with a token that no other text has.
    """
    tokens = fields["tokenizer.ggml.tokens"].value
    bos = read_roles(fields, len(tokens)).get("bos")
    closing = [*ends, *([] if bos is None else [tokens[bos]])]
    while found := [end for end in closing if end and opening.lstrip().startswith(end)]:
        opening = opening.lstrip().removeprefix(max(found, key=len))
    kinds = (
        fields["tokenizer.ggml.token_type"].value if "tokenizer.ggml.token_type" in fields else []
    )
    special = {
        token for token, kind in zip(tokens, kinds, strict=False) if kind in _SPECIAL and token
    }
    begins = any(opening.lstrip().startswith(token) for token in special)
    return opening.strip() if begins else opening.rstrip()


def _quotable(text: str) -> bool:
    return _QUOTES not in text and all(map(_survives, text))


def _quoted(text: str) -> str:
    """A value of a Modelfile; it has no escapes."""
    marks = _QUOTES if '"' in text or "\n" in text else '"'
    return f"{marks}{text}{marks}"
