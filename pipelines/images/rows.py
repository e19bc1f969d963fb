"""The Arrow schemas of the tables that jobs exchange, from URL to caption; keys and URLs."""

from __future__ import annotations

import hashlib
import json
import re
from urllib.parse import urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.compute as pc

from vlv_model.errors import DataError

OK = "ok"
"""Status of a usable row. Any other status says why later jobs do not use the row."""

FILTERED, DOWNLOAD, DECODE, DUPLICATE = "filtered", "download", "decode", "duplicate"
CAPTION = "caption"


def status(kind: str, detail: str) -> str:
    """A status of two parts, e.g. `download:timeout`; `detail` is from a fixed list."""
    return f"{kind}:{detail}"


# Hugging Face datasets reads a struct of bytes and path as its Image feature.
IMAGE_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

SCORES = pa.schema(
    [
        ("similarity", pa.float32()),
        ("pwatermark", pa.float32()),
        ("punsafe", pa.float32()),
        ("aesthetic", pa.float32()),
        ("hash", pa.int64()),
    ]
)
"""LAION's columns for filters and provenance; null if the metadata lack them."""

PROVENANCE = pa.schema([("license", pa.string()), ("source", pa.string())])
"""Licence and origin of an image as given in the list."""

METADATA_ROW = pa.schema(
    [("key", pa.int64()), ("url", pa.string()), ("alt_text", pa.string()), *SCORES, *PROVENANCE]
)
"""A row of an ingest plan: one URL to download."""

IMAGE_ROW = pa.schema(
    [
        *METADATA_ROW,
        ("image", IMAGE_STRUCT),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("sha256", pa.string()),
        ("phash", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("run", pa.int32()),
    ]
)
"""Output of ingest. `image`, sizes and hashes are null unless `status` is ok, duplicate or filtered:….

`run` is the number of the run that downloaded the row.
"""

PAIR_ROW = IMAGE_ROW.append(pa.field("caption", pa.string()))
"""Input of stage 2: an image row and its target caption."""

CAPTION_ROW = pa.schema(
    [
        ("key", pa.int64()),
        ("name", pa.string()),
        ("caption", pa.string()),
        ("num_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("num_words", pa.int32()),
        ("truncated", pa.bool_()),
        ("empty", pa.bool_()),
        ("repetition", pa.float32()),
        ("non_language", pa.bool_()),
        ("model", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)
"""Output of recaption.

`name` is the image's file name or URL. `num_words` to `non_language` are quality measures of the caption
(pipelines.recaption.health). `model` is the fingerprint of checkpoint and settings.
"""

JOINED_ROW = CAPTION_ROW.append(pa.field("image", IMAGE_STRUCT))
"""Output of recaption with `join=true`: also the image as read, or null if it could not be read."""

RECONSTRUCTION_ROW = pa.schema(
    [
        ("key", pa.int64()),
        ("image", IMAGE_STRUCT),
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)
"""Output of reconstruct: the image generated from an image's caption embeddings."""

LATENT_ROW = pa.schema(
    [
        ("key", pa.int64()),
        ("mean", pa.binary()),
        ("deviation", pa.binary()),
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)
"""Output of precompute: the latent distribution of an image (pipelines.images.latents)."""


def with_image_feature(schema: pa.Schema) -> pa.Schema:
    """The schema with metadata that make Hugging Face datasets read `image` as an image."""
    features = {"image": {"_type": "Image"}}
    metadata = json.dumps({"info": {"features": {**_value_features(schema), **features}}})
    return schema.with_metadata({"huggingface": metadata})


def _value_features(schema: pa.Schema) -> dict[str, dict[str, str]]:
    names = {pa.float32(): "float32", pa.float64(): "float64"}
    return {
        field.name: {"dtype": names.get(field.type, str(field.type)), "_type": "Value"}
        for field in schema
        if not pa.types.is_nested(field.type)
    }


# Matches most URLs that are already normalised, in a tenth of the time that parsing takes.
_NORMAL_URL = re.compile(r"https?://[a-z0-9.-]*[a-z0-9-]/[!-\"$->@-~]*(\?[!-\"$-~]+)?")


def normalise_url(url: str) -> str:
    """The spelling of a URL that is hashed: scheme and host in lower case, no fragment, no default
    port, no surrounding white space.

    Path and query are unchanged. A text that is not a URL is only stripped, so that it still becomes a
    row (`download:bad_url`). Idempotent.
    """
    if _NORMAL_URL.fullmatch(url):
        return url
    url = url.strip()
    try:
        parts = urlsplit(url.partition("#")[0].rstrip())
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return url
    if not parts.scheme or not host:
        return url
    scheme = parts.scheme.lower()
    netloc = f"[{host}]" if ":" in host else host
    if port is not None and port != {"http": 80, "https": 443}.get(scheme):
        netloc = f"{netloc}:{port}"
    if "@" in parts.netloc:
        netloc = f"{parts.netloc.rpartition('@')[0]}@{netloc}"
    # `urlunsplit` drops an empty query; strip white space that was before its question mark.
    return urlunsplit((scheme, netloc, parts.path or "/", parts.query, "")).rstrip()


def host_of(url: str) -> str:
    """The host of a URL; empty if it has none or is not a URL."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def url_key(url: str) -> int:
    """The `key` of an image: 64 bits of BLAKE2b over its normalised URL, as a signed integer."""
    return key_of(normalise_url(url))


def key_of(normalised: str) -> int:
    """`url_key` of a URL that is already normalised."""
    digest = hashlib.blake2b(normalised.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big", signed=True)


def has_text(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Mask of the values of a text column that are not null or blank."""
    return pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(column), ""), False)


def require_columns(found: pa.Schema, needed: list[str], where: str) -> None:
    """Raise DataError if a table lacks a column; the message lists its columns."""
    missing = [name for name in needed if name not in found.names]
    if missing:
        raise DataError(
            f"{where} has no column {', '.join(map(repr, missing))}; "
            f"it has {', '.join(found.names) or 'no columns'}"
        )


def check_status(found: pa.Schema, where: str) -> None:
    """Raise DataError if the column `status` is not text: it then has another meaning (HTTP codes)."""
    if "status" not in found.names:
        return
    kind = found.field("status").type
    texts = pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view
    if not any(is_kind(kind) for is_kind in texts) and not pa.types.is_dictionary(kind):
        raise DataError(
            f"{where}: column 'status' is {kind}, expected text ('ok' for usable rows): rename it"
        )
