"""Captions find their images by key, URL and name, in any order, and what is left over is counted."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.admin.takedown import TakedownConfig, take_down
from pipelines.cli.config import build, load
from pipelines.images.listing import list_images
from pipelines.images.random_access import RowIndex
from pipelines.images.rows import IMAGE_ROW, key_of, url_key
from pipelines.storage.sorting import ExternalSort
from pipelines.storage.tables import Table, parquet_files
from pipelines.training.caption_index import FOLDER, CaptionIndex, write_index
from pipelines.training.caption_join import ImageJoin
from pipelines.training.captions import MAX_LENGTH, CaptionSource, usable
from pipelines.training.config import Stage2Config
from pipelines.training.run_captions import captions_of_run
from vlv_model.errors import ConfigError, DataError, RunError

NOTHING = {"ambiguous_names": 0, "captions_without_image": 0, "blank_captions": 0}


def url(i: int) -> str:
    return f"http://h.org/{i}.png"


def image_rows(numbers: list[int], failed: tuple[int, ...] = ()) -> pa.Table:
    rows = [
        {
            "key": url_key(url(i)),
            "url": url(i),
            "image": None if i in failed else {"bytes": b"image %d" % i, "path": None},
            "status": "download:timeout" if i in failed else "ok",
        }
        for i in numbers
    ]
    return pa.Table.from_pylist(rows, schema=IMAGE_ROW)


def image_table(folder: Path, count: int, failed: tuple[int, ...] = (), chunk: int = 8) -> str:
    """A table as ingest writes it: sorted by key, in committed parts."""
    rows = image_rows(list(range(count)), failed).sort_by("key")
    table = Table(folder)
    chunks = -(-count // chunk)
    table.create("image", {}, chunks)
    for i in range(chunks):
        table.write(i, rows.slice(i * chunk, chunk))
    return str(folder)


def named_table(file: Path, names: list[str]) -> str:
    """Images with names, as a listing of a folder has them."""
    rows = [{"key": key_of(name), "name": name, "image": {"bytes": b"x"}} for name in names]
    pq.write_table(pa.Table.from_pylist(rows), file)
    return str(file)


def captions_file(tmp_path: Path, rows: list[dict[str, Any]], name: str = "teacher.parquet") -> str:
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    return str(tmp_path / name)


def join(images: str, captions: Any, run_dir: Path, **data: Any) -> CaptionIndex:
    given = {"input": images, "captions": captions, **data}
    config = build(Stage2Config, {"data": given, "run_dir": str(run_dir)})
    files = parquet_files(images)
    return captions_of_run(config, files, RowIndex.open(files)).index


def captions_by_key(index: CaptionIndex) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for position, key in enumerate(index.keys.tolist()):
        found.setdefault(key, []).append(index._text(position))
    return {key: texts for key, texts in found.items() if index.has(np.array([key])).all()}


def by_url(texts: dict[int, str]) -> dict[int, list[str]]:
    return {url_key(url(i)): [text] for i, text in texts.items()}


@pytest.mark.parametrize("join_on", ["url", "key", "name"])
def test_captions_are_joined_and_counted(
    tmp_path: Path, join_on: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    images = image_table(tmp_path / "images", 30, failed=(3, 4))
    texts = {i: f"caption {i}" for i in (*range(20), 77, 78, 79)}
    rows = [
        {"caption": text, "url": url(i), "key": url_key(url(i)), "name": f"{i}.png"}
        for i, text in texts.items()
    ]
    rows += [{**rows[0], "caption": "a second one"}]
    rows += [{**rows[21], "caption": None} for i in (21, 22)]
    rows += [{**rows[21], "caption": " \n"}]
    index = join(images, captions_file(tmp_path, rows), tmp_path / "run", join_on=join_on)
    assert index.about()["counts"] == {
        **NOTHING,
        "captions": 19,
        "images": 18,
        "images_with_several_captions": 1,
        "images_without_caption": 10,
        "captions_without_image": 5,  # 77, 78, 79 and those of the two images that failed
        "blank_captions": 3,
    }
    expected = by_url({i: text for i, text in texts.items() if i < 20 and i not in (3, 4)})
    expected[url_key(url(0))].append("a second one")
    assert captions_by_key(index) == expected
    shown = capsys.readouterr().err
    assert "19 captions of 18 images (1 have several); 10 images without a caption; " in shown
    assert "5 captions without an image; 3 blank captions" in shown
    # Opened again, not joined again.
    (tmp_path / "run/captions/texts.utf8").chmod(0o444)
    assert (
        captions_by_key(join(images, captions_file(tmp_path, rows), tmp_path / "run")) == expected
    )


def test_urls_are_joined_in_any_spelling_of_column_and_host(tmp_path: Path) -> None:
    images = image_table(tmp_path / "images", 2)
    rows = [{"URL": "HTTP://H.org:80/1.png#x", "TEXT": "web", "answer": "one"}]
    teacher = captions_file(tmp_path, rows)
    index = join(images, teacher, tmp_path / "run", caption_column="answer")
    assert captions_by_key(index) == by_url({1: "one"})


def test_urls_are_joined_as_they_are_sent(tmp_path: Path) -> None:
    listed = ["http://h.org/a b.png", "http://bücher.example/%7ex.png"]
    rows = [{"key": i, "url": url, "image": {"bytes": b"x"}} for i, url in enumerate(listed)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mine.parquet")
    spelled = ["http://h.org/a%20b.png", "http://xn--bcher-kva.example/~x.png"]
    teacher = captions_file(tmp_path, [{"url": u, "caption": u} for u in spelled])
    index = join(str(tmp_path / "mine.parquet"), teacher, tmp_path / "run")
    assert captions_by_key(index) == {i: [u] for i, u in enumerate(spelled)}


def test_captions_are_read_from_text_files_and_joined_by_what_they_have(tmp_path: Path) -> None:
    images = image_table(tmp_path / "images", 3)
    texts = {
        "by_url.csv": f'URL,caption\n{url(0)},"one, two"\n{url(1)},three\n',
        "by_key.csv": f'key,caption\n{url_key(url(0))},"one, two"\n{url_key(url(1))},three\n',
        "by_name.csv": 'file_name,caption\n0.png,"one, two"\n./1.png,three\n',
        "by_url.jsonl": f'{{"url": "{url(0)}", "caption": "one, two"}}\n'
        f'{{"url": "{url(1)}", "caption": "three"}}\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        index = join(images, str(tmp_path / name), tmp_path / f"{name}.run")
        assert captions_by_key(index) == by_url({0: "one, two", 1: "three"}), name
    teacher = captions_file(tmp_path, [{"url": url(2), "caption": "c", "key": "00012"}])
    assert captions_by_key(join(images, teacher, tmp_path / "run")) == by_url({2: "c"})


def test_a_name_is_a_path_or_a_last_part_that_one_image_has(tmp_path: Path) -> None:
    names = ["a/1.png", "b/1.png", "2.png", "b/3.png"]
    images = named_table(tmp_path / "images.parquet", names)
    spelled = ["b/1.png", "/my/disk/2.png", "3.png", "1.png", "9.png"]
    teacher = captions_file(tmp_path, [{"name": n, "caption": n} for n in spelled])
    index = join(images, teacher, tmp_path / "run")
    expected = {"b/1.png": "b/1.png", "2.png": "/my/disk/2.png", "b/3.png": "3.png"}
    assert captions_by_key(index) == {key_of(n): [text] for n, text in expected.items()}
    counts = index.about()["counts"]
    assert (counts["ambiguous_names"], counts["captions_without_image"]) == (1, 1)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_list_of_texts_is_several_captions(tmp_path: Path, kind: str) -> None:
    images = image_table(tmp_path / "images", 3)
    (tmp_path / "c.jsonl").write_text(
        f'{{"url": "{url(0)}", "caption": ["one", "[two]", ""]}}\n'
        f'{{"url": "{url(1)}", "caption": "[three"}}\n'
    )
    rows = [
        {"url": url(0), "caption": ["one", "[two]", ""]},
        {"url": url(1), "caption": ["[three"]},
    ]
    captions_file(tmp_path, rows, "c.parquet")
    index = join(images, str(tmp_path / f"c.{kind}"), tmp_path / "run")
    expected = {url_key(url(0)): ["one", "[two]"], url_key(url(1)): ["[three"]}
    assert captions_by_key(index) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,caption\n1,c\n", "data.captions: .* neither a column `key` .* has id, caption"),
        ("key,caption\nabc,c\n", "column 'key' has other values .* data.join_on=url"),
        ("url,words\nhttp://h/1,c\n", "data.caption_column=caption.* no column 'caption'"),
        ("url,caption\nhttp://h/1,c\n", "none of the 1 captions of .* by url \\(data.join_on\\)"),
    ],
)
def test_captions_that_cannot_be_joined_name_the_setting(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "captions.csv").write_text(text)
    images = image_table(tmp_path / "images", 1)
    for _ in range(2):  # a failed join leaves nothing that the next one takes for its own
        with pytest.raises(DataError, match=message) as error:
            join(images, str(tmp_path / "captions.csv"), tmp_path / "run")
        assert "\n" not in str(error.value)


def chunked(*values: Any, kind: pa.DataType | None = None) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, kind)])


@pytest.mark.parametrize(
    ("join_on", "column", "values", "message"),
    [
        ("key", "key", chunked("abc"), "column 'key' is string, expected the int64 keys"),
        ("key", "key", chunked(7.0), "column 'key' is double, expected the int64 keys"),
        ("key", "key", chunked(2**63, kind=pa.uint64()), "column 'key' is uint64 .* beyond int64"),
        ("url", "url", chunked(5), "column 'url' is int64, expected text"),
        ("url", "url", chunked(b"http://\xff/"), "column 'url' has values that are not UTF-8"),
        ("url", "caption", chunked([7]), "column 'caption' is int64, expected text"),
        ("url", "caption", chunked({"a": "b"}), "column 'caption' is struct.*, expected text"),
        ("url", "caption", chunked(b"\xff"), "column 'caption' has values that are not UTF-8"),
    ],
)
def test_columns_of_another_type_give_a_one_line_error(
    tmp_path: Path, join_on: Any, column: str, values: pa.ChunkedArray, message: str
) -> None:
    images = image_table(tmp_path / "images", 3)
    rows = pa.table({"key": [url_key(url(0))], "url": [url(0)], "caption": ["x"]})
    rows = rows.set_column(rows.column_names.index(column), column, values)
    pq.write_table(rows, tmp_path / "teacher.parquet")
    with pytest.raises(DataError, match=rf"teacher\.parquet: {message}"):
        join(images, str(tmp_path / "teacher.parquet"), tmp_path / "run", join_on=join_on)
    if column != "url":
        return
    mine = image_rows([0])
    mine = mine.set_column(mine.schema.get_field_index(column), column, values)
    pq.write_table(mine, tmp_path / "mine.parquet")
    sound = captions_file(tmp_path, [{"url": url(0), "caption": "x"}], "sound.parquet")
    with pytest.raises(DataError, match=rf"mine\.parquet: {message}"):
        join(str(tmp_path / "mine.parquet"), sound, tmp_path / "run", join_on=join_on)


def test_many_buckets_give_what_one_gives(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(400).tolist()
    pq.write_table(image_rows(order), tmp_path / "mine.parquet", row_group_size=64)
    rows = [{"url": url(i), "caption": f"c{i}"} for i in [*order, 7, 1000]]
    source = CaptionSource.find(captions_file(tmp_path, rows), "caption", None)
    files = [tmp_path / "mine.parquet"]
    joined = ImageJoin("url", files, RowIndex.open(files).keys)
    small = partial(ExternalSort, bucket_bytes=256, buffer_rows=50)
    indices = [
        write_index(tmp_path / str(n), [(joined, source.batches)], 9000, Counter, sorting)
        for n, sorting in enumerate((small, ExternalSort))
    ]
    expected = by_url({i: f"c{i}" for i in range(400)})
    expected[url_key(url(7))] *= 2
    for index in indices:
        assert captions_by_key(index) == expected
        assert index.about()["captions_without_image"] == 1
    assert indices[0].has(np.array([url_key(url(i)) for i in (3, 1000)])).tolist() == [True, False]


TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["🎉 👩‍👩‍👧", "قطة على السجادة \u200f", "one\r\ntwo\rthree\tfour", "\x00\x07", "x" * 70_000,
                     "é" * 10_000, "\u2028", "\ufeffmark", "\x9f\x7f"]),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=20))
def test_texts_are_kept_but_for_control_characters_and_length(texts: list[str]) -> None:
    texts = [text for text in texts if text == text.encode("utf-8", "ignore").decode()]
    rows = pa.table({"value": pa.array(range(len(texts))), "caption": pa.array(texts, pa.string())})
    counts: Counter[str] = Counter()
    found = usable(rows, counts)

    def cleaned(text: str) -> str:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        control = [*map(chr, range(32)), *map(chr, range(127, 160))]
        return "".join(c for c in text if c in "\n\t" or c not in control)[:MAX_LENGTH]

    expected = {i: cleaned(text) for i, text in enumerate(texts)}
    kept = dict(zip(found["value"].to_pylist(), found["caption"].to_pylist(), strict=True))
    assert kept == {i: expected[i] for i in kept}
    assert all(not text.strip() for i, text in expected.items() if i not in kept)
    assert counts["blank_captions"] == len(texts) - len(kept)
    assert counts["captions_cut"] == sum(len(text) > MAX_LENGTH for text in texts)


def test_texts_lie_in_the_index_as_they_are(tmp_path: Path) -> None:
    texts = ["🎉\n\n👩‍👩‍👧", "قطة \u200fعلى", "x" * 10_000, "nul\x00nul", "end "]
    images = image_table(tmp_path / "images", len(texts))
    rows = [{"url": url(i), "caption": text} for i, text in enumerate(texts)]
    index = join(images, captions_file(tmp_path, rows), tmp_path / "run")
    kept = [text.replace("\x00", "") for text in texts]
    assert index.first([url_key(url(i)) for i in range(len(texts))]) == kept
    assert index.about()["counts"]["captions_cleaned"] == 1


# ------------------------------------------------------------------------------- several captions


def several(tmp_path: Path, count: int = 200) -> tuple[CaptionIndex, list[int]]:
    """Images with four captions of one source and one of another; the last with the other only."""
    images = image_table(tmp_path / "images", count, chunk=100)
    people = [{"url": url(i), "text": f"p{i}.{n}"} for n in range(4) for i in range(count - 1)]
    model = [{"url": url(i), "caption": f"m{i}"} for i in range(count)]
    paths = [captions_file(tmp_path, people, "p.parquet"), captions_file(tmp_path, model)]
    index = join(images, paths, tmp_path / "run", caption_column=["text", "caption"])
    return index, [url_key(url(i)) for i in range(count)]


def test_one_caption_is_drawn_by_seed_epoch_and_key(tmp_path: Path) -> None:
    index, keys = several(tmp_path)
    epochs = [epoch for epoch in range(50) for _ in keys]
    drawn = index.draw(keys * 50, epochs, 7, (1.0, 1.0))
    shares = Counter(text.rpartition(".")[2] if text[0] == "p" else "m" for text in drawn)
    # Of 9,950 draws with both sources: half of the other one, an eighth of each of the four.
    expected = {"m": 50 + 4975, **dict.fromkeys("0123", 1243.75)}
    for name, n in expected.items():
        assert shares[name] == pytest.approx(n, abs=6 * n**0.5)
    # In any order, alone or in a batch, and from another process's mapping.
    again = CaptionIndex.open(index.folder)
    for i in (0, 1, 777, 9_999, -1):
        assert again.draw([(keys * 50)[i]], [epochs[i]], 7, (1.0, 1.0)) == [drawn[i]]
    assert index.draw(keys * 50, epochs, 8, (1.0, 1.0)) != drawn
    assert index.draw([keys[-1]] * 50, range(50), 7, (9.0, 1.0)) == ["m199"] * 50
    # Weights count by source, not by caption.
    weighted = index.draw(keys * 50, epochs, 7, (3.0, 1.0))
    assert sum(text[0] == "m" for text in weighted) == pytest.approx(50 + 2487, abs=260)
    assert index.first(keys)[:2] == ["p0.0", "p1.0"]
    assert index.draw(keys[:2], [-1, -1], 7, (1.0, 9.0)) == ["p0.0", "p1.0"]


def test_the_draw_is_what_earlier_runs_drew(tmp_path: Path) -> None:
    """A run that continues draws what it would have drawn: these values must not change."""
    index, keys = several(tmp_path)
    drawn = index.draw(keys[:4] * 2, [0] * 4 + [1] * 4, 42, (2.0, 1.0))
    assert " ".join(drawn) == "p0.2 p1.1 p2.1 m3 p0.2 p1.3 p2.2 p3.2"


def test_settings_of_several_sources() -> None:
    def data(*given: str) -> Any:
        required = ["data.input=/i", "run_dir=/r"]
        return load(Stage2Config, None, [*required, *given]).data

    assert data("data.captions=/a").captions == ("/a",)
    assert data("data.captions=/a,/b").captions == ("/a", "/b")
    assert data().weights == (1.0,)
    both = data("data.captions=/a,/b", "data.caption_weights=1,3", "data.caption_column=x,y")
    assert both.weights == (1.0, 3.0)
    assert [both.column_of(i) for i in (0, 1)] == ["x", "y"]
    for wrong, message in {
        "data.caption_weights=1,2": "a positive number for each of the 1 paths",
        "data.caption_column=x,y": "2 names for 1 paths",
    }.items():
        with pytest.raises(ConfigError, match=message):
            data("data.captions=/a", wrong)
    with pytest.raises(ConfigError, match="a positive number for each of the 2"):
        data("data.captions=/a,/b", "data.caption_weights=1,0")


# ------------------------------------------------------------------------------- later changes


def test_captions_in_files_of_the_same_name_are_distinguished(tmp_path: Path) -> None:
    images = image_table(tmp_path / "images", 3)
    for i in (0, 1):
        (tmp_path / f"teacher/{i}").mkdir(parents=True)
        captions_file(tmp_path / f"teacher/{i}", [{"url": url(i), "caption": f"c{i}"}])
    config = build(Stage2Config, {
        "data": {"input": images, "captions": str(tmp_path / "teacher")}, "run_dir": str(tmp_path / "run"),
    })  # fmt: skip
    files = parquet_files(images)
    before = captions_of_run(config, files, RowIndex.open(files)).identity
    captions_file(tmp_path / "teacher/0", [{"url": url(0), "caption": "x0"}])  # of one size
    assert captions_of_run(config, files, RowIndex.open(files)).identity != before


def test_captions_of_a_row_that_was_taken_down_are_erased(tmp_path: Path) -> None:
    images = image_table(tmp_path / "images", 12)
    secret = "the secret"
    texts = {i: secret if i in (3, 5) else f"c{i}" for i in range(12)}
    teacher = Table(tmp_path / "captions")
    teacher.create("caption", {}, 1)
    rows = [{"key": url_key(url(i)), "caption": t, "status": "ok"} for i, t in texts.items()]
    teacher.write(0, pa.Table.from_pylist(rows))
    config = build(Stage2Config, {
        "data": {"input": images, "captions": str(teacher.folder)}, "run_dir": str(tmp_path / "run"),
    })  # fmt: skip

    def run() -> Any:
        files = parquet_files(images)
        return captions_of_run(config, files, RowIndex.open(files))

    before = run().identity
    # One from the images alone, another from both.
    take_down(build(TakedownConfig, {"table": images, "urls": [url(3)]}))
    take_down(build(TakedownConfig, {"table": images, "keys": [url_key(url(5))], "derived": [str(teacher.folder)]}))  # fmt: skip
    for _ in range(2):
        after = run()
        assert after.identity == before
        left = {i: text for i, text in texts.items() if i not in (3, 5)}
        assert captions_by_key(after.index) == by_url(left)
        assert secret.encode() not in (tmp_path / "run" / FOLDER / "texts.utf8").read_bytes()
    # Lost, and not by a takedown.
    teacher.write(0, pq.read_table(teacher.part(0)).slice(1))
    with pytest.raises(RunError, match=r"captions of 1 images that .* lacks now"):
        run()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    images = image_table(tmp_path / "images", 1)
    teacher = captions_file(tmp_path, [{"url": url(0), "caption": "c"}])
    with pytest.raises(RunError, match="is not empty and holds no run"):
        join(images, teacher, tmp_path)
    assert not (tmp_path / "captions").exists()


# ------------------------------------------------------------------------------- published formats


def test_captions_by_file_name_and_annotations_of_coco(tmp_path: Path) -> None:
    names = [f"{i:012}.jpg" for i in range(40)]
    images = named_table(tmp_path / "images.parquet", [f"val/{name}" for name in names])
    by_name: dict[str, Any] = {name: f"one of {name}" for name in names}
    by_name[names[3]] = ["first", "second"]
    # The ids are not in order, and an annotation names an image that is not there.
    coco_images = [{"id": 7 * i % 40, "file_name": name} for i, name in enumerate(names)]
    annotations = [
        {"image_id": image["id"], "id": 5 * i + n, "caption": f"c{n} of {image['file_name']}"}
        for n in range(5)
        for i, image in enumerate(coco_images)
    ] + [{"image_id": 99, "id": 999, "caption": "of none"}]
    (tmp_path / "map.json").write_text(json.dumps(by_name))
    coco = {"info": {"year": 2017}, "images": coco_images, "annotations": annotations}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    (tmp_path / "other.json").write_text(json.dumps(dict(reversed(coco.items()))))

    def expected(*texts: str) -> dict[int, list[str]]:
        return {key_of(f"val/{n}"): [text.format(n) for text in texts] for n in names}

    found = captions_by_key(join(images, str(tmp_path / "map.json"), tmp_path / "map"))
    assert found == expected("one of {}") | {key_of(f"val/{names[3]}"): ["first", "second"]}
    for file in ("coco", "other"):
        index = join(images, str(tmp_path / f"{file}.json"), tmp_path / file)
        assert captions_by_key(index) == expected(*(f"c{n} of {{}}" for n in range(5)))
        assert index.about()["counts"]["blank_captions"] == 1  # it names no image


def test_an_object_that_is_no_list_of_captions(tmp_path: Path) -> None:
    images = named_table(tmp_path / "images.parquet", ["a.jpg"])
    many: dict[str, Any] = {f"{i}.jpg": "x" for i in range(30)}
    for text, message in {
        '{"a.jpg": "x", "b.jpg": 7}': "an object with the keys 'a.jpg', 'b.jpg': expected",
        json.dumps({**many, "z.jpg": {}}): "the value of 'z.jpg' is no caption",
        '{"a": "x"}': "an object with the keys 'a': expected",
        '{"a.jpg": "\\ud83d"}': "row 1 is not a JSON object",
    }.items():
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(DataError, match=message) as error:
            join(images, str(tmp_path / "c.json"), tmp_path / "run")
        assert "\n" not in str(error.value)


def sidecars() -> dict[str, str]:
    return {
        "a/1.txt": "\ufeffone\n",
        "a/1.json": '{"caption": "not this", "alt_text": "alt one"}',
        "2.json": '{"caption": ["two", "zwei"], "alt_text": "alt two"}',
        "b/3.txt": "three",
        "notes.txt": "not of an image",
    }


@pytest.mark.parametrize("kind", ["folder", "shards", "apart"])
def test_sidecars_name_their_images(tmp_path: Path, kind: str) -> None:
    names = ["a/1.jpg", "2.png", "b/3.jpeg", "b/4.jpeg"]
    files = sidecars() | ({} if kind == "apart" else dict.fromkeys(names, "an image"))
    folder = tmp_path / "captions"
    if kind == "shards":
        folder.mkdir()
        with tarfile.open(folder / "0.tar", "w") as tar:
            for name, text in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(text.encode())
                tar.addfile(member, io.BytesIO(text.encode()))
        names = [f"0.tar/{name}" for name in names]
    else:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    images = named_table(tmp_path / "images.parquet", names)
    index = join(images, str(folder), tmp_path / "run")
    expected = [["one"], ["two", "zwei"], ["three"]]
    assert captions_by_key(index) == dict(zip(map(key_of, names), expected, strict=False))
    counts = index.about()["counts"]
    assert (counts["captions_without_image"], counts["images_without_caption"]) == (1, 1)
    other = join(images, str(folder), tmp_path / "other", caption_column="alt_text")
    expected = [["alt one"], ["alt two"]]
    assert captions_by_key(other) == dict(zip(map(key_of, names), expected, strict=False))


def test_a_sidecar_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    images = named_table(tmp_path / "images.parquet", ["1.jpg"])
    folder = tmp_path / "captions"
    folder.mkdir()
    (folder / "1.jpg").touch()
    for name, content, message in [
        ("1.txt", b"\xff", "1.txt is not UTF-8"),
        ("1.json", b"{", "1.json is not JSON"),
        ("1.json", b'{"caption": "\\ud83d"}', "1.json is not JSON"),
    ]:
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            join(images, str(folder), tmp_path / "run")
        (folder / name).unlink()


@pytest.mark.parametrize("layout", ["folder", "tar", "parquet"])
def test_captions_lie_with_listed_images(tmp_path: Path, layout: str) -> None:
    folder, names = tmp_path / "in", ["1.jpg", "2.jpg", "3.jpg"]
    folder.mkdir()
    if layout == "parquet":
        rows = [{"jpg": b"x", "caption": f"c{name[0]}"} for name in names]
        for part, some in enumerate((rows[:1], rows[1:])):
            table = pa.Table.from_pylist(some)
            pq.write_table(table, folder / f"{part}.parquet", row_group_size=1)
    elif layout == "tar":
        with tarfile.open(folder / "0.tar", "w") as tar:
            for name in [n for image in names for n in (image, f"{image[0]}.txt")]:
                member = tarfile.TarInfo(name)
                member.size = 2
                tar.addfile(member, io.BytesIO(f"c{name[0]}".encode()))
    else:
        for name in names:
            (folder / name).write_bytes(b"x")
            (folder / f"{name[0]}.txt").write_text(f"c{name[0]}")
    files, _ = list_images(tmp_path / "listing", str(folder))
    config = build(Stage2Config, {"data": {"input": str(folder)}, "run_dir": str(tmp_path / "run")})
    images = RowIndex.open(files)
    index = captions_of_run(config, files, images).index
    assert sorted(index.first(images.keys.tolist())) == ["c1", "c2", "c3"]
    rows = {row["key"]: row["name"] for file in files for row in pq.read_table(file).to_pylist()}
    if layout != "parquet":
        for key in images.keys.tolist():
            assert index.first([key]) == [f"c{rows[key].rpartition('/')[2][0]}"]
