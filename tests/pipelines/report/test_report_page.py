"""The report as a document: complete, escaped and self-contained."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.demo.page import DemoReport, render, write_report
from pipelines.ingest.page import IngestReport, RunLine, Sample
from pipelines.ingest.page import render as render_ingest
from pipelines.recaption.page import render as render_captions
from pipelines.report.figures import duration, percent
from pipelines.report.gallery import GalleryItem, compare_words
from pipelines.report.html import environment
from tests.pipelines.report.pages import macro

HOSTILE = """</style></title><script>alert("1")</script>'"><img src=https://a.example/x>&amp;\0"""

gallery = macro("gallery", "gallery")
status_table = macro("parts", "status_table")


def test_every_figure_is_shown(report, parse):
    text = parse(render(report)).text
    figures = ["12,960", "12,988", "99.8", "0.1", "17", "12", "8", "5", "3", "95", "96", "16"]
    figures += ["1.031", "0.7421", "−28.0", "5.548", "0.4119", "−92.6", "12,960"]
    figures += ["14 s", "2 min 51 s", "1 h 02 min", "1 h 05 min", "2.60.0", "2.13.0"]
    for figure in [*figures, *report.ingest, *report.recaption, *report.notes, *report.versions]:
        assert re.search(rf"(?<![\w.,]){re.escape(figure)}(?!\w)", text), f"{figure} is not shown"


def test_statuses_are_sorted_ok_first_and_summed_by_kind(report, parse):
    rows = parse(status_table(report.ingest, "Rows by status")).all("tr")
    cells = [[cell.text for cell in (*row.all("th"), *row.all("td"))] for row in rows]
    assert [line[0].split()[0] for line in cells[1:]] == [
        "ok",
        "filtered",
        "filtered:short_side",
        "download",
        "download:http_404",
        "download:timeout",
        "decode",
        "decode:truncated",
        "all",
    ]
    assert " ".join(line[1] for line in cells[1:]) == "12,960 3 3 17 12 5 8 8 12,988"


def test_bars_are_as_wide_as_their_share(parse):
    spans = parse(status_table({"ok": 3, "duplicate": 1}, "x")).all("span")
    assert [span.attributes["style"] for span in spans] == ["width:75.00%", "width:25.00%"]


def test_an_unknown_status_is_shown_last(parse):
    table = parse(status_table({"quarantined:new": 2, "duplicate": 1, "ok": 5}, "x"))
    kinds = [body.all("th")[0].text.split()[0] for body in table.all("tbody")]
    assert kinds == ["ok", "duplicate", "quarantined"]


def test_hostile_text_stays_text(report, parse):
    item = GalleryItem(1, report.gallery[0].original, None, HOSTILE, HOSTILE + " x", HOSTILE)
    hostile = DemoReport(
        HOSTILE,
        [HOSTILE],
        {HOSTILE: 1},
        {HOSTILE: []},
        {HOSTILE: 1},
        {},
        [item],
        {HOSTILE: 1.0},
        {HOSTILE: HOSTILE},
    )
    document = parse(render(hostile))
    assert not document.all("script")
    assert len(document.all("img")) == 1  # the original
    assert len(document.all("style")) == 1
    shown = HOSTILE.replace("\0", "�")
    for place in ("h1", "title", "h3", "dd", "aside"):
        assert shown in document.all(place)[0].text
    assert document.all("img")[0].attributes["alt"] == f"Original: {shown} x"


def test_hostile_rows_stay_text(report, parse):
    """Addresses are not links, so `javascript:` in one is text too."""
    address = f"javascript:alert(1)//{HOSTILE}"
    image = report.gallery[0].original
    samples = [
        Sample(1, address, HOSTILE, "ok", image, HOSTILE),
        Sample(2, address, HOSTILE, HOSTILE, None, HOSTILE),
    ]
    run = RunLine(1, "2026-11-30 10:00", 60.0, 1, 1, 0, {HOSTILE: 1})
    hosts = [(HOSTILE, 1, 1, HOSTILE)]
    document = parse(render_ingest(IngestReport(HOSTILE, {HOSTILE: 1}, [run], samples, hosts)))
    assert not document.all("script")
    assert len(document.all("img")) == len(document.all("style")) == 1
    shown = address.replace("\0", "�")
    assert document.all("img")[0].attributes["alt"] == f"The image of {shown}"
    assert shown in [cell.text for cell in document.all("th")]
    assert {a.attributes["href"] for a in document.all("a")} == {"#rows", "#runs"}


