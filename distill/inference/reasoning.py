"""Private reasoning: what of a text may be shown, and what stays between ``<think…>`` tags.

The rules, for a whole text:

* ``<think``, whatever follows up to ``>`` (``<thinking>``, ``<think-safety>``, ``<THINK id=1>``),
  opens reasoning and ``</think…>`` closes it; they nest. What is never closed hides everything
  behind it.
* A ``</think…>`` that nothing has opened hides everything before it: chat templates may open the
  tag in the prompt.
* Where there is a ``<final>`` outside reasoning, only what is between it and ``</final>`` (or the
  end) is shown; of several, all, a line each. A ``</think…>`` that nothing has opened hides nothing
  of a ``<final>``.
* Tags are never shown; space at both ends of what is shown is left out.

They apply to whole texts: text without a tag is private after all if a ``</think>`` or a
``<final>`` follows. ``VisibleStream`` therefore holds back all but the content of a ``<final>``
until the text has ended.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Literal

Kind = Literal["text", "open", "close", "final", "end of final"]
PartKind = Literal["private", "outside", "final"]

# A think tag is one as soon as its name is there, so that one cut short hides too. A final tag has
# to be whole, with nothing in it but an attribute: `i<final && j>3` is a program.
_TAG = re.compile(
    r"<\s{0,8}(?P<close>/?)\s{0,8}think|<(?P<end>/?)final(?:\s{1,8}[\w-]{1,32}=[^<>]{0,48})?\s{0,8}>",
    re.IGNORECASE,
)
# What more text may make a tag of; the last part takes in all that may stand in a final tag.
_BEGINS_TAG = re.compile(
    r"<(?:\s{0,8}/?\s{0,8}(?:t(?:h(?:i(?:n)?)?)?)?|/?(?:f(?:i(?:n(?:a(?:l(?:\s[^<>]{0,96})?)?)?)?)?)?)\Z",
    re.IGNORECASE,
)


def visible(text: str, *, inside: bool = False) -> str:
    """What of ``text`` may be shown; ``inside``: the prompt before it has opened a think tag."""
    stream = VisibleStream(inside=inside)
    return stream.feed(text) + stream.close()


def reasoning(text: str, *, inside: bool = False) -> list[str]:
    """What ``visible`` leaves out, in order, without tags and blanks; nested parts count as one."""
    parts = _Parts(inside)
    parts.add(_Tags().read(text, last=True))
    hidden = [part.text.strip() for part in parts.parts if part.kind not in parts.shown]
    return [part for part in hidden if part]


def digests(text: str, *, inside: bool = False) -> list[str]:
    """SHA-256 of each part of ``reasoning``, as hexadecimal, of its UTF-8."""
    parts = reasoning(text, inside=inside)
    return [
        hashlib.sha256(part.encode("utf-8", errors="surrogatepass")).hexdigest() for part in parts
    ]


def holds_tags(text: str) -> bool:
    """Whether a text has any reasoning tag, such as a reasoning model's chat template."""
    return _TAG.search(text) is not None


def ends_inside(text: str) -> bool:
    """Whether reasoning is open at the end of ``text``, such as a prompt's."""
    depth = 0
    for kind, _ in _Tags().read(text, last=True):
        if kind == "open":
            depth += 1
        elif kind == "close":
            depth = max(0, depth - 1)
    return depth > 0


