"""Faults of captions: of one caption, of a table, and at the gates."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.cli.config import build
from pipelines.execution.cluster import InProcess
from pipelines.recaption.gate import GateConfig, check_gates
from pipelines.recaption.health import health_of
from pipelines.recaption.job import recaption
from pipelines.recaption.similar import SimilarCaptions, signature
from pipelines.recaption.summary import summary
from pipelines.recaption.survey import survey
from pipelines.storage.parquet import read_rows
from pipelines.storage.tables import parquet_files
from tests.pipelines.recaption.conftest import caption_table
from vlv_model.errors import ConfigError, DataError, GateError

LONG = (
    "A brown dog with a red collar lies on a grey couch beside a window. On the left side of the "
    "picture stands a lamp, and on the left side of the lamp a plant in a blue pot."
)


@pytest.mark.parametrize(
    "text",
    [
        LONG,
        "Ein großer, roter Kreis – links vom kleinen Quadrat (grün).",
        "猫がソファの上で寝ています。窓の外には雪が降っている。",
        "แมวนอนอยู่บนโซฟาสีเทาข้างหน้าต่างบานใหญ่ที่เปิดรับแสงแดดยามเช้า",
        "Кот спит на диване.",
        "A sign that reads “EXIT 24”.",
    ],
)
def test_language_in_any_script_passes(text: str) -> None:
    health = health_of(text, truncated=False)
    assert not any((health.repeated, health.empty, health.non_language))
    assert health.num_words >= 4


@pytest.mark.parametrize(
    "text",
    ["}{][ == ;; //", "a dog \ufffd\ufffd on a couch", "\x00\x01 dog", "a" * 60, "0 1 0 1 12 45 3"],
)
def test_non_language_is_detected(text: str) -> None:
    assert health_of(text, truncated=False).non_language


def test_empty_is_not_non_language() -> None:
    for text in ("", " \n", "..."):
        assert health_of(text, truncated=False).empty
    assert not health_of(" \n", truncated=False).non_language


def test_repetition_is_the_share_of_repeated_words() -> None:
    assert health_of("red " * 40, truncated=True).repetition > 0.9
    looped = health_of("A dog on a couch. " * 4, truncated=False)
    assert 0.7 <= looped.repetition < 1
    assert looped.repeated
    assert 0 < health_of(LONG, truncated=False).repetition < 0.2
    two = health_of("a small red cross left of a small red cross on a white background", False)
    assert two.repetition > 0.2
    assert not two.repeated
    assert health_of("A dog on a couch. A dog on a couch.", truncated=False).repeated


def test_one_changed_word_of_many_is_similar_and_another_scene_is_not() -> None:
    other = LONG.replace("brown", "black")
    agreeing = (signature(LONG) == signature(other)).mean()
    assert agreeing > 0.8
    assert (signature(LONG) == signature("A bowl of soup on a table.")).mean() < 0.2
    assert (signature(LONG) == signature(LONG.upper().replace(".", " ;"))).all()


def test_similar_captions_are_counted_once_and_the_first_is_not() -> None:
    captions = ["one more of a kind", LONG, "one MORE of a kind", "alone", "one more of a kind"]
    signatures = np.stack([signature(text) for text in captions])
    similar = SimilarCaptions(len(captions))
    similar.add(np.arange(2, 5), signatures[2:])
    similar.add(np.arange(2), signatures[:2])
    later, groups = similar.count(5)
    assert later.tolist() == [False, False, True, False, True]
    assert groups == [(3, 0)]
    later, groups = SimilarCaptions(0).count(0)
    assert (len(later), groups) == (0, [])


@given(st.lists(st.sampled_from(["red", "blue", "green", "grey"]), min_size=1, max_size=300))
def test_groups_are_of_one_signature_and_share_no_caption(colours: list[str]) -> None:
    """Also if all captions are similar: one of fourteen words differs."""
    captions = [f"a small purple cross just above a small cyan cross on {c} grass" for c in colours]
    signatures = np.stack([signature(text) for text in captions])
    similar = SimilarCaptions(len(captions))
    similar.add(np.arange(len(captions)), signatures)
    later, groups = similar.count(len(captions))
    names = [name.tobytes() for name in signatures]
    counted = {names[first]: size for size, first in groups}
    expected = {name: n for name, n in Counter(names).items() if n > 1}
    assert counted == expected
    assert all(names.index(names[first]) == first for _, first in groups)
    assert [size for size, _ in groups] == sorted(expected.values(), reverse=True)
    assert later.sum() >= sum(expected.values()) - len(expected)


def test_a_survey_counts_over_all_parts(tmp_path: Path) -> None:
    chunks = [
        ["a red ball on the grass", "a cut one …", None, ""],
        [],
        ["A red ball, on the grass.", "no " * 20, "{{{ }}} ((("],
    ]
    found = survey(InProcess(), caption_table(tmp_path / "t", chunks))
    assert (found.rows, found.captions, found.truncated, found.empty) == (7, 6, 1, 2)
    assert (found.repeated, found.non_language, found.duplicates) == (1, 1, 1)
    assert found.words == {0: 2, 3: 1, 6: 2, 20: 1}
    assert found.commonest == [(2, "a red ball on the grass")]
    assert (tmp_path / "t/_similar.csv").read_text() == "key\n2000\n"
    (tmp_path / "t" / "data" / "part-000000.parquet").unlink()  # it is not looked at again
    assert survey(InProcess(), caption_table(tmp_path / "t", chunks)) == found


def test_gate_error_names_the_share_and_a_query(tmp_path: Path) -> None:
    table = caption_table(tmp_path / "t", [["cut …", "cut here …", "a red ball", "", "a red ball"]])
    found = survey(InProcess(), table)
    check_gates(build(GateConfig, {"max_truncated": "40%", "max_empty": 0.2}), found, table)
    for gate, shown in (("max_truncated", 2), ("max_empty", 1), ("max_duplicates", None)):
        with pytest.raises(GateError, match=rf"gate\.{gate}=0\.01: 0\.[24] of") as error:
            check_gates(build(GateConfig, {gate: "1%"}), found, table)
        (program,) = re.findall(r"python -c '([^']*)'", str(error.value))
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
        (query,) = re.findall(r'"""(.*)"""', program)
        rows = duckdb.sql(query).fetchall()
        assert len(rows) == shown if shown else rows[0] == ("a red ball", 2)


def test_shares_are_parsed() -> None:
    for wrong in ("2 percent", "200%", "x%", -1):
        with pytest.raises(ConfigError, match="max_empty"):
            build(GateConfig, {"max_empty": wrong})


def test_a_table_that_fails_its_gate_is_not_published(settings) -> None:
    """Raising the gate publishes it without captioning again."""
    strict = settings("gate.max_truncated=1%")
    with pytest.raises(GateError, match="max_truncated"):
        recaption(strict)
    output = strict.data.output
    assert "not passed" in (Path(output) / "_report.html").read_text()
    with pytest.raises(DataError, match="not published"):
        parquet_files(output)
    written = [(p, p.stat().st_mtime_ns) for p in sorted(Path(output).glob("data/*"))]
    assert recaption(settings()) == {"ok": 21}
    page = (Path(output) / "_report.html").read_text()
    assert "not passed" not in page
    assert page.count("<img") == 21  # 18 of the gallery, 3 that are truncated
    assert [(p, p.stat().st_mtime_ns) for p in sorted(Path(output).glob("data/*"))] == written
    rows = list(read_rows(parquet_files(output), ["num_words", "truncated", "finish_reason"]))
    assert len(rows) == 21
    assert all(row["truncated"] == (row["finish_reason"] == "length") for row in rows)


def test_only_selected_rows_are_captioned_again(settings, tmp_path: Path) -> None:
    """Also from a table that failed its gate."""
    with pytest.raises(GateError):
        recaption(settings("gate.max_truncated=0"))
    first = read_rows(sorted((tmp_path / "captions/data").iterdir()), ["key", "truncated"])
    wanted = {row["key"] for row in first if row["truncated"] and row["key"] % 2}
    assert 0 < len(wanted) < 21
    again = [f"earlier.captions={tmp_path / 'captions'}"]
    again.append("earlier.where=truncated and key % 2 <> 0")
    config = settings(*again, f"data.output={tmp_path / 'again'}")
    assert recaption(config) == {"ok": len(wanted)}
    rows = read_rows(parquet_files(config.data.output), ["key"])
    assert {row["key"] for row in rows} == wanted
    assert recaption(config) == {"ok": len(wanted)}
    nothing = settings(again[0], "earlier.where=num_tokens > 1000", f"data.output={tmp_path / 'n'}")
    with pytest.raises(DataError, match="among those that are wanted"):
        recaption(nothing)
    with pytest.raises(ConfigError, match=r"earlier\.where"):
        recaption(settings(again[0], "earlier.where=no_column", f"data.output={tmp_path / 'm'}"))


def test_a_finished_table_is_summed_up_in_words(tmp_path: Path) -> None:
    good = [f"a photograph of number {n} on a wall" for n in range(4)]
    table = caption_table(tmp_path / "t", [[*good, "red " * 40, "@@@@ ####", None]])
    survey(InProcess(), table)
    lines = summary(table).splitlines()
    assert lines[0].startswith(
        "health of 6 captions: 1 repeat themselves (17%), 1 no language (17%)"
    )
    assert len(lines) == 5
    assert all(
        any(caption[:20] in line for caption in (*good, "red ", "@@@@")) for line in lines[1:4]
    )
    assert all(len(line) <= 120 for line in lines[1:4])
    assert lines[4] == f"report: {table.folder}/_report.html"
    healthy = caption_table(tmp_path / "healthy", [["a dog on a wall", "two cats in a red box"]])
    survey(InProcess(), healthy)
    assert summary(healthy).startswith("health of 2 captions: no fault found\n")
