"""The terminal of ``distill chat``: answers on standard output, the rest on standard error."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console as RichConsole

from distill.errors import UserError
from distill.inference.chat import ChatSettings, Conversation, Question
from distill.runtime.format import human_count
from distill.runtime.printable import colored, markup, printable
from students.model.head_decisions import carries_heads
from teachers.llama_cpp.interrupts import uninterrupted
from teachers.llama_cpp.teacher import GGUFTeacher

if TYPE_CHECKING:
    from distill.inference.judge import Judge


HELP = """\
/new    forget the conversation and begin again
/help   this
/quit   end (so do an empty line and Ctrl-D)
Ctrl-C stops an answer and keeps what is there of it.

Before each answer stands what the student's safety head decides on the
message alone, with the probability that this is right (what is unclear is
escalated), and after it which share of its tokens the teacher is expected to
have chosen too. Both are for you to look at:
nothing is filtered, and the answer comes after REFUSE as well, since the
student itself has learnt what to refuse. Reasoning between <think> tags is
not shown, and not part of the conversation; of a <final>, only its content."""


def chat_with(path: Path, prompt: str | None, settings: ChatSettings, safety: bool) -> None:
    """Load the file and answer one message, or chat; ``safety``: use the file's heads, if any.

    Raises:
        UserError: a message or setting that the model cannot take, or broken heads.
        TeacherFileError, TeacherError: llama.cpp cannot load the file.
    """
    with GGUFTeacher(path) as model:
        model.worker.options()  # the check of llama.cpp, while Ctrl-C still ends all of it at once
        conversation = Conversation(model, settings, _judge_of(model) if safety else None)
        screen = _Screen(conversation)
        if prompt is None:
            screen.converse()
        else:
            screen.turn(prompt)


def _judge_of(model: GGUFTeacher) -> Judge | None:
    """The reader of the file's heads, if any; imports PyTorch only then, which takes seconds."""
    if not carries_heads(model.file.fields):
        return None
    from distill.inference.judge import Judge

    return Judge(model.file.path, model)


class _Screen:
    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.notes = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self.asked = sys.stdin.isatty()  # somebody sits there

    def converse(self) -> None:
        """Answer line after line."""
        info = self.conversation.model.info
        if self.asked:
            size = f"{info.architecture}, {human_count(info.parameters)} parameters"
            self._note(f"{info.name} ({size}). /help says more; an empty line or Ctrl-D ends.")
        for line in self._lines():
            if re.fullmatch(r"/[a-z]+", line):
                if line == "/quit":
                    return
                self._command(line)
                continue
            try:
                self.turn(line)
            except UserError as error:
                if not self.asked:
                    raise
                self.notes.print(f"[yellow]! {markup(str(error))}[/]")
            except KeyboardInterrupt:
                if not self.asked:
                    raise
                self._note("stopped")

    def turn(self, text: str) -> None:
        """One message and its answer."""
        with uninterrupted():  # the worker's answers to all of this are to be read
            question = self.conversation.ask(text)
        if question.dropped:
            turns = "turn" if question.dropped == 1 else f"{question.dropped} turns"
            self._note(
                f"the conversation does not fit the context any more: its oldest {turns} left out"
            )
        if question.decision is not None:
            decision, chances = question.decision
            self.notes.print(f"{colored(decision)} [dim]{_confidence(decision, chances)}[/]")
        try:
            self._answer(question)
        finally:
            print(flush=True)
        if not question.shown:
            reasoned = "private reasoning only; --max-tokens allows more"
            self._note(f"({reasoned if question.reasoned else 'no words'})")
        with uninterrupted():
            agreement = self.conversation.agreement(question)
        if agreement is not None and self.conversation.judge is not None:
            unsure = agreement < self.conversation.judge.heads.trust
            advice = "  → ask the teacher" if unsure else ""
            self._note(
                f"expected agreement with the teacher: {_percent(agreement)} of the tokens{advice}"
            )

    def _answer(self, question: Question) -> None:
        waiting = self.notes.status("[dim]…[/]", spinner="dots") if self.notes.is_terminal else None
        with contextlib.ExitStack() as open_until_words:
            if waiting is not None:
                open_until_words.enter_context(waiting)
            with contextlib.closing(self.conversation.answer(question)) as pieces:
                for piece in pieces:
                    if piece:
                        open_until_words.close()
                        sys.stdout.write(printable(piece))
                        sys.stdout.flush()

    def _command(self, line: str) -> None:
        if line == "/new":
            self.conversation.restart()
            self._note("a new conversation")
        elif line == "/help":
            self._note(HELP)
        else:
            self._note(f"there is no {line}; /help lists what there is")

    def _lines(self) -> Iterator[str]:
        """The user's lines until an empty one; a mark before each where somebody sits there."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            # Bytes that are no UTF-8 reach the model as they are.
            sys.stdin.reconfigure(errors="surrogateescape")
        while True:
            try:
                line = self._line().strip()
            except EOFError:
                if self.asked:
                    self._note("")
                return
            except KeyboardInterrupt:
                if not self.asked:
                    raise
                self._note("\nan empty line or Ctrl-D ends")
                continue
            if not line:
                return
            yield line

    def _line(self) -> str:
        if self.asked and sys.stdout.isatty():
            with contextlib.suppress(ImportError):  # Windows has none, and edits lines by itself
                import readline  # noqa: F401 (input() then knows the arrow keys)
            return input("> ")
        if self.asked:
            self.notes.print("> ", end="")
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line

    def _note(self, text: str) -> None:
        self.notes.print(f"[dim]{markup(text)}[/]")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _confidence(decision: str, chances: dict[str, float]) -> str:
    """How probable it is that a decision is right; of one that is taken because nothing is clear,
    between what."""
    if chances[decision] == max(chances.values()):
        return _percent(chances[decision])
    likely = sorted(chances, key=lambda name: -chances[name])[:2]
    return "unclear: " + ", ".join(f"{name} {_percent(chances[name])}" for name in likely)
