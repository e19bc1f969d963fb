"""Score columns of feature tables, looked up by key (`data.features`).

The tables are sorted by key on this machine's disk once, into arrays that are mapped, not read: the
operating system holds what is looked up, and drops it when memory is short. Rows may come in any order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from pipelines.images.features import FeatureTable
from pipelines.storage.files import raise_if_full
from pipelines.storage.fingerprints import size_fingerprint
from pipelines.storage.sorting import ExternalSort, spread_keys
from vlv_model.errors import ConfigError, DataError

SETTING = "data.features"


def scores_fingerprint(paths: Sequence[str]) -> str | None:
    """A hash of the sizes of the tables' parts; None without tables."""
    if not paths:
        return None
    files = {
        f"{i}/{file.name}": file
        for i, path in enumerate(paths)
        for file in FeatureTable(path, SETTING).files
    }
    return size_fingerprint(files)


class Scores:
    """The score columns of some feature tables. A context manager that removes its temporary files."""

    def __init__(self, paths: Sequence[str]) -> None:
        """Raises DataError for a table without scores, ConfigError for two with a column of one name."""
        self._folder = tempfile.TemporaryDirectory(prefix="vlv-scores-")
        self._tables: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        found: dict[str, str] = {}
        for path in paths:
            table = FeatureTable(path, SETTING)
            if not table.scores:
                raise DataError(
                    f"{SETTING}={path} has no scores, only features: give a table of "
                    "embed.extractor=aesthetic, or leave it out"
                )
            for name in table.scores:
                if name in found:
                    raise ConfigError(
                        f"{SETTING}: {found[name]} and {path} both have a column {name!r}: give one"
                    )
                found[name] = path
            self._tables.append(self._sorted(table, len(self._tables)))

    def __enter__(self) -> Scores:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._tables.clear()
        self._folder.cleanup()

    def join(self, rows: pa.Table, keys: np.ndarray) -> pa.Table:
        """`rows` with the scores of their keys, int64 `[n]`; null where a table lacks the key.

        A column of `rows` with a score's name is replaced: scores of two origins do not compare.
        """
        spread = spread_keys(keys)
        for known, columns in self._tables:
            places = np.minimum(np.searchsorted(known, spread), max(0, len(known) - 1))
            there = known[places] == spread if len(known) else np.zeros(len(keys), bool)
            for name, values in columns.items():
                taken = values[places] if len(known) else np.zeros(len(keys), np.float32)
                column = pa.array(taken, pa.float32(), mask=~there | np.isnan(taken))
                rows = _replaced(rows, name, column)
        return rows

    def _sorted(self, table: FeatureTable, number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Spread keys in order, and the scores by name, in the order of the keys."""
        folder, names = Path(self._folder.name), table.scores
        schema = pa.schema([("key", pa.int64()), *((name, pa.float32()) for name in names)])
        sorter = ExternalSort(schema, table.rows * (8 + 4 * len(names)))
        try:
            for batch in table.columns(names, 1 << 16):
                columns = [spread_keys(batch["key"].to_numpy()), *(batch[n] for n in names)]
                sorter.add(pa.table(columns, schema=schema))
            types = {"key": np.int64, **dict.fromkeys(names, np.float32)}
            files = {name: folder / f"{number}-{i}" for i, name in enumerate(types)}
            for bucket in sorter.sorted():
                for name, file in files.items():
                    with file.open("ab") as stream:
                        stream.write(bucket[name].to_numpy().astype(types[name]).tobytes())
        except OSError as error:
            raise_if_full(error, f"{folder} (temporary files; TMPDIR chooses the disk)")
            raise
        finally:
            sorter.remove()
        arrays = {name: _mapped(file, types[name]) for name, file in files.items()}
        return arrays.pop("key"), arrays


def _mapped(file: Path, kind: type) -> np.ndarray:
    if not file.stat().st_size:
        return np.zeros(0, kind)
    return np.memmap(file, kind, "r")


def _replaced(rows: pa.Table, name: str, column: pa.Array) -> pa.Table:
    # SQL does not tell `Aesthetic` from `aesthetic`.
    same = [other for other in rows.column_names if other.lower() == name.lower()]
    return rows.drop_columns(same).append_column(name, column)
