from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.storage.files import write_atomically
from pipelines.storage.locks import lock_folder
from pipelines.storage.parquet import read_rows, read_schema, write_parquet
from pipelines.storage.tables import Table, parquet_files
from vlv_model.errors import DataError, RunError


def rows(n: int, status: str = "ok") -> pa.Table:
    return pa.table({"key": list(range(n)), "status": [status] * n})


def new_table(folder: Path, chunks: int = 3) -> Table:
    table = Table(folder)
    assert not table.check_same_run("image", {"a": 1})
    table.create("image", {"a": 1}, chunks)
    return table


def test_killed_table_continues_with_its_missing_chunks(tmp_path: Path) -> None:
    table = new_table(tmp_path / "t")
    table.write(1, rows(5))
    # A kill between part and commit leaves a part without a commit.
    write_parquet(table.part(2), rows(99))
    again = Table(tmp_path / "t")
    assert again.check_same_run("image", {"a": 1})
    assert again.pending() == [0, 2]
    again.write(2, rows(2, "download:timeout"))
    again.write(0, rows(1))
    assert again.pending() == []
    assert again.counts() == {"ok": 6, "download:timeout": 2}
    everything = list(read_rows(parquet_files(str(tmp_path / "t")), ["key"]))
    assert len(everything) == 8


def test_chunk_written_twice_counts_once(tmp_path: Path) -> None:
    table = new_table(tmp_path / "t", chunks=1)
    table.write(0, rows(4))
    table.write(0, rows(4))
    assert table.counts() == {"ok": 4}


def test_unfinished_table_is_refused(tmp_path: Path) -> None:
    new_table(tmp_path / "t").write(0, rows(1))
    with pytest.raises(DataError, match="not finished"):
        parquet_files(str(tmp_path / "t"))


def test_error_for_another_run_names_the_setting_that_differs(tmp_path: Path) -> None:
    new_table(tmp_path / "t")
    with pytest.raises(RunError, match="a: 1 there, 2 here"):
        Table(tmp_path / "t").check_same_run("image", {"a": 2})
    table = Table(tmp_path / "made")
    table.create("reconstruction", {"weights": "8f", "preprocess": "default"}, 1)
    for identity, line in (
        ({"weights": "9e", "preprocess": "default"}, r"model\.path \(weights\): 8f there, 9e here"),
        ({"weights": "8f", "preprocess": "reference"}, r"\(model\.preprocess: default there"),
    ):
        with pytest.raises(RunError, match=line):
            table.check_same_run("reconstruction", identity)
    with pytest.raises(RunError, match="image table, not caption"):
        Table(tmp_path / "t").check_same_run("caption", {"a": 1})


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match=r"not empty.*thesis"):
        Table(tmp_path).check_same_run("image", {})


def test_table_inside_a_table_is_refused(folder: Path) -> None:
    outer = new_table(folder / "images")
    for inner in ("captions", "deep/er/captions"):
        with pytest.raises(
            RunError, match=r"captions is inside the table .*/images, whose readers"
        ):
            Table(outer.folder / inner).check_same_run("caption", {})
        assert not (outer.folder / inner.split("/")[0]).exists()
    assert not Table(folder / "captions").check_same_run("caption", {})  # beside it


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()])
def test_missing_or_empty_dataset_is_a_one_line_error(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "t")
    with pytest.raises(DataError, match=r"data\.input=.*(does not exist|has no Parquet files)"):
        parquet_files(str(tmp_path / "t"))


def test_atomic_writes_leave_no_temporary_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.json", "{}")
    write_atomically(tmp_path / "a.json", "[]")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "[]"


def test_leftovers_of_a_killed_planner_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "_plan").mkdir()
    (tmp_path / "_commits").mkdir()
    (tmp_path / f"._table.json.{'0' * 32}").write_text("{")
    (tmp_path / "data").mkdir()
    assert not Table(tmp_path).check_same_run("image", {})
    (tmp_path / "data" / "thesis.parquet").write_text("precious")
    with pytest.raises(RunError, match=r"holds no table \(data, …\)"):
        Table(tmp_path).check_same_run("image", {})


def test_locked_folder_is_refused(tmp_path: Path) -> None:
    with lock_folder(tmp_path, "run_dir"):
        with pytest.raises(RunError, match="still going"), lock_folder(tmp_path, "run_dir"):
            pass
        assert not Table(tmp_path).check_same_run("image", {})  # the lock file is accepted
    with lock_folder(tmp_path, "run_dir"):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"x"'])
def test_damaged_table_file_is_a_one_line_error(tmp_path: Path, text: str) -> None:
    table = new_table(tmp_path / "t")
    (tmp_path / "t/_table.json").write_text(text)
    with pytest.raises(RunError, match=r"_table\.json"):
        table.pending()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"chunk": 0}'])
def test_damaged_commit_is_a_one_line_error(tmp_path: Path, text: str) -> None:
    table = new_table(tmp_path / "t")
    (tmp_path / "t/_commits/000000.json").write_text(text)
    with pytest.raises(RunError, match="_commits"):
        table.counts()


@pytest.mark.parametrize("place", ["file", "file/below", "x" * 300, "nul\0"])
def test_impossible_output_folder_is_a_one_line_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be created"):
        Table(tmp_path / place).check_same_run("image", {})


def test_plans_and_hidden_folders_are_not_data(tmp_path: Path) -> None:
    for name in ("a.parquet", "_plan/b.parquet", ".hidden/c.parquet", "below/d.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_parquet(tmp_path / name, rows(1))
    found = parquet_files(str(tmp_path))
    assert [str(f.relative_to(tmp_path)) for f in found] == ["a.parquet", "below/d.parquet"]


def test_damaged_parquet_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("not Parquet at all")
    with pytest.raises(DataError, match=r"text\.parquet"):
        read_schema(tmp_path / "text.parquet")
    write_parquet(tmp_path / "torn.parquet", rows(1000))
    content = bytearray((tmp_path / "torn.parquet").read_bytes())
    content[4:200] = b"\xff" * 196  # the pages, not the footer
    (tmp_path / "torn.parquet").write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"torn\.parquet"):
        list(read_rows([tmp_path / "torn.parquet"], ["key"]))
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    write_parquet(tmp_path / "twice.parquet", twice)
    with pytest.raises(DataError, match="several columns named 'a'"):
        read_schema(tmp_path / "twice.parquet")
