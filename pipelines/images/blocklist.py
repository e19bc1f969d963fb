"""The blocklist of a table: what was taken down and must not be ingested again."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from yarl import URL

from pipelines.images.rows import host_of, normalise_url
from pipelines.images.urls import addresses_of
from pipelines.storage.files import is_file, write_atomically
from pipelines.storage.tables import Table, read_json_object

FILE = "_takedown.json"


@dataclass(frozen=True)
class Blocklist:
    """What a table must not contain.

    `addresses` are URL hashes (pipelines.images.urls), equal for all spellings of a URL. `unmatched` are
    the names (URLs in canonical form) that matched no row when they were recorded.
    """

    keys: frozenset[int] = frozenset()
    domains: frozenset[str] = frozenset()
    addresses: frozenset[int] = frozenset()
    unmatched: frozenset[str] = frozenset()

    @classmethod
    def read(cls, table: Table) -> Blocklist:
        """The blocklist that earlier takedowns wrote into a table; empty if there is none."""
        file = table.folder / FILE
        if not is_file(file):
            return cls()
        content = read_json_object(file)
        names = [field.name for field in fields(cls)]  # the first versions had only two of them
        return cls(**{name: frozenset(content.get(name, ())) for name in names})

    def __or__(self, other: Blocklist) -> Blocklist:
        """The union of both blocklists."""
        return Blocklist(*(getattr(self, f.name) | getattr(other, f.name) for f in fields(self)))

    def mask(
        self, keys: pa.ChunkedArray, urls: pa.ChunkedArray, addresses: np.ndarray | None = None
    ) -> np.ndarray:
        """Which rows are blocked, bool `[n]`.

        `addresses` int64 `[n]` are the hashes of the URLs; required if `keys` are not those of ingest.
        """
        mask = np.zeros(len(keys), bool)
        if self.keys:
            mask |= _is_in(keys, self.keys)
        if self.addresses:
            hashes = addresses_of(urls, keys) if addresses is None else addresses
            mask |= _is_in(pa.chunked_array([hashes]), self.addresses)
        if self.domains:
            hosts = [ascii_host(url or "") for url in urls.to_pylist()]
            mask |= np.array([self.is_domain(host) for host in hosts], bool)
        return mask

    def is_domain(self, host: str) -> bool:
        """Whether a host belongs to a blocked domain."""
        return not self.domains.isdisjoint(domains_of(host))

    def write(self, table: Table) -> None:
        """Write the blocklist into the table, replacing the one there."""
        content = {field.name: sorted(getattr(self, field.name)) for field in fields(self)}
        write_atomically(table.folder / FILE, json.dumps(content, indent=1))


def domains_of(host: str) -> list[str]:
    """The host and all its parent domains."""
    parts = host.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _is_in(keys: pa.ChunkedArray, values: frozenset[int]) -> np.ndarray:
    value_set = pa.array(sorted(values), pa.int64())
    return np.asarray(pc.is_in(keys, value_set=value_set).to_pylist(), bool)


def ascii_host(url: str) -> str:
    """The host of a URL in lower case and ASCII, for comparing domains; empty if it has none."""
    host = host_of(normalise_url(url))
    try:  # the same conversion to ASCII as in the downloader
        host = host if host.isascii() else URL.build(scheme="http", host=host).raw_host or ""
    except ValueError:
        return ""
    return host.rstrip(".")
