"""Data → sequences: every accepted form, and every malformed one refused with file and line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from distill.capture.corpus import Corpus, build_corpus
from distill.capture.lengths import describe_cut, most_tokens
from distill.config.sources import DataConfig
from distill.errors import UserError
from teachers.llama_cpp.teacher import GGUFTeacher

HI: dict[str, str] = {"role": "user", "content": "Hi"}
TURNS = [HI, {"role": "assistant", "content": "Hello"}]


def corpus(teacher: GGUFTeacher, path: Path | None = None, **settings: Any) -> Corpus:
    """Build a corpus with some data settings."""
    return build_corpus(DataConfig(path=str(path) if path else None, **settings), teacher, seed=0)


def text_of(teacher: GGUFTeacher, tokens: np.ndarray) -> str:
    return teacher.detokenize([tokens])[0]


def write_lines(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


def test_prompts_are_rendered(tiny_teacher: GGUFTeacher, tmp_path: Path) -> None:
    """A prompt becomes the user's turn of the chat template, one BOS in front, open at the end."""
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "May I?", "id": 7}, "", {"prompt": "Now?"})
    built = corpus(tiny_teacher, path)
    assert len(built) == 2 and built.spoken == 2
    tokens = built.items[0].segments[0]
    assert tokens[0] == tiny_teacher.info.bos and (tokens == tiny_teacher.info.bos).sum() == 1
    text = text_of(tiny_teacher, tokens)
    assert "<|user|>\nMay I?<|end|>\n" in text and text.endswith("<|assistant|>\n")


def test_finished_conversations_stay(tiny_teacher: GGUFTeacher, tmp_path: Path) -> None:
    """The teacher writes only where the last word is not the assistant's."""
    path = write_lines(tmp_path / "m.jsonl", {"messages": TURNS}, {"messages": [HI]})
    built = corpus(tiny_teacher, path)
    assert [item.speaks for item in built.items] == [False, True]
    assert "Hello<|end|>" in text_of(tiny_teacher, built.items[0].segments[0])


def test_what_the_template_does_not_show(tiny_teacher: GGUFTeacher, tmp_path: Path) -> None:
    """Tools and documents that it has no place for are noted, tool calls refused with the line."""
    given = {"messages": TURNS, "tools": [{"name": "find"}], "documents": [{"text": "a"}]}
    built = corpus(tiny_teacher, write_lines(tmp_path / "m.jsonl", given, given, {"prompt": "a"}))
    assert len(built) == 3
    for name in ("tools", "documents"):
        assert any(f"{name} of 2 conversations" in note for note in built.notes), built.notes
    calls = [HI, {"role": "assistant", "tool_calls": [{"name": "find", "arguments": {}}]}]
    path = write_lines(tmp_path / "c.jsonl", {"messages": TURNS}, {"messages": calls})
    with pytest.raises(UserError, match=r"c\.jsonl, line 2.*tool calls"):
        corpus(tiny_teacher, path)


def test_without_a_template_texts_follow_each_other(
    tiny_teacher: GGUFTeacher, tmp_path: Path
) -> None:
    """Messages on lines of their own; a completion goes on where its prompt ends."""
    info = replace(tiny_teacher.info, chat_template=None, add_bos=False)
    same = {"tokenize": tiny_teacher.tokenize, "detokenize": tiny_teacher.detokenize}
    plain = cast(GGUFTeacher, SimpleNamespace(info=info, **same))
    pair = {"prompt": "The desk is", "completion": " open."}
    built = corpus(plain, write_lines(tmp_path / "p.jsonl", pair, {"messages": TURNS}))
    texts = [text_of(tiny_teacher, item.segments[0]) for item in built.items]
    assert texts == ["The desk is open.", "Hi\nHello"]


def test_plain_text_becomes_windows(tiny_teacher: GGUFTeacher, tmp_path: Path) -> None:
    """Windows begin with BOS, are as long as allowed, and hold every token of the text once."""
    text = "The desk is open from eight. " * 60
    path = tmp_path / "t.txt"
    path.write_text(text)
    built = corpus(tiny_teacher, path, max_length=32)
    windows = [item.segments[0] for item in built.items]
    assert all(window[0] == tiny_teacher.info.bos for window in windows)
    assert all(len(window) == 32 for window in windows[:-1]) and not built.spoken
    whole = tiny_teacher.tokenize([text], add_special=False, parse_special=False)[0]
    assert np.array_equal(np.concatenate([window[1:] for window in windows])[: len(whole)], whole)


