"""Lists of URLs in one JSON text, of which no more than an object is in memory at a time.

[{"url": …}, …]                              a list of objects
{"info": …, "annotations": [{"url": …}, …]}  RedCaps, a file for each subreddit and year
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

ROWS = "annotations"
"""The key whose list are the rows."""
_PIECE = 1 << 20  # characters that are read at once
_MAX_VALUE = 1 << 24  # characters of one object
_BLANK = " \t\n\r"
_EXPECTED = f"expected a list of objects, or an object whose '{ROWS}' is one (RedCaps)"


def read_objects(stream: IO[str]) -> Iterator[Any]:
    """The elements of the list in a JSON text, as they stand there.

    Raises ValueError, one line, for a text that holds no such list or is damaged.
    """
    text = _Text(stream)
    first = text.peek()
    if first == "[":
        yield from text.elements()
    elif first == "{":
        yield from _rows_of_object(text)
    else:
        begins = f"begins with {first!r}" if first else "is empty"
        raise ValueError(f"it {begins}: {_EXPECTED}")
    if text.peek():
        raise ValueError(f"more follows behind the end of its list at character {text.read + 1:,}")


def _rows_of_object(text: _Text) -> Iterator[Any]:
    names: list[str] = []
    found = False
    for name in text.members():
        names.append(name)
        if name == ROWS and text.peek() == "[":
            found = True
            yield from text.elements()
        else:
            text.value()
    if found:
        return
    if text.peek():
        raise ValueError("it has one object a line: rename it to .jsonl")
    shown = ", ".join(map(repr, names[:6]))[:200] or "nothing"
    raise ValueError(f"it is an object of {shown}: {_EXPECTED}")


class _Text:
    """A JSON text that is read value by value."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.held, self.at = "", 0
        self.before = 0  # characters in front of those that are held
        self.decoder = json.JSONDecoder()

    @property
    def read(self) -> int:
        """Characters of the text that are behind us."""
        return self.before + self.at

    def peek(self) -> str:
        """The next character that is not blank; nothing at the end."""
        while True:
            while self.at < len(self.held) and self.held[self.at] in _BLANK:
                self.at += 1
            if self.at < len(self.held) or not self._more(_PIECE):
                return self.held[self.at : self.at + 1]

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.held, self.at)
            except RecursionError:
                raise ValueError(f"nested too deeply at character {self.read + 1:,}") from None
            except ValueError as error:
                # It may only be cut. Twice as much each time: else a long one is parsed very often.
                if len(self.held) - self.at <= _MAX_VALUE and self._more(len(self.held)):
                    continue
                place = self.before + getattr(error, "pos", self.at) + 1
                why = getattr(error, "msg", str(error))
                raise ValueError(f"{why} at character {place:,}") from None
            if end == len(self.held) and self._more(_PIECE):
                continue  # a number may go on
            self.at = end
            return value

    def elements(self) -> Iterator[Any]:
        """The elements of a list, from its bracket to behind its end."""
        for _ in self._items("[", "]"):
            yield self.value()

    def members(self) -> Iterator[str]:
        """The names in an object; whoever gets one reads the value before the next."""
        for _ in self._items("{", "}"):
            name = self.value()
            if not isinstance(name, str):
                raise self._odd('a name in ""')
            self._take(":")
            yield name

    def _items(self, opening: str, closing: str) -> Iterator[None]:
        self._take(opening)
        if self.peek() != closing:
            yield
            while self.peek() == ",":
                self._take(",")
                yield
        self._take(closing)

    def _take(self, sign: str) -> None:
        if self.peek() != sign:
            raise self._odd(repr(sign))
        self.at += 1

    def _odd(self, expected: str) -> ValueError:
        found = repr(self.peek()) if self.peek() else "the end"
        return ValueError(f"expected {expected} at character {self.read + 1:,}, found {found}")

    def _more(self, characters: int) -> bool:
        """Hold that many more characters; False, and all as it is, at the end of the text."""
        piece = self.stream.read(max(characters, _PIECE))
        if piece:
            self.before += self.at
            self.held, self.at = self.held[self.at :] + piece, 0
        return bool(piece)
