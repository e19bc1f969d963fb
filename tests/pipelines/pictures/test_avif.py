"""AVIFs of old encoders, made by changing the boxes of a good one: the picture stays the same."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from pipelines.pictures.boxes import boxes
from pipelines.pictures.decode import FAILURE_CLASSES, DecodeError, ImageFile
from pipelines.pictures.encode import ImageConfig
from tests.pipelines.pictures.files import LOSSLESS, encoded, photo
from tests.pipelines.pictures.nasty import ODD_AVIFS


def clear_to_the_right() -> Image.Image:
    image = photo(96, 64).convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.linspace(255, 0, 96).astype(np.uint8), (64, 1))))
    return image


def made(**options: bytes) -> bytes:
    return encoded(clear_to_the_right(), "AVIF", quality=90, **options)


GOOD = made()


def parts(data: bytes) -> list[tuple[bytes, bytes]]:
    return [(kind, data[begin:end]) for kind, begin, end in boxes(data)]


def joined(contents: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(struct.pack(">I4s", 8 + len(part), kind) + part for kind, part in contents)


def changed(data: bytes, path: list[bytes], change: Callable[[bytes], bytes]) -> bytes:
    """The file with another content of the box at a path, and adjusted offsets of the data behind it."""

    def within(kind: bytes, content: bytes, path: list[bytes]) -> bytes:
        if not path:
            return change(content)
        head = 4 if kind == b"meta" else 0  # its version and flags
        found = [
            (name, within(name, part, path[1:]) if name == path[0] else part)
            for name, part in parts(content[head:])
        ]
        return content[:head] + joined(found)

    found = within(b"", data, path)
    return moved(found, len(found) - len(data))


def moved(data: bytes, by: int) -> bytes:
    """Where the items lie, all of them by some bytes farther; of Pillow's, with 4 bytes an offset."""
    place, found = data.index(b"iloc") + 4 + 4 + 2, bytearray(data)
    (items,) = struct.unpack_from(">H", data, place)
    for item in range(items):
        offset = place + 2 + item * 14 + 6
        struct.pack_into(">I", found, offset, struct.unpack_from(">I", data, offset)[0] + by)
    return bytes(found)


def associations(change: Callable[[int, list[int]], list[int]]) -> Callable[[bytes], bytes]:
    """Of each item the numbers of its properties, of Pillow's with a byte each."""

    def changed_content(content: bytes) -> bytes:
        (count,) = struct.unpack_from(">I", content, 4)
        place, made = 8, content[:8]
        for _ in range(count):
            item, many = struct.unpack_from(">HB", content, place)
            indices = change(item, [*content[place + 3 : place + 3 + many]])
            made += struct.pack(">HB", item, len(indices)) + bytes(indices)
            place += 3 + many
        return made

    return changed_content


def content_of(data: bytes, *path: bytes) -> bytes:
    for kind in path:
        data = dict(parts(data))[kind][4 if kind == b"meta" else 0 :]
    return data


def without(kind: bytes, items: tuple[int, ...] = (1, 2)) -> bytes:
    """The good file whose picture (1) or alpha plane (2) has no property of a kind."""
    kinds = [name for name, _ in parts(content_of(GOOD, b"meta", b"iprp", b"ipco"))]
    assert kind in kinds

    def change(item: int, indices: list[int]) -> list[int]:
        return [i for i in indices if item not in items or kinds[(i & 0x7F) - 1] != kind]

    return changed(GOOD, [b"meta", b"iprp", b"ipma"], associations(change))


def brands(major: bytes, *compatible: bytes) -> bytes:
    return changed(GOOD, [b"ftyp"], lambda _: major + bytes(4) + b"".join(compatible))


def pixels_first() -> bytes:
    found = dict(parts(GOOD))
    contents = [(kind, found[kind]) for kind in (b"ftyp", b"mdat", b"meta")]
    return moved(joined(contents), -len(found[b"meta"]) - 8)


def pixels_of_size(head: bytes) -> bytes:
    place = GOOD.index(b"mdat") - 4
    return moved(GOOD[:place] + head + GOOD[place + 8 :], len(head) - 8)


def another_size() -> bytes:
    """Declares twice the width and height of its pixels."""
    sized = struct.pack(">I2I", 0, 192, 128)

    def change(content: bytes) -> bytes:
        return joined([(k, sized if k == b"ispe" else part) for k, part in parts(content)])

    return changed(GOOD, [b"meta", b"iprp", b"ipco"], change)


def broken_metadata(kind: bytes) -> bytes:
    """Exif or XMP beyond the end of the file."""
    data = bytearray(made(exif=Image.Exif().tobytes(), xmp=b"<x/>"))
    names = [part[8:12] for _, part in parts(content_of(data, b"meta", b"iinf")[6:])]
    place = data.index(b"iloc") + 4 + 4 + 2 + 2 + 14 * names.index(kind) + 6
    struct.pack_into(">I", data, place, len(data) + 1000)
    return bytes(data)


def short_exif() -> bytes:
    """Exif of two bytes, without the offset of its start."""
    data = bytearray(made(exif=Image.Exif().tobytes()))
    names = [part[8:12] for _, part in parts(content_of(data, b"meta", b"iinf")[6:])]
    place = data.index(b"iloc") + 4 + 4 + 2 + 2 + 14 * names.index(b"Exif") + 10
    struct.pack_into(">I", data, place, 2)
    return bytes(data)


