"""What robots.txt, tdmrep.json and the headers of a response refuse."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict
from yarl import URL

from pipelines.ingest.web.optout import DEFAULT_RULES, RULES, Rule, header_refusal
from pipelines.ingest.web.robots import (
    MAX_BYTES,
    RobotsTxt,
    own_rules,
    reservation,
    reservations,
    text_of,
)

OURS = ("vlv-ingest", "my-crawler")


def refusal(robots: str, path: str) -> str | None:
    return RobotsTxt(own_rules(robots, OURS)).refusal(URL(f"http://a.test{path}", encoded=True))


@pytest.mark.parametrize(
    ("robots", "rules"),
    [
        ("", ""),
        ("User-agent: *\nDisallow: /a", "Disallow: /a"),
        ("User-agent: other\nDisallow: /a", ""),
        ("User-agent: *\nDisallow: /a\n\nUser-agent: VLV-Ingest\nDisallow: /b", "Disallow: /b"),
        ("user-agent: vlv-ingest/2.1 (x)\nDisallow: /b\nUser-agent: *\nDisallow: /", "Disallow: /b"),
        ("User-agent: vlv\nDisallow: /a", ""),  # another crawler
        ("User-agent: vlv-ingest-images\nDisallow: /a", ""),
        # A group for our agent without a rule: it may fetch everything.
        ("User-agent: *\nDisallow: /\nUser-agent: vlv-ingest\nDisallow:", "Disallow:"),
        ("User-agent: *\nDisallow: /\nUser-agent: vlv-ingest", ""),
        # Groups of one crawler are one, and so are those of its two names.
        (
            "User-agent: vlv-ingest\nDisallow: /a\nUser-agent: x\nDisallow: /x\n"
            "User-agent: my-crawler\nDisallow: /b",
            "Disallow: /a\nDisallow: /b",
        ),
        ("User-agent: x\nUser-agent: vlv-ingest\nDisallow: /a", "Disallow: /a"),
        # Records that are no rules end no group: RFC 9309 section 2.2.4.
        ("User-agent: x\nSitemap: /s\nCrawl-delay: 3\nUser-agent: *\nDisallow: /a", "Disallow: /a"),
        ("Disallow: /a\nUser-agent: *\nDisallow: /b", "Disallow: /b"),
        ("\ufeffUser-agent: *\r\nDisallow: /a # all of it\r\n", "Disallow: /a"),
        ("User-agent *\rDisalow /a", "Disalow /a"),
        ("User-agent: *\nDisallow: /a\u2028User-agent: vlv-ingest", "Disallow: /a%E2%80%A8User-agent: vlv-ingest"),
        ("User-agent: *\nContent-Usage: /a train-ai=n", "Content-Usage: /a train-ai=n"),
        ("<!doctype html><title>User-agent: *</title>\n<p>Disallow: /</p>", ""),
        ("\x00\x01\x02\udcff" * 50, ""),
    ],
)  # fmt: skip
def test_the_group_of_this_crawler(robots: str, rules: str) -> None:
    assert own_rules(text_of(robots.encode("utf-8", "replace")), OURS) == rules


@pytest.mark.parametrize(
    ("rules", "path", "found"),
    [
        ("Disallow: /a", "/a/b.jpg", "Disallow: /a"),
        ("Disallow: /a", "/A/b.jpg", None),
        ("Disallow:", "/a", None),
        ("Disallow: /", "/", "Disallow: /"),
        ("Disallow: /", "/robots.txt", None),  # RFC 9309 section 2.2.2
        ("Disallow: /a\nAllow: /a/b", "/a/b.jpg", None),  # the longest match
        ("Allow: /a\nDisallow: /a/b", "/a/b.jpg", "Disallow: /a/b"),
        ("Disallow: /a\nAllow: /a", "/a", None),  # equal: allowed
        ("Disallow: *.gif$", "/x/y.gif", "Disallow: *.gif$"),
        ("Disallow: *.gif$", "/x/y.gif?z", None),
        ("Disallow: /*/thumbs/", "/x/y/thumbs/z.jpg", "Disallow: /*/thumbs/"),
        ("Disallow: /a?size=", "/a?size=3", "Disallow: /a?size="),
        # Section 2.2.2: both in their percent-encoded form, unless it is of a reserved character.
        ("Disallow: /foo/bar/ツ", "/foo/bar/%E3%83%84", "Disallow: /foo/bar/ツ"),
        ("Disallow: /foo/bar/%e3%83%84", "/foo/bar/%E3%83%84", "Disallow: /foo/bar/%e3%83%84"),
        ("Disallow: /foo/bar/%62%61%7A", "/foo/bar/baz", "Disallow: /foo/bar/%62%61%7A"),
        ("Disallow: /a%2Fb", "/a/b", None),
        ("Disallow: /a", "//a", None),
        ("Disallow: //a", "//a/b", "Disallow: //a"),
        ("Disallow: /a\nDisallow: /a/b/c\nDisallow: /a/b", "/a/b/x", "Disallow: /a/b"),
        ("".join(f"Disallow: /{i:03d}{'x' * 9}\n" for i in range(200)) + "Disallow: /z", "/z", "Disallow: …"),
    ],
)  # fmt: skip
def test_paths(rules: str, path: str, found: str | None) -> None:
    assert refusal(f"User-agent: *\n{rules}", path) == found


names = st.sampled_from(["*", "vlv-ingest", "My-Crawler/3", "googlebot", "vlv", ""])
group = st.tuples(st.lists(names, min_size=1, max_size=3), st.lists(st.integers(0, 9), max_size=3))
noise = st.sampled_from(["", "# x", "Sitemap: /x", "Crawl-delay: 9", "<html>", "Host: a"])


@given(st.lists(group, max_size=5), st.data())
def test_groups_like_a_plain_model(groups: list[tuple[list[str], list[int]]], data: st.DataObject) -> None:  # fmt: skip
    lines, wanted = [], {"*": [], "ours": []}  # type: ignore[var-annotated]
    open_names: list[str] = []
    for agents, numbers in groups:
        open_names += agents  # those of a group without rules belong to the next one
        lines += [line for name in agents for line in (f"User-agent: {name}", data.draw(noise))]
        for number in numbers:
            lines += [f"Disallow: /{number}", data.draw(noise)]
        if numbers:
            for kind, members in (("*", {"*"}), ("ours", {"vlv-ingest", "My-Crawler/3"})):
                wanted[kind] += numbers if members & set(open_names) else []
            open_names = []
    is_named = any(name in ("vlv-ingest", "My-Crawler/3") for names, _ in groups for name in names)
    expected = wanted["ours" if is_named else "*"]
    found = own_rules("\n".join(lines), OURS).split("\n")
    assert [line for line in found if line] == [f"Disallow: /{number}" for number in expected]


@given(st.binary(max_size=300), st.text(max_size=50))
def test_no_content_is_an_error(content: bytes, path: str) -> None:
    target = URL("http://a.test").with_path("/" + path.replace("\ud800", ""))
    for head in (b"", b"User-agent: *\nDisallow: ", b"User-agent: *\nContent-Usage: "):
        rules = RobotsTxt(own_rules(text_of(head + content), OURS))
        rules.refusal(target)
        rules.usage_refusal(target)
    for head in (b"", b"[", b'[{"location": "'):
        reservation(reservations(head + content), target)


def test_only_the_first_500_kib_count() -> None:
    """The line that the limit cuts would refuse more than its owner wrote."""
    filler = b"#" * (MAX_BYTES - 40) + b"\n"
    content = filler + b"User-agent: *\nDisallow: /a\nDisallow: /private/x\n"
    rules = RobotsTxt(own_rules(text_of(content[:MAX_BYTES]), OURS))
    assert rules.refusal(URL("http://a.test/a")) == "Disallow: /a"
    assert rules.refusal(URL("http://a.test/private/y")) is None


def test_many_groups_and_rules_are_parsed() -> None:
    """A parser that copies each rule to each group would take tens of gigabytes."""
    agents = "".join(f"User-agent: {i}\n" for i in range(12_000))
    rules = "".join(f"Disallow: /{i}*x\n" for i in range(12_000))
    text = own_rules(agents + "User-agent: *\n" + rules, OURS)
    assert refusal(f"User-agent: *\n{text}", "/11999/x.jpg") == "Disallow: …"
    assert reservations(b"[" * 100_000) == []


# ---------------------------------------------------------------------------------- tdmrep.json


@pytest.mark.parametrize(
    ("entries", "path", "found"),
    [
        ([{"location": "/", "tdm-reservation": 1}], "/a.jpg", "/"),
        ({"location": "/", "tdm-reservation": 1}, "/a.jpg", "/"),
        ([{"location": "/", "tdm-reservation": 0}], "/a.jpg", None),
        ([{"location": "/", "tdm-reservation": "1", "tdm-policy": "https://x"}], "/a.jpg", "/"),
        ([{"location": "/b/*.jpg$", "tdm-reservation": 1}], "/b/c/a.jpg", "/b/*.jpg$"),
        # The first match counts, not the longest.
        ([{"location": "/b/", "tdm-reservation": 0}, {"location": "/b/c", "tdm-reservation": 1}], "/b/c", None),
        ([{"location": "/b/", "tdm-reservation": 1}, {"location": "/", "tdm-reservation": 0}], "/b/c", "/b/"),
        ([{"location": "/path/foo-%24", "tdm-reservation": 1}], "/path/foo-$", "/path/foo-%24"),
        ([{"location": "/a#b", "tdm-reservation": 1}], "/a", None),
        ([{"location": "/x\nAllow: /", "tdm-reservation": 1}], "/a", None),
        ([{"location": 3, "tdm-reservation": 1}, None, "x", {"tdm-reservation": 1}, {"location": "/"}], "/a", None),
        ([{"location": "/", "tdm-reservation": 2}], "/a", None),
        ("nothing", "/a", None),
    ],
)  # fmt: skip
def test_reservations(entries: object, path: str, found: str | None) -> None:
    content = b"\xef\xbb\xbf" + json.dumps(entries).encode()
    assert reservation(reservations(content), URL(f"http://a.test{path}", encoded=True)) == found


# ---------------------------------------------------------------------------------- Content-Usage


@pytest.mark.parametrize(
    ("lines", "path", "found"),
    [
        (["/ train-ai=n"], "/a", "Content-Usage: / train-ai=n"),
        (["train-ai=n"], "/a", "Content-Usage: / train-ai=n"),  # of an early draft
        (["/ train-ai=n", "/ok/ train-ai=y"], "/ok/a", None),
        (["/ train-ai=y", "/no/ train-ai=n"], "/no/a", "Content-Usage: /no/ train-ai=n"),
        (["/ train-ai=y", "/ train-ai=n"], "/a", "Content-Usage: / train-ai=n"),
        (["/x train-ai=n"], "/a", None),
    ],
)
def test_content_usage_of_robots_txt(lines: list[str], path: str, found: str | None) -> None:
    robots = "\n".join(["User-agent: *", "Allow: /", *(f"Content-Usage: {x}" for x in lines)])
    rules = RobotsTxt(own_rules(robots, OURS))
    assert rules.refusal(URL(f"http://a.test{path}")) is None
    assert rules.usage_refusal(URL(f"http://a.test{path}")) == found


@pytest.mark.parametrize(
    ("headers", "rules", "found"),
    [
        ({"X-Robots-Tag": "noml"}, DEFAULT_RULES, "X-Robots-Tag: noml"),
        ({"X-Robots-Tag": "noml"}, ("x_robots_tag",), None),
        ({"X-Robots-Tag": "noai"}, ("noml",), None),
        ({"x-robots-tag": "googlebot: noml, my-crawler: noml"}, ("noml",), "X-Robots-Tag: noml"),
        ({"TDM-Reservation": " 1 "}, DEFAULT_RULES, "tdm-reservation: 1"),
        ({"tdm-reservation": "0"}, RULES, None),
        ({"tdm-reservation": "1"}, ("x_robots_tag",), None),
        ({"Content-Usage": "train-ai=n"}, DEFAULT_RULES, None),
        ({"Content-Usage": "train-ai=n"}, RULES, "Content-Usage: train-ai=n"),
        ({"Content-Usage": "search=n, train-ai=y;x=1, bots=n"}, RULES, None),
        ({"Content-Usage": "tdm=n"}, RULES, "Content-Usage: tdm=n"),
        ({"Content-Usage": "ai=y, genai=n"}, RULES, "Content-Usage: genai=n"),
        ({"Content-Usage": "train-ai=n, train-ai=y"}, RULES, None),  # the last one counts
        ({"Content-Usage": 'train-ai="n", (, tdm'}, RULES, None),
        ({"X-Robots-Tag": "noai", "tdm-reservation": "1"}, (), None),
    ],
)
def test_headers(headers: dict[str, str], rules: tuple[Rule, ...], found: str | None) -> None:
    assert header_refusal(CIMultiDict(headers), rules, OURS) == found
