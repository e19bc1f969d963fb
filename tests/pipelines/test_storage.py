from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.storage import Table, parquet_files, read_rows, write_atomically, write_parquet
from vlv_model.errors import DataError, RunError


def rows(n: int, status: str = "ok") -> pa.Table:
    return pa.table({"key": list(range(n)), "status": [status] * n})


def begun(folder: Path, chunks: int = 3) -> Table:
    table = Table(folder)
    assert not table.check_free("image", {"a": 1})
    table.create("image", {"a": 1}, chunks)
    return table


def test_a_killed_table_continues_with_what_is_missing(tmp_path: Path) -> None:
    table = begun(tmp_path / "t")
    table.write(1, rows(5))
    # A part without its commit is what a kill between the two leaves.
    write_parquet(table.part(2), rows(99))
    again = Table(tmp_path / "t")
    assert again.check_free("image", {"a": 1})
    assert again.pending() == [0, 2]
    again.write(2, rows(2, "download:timeout"))
    again.write(0, rows(1))
    assert again.pending() == []
    assert again.counts() == {"ok": 6, "download:timeout": 2}
    found = list(read_rows(parquet_files(str(tmp_path / "t")), ["key"]))
    assert len(found) == 8


def test_writing_a_chunk_twice_gives_one(tmp_path: Path) -> None:
    table = begun(tmp_path / "t", chunks=1)
    table.write(0, rows(4))
    table.write(0, rows(4))
    assert table.counts() == {"ok": 4}


def test_an_unfinished_table_is_not_read(tmp_path: Path) -> None:
    begun(tmp_path / "t").write(0, rows(1))
    with pytest.raises(DataError, match="not finished"):
        parquet_files(str(tmp_path / "t"))


def test_another_run_is_refused_by_the_setting_that_differs(tmp_path: Path) -> None:
    begun(tmp_path / "t")
    with pytest.raises(RunError, match="a: 1 there, 2 here"):
        Table(tmp_path / "t").check_free("image", {"a": 2})
    with pytest.raises(RunError, match="image table, not caption"):
        Table(tmp_path / "t").check_free("caption", {"a": 1})


def test_a_strangers_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear to somebody")
    with pytest.raises(RunError, match=r"not empty.*thesis"):
        Table(tmp_path).check_free("image", {})


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()])
def test_a_missing_or_empty_dataset_is_one_line(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "t")
    with pytest.raises(DataError, match=r"data\.input=.*(does not exist|has no Parquet files)"):
        parquet_files(str(tmp_path / "t"))


def test_atomic_writes_leave_no_temporary_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.json", "{}")
    write_atomically(tmp_path / "a.json", "[]")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "[]"
