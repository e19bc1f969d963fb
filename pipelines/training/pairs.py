"""Runs that an earlier version began: it copied images and captions into a pair table.

Such a run continues with its table, which lies in <run_dir>/pairs, or where `data.output` put it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from pipelines.cli.config import build
from pipelines.execution.model import latest_checkpoint
from pipelines.images.blocklist import Blocklist
from pipelines.images.removal import remove_rows
from pipelines.storage.locks import lock_folder
from pipelines.storage.tables import Table
from pipelines.training import run_folder
from pipelines.training.config import Stage2Config
from vlv_model.checkpoints.files import read_checkpoint

KIND = "pair"


def with_pairs(config: Stage2Config) -> Stage2Config:
    """The settings of a run that began with a pair table: `data.input` is that table.

    Rows that were taken down from `data.input` or `data.captions` since are removed from it first. The
    settings of any other run are returned as they are.
    """
    run_dir, captions = Path(config.run_dir), config.data.captions
    recorded = run_folder.recorded(run_dir)
    if captions is None or not recorded or recorded.get("data.captions") is not None:
        return config
    table = _pair_table(run_dir)
    if table is None:
        return config  # the comparison of identities says that data.captions differs
    before = Blocklist.read(table)
    blocked = before
    for path in (config.data.input, *captions):
        blocked |= replace(Blocklist.read(Table(path)), unmatched=frozenset())
    if blocked != before:
        with lock_folder(table.folder, "pairs"):
            blocked.write(table)
            removed = remove_rows(table, blocked)
        print(f"{removed:,} pairs of {table.folder} were taken down", file=sys.stderr)
    values = config.model_dump(mode="json", exclude_unset=True)
    values["data"] |= {"input": str(table.folder), "captions": None, "caption_column": "caption"}
    return build(Stage2Config, values)


def _pair_table(run_dir: Path) -> Table | None:
    """The finished pair table of a run, if it is one's: in its folder, or as a checkpoint names it."""
    places = [run_dir / "pairs"]
    if checkpoint := latest_checkpoint(run_dir):
        places.append(Path(read_checkpoint(checkpoint).config["data"]["input"]))
    for table in map(Table, places):
        if table.exists and table.describe()["kind"] == KIND and not table.pending():
            return table
    return None
