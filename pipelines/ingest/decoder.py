"""Decodes a body into the columns of its row, in a child process (pipelines.pictures.child_process)."""

from __future__ import annotations

import asyncio
import queue
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from pipelines.images.rows import DECODE, FILTERED, OK, status
from pipelines.ingest.web.failures import clean
from pipelines.lists.filters import FilterConfig, image_failure
from pipelines.pictures.child_process import ChildProcess, Result, child_settings, serve
from pipelines.pictures.decode import DecodeError, FailureClass, ImageFile, sha256
from pipelines.pictures.encode import ImageConfig

if TYPE_CHECKING:
    from pipelines.ingest.web.download import Fetched


def image_columns(data: bytes, image: ImageConfig, filters: FilterConfig) -> dict[str, Any]:
    """The columns that one body adds to its row; a file that cannot be decoded gives a status.

    A row that a filter drops keeps the image's original size and sha256, but no bytes.
    """
    row: dict[str, Any] = {"status": OK}
    try:
        file = ImageFile(data, image.max_pixels)
        row |= {"original_width": file.width, "original_height": file.height}
        row["sha256"] = sha256(data)
        if rule := image_failure(filters, file.width, file.height):
            return row | {"status": status(FILTERED, rule)}
        stored = file.store(image)
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


DECODE_SECONDS = 60.0


class Decoder(ChildProcess):
    """`image_columns` in a child process."""

    def __init__(
        self, image: ImageConfig, filters: FilterConfig, seconds: float = DECODE_SECONDS
    ) -> None:
        """`seconds` is the time to decode and store one file."""
        settings = {
            "image": image.model_dump(mode="json"),
            "filters": filters.model_dump(mode="json"),
        }
        super().__init__(__name__, settings, seconds)

    def __call__(self, data: bytes) -> dict[str, Any]:
        """The columns of one file's row. Never raises because of a file."""
        try:
            row, stored = self.request(data)
        except DecodeError as error:
            return _failed(error.kind, str(error))
        return row if stored is None else row | {"image": {"bytes": stored, "path": None}}


class DecoderPool:
    """A fixed number of decoders, each used by one thread at a time."""

    def __init__(self, size: int, image: ImageConfig, filters: FilterConfig) -> None:
        self.threads = ThreadPoolExecutor(size, thread_name_prefix="decoding")
        self.idle: queue.SimpleQueue[Decoder] = queue.SimpleQueue()
        for _ in range(size):
            self.idle.put(Decoder(image, filters))

    async def columns(self, fetched: Fetched) -> dict[str, Any]:
        """The columns of one row; a failed download needs no decoder."""
        if fetched.data is None:
            return {"status": fetched.status, "error": fetched.error}
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, self.decode, fetched.data)

    def close(self) -> None:
        """End the threads and the child processes."""
        self.threads.shutdown()
        while not self.idle.empty():
            self.idle.get().close()

    def decode(self, data: bytes) -> dict[str, Any]:
        """The columns of one file's row. At most as many threads as decoders may call it."""
        decoder = self.idle.get()  # there is one for each thread
        try:
            return decoder(data)
        finally:
            self.idle.put(decoder)


def _result(data: bytes, image: ImageConfig, filters: FilterConfig) -> Result:
    row = image_columns(data, image, filters)
    stored = (row.pop("image", None) or {}).get("bytes")
    return row, stored


if __name__ == "__main__":
    settings = child_settings()
    image = ImageConfig.model_validate(settings["image"])
    filters = FilterConfig.model_validate(settings["filters"])
    serve(lambda data: _result(data, image, filters), image.max_pixels)