@given(st.text())
def test_any_text_survives_as_child_and_attribute(parse, text):
    template = environment().from_string('<p title="{{ text }}">{{ text }}</p>')
    element = parse(template.render(text=text)).children[0]
    # Lone surrogates and NUL cannot be written; white space is the reader's to keep.
    expected = text.encode("utf-8", "replace").decode().replace("\0", "�")
    assert "".join(map(str, element.children)) == expected
    assert element.attributes["title"] == expected


def test_the_page_loads_and_runs_nothing(report, parse):
    document = parse(render(report))
    policy = [m for m in document.all("meta") if "http-equiv" in m.attributes]
    assert policy[0].attributes["content"].startswith("default-src 'none'")
    for name in ("img", "a", "link", "script", "iframe", "object", "use", "image"):
        for element in document.all(name):
            target = element.attributes.get("src") or element.attributes.get("href") or ""
            assert target.startswith(("data:", "#")), f"<{name}> reaches for {target}"
    style = document.all("style")[0].text
    assert "url(" not in style
    assert "@import" not in style


def test_links_lead_to_sections(report, parse):
    document = parse(render(report))
    elements = [e for name in ("section", "h2") for e in document.all(name)]
    ids = [e.attributes["id"] for e in elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    targets = {a.attributes["href"] for a in document.all("a")}
    assert targets == {"#ingest", "#training", "#tables", "#run"}
    assert {target[1:] for target in targets} <= set(ids)


def test_an_empty_run_has_a_page(parse):
    text = parse(render(DemoReport("Nothing"))).text
    for words in ("No rows.", "Nothing was trained.", "No images to show.", "No phase was timed."):
        assert words in text


def test_a_run_without_ok_rows_and_evaluations(parse):
    stages = {"stage1": [{"event": "step", "step": 1, "loss": float("nan")}], "stage2": []}
    broken = DemoReport("x", ingest={"download:dns": 7}, stages=stages, seconds={"a": float("nan")})
    text = parse(render(broken)).text
    assert "0 % of 7 rows" in text
    assert "not evaluated before and after" in text
    assert "1 of 1 losses" in text


def test_templates_cannot_print_markup():
    """No template switches the escaping off, and none prints where escaping does not help."""
    from jinja2 import nodes

    templates = sorted((Path(__file__).parents[3] / "pipelines").rglob("*.html.jinja"))
    assert len(templates) >= 8
    for file in templates:
        source = file.read_text("utf-8")
        tree = environment().parse(source)
        assert not {f.name for f in tree.find_all(nodes.Filter)} & {"safe", "urlize", "xmlattr"}, (
            file
        )
        assert not list(tree.find_all(nodes.ScopedEvalContextModifier)), file  # autoescape blocks
        markup = re.sub(r"\{#.*?#\}", "", source, flags=re.DOTALL)
        assert not re.search(r"=\s*\{\{", re.sub(r"\{%.*?%\}", "", markup)), f"{file}: no quotes"
        for name, value in re.findall(r'\s(href|src|style|srcdoc|on\w+)="([^"]*)"', markup):
            known = {"href": "#{{ target }}", "src": "{{ shown.src }}"}
            computed = name == "style" and value.startswith("{{ width(")
            assert computed or value == known.get(name, "data:,") or value == "data:,", (
                file,
                value,
            )


def test_only_our_own_files_are_marked_as_markup():
    package = Path(__file__).parents[3] / "pipelines"
    marking = {f.name: f.read_text().count("Markup(") for f in package.rglob("*.py")}
    assert {name: n for name, n in marking.items() if n} == {"html.py": 2}  # style and script


def test_nothing_overflows(report, proof, caption_report, overflowing):
    long = "x" * 200
    sample = replace(
        caption_report.gallery[0],
        caption=long,
        name=f"shard-00001/{long}.jpg",
        faults=("truncated", "repeated", "non_language", "duplicates"),
    )
    captions = replace(caption_report, gallery=[sample] * 3, searched=[sample])
    item = replace(report.gallery[0], target=long, held_out=True, status=f"download:{long}")
    demo = replace(report, proof=proof, gallery=[item] * 2, seconds={"ingest": 1364.0})
    demo = replace(demo, title=long, ingest={"ok": 12_345_678_901, f"download:{long}": 4})
    ingest = IngestReport(
        long,
        {"ok": 12_345_678_901},
        [RunLine(1, "2026-11-30 10:00", 1364.0, 10**7, 10**9, 10**8, {"filtered:punsafe": 10**8})],
        [Sample(1, f"http://a.org/{long}", long, "ok", report.gallery[0].original, long)],
        [(f"{long}.org", 3, 4, "download:dns")],
    )
    pages = [render(demo), render_captions(captions), render_ingest(ingest)]
    assert overflowing(pages, widths=[400, 900]) == []


def test_the_page_without_images_is_small(report):
    assert len(render(replace(report, gallery=[])).encode()) < 60_000


def test_the_file_is_written_atomically(report, tmp_path):
    write_report(tmp_path / "report.html", report)
    assert (tmp_path / "report.html").read_text("utf-8") == render(report)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


# -------------------------------------------------------------------------------------- gallery


def test_gallery_embeds_the_bytes_of_the_table(report, parse):
    document = parse(gallery(report.gallery))
    images = document.all("img")
    assert len(images) == 9  # the last item has no reconstruction
    assert "no reconstruction" in document.text
    head, _, data = images[1].attributes["src"].partition(",")
    assert head == "data:image/jpeg;base64"
    assert base64.b64decode(data) == report.gallery[0].reconstruction
    assert all(i.attributes["alt"] and i.attributes["class"] == "tiny" for i in images)
    assert (images[0].attributes["width"], images[0].attributes["height"]) == ("64", "64")


def test_gallery_marks_exact_captions_and_wrong_words(report, parse):
    items = parse(gallery(report.gallery)).all("li")
    exact = [bool(item.all("span", of_class="ok")) for item in items]
    assert exact == [True] * 4 + [False]
    assert {mark.text for mark in items[4].all("mark")} == {"small"}


@pytest.mark.parametrize(
    ("caption", "target", "marked"),
    [
        ("a red dot", "a blue dot", ["red"]),
        ("a dot", "a blue dot", []),
        ("a very blue dot", "a blue dot", ["very"]),
        (" a red dot\n", "a blue dot", ["red"]),
        ("a dot", "two men on skis", []),
        ("a dot", None, []),
    ],
)
def test_marked_words(parse, report, caption, target, marked):
    compared = compare_words(caption, target)
    assert [words for words, differ in compared if differ] == marked
    item = replace(report.gallery[0], caption=caption, target=target)
    shown = parse(gallery([item])).all("dd")[0]
    assert [mark.text for mark in shown.all("mark")] == marked
    assert "".join(c if isinstance(c, str) else c.text for c in shown.children) == caption.strip()


@pytest.mark.parametrize(("caption", "words"), [(None, "none"), ("", "empty"), (" \n", "empty")])
def test_a_missing_caption_is_not_blank(parse, report, caption, words):
    shown = parse(gallery([replace(report.gallery[0], caption=caption)])).all("dd")[0]
    assert (shown.text, shown.attributes["class"]) == (words, "none")


def test_gallery_shows_the_picture_of_the_true_caption_beside_the_others(report, parse):
    item = report.gallery[0]
    with_ceiling = replace(item, from_caption=report.gallery[1].original)
    first, second = parse(gallery([with_ceiling, item])).all("li")
    names = [caption.text for caption in first.all("figcaption")]
    assert names == ["original", "reconstruction", "from true caption"]
    _, _, data = first.all("img")[2].attributes["src"].partition(",")
    assert base64.b64decode(data) == report.gallery[1].original
    assert len(second.all("figure")) == 2  # what is not there leaves no gap
    assert "ceiling" not in parse(render(report)).text
    assert "is the ceiling" in parse(render(replace(report, gallery=[with_ceiling]))).text


def test_gallery_tags_held_out_combinations(report, parse):
    items = [replace(report.gallery[0], held_out=held_out) for held_out in (True, False)]
    first, second = parse(gallery(items)).all("li")
    assert [tag.text for tag in first.all("span", of_class="tag")] == ["held-out combination"]
    assert not second.all("span", of_class="tag")


def test_gallery_shows_at_most_the_limit(report, parse):
    document = parse(gallery(report.gallery, limit=2))
    assert len(document.all("li")) == 2
    assert "2 of 5 images." in document.text


def test_undecodable_bytes_show_a_note(parse):
    for content in (b"", b"<svg onload=alert(1)>", b"\x89PNG\r\n\x1a\n", b"BM" + bytes(90)):
        document = parse(gallery([GalleryItem(1, content, None, None, None, "decode:corrupt")]))
        assert not document.all("img")
        assert "decode:corrupt" in document.text


def test_a_damaged_later_frame_does_not_fail_the_page(parse):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    moving = io.BytesIO()
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    content = moving.getvalue()
    for end in range(40, len(content)):  # wherever it was cut
        shown = parse(gallery([GalleryItem(1, content[:end], None, None, None, "ok")]))
        assert shown.all("img") or "not readable" in shown.text


@pytest.mark.parametrize(("kind", "mode"), [("TIFF", "CMYK"), ("JPEG", "RGB"), ("PNG", "RGBA")])
def test_large_and_foreign_pictures_become_small_jpegs(parse, kind, mode):
    buffer = io.BytesIO()
    Image.new(mode, (1600, 900)).save(buffer, kind)
    item = GalleryItem(1, buffer.getvalue(), None, None, None, "ok")
    shown = parse(gallery([item])).all("img")[0].attributes
    small = Image.open(io.BytesIO(base64.b64decode(shown["src"].partition(",")[2])))
    assert (small.format, small.size) == ("JPEG", (480, 270))
    assert "class" not in shown  # only tiny pictures keep square pixels


# ---------------------------------------------------------------------------------------- style


def test_animated_and_turned_pictures_become_still_and_upright(parse):
    frames = [Image.new("RGB", (40, 20), colour) for colour in ("red", "green", "blue")]
    moving, turned = io.BytesIO(), io.BytesIO()
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    frames[0].save(turned, "JPEG", exif=exif)
    for content, size in ((moving, (40, 20)), (turned, (20, 40))):
        item = GalleryItem(1, content.getvalue(), None, None, None, "ok")
        source = parse(gallery([item])).all("img")[0].attributes["src"]
        assert source.startswith("data:image/jpeg;base64,")
        image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert (image.size, image.getexif().get(0x0112)) == (size, None)
        assert image.getpixel((10, 10))[0] > 200


def test_colours_have_contrast_in_light_and_dark():
    style = resources.files("pipelines.report").joinpath("report.css").read_text("utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in style.split("@media")[:2]
    )
    assert set(light) == set(dark)
    least_contrast = {"ink": 7, "soft": 4.5, "accent": 4.5, "train": 2.8}
    least_contrast |= dict.fromkeys(("ok", "filtered", "download", "decode", "other"), 3)
    for colours in (light, dark):
        for ground in ("ground", "panel"):
            for name, least in least_contrast.items():
                assert contrast(colours[name], colours[ground]) >= least, (name, ground)
        assert contrast(colours["ink"], colours["note"]) >= 7
        assert contrast(colours["ink"], colours["mark"]) >= 7


def contrast(one: str, other: str) -> float:
    """Ratio of luminances as WCAG 2 defines it: 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (3599.7, "1 h 00 min"),
    ],
)
def test_durations_never_show_sixty_seconds(seconds, words):
    assert duration(seconds).replace("\u00a0", " ") == words


@pytest.mark.parametrize(
    ("part", "whole", "words"),
    [
        (0, 5, "0 %"),
        (5, 5, "100 %"),
        (1, 10**6, "< 0.1 %"),
        (999_999, 10**6, "99.9 %"),
        (0, 0, "–"),
    ],
)
def test_shares_never_round_to_nothing_or_all(part, whole, words):
    assert percent(part, whole).replace("\u00a0", " ") == words
