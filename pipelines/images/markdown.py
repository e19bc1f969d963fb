"""Markdown for dataset and model cards, with the YAML header that the Hugging Face hub reads.

The text comes from jinja2 templates, `*.md.jinja` in the packages of the jobs. Markdown has no escaping
that fits all places: `table` escapes its cells, and templates escape other foreign text with `plain`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import CardData
    from jinja2 import Environment


@cache
def environment() -> Environment:
    """The environment of the cards' templates; their names are paths below `pipelines`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("pipelines", ""),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.globals["table"] = table
    made.filters |= {"plain": plain, "literal": _literal}
    return made


def card(header: CardData, template: str, **values: object) -> str:
    """The whole file.

    Not `RepoCard.from_template` of huggingface_hub, which prints nothing for a misspelt name.
    """
    text = environment().get_template(template).render(values)
    return f"---\n{header.to_yaml()}\n---\n\n{text}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; cells are escaped."""
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain(text: str) -> str:
    """Escape foreign text, so that it can add no line, image, link, emphasis or markup."""
    escaped = re.sub(r"([\\`*\[\]])", r"\\\1", " ".join(text.split()))
    return escaped.replace("<", "&lt;")


def _literal(text: str) -> str:
    """A string literal of Python."""
    return json.dumps(text, ensure_ascii=False)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
