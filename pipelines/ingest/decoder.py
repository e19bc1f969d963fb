"""The columns of an image's row, made in a process of its own (pipelines.pictures.child_process)."""

from __future__ import annotations

from typing import Any

from pipelines.images.rows import DECODE, FILTERED, OK, status
from pipelines.ingest.web.answers import clean
from pipelines.lists.filters import FilterConfig, image_failure
from pipelines.pictures.child_process import Answer, Isolated, given, serve
from pipelines.pictures.decode import DecodeError, FailureClass, Opened, sha256
from pipelines.pictures.encode import ImageConfig


def image_columns(data: bytes, image: ImageConfig, filters: FilterConfig) -> dict[str, Any]:
    """What the body of one URL adds to its row; every file ends as a row.

    A row that a filter rules out keeps the image's own size and its sha256, but no bytes.
    """
    row: dict[str, Any] = {"status": OK}
    try:
        opened = Opened(data, image.max_pixels)
        row |= {"original_width": opened.width, "original_height": opened.height}
        row["sha256"] = sha256(data)
        if rule := image_failure(filters, opened.width, opened.height):
            return row | {"status": status(FILTERED, rule)}
        stored = opened.store(image)
    except DecodeError as error:
        return _failed(error.kind, str(error))
    return row | {
        "image": {"bytes": stored.data, "path": None},
        "width": stored.width,
        "height": stored.height,
        "phash": stored.phash,
    }


def _failed(kind: FailureClass, message: str) -> dict[str, Any]:
    return {"status": status(DECODE, kind), "error": clean(message)}


class Decoder(Isolated):
    """`image_columns` in a child process, which outlives files and is replaced when one kills it."""

    def __init__(self, image: ImageConfig, filters: FilterConfig) -> None:
        settings = {
            "image": image.model_dump(mode="json"),
            "filters": filters.model_dump(mode="json"),
        }
        super().__init__(__name__, settings, image.decode_timeout)

    def __call__(self, data: bytes) -> dict[str, Any]:
        """The columns of one file's row. Never raises for what a file does."""
        try:
            row, stored = self.ask(data)
        except DecodeError as error:
            return _failed(error.kind, str(error))
        return row if stored is None else row | {"image": {"bytes": stored, "path": None}}


def _answer(data: bytes, image: ImageConfig, filters: FilterConfig) -> Answer:
    row = image_columns(data, image, filters)
    stored = (row.pop("image", None) or {}).get("bytes")
    return row, stored


if __name__ == "__main__":
    settings = given()
    image = ImageConfig.model_validate(settings["image"])
    filters = FilterConfig.model_validate(settings["filters"])
    serve(lambda data: _answer(data, image, filters), image.max_pixels)
