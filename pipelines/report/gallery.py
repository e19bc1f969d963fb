"""Gallery of originals, reconstructions, generated captions and the teacher's captions.

An image generated from the true caption, if there is one, shows the ceiling.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from difflib import SequenceMatcher

from PIL import Image

from pipelines.pictures.decode import DecodeError, ImageFile

TINY = 160  # pixels; images up to this side are enlarged without smoothing
LARGEST = 480  # pixels; larger images are scaled down to a column's width
HEAVIEST = 1 << 20  # bytes; larger files are mostly metadata and are re-encoded
BROWSERS = ("JPEG", "PNG", "GIF", "WEBP")  # formats that every browser shows


@dataclass(frozen=True)
class GalleryItem:
    """One image and the model's outputs; None: not generated."""

    key: int
    original: bytes  # an encoded image, as in the image table
    reconstruction: bytes | None
    caption: str | None  # generated
    target: str | None  # the teacher's
    status: str
    from_caption: bytes | None = None  # generated from the true caption: the ceiling
    held_out: bool = False  # has a combination of colour and shape that is not in training


@dataclass(frozen=True)
class Embedded:
    """An image as the attributes of an `img` element."""

    src: str  # data URI
    width: int
    height: int

    @property
    def is_tiny(self) -> bool:
        return max(self.width, self.height) <= TINY


def compare_words(caption: str, target: str | None) -> list[tuple[str, bool]]:
    """`caption` in stretches, each with whether its words differ from `target`.

    Returns one stretch without a target, and if the captions share less than half of their words: then
    they are worded differently, and a difference is not an error.
    """
    words, target_words = caption.split(), (target or "").split()
    matcher = SequenceMatcher(None, words, target_words, autojunk=False)
    if not target or matcher.ratio() < 0.5:
        return [(caption.strip(), False)]
    return [
        (" ".join(words[start:end]), operation != "equal")
        for operation, start, end, _, _ in matcher.get_opcodes()
        if start < end
    ]


def embedded(content: bytes) -> Embedded | None:
    """Embed an encoded image, unchanged if browsers can show it and it is small, upright and not
    animated; else its first frame as a smaller JPEG. None if it cannot be decoded: the table has the
    reason in the row's status, and the page must not fail.
    """
    try:
        opened = ImageFile(content)
        image, kind = opened.image, opened.kind
        small = max(image.size) <= LARGEST and len(content) <= HEAVIEST
        if kind not in BROWSERS or not small or opened.orientation != 1 or opened.is_animated:
            image = Image.fromarray(opened.picture())
            image.thumbnail((LARGEST, LARGEST))
            smaller = io.BytesIO()
            image.save(smaller, "JPEG", quality=90)
            kind, content = "JPEG", smaller.getvalue()
    except DecodeError:
        return None
    return Embedded(
        f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}", *image.size
    )
