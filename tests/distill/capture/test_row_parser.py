"""Rows in people's forms → conversations and documents, or an error that says what to do."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from distill.capture.row_parser import RowParser
from distill.errors import UserError
from teachers.tokenizer.rows import Conversation, Document, Message, Row

SAID = "Where is Rome?"
REPLY = "In Italy."
ASK: Message = {"role": "user", "content": SAID}
TELL: Message = {"role": "assistant", "content": REPLY}
RULE: Message = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"city": "Rome"}}}
CALLED: Message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
FOUND: Message = {"role": "tool", "content": "41.9 N"}
NAN = float("nan")


def talk(*messages: Message, **rest: Any) -> Conversation:
    return Conversation(messages, **{"where": "here", **rest})


def shared(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    """Messages as ShareGPT has them."""
    return [{"from": name, "value": value} for name, value in turns]


PAIR = talk(ASK, TELL)
ROWS: list[tuple[dict[str, Any], Row | None]] = [
    # Lists of messages
    ({"messages": [ASK, TELL]}, PAIR),
    ({"messages": [ASK]}, talk(ASK)),
    ({"conversation": [ASK, TELL], "messages": None}, PAIR),
    ({"messages": '[{"role": "user", "content": "Where is Rome?"}]'}, talk(ASK)),
    ({"conversations": shared(("human", SAID), ("gpt", REPLY))}, PAIR),
    ({"conversations": shared(("system", "Be brief."), ("User", SAID))}, talk(RULE, ASK)),
    *(({"conversations": shared(("user", SAID), (name, REPLY))}, PAIR)
      for name in ("assistant", "chatgpt", "bing", "bard", "model", "GPT")),
    ({"messages": [RULE | {"role": "developer"}, ASK]}, talk(RULE, ASK)),
    # Content in parts; nulls as absent; keys for the template
    ({"messages": [{"role": "user", "name": None, "content": [
        {"type": "text", "text": "Where ", "image": None}, {"type": "text", "text": "is Rome?"}]}]},
     talk(ASK)),
    ({"messages": [ASK | {"name": "ann"}, TELL | {"tool_calls": []}]},
     talk(ASK | {"name": "ann"}, TELL)),
    # Tools
    ({"messages": [ASK, CALLED, FOUND, TELL], "tools": [TOOL]},
     talk(ASK, CALLED, FOUND, TELL, tools=(TOOL,))),
    ({"messages": [ASK, {"role": "assistant", "tool_calls": [
        {"id": "c1", "function": {"name": "find", "arguments": '{"city": "Rome"}'}}]},
        {"role": "ipython", "content": "41.9 N", "tool_call_id": "c1"}],
      "tools": '[{"type": "function", "function": {"name": "find", "parameters": {}}}]'},
     talk(ASK, CALLED | {"tool_calls": [CALL | {"id": "c1"}]}, FOUND | {"tool_call_id": "c1"},
          tools=(TOOL,))),
    ({"messages": [ASK, {"role": "assistant", "content": None, "function_call": {
        "name": "find", "arguments": '{"city": "Rome"}'}}, {"role": "function",
        "content": "41.9 N"}], "tools": "[]"}, talk(ASK, CALLED, FOUND)),
    ({"conversations": shared(("human", SAID), ("function_call",
        '{"name": "find", "arguments": {"city": "Rome"}}'), ("observation", "41.9 N"),
        ("gpt", REPLY)), "tools": ""}, talk(ASK, CALLED, FOUND, TELL)),
    ({"messages": [ASK], "documents": [{"title": "Rome", "text": "A city."}]},
     talk(ASK, documents=({"title": "Rome", "text": "A city."},))),
    # Requests and answers
    ({"prompt": SAID}, talk(ASK)),
    ({"prompt": SAID, "completion": REPLY}, talk(ASK, TELL, separator="")),
    ({"prompt": [RULE, ASK], "completion": [TELL]}, talk(RULE, ASK, TELL, separator="")),
    ({"prompt": [ASK]}, talk(ASK)),
    ({"prompt": SAID, "chosen": REPLY, "rejected": "In France."}, PAIR),
    ({"prompt": [ASK], "chosen": [TELL], "rejected": []}, PAIR),
    ({"prompt": SAID, "chosen": [ASK, TELL]}, PAIR),
    ({"chosen": [ASK, TELL], "rejected": [ASK]}, PAIR),
    ({"chosen": "All of it.", "rejected": "None."}, Document("All of it.", "here")),
    ({"instruction": SAID, "input": "", "output": REPLY, "text": "### Both"}, PAIR),
    ({"instruction": "Where is it?", "input": "Rome", "output": REPLY, "system": "Be brief."},
     talk(RULE, {"role": "user", "content": "Where is it?\n\nRome"}, TELL)),
    ({"instruction": SAID, "input": NAN, "response": REPLY}, PAIR),
    ({"instruction": SAID, "context": None, "response": REPLY, "category": "qa"}, PAIR),
    ({"question": SAID, "answer": REPLY}, PAIR),
    ({"system_prompt": "Be brief.", "question": SAID, "response": REPLY}, talk(RULE, ASK, TELL)),
    ({"query": SAID, "response": REPLY}, PAIR),
    ({"input": SAID, "output": REPLY}, PAIR),
    ({"instruction": SAID, "output": "  "}, talk(ASK)),
    # Cells that are no text, as a CSV file has them
    *(({"question": SAID, "answer": cell}, talk(ASK, TELL | {"content": text}))
      for cell, text in ((7, "7"), (0, "0"), (-1.5, "-1.5"), (True, "True"), (False, "False"),
                         (Decimal("3.50"), "3.50"))),
    ({"input": 7, "context": 8, "output": 9},
     talk(ASK | {"content": "7\n\n8"}, TELL | {"content": "9"})),
    ({"text": 3}, Document("3", "here")),
    ({"messages": [ASK | {"content": 7}, TELL | {"content": -1.5}]},
     talk(ASK | {"content": "7"}, TELL | {"content": "-1.5"})),
    ({"conversations": shared(("human", True), ("gpt", 0))},
     talk(ASK | {"content": "True"}, TELL | {"content": "0"})),
    # Text, and nothing
    ({"text": "As it stands.\n"}, Document("As it stands.\n", "here")),
    ({"content": "As it stands.", "messages": None}, Document("As it stands.", "here")),
    ({"text": ""}, None),
    ({"prompt": None, "text": NAN, "messages": []}, None),
    ({"instruction": "", "output": REPLY}, None),
]  # fmt: skip
REFUSED: list[tuple[Any, tuple[str, ...]]] = [
    ([1], ("[1]",)),
    ({"ask": "x", "reply": "y\x1b"}, ("ask, reply", "messages", "instruction", "data.columns")),
    ({f"c{n}": 1 for n in range(30)}, ("c0, c1", "18 more")),
    ({"output": "x"}, ("output",)),
    ({"text": [3]}, ("'text'", "[3]")),
    ({"text": b"x"}, ("'text'", "b'x'")),
    ({"prompt": {"a": 1}}, ("'prompt'",)),
    ({"prompt": "x", "completion": {"a": 1}}, ("'completion'", "{'a': 1}")),
    ({"messages": 3}, ("'messages'", "got 3")),
    ({"text": "\ud800"}, ("surrogate",)),
    ({"messages": "hello"}, ("JSON",)),
    ({"messages": "[]"}, ("'messages'", "[]")),
    ({"messages": [ASK, TELL] * 3_000}, ("6,000 messages", "divide")),
    ({"messages": ["hello"]}, ("messages, number 1", "role", "hello")),
    ({"messages": [ASK, {"role": "critic", "content": "x"}]}, ("number 2", "critic", "human")),
    ({"messages": [{"content": "x"}]}, ("role None",)),
    ({"messages": [{"role": ["user"], "content": "x"}]}, ("role ['user']",)),
    ({"messages": [{"role": "user"}]}, ("number 1", "no content")),
    ({"messages": [{"role": "assistant", "content": None}]}, ("no content", "tool_calls")),
    ({"messages": [{"role": "user", "content": {"a": 3}}]}, ("content", "{'a': 3}")),
    ({"messages": [{"role": "user", "content": NAN}]}, ("no content",)),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     ("image_url", "not text")),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, ("'text'",)),
    ({"messages": [ASK | {"tool_calls": [CALL]}]}, ("only the assistant",)),
    ({"messages": [TELL | {"tool_calls": [{"type": "custom", "name": "x"}]}]}, ("tool call",)),
    ({"messages": [TELL | {"tool_calls": [{"name": "x", "arguments": "{"}]}]}, ("'x'", "JSON")),
    ({"messages": [TELL | {"tool_calls": [{"name": "x", "arguments": [1]}]}]}, ("object", "[1]")),
    ({"messages": [TELL | {"tool_calls": "{"}]}, ("tool call", "JSON")),
    ({"conversations": shared(("human", "x"), ("function_call", "no JSON"))}, ("JSON",)),
    ({"messages": [ASK], "tools": "find"}, ("tools", "JSON")),
    ({"messages": [ASK], "tools": [3]}, ("'tools'", "3")),
    ({"messages": [ASK], "documents": ["a"]}, ("documents",)),
    ({"messages": [RULE, ASK], "system": "Be kind."}, ("'system'",)),
]  # fmt: skip


def test_every_form_becomes_one_value() -> None:
    """The row's messages, tools and text, whatever they were called."""
    for row, expected in ROWS:
        assert RowParser({}).parse(row, "here") == expected, row


