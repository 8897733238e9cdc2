"""Private reasoning: what may be shown of a text, whole or in pieces, against the rules."""

from __future__ import annotations

import hashlib
import random
import re

from distill.inference.reasoning import (
    VisibleStream,
    digests,
    ends_inside,
    holds_tags,
    reasoning,
    visible,
)


def streamed(pieces: list[str], **options: bool) -> list[str]:
    """What a stream gives out for each piece, and at the end."""
    stream = VisibleStream(**options)
    return [*[stream.feed(piece) for piece in pieces], stream.close()]


WHOLE_TAG = re.compile(
    r"<\s*/?\s*think.*?(?:>|\Z)|</?final(?:\s+[\w-]+=[^<>]*)?\s*>", re.IGNORECASE | re.DOTALL
)


def by_the_rules(text: str, inside: bool = False) -> str:
    """``visible`` from its definition: every character gets its place, then some are left out."""
    cut, names, at = [""], [], 0
    for tag in WHOLE_TAG.finditer(text):
        cut[-1] += text[at : tag.start()]
        cut.append("")
        bare = re.sub(r"\s", "", tag[0]).lower()
        names.append("/" * (bare[1] == "/") + ("final" if "final" in bare[:7] else "think"))
        at = tag.end()
    cut[-1] += text[at:]
    if inside and names[:1] == ["think"] and not cut[0].strip():
        names[0] = "again"
    depth, final, finals, unopened = int(inside), 0, 0, -1
    places = []  # of each run of words: its depth, the number of its final
    for number, name in enumerate(["start", *names]):
        if name == "think":
            depth += 1
        elif name == "/think" and depth:
            depth -= 1
        elif name == "/think" and not final:
            unopened = number
        elif name == "final" and not depth and not final:
            finals += 1
            final = finals
        elif name == "/final" and not depth:
            final = 0
        places.append((depth, final))
    placed = list(zip(places, cut, strict=True))

    def joined(number: int, start: int = 0) -> str:
        return "".join(text for place, text in placed[start:] if place == (0, number)).strip()

    if not finals:
        return joined(0, max(unopened, 0))
    return "\n".join(filter(None, map(joined, range(1, finals + 1))))


SHOWN = [
    ("Plain words, 1 < 2 > 0.", "Plain words, 1 < 2 > 0."),
    ("<think>secret</think>Hello", "Hello"),
    ("<think>\nsecret\n</think>\n\n Hello \n", "Hello"),
    ("a <think>secret</think> b <thinking>secret</thinking> c", "a  b  c"),
    ("<think-safety>secret</think-safety><think-task>secret</think-task><final>x</final>", "x"),
    ('<THINK id=1 a="b">secret</Think>x', "x"),
    ("< think >secret< / think >x", "x"),
    ("x<think>secret", "x"),
    ("x<think", "x"),
    ("x<think secret and no end of the tag", "x"),
    ("secret</think>x", "x"),
    ("secret</think", ""),
    ("<think>secret<think>secret</think>secret</think>x", "x"),
    ("<think>secret</think>secret</think>x", "x"),
    ("secret<final>x</final>secret", "x"),
    ("<think>secret <final>secret</final></think>x", "x"),
    ("<think>secret</think>secret<FINAL>x <think>secret</think>y", "x y"),
    ("<final> a </final><final> </final>secret<final>\nb</final>", "a\nb"),
    ("<final>a</think>b</final>", "ab"),
    ("<final>a</final>secret</think>secret", "a"),
    ("<final></final>secret", ""),
    ("<final>a<final>b</final>secret</final>secret", "ab"),
    ("x</final>y", "xy"),
    *[("for (i = 0; i<final && j>3;) x<finally> <finals>",) * 2],
    ("<think>秘密</think>こんにちは😀", "こんにちは😀"),
    ("", ""),
    (" \n ", ""),
]


def test_what_may_be_shown() -> None:
    """By hand, case by case; nothing secret comes out, and everything secret stays."""
    for text, shown in SHOWN:
        assert visible(text) == shown, text
        assert by_the_rules(text) == shown, f"the reference of the tests below: {text}"
        assert "".join(streamed(list(text))) == shown, text
        private = "\n".join(reasoning(text))
        secrets = text.count("secret") + text.count("秘密") - ("<think secret" in text)
        assert private.count("secret") + private.count("秘密") == secrets, text


def test_a_program_is_no_final_answer() -> None:
    """What only looks like a ``<final>`` hides nothing."""
    program = "if (i<final && j>3 || a=<final) return;"
    assert visible(program) == program and "".join(streamed(list(program))) == program
    long = "<final a=" + "a" * 49 + ">x"
    assert visible(long) == long


