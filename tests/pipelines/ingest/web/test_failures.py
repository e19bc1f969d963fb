"""Checks of URLs, addresses, headers, bodies and errors, without a network."""

from __future__ import annotations

import email.utils
import gzip
import ipaddress
import socket
import time
import zlib
from types import SimpleNamespace

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.ingest.web.addresses import is_nonstandard_ipv4, is_public
from pipelines.ingest.web.body import check_image
from pipelines.ingest.web.content_encodings import decompress
from pipelines.ingest.web.failures import (
    MESSAGE_LENGTH,
    DownloadError,
    classify,
    clean,
    http_class,
    parse_url,
    redirect_target,
    retry_after,
)
from pipelines.ingest.web.optout import AGENT, OPT_OUT, agent_of, opted_out
from pipelines.pictures.formats import image_format

# ------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.100.100.200",
        "168.63.129.16",
        "0.0.0.0",
        "255.255.255.255",
        "224.0.0.1",
        "198.18.0.1",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "fe80::1%eth0",
        "fd00:ec2::254",
        "ff02::1",
        "2002:7f00:1::",  # 6to4 of 127.0.0.1
        "64:ff9b::10.0.0.1",  # NAT64 of 10.0.0.1
        "2001:0:7f00:1::",  # Teredo
        "2001:db8::1",
        "192.0.0.192",  # another cloud's metadata service
        "192.88.99.1",
        "fec0::1",
        "3fff::1",
        "64:ff9b:1::7f00:1",
    ],
)
def test_private_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"],
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


@settings(deadline=None)
@given(st.ip_addresses(v=4))
def test_embedded_private_addresses_are_not_public(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    mapped = ipaddress.IPv6Address((0xFFFF << 32) | number)
    nat64 = ipaddress.IPv6Address((0x64FF9B << 96) | number)
    six_to_four = ipaddress.IPv6Address((0x2002 << 112) | (number << 80))
    for wrapped in (mapped, nat64, six_to_four):
        assert is_public(str(address)) or not is_public(str(wrapped))


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "0177.0.0.1", "127.1", "010.8.8.8"])
def test_nonstandard_ipv4_spellings_are_found(host: str) -> None:
    assert is_nonstandard_ipv4(host)
    with pytest.raises(DownloadError) as refused:
        parse_url(f"http://{host}/x")
    assert refused.value.kind == "blocked_address"


@pytest.mark.parametrize("host", ["8.8.8.8", "example.org", "1.2.3.4.example", "cafe", "::1"])
def test_plain_hosts_are_not_nonstandard_ipv4(host: str) -> None:
    assert not is_nonstandard_ipv4(host)


# -------------------------------------------------------------------------------------- opt-outs


@pytest.mark.parametrize(
    ("headers", "directive"),
    [
        (["noai"], "noai"),
        (["NoImageAI , nofollow"], "noimageai"),
        (["nofollow", "noindex"], "noindex"),
        (["*: noimageindex"], "noimageindex"),
        ([f"{AGENT}: noai"], "noai"),
        ([f"googlebot: all, {AGENT.upper()}: nofollow, noai"], "noai"),
        (["none"], "none"),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], "noai"),
        (["max-snippet: -1, noindex"], "noindex"),
        (["unavailable_after: Wed, 25 Jun 2030 15:00:00 GMT, noai"], "noai"),
        (["noindex; nofollow"], "noindex"),
        (["nofollow noai"], "noai"),
        (['"noai"'], "noai"),
        (["max-snippet:-1 noai"], "noai"),
        ([f"googlebot: index, {AGENT}/1.0: noai"], "noai"),
        (["googlebot: index", "noai"], "noai"),
        (["max-image-preview: none"], None),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST"], None),
        (["googlebot: nofollow; noai"], None),
        ([], None),
        (["index, follow"], None),
        (["googlebot: noindex, noai"], None),
        (["noaifoo, no-ai"], None),
        ([""], None),
    ],
)
def test_opt_out_headers(headers: list[str], directive: str | None) -> None:
    assert opted_out(headers) == directive


def test_a_custom_user_agent_is_a_name_for_opt_outs() -> None:
    mine = agent_of("My-Crawler/2.1 (+https://example.org)")
    assert mine == "my-crawler"
    assert agent_of(" ") == ""
    for name in (AGENT, "MY-Crawler"):
        assert opted_out([f"{name}: noai"], (AGENT, mine)) == "noai"
    assert opted_out(["my: noai"], (AGENT, mine)) is None


@settings(deadline=None)
@given(st.lists(st.text(max_size=30)), st.sampled_from(sorted(OPT_OUT)), st.integers(0, 9))
def test_no_other_header_hides_an_opt_out(noise: list[str], directive: str, place: int) -> None:
    headers = [*noise[:place], f" {directive.upper()} ", *noise[place:]]
    assert opted_out(headers) in OPT_OUT


# ------------------------------------------------------------------------------- URLs and headers


_BAD_URLS = [
    "ftp://a/b",
    "file:///etc/passwd",
    "data:image/png;base64,",
    "x",
    "",
    "http://",
    "//a/b",
]
_BAD_URLS += ["http://[::1", "http://a:99999/", "http://" + "a" * 9000, "http://\0/"]


@pytest.mark.parametrize("url", _BAD_URLS)
def test_bad_urls(url: str) -> None:
    with pytest.raises(DownloadError) as refused:
        parse_url(url)
    assert refused.value.kind == "bad_url"