def test_what_cannot_be_used_is_refused() -> None:
    """With the place, what was there, and what would do; never a traceback."""
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    for row, words in [*REFUSED, ({"messages": [ASK | {"more": deep}]}, ("nested",))]:
        with pytest.raises(UserError) as caught:
            RowParser({}).parse(row, "file f, line 9")
            pytest.fail(f"{str(row)[:80]} is accepted")
        message = str(caught.value)
        assert message.startswith("file f, line 9") and "\x1b" not in message, message
        for word in words:
            assert word in message, (str(row)[:80], message)


def test_what_is_left_out_is_counted() -> None:
    """Blank rows, answers without a request or said to be bad, columns that are not used, keys for
    the template, weights."""
    parser = RowParser({})
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "id": 1, "text": "b", "note": None},
        {"messages": [ASK | {"weight": 0}, TELL | {"name": "x"}], "id": 2},
        {"text": " "},
        {"prompt": None},
        {"prompt": "", "completion": "c"},
        {"prompt": "a", "completion": "c", "label": False},
        {"prompt": [ASK], "completion": [TELL], "label": "False"},
        {"prompt": "a", "completion": "c", "label": True},
        {"text": "a", "label": False},
        {"messages": [ASK, TELL | {"weight": 0}, ASK, TELL | {"weight": 1}]},
        {"messages": [ASK, TELL | {"weight": 0.5}, ASK, TELL | {"train": False, "loss": True}]},
        {"prompt": 1, "completion": True},
        {"messages": [ASK | {"content": 3}]},
    ]
    assert sum(parser.parse(row, f"row {n}") is not None for n, row in enumerate(rows, 1)) == 8
    assert parser.unlearnt == 2
    parser.count_unused(["image"], 7)
    notes = parser.finish(True, "data")
    for words in (
        ("2 rows", "row 3"),
        ("1 rows", "answer", "row 5"),
        ("image (7", "id (2", "text (1"),
        ("2 rows", "label", "row 6"),
        ("weight (1 ",),
        ("weight", "other than 0 and 1", "1 messages"),
        ("3 numbers", "text", "row 12"),
    ):
        assert any(all(word in note for word in words) for note in notes), (words, notes)
    assert not any(word in note for note in notes for word in ("note", "name", "train", "loss"))
    assert RowParser({}).finish(True, "data") == []
    parser = RowParser({})
    parser.parse(rows[5], "row 1")
    with pytest.raises(UserError, match="label is false"):
        parser.finish(False, "data")


def test_columns_can_be_named() -> None:
    """Ours by the data's name, or left alone; a name that is nowhere is an error."""
    assert RowParser({"text": "body"}).parse({"body": "x", "text": "y"}, "") == Document("x")
    assert RowParser({"messages": None}).parse({"messages": 3, "text": "y"}, "") == Document("y")
    parser = RowParser({"prompt": "text", "completion": "reply"})
    pair = parser.parse({"text": SAID, "reply": REPLY}, "here")
    assert pair == talk(ASK, TELL, separator="")
    parser = RowParser({"text": "body"})
    parser.parse({"prompt": "x"}, "")
    with pytest.raises(UserError, match=r"data\.columns\.text = 'body'.*there are prompt"):
        parser.finish(True, "data")
    with pytest.raises(UserError, match=r"data\.columns\.body"):
        RowParser({"body": "text"})
