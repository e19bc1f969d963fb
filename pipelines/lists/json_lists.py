"""Reads a list from one JSON document, with only one object in memory at a time.

[{"url": …}, …]                                                a list of objects
{"info": …, "annotations": [{"url": …}, …]}                    RedCaps: one file per subreddit and year
{"images": [{"id": …, "file_name": …}, …], "annotations": [{"image_id": …, "caption": …}, …]}       COCO
{"file": "caption", "other file": ["caption", …], …}           captions by file name

The rows of the last two have the file as `name`. Of COCO's images, 40 bytes each are held in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any

import numpy as np
import pyarrow as pa

from pipelines.images.rows import key_of

ROWS, IMAGES = "annotations", "images"
"""The keys whose values are the list of rows, and COCO's list of images."""
_NAME, _CAPTION = "name", "caption"
_FIRST = 16  # members of an object that decide whether it holds captions by file name
_BATCH = 16_384  # images
_PIECE = 1 << 20  # characters read at a time
_MAX_VALUE = 1 << 24  # characters of one object
_BLANK = " \t\n\r"
_EXPECTED = f"expected a list of objects, an object whose '{ROWS}' is one (RedCaps, COCO), or captions by file name"


def read_objects(stream: IO[str]) -> Iterator[Any]:
    """The elements of the list in a JSON document.

    Raises ValueError, one line, if the document is damaged or contains no such list.
    """
    text = _JsonReader(stream)
    first = text.peek()
    if first == "[":
        yield from text.elements()
    elif first == "{":
        try:
            yield from _rows_of_object(text, None)
        except _ImagesFollow:
            images = _Images(_find_images(_JsonReader(stream)))
            stream.seek(0)
            text = _JsonReader(stream)
            yield from _rows_of_object(text, images)
    else:
        begins = f"begins with {first!r}" if first else "is empty"
        raise ValueError(f"it {begins}: {_EXPECTED}")
    if text.peek():
        raise ValueError(
            f"there is more text after the end of its list, at character {text.position + 1:,}"
        )


class _ImagesFollow(Exception):
    """COCO's annotations come before the images that they name."""


class _Images:
    """File names of COCO's images, by id."""

    def __init__(self, images: Iterator[Any]) -> None:
        ids, names = [np.zeros(0, np.int64)], [pa.array([], pa.string())]
        while batch := list(islice(images, _BATCH)):
            rows = [image for image in batch if isinstance(image, dict)]
            ids.append(np.array([_id(image.get("id")) for image in rows], np.int64))
            files = [image.get("file_name") for image in rows]
            names.append(pa.array([f if isinstance(f, str) else None for f in files], pa.string()))
        self._ids, self._names = np.concatenate(ids), pa.chunked_array(names).combine_chunks()
        self._order = np.argsort(self._ids, kind="stable")
        self._ids = self._ids[self._order]

    def name(self, image_id: Any) -> str | None:
        found, wanted = int(np.searchsorted(self._ids, _id(image_id))), _id(image_id)
        if found == len(self._ids) or self._ids[found] != wanted:
            return None
        name: str | None = self._names[int(self._order[found])].as_py()
        return name


def _id(value: Any) -> int:
    return key_of(json.dumps(value))


def _find_images(text: _JsonReader) -> Iterator[Any]:
    text.stream.seek(0)
    for name in text.members():
        if name == IMAGES and text.peek() == "[":
            yield from text.elements()
        else:
            text.skip()


def _rows_of_object(text: _JsonReader, images: _Images | None) -> Iterator[Any]:
    names: list[str] = []
    found, by_name = False, True
    captions: list[
        dict[str, Any]
    ] = []  # the first members, while they may be captions by file name
    for name in text.members():
        names.append(name)
        if name == ROWS and text.peek() == "[":
            found = True
            for row in text.elements():
                is_coco = isinstance(row, dict) and "image_id" in row and "url" not in row
                if is_coco and images is None:
                    raise _ImagesFollow
                yield {_NAME: images.name(row["image_id"]), **row} if is_coco and images else row
            by_name = False
            continue
        if name == IMAGES and text.peek() == "[":
            if images is None:
                images = _Images(text.elements())
            else:
                text.skip()
            by_name = False
            continue
        value = text.value()
        if by_name and not _is_caption(value):
            if len(names) > _FIRST:
                raise ValueError(f"the value of {name[:60]!r} is no caption")
            by_name = False
        if by_name:
            captions.append({_NAME: name, _CAPTION: value})
            if len(names) == _FIRST:
                by_name = any(map(_is_file_name, names))
            if len(names) >= _FIRST and by_name:
                yield from captions
                captions = []
    by_name = by_name and any(map(_is_file_name, names[:_FIRST]))
    if found or (by_name and not text.peek()):
        yield from captions if by_name else ()
        return
    if text.peek():
        raise ValueError("it has one object per line: rename it to .jsonl")
    shown = ", ".join(map(repr, names[:6]))[:200] or "nothing"
    raise ValueError(f"it is an object with the keys {shown}: {_EXPECTED}")


def _is_file_name(name: str) -> bool:
    return "." in name or "/" in name  # and no field of a row


def _is_caption(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return all(text is None or isinstance(text, str) for text in texts)


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

    def skip(self) -> None:
        """Read a value; of a list, one element at a time."""
        if self.peek() == "[":
            for _ in self.elements():
                pass
        else:
            self.value()

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
