"""Reading lists of URLs as they are published: Parquet, CSV, JSONL and JSON, in many spellings.

Files are read a batch at a time; their columns get our names and types (`schemas.METADATA_ROW`,
and `width` and `height`, which only the filters use). Of Parquet only our columns are read, and of
row groups whose statistics rule out every row only those that are needed to count by which rule.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
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
    # WIT has three texts of an image: the one below it comes first, the longest last.
    "alt_text": (
        *("text", "alt_text", "caption", "alt"),
        *("caption_reference_description", "caption_alt_text_description"),
        "caption_attribution_description",
    ),
    # Beside an original's size, `width` is that of a stored copy, as img2dataset writes it.
    "width": ("original_width", "width"),
    "height": ("original_height", "height"),
    # COYO's and DataComp's have the names of the models: LAION's were made by ViT-B/32.
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
"""Our name of a column and the names it goes by, in any case, the likeliest first."""

_TYPES = {name: METADATA_ROW.field(name).type for name in METADATA_ROW.names} | {
    "width": pa.float64(),  # LAION's are integers in one release, floats in the next
    "height": pa.float64(),
}


LEFT_OUT = (None, "none")
"""What `data.columns` gives in place of our name for a column that is not to be read."""

OddValues = dict[str, tuple[int, str]]
"""By the file's name of a column: how many values were taken as missing, and where the first is."""


def our_columns(schema: pa.Schema, extra: Mapping[str, str | None], where: str) -> dict[str, str]:
    """Which of a file's columns is which of ours: {our name: the file's name}.

    `extra` (`data.columns`: {the file's name: our name, or none to leave the column out}) goes
    before the table of spellings. Raises ConfigError for a name that is not ours, DataError for one that the file has not, and
    for two columns that differ by case alone.
    """
    named = {theirs: ours for theirs, ours in extra.items() if ours not in LEFT_OUT}
    if unknown := sorted(set(named.values()) - {*COLUMN_NAMES, None}, key=str):
        raise ConfigError(
            f"data.columns: '{unknown[0]}' is no column of ours; they are {', '.join(COLUMN_NAMES)}, "
            "and none for a column that is left out"
        )
    require_columns(schema, list(extra), f"{where} (data.columns)")
    by_lower: dict[str, list[str]] = {}
    for name in schema.names:
        if name not in extra or name in named:
            by_lower.setdefault(name.strip().lower(), []).append(name)
    found = {ours: theirs for theirs, ours in named.items() if ours}
    for ours, spellings in COLUMN_NAMES.items():
        theirs = next((by_lower[name] for name in spellings if name in by_lower), [])
        if ours not in found and len(theirs) > 1:
            several = " and ".join(map(repr, theirs))
            raise DataError(f"{where} has {several}: say which is {ours} in data.columns")
        if theirs:
            found.setdefault(ours, theirs[0])
    return found


def read_batches(
    file: Path,
    extra: Mapping[str, str | None],
    filters: FilterConfig,
    odd: OddValues | None = None,
) -> Iterator[pa.Table]:
    """The rows of one metadata file under our names and types, a batch at a time.

    A batch without `url` is of rows that all have a URL and all fail a filter: it has what the
    filters read. An odd text in a column that no filter reads is taken as missing, and counted in
    `odd`. Raises DataError for a file that cannot be read, lacks `url` or a filter's column, or has
    values of another kind than its columns should have.
    """
    odd = {} if odd is None else odd
    judged = {name for rule in filters.rules() for name in RULE_COLUMNS[rule]}
    found: dict[str, str] = {}
    tables = None
    if format_of(file) == ".parquet":
        schema = read_schema(file)
        found = _our_columns(schema, extra, filters, file)
        choose = partial(_columns_to_read, schema=schema, found=found, filters=filters, file=file)
        tables = read_parquet(file, choose)
    for batch in tables or read_tables(file):
        if tables is None:  # lines of JSON may have columns that those before them had not
            found = _our_columns(batch.schema, extra, filters, file) | found
        known = {ours: theirs for ours, theirs in found.items() if theirs in batch.column_names}
        yield pa.table(
            {
                ours: _cast(batch[theirs], ours, theirs, file, None if ours in judged else odd)
                for ours, theirs in known.items()
            }
        )


