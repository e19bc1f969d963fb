"""Taking rows out of an image table, and out of the tables that were made of it, for good.

What is taken down is noted first (`_takedown.json` in the image table: keys and domains), then
removed. So a takedown that is killed is finished by the same command, and no later ingest fetches
what it names.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pipelines.config import OutputPlace
from pipelines.ingest.blocked import Blocked, ascii_host
from pipelines.ingest.report import remove_report, write_report
from pipelines.locks import exclusive
from pipelines.places import open_parquet
from pipelines.recaption.report import forget
from pipelines.reconstruct.side_by_side import remove_files
from pipelines.schemas import url_key
from pipelines.storage import Table
from vlv_model.config import Config
from vlv_model.errors import DataError


class TakedownConfig(Config):
    """Everything that `jobs/takedown.py` needs to know."""

    table: OutputPlace = Field(description="image table")
    keys: tuple[int, ...] = Field((), description="keys of rows")
    urls: tuple[str, ...] = Field((), description="URLs of rows, in any spelling")
    domains: tuple[str, ...] = Field((), description="domains, with all of their subdomains")
    derived: tuple[OutputPlace, ...] = Field(
        (), description="tables that were made of the image table: captions, pairs, pictures"
    )

    @model_validator(mode="after")
    def _names_something(self) -> TakedownConfig:
        if not (self.keys or self.urls or self.domains):
            raise ValueError("give keys, urls or domains")
        return self


def take_down(config: TakedownConfig) -> dict[str, int]:
    """Remove the rows from all tables; how many each of them lost, by its path.

    Raises DataError where one of them is no table of ours, RunError while a job writes one.
    """
    images, derived = Table(config.table), [Table(place) for place in config.derived]
    for table in (images, *derived):
        if not table.exists:
            raise DataError(f"{table.folder} holds no table of ours: nothing was removed")
    if images.describe()["kind"] != "image":
        raise DataError(f"{images.folder} is no image table: give it as `derived`")
    with exclusive(images.folder, "table"):
        blocked = _note(images, config)
        remove_report(images)  # which shows pictures
        removed = {str(images.folder): _remove(images, blocked.keys)}
    for table in derived:
        with exclusive(table.folder, "derived"):
            removed[str(table.folder)] = _remove(table, blocked.keys)
            if removed[str(table.folder)]:
                forget(table)  # and its report, which shows pictures
            remove_files(table, blocked.keys)
    with exclusive(images.folder, "table"):
        write_report(images, hides=blocked.is_domain)
    return removed


def _note(images: Table, config: TakedownConfig) -> Blocked:
    """Write down what must be gone: what was named, and the rows of the domains that are there."""
    before = Blocked.read(images)
    keys = {*before.keys, *config.keys, *(url_key(url) for url in config.urls)}
    named = {ascii_host(f"http://{name.strip('. ')}/") for name in config.domains}
    blocked = Blocked(frozenset(keys), before.domains | named)
    if named:
        chunks = [commit.chunk for commit in images.commits()]
        for rows in images.columns(chunks, ["key", "url"]):
            of_domains = blocked.mask(rows["key"], rows["url"])
            keys.update(rows["key"].filter(pa.array(of_domains)).to_pylist())
    blocked = Blocked(frozenset(keys), blocked.domains)
    blocked.write(images)
    return blocked


def _remove(table: Table, keys: frozenset[int]) -> int:
    """Write the parts that have rows of `keys` anew without them; how many rows are gone."""
    named = pa.array(sorted(keys), pa.int64())
    removed, commits = 0, table.commits()
    keys_of = table.columns([commit.chunk for commit in commits], ["key"])
    for commit, rows in zip(commits, keys_of, strict=True):
        kept = pc.invert(pc.is_in(rows["key"], value_set=named))
        gone = len(kept) - pc.sum(kept, min_count=0).as_py()
        if gone:
            with open_parquet(table.part(commit.chunk)) as parquet:
                group = parquet.metadata.row_group(0).num_rows
                left = parquet.read().filter(kept)
            table.write(commit.chunk, left, run=commit.run, row_group_size=group)
            removed += gone
    return removed
