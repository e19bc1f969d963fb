"""Reads a list of URLs from one JSON document, with only one object in memory at a time.

[{"url": …}, …]                              a list of objects
{"info": …, "annotations": [{"url": …}, …]}  RedCaps: one file per subreddit and year
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

ROWS = "annotations"
"""The key whose value is the list of rows."""
_PIECE = 1 << 20  # characters read at a time
_MAX_VALUE = 1 << 24  # characters of one object
_BLANK = " \t\n\r"
_EXPECTED = f"expected a list of objects, or an object whose '{ROWS}' is one (RedCaps)"


def read_objects(stream: IO[str]) -> Iterator[Any]:
    """The elements of the list in a JSON document.

    Raises ValueError, one line, if the document is damaged or contains no such list.
    """
    text = _JsonReader(stream)
    first = text.peek()
    if first == "[":
        yield from text.elements()
    elif first == "{":
        yield from _rows_of_object(text)
    else:
        begins = f"begins with {first!r}" if first else "is empty"
        raise ValueError(f"it {begins}: {_EXPECTED}")
    if text.peek():
        raise ValueError(
            f"there is more text after the end of its list, at character {text.position + 1:,}"
        )


def _rows_of_object(text: _JsonReader) -> Iterator[Any]:
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
        raise ValueError("it has one object per line: rename it to .jsonl")
    shown = ", ".join(map(repr, names[:6]))[:200] or "nothing"
    raise ValueError(f"it is an object with the keys {shown}: {_EXPECTED}")


class _JsonReader:
    """Reads a JSON document value by value."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.buffer, self.offset = "", 0
        self.dropped = 0  # characters before the buffer
        self.decoder = json.JSONDecoder()

    @property
    def position(self) -> int:
        """Number of characters read so far."""
        return self.dropped + self.offset

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            while self.offset < len(self.buffer) and self.buffer[self.offset] in _BLANK:
                self.offset += 1
            if self.offset < len(self.buffer) or not self._read_more(_PIECE):
                return self.buffer[self.offset : self.offset + 1]

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.offset)
            except RecursionError:
                raise ValueError(f"nested too deeply at character {self.position + 1:,}") from None
            except ValueError as error:
                # The buffer may end inside the value. Doubling it keeps parsing linear on average.
                if len(self.buffer) - self.offset <= _MAX_VALUE and self._read_more(
                    len(self.buffer)
                ):
                    continue
                place = self.dropped + getattr(error, "pos", self.offset) + 1
                message = getattr(error, "msg", str(error))
                raise ValueError(f"{message} at character {place:,}") from None
            if end == len(self.buffer) and self._read_more(_PIECE):
                continue  # a number may continue
            self.offset = end
            return value

    def elements(self) -> Iterator[Any]:
        """The elements of a list, from its opening to its closing bracket."""
        for _ in self._items("[", "]"):
            yield self.value()

    def members(self) -> Iterator[str]:
        """The keys of an object; the caller reads each value before the next key."""
        for _ in self._items("{", "}"):
            name = self.value()
            if not isinstance(name, str):
                raise self._unexpected('a name in ""')
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
            raise self._unexpected(repr(sign))
        self.offset += 1

    def _unexpected(self, expected: str) -> ValueError:
        found = repr(self.peek()) if self.peek() else "the end"
        return ValueError(f"expected {expected} at character {self.position + 1:,}, found {found}")

    def _read_more(self, characters: int) -> bool:
        """Read at least so many more characters into the buffer; False at the end of the document."""
        piece = self.stream.read(max(characters, _PIECE))
        if piece:
            self.dropped += self.offset
            self.buffer, self.offset = self.buffer[self.offset :] + piece, 0
        return bool(piece)
