"""The section "Does it work?": its scores, its claim, and missing scores."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.demo.page import render
from pipelines.report.figures import gap, share, width

HOSTILE = """</code><script>alert("1")</script>'"><img src=https://a.example/x>"""


def changed(proof, part, **figures):
    """A copy of the proof with some figures of one part exchanged."""
    return {**copy.deepcopy(proof), part: {**copy.deepcopy(proof[part]), **figures}}


def leaves(figures):
    """Every share and loss below a part of the proof."""
    for value in figures.values():
        if isinstance(value, dict):
            yield from leaves(value)
        elif isinstance(value, float):
            yield value


@pytest.fixture
def section(report, parse):
    """The section of a report with a proof."""

    def of(proof):
        document = parse(render(replace(report, gallery=[], stages={}, proof=proof)))
        return next(s for s in document.all("section") if s.attributes["id"] == "proof")

    return of


def cells(table):
    """The text of a table's body: name of each row, then its figures."""
    return {row.all("th")[0].text: [c.text for c in row.all("td")] for row in table.all("tr")[2:]}


def test_every_figure_is_shown(proof, section):
    text = section(proof).text
    for part in ("captions", "control", "reconstruction"):
        for value in leaves(proof[part]):
            words = share(value).replace("\u00a0", " ")
            assert re.search(rf"(?<![\d.]){re.escape(words)}", text), f"{words} is not shown"
    for figure in ("201", "199", "128", "0.1100", "0.1400", "0.3100", "0.6000", "85 %", "1,060"):
        assert re.search(rf"(?<![\w.,]){re.escape(figure)}", text), f"{figure} is not shown"


def test_cells_show_their_own_scores(proof, section):
    captions, losses, pictures = section(proof).all("table")
    rows = cells(captions)
    assert list(rows) == [
        "exact match every word",
        "size one of 2",
        "colour one of 10",
        "shape one of 4",
        "relation one of 2",
        "background one of 3",
    ]
    assert rows["exact match every word"] == ["97.0 %", "88.0 %", "2.0 %", "0 %"]
    assert rows["colour one of 10"] == ["99.0 %", "96.0 %", "42.0 %", "31.0 %"]
    over, names = captions.all("tr")[:2]
    assert [head.text for head in over.all("th")] == ["with stage 1", "control: stage 1 skipped"]
    kinds = ["unseen scenes 201 scenes", "held-out combinations 199 scenes"]
    assert [h.text.replace("\u00ad", "") for h in names.all("th")] == kinds * 2

    names, first, size = pictures.all("tr")[:3]
    assert [h.text.split()[0] for h in names.all("th")] == ["floor", "ours", "ceiling"]
    assert [c.text for c in first.all("td")] == ["35.0 %", "93.0 %", "95.0 %"]
    assert [c.text for c in size.all("td")] == ["50.0 %", "95.6 %", "97.3 %"]
    assert [row.text for row in losses.all("tr")] == [
        "true caption in words 0.1100",
        "encoder ours: embeddings 0.1400",
        "no caption the empty text 0.3100",
    ]


def test_meters_match_their_shares_and_ours_looks_different(proof, section):
    captions, losses, pictures = section(proof).all("table")
    row = captions.all("tr")[2]
    assert [i.attributes["style"] for i in row.all("i")] == [
        "width:97.00%",
        "width:88.00%",
        "width:2.00%",
        "width:0.00%",
    ]
    looks = [span.attributes["class"] for span in row.all("span")]
    assert looks == ["meter ours"] * 2 + ["meter other"] * 2
    lengths = [float(i.attributes["style"][6:-1]) for i in losses.all("i")]
    assert lengths == pytest.approx([100 * 0.11 / 0.31, 100 * 0.14 / 0.31, 100], abs=0.01)
    looks = [span.attributes["class"] for span in pictures.all("tr")[1].all("span")]
    assert looks == ["meter other", "meter ours", "meter other"]


def test_the_claim_shows_its_scores_and_the_control(proof, section):
    lead = section(proof).all("p", of_class="lead")[0].text
    for words in (
        "Stage 1 saw pictures only",
        "97.0 % of 201 scenes",
        "88.0 % of 199 scenes",
        "that no training ever showed",
        "The control is the same stage 2 on an encoder that skipped stage 1",
        "2.0 % and 0 %",
    ):
        assert words in lead.replace("\u00a0", " ")
    assert len(re.findall(r"\.(?:\s|$)", lead)) == 2


