"""The page of an evaluation, also with names and captions that could break it."""

import io

import numpy as np
from PIL import Image

from pipelines.evaluate.comparing import compare
from pipelines.evaluate.config import MeasureConfig
from pipelines.evaluate.figures import Figure, Scores, mean_figure
from pipelines.evaluate.page import EvaluationReport, render
from pipelines.evaluate.showing import Extremes, Shown

LONG = "captioner-" + "of-a-very-long-name-" * 4 + "<script>"
MEASURE = MeasureConfig(resamples=100)


def scored(subject: str, shift: float) -> Figure:
    values = np.random.default_rng(0).normal(25 + shift, 1, 50)
    scores = Scores.of(np.arange(50), values)
    return mean_figure(subject, "clip-text", "CLIP score", scores, "higher", 0, 100, {})


def fid(subject: str, guidance: float, value: float) -> Figure:
    return Figure(subject, f"guidance={guidance:g}/inception", "FID", value, None, None, "all rows",
                  50, "lower", "k")  # fmt: skip


def report() -> EvaluationReport:
    one, two = scored("plain", 0), scored(LONG, 1)
    comparison = compare(one, two, MEASURE)
    assert comparison is not None
    file = io.BytesIO()
    Image.new("RGB", (300, 200), "teal").save(file, "PNG")
    shown = Shown(2**62, file.getvalue(), ("word " * 200, "x" * 300), (None, None), (24.0, -3.25))
    curve = [
        fid(name, g, v) for name in ("plain", LONG) for g, v in ((1, 11.5), (2, 6.6), (4, 9.9))
    ]
    return EvaluationReport(
        subjects=[("plain", "/data/plain"), (LONG, "/data/long")],
        figures=[one, two, *curve],
        comparisons=[comparison],
        subsamples=["FID of 25 images: b is lower than a in 9 of 10 seeded subsamples"],
        gallery=[Extremes(comparison, [shown] * 3, [])],
        settings={"input": ["/data/" + "deep/" * 40, "b"], "measure.seed": 0, "clip.weights": None},
    )


def test_the_page_says_which_is_better_and_stays_text(parse) -> None:
    page = render(report())
    document = parse(page)
    assert document.text.count("is better: 100 % of 50 pairs, interval 93–100 %") == 1
    assert "Least: plain 6.6 at 2" in document.text
    assert "−3.25" in document.text
    assert "On no image." in document.text
    assert "<script" not in page


def test_nothing_sticks_out_of_a_window(overflowing) -> None:
    assert overflowing([render(report())], (320, 900)) == []
