"""The entry point of every job: parse the settings, run, report an error in one line."""

from __future__ import annotations

import errno
import os
import re
import select
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from pipelines.cli.config import parse
from pipelines.cli.settings_file import annotation_of, is_list
from pipelines.cli.signals import (
    ReceivedSignal,
    interrupt_on_signals,
    print_interrupted,
    signal_status,
)
from vlv_model.config import Config
from vlv_model.errors import VLVError

C = TypeVar("C", bound=Config)

BAD_INPUT, INTERRUPTED, OUTPUT_CLOSED = 2, 130, 141

# Ray Data appends this, and the location of the step, to the message of an error.
_RAY_SUFFIX = " Failed to apply UDF transform"

# In Ray's message: the node's address, and its memory use.
_FULL_MEMORY = re.compile(r"Memory on the node \(IP: ([^,]+),[^)]*\) was (.+? used / .+?) limit")

# Errors that a user's paths can cause anywhere: full, read-only, not permitted, name too long.
_SYSTEM_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG,
    errno.ELOOP, errno.ENOTDIR,
}  # fmt: skip


def main(
    cls: type[C],
    run: Callable[[C], None],
    description: str,
    aliases: Mapping[str, str] = MappingProxyType({}),
    continues: bool = True,
) -> int:
    """Run a job from its command line and return its exit status.

    `continues`: after an interruption the same command continues, as of every job with an output.

    0: done. 2: bad input. 130: Ctrl-C. 143: SIGTERM. 129: SIGHUP. 141: nobody reads the standard output,
    as after `| head`. If the job's own Ray is killed, the process exits with 3
    (pipelines.execution.connection).

    A VLVError, also one raised on a worker and wrapped by Ray, is printed to standard error as one
    line. Any other error is a bug and keeps its traceback.
    """
    try:
        try:
            return _main(cls, run, description, aliases, continues)
        finally:
            if sys.stdout is not None:  # None: closed
                sys.stdout.flush()  # so that an error of the last lines is reported here
    except OSError as error:
        line = _system_error_line(error)
        if not line and not (isinstance(error, BrokenPipeError) and _reader_is_gone()):
            raise
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # Python flushes again at exit
        if line:
            print(f"error: {line}", file=sys.stderr)
        return BAD_INPUT if line else OUTPUT_CLOSED


_subcommand = ""


@contextmanager
def as_subcommand(command: str) -> Iterator[None]:
    """Let the help of a job that runs in here show `command` in place of its script."""
    global _subcommand
    _subcommand = command
    try:
        yield
    finally:
        _subcommand = ""


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads; such an error may also be a socket's."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def _main(
    cls: type[C],
    run: Callable[[C], None],
    description: str,
    aliases: Mapping[str, str],
    continues: bool,
) -> int:
    usage = _subcommand or f"python {'/'.join(Path(sys.argv[0]).absolute().parts[-2:])}"
    if "" in aliases:
        several = " ..." if is_list(annotation_of(cls, aliases[""])) else ""
        usage += f" {aliases[''].upper()}{several}"
    received = ReceivedSignal()
    try:
        with interrupt_on_signals() as received:
            run(parse(cls, sys.argv[1:], usage, description, aliases))
    except KeyboardInterrupt:
        print_interrupted(continues)
        return received.status or INTERRUPTED
    except SystemExit as exit:
        if (status := signal_status(exit)) is None:
            raise
        print_interrupted(continues)
        return status
    except Exception as error:
        if received.status is not None:  # the cleanup after the signal may have failed
            print_interrupted(continues)
            return received.status
        for cause in causes_of(error):
            if isinstance(cause, VLVError) and not hasattr(cause, "cause"):
                line = str(cause).partition(_RAY_SUFFIX)[0]
                print(f"error: {line}", file=sys.stderr)
                return BAD_INPUT
        # Without contexts: a bug while a system error was being handled keeps its traceback.
        for cause in causes_of(error, contexts=False):
            if explained := _system_error_line(cause):
                print(f"error: {explained}", file=sys.stderr)
                return BAD_INPUT
        raise
    return 0


def _system_error_line(error: BaseException) -> str | None:
    """The line for an error caused by a disk or by full memory, here or on a worker; else None."""
    # Not `str(error)`: Arrow's and fsspec's text repeats once per layer.
    if isinstance(error, OSError) and error.errno in _SYSTEM_ERRORS:
        # Ray Data may have put its advice in the place of the file name.
        named = error.filename and not str(error.filename).startswith(_RAY_SUFFIX.strip())
        return f"{os.strerror(error.errno)}: {error.filename if named else 'writing'}"
    kind = type(error)  # compared by name to avoid importing Ray
    if kind.__module__.partition(".")[0] == "ray" and kind.__name__ == "OutOfMemoryError":
        match = _FULL_MEMORY.search(str(error))
        where = f" ({match[1]}: {match[2]})" if match else ""
        return (
            f"the memory of a machine is full{where}, so Ray ended a process of this job: use fewer "
            "or smaller processes per machine (workers, readers, actors, batches), or machines with "
            "more memory; the same command then continues"
        )
    return None


def causes_of(error: BaseException, contexts: bool = True) -> Iterator[BaseException]:
    """The error and its causes: exception chains, Ray's task errors, the errors of Train's ranks.

    With `contexts` also the errors that were being handled when another one was raised.
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
        # Errors of a Ray Train rank and of its controller.
        inner += [getattr(current, f"{n}_failure", None) for n in ("health_check", "controller")]
        inner += [current.__context__] if contexts else []
        inner += getattr(current, "worker_failures", {}).values()
        stack += [e for e in inner if isinstance(e, BaseException)]
