"""The scale benchmark's fake tables and empty chunks."""

from pathlib import Path

from benchmarks.scale.driver import look, pass_chunks, write_commits


def test_a_fake_table_lacks_its_last_chunk(tmp_path: Path) -> None:
    table = write_commits(tmp_path / "t", 30)
    assert table.pending() == [30]
    assert set(look(table.folder)) == {"pending_seconds", "counts_seconds"}


def test_empty_chunks_pass_through_the_jobs_runner() -> None:
    passed = pass_chunks(8, "in-process")
    assert passed["chunks_per_second"] == 8 / passed["seconds"]
