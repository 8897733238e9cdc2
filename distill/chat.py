"""Talk to a GGUF file through llama.cpp: what a user does first with a new student."""

from __future__ import annotations

from distill.errors import UserError
from teachers.base import Sampling, Tokens
from teachers.conversation import conversation_tokens
from teachers.gguf_teacher import GGUFTeacher


class Conversation:
    """A conversation with one model; without a chat template, the text so far is continued."""

    def __init__(self, model: GGUFTeacher, *, temperature: float, max_new_tokens: int, seed: int) -> None:
        self.model = model
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.messages: list[dict[str, str]] = []

    def say(self, text: str) -> str:
        """Send one message and return the answer.

        Raises:
            UserError: the conversation no longer fits the model's context.
        """
        self.messages.append({"role": "user", "content": text})
        prompt = conversation_tokens(self.model, self.messages, answer=True)
        room = self.model.info.context_length - len(prompt)
        if room < 1:
            self.messages.pop()
            raise UserError(
                f"the conversation has {len(prompt)} tokens, the model's context is "
                f"{self.model.info.context_length}; start a new one"
            )
        sampling = Sampling(self.temperature, 1.0, len(prompt) + min(room, self.max_new_tokens), self.seed)
        written = self.model.speak([[prompt]], sampling, first_index=len(self.messages))[0]
        answer = self._text(written[len(prompt) :])
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def _text(self, tokens: Tokens) -> str:
        """The answer as text, without the end-of-turn token."""
        if len(tokens) and int(tokens[-1]) in self.model.info.end_tokens:
            tokens = tokens[:-1]
        return self.model.detokenize([tokens])[0]