def test_control_tokens_in_data_stay_text(tiny_teacher: GGUFTeacher, tmp_path: Path) -> None:
    """Text that spells a control token must not become one."""
    path = write_lines(tmp_path / "t.jsonl", {"text": "<|assistant|> yes"}, {"text": "another"})
    tokens = corpus(tiny_teacher, path).items[0].segments[0]
    control = tiny_teacher.tokenize(["<|assistant|>"], add_special=False, parse_special=True)[0]
    assert len(control) == 1 and control[0] not in tokens


def test_folders_are_read_in_order(tiny_teacher: GGUFTeacher, tmp_path: Path) -> None:
    """All JSONL files below a folder, by name; other files are left alone."""
    (tmp_path / "sub").mkdir()
    write_lines(tmp_path / "a.jsonl", {"text": "first entry"})
    write_lines(tmp_path / "sub" / "b.jsonl", {"text": "second entry"})
    (tmp_path / "c.bin").write_bytes(b"\xff")
    built = corpus(tiny_teacher, tmp_path)
    texts = [text_of(tiny_teacher, item.segments[0][1:]) for item in built.items]
    assert texts == ["first entry", "second entry"]


def test_malformed_jsonl_names_file_and_line(tiny_teacher: GGUFTeacher, tmp_path: Path) -> None:
    """The complaint says which file, which line, and what was expected."""
    path = tmp_path / "data.jsonl"
    for content, *words in (
        ('{"prompt": "ok"}\n{"prompt": ', "line 2", "JSON"),
        ('{"prompt": "ok"}\n\n[1]', "line 3", "[1]"),
        ('{"ask": "x", "to": 1}', "line 1", "there are ask, to;", "messages", "data.columns"),
        ('{"prompt": {"a": 3}}', "line 1", "'prompt'", "3"),
        ('{"prompt": "  "}\n{"prompt": null}', "every row is blank", "there are prompt"),
        ("", "empty"),
        (" \n\n", "empty"),
    ):
        path.write_text(content)
        with pytest.raises(UserError) as caught:
            corpus(tiny_teacher, path)
            pytest.fail(f"{content!r} is accepted")
        for word in ("data.jsonl", *words):
            assert word in str(caught.value), content


def test_other_unusable_data(tiny_teacher: GGUFTeacher, tmp_path: Path) -> None:
    """Missing path, empty folder, bytes that are not UTF-8, one lone sequence."""
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "single.jsonl", {"text": "only one line"})
    for name, words in (
        ("none", "does not exist"),
        ("empty", "has no"),
        ("latin.txt", "line 2: not UTF-8"),
        ("single.jsonl", "at least 2"),
    ):
        with pytest.raises(UserError, match=words):
            corpus(tiny_teacher, tmp_path / name)
            pytest.fail(f"{name} is accepted")


def test_samples_are_a_seeded_subset(tiny_teacher: GGUFTeacher, tmp_path: Path) -> None:
    """--samples takes a seeded subset; the digest tells different data and settings apart."""
    path = write_lines(tmp_path / "p.jsonl", *({"prompt": f"number {i}"} for i in range(30)))
    first, again = corpus(tiny_teacher, path, samples=5), corpus(tiny_teacher, path, samples=5)
    assert len(first) == 5 and first.digest() == again.digest()
    assert first.digest() != corpus(tiny_teacher, path, samples=6).digest()
    assert first.digest() != corpus(tiny_teacher, path, samples=5, top_p=0.9).digest()


