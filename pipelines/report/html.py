"""HTML pages from jinja2 templates.

Each job's template lies in its package as `*.html.jinja`; those of this package hold what pages share.
Everything that a template prints is escaped, so captions and messages from the web stay text. A page
loads nothing from the network, and its content security policy allows at most one script, given by its
hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from itertools import groupby
from typing import TYPE_CHECKING

from pipelines.images.rows import CAPTION, DECODE, DOWNLOAD, DUPLICATE, FILTERED, OK
from pipelines.report import axes, figures
from pipelines.report.gallery import compare_words, embedded

if TYPE_CHECKING:
    from jinja2 import Environment

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

KINDS = {
    OK: "",
    FILTERED: "dropped by a filter",
    DOWNLOAD: "could not be fetched",
    DECODE: "could not be decoded as an image",
    DUPLICATE: "the same content as another row",
    CAPTION: "the captioner failed",
}
"""Descriptions of status kinds (the part before the colon); the style sheet has their colours."""


@cache
def environment() -> Environment:
    """The environment of all templates; their names are paths below `pipelines`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # 0.1 s that `--help` saves

    made = Environment(
        loader=PackageLoader("pipelines", ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_valid,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shared = (figures.count, figures.percent, figures.share, figures.gap, figures.width,
              figures.duration, figures.loss, figures.before_after, figures.change,
              by_kind, kind_of, compare_words, embedded)  # fmt: skip
    made.globals |= {function.__name__: function for function in shared}
    made.filters["place"] = "{:.1f}".format  # a coordinate
    made.tests["known"] = figures.known
    made.globals |= {"KINDS": KINDS, "MISSING": figures.MISSING, "OK": OK, "frame": axes}
    return made


def page(
    template: str, title: str, subtitle: str, *, script: str | None = None, **values: object
) -> str:
    """The whole document from a template that extends `report/base.html.jinja`.

    `script` names a file below `pipelines`, the only script that the page's policy lets run.
    """
    from markupsafe import Markup

    policy, code = POLICY, ""
    if script is not None:
        code = _read(script)
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        policy = f"{POLICY}; script-src 'sha256-{digest}'"
    return environment().get_template(template).render(
        values,
        title=title,
        subtitle=subtitle,
        policy=policy,
        style=Markup(_read("report/report.css")),
        script=Markup(code),
    )  # fmt: skip


def kind_of(status: str) -> str:
    """The part of a status before the colon."""
    return status.partition(":")[0]


def by_kind(counts: Mapping[str, int]) -> list[tuple[str, dict[str, int]]]:
    """The counts of each kind of status by status: `ok` first, unknown kinds last."""
    order = list(KINDS)

    def place(status: str) -> tuple[int, str, str]:
        kind = kind_of(status)
        return (order.index(kind) if kind in KINDS else len(order), kind, status)

    groups = groupby(sorted(counts, key=place), key=kind_of)
    return [(kind, {status: counts[status] for status in statuses}) for kind, statuses in groups]


def _read(name: str) -> str:
    return resources.files("pipelines").joinpath(name).read_text("utf-8")


def _valid(value: object) -> object:
    """Text as it can be written: no lone surrogates (not UTF-8) and no NUL (an error in HTML)."""
    if type(value) is str:  # not Markup, whose parts were checked
        return value.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
    return value
