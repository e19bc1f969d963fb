"""What a table must not have, since it was taken down: a note in the table, which ingest heeds."""

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
class Blocked:
    """What a table must not have. `addresses` are those of `pipelines.images.urls`: all spellings of a URL.

    `unmatched` are names, URLs among them in their canonical form, that no row had when they were noted.
    """

    keys: frozenset[int] = frozenset()
    domains: frozenset[str] = frozenset()
    addresses: frozenset[int] = frozenset()
    unmatched: frozenset[str] = frozenset()

    @classmethod
    def read(cls, table: Table) -> Blocked:
        """What earlier takedowns of a table have noted."""
        file = table.folder / FILE
        if not is_file(file):
            return cls()
        noted = read_json_object(file)
        names = [field.name for field in fields(cls)]  # the first versions had two of them
        return cls(**{name: frozenset(noted.get(name, ())) for name in names})

    def __or__(self, other: Blocked) -> Blocked:
        """What either of the two names."""
        return Blocked(*(getattr(self, f.name) | getattr(other, f.name) for f in fields(self)))

    def mask(
        self, keys: pa.ChunkedArray, urls: pa.ChunkedArray, addresses: np.ndarray | None = None
    ) -> np.ndarray:
        """Which rows are blocked, booleans `[n]`.

        `addresses` int64 `[n]` are those of the URLs, of rows whose keys are not ingest's.
        """
        found = np.zeros(len(keys), bool)
        if self.keys:
            found |= _among(keys, self.keys)
        if self.addresses:
            known = addresses_of(urls, keys) if addresses is None else addresses
            found |= _among(pa.chunked_array([known]), self.addresses)
        if self.domains:
            hosts = [ascii_host(url or "") for url in urls.to_pylist()]
            found |= np.array([self.is_domain(host) for host in hosts], bool)
        return found

    def is_domain(self, host: str) -> bool:
        """Whether a host belongs to a domain that was taken down."""
        return not self.domains.isdisjoint(domains_of(host))

    def write(self, table: Table) -> None:
        """Note it in the table, in the place of what was noted."""
        content = {field.name: sorted(getattr(self, field.name)) for field in fields(self)}
        write_atomically(table.folder / FILE, json.dumps(content, indent=1))


def domains_of(host: str) -> list[str]:
    """The host and all domains that it is a subdomain of."""
    parts = host.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _among(keys: pa.ChunkedArray, named: frozenset[int]) -> np.ndarray:
    wanted = pa.array(sorted(named), pa.int64())
    return np.asarray(pc.is_in(keys, value_set=wanted).to_pylist(), bool)


def ascii_host(url: str) -> str:
    """The host of a URL as domains are compared: lower-case, in ASCII; empty where it has none."""
    host = host_of(normalise_url(url))
    try:  # in ASCII as the downloader spells it
        host = host if host.isascii() else URL.build(scheme="http", host=host).raw_host or ""
    except ValueError:
        return ""
    return host.rstrip(".")
