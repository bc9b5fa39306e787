"""A cursor over a line of text: words, numbers and strings, one after the other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import ClassVar, TypeVar

from zgraph.errors import TextError

_T = TypeVar("_T")
NUMBER = re.compile(r"-?(?:inf\b|\d+(?:\.\d*)?(?:e[+-]?\d+)?)", re.ASCII)
_WORD = re.compile(r"[A-Za-z_][\w.\-]*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_INTEGER = re.compile(r"-?\d{1,19}", re.ASCII)
_MAX_DIGITS = 400


class Cursor:
    """A cursor over one line: what comes next, or an error with a caret under it.

    Args:
        text: the line.
        number: that of the line, from 1; 0 where there is only one.
    """

    fault: ClassVar[type[TextError]] = TextError
    blanks: ClassVar[re.Pattern[str]] = re.compile(" *")

    def __init__(self, text: str, number: int = 0) -> None:
        self.text, self.line, self.at = text, number, 0

    def error(self, message: str, at: int | None = None) -> TextError:
        return self.fault(message, self.text, self.at if at is None else at, self.line)

    def space(self) -> None:
        if found := self.blanks.match(self.text, self.at):
            self.at = found.end()

    def peek(self, literal: str) -> bool:
        if self.text.startswith(literal, self.at):
            return True
        self.space()
        return self.text.startswith(literal, self.at)

    def accept(self, literal: str) -> bool:
        if self.peek(literal):
            self.at += len(literal)
            return True
        return False

    def expect(self, literal: str) -> None:
        if not self.accept(literal):
            raise self.error(f"expected {literal!r}")

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        self.space()
        if not (found := pattern.match(self.text, self.at)):
            raise self.error(f"expected {what}")
        self.at = found.end()
        return found.group()

    def word(self, what: str = "a word") -> str:
        return self.match(_WORD, what)

    def integer(self) -> int:
        return int(self.match(_INTEGER, "an integer of at most 19 digits"))

    def number(self) -> int | float:
        text = self.match(NUMBER, "a number")
        if len(text) > _MAX_DIGITS:
            self.at -= len(text)
            raise self.error(f"a number has at most {_MAX_DIGITS} digits")
        return float(text) if any(c in text for c in ".en") else int(text)

    def string(self) -> str:
        self.space()
        start = self.at
        try:
            return str(json.loads(self.match(_STRING, "a string in double quotes")))
        except json.JSONDecodeError:
            self.at = start
            raise self.error("expected a string in double quotes") from None

    def one_of(self, choices: dict[str, _T], what: str) -> _T:
        self.space()
        start = self.at
        word = self.word(what)
        if word not in choices:
            self.at = start
            raise self.error(f"expected {what}, one of {', '.join(choices)}")
        return choices[word]

    def end(self) -> None:
        self.space()
        if self.at != len(self.text):
            raise self.error("unexpected text after the end")

    @property
    def done(self) -> bool:
        self.space()
        return self.at >= len(self.text)

    def listed(self, close: str, item: Callable[[], _T]) -> tuple[_T, ...]:
        """Items separated by commas up to `close`, which is taken too."""
        items: list[_T] = []
        while not self.accept(close):
            if items:
                self.expect(",")
            items.append(item())
        return tuple(items)
