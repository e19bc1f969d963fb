"""Structs in Thrift's compact protocol: where their fields lie, and copies with other values in some.

Nothing is decoded into objects: a footer of Parquet has a hundred thousand bytes, of which a few change.
Source: `thrift-compact-protocol.md` in Thrift's documentation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

_BOOLEANS, _NUMBER, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT = (1, 2), 5, 7, 8, (9, 10), 11, 12

Patch = tuple[int, int, bytes]
"""Start and end of some bytes in a buffer, and the bytes that replace them."""


def patched(buffer: bytes, start: int, end: int, patches: Sequence[Patch]) -> bytes:
    """The bytes from `start` to `end` with all patches applied."""
    pieces = []
    for first, last, new in sorted(patches):
        pieces += [buffer[start:first], new]
        start = last
    return b"".join([*pieces, buffer[start:end]])


def with_added(buffer: bytes, place: tuple[int, int], more: int) -> Patch:
    """The patch that adds `more` to the integer at `place`."""
    value = number_at(buffer, place[0]) + more
    return *place, varint((value << 1) ^ (value >> 63))


def varint(value: int) -> bytes:
    """An unsigned integer as a variable number of bytes."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def read_varint(buffer: bytes, at: int) -> tuple[int, int]:
    """The unsigned integer at a place, and where it ends."""
    value = shift = 0
    while True:
        byte = buffer[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def number_at(buffer: bytes, at: int) -> int:
    """The signed integer (zigzag) at a place."""
    value, _ = read_varint(buffer, at)
    return (value >> 1) ^ -(value & 1)


def fields(
    buffer: bytes,
    at: int,
    until: int | None = None,
    elements: Mapping[int, list[tuple[int, int]]] = MappingProxyType({}),
) -> dict[int, tuple[int, int]]:
    """Where the values of a struct's fields begin and end, by their numbers.

    Field `until` is the last one that is looked at, and only where it begins. Those of `elements` are
    lists, into which goes where each of their elements begins and ends.
    """
    found: dict[int, tuple[int, int]] = {}
    number = 0
    while header := buffer[at]:
        at += 1
        if header >> 4:
            number += header >> 4
        else:
            number, at = number_at(buffer, at), end_of(buffer, at, _NUMBER)
        start, kind = at, header & 15
        if number == until:
            return {**found, number: (start, start)}
        if number in elements:
            count, kind, at = list_header(buffer, at)
            for _ in range(count):
                first, at = at, end_of(buffer, at, kind)
                elements[number].append((first, at))
        elif kind not in _BOOLEANS:
            at = end_of(buffer, at, kind)
        found[number] = (start, at)
    return found


def list_header(buffer: bytes, at: int) -> tuple[int, int, int]:
    count, kind = buffer[at] >> 4, buffer[at] & 15
    at += 1
    if count == 15:
        count, at = read_varint(buffer, at)
    return count, kind, at


def end_of(buffer: bytes, at: int, kind: int) -> int:
    """Where a value that begins at `at` ends; one of BOOLEANS is an element of a list, of a byte."""
    if _NUMBER - 1 <= kind <= _NUMBER + 1:  # whole numbers of 16, 32, 64 bits
        while buffer[at] > 127:
            at += 1
        return at + 1
    if kind == _BINARY:
        length, at = read_varint(buffer, at)
        return at + length
    if kind == _STRUCT:
        while header := buffer[at]:
            at += 1
            if not header >> 4:
                at = end_of(buffer, at, _NUMBER)
            if header & 15 not in _BOOLEANS:
                at = end_of(buffer, at, header & 15)
        return at + 1
    if kind in _LISTS:
        count, inner, at = list_header(buffer, at)
        for _ in range(count):
            at = end_of(buffer, at, inner)
        return at
    if kind == _MAP:
        count, at = read_varint(buffer, at)
        kinds = buffer[at] if count else 0
        at += bool(count)
        for _ in range(count):
            at = end_of(buffer, end_of(buffer, at, kinds >> 4), kinds & 15)
        return at
    return at + (8 if kind == _DOUBLE else 1)
