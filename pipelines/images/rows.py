"""The rows that travel between the jobs, from URL to caption, as Arrow schemas."""

from __future__ import annotations

import hashlib
import json
import re
from urllib.parse import urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.compute as pc

from vlv_model.errors import DataError

OK = "ok"
"""Status of a row that later jobs use. All others say why a row is not used."""

FILTERED, DOWNLOAD, DECODE, DUPLICATE = "filtered", "download", "decode", "duplicate"
CAPTION = "caption"


def status(kind: str, detail: str) -> str:
    """A row's status of two parts, e.g. `download:timeout`; `detail` is of a closed list."""
    return f"{kind}:{detail}"


# Hugging Face datasets decodes a struct of bytes and path as its Image feature.
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
"""LAION's columns that filters and provenance use; null where the metadata lack them."""

PROVENANCE = pa.schema([("license", pa.string()), ("source", pa.string())])
"""Under which licence the list names an image, and where the list has it from; kept as they are."""

METADATA_ROW = pa.schema(
    [("key", pa.int64()), ("url", pa.string()), ("alt_text", pa.string()), *SCORES, *PROVENANCE]
)
"""What the plan of an ingest holds: one row per URL that is to be fetched."""

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

`run` is the number of the run that fetched the row.
"""

PAIR_ROW = IMAGE_ROW.append(pa.field("caption", pa.string()))
"""Input of stage 2: an image row and the caption that it is to be taught."""

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
"""Output of recaption. `model` is the fingerprint of checkpoint and settings; `num_words` to
`non_language` are the caption's health (pipelines.recaption.health); `name` is that of the image's
file, or its URL."""

JOINED_ROW = CAPTION_ROW.append(pa.field("image", IMAGE_STRUCT))
"""Output of recaption with `join=true`: the image as it was read, null where it could not be."""

RECONSTRUCTION_ROW = pa.schema(
    [
        ("key", pa.int64()),
        ("image", IMAGE_STRUCT),
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)
"""Output of reconstruct: the picture that an image's caption embeddings give back."""

LATENT_ROW = pa.schema(
    [
        ("key", pa.int64()),
        ("mean", pa.binary()),
        ("deviation", pa.binary()),
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)
"""Output of precompute: the distribution of an image's latents (pipelines.images.latents)."""


def with_image_feature(schema: pa.Schema) -> pa.Schema:
    """The schema with the note by which Hugging Face datasets shows `image` as a picture."""
    features = {"image": {"_type": "Image"}}
    note = json.dumps({"info": {"features": {**_plain_features(schema), **features}}})
    return schema.with_metadata({"huggingface": note})


def _plain_features(schema: pa.Schema) -> dict[str, dict[str, str]]:
    names = {pa.float32(): "float32", pa.float64(): "float64"}
    return {
        field.name: {"dtype": names.get(field.type, str(field.type)), "_type": "Value"}
        for field in schema
        if not pa.types.is_nested(field.type)
    }


# What most URLs are like: nothing of them is to be changed, which is seen in a tenth of the time.
_NORMAL_URL = re.compile(r"https?://[a-z0-9.-]*[a-z0-9-]/[!-\"$->@-~]*(\?[!-\"$-~]+)?")


def normalise_url(url: str) -> str:
    """The spelling under which a URL is known: scheme and host lower-case, no fragment, no
    default port, outer white space off. Path and query are kept to the letter; what cannot be
    read as a URL is kept as it is, so that it too becomes a row (`download:bad_url`).
    Normalising what was normalised changes nothing.
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
    place = f"[{host}]" if ":" in host else host
    if port is not None and port != {"http": 80, "https": 443}.get(scheme):
        place = f"{place}:{port}"
    if "@" in parts.netloc:
        place = f"{parts.netloc.rpartition('@')[0]}@{place}"
    # A question mark that nothing follows goes; white space may have stood before it.
    return urlunsplit((scheme, place, parts.path or "/", parts.query, "")).rstrip()


def host_of(url: str) -> str:
    """The host of a URL; empty where it has none, or cannot be read as one."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def url_key(url: str) -> int:
    """`key` of an image: 64 bits of BLAKE2b over its normalised URL, as a signed integer."""
    return key_of(normalise_url(url))


def key_of(normalised: str) -> int:
    """`url_key` of a URL that is normalised already."""
    digest = hashlib.blake2b(normalised.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big", signed=True)


def has_text(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Mask of the values of a text column that are neither null nor blank."""
    return pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(column), ""), False)


def require_columns(found: pa.Schema, needed: list[str], where: str) -> None:
    """Raise DataError when a table lacks a column; the line lists what it does have."""
    missing = [name for name in needed if name not in found.names]
    if missing:
        raise DataError(
            f"{where} has no column {', '.join(map(repr, missing))}; "
            f"it has {', '.join(found.names) or 'no columns'}"
        )


def check_status(found: pa.Schema, where: str) -> None:
    """Raise DataError for a `status` that is no text, as a code of HTTP: it is not what ours means."""
    if "status" not in found.names:
        return
    kind = found.field("status").type
    texts = pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view
    if not any(is_kind(kind) for is_kind in texts) and not pa.types.is_dictionary(kind):
        raise DataError(
            f"{where}: column 'status' is {kind}, expected text, 'ok' in the rows that are used: "
            "rename it"
        )
