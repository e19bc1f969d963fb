"""Takedown: removes rows from image tables and from tables made of them, and keeps them out.

Rows are named by key, by URL in any spelling, or by domain with all of its subdomains. What was
taken down is noted in the tables: no later ingest fetches it. A name that matches no row is an error,
when what the other names match is gone.

    python jobs/takedown.py /data/images domains=example.org derived=/data/captions,/data/pairs
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence

from pipelines.admin.takedown import NothingMatched, TakedownConfig, take_down
from pipelines.cli.main import BAD_INPUT, main


def run(config: TakedownConfig) -> None:
    try:
        removed = take_down(config)
    except NothingMatched as error:
        show(error.removed)
        raise
    show(removed)


def show(removed: dict[str, int]) -> None:
    for table, rows in removed.items():
        print(f"{rows:>9,} rows removed from {table}")


def with_tables(words: Sequence[str]) -> list[str]:
    """The words of a command line, in which bare ones are tables, with all of these in one setting."""
    tables: list[str] = []
    others: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        is_setting = "=" in word or word.startswith("-") or before == "--config"
        (others if is_setting else tables).append(word)
    names = [word.partition("=")[0] for word in others if "=" in word] + ["table"] * bool(tables)
    for name, times in Counter(names).items():
        if times > 1:  # the last one would be done alone, and the others' rows stay
            print(
                f"error: {name} is given {times} times: give all in one, {name}=a,b",
                file=sys.stderr,
            )
            raise SystemExit(BAD_INPUT)
    return [f"table={json.dumps(tables)}", *others] if tables else others


if __name__ == "__main__":
    sys.argv[1:] = with_tables(sys.argv[1:])
    sys.exit(main(TakedownConfig, run, __doc__, aliases={"": "table"}))
