"""What an image table must not have, since it was taken down: a note in the table, which ingest heeds."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from yarl import URL

from pipelines.places import is_file, write_atomically
from pipelines.schemas import host_of, normalise_url
from pipelines.storage import Table, read_json_object

_FILE = "_takedown.json"


@dataclass(frozen=True)
class Blocked:
    """What an image table must not have."""

    keys: frozenset[int] = frozenset()
    domains: frozenset[str] = frozenset()

    @classmethod
    def read(cls, table: Table) -> Blocked:
        """What earlier takedowns of a table have noted."""
        file = table.folder / _FILE
        if not is_file(file):
            return cls()
        noted = read_json_object(file)
        return cls(frozenset(noted["keys"]), frozenset(noted["domains"]))

    def mask(self, keys: pa.ChunkedArray, urls: pa.ChunkedArray) -> np.ndarray:
        """Which rows are blocked, booleans `[n]`."""
        found = np.zeros(len(keys), bool)
        if self.keys:
            named = pa.array(sorted(self.keys), pa.int64())
            found |= np.asarray(pc.is_in(keys, value_set=named).to_pylist(), bool)
        if self.domains:
            hosts = [ascii_host(url) for url in urls.to_pylist()]
            found |= np.array([self.is_domain(host) for host in hosts], bool)
        return found

    def is_domain(self, host: str) -> bool:
        """Whether a host belongs to a domain that was taken down."""
        parts = host.split(".")
        return any(".".join(parts[i:]) in self.domains for i in range(len(parts)))

    def write(self, table: Table) -> None:
        """Note it in the table, in the place of what was noted."""
        content = {"keys": sorted(self.keys), "domains": sorted(self.domains)}
        write_atomically(table.folder / _FILE, json.dumps(content, indent=1))


def ascii_host(url: str) -> str:
    """The host of a URL as domains are compared: lower-case, in ASCII; empty where it has none."""
    host = host_of(normalise_url(url))
    try:  # in ASCII as the downloader spells it
        host = host if host.isascii() else URL.build(scheme="http", host=host).raw_host or ""
    except ValueError:
        return ""
    return host.rstrip(".")
