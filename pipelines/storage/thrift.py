"""Structs in Thrift's compact protocol: where their fields lie, and how to patch them.

Nothing is decoded into objects: a Parquet footer may have a hundred thousand bytes, of which only a
few change. Positions are byte offsets into the buffer; a span is (start, end).
Source: `thrift-compact-protocol.md` in Thrift's documentation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

_BOOLEANS, _INTEGER, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT = (1, 2), 5, 7, 8, (9, 10), 11, 12

Patch = tuple[int, int, bytes]
"""Start and end of some bytes in a buffer, and the bytes that replace them."""


def apply_patches(buffer: bytes, start: int, end: int, patches: Sequence[Patch]) -> bytes:
    """The bytes from `start` to `end` with all patches applied."""
    pieces = []
    for first, last, new in sorted(patches):
        pieces += [buffer[start:first], new]
        start = last
    return b"".join([*pieces, buffer[start:end]])


def add_to_integer(buffer: bytes, span: tuple[int, int], amount: int) -> Patch:
    """The patch that adds `amount` to the integer at `span`."""
    value = read_integer(buffer, span[0]) + amount
    return *span, varint((value << 1) ^ (value >> 63))


def varint(value: int) -> bytes:
    """An unsigned integer in variable-length encoding."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def read_varint(buffer: bytes, position: int) -> tuple[int, int]:
    """The unsigned integer at `position`, and the position after it."""
    value = shift = 0
    while True:
        byte = buffer[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7


def read_integer(buffer: bytes, position: int) -> int:
    """The signed integer (zigzag) at `position`."""
    value, _ = read_varint(buffer, position)
    return (value >> 1) ^ -(value & 1)


def struct_fields(
    buffer: bytes,
    position: int,
    until: int | None = None,
    elements: Mapping[int, list[tuple[int, int]]] = MappingProxyType({}),
) -> dict[int, tuple[int, int]]:
    """The spans of the field values of the struct at `position`, by field number.

    The scan stops at field `until`, whose span is then empty. `elements` names fields that are
    lists; the spans of their elements are appended to the given lists.
    """
    found: dict[int, tuple[int, int]] = {}
    number = 0
    while header := buffer[position]:
        position += 1
        if header >> 4:
            number += header >> 4
        else:
            number, position = read_integer(buffer, position), end_of(buffer, position, _INTEGER)
        start, kind = position, header & 15
        if number == until:
            return {**found, number: (start, start)}
        if number in elements:
            count, kind, position = list_header(buffer, position)
            for _ in range(count):
                first, position = position, end_of(buffer, position, kind)
                elements[number].append((first, position))
        elif kind not in _BOOLEANS:
            position = end_of(buffer, position, kind)
        found[number] = (start, position)
    return found


def list_header(buffer: bytes, position: int) -> tuple[int, int, int]:
    """Length and element type of the list at `position`, and the position of its first element."""
    count, kind = buffer[position] >> 4, buffer[position] & 15
    position += 1
    if count == 15:
        count, position = read_varint(buffer, position)
    return count, kind, position


def end_of(buffer: bytes, position: int, kind: int) -> int:
    """The position after a value of type `kind`. A boolean is a list element here, of one byte."""
    if _INTEGER - 1 <= kind <= _INTEGER + 1:  # i16, i32, i64
        while buffer[position] > 127:
            position += 1
        return position + 1
    if kind == _BINARY:
        length, position = read_varint(buffer, position)
        return position + length
    if kind == _STRUCT:
        while header := buffer[position]:
            position += 1
            if not header >> 4:
                position = end_of(buffer, position, _INTEGER)
            if header & 15 not in _BOOLEANS:
                position = end_of(buffer, position, header & 15)
        return position + 1
    if kind in _LISTS:
        count, inner, position = list_header(buffer, position)
        for _ in range(count):
            position = end_of(buffer, position, inner)
        return position
    if kind == _MAP:
        count, position = read_varint(buffer, position)
        kinds = buffer[position] if count else 0
        position += bool(count)
        for _ in range(count):
            position = end_of(buffer, end_of(buffer, position, kinds >> 4), kinds & 15)
        return position
    return position + (8 if kind == _DOUBLE else 1)
