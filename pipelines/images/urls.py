"""One URL, many spellings: the canonical URL, by which addresses are compared.

`key` is the hash of a URL as the list spells it, and stays so. But a browser shows another spelling
of the same address: `%20` for a space, `%C3%A9` for é, `xn--…` for a name that is not ASCII. Here
each is brought to the one that a request sends (RFC 3986, section 6.2.2). Takedown, joins by URL and
duplicates compare the hash of that.
"""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
from yarl import URL

from pipelines.images.rows import key_of, normalise_url

# What most URLs are like: of them nothing is to be changed, which is seen in a tenth of the time.
_PLAIN = re.compile(
    r"https?://[a-z0-9.-]*[a-z0-9-]/(?!\.)(?:(?!/\.)[\w~!$&'()*+,;=:@/.-])*"
    r"(?:\?[\w~!$&'()*+,;=:@/?.-]+)?",
    re.ASCII,
)


def canonical_url(url: str) -> str:
    """The URL as it is sent: host lower-case and in ASCII, no fragment, no default port, no dot
    segments, what is not ASCII as UTF-8 in `%XX`, and no `%XX` that is not needed.

    In a query `%20` and `+` both stand for a space, and are one. What cannot be read as a URL is
    `normalise_url` of it. The canonical URL of a canonical URL is itself.
    """
    if _PLAIN.fullmatch(url):
        return url
    normal = normalise_url(url)
    if "://" not in normal:
        return normal
    try:
        # Twice: dots may have been written as %2E.
        sent = str(URL(str(URL(normal))))
    except (ValueError, IndexError):  # the second of yarl, for http://[]@
        return normal
    before, mark, query = sent.partition("?")
    return normalise_url(before + mark + query.replace("%20", "+"))


def address_of(url: str) -> int:
    """64 bits that all spellings of a URL share: `key_of` its canonical URL.

    It is the `key` of a row of ingest whose URL the list spells canonically.
    """
    return key_of(canonical_url(url))


def addresses_of(urls: pa.ChunkedArray, keys: pa.ChunkedArray | None = None) -> np.ndarray:
    """`address_of` each URL, int64 `[n]`; 0 where there is none.

    `keys` are those of the rows in an image table, of which most then need not be hashed.
    """
    addresses = np.zeros(len(urls), np.int64) if keys is None else keys.to_numpy().copy()
    for position, url in enumerate(urls.to_pylist()):
        if url is not None and (keys is None or not _PLAIN.fullmatch(url)):
            addresses[position] = address_of(url)
    return addresses
