"""Removes rows permanently from image tables and from tables derived from them.

Keys, addresses and domains are first recorded in each table's `_takedown.json`, then the rows are
removed. So the same command finishes a killed takedown, later ingests do not fetch the rows again, and
jobs on these tables know why rows are missing and continue.
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
from pipelines.recaption.card import write_card as write_caption_card
from pipelines.recaption.report import delete_derived_files
from pipelines.storage.locks import lock_folder
from pipelines.storage.tables import Table
from vlv_model.config import Config
from vlv_model.errors import DataError

_LISTED = 10  # names in an error message


class TakedownConfig(Config):
    """All settings of `jobs/takedown.py`."""

    table: tuple[OutputPathOrUrl, ...] = Field(min_length=1, description="image tables")
    keys: tuple[int, ...] = Field((), description="keys of rows")
    urls: tuple[str, ...] = Field(
        (), description="URLs of rows, in any spelling, for example as a browser shows them"
    )
    domains: tuple[str, ...] = Field((), description="domains, with all their subdomains")
    derived: tuple[OutputPathOrUrl, ...] = Field(
        (),
        description="tables derived from the image tables: captions, latents, features, reconstructions",
    )

    @field_validator("table", mode="before")
    @classmethod
    def _one_or_several(cls, table: Any) -> Any:
        return [table] if isinstance(table, str) else table

    @field_validator("urls")
    @classmethod
    def _rejoin_commas(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        """Rejoin URLs that the command line split at a comma: the rest has no scheme."""
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
    def _is_not_empty(self) -> TakedownConfig:
        if not (self.keys or self.urls or self.domains):
            raise ValueError("give keys, urls or domains")
        return self


class NothingMatched(DataError):
    """Some names match no row; the rows of the other names were removed.

    `removed` has the number of removed rows by table.
    """

    def __init__(self, names: Sequence[str], removed: dict[str, int]) -> None:
        self.removed = removed
        shown = ", ".join(names[:_LISTED]) + (", …" if len(names) > _LISTED else "")
        super().__init__(
            f"no row has {shown}: check the spelling; rows of the other names are removed, and later "
            "ingests fetch none of them"
        )


def take_down(config: TakedownConfig) -> dict[str, int]:
    """Remove the rows from all tables; returns the number of removed rows by table path.

    Raises DataError when a folder holds no table, RunError while a job writes one, and at the end
    NothingMatched for names that match no row and matched none in an earlier takedown.
    """
    tables, derived = ([Table(p) for p in places] for places in (config.table, config.derived))
    for table in (*tables, *derived):
        if not table.exists:
            raise DataError(f"{table.folder} holds no table: nothing was removed")
    for images in tables:
        if images.describe()["kind"] != "image":
            raise DataError(f"{images.folder} is not an image table: give it as `derived`")
    names, blocked = _Names.of(config), Blocklist()
    removed: dict[str, int] = {}
    for images in tables:
        with lock_folder(images.folder, "table"):
            recorded = _record(images, names)
            remove_report(images)  # it shows images
            removed[str(images.folder)] = remove_rows(images, recorded, names.mark_found)
        blocked |= recorded
    for table in derived:
        with lock_folder(table.folder, "derived"):
            before = Blocklist.read(table)
            (before | replace(blocked, unmatched=before.unmatched)).write(table)
            removed[str(table.folder)] = _remove_derived(table, blocked, names)
            remove_files(table, blocked.keys)
    for images in tables:
        with lock_folder(images.folder, "table"):
            write_report(images, hides=blocked.is_domain)
            write_card(images)
    if missing := names.missing():
        raise NothingMatched(missing, removed)
    return removed


def _domain(name: str) -> str:
    """Normalise a user's spelling of a domain to ASCII; ValueError if it is not a domain."""
    text = name.strip()
    domain = text.partition("://")[2] if "://" in text else text
    domain, _, path = domain.removeprefix("//").removeprefix("*").partition("/")
    host = ascii_host(f"http://{domain.strip('. ')}/") if domain else ""
    if path.strip() or not host:
        advice = f"give {host}, or the whole address as urls" if host else "give one such as a.org"
        raise ValueError(f"'{name}': expected a domain, got an address: {advice}")
    return host


def _remove_derived(table: Table, blocked: Blocklist, names: _Names) -> int:
    """Remove rows of a derived table, and before them the files that show them; the number of rows."""
    deleted = False

    def before_removal(rows: pa.Table, addresses: np.ndarray) -> None:
        nonlocal deleted
        if not deleted:  # first, so that a takedown killed here leaves no report of removed rows
            delete_derived_files(table)
            deleted = True
        names.mark_found(rows, addresses)

    removed = remove_rows(table, blocked, before_removal)
    write_caption_card(table)  # also where a killed takedown removed the rows
    write_card(table)
    return removed


@dataclass
class _Names:
    """The user's names, as `keys=…`, `urls=…` and `domains=…`, and those that match a row."""

    keys: dict[int, str]
    addresses: dict[int, str]
    domains: dict[str, str]
    found: set[str]
    as_given: dict[int, set[int]]  # by address: keys of its URLs as the user spelled them

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
        """The names that match no row."""
        names = [*self.keys.values(), *self.addresses.values(), *self.domains.values()]
        return [name for name in names if name not in self.found]

    def mark_found_before(self, before: Blocklist) -> None:
        """Mark names that an earlier takedown of a table recorded and matched."""
        recorded = {name for key, name in self.keys.items() if key in before.keys}
        recorded |= {name for domain, name in self.domains.items() if domain in before.domains}
        for address, name in self.addresses.items():
            # The first versions recorded only the key of a URL as spelled.
            keys = {url_key(_value(name)), *self.as_given.get(address, ())}
            if address in before.addresses or keys & before.keys:
                recorded.add(name)
        self.found |= recorded - before.unmatched

    def mark_found(self, rows: pa.Table, addresses: np.ndarray) -> None:
        """Mark names that match these rows."""
        keys = rows["key"].to_pylist()
        self.found |= {self.keys[key] for key in set(keys) & set(self.keys)}
        matching = set(addresses.tolist()) & set(self.addresses)
        self.found |= {self.addresses[address] for address in matching}
        if self.domains and "url" in rows.column_names:
            for host in {ascii_host(url) for url in rows["url"].to_pylist() if url is not None}:
                self.found |= {self.domains[d] for d in domains_of(host) if d in self.domains}


def _value(name: str) -> str:
    """The part of a name after `=`."""
    return name.partition("=")[2]


def _record(images: Table, names: _Names) -> Blocklist:
    """Record what to remove: the given names and all spellings of the rows that they match."""
    before = Blocklist.read(images)
    names.mark_found_before(before)
    # Also the keys of URLs, since earlier versions do not know addresses.
    keys = {*names.keys, *(url_key(_value(name)) for name in names.addresses.values())}
    blocked = before | Blocklist(
        frozenset(keys), frozenset(names.domains), frozenset(names.addresses)
    )
    for _ in range(2):  # the second pass finds other spellings of the rows found by key or domain
        addresses = set(blocked.addresses)
        for _, rows, address, mask in blocked_rows(images, blocked):
            matching = rows.filter(pa.array(mask))
            names.mark_found(matching, address[mask])
            keys.update(matching["key"].to_pylist())
            addresses.update(address[mask].tolist())
        blocked |= Blocklist(frozenset(keys), addresses=frozenset(addresses))
    unmatched = (blocked.unmatched | set(names.missing())) - names.found
    blocked = replace(blocked, unmatched=frozenset(unmatched))
    blocked.write(images)
    return blocked
