"""Loss curves: axes, lines and labels."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.report import axes, charts
from pipelines.report.axes import tick_labels, ticks
from pipelines.report.charts import heldout_ends
from tests.pipelines.report.pages import macro


def loss_chart(title: str, events: list[dict]) -> str:
    return macro("charts", "loss_chart")(charts.loss_chart(title, events))


def step(number: int, loss: float) -> dict:
    return {"event": "step", "step": number, "loss": loss}


def evaluation(number: int, loss: float | None) -> dict:
    return {"event": "eval", "step": number, "heldout_loss": loss, "rows": 8}


def points(path: str) -> list[tuple[float, float]]:
    pairs = re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)
    return [(float(x), float(y)) for x, y in pairs]


def test_curves_match_the_ticks(parse):
    events = [evaluation(0, 4.0), step(50, 3.0), step(100, 2.0), evaluation(100, 1.0)]
    chart = parse(loss_chart("Stage", events))
    labels = {
        text.text: (float(text.attributes["x"]), float(text.attributes["y"]))
        for text in chart.all("text")
        if text.attributes.get("class") is None
    }
    (train,) = (points(p.attributes["d"]) for p in chart.all("path", of_class="train"))
    (heldout,) = (points(p.attributes["d"]) for p in chart.all("path", of_class="heldout"))
    assert train[0][1] == pytest.approx(labels["3"][1], abs=0.2)
    assert [x for x, _ in heldout] == pytest.approx([labels["0"][0], labels["100"][0]], abs=30)
    assert heldout[0][1] == pytest.approx(labels["4"][1], abs=0.2)
    assert heldout[1][1] == pytest.approx(labels["1"][1], abs=0.2)
    assert heldout[1][0] == train[-1][0]


def test_ends_of_the_heldout_curve_are_labelled(parse):
    events = [evaluation(0, 1.0312), evaluation(50, 0.9), evaluation(100, 0.74)]
    chart = parse(loss_chart("Stage", events))
    assert [t.text for t in chart.all("text", of_class="value")] == ["1.031", "0.7400"]
    assert "1.031 → 0.7400 (−28.2 %) from step 0 to 100" in chart.all("figcaption")[0].text
    assert "1.031" in chart.all("svg")[0].attributes["aria-label"]
    assert heldout_ends(events) == (1.0312, 0.74)


def test_table_has_the_loss_of_every_evaluation(parse):
    events = [evaluation(0, 5.0), evaluation(1500, 0.0091234)]
    rows = parse(loss_chart("Stage", events)).all("tbody")[0].all("tr")
    assert [row.text for row in rows] == ["0 5.000", "1,500 0.009123"]


def test_spikes_leave_the_axis_and_are_counted(parse):
    events = [step(i, 1 + 0.1 * math.sin(i)) for i in range(1, 201)]
    events[3]["loss"] = 900.0
    chart = parse(loss_chart("Stage", [*events, evaluation(0, 1.2), evaluation(200, 0.9)]))
    assert "Outside the axis: 1 of 200 training losses." in chart.text
    inner = chart.all("svg")[1]  # the one that clips
    assert float(inner.attributes["height"]) == axes.HEIGHT - axes.BOTTOM
    circles = [float(c.attributes["cy"]) for c in chart.all("circle")]
    assert circles[1] - circles[0] > 100  # the spike did not press the held-out curve flat


def test_non_finite_losses_are_counted(parse):
    events = [evaluation(0, 1.0), step(1, math.inf), step(2, 0.5), evaluation(2, math.nan)]
    chart = parse(loss_chart("Stage", events))
    assert "Not finite and not drawn: 2 of 4 losses." in chart.text
    assert "1.000 → nan (–)" in chart.text
    assert len(chart.all("circle")) == 1


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([], "No evaluation on held-out rows."),
        ([step(1, 2.0)], "No evaluation on held-out rows."),
        ([step(1, 2.0), evaluation(2, None)], "No evaluation on held-out rows."),
        ([evaluation(0, 2.0)], "Held-out loss 2.000 at step 0."),
        ([evaluation(0, 0.0), evaluation(9, 0.0)], "0.000 → 0.000 (–)"),
    ],
)
def test_few_points(parse, events, words):
    chart = parse(loss_chart("Stage", events))
    assert words in chart.text
    assert bool(chart.all("svg")) == bool(events)


def test_a_long_run_is_thinned_and_keeps_its_extremes(parse):
    events = [step(i, 1.0) for i in range(1, 200_001)]
    events[77_777]["loss"] = 1.5
    events[100_000]["loss"] = 0.5
    events += [evaluation(0, 1.6), evaluation(200_000, 0.4)]
    chart = parse(loss_chart("Stage", events))
    (train,) = (points(p.attributes["d"]) for p in chart.all("path", of_class="train"))
    assert len(train) <= charts.MAX_POINTS
    heights = sorted({y for _, y in train})
    assert len(heights) == 3  # the spike, the level, the dip
    assert [x for x, _ in train] == sorted(x for x, _ in train)


losses = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=60, deadline=None)
@given(train=st.lists(losses, max_size=30), heldout=st.lists(losses, max_size=5))
def test_any_losses_give_a_valid_chart(parse, train, heldout):
    events = [step(i + 1, loss) for i, loss in enumerate(train)]
    events += [evaluation(10 * i, loss) for i, loss in enumerate(heldout)]
    chart = parse(loss_chart("Stage", events))
    for circle in chart.all("circle"):
        assert 0 <= float(circle.attributes["cx"]) <= axes.WIDTH
        assert 0 <= float(circle.attributes["cy"]) <= axes.HEIGHT
    for path in chart.all("path"):
        assert "nan" not in path.attributes["d"]
        assert "inf" not in path.attributes["d"]


@given(
    low=st.floats(-1e6, 1e6),
    span=st.floats(1e-3, 1e6),
)
def test_ticks_are_round_few_and_distinct(low, span):
    values = ticks(low, low + span)
    assert 2 <= len(values) <= 6
    assert all(low - 1e-6 * span <= v <= low + span * (1 + 1e-6) for v in values)
    labels = tick_labels(values)
    assert len(set(labels)) == len(labels)
    read = [float(label.replace(",", "").replace("−", "-")) for label in labels]
    assert read == pytest.approx(values, rel=1e-9, abs=1e-9)


def test_labels_of_small_values_fit_beside_the_axis():
    assert tick_labels(ticks(0, 5.3e-5)) == ["0", "2e−5", "4e−5"]
    assert tick_labels(ticks(0, 2.1e-3)) == ["0", "5e−4", "1e−3", "1.5e−3", "2e−3"]
    assert tick_labels(ticks(0, 0.011)) == ["0.000", "0.005", "0.010"]
