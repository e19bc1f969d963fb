import json
import re

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.images import rows as schemas
from pipelines.images.rows import (
    IMAGE_ROW,
    normalise_url,
    require_columns,
    url_key,
    with_image_feature,
)
from vlv_model.errors import DataError


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("HTTP://Example.COM/a", "http://example.com/a"),
        ("http://example.com:80/a", "http://example.com/a"),
        ("https://example.com:443", "https://example.com/"),
        (" http://example.com/a#top ", "http://example.com/a"),
        ("http://example.com./a", "http://example.com/a"),
    ],
)
def test_spellings_of_one_url_have_one_key(one: str, other: str) -> None:
    assert url_key(one) == url_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("http://example.com/a", "http://example.com/A"),
        ("http://example.com/a", "https://example.com/a"),
        ("http://example.com/?a=1", "http://example.com/?a=2"),
        ("http://example.com:8080/", "http://example.com/"),
        ("http://u@example.com/", "http://example.com/"),
    ],
)
def test_different_urls_have_different_keys(one: str, other: str) -> None:
    assert url_key(one) != url_key(other)


def test_keys_never_change() -> None:
    # Tables are joined by key: another hash would make all existing tables useless.
    assert url_key("http://example.com/cat.jpg") == KEY_OF_CAT


KEY_OF_CAT = -5307140061464997514


# Texts with the characters of URLs, and with others.
urlish = st.builds(
    "{}{}".format,
    st.sampled_from(["", "http://", "HTTPS://", "http://h/", "https://a.b?", "ftp://h:80"]),
    st.text(" \t\n\x00\x1f#?/:@.[]%;=&aA0-é\u3000", max_size=14),
)


@given(st.text() | urlish)
def test_any_text_has_a_key_and_normalising_is_idempotent(text: str) -> None:
    assert -(2**63) <= url_key(text) < 2**63
    normal = normalise_url(text)
    assert normalise_url(normal) == normal
    assert url_key(normal) == url_key(text)


@given(urlish)
def test_fast_path_agrees_with_normalising(text: str) -> None:
    fast = normalise_url(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schemas, "_NORMAL_URL", re.compile(r"(?!)"))  # matches nothing
        assert normalise_url(text) == fast


def test_image_column_has_the_image_feature_of_datasets() -> None:
    metadata = json.loads(with_image_feature(IMAGE_ROW).metadata[b"huggingface"])
    features = metadata["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert set(features) == set(IMAGE_ROW.names)


def test_error_for_a_missing_column_lists_the_columns() -> None:
    with pytest.raises(DataError, match=r"no column 'URL'.*it has a, b"):
        require_columns(pa.schema([("a", pa.int8()), ("b", pa.int8())]), ["URL"], "x.parquet")
