"""Markdown for dataset and model cards, with the YAML header that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml


def card(header: Mapping[str, Any], blocks: Iterable[str]) -> str:
    """The whole file; empty values are left out of the header."""
    given = {name: value for name, value in header.items() if value}
    dumped = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
    return "\n\n".join([f"---\n{dumped}---", *blocks]) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; cells are escaped."""
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain(text: str) -> str:
    """Escape foreign text, so that it can add no image, link or emphasis."""
    return re.sub(r"([\\`*\[\]])", r"\\\1", text)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
