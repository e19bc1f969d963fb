"""The frame of every job: read the settings, run, and say in one line what was wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from pipelines.config import parse
from vlv_model.config import Config
from vlv_model.errors import VLVError

C = TypeVar("C", bound=Config)

BAD_INPUT, INTERRUPTED = 2, 130


def main(
    cls: type[C],
    run: Callable[[C], None],
    description: str,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Run a job from its command line and return its exit status: 0, 2 for bad input, 130.

    A VLVError, also one that was raised on a worker and came back wrapped by Ray, ends as one
    line on standard error. Anything else is a fault of the program and keeps its traceback.
    """
    usage = f"python jobs/{Path(sys.argv[0]).name}"
    if "" in aliases:
        usage += f" {aliases[''].upper()}"
    try:
        run(parse(cls, sys.argv[1:], usage, description, aliases))
    except KeyboardInterrupt:
        print("interrupted: the same command continues where this one stopped", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        for cause in causes_of(error):
            if isinstance(cause, VLVError) and not hasattr(cause, "cause"):
                print(f"error: {cause}", file=sys.stderr)
                return BAD_INPUT
        raise
    return 0


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """The error and all that it was raised from: plain chains, Ray's task errors, Train's ranks."""
    seen: set[int] = set()
    stack: list[BaseException] = [error]
    while stack:
        current = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        inner = [current.__cause__, current.__context__, getattr(current, "cause", None)]
        inner += getattr(current, "worker_failures", {}).values()
        stack += [e for e in inner if isinstance(e, BaseException)]