class VisibleStream:
    """Text in pieces → what of it may be shown, as early as it is sure.

    The returned pieces make up ``visible(whole text)``. The content of a ``<final>`` is returned as
    it comes; all else outside reasoning only by ``close``, since a tag that hides it may follow.

    With ``patient=False``, for a model not known to reason, text is returned as it comes until the
    first tag. What a later ``</think>`` or ``<final>`` would hide has then been shown already.
    """

    def __init__(self, *, inside: bool = False, patient: bool = True) -> None:
        self.patient = patient
        self._tags = _Tags()
        self._parts = _Parts(inside)
        self._given = 0  # parts given out entirely
        self._position = 0  # characters given out of the part after them
        self._space = ""  # held back, as it may be the last
        self._leading = True  # space that comes now is left out
        self._begun = False
        self._free = not patient and not inside

    @property
    def tagged(self) -> bool:
        """Whether the text has had any tag, or began inside reasoning."""
        return self._parts.tagged

    def feed(self, piece: str) -> str:
        """Take the next piece and return what may be shown now."""
        return self._take(piece, last=False)

    def close(self) -> str:
        """The text has ended; return the rest of what may be shown."""
        return self._take("", last=True)

    def _take(self, piece: str, *, last: bool) -> str:
        out = []
        for event in self._tags.read(piece, last=last):
            self._parts.add([event])
            self._free = self._free and not self._parts.tagged
            out.append(self._give(last=False))
        if last:
            out.append(self._give(last=True))
        return "".join(out)

    def _give(self, *, last: bool) -> str:
        """Emit what is sure: final parts; at the end (or if impatient) text, if there is no
        final."""
        parts, out = self._parts, ""
        shown = parts.shown if last or self._free or parts.has_final else ()
        while self._given < len(parts.parts) and (shown or last):
            part = parts.parts[self._given]
            if part.kind in shown:
                if part.kind == "final" and part.begins and self._position == 0:
                    self._space, self._leading = "\n" if self._begun else "", True
                out += self._trimmed(part.text[self._position :])
                self._position = len(part.text)
            if self._given == len(parts.parts) - 1 and not last:
                break  # it may still grow
            self._given, self._position = self._given + 1, 0
        return out

    def _trimmed(self, text: str) -> str:
        """``text`` behind the space held back, without the space that may be the last."""
        if self._leading:
            text = text.lstrip()
        trimmed = text.rstrip()
        if not trimmed:
            self._space += text
            return ""
        out = self._space + trimmed
        self._space, self._leading, self._begun = text[len(trimmed) :], False, True
        return out


class _Tags:
    """Splits text that comes in pieces at its tags."""

    def __init__(self) -> None:
        self._pending = ""
        self._in_tag = False  # after `<think`, before its `>`

    def read(self, piece: str, *, last: bool) -> Iterator[tuple[Kind, str]]:
        """Tokens of the text so far not returned before; ``last``: nothing more comes."""
        text, self._pending = self._pending + piece, ""
        while text:
            if self._in_tag:
                _, end, text = text.partition(">")
                self._in_tag = not end
                continue
            tag = _TAG.search(text)
            begins = None if tag is not None or last else _BEGINS_TAG.search(text)
            edge = begins or tag
            before = text[: edge.start()] if edge else text
            if before:
                yield "text", before
            if begins:
                self._pending = text[begins.start() :]
                return
            if tag is None:
                return
            if tag["end"] is not None:
                yield ("end of final" if tag["end"] else "final"), ""
            else:
                self._in_tag = True
                yield ("close" if tag["close"] else "open"), ""
            text = text[tag.end() :]


class _Part:
    """A run of text of one kind; ``begins``: it is the first behind its outermost tag."""

    def __init__(self, kind: PartKind, begins: bool) -> None:
        self.kind = kind
        self.begins = begins
        self.text = ""


class _Parts:
    """Sorts text by the tags around it."""

    def __init__(self, inside: bool) -> None:
        self.parts: list[_Part] = []
        self.has_final = False
        self.tagged = inside
        self._depth = int(inside)
        self._in_final = False
        self._new: set[PartKind] = set()  # the next text of these kinds begins a part
        self._repeats = inside  # the prompt's open tag may come once more at the beginning

    @property
    def shown(self) -> tuple[str, ...]:
        """The kinds of parts that may be shown, as far as the text goes."""
        return ("final",) if self.has_final else ("outside",)

    def add(self, events: Iterator[tuple[Kind, str]] | list[tuple[Kind, str]]) -> None:
        """Sort what follows."""
        for kind, text in events:
            if kind == "text":
                self._add_text(text)
                continue
            self.tagged = True
            if kind == "open":
                if not self._depth:
                    self._new.add("private")
                self._depth += not self._repeats
            elif kind == "close" and self._depth:
                self._depth -= 1
            elif kind == "close":  # with a final answer, text outside is never shown
                for part in self.parts:
                    part.kind = "private" if part.kind == "outside" else part.kind
            elif kind == "final" and not self._depth:
                if not self._in_final:
                    self._new.add("final")
                self._in_final = self.has_final = True
            elif kind == "end of final" and not self._depth:
                self._in_final = False
            self._repeats = False

    def _add_text(self, text: str) -> None:
        self._repeats = self._repeats and not text.strip()
        kind: PartKind = "private" if self._depth else "final" if self._in_final else "outside"
        begins = kind in self._new
        self._new.discard(kind)
        if begins or not self.parts or self.parts[-1].kind != kind:
            self.parts.append(_Part(kind, begins))
        self.parts[-1].text += text
