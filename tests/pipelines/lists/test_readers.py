"""Damaged and unusual metadata files are read, or refused in one line that names the file."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.lists.filters import FilterConfig
from pipelines.lists.metadata import read_batches
from vlv_model.errors import DataError

BOM = b"\xef\xbb\xbf"


def read_all(file: Path) -> list[dict[str, Any]]:
    return [row for batch in read_batches(file, {}, FilterConfig()) for row in batch.to_pylist()]


def refused(file: Path) -> str:
    with pytest.raises(DataError) as raised:
        read_all(file)
    message = str(raised.value)
    assert message.startswith(str(file))
    assert "\n" not in message
    return message


def broken_pages(file: Path) -> None:
    """Overwrite a Parquet file's first data page; the footer stays sound."""
    column = pq.read_metadata(file).row_group(0).column(0)
    data = bytearray(file.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(data)


def test_parquet_with_broken_pages(tmp_path: Path) -> None:
    file = tmp_path / "l.parquet"
    pq.write_table(pa.table({"url": [f"http://a/{i}" for i in range(100)]}), file)
    broken_pages(file)
    assert pq.read_schema(file).names == ["url"]
    assert "not a readable Parquet file" in refused(file)


def test_duplicate_column_names(tmp_path: Path) -> None:
    text = pa.array(["http://a/"])
    pq.write_table(pa.table([text, text], names=["url", "url"]), tmp_path / "l.parquet")
    assert "several columns named 'url'" in refused(tmp_path / "l.parquet")
    (tmp_path / "l.csv").write_text("url,TEXT,url\nhttp://a/,x,http://b/\n")
    assert "several columns named 'url'" in refused(tmp_path / "l.csv")
    (tmp_path / "l.csv").write_text("url,,\nhttp://a/,,\n")  # spreadsheets write this
    assert [row["url"] for row in read_all(tmp_path / "l.csv")] == ["http://a/"]


@pytest.mark.parametrize("name", ["l.csv.gz", "l.jsonl.gz"])
def test_gzip_with_a_broken_body(tmp_path: Path, name: str) -> None:
    data = bytearray(gzip.compress(b"url\n" * 5000))
    data[12:40] = b"\xff" * 28
    (tmp_path / name).write_bytes(data)
    assert "cannot be read as" in refused(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('["ab"]', "it is a list"),  # dict(["ab"]) would be {"a": "b"}
        ("[" * 100_000, "recursion"),
        ('{"url": ' + "[" * 100_000, "recursion"),
        ('{"url": "\\ud800"}', "surrogates not allowed"),
        ('{"\\ud800": 1}', "surrogates not allowed"),
        ("null", "it is a NoneType"),
    ],
)
def test_lines_that_are_not_json_objects(tmp_path: Path, line: str, why: str) -> None:
    (tmp_path / "l.jsonl").write_text('{"url": "http://a/"}\n' + line + "\n")
    message = refused(tmp_path / "l.jsonl")
    assert "line 2 is not a JSON object" in message
    assert why in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.csv", b"url\nhttp://a/\n"),
        ("l.tsv", b"url\tx\nhttp://a/\ty\n"),
        ("l.jsonl", b'{"url": "http://a/"}\n'),
    ],
)
def test_byte_order_mark_is_not_part_of_a_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(BOM + content)
    assert [row["url"] for row in read_all(tmp_path / name)] == ["http://a/"]
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(BOM + content))
    assert [row["url"] for row in read_all(tmp_path / f"{name}.gz")] == ["http://a/"]


def test_utf8_bytes_are_read_as_text(tmp_path: Path) -> None:
    file = tmp_path / "l.parquet"
    pq.write_table(pa.table({"url": ["http://a/ü".encode()]}), file)
    assert [row["url"] for row in read_all(file)] == ["http://a/ü"]
    pq.write_table(pa.table({"url": pa.array(["http://a/"]).dictionary_encode()}), file)
    assert [row["url"] for row in read_all(file)] == ["http://a/"]
    bad = pa.array([b"http://a/", b"http://\xff/"])
    for column in (bad, bad.cast(pa.string(), safe=False), bad.dictionary_encode()):
        pq.write_table(pa.table({"url": column}), file)
        assert "column 'url' has values that are not UTF-8" in refused(file)


@pytest.mark.parametrize("value", [5, 1.5, ["http://a/"], {"a": "http://a/"}, True])
def test_urls_of_another_type(tmp_path: Path, value: Any) -> None:
    pq.write_table(pa.table({"url": [value]}), tmp_path / "l.parquet")
    assert "expected text" in refused(tmp_path / "l.parquet")


