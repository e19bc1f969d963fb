"""All spellings of a URL have one address, and URLs that are sent differently have different ones."""

from __future__ import annotations

import re

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.images import urls
from pipelines.images.rows import normalise_url, url_key
from pipelines.images.urls import address_of, addresses_of, canonical_url


@pytest.mark.parametrize(
    ("spellings", "sent"),
    [
        (["http://a.org/sp ace.jpg", "HTTP://A.org:80/sp%20ace.jpg#x"], "http://a.org/sp%20ace.jpg"),
        (["http://a.org/été.jpg", "http://a.org/%c3%A9t%C3%a9.jpg"], "http://a.org/%C3%A9t%C3%A9.jpg"),
        (["https://bücher.example:443/x", "https://xn--bcher-kva.example/x", "https://BÜCHER.example/x"],
         "https://xn--bcher-kva.example/x"),
        (["http://a.org/%7Eme/%41.jpg", "http://a.org/~me/A.jpg"], "http://a.org/~me/A.jpg"),
        (["http://a.org/x/../y/./z", "http://a.org/x/%2e%2E/y/z"], "http://a.org/y/z"),
        (["http://a.org", "http://a.org./?", "http://A.org/#"], "http://a.org/"),
        (["http://a.org/?q=a b&é", "http://a.org/?q=a%20b&%C3%A9", "http://a.org/?q=a+b&%c3%a9"],
         "http://a.org/?q=a+b&%C3%A9"),
        (["http://a.org/%2f%2B", "http://a.org/%2F%2b"], "http://a.org/%2F%2B"),
        (["http://a.org/100%.jpg", "http://a.org/100%25.jpg"], "http://a.org/100%25.jpg"),
    ],
)  # fmt: skip
def test_spellings_of_one_url_have_one_address(spellings: list[str], sent: str) -> None:
    assert {canonical_url(url) for url in spellings} == {sent}
    assert {address_of(url) for url in spellings} == {address_of(sent)} == {url_key(sent)}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("http://a.org/a%2Fb", "http://a.org/a/b"),
        ("http://a.org/a+b", "http://a.org/a%20b"),
        ("http://a.org/?q=a%2Bb", "http://a.org/?q=a+b"),
        ("http://a.org/?q=a%26b", "http://a.org/?q=a&b"),
        ("http://a.org/A", "http://a.org/a"),
        ("http://a.org/a%3Fb", "http://a.org/a?b"),
        ("http://a.org/a%2523", "http://a.org/a%23"),
        ("http://a.org/", "https://a.org/"),
        ("http://a.org:81/", "http://a.org/"),
    ],
)
def test_urls_that_are_sent_differently_have_different_addresses(one: str, other: str) -> None:
    assert address_of(one) != address_of(other)


# Texts with the characters of URLs, and with others.
urlish = st.builds(
    "{}{}".format,
    st.sampled_from(["", "http://", "HTTPS://", "http://h/", "https://a.b?", "http://h/%", "ftp://h:80"]),
    st.text(" \t\n\x00\x1f#?/:@.[]%;=&aA025eE-+'\"\\~é\u3000", max_size=14),
)  # fmt: skip


@given(st.text() | urlish)
def test_any_text_has_an_address_and_canonical_url_is_idempotent(text: str) -> None:
    sent = canonical_url(text)
    assert canonical_url(sent) == sent == normalise_url(sent)
    assert address_of(text) == address_of(sent) == address_of(normalise_url(text))


@given(urlish)
def test_fast_path_agrees_with_parsing(text: str) -> None:
    fast = canonical_url(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(urls, "_PLAIN", re.compile(r"(?!)"))  # matches nothing
        assert canonical_url(text) == fast


def test_addresses_of_a_column() -> None:
    texts = ["http://a.org/x.jpg", "http://a.org/y z.jpg", "not a url", None]
    column = pa.chunked_array([pa.array(texts)])
    hashed = [address_of(text) if text else 0 for text in texts]
    assert addresses_of(column).tolist() == hashed
    keys = pa.chunked_array([pa.array([url_key(text) if text else 0 for text in texts])])
    assert addresses_of(column, keys).tolist() == hashed