def _our_columns(
    schema: pa.Schema, extra: Mapping[str, str | None], filters: FilterConfig, file: Path
) -> dict[str, str]:
    """`our_columns` of a file that has what is needed of it."""
    found = our_columns(schema, extra, str(file))
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
    """The file's columns that are read of a row group.

    All that are ours; only those of the filters where the group's statistics prove that every row
    has a URL and fails a filter. These are read to count the rows by filter.
    """
    columns = (group.column(i) for i in range(group.num_columns))
    known = {c.path_in_schema: c.statistics for c in columns if c.statistics is not None}
    ruling = dict.fromkeys(
        name for rule in filters.rules() for name in RULE_COLUMNS[rule] if name in found
    )
    least: dict[str, pa.ChunkedArray] = {}
    greatest: dict[str, pa.ChunkedArray] = {}
    for ours in ruling:
        theirs = found[ours]
        kind, about = schema.field(theirs).type, known.get(theirs)
        # Of float16, Arrow gives the bounds as bytes.
        is_number = pa.types.is_integer(kind) or kind in (pa.float32(), pa.float64())
        # Some writers give NaN for a bound, which bounds nothing.
        if is_number and about and about.has_min_max and about.min <= about.max:
            for bound, value in ((least, about.min), (greatest, about.max)):
                bound[ours] = _cast(pa.chunked_array([[value]], kind), ours, theirs, file)
    every_url = _none_is_blank(known.get(found["url"]))
    if every_url and least and none_passes(filters, pa.table(least), pa.table(greatest)):
        return [found[ours] for ours in ruling]
    return list(found.values())


def _none_is_blank(urls: pq.Statistics | None) -> bool:
    """Whether statistics prove that no value is null, empty or white space."""
    if urls is None or not urls.has_min_max or not urls.has_null_count or urls.null_count:
        return False
    # All white space begins with bytes outside of these bounds, in ASCII and beyond it.
    is_text = urls.physical_type == "BYTE_ARRAY"
    return is_text and bool(urls.min_raw >= b"!" and urls.max_raw < b"\x7f")


def _cast(
    column: pa.ChunkedArray, ours: str, theirs: str, file: Path, odd: OddValues | None = None
) -> pa.ChunkedArray:
    """A column under our type. With `odd`, of a column that nobody judges by: see `read_batches`."""
    where = f"{file}: column '{theirs}'"
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if ours in PROVENANCE.names and not _is_text(column.type):
        # A licence's number says as much as its name; other lists mean other things by the name.
        values = column.to_pylist()
        texts = [
            None if value is None or value != value else json.dumps(value, default=str)
            for value in values
        ]
        return pa.chunked_array([pa.array(texts, pa.string())])
    kind = _TYPES[ours]
    try:
        if pa.types.is_string(kind):
            return as_text(column, where)
        return _numbers(column, kind, where)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, DataError) as error:
        if odd is not None and _is_text(column.type) and ours not in ("url", "alt_text"):
            return _without_odd_values(column, kind, theirs, where, odd)
        if odd is not None and ours in ("width", "height"):  # only filters read them
            return pa.chunked_array([pa.nulls(len(column), kind)])
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{where} is {column.type} and cannot be read as {kind} "
            f"({str(error)[:120]}); rename it, map another one in data.columns, or leave it out: "
            f"data.columns='{{{theirs}: none}}'"
        ) from None


def _without_odd_values(
    column: pa.ChunkedArray, kind: pa.DataType, theirs: str, where: str, odd: OddValues
) -> pa.ChunkedArray:
    """Texts value by value as `kind`; those that cannot be read are null, and counted in `odd`."""
    found: list[Any] = []
    for value in column.cast(pa.binary()).to_pylist():
        one = pa.chunked_array([pa.array([value], pa.binary())])
        try:
            whole = as_text(one, where) if pa.types.is_string(kind) else _numbers(one, kind, where)
            found += whole.to_pylist()
        except (pa.ArrowInvalid, DataError):
            found.append(None)
            shown = value.decode("utf-8", "replace")[:40]
            count, first = odd.get(theirs, (0, f"{shown!r} in {where.rpartition(': column ')[0]}"))
            odd[theirs] = (count + 1, first)
    return pa.chunked_array([pa.array(found, kind)])


def _numbers(column: pa.ChunkedArray, kind: pa.DataType, where: str) -> pa.ChunkedArray:
    """Numbers, also such as are written as text, as `kind`; an integer is never changed."""
    if _is_text(column.type):
        texts = pc.utf8_trim_whitespace(as_text(column, where))
        return pc.if_else(pc.equal(texts, ""), None, texts).cast(kind)
    if pa.types.is_floating(kind):
        return column.cast(kind, safe=False)
    if pa.types.is_temporal(column.type):
        raise pa.ArrowInvalid("a time is no number")
    if pa.types.is_floating(column.type):  # null in pandas
        column = pc.if_else(pc.is_nan(column), None, column)
    # A hash of 64 bits keeps them, whichever sign its writer gave it.
    return column.cast(kind, safe=not pa.types.is_uint64(column.type))


def as_text(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """A column of texts, or of bytes that are UTF-8, as strings; DataError for any other."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (_is_text(kind) or pa.types.is_null(kind)):
        raise DataError(f"{where} is {column.type}, expected text: rename it, or give another one")
    try:
        texts = column.cast(pa.string())
        texts.validate(full=True)  # Parquet's readers take any bytes for a string
    except pa.ArrowInvalid:
        raise DataError(f"{where} has values that are not UTF-8: write it anew as text") from None
    return texts


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    strings = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    binaries = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return strings or binaries
