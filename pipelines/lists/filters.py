"""Rules that filter images: by the metadata before the download, by the image afterwards.

    rule            setting                               read from
    aesthetic       min_aesthetic                         the metadata
    pwatermark      max_pwatermark                        the metadata
    punsafe         max_punsafe                           the metadata
    short_side      min_short_side                        WIDTH, HEIGHT; then the image itself
    aspect_ratio    min_aspect_ratio, max_aspect_ratio    WIDTH, HEIGHT; then the image itself

A missing value (null, NaN) does not pass, unless the rule is optional.
"""

from __future__ import annotations

from typing import Literal, Self

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pipelines.images.rows import require_columns
from vlv_model.config import Config

Rule = Literal["aesthetic", "pwatermark", "punsafe", "short_side", "aspect_ratio"]

RULE_COLUMNS: dict[str, list[str]] = {
    "aesthetic": ["aesthetic"],
    "pwatermark": ["pwatermark"],
    "punsafe": ["punsafe"],
    "short_side": ["width", "height"],
    "aspect_ratio": ["width", "height"],
}


_LOW_IS_BETTER = ("pwatermark", "punsafe")


class FilterConfig(Config):
    """The filter rules of an ingest; a rule that is not set drops nothing."""

    min_aesthetic: float | None = Field(None, description="minimum aesthetic score (LAION: 5 or 6)")
    max_pwatermark: float | None = Field(
        None, description="watermark probability must be below this (LAION: 0.5 or 0.8)"
    )
    max_punsafe: float | None = Field(
        None, description="unsafe probability must be below this (LAION: 0.5)"
    )
    min_short_side: int | None = Field(
        None,
        ge=1,
        description="minimum length of the shorter side in pixels, by metadata and by image",
    )
    min_aspect_ratio: float | None = Field(
        None, gt=0, description="minimum width / height, by metadata and by image"
    )
    max_aspect_ratio: float | None = Field(
        None, gt=0, description="maximum width / height, by metadata and by image"
    )
    optional: tuple[Rule, ...] = Field(
        (), description="rules that pass if the metadata lack their column or value"
    )

    @model_validator(mode="after")
    def _some_ratio_passes(self) -> Self:
        low, high = self.min_aspect_ratio, self.max_aspect_ratio
        if low is not None and high is not None and low > high:
            raise ValueError(
                f"filter.min_aspect_ratio={low:g} is above filter.max_aspect_ratio={high:g}: "
                "no image could pass; swap them"
            )
        return self

    def rules(self) -> list[str]:
        """Names of the rules that are set, in the order in which failures are counted."""
        limits = {
            "aesthetic": (self.min_aesthetic,),
            "pwatermark": (self.max_pwatermark,),
            "punsafe": (self.max_punsafe,),
            "short_side": (self.min_short_side,),
            "aspect_ratio": (self.min_aspect_ratio, self.max_aspect_ratio),
        }
        return [rule for rule, values in limits.items() if any(v is not None for v in values)]


def check_columns(config: FilterConfig, found: pa.Schema, columns: set[str], where: str) -> None:
    """Raise DataError for a rule whose column is missing; the message lists the file's columns.

    `found` is the file's own schema, `columns` are our names for its columns.
    """
    for rule in config.rules():
        missing = [name for name in RULE_COLUMNS[rule] if name not in columns]
        if missing and rule not in config.optional:
            require_columns(found, missing, f"{where}: filter '{rule}' (not in filter.optional)")


def metadata_failures(config: FilterConfig, rows: pa.Table) -> dict[str, pa.Array]:
    """For each rule that is set and has its columns: which of `rows` fail it, bool `[n]`.

    `rows` has our column names; sizes are float64. Scores and limits are compared as float32, as tables
    store them, so that a score of 0.45 equals a limit of 0.45.
    """
    passes = {}
    for rule in config.rules():
        if not set(RULE_COLUMNS[rule]) <= set(rows.column_names):
            continue  # an optional rule: `check_columns` raises for the others
        mask = _passes(config, rule, [rows[name] for name in RULE_COLUMNS[rule]])
        passes[rule] = pc.fill_null(mask, rule in config.optional)
    return {rule: pc.invert(mask) for rule, mask in passes.items()}


def none_passes(config: FilterConfig, minimum: pa.Table, maximum: pa.Table) -> bool:
    """Whether some rule fails every row whose values lie between `minimum` and `maximum`.

    Both have one row and our column names. False if unknown: an optional rule passes rows without a
    value, and these bounds do not bound the aspect ratio.
    """
    best = {n: (minimum if n in _LOW_IS_BETTER else maximum)[n] for n in minimum.column_names}
    failures = metadata_failures(config, pa.table(best))
    uncertain = {"aspect_ratio", *config.optional}
    return any(failed[0].as_py() for rule, failed in failures.items() if rule not in uncertain)


def _passes(config: FilterConfig, rule: str, columns: list[pa.ChunkedArray]) -> pa.Array:
    columns = [pc.if_else(pc.is_nan(column), None, column) for column in columns]
    limits = {
        "aesthetic": config.min_aesthetic,
        "pwatermark": config.max_pwatermark,
        "punsafe": config.max_punsafe,
    }
    if rule in limits:
        limit, score = pa.scalar(limits[rule], pa.float32()), columns[0].cast(pa.float32())
        return pc.less(score, limit) if rule in _LOW_IS_BETTER else pc.greater_equal(score, limit)
    width, height = columns
    if rule == "short_side":
        short = pc.min_element_wise(width, height, skip_nulls=False)
        return pc.greater_equal(short, config.min_short_side)
    ratio = pc.divide(width, pc.if_else(pc.greater(height, 0), height, None))
    low, high = config.min_aspect_ratio, config.max_aspect_ratio
    above = pc.greater_equal(ratio, low if low is not None else float("-inf"))
    return pc.and_(above, pc.less_equal(ratio, high if high is not None else float("inf")))


def image_failure(config: FilterConfig, width: int, height: int) -> str | None:
    """The first rule that an image of this size (pixels, upright) fails; None if it passes."""
    if config.min_short_side is not None and min(width, height) < config.min_short_side:
        return "short_side"
    low, high = config.min_aspect_ratio, config.max_aspect_ratio
    ratio = width / height
    if (low is not None and ratio < low) or (high is not None and ratio > high):
        return "aspect_ratio"
    return None
