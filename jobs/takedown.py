"""Remove rows from image tables and from tables derived from them, permanently.

Select rows by key, by URL in any spelling, or by domain with its subdomains. The tables record what
was removed, and later ingests do not fetch it. Names that match no row are reported as an error
after the other rows are removed.

    python jobs/takedown.py /data/images domains=example.org derived=/data/captions,/data/latents
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


def with_tables(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments, with the positional ones (tables) collected into `table=[…]`."""
    tables: list[str] = []
    settings: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_setting = "=" in argument or argument.startswith("-") or before == "--config"
        (settings if is_setting else tables).append(argument)
    names = [one.partition("=")[0] for one in settings if "=" in one] + ["table"] * bool(tables)
    for name, times in Counter(names).items():
        if times > 1:  # only the last would count, and the rows of the others would stay
            print(
                f"error: {name} is given {times} times: give all in one, {name}=a,b",
                file=sys.stderr,
            )
            raise SystemExit(BAD_INPUT)
    return [f"table={json.dumps(tables)}", *settings] if tables else settings


if __name__ == "__main__":
    sys.argv[1:] = with_tables(sys.argv[1:])
    sys.exit(main(TakedownConfig, run, __doc__, aliases={"": "table"}))
