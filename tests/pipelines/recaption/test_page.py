"""The report of a caption table as a document, and its search in a real browser."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.execution.cluster import InProcess
from pipelines.recaption.page import CaptionSample, render
from pipelines.recaption.report import _FAULTS, write_report
from pipelines.recaption.survey import survey
from pipelines.report.histogram import MAX_BARS, binned, quantile
from tests.pipelines.recaption.conftest import caption_table
from tests.pipelines.report.test_report_page import HOSTILE


def test_page_shows_the_report(caption_report, parse):
    document = parse(render(caption_report))
    for text in ("4,321", "117", "2.7", "211", "at most 2", "not passed", "212", "A wall.", "21"):
        assert text in document.text, text
    assert len(document.all("img")) == 2
    assert len(document.all("svg")) == 2


def test_page_runs_only_its_own_script(caption_report, parse):
    page = render(caption_report)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policies = [m.attributes.get("content", "") for m in parse(page).all("meta")]
    assert any(p.endswith(f"script-src 'sha256-{digest}'") for p in policies)
    assert not parse(render(replace(caption_report, searched=[]))).all("script")


def test_hostile_captions_stay_text(caption_report, parse):
    bad = CaptionSample(1, HOSTILE, HOSTILE, (), 2)
    hostile = replace(
        caption_report, commonest=[(2, HOSTILE)], gallery=[bad], unhealthy=[], searched=[bad],
        title=HOSTILE,
    )  # fmt: skip
    document = parse(render(hostile))
    assert len(document.all("script")) == 1
    assert not document.all("img")
    assert HOSTILE.replace("\0", "�") in document.all("dd")[0].text


def test_similar_captions_do_not_contradict_that_none_is_the_same(caption_report, parse):
    shown = " ".join(parse(render(replace(caption_report, commonest=[]))).text.split())
    assert "No two captions are the same. 211 similar to an earlier one: _similar.csv" in shown
    health = [line for line in caption_report.health if line.name != "duplicates"]
    alone = parse(render(replace(caption_report, commonest=[], health=health))).text
    assert "No two captions are the same." in alone
    assert "similar to an earlier one" not in alone


def test_a_table_without_a_caption_has_a_page(caption_report, parse):
    empty = replace(caption_report, captions=0, counts={"decode:corrupt": 3}, words={}, tokens={})
    assert "decode:corrupt" in parse(render(empty)).text


@given(st.dictionaries(st.integers(0, 100_000), st.integers(1, 1000), min_size=1))
def test_histogram_bins_are_few_and_complete(counts):
    bars, width = binned(counts)
    assert sum(bars.values()) == sum(counts.values())
    assert len(bars) <= MAX_BARS
    assert min(bars) <= min(counts)
    assert max(counts) < max(bars) + width
    assert quantile(counts, 1) == max(counts)


@pytest.mark.parametrize(("words", "shown"), [("", 2), ("WALL and", 1), ("truncated", 1), ("zebra", 0)])  # fmt: skip
def test_the_search_finds_words(
    caption_report, browse, tmp_path: Path, words: str, shown: int
) -> None:
    typed = render(caption_report).replace('type="search"', f'type="search" value="{words}"')
    (tmp_path / "page.html").write_text(typed)
    page = browse(tmp_path / "page.html", "--dump-dom")
    (counter,) = re.findall(r"<output[^>]*>([^<]*)</output>", page)
    assert counter == f"{shown} of 2"
    assert page.count('<tr hidden="">') == 2 - shown


def test_the_numbers_of_a_real_table_add_up(parse, tmp_path):
    same = "a red ball lies on the green grass beside a small dog in the sun today"
    texts = [same, f" {same}", same, same.replace("today", "now"), "cut here …", "", "@@@@ ####"]
    table = caption_table(tmp_path / "t", [texts, [None, "a blue box", "red " * 40, None]])
    found = survey(InProcess(), table)
    gate = {f"max_{name}": None for name in _FAULTS} | {"max_empty": 0.01}
    published = {"model": {"fingerprint": "0123"}, "generate": {}, "gate": gate}
    write_report(table, found, published)
    document = parse((tmp_path / "t/_report.html").read_text())
    sections = {s.attributes["id"]: s for s in document.all("section")}

    def numbers(section, column, place=0):
        lines = sections[section].all("tbody")[place].all("tr")
        return {
            line.all("th")[0].text.split()[0]: int(line.all("td")[column].text) for line in lines
        }

    statuses = sections["rows"].all("tr", of_class="kind-total")
    assert [int(line.all("td")[0].text) for line in statuses] == [9, 2]
    assert sections["rows"].all("tfoot")[0].all("td")[0].text == "11"
    health = numbers("health", 0)
    assert health == {"truncated": 1, "empty": 2, "repeated": 1, "non_language": 1, "duplicates": 3}
    for place in (0, 1):  # words, tokens
        assert sum(numbers("lengths", 0, place).values()) == 9
    groups = [line.all("th")[0].text for line in sections["same"].all("tbody")[0].all("tr")]
    assert groups == ["3"]  # all but the first, and a similar one, are the duplicates
    captions = [row.all("th")[0] for row in sections["search"].all("tbody")[0].all("tr")]
    assert len(captions) == 9
    shown = [c.children[0] for c in captions if c.children]
    shown += [d.children[0] for d in sections["gallery"].all("dd") if d.children]
    assert all(text == text.strip() for text in shown)
