"""Quality gates: the largest share of faulty captions with which a table is published."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pipelines.recaption.health import REPEATED
from pipelines.recaption.survey import Survey
from pipelines.storage.tables import Table
from vlv_model.config import Config
from vlv_model.errors import GateError


def _share(value: Any) -> Any:
    """Parse `2%` as 0.02."""
    if not isinstance(value, str):
        return value
    number, percent, rest = value.strip().partition("%")
    try:
        return float(number + rest) / (100 if percent else 1)
    except ValueError:
        raise ValueError(f"expected a share such as 2% or 0.02, not '{value}'") from None


Share = Annotated[float, BeforeValidator(_share), Field(ge=0, le=1)]


class GateConfig(Config):
    """The largest permitted shares of faulty captions (`2%` or 0.02); None: no limit."""

    max_truncated: Share | None = Field(
        None, description="most captions (2% or 0.02) cut at max_new_tokens; default: no limit"
    )
    max_empty: Share | None = Field(None, description="most captions without a word")
    max_repeated: Share | None = Field(
        None,
        description=f"most captions with {REPEATED:.0%} or more of their words in repeated runs of four",
    )
    max_non_language: Share | None = Field(
        None, description="most captions that are mostly not letters, or have broken characters"
    )
    max_duplicates: Share | None = Field(
        None, description="most captions that nearly repeat the caption of an earlier image"
    )


_CONDITIONS = {
    "truncated": "truncated",
    "empty": '"empty"',
    "repeated": f"repetition >= {REPEATED}",
    "non_language": "non_language",
    "duplicates": None,
}
"""The rows of each gate as an SQL condition, by the field of Survey that counts them."""


def check_gates(gate: GateConfig, survey: Survey, table: Table) -> None:
    """Raise GateError for the first gate that the captions of a table do not pass."""
    for name, condition in _CONDITIONS.items():
        limit, faulty = getattr(gate, f"max_{name}"), getattr(survey, name)
        if limit is None or faulty <= limit * survey.captions:
            continue
        parts = f"{table.parts}/*.parquet"
        query = f'select key, caption from "{parts}" where {condition} limit 20'
        if condition is None:
            query = f'select caption, count(*) from "{parts}" group by 1 order by 2 desc limit 20'
        raise GateError(
            f"gate.max_{name}={limit:g}: {faulty / survey.captions:.4g} of the captions, {faulty:,} of "
            f"{survey.captions:,}, so {table.folder} is not published. Inspect them with "
            f'python -c \'import duckdb; print(duckdb.sql("""{query}"""))\' or in _report.html; then '
            "caption them again "
            f"(earlier.captions={table.folder}, earlier.where, another data.output), or raise the gate"
        )