def test_a_prompt_may_have_opened_the_tag() -> None:
    """Then the text begins inside, also where it is cut, or where the model repeats the tag."""
    for text, shown in (
        ("secret</think>x", "x"),
        ("secret", ""),
        ("\n<think>secret</think>x", "x"),
        ("secret<think>secret</think>secret</think>x", "x"),
    ):
        assert visible(text, inside=True) == shown, text
    assert visible("secret") == "secret" and reasoning("secret", inside=True) == ["secret"]
    for prompt, inside in (
        ("<|user|>hi<|assistant|>\n<think>\n", True),
        ("<think><think></think>", True),
        ("<think>\n\n</think>\n\n", False),
        ("</think><|assistant|>", False),
    ):
        assert ends_inside(prompt) == inside, prompt
    assert holds_tags("{{ '</think>' }}") and holds_tags("<final>")
    assert not holds_tags("thinking: <|end|>")


def test_the_private_parts_and_their_digests() -> None:
    """In order, one for each outermost pair of tags, with what stands outside a ``<final>``."""
    text = "<think> a </think><think>b<think>c</think>d</think> e "
    text += "<final>f<thinking>g</thinking></final>h"
    assert reasoning(text) == ["a", "bcd", "e", "g", "h"]
    assert digests(text)[1] == hashlib.sha256(b"bcd").hexdigest() and len(digests(text)) == 5
    assert reasoning("x</think>y<think> </think>z") == ["x"] and reasoning("just words") == []
    assert digests("<think>\udce9</think>") == [hashlib.sha256(b"\xed\xb3\xa9").hexdigest()]


WORDS = [
    "<think>", "</think>", "<final>", "</final>", "<THINKING a=1>", "</ think>", "<think", "<final",
    "</thi", "<", ">", " ", "\n", "a", "b c", "日本", "<final x=1>", "<final x>", "</final >",
    "fin", "al>", "think", "/",
]  # fmt: skip


def random_text(source: random.Random) -> str:
    """A mixture of tags, halves of tags and words."""
    return "".join(source.choice(WORDS) for _ in range(source.randrange(14)))


def split_at_random(text: str, source: random.Random) -> list[str]:
    """A text in pieces."""
    cuts = sorted(source.randrange(len(text) + 1) for _ in range(source.randrange(8)))
    return [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def test_any_text_in_any_pieces_is_shown_as_the_rules_say() -> None:
    """The stream gives what the whole text has, and never more."""
    source = random.Random(0)
    shown = tags = 0
    for _ in range(8_000):
        text, inside = random_text(source), source.random() < 0.2
        expected = by_the_rules(text, inside)
        assert visible(text, inside=inside) == expected, text
        pieces = split_at_random(text, source)
        assert "".join(streamed(pieces, inside=inside)) == expected, pieces
        shown += bool(expected)
        tags += expected != text.strip()
    assert shown > 2000 and tags > 2000


def test_nothing_is_shown_that_must_be_hidden_later() -> None:
    """Whatever a text goes on with, what was given out is the beginning of what may be shown."""
    source = random.Random(1)
    early = 0
    for _ in range(5_000):
        text = random_text(source)
        stream = VisibleStream()
        given = stream.feed(text)
        for _ in range(3):
            assert by_the_rules(text + random_text(source)).startswith(given), text
        early += bool(given)
    assert early > 200


def test_a_final_answer_is_given_out_as_it_comes() -> None:
    """Word by word; words outside only at the end."""
    pieces = ["<think>x</think>", "<final>", "One", " two", " ", "three", "</fi", "nal>", "no"]
    assert streamed(pieces) == ["", "", "One", " two", "", " three", "", "", "", ""]
    assert streamed(["a", " b"]) == ["", "", "a b"]


def test_the_impatient_see_words_at_once_until_the_first_tag() -> None:
    """A model that nothing says reasons: words, halves of tags held back; then the rules hold."""
    for pieces, given in (
        ([" One", " two <", "3 <th", "ree"], ["One", " two", " <3", " <three", ""]),
        (["Hi <think>sec", "ret</think> there", "<final>", "x"], ["Hi", "", "", "\nx", ""]),
        (["Hi<think>secret</think> there"], ["Hi", " there"]),
        (["<think>secret</think>no</think> you"], ["", "you"]),
    ):
        assert streamed(pieces, patient=False) == given, pieces
    assert streamed(["secret</think>you"], patient=False, inside=True) == ["", "you"]
    stream = VisibleStream(patient=False)
    stream.feed("Hi")
    assert not stream.tagged
    stream.feed("<think>")
    assert stream.tagged


def test_the_impatient_too_see_all_of_a_text_that_has_its_tags_in_pairs() -> None:
    """Without ``<final>`` and unopened ``</think>`` there is no difference."""
    source = random.Random(2)
    words = ["a", " ", "<think>s</think>", "<", ">", "\n", "日本"]
    for _ in range(3_000):
        inner = "".join(source.choices(words, k=12))
        pieces = split_at_random(inner, source)
        assert "".join(streamed(pieces, patient=False)) == visible(inner), inner