def test_samples_limit_the_work(tiny_teacher: GGUFTeacher, tmp_path: Path) -> None:
    """No more conversations are tokenized than are wanted, but as many as it takes where some have
    nothing to learn; what is said is about those."""
    long = {"prompt": "word " * 200}
    many = [{"prompt": f"number {i}", "completion": f"is {i}"} for i in range(300)]
    calls: list[int] = []

    def tokenize(texts: list[str], **settings: bool) -> Any:
        calls[-1] += len(texts)
        return tiny_teacher.tokenize(texts, **settings)

    same = {"info": tiny_teacher.info, "detokenize": tiny_teacher.detokenize}
    counted = cast(GGUFTeacher, SimpleNamespace(tokenize=tokenize, **same))
    for rows, least, most in ((many, 6, 6), ([*many, *[long] * 300], 7, 40), ([long] * 300, 0, 0)):
        path = write_lines(tmp_path / "p.jsonl", *rows)
        calls.append(0)
        told: list[float] = []
        config = DataConfig(path=str(path), samples=6, max_length=64)
        if not least:
            with pytest.raises(UserError, match="no sequence"):
                build_corpus(config, counted, 0)
            assert calls[-1] == 300
            continue
        built = build_corpus(config, counted, 0, progress=told.append)
        assert len(built) == 6 and least <= calls[-1] <= most, calls
        assert told[-1] == 1.0 and min(told) >= 0 and max(told) <= 1.0 and not built.warnings
        texts = [text_of(tiny_teacher, item.segments[0]) for item in built.items]
        numbers = [int(text.split("number ")[1].split("<")[0]) for text in texts]
        assert numbers == sorted(set(numbers)), "their order is that of the data"
        left = [note.split(" conversations")[0] for note in built.notes if "left out" in note]
        if len(rows) == 300:
            chosen = np.random.default_rng(0).permutation(300)[:6]
            assert numbers == sorted(chosen.tolist()) and not left
        else:
            silent, of = map(int, left[0].split(" of "))
            assert of - silent == 6 and of <= calls[-1]


def test_what_is_left_out_is_not_cut(tiny_teacher: GGUFTeacher, tmp_path: Path) -> None:
    """A conversation whose answer lies beyond counts once; the refusal says what to do."""
    long = {"messages": [{"role": "user", "content": "word " * 200}, TURNS[1]]}
    short = [{"prompt": f"{i}", "completion": "yes"} for i in range(3)]
    built = corpus(tiny_teacher, write_lines(tmp_path / "a.jsonl", *short, long), max_length=64)
    said = [*built.notes, *built.warnings]
    assert len(built) == 3 and any("1 of 4" in one for one in said), said
    assert not any("cut" in one for one in said), said
    for rows, words in (([long, long], "no sequence"), ([long, short[0]], "only 1 sequence")):
        with pytest.raises(UserError, match=words) as caught:
            corpus(tiny_teacher, write_lines(tmp_path / "b.jsonl", *rows), max_length=64)
        for remedy in ("raise data.max_length", "data.train_on=all"):
            assert remedy in str(caught.value), words


def test_long_prompts_are_cut_and_said(tiny_teacher: GGUFTeacher, tmp_path: Path) -> None:
    """A prompt that leaves no room for an answer is cut, not answered, and mentioned."""
    prompts = [{"prompt": "word " * 200}, {"prompt": "short"}, {"prompt": "brief"}]
    path = write_lines(tmp_path / "p.jsonl", *prompts)
    built = corpus(tiny_teacher, path, max_length=24, train_on="all")
    assert [item.speaks for item in built.items] == [False, True, True]
    assert len(built.items[0].segments[0]) == 24
    assert "1 of 3" in built.warnings[0]


def test_conversations_are_learnt_where_the_assistant_speaks(
    tiny_teacher: GGUFTeacher, tmp_path: Path
) -> None:
    """Prediction t is that of token t + 1; text counts everywhere; other words change the store."""
    silent = [HI, {"role": "assistant", "content": "Hello"}, HI]
    rows = [
        {"messages": [*TURNS, *TURNS]},
        {"text": "Hello <|end|>"},
        {"prompt": "Hi"},
        {"prompt": "Hi ", "completion": "Hello"},
        {"messages": silent},
        {"prompt": "word " * 200},
    ]
    path = write_lines(tmp_path / "p.jsonl", *rows)
    built, whole = (
        corpus(tiny_teacher, path, max_length=64, train_on=on) for on in ("assistant", "all")
    )
    assert built.masked and not whole.masked and built.digest() != whole.digest()
    assert len(built) == 5 and len(whole) == 6 and any("1 of 5" in note for note in built.notes)
    learnt = []
    for item in built.items:
        tokens = item.segments[0]
        keep = np.ones(len(tokens) - 1, bool) if item.keep is None else item.keep
        learnt.append(text_of(tiny_teacher, tokens[1:][keep]))
    assert learnt == [
        "Hello<|end|>Hello<|end|>",
        "Hello <|end|>",
        "",
        "Hello<|end|>",
        "Hello<|end|>",
    ]
    request = built.generation_request(2, 3)
    assert request is not None and request.keep is not None and not request.keep[0].any()
    assert corpus(tiny_teacher, write_lines(tmp_path / "t.jsonl", *rows[1:2] * 2)).masked is False