@pytest.mark.parametrize("name", ["l.csv", "l.jsonl"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    assert "cannot be read as" in refused(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('url,TEXT\nhttp://a/1,"open\nhttp://a/2,x\n', "line 3 .*unexpected end of data"),
        ('url,TEXT\nhttp://a/1,"half" quoted\n', "line 2 .*',' expected after"),
        ("url,TEXT\nhttp://a/1,x\n\nhttp://a/2,hello, world\n", "line 4 .*3 values under .* 2"),
    ],
)
def test_ambiguous_csv_line_is_an_error(tmp_path: Path, content: str, why: str) -> None:
    """A wrong guess would lose rows or parts of a text."""
    (tmp_path / "l.csv").write_text(content)
    assert re.search(why, refused(tmp_path / "l.csv"))


@pytest.mark.parametrize("name", ["l.tsv", "l.TSV.gz"])
def test_quotes_in_a_tsv_are_ordinary_characters(tmp_path: Path, name: str) -> None:
    """Web captions contain unclosed quotes; in CSV, quoting stays."""
    texts = ['"Untitled, oil', "a dog", '"Best" pipe', 'a TV of 24"', '"all of it"', "it's"]
    lines = ["url\tcaption", *(f"http://a/{i}\t{text}" for i, text in enumerate(texts)), ""]
    content = "\r\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert [row["alt_text"] for row in read_all(tmp_path / name)] == texts


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("url\ta\tcaption\nhttp://a/1\tx\ta\tb\n", "line 2 .*as TSV: 4 values under .* 3"),
        ('url\ta\tcaption\nhttp://a/1\tx\t"two\nlines"\n', "line 3 .*continue a quoted text"),
        ("7\tx\thttp://a/1\n8\ty\thttp://a/2\n", "no header line .*'http://a/1'"),
    ],
)
def test_ambiguous_tsv_is_an_error(tmp_path: Path, content: str, why: str) -> None:
    (tmp_path / "l.tsv").write_text(content)
    assert re.search(why, refused(tmp_path / "l.tsv"))


@pytest.mark.parametrize("swapped", [False, True])
def test_urls_and_captions_need_no_header(tmp_path: Path, swapped: bool) -> None:
    """CC3M (captions first) and CC12M are published like this."""
    rows = [("https://a/1", 'a "dog'), ("http://a/2", "a cat")]
    order = -1 if swapped else 1
    (tmp_path / "l.tsv").write_text("".join("\t".join(row[::order]) + "\n" for row in rows))
    assert [(row["url"], row["alt_text"]) for row in read_all(tmp_path / "l.tsv")] == rows


def test_wit_texts_are_quoted_and_span_lines(tmp_path: Path) -> None:
    """Only WIT's TSV: under other column names the quotes stay, as the last assert shows."""
    names = "image_url\tcaption_reference_description\tcontext_page_description"
    texts = (
        '"a ""big"" boat"\t"one\ntwo\n\nthree, ""3"""\nhttp://a/2\t\tcut "here\nhttp://a/3\tb\t\n'
    )
    (tmp_path / "l.tsv").write_text(f"{names}\nhttp://a/1\t{texts}")
    found = [(row["url"], row["alt_text"]) for row in read_all(tmp_path / "l.tsv")]
    assert found == [("http://a/1", 'a "big" boat'), ("http://a/2", ""), ("http://a/3", "b")]
    (tmp_path / "l.tsv").write_text(f'{names}\nhttp://a/1\tx\t\nhttp://a/2\t"open\n')
    assert "line 3 cannot be read as TSV: unexpected end of data" in refused(tmp_path / "l.tsv")
    (tmp_path / "l.tsv").write_text('url\tcaption\nhttp://a/1\t"a ""big"" boat"\n')
    assert read_all(tmp_path / "l.tsv")[0]["alt_text"] == '"a ""big"" boat"'


@pytest.mark.parametrize("name", ["l.csv", "l.csv.GZ"])
def test_untidy_csv(tmp_path: Path, name: str) -> None:
    lines = ["", " URL , TEXT, WIDTH", "http://a/1, x, 600 ,,", "", "http://a/2", ""]
    content = "\r\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
    rows = [(row["url"], row["alt_text"], row["width"]) for row in read_all(tmp_path / name)]
    assert rows == [("http://a/1", " x", 600.0), ("http://a/2", None, None)]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_text_in_another_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "l.csv").write_bytes("url,TEXT\nhttp://a/,café\n".encode(encoding))
    assert "is not UTF-8: convert it to UTF-8" in refused(tmp_path / "l.csv")