@pytest.mark.parametrize("columns", [["key", "image", "caption"], ["caption"], []])
def test_pictures_only_is_not_claimed_with_other_columns(proof, section, columns):
    text = section(changed(proof, "stage1", columns_read=columns)).text
    assert "Stage 1 saw pictures only" not in text
    assert "did not see pictures only" in text


@pytest.mark.parametrize(
    ("warm_start", "words", "absent"),
    [
        (True, "Stage 1 was warm-started.", "trained in full"),
        (False, "Stage 1 was trained in full.", "warm-started"),
    ],
)
def test_the_start_of_stage_1_is_shown(proof, section, warm_start, words, absent):
    text = section(changed(proof, "stage1", warm_start=warm_start)).text
    assert words in text
    assert absent not in text
    assert "1,060" in text


def test_the_four_cards_come_first_and_lead_to_the_section(report, proof, parse):
    document = parse(render(replace(report, proof=proof)))
    first, second = document.all("ol", of_class="cards")
    found = [(c.all("a")[0].text, c.all("span", "value")[0].text) for c in first.all("li")]
    assert found == [
        ("Exact match", "97.0 %"),
        ("Held-out combinations", "88.0 %"),
        ("Gap closed", "85 %"),
        ("Reconstruction", "93.0 %"),
    ]
    assert "95.0 %" in first.all("li")[3].text.replace("\u00a0", " ")  # the ceiling
    assert {a.attributes["href"] for a in first.all("a")} == {"#proof"}
    assert second.all("li")[0].all("a")[0].text == "Ingest"
    sections = [section.attributes["id"] for section in document.all("section")]
    assert sections[:2] == ["proof", "ingest"]


@pytest.mark.parametrize("nothing", [None, {}])
def test_without_a_proof_nothing_of_it_is_shown(report, parse, nothing):
    document = parse(render(replace(report, proof=nothing)))
    assert "Does it work?" not in document.text
    assert "#proof" not in {a.attributes["href"] for a in document.all("a")}
    assert len(document.all("ol", of_class="cards")) == 1


def test_hostile_text_stays_text(report, proof, parse):
    hostile = changed(proof, "stage1", columns_read=["image", HOSTILE])
    document = parse(render(replace(report, proof=hostile, gallery=[])))
    assert not document.all("script")
    assert not document.all("img")
    assert HOSTILE in document.all("p", of_class="start")[0].all("code")[1].text


def test_the_page_with_its_proof_is_small_and_fetches_nothing(report, proof):
    page = render(replace(report, gallery=[], proof=proof))
    assert len(page.encode()) < 75_000
    assert not re.search(r"""(?:src|href)="(?!#|data:)""", page)


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_missing_figure_is_a_dash(report, proof, section, parse, missing):
    broken = changed(proof, "captions", exact_match=missing, attributes={})
    broken = changed(broken, "denoising", encoder=missing, no_caption=missing, gap_closed=missing)
    captions, losses, _ = section(broken).all("table")
    assert cells(captions)["exact match every word"][0] == "–"
    assert cells(captions)["size one of 2"][0] == "–"
    assert [i.attributes["style"] for i in losses.all("i")] == [
        "width:100.00%",
        "width:0.00%",
        "width:0.00%",
    ]
    values = parse(render(replace(report, proof=broken))).all("ol")[0].all("span", "value")
    assert [value.text for value in values] == ["–", "88.0 %", "–", "93.0 %"]


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.85, "85 %"), (-0.124, "−12 %"), (1.031, "103 %"), (-0.001, "0 %"), (None, "–")],
)
def test_a_gap_may_grow_or_be_more_than_closed(value, words):
    assert gap(value).replace("\u00a0", " ") == words


@given(st.none() | st.floats(allow_nan=True, allow_infinity=True))
def test_any_share_has_a_meter_within_its_frame(value):
    assert 0 <= float(width(value).removeprefix("width:").removesuffix("%")) <= 100
    assert re.fullmatch(r"–|<?\s?\d+(\.\d)?\s%", share(value))
