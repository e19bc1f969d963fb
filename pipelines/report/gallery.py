"""Gallery of originals, reconstructions, generated captions and the teacher's captions.

An image generated from the true caption, if there is one, shows the ceiling.
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


def gallery(
    items: Sequence[GalleryItem], limit: int = 12, *, pictures: bool = True, words: bool = True
) -> Html:
    """The first `limit` items and the number of all; without `pictures` no reconstructions, without
    `words` no captions.
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
        description = f"Reconstruction of: {scene}"
        pictures.append(_picture(item.reconstruction, "reconstruction", description))
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
    """Mark the words of `caption` that differ from `target`.

    Returns empty Html without a target, and if the captions share less than half of their words: then
    they are worded differently, and a difference is not an error.
    """
    if not target:
        return Html()
    caption_words, target_words = caption.split(), target.split()
    matcher = SequenceMatcher(None, caption_words, target_words, autojunk=False)
    if matcher.ratio() < 0.5:
        return Html()
    parts: list[object] = []
    for operation, start, end, _, _ in matcher.get_opcodes():
        if start < end:
            words = " ".join(caption_words[start:end])
            parts += [words if operation == "equal" else tag("mark", words), " "]
    return join(parts[:-1])


def _picture(content: bytes | None, name: str, description: str) -> Html:
    shown = embedded(content, description) if content else tag("span", f"no {name}", class_="none")
    return tag("figure", shown, tag("figcaption", name))


def embedded(content: bytes, description: str) -> Html:
    """Embed an encoded image as a data URI, unchanged if browsers can show it and it is small, upright
    and not animated; else its first frame as a smaller JPEG.
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
        # The table has the reason in the row's status; do not fail the page.
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
