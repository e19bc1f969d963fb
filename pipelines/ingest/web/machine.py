"""What the machine allows a downloader: open files, and which proxies are ignored."""

from __future__ import annotations

import os
import resource
import sys
from functools import cache
from urllib.request import getproxies_environment

_OTHER_FILES = 1024  # for Ray, decoders and libraries, where the limit is high
_RESERVED = 64  # for decoders and tables that are opened later, where it is low
_FILES = 2  # of a request: its connection, and the look-up of a name or a connection that idles
_FILES_WHEN_FEW = 3  # both, to be safe


def requests_that_fit(wanted: int) -> int:
    """How many of `wanted` requests may be in flight at a time, at least one.

    Raises this process's own limit of open files, which is often 1,024, as far as it may. Where the
    hard limit is too low, fewer requests are made: a connection without a file would be taken for one
    that the host refused.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _FILES * wanted + _OTHER_FILES
    unlimited = resource.RLIM_INFINITY
    aim = needed if hard == unlimited else min(hard, needed)
    if soft != unlimited and soft < aim:
        resource.setrlimit(resource.RLIMIT_NOFILE, (aim, hard))
    if hard == unlimited or hard >= needed:
        return wanted
    free = hard - _open_files() - min(_RESERVED, hard // 4)
    fit = max(1, min(wanted, free // _FILES_WHEN_FEW))
    if fit < wanted:
        _say_few_files(hard, wanted, fit)
    return fit


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return _RESERVED


@cache
def _say_few_files(allowed: int, wanted: int, fit: int) -> None:
    print(
        f"warning: this machine allows a process {allowed} open files: {fit} requests are in flight at "
        f"a time, not {wanted}; raise the hard limit (ulimit -Hn) for more",
        file=sys.stderr,
        flush=True,
    )


def warn_of_proxies() -> None:
    """Say in one line that proxies of the environment are not used.

    A proxy decides which addresses are reached. Nobody should get that by a variable that is set for
    other programs, so it has to be asked for by `download.proxy`.
    """
    there = getproxies_environment()
    named = [f"{scheme}_proxy" for scheme in ("http", "https", "all") if there.get(scheme)]
    if named:
        print(
            f"warning: {', '.join(named)} in the environment: ignored, images are fetched without a "
            "proxy (download.proxy=http://host:port sets one)",
            file=sys.stderr,
            flush=True,
        )