def test_columns_that_appear_in_later_lines(tmp_path: Path) -> None:
    """JSONL writers leave out null values."""
    lines: list[dict[str, Any]] = [{"url": f"http://a/{i}"} for i in range(20_000)]
    lines.append({"url": "http://a/3", "TEXT": "late", "punsafe": 0.9})
    file = tmp_path / "l.jsonl"
    file.write_text("\n\n\n" + "\n".join(map(json.dumps, lines)))
    first, *_, last = read_batches(file, {}, FilterConfig())
    assert first.column_names == ["url"]  # the others appear in a later batch
    assert last.to_pylist()[-1] == {
        "url": "http://a/3",
        "alt_text": "late",
        "punsafe": pytest.approx(0.9),
    }


@pytest.mark.parametrize("head", ['{"info": {"x": [1, "]}"]}, "annotations": ', ""])
@pytest.mark.parametrize("indent", [None, 1])
def test_large_json_is_read_object_by_object(tmp_path: Path, head: str, indent: int | None) -> None:
    rows = [
        {"url": f"http://a/{i}", "caption": f'"{{[,]}} ü {"x" * (i % 300)}'} for i in range(9000)
    ]
    rows[5000]["caption"] = "long " * 400_000  # longer than one piece
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    end = ', "more": 1}\n' if head else "\n"
    (tmp_path / "l.json").write_text(head + text + end)
    assert [(row["url"], row["alt_text"]) for row in read_all(tmp_path / "l.json")] == [
        (row["url"], row["caption"]) for row in rows
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is empty: expected a list of objects, an object whose 'annotations' is one"),
        ("7", "it begins with '7': expected a list of objects"),
        (
            '{"image_urls": ["http://a/"], "captions": ["x"]}',
            "with the keys 'image_urls', 'captions': expected",
        ),
        ("{}", "it is an object with the keys nothing: expected"),
        ('{"annotations": {}}', "it is an object with the keys 'annotations': expected"),
        (
            '{"url": "http://a/"}\n{"url": "http://b/"}\n',
            "one object per line: rename it to .jsonl",
        ),
        ('[{"url": "http://a/"}', "expected ']' at character 22, found the end"),
        ('[{"url": "http://a/"} {"url": 1}]', "expected ']' at character 23, found '{'"),
        ('[{"url": "http://a/"},]', "Expecting value at character 23"),
        ('[{"url": oops}]', "Expecting value at character 10"),
        ('[{"url": "http://a/"}] []', "more text after the end of its list, at character 24"),
        ('{"annotations": [], 1: 2}', 'expected a name in "" at character 22'),
        ("[" * 100_000, "nested too deeply at character 2"),
    ],
)
def test_unsupported_json_is_a_one_line_error(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "l.json").write_text(text)
    line = refused(tmp_path / "l.json")
    assert "cannot be read as JSON: " in line
    assert why in line


@pytest.mark.parametrize(("row", "why"), [("7", "it is a int"), ("null", "it is a NoneType")])
def test_error_for_a_row_that_is_not_an_object_names_it(tmp_path: Path, row: str, why: str) -> None:
    (tmp_path / "l.json").write_text(f'[{{"url": "http://a/"}}, {row}]')
    assert f"row 2 is not a JSON object: {why}" in refused(tmp_path / "l.json")


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


json_lines = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
).map(lambda value: json.dumps({"url": value}).encode())
contents = st.binary(max_size=200) | json_lines
contents |= contents.map(lambda data: b"url,TEXT,WIDTH\n" + data)
contents |= contents.map(gzipped) | contents.map(lambda data: gzipped(data)[:-5])


@settings(deadline=None, max_examples=300)
@given(contents, st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".parquet"]), st.booleans())
def test_any_bytes_give_rows_or_a_one_line_error(
    tmp_path_factory: Any, data: bytes, suffix: str, is_gzip: bool
) -> None:
    file = tmp_path_factory.mktemp("any") / f"l{suffix}{'.gz' if is_gzip else ''}"
    file.write_bytes(data)
    try:
        urls = [row.get("url") for row in read_all(file)]
    except DataError:
        refused(file)
    else:
        pa.array(urls, pa.string()).validate(full=True)