@settings(deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_a_url_or_a_classified_failure(text: str) -> None:
    for url in (text, f"http://{text}", f"https://a.org/{text}"):
        try:
            kind = parse_url(url).scheme
        except DownloadError as refused:
            kind = refused.kind
        assert kind in ("http", "https", "bad_url", "blocked_address")


def test_quoted_urls_keep_their_spelling() -> None:
    url = "https://cdn.org/a%2Fb%7E.jpg?sig=x%2By%3D%3d&e=1+2"
    assert str(parse_url(url)) == url
    assert str(parse_url("http://a.org/ü x.jpg")) == "http://a.org/%C3%BC%20x.jpg"


def test_redirects_keep_their_spelling_or_fail() -> None:
    page = parse_url("http://a.org/b/c?d")
    signed = "https://cdn.org/x%7E%2Fy?sig=a%2Bb%3D&e=1+2"
    leads = {signed: signed, "x%7E": "http://a.org/b/x%7E", "//c.org/ü": "http://c.org/%C3%BC"}
    leads |= {"/caf\udce9": "http://a.org/caf%E9"}  # Latin-1, as browsers follow it
    leads |= {"?e": "http://a.org/b/c?e", "http:/x": "http://a.org/x", "../../..": "http://a.org/"}
    assert {location: str(redirect_target(page, location)) for location in leads} == leads
    bad = ["http://a:99999/", "http://[::1/", "http://a:b/", "file:///etc/passwd", "http://a\\@b/"]
    for location in bad:
        with pytest.raises(DownloadError) as refused:
            redirect_target(page, location)
        assert refused.value.kind == "bad_url"
    with pytest.raises(DownloadError, match="odd spelling"):
        redirect_target(page, "//2130706433/")


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_location_is_a_url_or_a_classified_failure(text: str) -> None:
    for location in (text, f"//{text}", f"http://{text}"):
        try:
            kind = redirect_target(parse_url("http://a.org/b"), location).scheme
        except DownloadError as refused:
            kind = refused.kind
        assert kind in ("http", "https", "bad_url", "blocked_address")


def test_status_classes() -> None:
    codes = {404: "http_404", 410: "http_410", 429: "http_429", 403: "http_4xx", 503: "http_5xx"}
    assert {code: http_class(code) for code in codes} == codes
    assert http_class(204) == http_class(304) == http_class(700) == "http_other"


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after("7") == 7
    assert retry_after(None) == retry_after("soon") == retry_after("-3") == 0
    for odd in (
        "",
        "9" * 400,
        "inf",
        "1.5",
        "Wed, 99 Foo 99999 99:99:99 +9999",
        "21 Oct 1 0:0 -0000",
    ):
        assert retry_after(odd) in (0, float("inf"))
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 55 < retry_after(in_a_minute) <= 60
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


@settings(deadline=None)
@given(st.text())
def test_messages_are_clean_and_short(text: str) -> None:
    message = clean(text)
    assert len(message) <= MESSAGE_LENGTH
    assert message.isprintable()


def test_unknown_errors_keep_their_name() -> None:
    unknown_zone = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    connection = SimpleNamespace(host="::1%25lo", port=80, ssl=False, is_ssl=False)
    zone = aiohttp.ClientConnectorError(connection, unknown_zone)  # type: ignore[arg-type]
    assert classify(zone).kind == "dns"
    failure = classify(KeyError("x"))
    assert (failure.kind, failure.transient) == ("other", False)
    assert "KeyError" in str(failure)


# ---------------------------------------------------------------------------------------- bodies


@pytest.mark.parametrize("wbits", [31, 15, -15])  # gzip, deflate, deflate without a header
def test_bodies_are_decompressed_within_the_limit(wbits: int) -> None:
    packer = zlib.compressobj(wbits=wbits)
    body = packer.compress(b"x" * 1000) + packer.flush()
    assert decompress(body, 1000) == b"x" * 1000
    with pytest.raises(DownloadError) as refused:
        decompress(body, 999)
    assert refused.value.kind == "too_large"


def test_all_members_of_a_gzip_are_decompressed() -> None:
    body = gzip.compress(b"x" * 600) + gzip.compress(b"y" * 400)
    assert decompress(body, 1000) == b"x" * 600 + b"y" * 400
    with pytest.raises(DownloadError, match="more than 999 bytes"):
        decompress(body, 999)
    with pytest.raises(DownloadError, match="members"):  # their number is a way to keep us busy
        decompress(gzip.compress(b"") * 1000, 1000)


def test_damaged_compression_is_a_failure() -> None:
    for body in (b"not compressed", gzip.compress(b"x" * 99)[:-12] + bytes(12)):
        with pytest.raises(DownloadError, match="cannot decompress"):
            decompress(body, 1000)


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", b"\x1f\x8b\x08", b"\x78\x9c", b"\x0b"]))
def test_any_body_is_decompressed_or_refused(body: bytes, start: bytes) -> None:
    try:
        found = f"{len(decompress(start + body, 500)) <= 500}"
    except DownloadError as refused:
        found = refused.kind
    assert found in ("True", "encoding", "too_large")


def test_bodies_that_are_not_images() -> None:
    for head in (b"<!doctype html>", b"", b"{}"):
        with pytest.raises(DownloadError) as refused:
            check_image(head, "text/html")
        assert refused.value.kind == "not_an_image"
    check_image(b"\xff\xd8\xff\xe0", "text/html")  # bytes are believed before the header
    check_image(b"some odd format", "image/x-tga")  # and decoding has the last word


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_have_a_format_or_none(head: bytes) -> None:
    assert image_format(head) is None or image_format(head).isupper()  # type: ignore[union-attr]
