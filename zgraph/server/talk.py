"""A conversation with a model in this process."""

from __future__ import annotations

from collections.abc import Iterator

from zgraph.errors import ContextLengthError, InferenceError
from zgraph.inference.continuous import ContinuousBatch, Request
from zgraph.inference.generation import Generator
from zgraph.inference.sampling import Sampling
from zgraph.server.text import TextStream, Words


class Talk:
    """A conversation: what was said is part of each prompt.

    Args:
        generator: a model of `zgraph.infer`.
        words: its tokenizer, with a chat template.
        sampling: how tokens are chosen.
        seed: of the draws.
        system: what the model is told before; empty for nothing.
    """

    def __init__(self, generator: Generator, words: Words, sampling: Sampling, seed: int, system: str = "") -> None:
        self.batch, self.words, self.sampling, self.seed = ContinuousBatch(generator), words, sampling, seed
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, said: str, max_tokens: int) -> Iterator[str]:
        """The answer, in pieces. What was given of it becomes part of the conversation, also if no more is taken.

        Raises:
            UsageError: there is no chat template, or it refuses the messages.
            ContextLengthError: there is no room for an answer.
            InferenceError: the model gave logits that are no numbers.
        """
        messages = [*self.messages, {"role": "user", "content": said}]
        tokens = self.words.chat(messages)
        room = self.batch.calls.max_len - len(tokens)
        if room < 1:
            raise ContextLengthError(
                f"the conversation has {len(tokens)} tokens, more than the {self.batch.calls.max_len} places of the "
                "cache; begin a new one, or pass a larger --max-len"
            )
        seed = self.seed + len(messages)
        number = self.batch.submit(Request(tokens, min(max_tokens, room), self.sampling, seed))
        stream, given = TextStream(self.words), ""
        try:
            while self.batch.is_busy:
                for made in self.batch.step():
                    if made.token is None:
                        raise InferenceError(
                            "the model gives logits that are no numbers; look for weights that are none"
                        )
                    piece = stream.add(made.token) + (stream.end() if made.ended else "")
                    given += piece
                    yield piece
        finally:
            self.batch.cancel(number)
            self.messages = [*messages, {"role": "assistant", "content": given}]
