import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.images.plans import make_plan
from pipelines.images.random_access import RowIndex, RowReader, in_holdout
from pipelines.images.rows import PAIR_ROW
from pipelines.training.config import TrainConfig
from pipelines.training.data import Batch, GlobalOrder, StepReader, keys_digest
from pipelines.training.reading import ReaderActors, ReaderThreads
from vlv_model.errors import DataError
from vlv_model.squares import Square

SIZE = 8


def picture(key: int) -> bytes:
    """An image all of whose pixels have the value of the key."""
    buffer = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (key % 256, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(folder: Path, keys: list[int], files: int = 3, group: int = 4) -> list[Path]:
    """Keys spread over files; every tenth row has failed."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(files):
        rows = [
            {
                "key": key,
                "image": {"bytes": picture(key), "path": None} if key % 10 else None,
                "status": "ok" if key % 10 else "download:timeout",
                "caption": f"caption {key}",
            }
            for key in keys[number::files]
        ]
        paths.append(folder / f"part-{number}.parquet")
        pq.write_table(pa.Table.from_pylist(rows, schema=PAIR_ROW), paths[-1], row_group_size=group)
    return paths


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    keys = [int(k) for k in np.random.default_rng(0).permutation(60)]
    return write_table(tmp_path_factory.mktemp("table"), keys)


def test_failed_rows_are_not_trained_on(files: list[Path]) -> None:
    index = RowIndex.open(files, ["caption"])
    assert index.keys.tolist() == [k for k in range(60) if k % 10]


def test_each_position_reads_its_own_row(files: list[Path]) -> None:
    index = RowIndex.open(files, ["caption"])
    reader = RowReader(index, ["caption"])
    for position, key in enumerate(index.keys.tolist()):
        assert reader.row(position)["caption"] == f"caption {key}"
        assert reader.square(position, Square(SIZE))[0, 0, 0].item() == key


def cut_footer(file: Path) -> None:
    """Overwrite the footer, so that the file cannot be opened; row groups stay in place."""
    with open(file, "r+b") as stream:
        stream.seek(-8, io.SEEK_END)
        stream.write(b"\0" * 8)


def test_a_footer_is_read_once(tmp_path: Path) -> None:
    (file,) = write_table(tmp_path, list(range(1, 10)), files=1)
    index = RowIndex.open([file])
    reader = RowReader(index)
    reader.row(0)
    cut_footer(file)
    assert reader.square(8, Square(SIZE))[0, 0, 0].item() == 9  # of another row group
    with pytest.raises(DataError, match="not a readable Parquet file"):
        RowReader(index).row(8)


def test_least_recently_used_footers_are_evicted(tmp_path: Path) -> None:
    paths = write_table(tmp_path, [1, 2, 3, 4], files=2)  # 1 and 3, 2 and 4
    reader = RowReader(RowIndex.open(paths), cache_bytes=1, footer_bytes=1)
    for position in (0, 1):
        reader.row(position)
    for path in paths:
        cut_footer(path)
    assert reader.square(3, Square(SIZE))[0, 0, 0].item() == 4
    with pytest.raises(DataError, match=r"part-0\.parquet is not a readable"):
        reader.row(2)


def test_a_file_rewritten_after_its_footer_was_read_is_detected(tmp_path: Path) -> None:
    write_table(tmp_path, list(range(1, 30)), files=1)
    reader = RowReader(RowIndex.open([tmp_path / "part-0.parquet"]))
    reader.row(0)
    write_table(tmp_path, list(range(31, 50)), files=1, group=3)
    with pytest.raises(DataError, match="was changed while it was in use"):
        reader.row(9)


def test_threads_read_concurrently(files: list[Path]) -> None:
    index = RowIndex.open(files)
    # So that all of it is in motion.
    reader = RowReader(index, cache_bytes=2000, footer_bytes=2000)
    positions = np.random.default_rng(0).integers(len(index), size=400).tolist()
    with ThreadPoolExecutor(8) as threads:
        squares = list(threads.map(lambda p: reader.square(p, Square(SIZE)), positions))
    assert [int(s[0, 0, 0]) for s in squares] == [index.keys[p] for p in positions]


def test_order_does_not_depend_on_the_files(tmp_path: Path, files: list[Path]) -> None:
    other = write_table(tmp_path, list(range(60)), files=1, group=60)
    assert RowIndex.open(files, []).digest() == RowIndex.open(other, []).digest()
    assert (RowIndex.open(files, []).keys == RowIndex.open(other, []).keys).all()


def test_a_repeated_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="key 7 occurs more than once"):
        RowIndex.open(write_table(tmp_path, [7, 8, 7]), [])


def test_missing_column_and_no_usable_row_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'wish'"):
        RowIndex.open(write_table(tmp_path / "a", [1]), ["wish"])
    with pytest.raises(DataError, match="no row of status 'ok'"):
        RowIndex.open(write_table(tmp_path / "b", [10, 20]), [])


@pytest.mark.parametrize(
    ("column", "line"),
    [
        (pa.array([1.5, 2.0]), "column 'key' is double"),
        (pa.array(["1", "2"]), "column 'key' is string"),
        (pa.array([1, None]), "1 rows have no key"),
    ],
)
def test_keys_have_to_be_integers(tmp_path: Path, column: pa.Array, line: str) -> None:
    table = pa.table({"key": column, "image": [b"", b""]})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=line):
        RowIndex.open([tmp_path / "t.parquet"])


def test_rows_without_text_are_skipped(tmp_path: Path) -> None:
    texts = ["a cat", "", None, "  ", "a dog"]
    table = pa.table({"key": range(5), "image": [b""] * 5, "caption": texts})
    pq.write_table(table, tmp_path / "t.parquet")
    assert RowIndex.open([tmp_path / "t.parquet"], ["caption"]).keys.tolist() == [0, 4]
    pq.write_table(table.append_column("n", pa.array(range(5))), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="column 'n' is int64, expected text"):
        RowIndex.open([tmp_path / "t.parquet"], ["n"])


def test_a_table_that_changes_while_being_read_is_detected(tmp_path: Path) -> None:
    paths = write_table(tmp_path, [1, 2, 3, 4], files=1)
    index = RowIndex.open(paths)
    layout = make_plan(paths, np.isfinite).layout
    write_table(tmp_path, [4, 3, 2, 1], files=1)
    assert RowIndex.open(paths).digest() == index.digest()  # the same keys
    assert make_plan(paths, np.isfinite).layout != layout  # elsewhere
    with pytest.raises(DataError, match="was changed while it was in use"):
        RowReader(index).row(0)


def test_error_names_the_key_of_a_damaged_image(tmp_path: Path) -> None:
    rows = [{"key": 5, "image": {"bytes": b"not an image", "path": None}, "status": "ok"}]
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIR_ROW), tmp_path / "p.parquet")
    reader = RowReader(RowIndex.open([tmp_path / "p.parquet"], []))
    with pytest.raises(DataError, match="key 5"):
        reader.square(0, Square(SIZE))


def test_original_files_are_decoded_correctly(tmp_path: Path) -> None:
    """Images of `image.reencode=never`: rotated, transparent, 16-bit and animated ones."""
    exif = Image.Exif()
    exif[0x0112] = 3
    left_red = Image.new("RGB", (40, 40), "blue")
    left_red.paste((255, 0, 0), (0, 0, 20, 40))
    deep = Image.fromarray(np.full((40, 40), 0x8000, np.uint16))
    moving = {"save_all": True, "append_images": [Image.new("RGB", (40, 40))]}
    kept = [
        (left_red, "PNG", {"exif": exif}, (0, 0, 255)),
        (Image.new("RGBA", (40, 40)), "PNG", {}, (255, 255, 255)),
        (deep, "PNG", {}, (128, 128, 128)),
        (left_red, "GIF", moving, (255, 0, 0)),
    ]
    rows = []
    for key, (image, kind, options, _) in enumerate(kept):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        rows.append({"key": key, "image": {"bytes": buffer.getvalue()}, "status": "ok"})
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIR_ROW), tmp_path / "p.parquet")
    reader = RowReader(RowIndex.open([tmp_path / "p.parquet"], []))
    for key, (*_, colour) in enumerate(kept):
        assert tuple(reader.square(key, Square(SIZE))[:, 0, 0].tolist()) == colour


@settings(max_examples=50)
@given(rows=st.integers(1, 50), batch=st.integers(1, 70), seed=st.integers(0, 2**40))
def test_every_row_is_used_once_per_epoch(rows: int, batch: int, seed: int) -> None:
    order = GlobalOrder(rows, seed)
    steps = [order.take(step * batch, batch) for step in range(3 * rows // batch + 2)]
    walked = [row for step in steps for row in step]
    assert all(len(step) == batch for step in steps)  # no batch is short
    for epoch in range(len(walked) // rows):
        used = walked[epoch * rows : (epoch + 1) * rows]
        assert sorted(row for _, row in used) == list(range(rows))
        assert {e for e, _ in used} == {epoch}


def test_any_step_can_be_read_without_earlier_steps() -> None:
    one, other = GlobalOrder(37, 5), GlobalOrder(37, 5)
    walked = [one.take(step * 8, 8) for step in range(40)]
    assert other.take(33 * 8, 8) == walked[33]
    assert GlobalOrder(37, 6).take(33 * 8, 8) != walked[33]
    assert one.permutation(0).tolist() != one.permutation(1).tolist()


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_micro_batches_do_not_depend_on_the_number_of_workers(
    files: list[Path], workers: int
) -> None:
    index = RowIndex.open(files, [])
    order = GlobalOrder(len(index), 0)
    train = TrainConfig(steps=9, global_batch_size=16, micro_batch_size=2)

    reading = ReaderThreads(RowReader(index), Square(SIZE), threads=3)

    def begin(rows: list[tuple[int, int]]) -> Callable[[], list[int]]:
        finish = reading.begin(rows)
        return lambda: finish().keys

    expected = [[int(index.keys[row]) for _, row in order.take(step * 16, 16)] for step in range(9)]
    ranks = [list(StepReader(order, begin, train, r, workers).steps(4)) for r in range(workers)]
    for number, step in enumerate(range(4, 9)):
        assert all(steps[number][0] == step for steps in ranks)
        numbered = dict(micro for steps in ranks for micro in steps[number][1])
        assert sorted(numbered) == list(range(8))
        for i, keys in numbered.items():  # the same micro-batches, however they are dealt out
            assert keys == expected[step][2 * i : 2 * i + 2]
        assert all(len(s[number][1]) <= train.accumulation(workers) for s in ranks)


def test_a_read_error_reaches_the_loop() -> None:
    def begin(rows: object) -> Callable[[], None]:
        def finish() -> None:
            raise DataError("disk gone")

        return finish

    train = TrainConfig(steps=3, global_batch_size=2)
    with pytest.raises(DataError, match="disk gone"):
        list(StepReader(GlobalOrder(5, 0), begin, train, 0, 1).steps(0))


def test_the_next_steps_are_prefetched() -> None:
    begun: list[int] = []

    def begin(rows: list[tuple[int, int]]) -> Callable[[], None]:
        begun.append(len(begun))
        return lambda: None

    train = TrainConfig(steps=5, global_batch_size=1)
    seen = [len(begun) for _ in StepReader(GlobalOrder(5, 0), begin, train, 0, 1).steps(0)]
    assert seen == [3, 4, 5, 5, 5]


@pytest.mark.end_to_end
def test_actors_give_the_batches_and_errors_of_threads(
    ray_local: None, files: list[Path], tmp_path: Path
) -> None:
    index = RowIndex.open(files, ["caption"])
    rows = [(0, 5), (1, 3), (1, 40), (2, 0), (2, 7)]
    expected = Batch.read(RowReader(index), rows, Square(SIZE))
    for reading in (
        ReaderThreads(RowReader(index), Square(SIZE), threads=2),
        ReaderActors(index, Square(SIZE), actors=2),
    ):
        one, other = reading.begin(rows), reading.begin(rows[1:2])
        assert other().keys == expected.keys[1:2]
        found = one()
        assert (found.keys, found.epochs) == (expected.keys, expected.epochs)
        assert torch.equal(found.pixel_values, expected.pixel_values)
        reading.close()
    damaged = [{"key": 5, "image": {"bytes": b"not an image", "path": None}, "status": "ok"}]
    pq.write_table(pa.Table.from_pylist(damaged, schema=PAIR_ROW), tmp_path / "p.parquet")
    reading = ReaderActors(RowIndex.open([tmp_path / "p.parquet"]), Square(SIZE), actors=1)
    with pytest.raises(DataError, match=r"^the image of key 5 cannot be decoded"):
        reading.begin([(0, 0)])()
    reading.close()


def test_holdout_is_a_stable_share() -> None:
    keys = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, 20_000)
    small, large = in_holdout(keys, 0.1), in_holdout(keys, 0.3)
    assert abs(small.mean() - 0.1) < 0.01
    assert abs(large.mean() - 0.3) < 0.01
    assert (small <= large).all()  # a larger share holds the smaller one
    shuffled = np.random.default_rng(2).permutation(len(keys))
    assert (in_holdout(keys[shuffled], 0.1) == small[shuffled]).all()


@given(keys=st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, max_size=20), data=st.data())
def test_keys_digest_depends_on_the_keys_and_not_their_order(
    keys: list[int], data: st.DataObject
) -> None:
    whole = keys_digest(keys)
    shuffled = data.draw(st.permutations(keys))
    cut = data.draw(st.integers(0, len(keys)))
    assert (keys_digest(shuffled[:cut]) + keys_digest(shuffled[cut:])) % 2**64 == whole
    if keys:
        assert keys_digest(keys[1:]) != whole
        assert keys_digest([*keys, keys[0]]) != whole
