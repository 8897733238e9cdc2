"""Talk to a GGUF file through llama.cpp: what a user does first with a new student."""

from __future__ import annotations

import codecs
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from distill.errors import UserError
from distill.inference.reasoning import VisibleStream, ends_inside, holds_tags
from teachers.base import Sampling, Tokens
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.tokenizer.chat_template import ChatTemplateError, Message, render_chat
from teachers.tokenizer.conversation import conversation_tokens

if TYPE_CHECKING:
    from distill.inference.judge import Judge


_MARK = "\u2063words\u2063"  # invisible separators: no template contains it
ANSWER_SHARE = 4  # 1/4 of the context is kept free for the answer, at the cost of old turns
AGREEMENT_BYTES = 64 << 20  # of logits: what a look at the whole answer may take


@dataclass(frozen=True)
class ChatSettings:
    """Sampling, the answer's greatest length in tokens, and the system message, if any."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    system: str | None = None


@dataclass
class Question:
    """A message with the conversation before it, ready to be answered.

    ``prompt``: the tokens of ``messages``; ``dropped``: turns left out so that it fits.
    ``decision``: of the safety head, and its probabilities. The answer so far: ``written``, its
    tokens; ``shown``, its visible text; ``reasoned``, whether there was more.
    """

    prompt: Tokens
    messages: list[Message]
    dropped: int
    decision: tuple[str, dict[str, float]] | None
    written: list[int] = field(default_factory=list)
    shown: str = ""
    reasoned: bool = False


class Conversation:
    """A conversation with one model; without a chat template, the text so far is continued.

    Private reasoning is neither shown nor kept in the conversation.
    """

    def __init__(
        self, model: GGUFTeacher, settings: ChatSettings, judge: Judge | None = None
    ) -> None:
        """``judge``: of the same file. Raises ``UserError`` if the model takes no system
        message."""
        self.model = model
        self.settings = settings
        self.judge = judge
        self.messages: list[Message] = []
        self.turns = 0
        template = model.info.chat_template
        vocabulary = model.file.value("tokenizer.ggml.tokens")
        vocabulary = vocabulary if isinstance(vocabulary, list) else []
        texts = [token for token in vocabulary if isinstance(token, str)]
        self._reasons = holds_tags("\0".join([template or "", *texts]))
        self._begins_inside = False
        if template is not None:
            opened = self._render(template, [{"role": "user", "content": _MARK}])
            self._begins_inside = ends_inside(opened.rpartition(_MARK)[2])
        if settings.system is not None:
            self._require_system(template)

    def restart(self) -> None:
        """Forget everything but the settings; the same messages then get the same answers again."""
        self.messages, self.turns = [], 0

    def ask(self, text: str) -> Question:
        """Put a message; the safety head decides on it alone, as in its training.

        Raises:
            UserError: it is empty, or does not fit the model's context even alone.
        """
        if not text.strip():
            raise UserError("the message is empty; write something")
        messages = [*self.messages, {"role": "user", "content": text}]
        kept = min(self.settings.max_new_tokens, self.model.info.context_length // ANSWER_SHARE)
        dropped = 0
        while True:
            prompt = conversation_tokens(self.model, [*self._system(), *messages], answer=True)
            room = self.model.info.context_length - len(prompt)
            if room >= (kept if len(messages) > 1 else 1):
                break
            if len(messages) == 1:
                raise UserError(
                    f"the message takes {len(prompt)} tokens, the model's context is "
                    f"{self.model.info.context_length}; shorten it"
                )
            del messages[:2]
            dropped += 1
        return Question(prompt, messages, dropped, self._decide(text))

    def answer(self, question: Question) -> Generator[str, None, None]:
        """Generate the answer: visible pieces as early as they are sure; empty ones show progress.

        If left early, also by Ctrl-C, the conversation keeps what was shown until then.
        """
        settings, info = self.settings, self.model.info
        room = info.context_length - len(question.prompt)
        longest = len(question.prompt) + min(room, settings.max_new_tokens)
        sampling = Sampling(settings.temperature, settings.top_p, longest, settings.seed)
        stream = VisibleStream(inside=self._begins_inside, patient=self._reasons)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        try:
            for token, piece in self.model.stream(
                question.prompt, sampling, number=2 * self.turns + 1
            ):
                question.written.append(token)
                given = "" if token in info.end_tokens else stream.feed(decoder.decode(piece))
                question.shown += given
                yield given
            given = stream.close()  # without what the greatest length may have left of a character
            question.shown += given
            yield given
        finally:
            question.reasoned = stream.tagged
            self._reasons = self._reasons or stream.tagged
            self.messages = [*question.messages, {"role": "assistant", "content": question.shown}]
            self.turns += 1

    def agreement(self, question: Question) -> float | None:
        """Expected share of the answer's tokens at which the teacher finds the same one most
        probable; nothing where no head says so, or where finding out takes too much."""
        length = len(question.prompt) + len(question.written)
        if self.judge is None or self.judge.heads.verification is None or not question.written:
            return None
        if 4 * length * self.model.info.vocab_size > AGREEMENT_BYTES:
            return None
        tokens = np.concatenate((question.prompt, question.written)).astype(np.int32)
        return self.judge.agreement(question.prompt, tokens)

    def _decide(self, text: str) -> tuple[str, dict[str, float]] | None:
        if self.judge is None or self.judge.heads.safety is None:
            return None
        return self.judge.decide([self.judge.tokens(text)])[0]

    def _system(self) -> list[Message]:
        system = self.settings.system
        return [] if system is None else [{"role": "system", "content": system}]

    def _require_system(self, template: str | None) -> None:
        messages = [{"role": "system", "content": _MARK}, {"role": "user", "content": "text"}]
        reason = "it has no chat template"
        if template is not None:
            try:
                if _MARK in self._render(template, messages):
                    return
                reason = "its chat template leaves it out"
            except ChatTemplateError as error:
                reason = str(error)
        raise UserError(
            f"--system: {self.model.file.path} takes no system message ({reason}); put it into the "
            "first message"
        )

    @staticmethod
    def _render(template: str, messages: list[Message]) -> str:
        return render_chat(template, messages, add_generation_prompt=True).text
