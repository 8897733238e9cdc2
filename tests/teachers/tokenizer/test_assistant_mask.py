"""Which tokens of a conversation are the assistant's, against transformers' own mask."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from teachers.gguf.file import read_gguf, tokenizer_fields
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.tokenizer.assistant_mask import AssistantMask
from teachers.tokenizer.rows import Conversation
from teachers.tokenizer.tokenizer_json import write_tokenizer_folder
from tests.support.real import real_teacher
from tests.support.teachers import example_fields

TAGS = re.compile(r"{% (end)?generation %}")
ASKED = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
USER = "{% else %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endif %}"
FIRST = "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n"
TURN = "{% generation %}{{ said }}<|end|>{% endgeneration %}{{ '\n' }}"
THOUGHTS = "{% set said = m.content.split('</think>')[-1] if not loop.last else m.content %}"
# What model families do, each with the tags that say what transformers' mask is.
TEMPLATES = {
    "plain": FIRST + "{% set said = m.content %}" + TURN + USER + "{% endfor %}" + ASKED,
    "trimmed": FIRST + "{% set said = m.content | trim %}" + TURN + USER + "{% endfor %}" + ASKED,
    "earlier thoughts go": FIRST + THOUGHTS + TURN + USER + "{% endfor %}" + ASKED,
    "opens a thought that is not kept": FIRST
    + "{% set said = m.content.split('</think>')[-1] %}"
    + TURN
    + USER
    + "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}",
    "system words with the last request": FIRST
    + "{% set said = m.content %}"
    + TURN
    + "{% elif m.role == 'user' %}<|user|>\n{% if loop.index0 >= messages | length - 2 %}be kind: "
    + "{% endif %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    + ASKED,
    "an end of text at the end": FIRST
    + "{% set said = m.content %}"
    + TURN
    + USER
    + "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
    + "{% else %}{{ eos_token }}{% endif %}",
    "brackets": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %} "
    + "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}[INST] {{ m.content }} "
    + "[/INST]{% endif %}{% endfor %}",
    "nothing in between": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    + "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
}
SAID = (
    ("Hello", "May I come in?"),
    ("<think>\nlong ago\n</think>\n\nYes, of course.", "x"),
    ("\n\nNo.\n", "  two\n\nlines  "),
    ("", "naïve 日本語 👩‍👧"),
)


class Templated:
    """A teacher with another chat template."""

    def __init__(self, teacher: GGUFTeacher, template: str | None) -> None:
        self.teacher, self.info = teacher, replace(teacher.info, chat_template=template)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)


def loaded(fields: Any, folder: Path) -> PreTrainedTokenizerFast:
    """The teacher's tokenizer in transformers."""
    write_tokenizer_folder(fields, folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def conversations() -> list[list[dict[str, Any]]]:
    """Of one to four turns, from every answer on, some with a system's message, some waiting."""
    found = []
    for start in range(len(SAID)):
        messages = [{"role": "system", "content": "Be brief."}] if start % 2 else []
        for answer, request in SAID[start:] + SAID[:start]:
            messages += [{"role": "user", "content": request}]
            messages += [{"role": "assistant", "content": answer}]
            found.append([*messages])
    return [*found, [*found[3], {"role": "user", "content": "And?"}]]


def disagreements(
    teacher: GGUFTeacher,
    tokenizer: PreTrainedTokenizerFast,
    tagged: str,
    used: str,
    chats: list[list[dict[str, Any]]],
) -> list[Any]:
    """Conversations whose tokens or mask with the template ``used`` are not those of transformers
    with a tagged one."""
    mine = Templated(teacher, used)
    masks, wrong = AssistantMask(mine, 1 << 16), []  # type: ignore[arg-type]
    for messages in chats:
        waits = messages[-1]["role"] != "assistant"
        tokens, mask, unknown = masks.tokens(Conversation(messages), answer=waits)
        theirs = tokenizer.apply_chat_template(
            messages,
            chat_template=tagged,
            add_generation_prompt=waits,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        behind = len(tokens) - len(theirs["input_ids"])  # BOS, where the template has none
        assert not mask[:behind].any() and 0 <= behind <= 1
        same = tokens[behind:].tolist() == theirs["input_ids"]
        if (
            unknown
            or not same
            or mask[behind:].tolist() != list(map(bool, theirs["assistant_masks"]))
        ):
            wrong.append((messages, unknown, same, tokens[mask], theirs))
    return wrong


def test_masks_are_those_of_transformers(example_gguf: GGUFTeacher, tmp_path: Path) -> None:
    """Token by token; found without tags too, whatever the template does to earlier turns."""
    tokenizer = loaded(example_fields(), tmp_path)
    for name, template in TEMPLATES.items():
        for used in (template, TAGS.sub("", template)):
            wrong = disagreements(example_gguf, tokenizer, template, used, conversations())
            assert not wrong, (name, used, len(wrong), wrong[0])


def test_messages_that_are_not_to_be_learnt(example_gguf: GGUFTeacher, tmp_path: Path) -> None:
    """Against transformers with tags around the others alone."""
    tokenizer = loaded(example_fields(), tmp_path)
    flags: list[dict[str, Any]] = [
        {"weight": 0}, {"weight": 1}, {"train": False}, {"training": "False"}, {"loss": True}
    ]  # fmt: skip
    unlearnt = "(m.weight, m.train, m.training, m.loss) | select('in', [0, 'False']) | list"
    for name, template in TEMPLATES.items():
        tag = re.search(r"{% generation %}(.*){% endgeneration %}", template)
        assert tag is not None
        plain = f"{{% if {unlearnt} %}}{tag[1]}{{% else %}}{tag[0]}{{% endif %}}"
        for used in (template, TAGS.sub("", template)):
            for first in range(len(flags)):
                chats = [
                    [
                        one | flags[(first + place) % 5] if one["role"] == "assistant" else one
                        for place, one in enumerate(messages)
                    ]
                    for messages in conversations()
                ]
                tagged = template.replace(tag[0], plain)
                wrong = disagreements(example_gguf, tokenizer, tagged, used, chats)
                assert not wrong, (name, used, len(wrong), wrong[0])


class Counted(Templated):
    """Counts the characters that are tokenized, and the calls of ``detokenize``: some for each
    time that the template renders, and some for the tokens."""

    characters = calls = 0

    def tokenize(self, texts: list[str], **settings: bool) -> list[Any]:
        self.characters += sum(map(len, texts))
        return self.teacher.tokenize(texts, **settings)

    def detokenize(self, sequences: list[Any]) -> list[str]:
        self.calls += 1
        return self.teacher.detokenize(sequences)


def test_time_is_in_proportion_to_the_text(example_gguf: GGUFTeacher) -> None:
    """A text is tokenized once, however many turns it has; answers behind the limit cost nothing,
    and those before it are found as without one."""
    limit = 100
    for template in (TAGS.sub("", TEMPLATES["plain"]), TEMPLATES["plain"]):
        calls = set()
        for turns in (20, 40, 80):
            messages = conversations()[3][1:] * (turns // 4)
            teachers = [Counted(example_gguf, template) for _ in range(2)]
            whole, cut = (
                AssistantMask(one, most).tokens(Conversation(messages), answer=False)  # type: ignore[arg-type]
                for one, most in zip(teachers, (1 << 16, limit), strict=True)
            )
            length = len(teachers[0].teacher.detokenize([whole[0]])[0])
            assert all(one.characters <= length for one in teachers), (turns, length)
            assert (whole[1] == cut[1])[:limit].all() and whole[1][limit:].any(), turns
            calls.add(teachers[1].calls)
        assert len(calls) == 1, (template, calls)


def test_the_real_template_of_smollm2(tmp_path: Path) -> None:
    """As it is, against a copy of it with tags around what the assistant says."""
    path = real_teacher("smollm2")
    with GGUFTeacher(path, threads=1) as teacher:
        plain, turn = teacher.info.chat_template, "{{'<|im_start|>' + message['role']"
        assert plain is not None and plain.count(turn) == 1
        said = "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
        said += "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        said += "{{ '\\n' }}{% else %}"
        tagged = plain.replace(turn, said + turn).replace("{% endfor %}", "{% endif %}{% endfor %}")
        fields = tokenizer_fields(read_gguf(path))
        wrong = disagreements(teacher, loaded(fields, tmp_path), tagged, plain, conversations())
        assert not wrong, (len(wrong), wrong[0])
