"""Reads published lists of URLs under our column names and types.

Columns are renamed and cast to `pipelines.images.rows.METADATA_ROW`, plus `width` and `height`, which
only the filters use. From Parquet only these columns are read. If the statistics of a row group prove
that every row fails a filter, only the columns of the filters are read, to count by rule.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.images.rows import METADATA_ROW, PROVENANCE, require_columns
from pipelines.lists.filters import RULE_COLUMNS, FilterConfig, check_columns, none_passes
from pipelines.lists.readers import format_of, read_parquet, read_tables
from pipelines.storage.parquet import read_schema
from vlv_model.errors import ConfigError, DataError

COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "url": ("url", "image_url", "img_url"),
    # WIT has three texts per image. The reference caption is preferred, the longest comes last.
    "alt_text": (
        *("text", "alt_text", "caption", "alt"),
        *("caption_reference_description", "caption_alt_text_description"),
        "caption_attribution_description",
    ),
    # img2dataset writes the size of its stored copy as `width`, beside the original size.
    "width": ("original_width", "width"),
    "height": ("original_height", "height"),
    # COYO and DataComp name the CLIP model; LAION's scores come from ViT-B/32.
    "similarity": (
        *("similarity", "clip_similarity_vitb32", "clip_b32_similarity_score"),
        *("clip_similarity_vitl14", "clip_l14_similarity_score"),
    ),
    "pwatermark": ("pwatermark", "watermark", "watermark_score"),
    "punsafe": ("punsafe", "unsafe", "nsfw_score_opennsfw2"),
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetics", "aesthetic_score_laion_v2"),
    "hash": ("hash",),
    "license": ("license", "licence", "license_url"),
    "source": ("source", "dataset", "provenance"),
}
"""Our column names and their published spellings (case-insensitive), in order of preference."""

_TYPES = {name: METADATA_ROW.field(name).type for name in METADATA_ROW.names} | {
    "width": pa.float64(),  # integers in some LAION releases, floats in others
    "height": pa.float64(),
}


LEFT_OUT = (None, "none")
"""Values in `data.columns` for a column that is not to be read."""

InvalidValues = dict[str, tuple[int, str]]
"""Per column of the file: how many values were read as missing, and where the first one is."""


def match_columns(schema: pa.Schema, extra: Mapping[str, str | None], where: str) -> dict[str, str]:
    """Find our columns in a file: {our name: the file's name}.

    `extra` (`data.columns`: {the file's name: our name, or none to leave the column out}) takes
    precedence over COLUMN_NAMES. Raises ConfigError for a name that is not in COLUMN_NAMES, and
    DataError for a column that the file lacks or for two columns that differ only in case.
    """
    named = {
        source_name: our_name for source_name, our_name in extra.items() if our_name not in LEFT_OUT
    }
    if unknown := sorted(set(named.values()) - {*COLUMN_NAMES, None}, key=str):
        raise ConfigError(
            f"data.columns: unknown column '{unknown[0]}': expected one of {', '.join(COLUMN_NAMES)}, or "
            "none to leave the column out"
        )
    require_columns(schema, list(extra), f"{where} (data.columns)")
    by_lower: dict[str, list[str]] = {}
    for name in schema.names:
        if name not in extra or name in named:
            by_lower.setdefault(name.strip().lower(), []).append(name)
    found = {our_name: source_name for source_name, our_name in named.items() if our_name}
    for our_name, spellings in COLUMN_NAMES.items():
        candidates = next((by_lower[name] for name in spellings if name in by_lower), [])
        if our_name not in found and len(candidates) > 1:
            several = " and ".join(map(repr, candidates))
            raise DataError(f"{where} has {several}: choose the one for {our_name} in data.columns")
        if candidates:
            found.setdefault(our_name, candidates[0])
    return found


def read_batches(
    file: Path,
    extra: Mapping[str, str | None],
    filters: FilterConfig,
    invalid: InvalidValues | None = None,
) -> Iterator[pa.Table]:
    """The rows of one metadata file under our names and types, in batches.

    In a batch without `url`, every row has a URL and fails a filter; it has the filters' columns only.
    A text that cannot be cast, in a column that no filter reads, becomes null and is counted in
    `invalid`. Raises DataError for a file that cannot be read, that lacks `url` or a filter's column, or
    whose values have the wrong type.
    """
    invalid = {} if invalid is None else invalid
    filtered = {name for rule in filters.rules() for name in RULE_COLUMNS[rule]}
    found: dict[str, str] = {}
    tables = None
    if format_of(file) == ".parquet":
        schema = read_schema(file)
        found = _match_checked(schema, extra, filters, file)
        choose = partial(_columns_to_read, schema=schema, found=found, filters=filters, file=file)
        tables = read_parquet(file, choose)
    for batch in tables or read_tables(file):
        if tables is None:  # later JSON lines may have new columns
            found = _match_checked(batch.schema, extra, filters, file) | found
        yield cast_columns(batch, found, filtered, file, invalid)


def cast_columns(
    batch: pa.Table,
    found: Mapping[str, str],
    filtered: Collection[str],
    file: Path,
    invalid: InvalidValues,
) -> pa.Table:
    """The columns of a batch that `found` ({our name: the file's name}) names, under our names and types.

    A text that cannot be cast becomes null and is counted in `invalid`; in a column of `filtered`, which
    filters read, it raises DataError.
    """
    columns = {
        our_name: _cast(
            batch[source_name],
            our_name,
            source_name,
            file,
            None if our_name in filtered else invalid,
        )
        for our_name, source_name in found.items()
        if source_name in batch.column_names
    }
    return pa.table(columns)


def _match_checked(
    schema: pa.Schema, extra: Mapping[str, str | None], filters: FilterConfig, file: Path
) -> dict[str, str]:
    """`match_columns`; raises DataError if `url` or a filter's column is missing."""
    found = match_columns(schema, extra, str(file))
    if "url" not in found:
        spellings = " or ".join(repr(name) for name in COLUMN_NAMES["url"])
        require_columns(schema, ["url"], f"{file} (read as url: {spellings}, in any case)")
    check_columns(filters, schema, set(found), str(file))
    return found


def _columns_to_read(
    group: pq.RowGroupMetaData,
    schema: pa.Schema,
    found: Mapping[str, str],
    filters: FilterConfig,
    file: Path,
) -> list[str]:
    """The file's columns to read from a row group.

    All matched columns; or only those of the filters, to count rows by rule, if the group's statistics
    prove that every row has a URL and fails a filter.
    """
    columns = (group.column(i) for i in range(group.num_columns))
    statistics = {c.path_in_schema: c.statistics for c in columns if c.statistics is not None}
    needed = dict.fromkeys(
        name for rule in filters.rules() for name in RULE_COLUMNS[rule] if name in found
    )
    minimum: dict[str, pa.ChunkedArray] = {}
    maximum: dict[str, pa.ChunkedArray] = {}
    for our_name in needed:
        source_name = found[our_name]
        kind, stats = schema.field(source_name).type, statistics.get(source_name)
        # Not float16, whose bounds Arrow returns as bytes.
        is_number = pa.types.is_integer(kind) or kind in (pa.float32(), pa.float64())
        # Some writers store NaN as a bound, which bounds nothing.
        if is_number and stats and stats.has_min_max and stats.min <= stats.max:
            for bound, value in ((minimum, stats.min), (maximum, stats.max)):
                bound[our_name] = _cast(
                    pa.chunked_array([[value]], kind), our_name, source_name, file
                )
    every_url = _none_is_blank(statistics.get(found["url"]))
    if every_url and minimum and none_passes(filters, pa.table(minimum), pa.table(maximum)):
        return [found[our_name] for our_name in needed]
    return list(found.values())


def _none_is_blank(urls: pq.Statistics | None) -> bool:
    """Whether the statistics prove that no URL is null, empty or blank."""
    if urls is None or not urls.has_min_max or not urls.has_null_count or urls.null_count:
        return False
    # Every white-space character, in ASCII or beyond, begins with a byte outside these bounds.
    is_text = urls.physical_type == "BYTE_ARRAY"
    return is_text and bool(urls.min_raw >= b"!" and urls.max_raw < b"\x7f")


def _cast(
    column: pa.ChunkedArray,
    our_name: str,
    source_name: str,
    file: Path,
    invalid: InvalidValues | None = None,
) -> pa.ChunkedArray:
    """A column cast to our type. With `invalid`, values that cannot be cast become null."""
    where = f"{file}: column '{source_name}'"
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if our_name in PROVENANCE.names and not _is_text(column.type):
        # Lists give these as numbers or lists too: any value is kept, as JSON.
        values = column.to_pylist()
        texts = [
            None if value is None or value != value else json.dumps(value, default=str)
            for value in values
        ]
        return pa.chunked_array([pa.array(texts, pa.string())])
    kind = _TYPES[our_name]
    try:
        if pa.types.is_string(kind):
            return as_text(column, where)
        return _numbers(column, kind, where)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, DataError) as error:
        if invalid is not None and _is_text(column.type) and our_name not in ("url", "alt_text"):
            return _cast_each(column, kind, source_name, where, invalid)
        if invalid is not None and our_name in ("width", "height"):  # only filters read them
            return pa.chunked_array([pa.nulls(len(column), kind)])
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{where} is {column.type} and cannot be read as {kind} "
            f"({str(error)[:120]}); rename it, map another column in data.columns, or leave it out: "
            f"data.columns='{{{source_name}: none}}'"
        ) from None


def _cast_each(
    column: pa.ChunkedArray, kind: pa.DataType, source_name: str, where: str, invalid: InvalidValues
) -> pa.ChunkedArray:
    """Cast texts to `kind` one by one; those that fail become null and are counted in `invalid`."""
    values: list[Any] = []
    for value in column.cast(pa.binary()).to_pylist():
        single = pa.chunked_array([pa.array([value], pa.binary())])
        try:
            is_string = pa.types.is_string(kind)
            cast = as_text(single, where) if is_string else _numbers(single, kind, where)
            values += cast.to_pylist()
        except (pa.ArrowInvalid, DataError):
            values.append(None)
            shown = value.decode("utf-8", "replace")[:40]
            first = f"{shown!r} in {where.rpartition(': column ')[0]}"
            count, first = invalid.get(source_name, (0, first))
            invalid[source_name] = (count + 1, first)
    return pa.chunked_array([pa.array(values, kind)])


def _numbers(column: pa.ChunkedArray, kind: pa.DataType, where: str) -> pa.ChunkedArray:
    """Numbers, or numbers as text, cast to `kind`; raises rather than round an integer."""
    if _is_text(column.type):
        texts = pc.utf8_trim_whitespace(as_text(column, where))
        return pc.if_else(pc.equal(texts, ""), None, texts).cast(kind)
    if pa.types.is_floating(kind):
        return column.cast(kind, safe=False)
    if pa.types.is_temporal(column.type):
        raise pa.ArrowInvalid("a time is not a number")
    if pa.types.is_floating(column.type):  # pandas writes null as NaN
        column = pc.if_else(pc.is_nan(column), None, column)
    # A 64-bit hash keeps its bits, signed or unsigned.
    return column.cast(kind, safe=not pa.types.is_uint64(column.type))


def as_text(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """A column of texts or UTF-8 bytes as strings; DataError for any other."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (_is_text(kind) or pa.types.is_null(kind)):
        raise DataError(
            f"{where} is {column.type}, expected text: rename it, or map another column"
        )
    try:
        texts = column.cast(pa.string())
        texts.validate(full=True)  # Arrow's Parquet reader does not check that strings are UTF-8
    except pa.ArrowInvalid:
        raise DataError(f"{where} has values that are not UTF-8: convert them to UTF-8") from None
    return texts


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    strings = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    binaries = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return strings or binaries
