"""Conditions on rows: the setting `where`, an SQL condition evaluated by DuckDB."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from vlv_model.errors import ConfigError

if TYPE_CHECKING:
    import duckdb


def small_columns(schema: pa.Schema) -> list[str]:
    """The columns that a condition may use: all except nested ones and bytes."""
    return [
        field.name
        for field in schema
        if not (pa.types.is_nested(field.type) or _is_bytes(field.type))
    ]


def _is_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


class Where:
    """An SQL condition such as `aesthetic >= 6 and alt_text like '%dog%'`."""

    def __init__(self, condition: str, setting: str = "data.where") -> None:
        self.condition, self.setting = condition, setting
        self._connection: duckdb.DuckDBPyConnection | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    def mask(self, rows: pa.Table) -> np.ndarray:
        """Which rows satisfy the condition, bool `[n]`; null counts as false.

        Raises ConfigError, one line, if DuckDB rejects the condition or a column is missing.
        """
        import duckdb

        if self._connection is None:
            # A condition may not read files. Parallelism is up to the caller.
            options: dict[str, Any] = {"enable_external_access": "false", "threads": "1"}
            # It may not query Python variables such as the rows: only some of the rows are here.
            options["python_enable_replacements"] = "false"
            self._connection = duckdb.connect(":memory:", config=options)
        columns = _unambiguous(rows.column_names)
        number = "_row" + "_" * max(map(len, columns), default=0)  # a name that no column has
        numbers = pa.array(np.arange(rows.num_rows), pa.int64())
        numbered = rows.select(columns).append_column(number, numbers)
        try:
            # As an expression. As text in a query, a condition could end early and add other SQL.
            condition = duckdb.SQLExpression(self.condition)
            relation = self._connection.from_arrow(numbered).filter(condition)
            selected = relation.select(duckdb.ColumnExpression(number)).fetchnumpy()[number]
        except duckdb.Error as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"{self.setting}={self.condition!r} is not a valid condition on these rows ({reason}); "
                f"columns: {', '.join(columns)}"
            ) from None
        mask = np.zeros(rows.num_rows, bool)
        mask[np.asarray(selected, np.int64)] = True
        return mask


def _unambiguous(names: Sequence[str]) -> list[str]:
    """The names that are unique regardless of case: SQL treats `url` and `URL` as the same column."""
    counts = Counter(name.lower() for name in names)
    return [name for name in names if counts[name.lower()] == 1]
