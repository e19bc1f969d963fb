"""Which rows of a table a job takes: `where`, the condition of an SQL query, evaluated by DuckDB."""

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
    """The columns that a condition may name: all but nested ones and bytes."""
    return [
        field.name
        for field in schema
        if not (pa.types.is_nested(field.type) or _is_bytes(field.type))
    ]


def _is_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


class Where:
    """A condition such as `aesthetic >= 6 and alt_text like '%dog%'`."""

    def __init__(self, condition: str, setting: str = "data.where") -> None:
        self.condition, self.setting = condition, setting
        self._connection: duckdb.DuckDBPyConnection | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    def mask(self, rows: pa.Table) -> np.ndarray:
        """Which rows it holds for, booleans `[n]`; null counts as no.

        Raises ConfigError, one line, where DuckDB cannot read it or a column is not there.
        """
        import duckdb

        if self._connection is None:
            # A condition has no business with files, and threads are the callers' matter.
            options: dict[str, Any] = {"enable_external_access": "false", "threads": "1"}
            # Nor with the rows as a whole, of which some alone are here: it sees no table.
            options["python_enable_replacements"] = "false"
            self._connection = duckdb.connect(":memory:", config=options)
        known = _told_apart(rows.column_names)
        number = "_row" + "_" * max(map(len, known), default=0)  # a name that no column has
        numbers = pa.array(np.arange(rows.num_rows), pa.int64())
        numbered = rows.select(known).append_column(number, numbers)
        try:
            # As one expression, not as text in a query, which could end the condition and go on.
            condition = duckdb.SQLExpression(self.condition)
            relation = self._connection.from_arrow(numbered).filter(condition)
            found = relation.select(duckdb.ColumnExpression(number)).fetchnumpy()[number]
        except duckdb.Error as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"{self.setting}={self.condition!r} is no condition on these rows ({reason}); "
                f"columns: {', '.join(known)}"
            ) from None
        mask = np.zeros(rows.num_rows, bool)
        mask[np.asarray(found, np.int64)] = True
        return mask


def _told_apart(names: Sequence[str]) -> list[str]:
    """Those that SQL tells apart: to it `url` and `URL` are one, and it would take either."""
    spelt = Counter(name.lower() for name in names)
    return [name for name in names if spelt[name.lower()] == 1]
