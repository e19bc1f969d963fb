"""The gate before a caption table is published: the shares that are too much, and of what."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pipelines.recaption.health import REPEATED
from pipelines.recaption.survey import Survey
from pipelines.storage.tables import Table
from vlv_model.config import Config
from vlv_model.errors import GateError


def _share(value: Any) -> Any:
    """`2%` as 0.02."""
    if not isinstance(value, str):
        return value
    number, percent, rest = value.strip().partition("%")
    try:
        return float(number + rest) / (100 if percent else 1)
    except ValueError:
        raise ValueError(f"expected a share such as 2% or 0.02, not '{value}'") from None


Share = Annotated[float, BeforeValidator(_share), Field(ge=0, le=1)]


class GateConfig(Config):
    """Shares of the captions (`2%` or 0.02) that are too much; none: whatever there is passes."""

    max_truncated: Share | None = Field(
        None, description="share (2% or 0.02) that may be cut at max_new_tokens"
    )
    max_empty: Share | None = Field(None, description="share without a word")
    max_repeated: Share | None = Field(
        None, description=f"share of which {REPEATED:.0%} repeat four words in a row said before"
    )
    max_non_language: Share | None = Field(
        None, description="share that are mostly no letters, or hold what no text has"
    )
    max_duplicates: Share | None = Field(
        None, description="share that say nearly the same as one of another image before"
    )


_WHICH = {
    "truncated": "truncated",
    "empty": '"empty"',
    "repeated": f"repetition >= {REPEATED}",
    "non_language": "non_language",
    "duplicates": None,
}
"""The rows of each gate in SQL, and how they are called in a survey."""


def check_gates(gate: GateConfig, found: Survey, table: Table) -> None:
    """Raise GateError, one line, for the first gate that the captions of a table do not pass."""
    for name, condition in _WHICH.items():
        most, many = getattr(gate, f"max_{name}"), getattr(found, name)
        if most is None or many <= most * found.captions:
            continue
        parts = f"{table.parts}/*.parquet"
        look = f'select key, caption from "{parts}" where {condition} limit 20'
        if condition is None:
            look = f'select caption, count(*) from "{parts}" group by 1 order by 2 desc limit 20'
        raise GateError(
            f"gate.max_{name}={most:g}: {many / found.captions:.4g} of the captions, {many:,} of "
            f"{found.captions:,}, so {table.folder} is not published. To look at them: "
            f"duckdb -c '{look}', or its _report.html; then caption them again "
            f"(earlier.captions={table.folder}, earlier.where, another data.output), or raise the gate"
        )