def groups() -> bytes:
    """An item group of a kind that decoders do not support."""
    group = struct.pack(">I3I3H", 0, 1, 1, 1, 512, 512, 0) + bytes(6)
    return changed(
        GOOD, [b"meta"], lambda content: content + joined([(b"grpl", joined([(b"pymd", group)]))])
    )


def renamed(old: bytes, new: bytes) -> bytes:
    assert len(old) == len(new)
    return GOOD.replace(old, new)


# What Pillow opens, and what it does not.
SOUND: dict[str, tuple[bool, Callable[[], bytes]]] = {
    "no number of bits": (True, lambda: without(b"pixi")),
    "no size of the alpha plane": (False, lambda: without(b"ispe", (2,))),
    "no size and no number of bits of the alpha plane": (
        False, lambda: changed(without(b"ispe", (2,)), [b"meta", b"iprp", b"ipma"],
                               associations(lambda item, of: of[1:] if item == 2 else of))),
    "no colours": (True, lambda: without(b"colr")),
    "no mif1": (True, lambda: brands(b"avif", b"avif")),
    "avif among others alone": (False, lambda: brands(b"MA1B", b"mif1", b"avif", b"miaf")),
    "a brand of HEIF": (True, lambda: brands(b"mif1", b"mif1", b"avif")),
    "a brand of HEIC": (False, lambda: brands(b"heic", b"mif1", b"avif")),
    "pixels before the boxes": (True, pixels_first),
    "pixels to the end": (True, lambda: pixels_of_size(b"\0\0\0\0mdat")),
    "pixels to the end, of another brand": (
        False, lambda: renamed(b"ftypavif", b"ftypMA1B")[: GOOD.index(b"mdat") - 4] + bytes(4)
        + GOOD[GOOD.index(b"mdat") :]),
    "a size of 64 bits": (
        True, lambda: pixels_of_size(struct.pack(">I4sQ", 1, b"mdat", 16 + len(content_of(GOOD, b"mdat"))))),
    "alpha as in HEVC": (
        True, lambda: changed(GOOD, [b"meta", b"iprp", b"ipco"], lambda content: joined([
            (k, bytes(4) + b"urn:mpeg:hevc:2015:auxid:1\0" if k == b"auxC" else part)
            for k, part in parts(content)]))),
    "Exif beyond the end": (False, lambda: broken_metadata(b"Exif")),
    "XMP beyond the end": (False, lambda: broken_metadata(b"mime")),
    "short Exif": (False, short_exif),
    "a group of an odd kind": (False, groups),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_unusual_files_give_the_same_picture(name: str) -> None:
    by_pillow, odd = SOUND[name]
    data = odd()
    try:
        with Image.open(io.BytesIO(data), formats=["AVIF"]) as image:
            image.load()
    except (UnidentifiedImageError, RuntimeError, ValueError):
        assert not by_pillow
    else:
        assert by_pillow
    assert (ImageFile(data).picture() == ImageFile(GOOD).picture()).all()
    half = data.replace(content_of(data, b"mdat"), content_of(data, b"mdat")[:200])
    with pytest.raises(DecodeError) as raised:
        ImageFile(half).store(LOSSLESS)
    assert raised.value.kind == "corrupt"


def test_pixels_are_scaled_to_the_declared_size() -> None:
    expected = Image.fromarray(ImageFile(GOOD).picture()).resize((192, 128))
    assert np.abs(ImageFile(another_size()).picture() - np.asarray(expected).astype(int)).mean() < 2


def test_an_unusual_file_is_kept_byte_for_byte() -> None:
    data = without(b"ispe", (2,))
    assert ImageFile(data).store(ImageConfig(resize="no", reencode="never")).data == data
    assert ImageFile(data, 96 * 64).width == 96
    with pytest.raises(DecodeError) as raised:
        ImageFile(data, 96 * 64 - 1)
    assert raised.value.kind == "too_large"


def test_files_that_no_browser_opens_fail() -> None:
    """A picture without a size; the brand of another format."""
    for data in (without(b"ispe", (1,)), without(b"av1C"), brands(b"mif1", b"mif1", b"miaf")):
        with pytest.raises(DecodeError) as raised:
            ImageFile(data).picture()
        assert raised.value.kind in ("corrupt", "unsupported")


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_boxes_give_a_picture_or_a_failure_class(data: st.DataObject) -> None:
    odd = [without(b"ispe", (2,)), brands(b"MA1B", b"mif1", b"avif"), groups()]
    whole = bytearray(data.draw(st.sampled_from(odd)))
    end = whole.index(b"mdat")
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(8, end))] = data.draw(st.integers(0, 255))
    try:
        found = str(ImageFile(bytes(whole), 10**6).picture().dtype)
    except DecodeError as error:
        found = error.kind
    assert found in ("uint8", *FAILURE_CLASSES)


@pytest.mark.parametrize("name", sorted(ODD_AVIFS))
def test_real_files(name: str, shared_dir: Path) -> None:
    assert ImageFile((shared_dir / "nasty/avif_broken" / name).read_bytes()).picture().std() > 10
