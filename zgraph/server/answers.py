"""Answers as OpenAI's protocol writes them: whole, and as pieces of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zgraph.server.text import TextStream


@dataclass
class Choice:
    """One answer while it is made.

    Args:
        stream: its text.
        num_prompt: tokens of its prompt.
    """

    stream: TextStream
    num_prompt: int
    text: str = ""
    num_made: int = 0
    finish_reason: str | None = None

    def add(self, token: int | None, ended: str) -> str:
        """The text that a token adds; `finish_reason` is there after the last one."""
        piece = ""
        if token is not None:
            self.num_made += 1
            piece = self.stream.add(token)
        if self.stream.has_stopped:
            self.finish_reason = "stop"
        elif ended:
            piece += self.stream.end()
            self.finish_reason = "stop" if self.stream.has_stopped else ended
        self.text += piece
        return piece


@dataclass(frozen=True)
class Form:
    """How answers of one kind are written.

    Args:
        is_chat: whether they are messages.
        model: its name.
    """

    is_chat: bool
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer to a request that is no stream."""
        return {
            **self._head("chat.completion" if self.is_chat else "text_completion"),
            "choices": [self._choice(n, c.text, c.finish_reason, "message") for n, c in enumerate(choices)],
            "usage": usage(choices),
        }

    def piece(self, number: int, text: str, finish_reason: str | None) -> bytes:
        """A piece of a stream."""
        head = self._head("chat.completion.chunk" if self.is_chat else "text_completion")
        return event({**head, "choices": [self._choice(number, text, finish_reason, "delta")]})

    def last(self, choices: Sequence[Choice]) -> bytes:
        """The numbers of tokens, as the last piece of a stream."""
        head = self._head("chat.completion.chunk" if self.is_chat else "text_completion")
        return event({**head, "choices": [], "usage": usage(choices)})

    def _head(self, kind: str) -> dict[str, Any]:
        name = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, number: int, text: str, finish_reason: str | None, key: str) -> dict[str, Any]:
        said: dict[str, Any] = {"text": text}
        if self.is_chat:
            said = {key: {"role": "assistant", "content": text}}
        return {"index": number, **said, "logprobs": None, "finish_reason": finish_reason}


def usage(choices: Sequence[Choice]) -> dict[str, int]:
    """Numbers of tokens."""
    prompt, made = sum(c.num_prompt for c in choices), sum(c.num_made for c in choices)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def event(found: Mapping[str, Any] | str) -> bytes:
    """A server-sent event."""
    return f"data: {found if isinstance(found, str) else json.dumps(found)}\n\n".encode()


def problem(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
