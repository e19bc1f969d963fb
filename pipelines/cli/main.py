"""The frame of every job: read the settings, run, and say in one line what was wrong."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from pipelines.cli.config import parse
from pipelines.cli.signals import Asked, interrupted_by_signals, say_interrupted, status_of
from vlv_model.config import Config
from vlv_model.errors import VLVError

C = TypeVar("C", bound=Config)

BAD_INPUT, INTERRUPTED = 2, 130

# Ray Data adds to the message of an error in a step where that step stood.
_RAYS_POSTSCRIPT = " Failed to apply UDF transform"

# Where, and how full.
_FULL_MEMORY = re.compile(r"Memory on the node \(IP: ([^,]+),[^)]*\) was (.+? used / .+?) limit")

# What a user's paths can run into anywhere: full, read-only, not permitted, names that are too long.
_REFUSED_BY_SYSTEM = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG,
    errno.ELOOP, errno.ENOTDIR,
}  # fmt: skip


def main(
    cls: type[C],
    run: Callable[[C], None],
    description: str,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Run a job from its command line and return its exit status: 0, 2 for bad input, 130 by Ctrl-C,
    143 by SIGTERM, 129 by SIGHUP.

    Where the job's own Ray is killed, the process ends with 3 (pipelines.execution.connection).

    A VLVError, also one that was raised on a worker and came back wrapped by Ray, ends as one
    line on standard error. Anything else is a fault of the program and keeps its traceback.
    """
    usage = f"python {'/'.join(Path(sys.argv[0]).absolute().parts[-2:])}"
    if "" in aliases:
        usage += f" {aliases[''].upper()}"
    asked = Asked()
    try:
        with interrupted_by_signals() as asked:
            run(parse(cls, sys.argv[1:], usage, description, aliases))
    except KeyboardInterrupt:
        say_interrupted()
        return asked.status or INTERRUPTED
    except SystemExit as ended:
        if (status := status_of(ended)) is None:
            raise
        say_interrupted()
        return status
    except Exception as error:
        if asked.status is not None:  # what was unwound for it may have failed
            say_interrupted()
            return asked.status
        for cause in causes_of(error):
            if isinstance(cause, VLVError) and not hasattr(cause, "cause"):
                line = str(cause).partition(_RAYS_POSTSCRIPT)[0]
                print(f"error: {line}", file=sys.stderr)
                return BAD_INPUT
        # Not what was being handled when a fault of the program came in between.
        for cause in causes_of(error, handled=False):
            if refusal := _refusal_by_system(cause):
                print(f"error: {refusal}", file=sys.stderr)
                return BAD_INPUT
        raise
    return 0


def _refusal_by_system(error: BaseException) -> str | None:
    """The line for an error that a disk or a machine's memory brought about, on a worker or here."""
    # Arrow's and fsspec's words for it are as many as their layers.
    if isinstance(error, OSError) and error.errno in _REFUSED_BY_SYSTEM:
        # Ray Data adds its advice where the name of the file was.
        named = error.filename and not str(error.filename).startswith(_RAYS_POSTSCRIPT.strip())
        return f"{os.strerror(error.errno)}: {error.filename if named else 'writing'}"
    kind = type(error)  # by its name, as Ray need not be imported
    if kind.__module__.partition(".")[0] == "ray" and kind.__name__ == "OutOfMemoryError":
        found = _FULL_MEMORY.search(str(error))
        where = f" ({found[1]}: {found[2]})" if found else ""
        return (
            f"the memory of a machine is full{where}, so Ray ended a process of this job: have fewer "
            "or smaller processes on a machine (workers, readers, actors, batches), or machines "
            "with more; the same command then continues"
        )
    return None


def causes_of(error: BaseException, handled: bool = True) -> Iterator[BaseException]:
    """The error and all that it was raised from: plain chains, Ray's task errors, Train's ranks.

    With `handled` also what was being handled when it was raised by chance.
    """
    seen: set[int] = set()
    stack: list[BaseException] = [error]
    while stack:
        current = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        inner = [current.__cause__, getattr(current, "cause", None)]
        # Of a rank of Train, and of what leads its ranks.
        inner += [getattr(current, f"{n}_failure", None) for n in ("health_check", "controller")]
        inner += [current.__context__] if handled else []
        inner += getattr(current, "worker_failures", {}).values()
        stack += [e for e in inner if isinstance(e, BaseException)]
