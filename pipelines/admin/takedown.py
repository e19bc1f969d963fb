"""Taking rows out of image tables, and out of the tables that were made of them, for good.

What is taken down is noted first (`_takedown.json` in each table: keys, addresses and domains), then
removed. So a takedown that is killed is finished by the same command, no later ingest fetches what
it names, and a job on such a table knows why rows are gone and goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from pipelines.cli.config import OutputPathOrUrl
from pipelines.images.blocklist import Blocklist, ascii_host, domains_of
from pipelines.images.card import write_card
from pipelines.images.removal import blocked_rows, remove_files, remove_rows
from pipelines.images.rows import url_key
from pipelines.images.urls import address_of, canonical_url
from pipelines.ingest.report import remove_report, write_report
from pipelines.recaption.report import forget
from pipelines.storage.locks import lock_folder
from pipelines.storage.tables import Table
from vlv_model.config import Config
from vlv_model.errors import DataError

_LISTED = 10  # names in an error message


class TakedownConfig(Config):
    """Everything that `jobs/takedown.py` needs to know."""

    table: tuple[OutputPathOrUrl, ...] = Field(min_length=1, description="image tables")
    keys: tuple[int, ...] = Field((), description="keys of rows")
    urls: tuple[str, ...] = Field(
        (), description="URLs of rows, in any spelling, such as the one that a browser shows"
    )
    domains: tuple[str, ...] = Field((), description="domains, with all of their subdomains")
    derived: tuple[OutputPathOrUrl, ...] = Field(
        (), description="tables that were made of the image tables: captions, pairs, pictures"
    )

    @field_validator("table", mode="before")
    @classmethod
    def _one_or_several(cls, table: Any) -> Any:
        return [table] if isinstance(table, str) else table

    @field_validator("urls")
    @classmethod
    def _with_their_commas(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        """A comma within an address parts no two of them: what is behind it begins like none."""
        whole: list[str] = []
        for url in urls:
            if "://" not in url and not url.startswith("//"):
                if not whole:
                    raise ValueError(f"'{url}': expected an address such as http://a.org/b.jpg")
                whole[-1] += f",{url}"
            else:
                whole.append(url)
        return tuple(whole)

    @field_validator("domains")
    @classmethod
    def _are_domains(cls, domains: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_domain, domains))

    @model_validator(mode="after")
    def _names_something(self) -> TakedownConfig:
        if not (self.keys or self.urls or self.domains):
            raise ValueError("give keys, urls or domains")
        return self


class NothingMatched(DataError):
    """Some names match no row; what the others name was `removed`: rows by table, all the same."""

    def __init__(self, names: Sequence[str], removed: dict[str, int]) -> None:
        self.removed = removed
        shown = ", ".join(names[:_LISTED]) + (", …" if len(names) > _LISTED else "")
        super().__init__(
            f"no row has {shown}: check the spelling; what the other names match is removed, and no "
            "later ingest fetches any of them"
        )


def take_down(config: TakedownConfig) -> dict[str, int]:
    """Remove the rows from all tables; how many each of them lost, by its path.

    Raises DataError where one of them is no table of ours, RunError while a job writes one; and
    NothingMatched, when all is done, where a name matches no row and none did in an earlier
    takedown.
    """
    tables, derived = ([Table(p) for p in places] for places in (config.table, config.derived))
    for table in (*tables, *derived):
        if not table.exists:
            raise DataError(f"{table.folder} holds no table of ours: nothing was removed")
    for images in tables:
        if images.describe()["kind"] != "image":
            raise DataError(f"{images.folder} is no image table: give it as `derived`")
    names, blocked = _Names.of(config), Blocklist()
    removed: dict[str, int] = {}
    for images in tables:
        with lock_folder(images.folder, "table"):
            noted = _note(images, names)
            remove_report(images)  # which shows pictures
            removed[str(images.folder)] = remove_rows(images, noted, names.look)
        blocked |= noted
    for table in derived:
        with lock_folder(table.folder, "derived"):
            before = Blocklist.read(table)
            (before | replace(blocked, unmatched=before.unmatched)).write(table)
            removed[str(table.folder)] = remove_rows(table, blocked, names.look)
            if removed[str(table.folder)]:
                forget(table)  # and its report, which shows pictures
            write_card(table)  # also of rows that a killed takedown removed
            remove_files(table, blocked.keys)
    for images in tables:
        with lock_folder(images.folder, "table"):
            write_report(images, hides=blocked.is_domain)
            write_card(images)
    if missing := names.missing():
        raise NothingMatched(missing, removed)
    return removed


def _domain(name: str) -> str:
    """A domain, in ASCII, from what a user gave for one; ValueError for what is none."""
    text = name.strip()
    place = text.partition("://")[2] if "://" in text else text
    place, _, path = place.removeprefix("//").removeprefix("*").partition("/")
    host = ascii_host(f"http://{place.strip('. ')}/") if place else ""
    if path.strip() or not host:
        advice = f"give {host}, or the whole address as urls" if host else "give one such as a.org"
        raise ValueError(f"'{name}': expected a domain, got an address: {advice}")
    return host


@dataclass
class _Names:
    """What a user named, as `keys=…`, `urls=…` and `domains=…`, and which of it some row has."""

    keys: dict[int, str]
    addresses: dict[int, str]
    domains: dict[str, str]
    found: set[str]
    as_given: dict[int, set[int]]  # by address, the keys of its URLs as the user spelled them

    @classmethod
    def of(cls, config: TakedownConfig) -> _Names:
        as_given: dict[int, set[int]] = {}
        for url in config.urls:
            as_given.setdefault(address_of(url), set()).add(url_key(url))
        return cls(
            {key: f"keys={key}" for key in config.keys},
            {address_of(url): f"urls={canonical_url(url)}" for url in config.urls},
            {domain: f"domains={domain}" for domain in config.domains},
            set(),
            as_given,
        )

    def missing(self) -> list[str]:
        """The names that no row had."""
        named = [*self.keys.values(), *self.addresses.values(), *self.domains.values()]
        return [name for name in named if name not in self.found]

    def found_before(self, before: Blocklist) -> None:
        """Count what an earlier takedown noted of a table for found, unless it found nothing."""
        noted = {name for key, name in self.keys.items() if key in before.keys}
        noted |= {name for end, name in self.domains.items() if end in before.domains}
        for address, name in self.addresses.items():
            # The first versions noted the key of a URL alone, as it was given.
            given = {url_key(_value(name)), *self.as_given.get(address, ())}
            if address in before.addresses or given & before.keys:
                noted.add(name)
        self.found |= noted - before.unmatched

    def look(self, rows: pa.Table, addresses: np.ndarray) -> None:
        """Count the names of these rows for found."""
        keys = rows["key"].to_pylist()
        self.found |= {self.keys[key] for key in set(keys) & set(self.keys)}
        there = set(addresses.tolist()) & set(self.addresses)
        self.found |= {self.addresses[address] for address in there}
        if self.domains and "url" in rows.column_names:
            for host in {ascii_host(url) for url in rows["url"].to_pylist() if url is not None}:
                self.found |= {self.domains[d] for d in domains_of(host) if d in self.domains}


def _value(name: str) -> str:
    """What is behind the sign of equality in a name."""
    return name.partition("=")[2]


def _note(images: Table, names: _Names) -> Blocklist:
    """Write down what must be gone: what is named, and all spellings of the rows that are there."""
    before = Blocklist.read(images)
    names.found_before(before)
    # The keys of URLs, too: earlier versions know nothing of addresses.
    keys = {*names.keys, *(url_key(_value(name)) for name in names.addresses.values())}
    blocked = before | Blocklist(
        frozenset(keys), frozenset(names.domains), frozenset(names.addresses)
    )
    for _ in range(2):  # the second time for other spellings of the rows that have a key or domain
        addresses = set(blocked.addresses)
        for _, rows, address, mask in blocked_rows(images, blocked):
            named = rows.filter(pa.array(mask))
            names.look(named, address[mask])
            keys.update(named["key"].to_pylist())
            addresses.update(address[mask].tolist())
        blocked |= Blocklist(frozenset(keys), addresses=frozenset(addresses))
    unmatched = (blocked.unmatched | set(names.missing())) - names.found
    blocked = replace(blocked, unmatched=frozenset(unmatched))
    blocked.write(images)
    return blocked
