"""Text and tokens of a model: prompts in, and text out piece by piece, up to strings that end it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from zgraph.errors import UsageError


class Words:
    """A tokenizer of transformers.

    Args:
        tokenizer: one that the library tokenizers runs.

    Raises:
        UsageError: it is none of those.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self.backend is None:
            raise UsageError(
                f"a {type(tokenizer).__name__} cannot give text token by token; save a fast tokenizer with the model"
            )

    @property
    def has_chat(self) -> bool:
        """Whether there is a template of how messages become a prompt."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def tokens(self, text: str) -> list[int]:
        """The tokens of a prompt."""
        found: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return found

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation, up to where the answer begins.

        Raises:
            UsageError: there is no template, or it refuses these messages.
        """
        if not self.has_chat:
            raise UsageError("the tokenizer has no chat template; use /v1/completions with a whole prompt")
        try:
            found = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except Exception as error:  # jinja2's, or what the template raises
            raise UsageError(f"the chat template refuses these messages: {error}") from None
        tokens: list[int] = found["input_ids"]
        return tokens

    def whole(self, tokens: Sequence[int]) -> str:
        """The text of tokens that follow a prompt, without those that are no text."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class TextStream:
    """The text of one answer, in pieces.

    What may be the beginning of a string that ends it is held back until it is known.

    Args:
        words: the tokenizer.
        stops: strings that end the text, which are not part of it.

    Attributes:
        has_stopped: whether one of them came.
    """

    def __init__(self, words: Words, stops: Sequence[str] = ()) -> None:
        self.words, self.stops = words, tuple(stops)
        self.has_stopped = False
        self._tokens: list[int] = []
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._text, self._num_given = "", 0

    def add(self, token: int) -> str:
        """The text that is certain with one more token, and was not given yet."""
        self._tokens.append(token)
        self._text += self._decoder.step(self.words.backend, token) or ""
        return self._given(self._num_held())

    def end(self) -> str:
        """The rest of the text, when no more tokens come."""
        if self.has_stopped:
            return ""
        whole = self.words.whole(self._tokens)
        if whole.startswith(self._text):  # characters of which the last token is only a part
            self._text = whole
        return self._given(0)

    def _given(self, num_held: int) -> str:
        if self.has_stopped:
            return ""
        at = min((found for stop in self.stops if (found := self._text.find(stop)) >= 0), default=None)
        self.has_stopped = at is not None
        end = len(self._text) - num_held if at is None else at
        piece = self._text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        return piece

    def _num_held(self) -> int:
        """Characters at the end that a string which ends the text may begin with."""
        text = self._text
        sizes = (
            n for stop in self.stops for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])
        )
        return max(sizes, default=0)