def test_the_length_follows_the_data(tiny_teacher: GGUFTeacher) -> None:
    """256, or what 99.5 % of the conversations need, within memory and context; a chosen one is
    kept to; what is cut is counted."""
    huge = replace(tiny_teacher.info, width=1 << 20, layers=1 << 20)
    few, long, one = [10] * 50, [*range(1, 1000)], [*[20] * 999, 5000]
    context = tiny_teacher.info.context_length
    for chosen, info, lengths, wanted in (
        (None, tiny_teacher.info, [], 256),
        (None, tiny_teacher.info, few, 256),
        (None, tiny_teacher.info, long, 995),
        (None, tiny_teacher.info, one, 256),
        (None, huge, long, 256),
        (64, huge, long, 64),
        (10**6, tiny_teacher.info, few, 10**6),
    ):
        config = DataConfig(max_length=chosen)
        assert most_tokens(config, info, lengths) == min(wanted, context), (chosen, wanted)
        assert most_tokens(config, replace(info, context_length=100), lengths) <= 100
    for lengths, most, cut, share, much in (
        (few, 10, 0, "", False),
        ([100, 100, 200], 190, 1, "2.5%", False),
        ([100, 100, 200], 150, 1, "12.5%", True),
    ):
        text, warned = describe_cut(lengths, most, 10**6)
        assert warned == much and share in text and (f"{cut} of 3" in text) == (cut > 0), most


def test_with_nothing_given_the_teacher_speaks_both_turns(tiny_teacher: GGUFTeacher) -> None:
    """It starts inside the user's turn of its template and goes on with the assistant's."""
    built = corpus(tiny_teacher, samples=3, max_length=64)
    assert len(built) == 3 and built.spoken == 3
    opening, rest = built.items[0].segments
    assert text_of(tiny_teacher, opening).endswith("<|user|>\n")
    answer = text_of(tiny_teacher, rest)
    assert answer.startswith("<|end|>") and "<|assistant|>" in answer
    sequences = built.take(tiny_teacher, 0, 3, lambda done: None)
    assert all(2 <= len(tokens) <= 64 for tokens in sequences)
    assert len({tokens.tobytes() for tokens in sequences}) == 3


def test_requests_are_what_take_asks_for(tiny_teacher: GGUFTeacher, tmp_path: Path) -> None:
    """Where the teacher writes all of some sequences, asking for them gives what ``take`` gives."""
    lines = [{"prompt": "a"}, {"prompt": "b"}, {"messages": TURNS}, {"prompt": "c"}]
    path = write_lines(tmp_path / "m.jsonl", *lines)
    built = corpus(tiny_teacher, path, max_length=40)
    assert built.generation_request(0, 3) is None and built.generation_request(2, 4) is None
    for start, stop in ((0, 2), (1, 2), (3, 4)):
        request = built.generation_request(start, stop)
        assert request is not None
        said, other, taken = (
            [row.tolist() for row in rows]
            for rows in (
                tiny_teacher.generate(request),
                tiny_teacher.generate(replace(request, first_index=9)),
                built.take(tiny_teacher, start, stop, lambda done: None),
            )
        )
        assert said == taken and said != other, (start, stop)
    mixed = built.take(tiny_teacher, 0, 4, lambda done: None)
    assert mixed[2].tolist() == built.items[2].segments[0].tolist()
    for row, item in zip(mixed, built.items, strict=True):
        assert row[: len(item.segments[0])].tolist() == item.segments[0].tolist()
