"""Chat templates: the text and the places of generated text that transformers gives."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from teachers.tokenizer.chat_template import (
    ChatTemplateError,
    render_chat,
    with_variables,
)
from tests.support.chat_templates import FAMILIES, family

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather, if <b>known</b> & certain; 天気",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "東京 <1>", "at": None}},
}
SYSTEM = {"role": "system", "content": " Be brief.\n"}
USER = {"role": "user", "content": ' What\'s <b>5</b> & "6"? \n'}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n Eleven.\n"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOLD = {"role": "tool", "tool_call_id": "call12345", "content": '{"sky": "晴れ"}', "name": None}
PARTS = [{"type": "text", "text": " one "}, {"type": "image"}, {"type": "text", "text": "two"}]
DOCUMENTS = [{"title": "A & B", "text": "first"}, {"title": "C", "text": "<second>"}]
CONVERSATIONS: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([USER], {}),
    ([SYSTEM, USER, ANSWER], {}),
    ([USER, ANSWER, {"role": "user", "content": "続けて。"}, {**ANSWER, "content": "はい"}], {}),
    ([SYSTEM, USER, ANSWER, USER], {"enable_thinking": False, "date_string": "1 Jan 2025"}),
    ([USER, {**ANSWER, "reasoning": "none too deep"}], {"enable_thinking": True}),
    ([USER], {"tools": [TOOL, TOOL]}),
    ([USER, CALLED, TOLD], {"tools": [TOOL]}),
    ([USER, CALLED, TOLD, {"role": "assistant", "content": "Sunny.", "tool_calls": None}], {}),
    ([SYSTEM, USER], {"documents": DOCUMENTS, "tools": [TOOL], "controls": ["citations"]}),
    ([{"role": "user", "content": PARTS}, ANSWER], {}),
    ([USER, {**CALLED, "tool_calls": None}], {"preamble": "", "controls": {"length": "long"}}),
    ([USER, USER, {"role": "stop", "content": ""}], {}),
]  # fmt: skip
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def theirs(
    template: str, messages: list[dict[str, Any]], values: dict[str, Any], answer: bool
) -> tuple[str, Any] | None:
    """What transformers renders, and where the generated text is; nothing where it refuses."""
    tokenizer = PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast)
    tokenizer._special_tokens_map = TOKENS
    tokenizer.chat_template = template
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer, **values
        )
        kept = [{key: one for key, one in row.items() if one is not None} for row in messages]
        marked = render_jinja_template(
            [kept], chat_template=template, add_generation_prompt=answer,
            return_assistant_tokens_mask=True, **(TOKENS | values),
        )  # fmt: skip
    except Exception:
        return None
    assert marked[0] == [text]
    tagged = re.search(r"\{%-?\s*generation\s*-?%\}", template)
    return text, tuple(marked[1][0]) if tagged else None


def test_the_text_and_the_generated_places_are_transformers() -> None:
    """For every family and conversation; what transformers refuses is refused here."""
    accepted = dict.fromkeys(FAMILIES, 0)
    for name in FAMILIES:
        for number, (messages, values) in enumerate(CONVERSATIONS):
            for answer in (False, True):
                where = (name, number, answer)
                wanted = theirs(family(name), messages, values, answer)
                given = {"add_generation_prompt": answer, "bos": "<s>", "eos": "</s>"}
                variables = {"pad_token": "<pad>", **values}
                if wanted is None:
                    with pytest.raises(ChatTemplateError):
                        render_chat(family(name), messages, **given, variables=variables)
                    continue
                accepted[name] += 1
                mine = render_chat(family(name), messages, **given, variables=variables)
                assert (mine.text, mine.generated) == wanted, where
                own = with_variables(family(name), values)  # the same from the template itself
                assert render_chat(own, messages, **given).text == mine.text, where
    assert len(FAMILIES) >= 12 and min(accepted.values()) >= 10, accepted
    few = render_chat(family("phi4"), [USER, ANSWER], add_generation_prompt=False)
    assert few.generated is not None
    assert [few.text[slice(*span)] for span in few.generated] == [ANSWER["content"] + "<|im_end|>"]


def test_the_template_may_not_tell_where_generated_text_is() -> None:
    """A tag inside a macro or a captured block has no place; one that nobody reaches has none."""
    tag = "{% generation %}{{ messages[-1].content }}{% endgeneration %}"
    for template, places in (
        (f"words {tag}", ((6, 8),)),
        (f"{{% if false %}}{tag}{{% endif %}}", ()),
        (f"{{% macro m() %}}words {tag}{{% endmacro %}}{{{{ m() }}}}", None),
        (f"{{% set x %}}words {tag}{{% endset %}}{{{{ x }}}}", None),
        ("{{ messages[-1].content }}", None),
    ):
        said = render_chat(
            template, [{"role": "assistant", "content": "hi"}], add_generation_prompt=False
        )
        assert said.generated == places, template


def test_whatever_a_template_does_wrong_is_one_error() -> None:
    """Broken text, endless recursion, boundless results, Python's insides: one line each."""
    deep = "{% if true %}" * 120 + "{% endif %}" * 120
    for bad in (
        "{% for %}", "{% if %}", "{% generation %}", "{{ 1 // 0 }}", "{{ 'a' + 1 }}", deep,
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{{ 'x' * 10 ** 12 }}", "{{ [0] * 10 ** 12 }}", "{{ 10 ** (10 ** 10) }}",
        "{{ 2.0 ** 99999 }}",
        "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "{{ 'x' * 10 ** 30 }}",
        "{{ '{1}'.format(0) }}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}",
        "{{ raise_exception('no\nsuch role') }}", "{{ messages | tojson(indent='a', x=1) }}",
        "{{ strftime_now(1) }}", "{{ namespace().f() }}", "{{ range(10 ** 9) }}",
    ):  # fmt: skip
        try:
            said = render_chat(bad, [USER], add_generation_prompt=False).text
        except ChatTemplateError as error:
            assert str(error).startswith("the teacher's chat template"), bad
        else:
            raise AssertionError(f"{bad[:80]} gave {said[:80]}")


def test_the_date_can_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variable that reproducible builds use, so that another day gives the same text."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1721952000")
    template = "{{ strftime_now('%d %b %Y') }}"
    assert render_chat(template, [USER], add_generation_prompt=False).text == "26 Jul 2024"
