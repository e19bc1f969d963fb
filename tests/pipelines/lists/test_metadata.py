"""Lists of all spellings and formats become a sorted plan; dropped rows are counted."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.cli.config import build
from pipelines.images.rows import METADATA_ROW, PROVENANCE, normalise_url, url_key
from pipelines.ingest.estimate import rows_per_file
from pipelines.ingest.plan import (
    PLAN_ROW,
    Plan,
    _without_repeats,
    chunk_file,
    first_plan,
    read_list,
)
from pipelines.lists.filters import FilterConfig
from pipelines.lists.input_files import input_files
from pipelines.lists.metadata import COLUMN_NAMES, match_columns, read_batches
from pipelines.pictures.encode import ImageConfig
from pipelines.storage.sorting import ExternalSort
from tests.pipelines.ingest import releases
from vlv_model.errors import ConfigError, DataError

ROWS: list[dict[str, Any]] = [
    {"URL": "http://a.org/1.jpg", "TEXT": "one", "WIDTH": 600.0, "AESTHETIC_SCORE": 6.5},
    {"URL": "http://a.org/2.jpg", "TEXT": 'two, "quoted"\nlines', "WIDTH": 80.0},
    {"URL": "http://b.org/ü.jpg", "TEXT": None, "AESTHETIC_SCORE": 4.0},
]


def write_list(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write the rows in the format of the file's suffix."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    full = [{name: row.get(name) for name in names} for row in rows]
    opener = gzip.open if file.suffix == ".gz" else open
    if file.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(full), file)
    elif ".csv" in file.name or ".tsv" in file.name:
        with opener(file, "wt", newline="", encoding="utf-8") as stream:
            options: dict[str, Any] = {}
            if ".tsv" in file.name:  # TSV has no quoting
                options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
            writer = csv.DictWriter(stream, names, **options)
            writer.writeheader()
            writer.writerows(full)
    elif ".json" in file.suffixes:
        with opener(file, "wt", encoding="utf-8") as stream:
            json.dump(rows, stream)
    else:
        with opener(file, "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    return file


def read_all(file: Path, **settings: Any) -> list[dict[str, Any]]:
    batches = read_batches(file, settings.pop("columns", {}), FilterConfig(**settings))
    return [row for batch in batches for row in batch.to_pylist()]


def make_plan(tmp_path: Path, rows: list[dict[str, Any]], chunk: int = 4, **filters: Any) -> Plan:
    file = write_list(tmp_path / "list.jsonl", rows)
    (tmp_path / "table").mkdir(exist_ok=True)
    return plan_of([file], tmp_path, chunk, **filters)


def plan_of(files: list[Path], tmp_path: Path, chunk: int, **filters: Any) -> Plan:
    plan = Plan()
    rows = read_list(files, FilterConfig(**filters), {}, plan)
    first_plan(rows, tmp_path / "table/plan", lambda listed: chunk, plan)
    return plan


def planned(tmp_path: Path, plan: Plan) -> list[dict[str, Any]]:
    files = [chunk_file(tmp_path / "table/plan", chunk) for chunk in plan.chunks]
    return [row for file in files for row in pq.read_table(file).to_pylist()]


# --------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "name",
    ["l.parquet", "l.csv", "l.tsv", "l.csv.gz", "l.jsonl", "l.ndjson.gz", "l.json", "l.json.gz"],
)
def test_all_formats_give_the_same_rows(tmp_path: Path, name: str) -> None:
    text = 'two, "quoted"\nlines'
    if name == "l.tsv":  # a line break ends a row
        text = 'two, "quoted" lines'
    rows = read_all(write_list(tmp_path / name, [ROWS[0], {**ROWS[1], "TEXT": text}, ROWS[2]]))
    assert [row["url"] for row in rows] == [row["URL"] for row in ROWS]
    assert [row["aesthetic"] for row in rows] == [6.5, None, 4.0]
    assert [row["width"] for row in rows] == [600.0, 80.0, None]
    assert rows[1]["alt_text"] == text
    assert not rows[2]["alt_text"]


@pytest.fixture(params=["made", "shared"])
def shared_lists(request: pytest.FixtureRequest) -> Path | None:
    """The folder of real lists; None to use those of `releases`."""
    return None if request.param == "made" else request.getfixturevalue("shared_dir") / "laion"


def test_published_spellings_are_known(shared_lists: Path | None) -> None:
    published: dict[str, Any] = releases.SCHEMAS
    if shared_lists:
        published = json.loads((shared_lists / "schemas.json").read_text())
    assert published
    for release, names in published.items():
        schema = pa.schema([(name, pa.string()) for name in names])
        found = set(match_columns(schema, {}, release))
        assert found == set(COLUMN_NAMES) - set(PROVENANCE.names), release


def test_published_rows_are_read(tmp_path: Path, shared_lists: Path | None) -> None:
    published = releases.ROWS
    if shared_lists:
        lines = (shared_lists / "full_schema_rows.jsonl").read_text().splitlines()
        published = [json.loads(line)["row"] for line in lines]
    for i, original in enumerate(published):
        (row,) = read_all(write_list(tmp_path / f"{i}.jsonl", [original]))
        assert row["url"] in original.values()
        if row.get("hash") is not None:
            assert row["hash"] == original["hash"]  # all 64 bits
    if shared_lists:
        large = shared_lists / "img2dataset_test_10000.parquet"
    else:
        large = releases.write_large_list(tmp_path / "large.parquet")
    (tmp_path / "table").mkdir()
    plan = plan_of(input_files(str(large)), tmp_path, 256)
    assert plan.read == 10_000 == plan.fetched + sum(plan.dropped.values())


@pytest.mark.parametrize("release", releases.OTHERS)
def test_other_published_lists_are_read(tmp_path: Path, release: str) -> None:
    expected = {"url": releases._url(0), "alt_text": "A boat", **releases.OTHERS[release][2]}
    assert read_all(releases.write_release(tmp_path, release)) == [pytest.approx(expected)]


def test_yfcc_is_read_with_the_header_that_docs_give(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs/ingest.md").read_text()
    names = r"\t".join(releases.YFCC)
    assert rf"printf '{names}\n'" in page
    row = dict.fromkeys(releases.YFCC, "") | {"title": "A+boat", "marker": "0"}
    row |= {"pageurl": "http://photos.example.org/1/", "url": releases._url(0)}
    row |= {"licensename": "Attribution License", "license_url": "http://cc.example.org/by/2.0/"}
    file = tmp_path / "yfcc.tsv"
    file.write_text("\t".join(row.values()) + "\n")
    with pytest.raises(DataError, match="has no header line with column names"):
        read_all(file)
    file.write_text("\t".join(row) + "\n" + file.read_text())
    assert read_all(file, columns={"title": "alt_text"}) == [
        {"url": row["url"], "alt_text": "A+boat", "license": row["license_url"]}
    ]


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(list(COLUMN_NAMES)), st.sampled_from([str.upper, str.lower, str.title])
    )
)
def test_spellings_are_case_insensitive(spelt: dict[str, Any]) -> None:
    names = {ours: case(COLUMN_NAMES[ours][-1]) for ours, case in spelt.items()}
    schema = pa.schema([(name, pa.string()) for name in names.values()])
    assert match_columns(schema, {}, "list") == names


def test_columns_are_mapped_by_a_setting(tmp_path: Path) -> None:
    file = write_list(tmp_path / "l.csv", [{"link": "http://a/", "url": "no", "beauty": "7"}])
    (row,) = read_all(file, columns={"link": "url", "beauty": "aesthetic"})
    assert row["url"] == "http://a/"
    assert row["aesthetic"] == 7.0
    with pytest.raises(ConfigError, match=r"unknown column 'prettiness': expected one of url, "):
        read_all(file, columns={"beauty": "prettiness"})
    with pytest.raises(DataError, match="no column 'lnk'; it has link, url, beauty"):
        read_all(file, columns={"lnk": "url"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.csv", b"picture,TEXT\nhttp://a/,x\n", "no column 'url'; it has picture, TEXT"),
        ("l.csv", b"", "no column 'url'; it has no columns"),
        ("l.csv", b"url\n\xff\xfe\n", "cannot be read as CSV"),
        ("l.jsonl", b'{"url": "http://a/"}\n{"url"\n', "line 2 is not a JSON object"),
        ("l.jsonl", b"7\n", "line 1 is not a JSON object"),
        ("l.csv.gz", b"url\n", "cannot be read as CSV"),
        ("l.parquet", b"PAR1", "not a readable Parquet file"),
        ("l.xlsx", b"", "metadata are read from .parquet, .csv"),
    ],
)
def test_bad_file_is_a_one_line_error(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        read_all(tmp_path / name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize(
    "column",
    [
        *(pa.array(["0.25", " ", None, "0.75 "], t) for t in (pa.large_string(), pa.string_view())),
        pa.array(["0.25", None, None, "0.75"]).dictionary_encode(),
        pa.array([b"0.25", None, b"", b"0.75"]),
        pa.array(np.array([0.25, np.nan, np.nan, 0.75], np.float16)),
        pa.array([0.25, None, None, 0.75]).dictionary_encode(),
        pa.array([Decimal("0.25"), None, None, Decimal("0.75")]),
    ],
    ids=lambda column: str(column.type) if isinstance(column, pa.Array) else None,
)
def test_scores_of_any_type_are_read_as_numbers(
    tmp_path: Path, column: pa.Array, limit: float | None
) -> None:
    urls = [f"http://a/{i}" for i in range(4)]
    pq.write_table(pa.table({"url": urls, "punsafe": column}), tmp_path / "l.parquet")
    (tmp_path / "table").mkdir()
    plan = plan_of([tmp_path / "l.parquet"], tmp_path, 4, max_punsafe=limit)
    found = {row["url"]: row["punsafe"] for row in planned(tmp_path, plan)}
    found = {url: None if score != score else score for url, score in found.items()}
    expected = dict(zip(urls, [0.25, None, None, 0.75], strict=True))
    assert found == (expected if limit is None else {urls[0]: 0.25})


def test_hash_keeps_its_bits_or_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "l.parquet"

    def write(values: list[Any], kind: pa.DataType) -> Path:
        pq.write_table(pa.table({"url": ["http://a/"] * 3, "hash": pa.array(values, kind)}), file)
        return file

    nan = float("nan")
    assert [row["hash"] for row in read_all(write([5.0, nan, None], pa.float64()))] == [
        5,
        None,
        None,
    ]
    assert [row["hash"] for row in read_all(write([2**64 - 1, 0, 7], pa.uint64()))] == [-1, 0, 7]
    wrong = [([2.5], pa.float64()), ([2**70], pa.decimal128(38, 0)), ([0], pa.timestamp("us"))]
    for values, kind in wrong:
        with pytest.raises(DataError, match=r"column 'hash' is .* and cannot be read as int64 \("):
            read_all(write([*values, None, None], kind))


def test_dictionary_encoded_texts_are_kept(tmp_path: Path) -> None:
    """Writers encode repeated values in a dictionary, as pandas does for categories."""
    licence = pa.array(["CC0", None]).dictionary_encode()
    table = pa.table(
        {"url": ["http://a/", "http://b/"], "license": licence, "source": [1.0, np.nan]}
    )
    pq.write_table(table, tmp_path / "l.parquet")
    found = [(row["license"], row["source"]) for row in read_all(tmp_path / "l.parquet")]
    assert found == [("CC0", "1.0"), (None, None)]


def test_columns_that_differ_only_in_case_need_a_setting(tmp_path: Path) -> None:
    file = write_list(tmp_path / "l.csv", [{"URL": "http://a/", "url": "http://b/"}])
    with pytest.raises(
        DataError, match=r"has 'URL' and 'url': choose the one for url in data\.columns"
    ):
        read_all(file)
    assert read_all(file, columns={"url": "url"}) == [{"url": "http://b/"}]


# ----------------------------------------------------------------------------- published lists


def test_original_size_is_preferred(tmp_path: Path) -> None:
    """img2dataset writes the size of its stored copy as `width`."""
    sizes = {"width": 256, "height": 192, "original_width": 1024, "original_height": 768}
    rows = [{"url": "http://a/", "status": "success", **sizes}]
    (row,) = read_all(write_list(tmp_path / "l.parquet", rows), min_short_side=512)
    assert (row["width"], row["height"]) == (1024, 768)
    assert make_plan(tmp_path, rows, min_short_side=512).fetched == 1


def test_invalid_value_is_missing_if_no_filter_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [
        {"url": "http://a/", "WIDTH": "wide", "hash": "1e2af", "punsafe": 0.1, "similarity": " "},
        {"url": "http://b/", "WIDTH": "640", "hash": str(2**62 + 1), "punsafe": 0.1},
    ]
    plan = make_plan(tmp_path, rows, max_punsafe=0.5)
    assert {row["url"]: row["hash"] for row in planned(tmp_path, plan)} == {
        "http://a/": None,
        "http://b/": 2**62 + 1,
    }
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert f"column 'WIDTH' of the list: 1 values that cannot be read were taken as missing (the first: 'wide' in {tmp_path}" in warnings[0]  # fmt: skip
    with pytest.raises(DataError, match="column 'WIDTH' is string and cannot be read as double"):
        make_plan(tmp_path, rows, min_aspect_ratio=0.5, optional=["aspect_ratio"])


def test_sizes_of_a_wrong_type_are_missing_if_no_filter_reads_them(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["http://a/"], "width": [[1, 2]]}), tmp_path / "l.parquet")
    assert read_all(tmp_path / "l.parquet") == [{"url": "http://a/", "width": None}]


def test_licence_that_is_not_utf8_is_missing(tmp_path: Path) -> None:
    licences = pa.array([b"CC0", b"\xff", None])
    table = pa.table({"url": ["http://a/", "http://b/", "http://c/"], "license": licences})
    pq.write_table(table, tmp_path / "l.parquet")
    assert [row["license"] for row in read_all(tmp_path / "l.parquet")] == ["CC0", None, None]


@pytest.mark.parametrize("nothing", [None, "none"])
def test_column_is_left_out(tmp_path: Path, nothing: str | None) -> None:
    file = tmp_path / "l.parquet"
    times = pa.array([0], pa.timestamp("us"))
    pq.write_table(pa.table({"url": ["http://a/"], "hash": times, "TEXT": ["x"]}), file)
    with pytest.raises(DataError, match=r"leave it out: data\.columns='{hash: none}'"):
        read_all(file)
    (row,) = read_all(file, columns={"hash": nothing})
    assert row == {"url": "http://a/", "alt_text": "x"}
    # The next spelling replaces it.
    write_list(tmp_path / "l.csv", [{"url": "http://a/", "text": "x", "caption": "y"}])
    (row,) = read_all(tmp_path / "l.csv", columns={"text": nothing})
    assert row["alt_text"] == "y"
    with pytest.raises(DataError, match="no column 'hsah'"):
        read_all(file, columns={"hsah": nothing})


@pytest.mark.parametrize("name", ["l.parquet", "l.csv", "l.jsonl"])
@pytest.mark.parametrize("limit", [0.1, 0.45, 0.7, 0.9, 4.4, 6.1])
def test_score_equal_to_its_limit(tmp_path: Path, name: str, limit: float) -> None:
    below, above = round(limit - 0.01, 2), round(limit + 0.01, 2)
    rows = [{"url": f"http://a/{s}", "aesthetic": s, "punsafe": s} for s in (below, limit, above)]
    file = write_list(tmp_path / name, rows)
    if name == "l.parquet":  # as LAION stores them, and with their statistics
        narrow = pa.table(rows_of_float32(rows))
        pq.write_table(narrow, file, row_group_size=1)
    (tmp_path / "table").mkdir()
    plan = plan_of([file], tmp_path, 4, min_aesthetic=limit)
    assert plan.dropped == {"filtered:aesthetic": 1}
    plan = plan_of([file], tmp_path, 4, max_punsafe=limit)
    assert plan.dropped == {"filtered:punsafe": 2}


def rows_of_float32(rows: list[dict[str, Any]]) -> dict[str, pa.Array]:
    scores = {n: pa.array([row[n] for row in rows], pa.float32()) for n in ("aesthetic", "punsafe")}
    return {"url": pa.array([row["url"] for row in rows]), **scores}


# ------------------------------------------------------------------------------------------ plan


def test_plan_is_sorted_and_complete(tmp_path: Path) -> None:
    rows = [{"url": f"http://h.org/{i}", "TEXT": str(i)} for i in range(11)]
    plan = make_plan(tmp_path, rows)
    assert (plan.chunks, plan.fetched, plan.read, plan.dropped) == ([0, 1, 2], 11, 11, {})
    assert pq.read_schema(chunk_file(tmp_path / "table/plan", 0)).equals(PLAN_ROW)
    found = planned(tmp_path, plan)
    assert [row["key"] for row in found] == sorted(url_key(row["url"]) for row in rows)
    assert {row["url"]: row["alt_text"] for row in found} == {r["url"]: r["TEXT"] for r in rows}
    assert sorted(p.name for p in (tmp_path / "table/plan").iterdir()) == [
        f"chunk-00000{i}.plan" for i in range(3)
    ]


def test_licence_and_provenance_are_kept(tmp_path: Path) -> None:
    rows = [
        {"url": "http://h.org/1", "LICENSE": "CC-BY-4.0", "Source": ["a", "7"]},
        {"url": "http://h.org/2", "LICENSE": None, "Source": []},
    ]
    found = planned(tmp_path, make_plan(tmp_path, rows))
    kept = {row["url"]: (row["license"], row["source"]) for row in found}
    assert kept == {"http://h.org/1": ("CC-BY-4.0", '["a", "7"]'), "http://h.org/2": (None, "[]")}


def test_files_have_a_target_size_and_short_lists_have_several() -> None:
    photographs = ImageConfig(size=512)
    assert 300 < rows_per_file(6_000_000, photographs) < 1_000
    assert rows_per_file(6_000_000, ImageConfig(size=1024)) < 200
    assert rows_per_file(6_000_000, ImageConfig(size=60_000)) > 50
    assert rows_per_file(6_000_000, ImageConfig(resize="no")) > 100
    assert rows_per_file(6_000_000, ImageConfig(size=8)) > 10_000
    assert rows_per_file(1_600, photographs) == 50
    assert rows_per_file(10, photographs) == 32
    assert rows_per_file(10, ImageConfig(size=60_000, enlarge=True)) == 1


def test_plan_does_not_depend_on_the_number_of_buckets(tmp_path: Path) -> None:
    rows = [{"url": f"http://h.org/{i % 700}"} for i in range(1000)]
    whole = make_plan(tmp_path, rows, chunk=64)
    in_one = planned(tmp_path, whole)
    again, small = Plan(), partial(ExternalSort, bucket_bytes=512, buffer_rows=100)
    listed = read_list([tmp_path / "list.jsonl"], FilterConfig(), {}, again, sorting=small)
    first_plan(listed, tmp_path / "table/plan", lambda listed: 64, again)
    assert again == whole
    assert planned(tmp_path, again) == in_one
    assert (whole.fetched, whole.dropped) == (700, {"repeated_url": 300})


def test_first_of_repeated_urls_is_kept(tmp_path: Path) -> None:
    spellings = ["HTTP://Host.org:80/x#top", "http://host.org/x", " http://host.org./x "]
    plan = make_plan(tmp_path, [{"url": url, "TEXT": str(i)} for i, url in enumerate(spellings)])
    assert plan.dropped == {"repeated_url": 2}
    (row,) = planned(tmp_path, plan)
    assert (row["url"], row["alt_text"]) == ("http://host.org/x", "0")


def test_rows_without_url_are_counted(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, [{"url": None}, {"url": "  "}, {"TEXT": "x"}, {"url": "http://a/"}])
    assert (plan.fetched, plan.dropped) == (1, {"no_url": 3})


def test_filters_count_the_first_rule_that_fails(tmp_path: Path) -> None:
    good = {"aesthetic": 6.0, "pwatermark": 0.1, "punsafe": 0.1, "WIDTH": 800, "HEIGHT": 600}
    bad = [
        {},
        {"aesthetic": 4.9, "pwatermark": 0.9},
        {"aesthetic": None},
        {"pwatermark": 0.5},
        {"punsafe": 0.5},
        {"WIDTH": 511},
        {"WIDTH": 2000},
        {"HEIGHT": 0},
    ]
    rows = [{"url": f"http://a/{i}", **good, **change} for i, change in enumerate(bad)]
    limits = {"min_aesthetic": 5, "max_pwatermark": 0.5, "max_punsafe": 0.5}
    limits |= {"min_short_side": 512, "min_aspect_ratio": 0.5, "max_aspect_ratio": 2}
    plan = make_plan(tmp_path, rows, **limits)
    assert [row["url"] for row in planned(tmp_path, plan)] == ["http://a/0"]
    assert plan.dropped == {
        "filtered:aesthetic": 2,
        "filtered:aspect_ratio": 1,
        "filtered:punsafe": 1,
        "filtered:pwatermark": 1,
        "filtered:short_side": 2,
    }


def test_a_filter_without_its_column_is_refused_unless_optional(tmp_path: Path) -> None:
    rows = [{"url": "http://a/", "TEXT": "x"}]
    with pytest.raises(
        DataError, match=r"filter 'punsafe'.* no column 'punsafe'; it has url, TEXT"
    ):
        make_plan(tmp_path, rows, max_punsafe=0.5)
    assert make_plan(tmp_path, rows, max_punsafe=0.5, optional=["punsafe"]).fetched == 1
    # A missing value passes an optional rule; a present one is compared.
    rows = [{"url": "http://a/", "punsafe": None}, {"url": "http://b/", "punsafe": 0.9}]
    plan = make_plan(tmp_path, rows, max_punsafe=0.5, optional=["punsafe"])
    assert (plan.fetched, plan.dropped) == (1, {"filtered:punsafe": 1})


def test_impossible_aspect_ratios_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^filter\.min_aspect_ratio=2 is above filter\.max_aspect_ratio=0\.5"
    ):
        build(FilterConfig, {"min_aspect_ratio": 2, "max_aspect_ratio": 0.5})
    assert build(FilterConfig, {"min_aspect_ratio": 1, "max_aspect_ratio": 1}).rules()


def test_error_for_an_empty_list_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows"):
        make_plan(tmp_path, [])
    with pytest.raises(DataError, match=r"none of the 2 rows .*\(no_url 2\): give a list with"):
        make_plan(tmp_path, [{"url": ""}, {"url": None}])
    with pytest.raises(DataError, match=r"none of the 1 rows .*filtered:aesthetic 1\): loosen"):
        make_plan(tmp_path, [{"url": "http://a/", "aesthetic": 3}], min_aesthetic=6)


def test_two_urls_of_one_key_are_detected() -> None:
    """No real collision is known, so the rows are made up."""
    rows = [{"key": 9, "url": "http://a/"}, {"key": 9, "url": "http://b/"}]
    with pytest.raises(DataError, match="same key 9: http://a/ and http://b/"):
        _without_repeats(pa.Table.from_pylist(rows, schema=METADATA_ROW), Counter())


urls = st.text(max_size=60) | st.builds(
    "{}://{}{}/{}".format,
    st.sampled_from(["http", "HTTPS", "ftp"]),
    st.sampled_from(["a.org", "A.Org.", "user:pw@h", "[::1]", "bücher.de"]),
    st.sampled_from(["", ":80", ":443", ":8080", ":x"]),
    st.text(max_size=20),
)


@settings(deadline=None)
@given(st.lists(urls, max_size=30))
def test_any_url_is_planned_once_under_its_key(tmp_path_factory: Any, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("plan")
    rows = [{"url": text} for text in texts]
    named = {normalise_url(text) for text in texts if text.strip()}
    if not named:
        return
    plan = make_plan(folder, rows)
    found = planned(folder, plan)
    assert {row["url"] for row in found} == named
    assert len(found) == len(named) == plan.fetched
    assert all(row["key"] == url_key(row["url"]) for row in found)
    assert plan.read == plan.fetched + sum(plan.dropped.values())
    keys = np.array([row["key"] for row in found])
    assert (np.diff(keys.astype(object)) > 0).all()
