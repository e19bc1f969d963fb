"""Tables as earlier versions laid them out."""

import json

from pipelines.images.card import FILE
from pipelines.storage.tables import Table


def as_of_earlier_version(table: Table) -> Table:
    """The table with its parts beside `_table.json`, its plan in `.parquet`, and no card."""
    for part in list(table.parts.iterdir()):
        part.rename(table.folder / part.name)
    table.parts.rmdir()
    for file in list((table.folder / "_plan").rglob("*.plan")):
        file.rename(file.with_suffix(".parquet"))
    (table.folder / FILE).unlink(missing_ok=True)
    about = json.loads((table.folder / "_table.json").read_text())
    del about["parts"]
    (table.folder / "_table.json").write_text(json.dumps(about))
    return Table(table.folder)
