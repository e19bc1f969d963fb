"""Gallery: original, reconstruction, generated caption and the teacher's, side by side.

Where there is a picture drawn from the true caption, it stands beside them as the ceiling.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from PIL import Image

from pipelines.images.rows import OK
from pipelines.pictures.decode import DecodeError, ImageFile
from pipelines.report.html import Html, count, join, tag

TINY = 160  # pixels; a picture up to this side is enlarged with its pixels kept square
LARGEST = 480  # pixels; a longer side is more than a column shows and is made smaller
HEAVIEST = 1 << 20  # bytes; of more, much is metadata
BROWSERS = ("JPEG", "PNG", "GIF", "WEBP")  # formats that every browser shows as they are


@dataclass(frozen=True)
class GalleryItem:
    """One image with what the model made of it; what is None was not made."""

    key: int
    original: bytes  # an encoded image, as in the image table
    reconstruction: bytes | None
    caption: str | None  # generated
    target: str | None  # the teacher's
    status: str
    from_caption: bytes | None = None  # drawn from the true caption: the ceiling
    held_out: bool = False  # shows a combination of colour and shape that training never did


def gallery(
    items: Sequence[GalleryItem], limit: int = 12, *, pictures: bool = True, words: bool = True
) -> Html:
    """The first `limit` items; says how many there were.

    Without `pictures` or `words` where reconstructions or captions were not to be made.
    """
    if not items:
        return tag("p", "No images to show.", class_="empty")
    shown = items[:limit]
    rest = f"{count(len(shown))} of {count(len(items))} images." if len(items) > limit else ""
    tiles = [_item(item, pictures, words) for item in shown]
    return join([tag("ul", *tiles, class_="gallery"), tag("p", rest, class_="empty")])


def _item(item: GalleryItem, with_pictures: bool, with_words: bool) -> Html:
    scene = item.target or f"key {item.key}"
    pictures = [_picture(item.original, "original", f"Original: {scene}")]
    if with_pictures:
        made = _picture(item.reconstruction, "reconstruction", f"Reconstruction of: {scene}")
        pictures.append(made)
    if item.from_caption is not None:
        ceiling = _picture(item.from_caption, "from true caption", f"Drawn from the words: {scene}")
        pictures.append(ceiling)
    same = item.caption is not None and item.caption == item.target
    words = tag(
        "dl",
        tag(
            "dt",
            "generated caption",
            tag("span", "exact match", class_="badge ok") if same else Html(),
        ),
        _caption(item.caption, compare_words(item.caption or "", item.target)),
        tag("dt", "teacher’s caption"),
        _caption(item.target, Html()),
    )
    foot = [tag("span", f"key {item.key}")]
    if item.held_out:
        foot.append(tag("span", "held-out combination", class_="tag"))
    if item.status != OK:
        foot.append(tag("span", item.status, class_="badge"))
    shown = tag("div", *pictures, class_="pictures")
    return tag("li", shown, words if with_words else Html(), tag("p", *foot, class_="key"))


def _caption(caption: str | None, marked: Html) -> Html:
    if not caption:
        return tag("dd", "none" if caption is None else "empty", class_="none")
    return tag("dd", marked or caption, dir="auto")


def compare_words(caption: str, target: str | None) -> Html:
    """The caption with the words marked that the target does not have at their place.

    Captions that share less than half of their words are two ways to say it, not a right and a
    wrong one: nothing is marked then, and the answer is empty, as it is without a target.
    """
    if not target:
        return Html()
    said, meant = caption.split(), target.split()
    matcher = SequenceMatcher(None, said, meant, autojunk=False)
    if matcher.ratio() < 0.5:
        return Html()
    parts: list[object] = []
    for operation, start, end, _, _ in matcher.get_opcodes():
        if start < end:
            words = " ".join(said[start:end])
            parts += [words if operation == "equal" else tag("mark", words), " "]
    return join(parts[:-1])


def _picture(content: bytes | None, name: str, description: str) -> Html:
    shown = embedded(content, description) if content else tag("span", f"no {name}", class_="none")
    return tag("figure", shown, tag("figcaption", name))


def embedded(content: bytes, description: str) -> Html:
    """An encoded image as a data URI: untouched where it is small, upright, still and of a format
    that browsers show, else its first frame as a smaller JPEG.
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
        # The table's status says what is wrong with it; the page has to come out all the same.
        return tag("span", "not readable", class_="none")
    width, height = image.size
    return tag(
        "img",
        src=f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}",
        alt=description,
        width=width,
        height=height,
        class_="tiny" if max(width, height) <= TINY else None,
    )
