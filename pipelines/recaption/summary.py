"""What a recaption prints at its end: the health of its captions, some of them, and where to look."""

from __future__ import annotations

import textwrap

from pipelines.recaption.report import FILE, sample_captions
from pipelines.recaption.survey import Survey
from pipelines.storage.tables import Table

_SHOWN = 3
_WIDTH = 110  # characters of a line
_WORDS = {
    "truncated": "cut at generate.max_new_tokens",
    "repeated": "repeat themselves",
    "non_language": "no language",
    "empty": "empty",
    "duplicates": "nearly equal to another",
}


def summary(table: Table) -> str:
    """One line of health, three captions, and the path of the report of a finished caption table."""
    health = Survey.read(table)
    assert health is not None
    lines = [health_line(health)]
    for name, caption in sample_captions(table, _SHOWN):
        lines.append("  " + textwrap.shorten(f"{name}: {caption}", _WIDTH, placeholder=" …"))
    return "\n".join([*lines, f"report: {table.folder / FILE}"])


def health_line(health: Survey) -> str:
    """The captions with a fault, by fault; a caption can have several."""
    if not health.captions:
        return "health: there is no caption"
    counts = [(getattr(health, name), words) for name, words in _WORDS.items()]
    faults = [f"{n:,} {words} ({n / health.captions:.0%})" for n, words in counts if n]
    return f"health of {health.captions:,} captions: {', '.join(faults) or 'no fault found'}"
