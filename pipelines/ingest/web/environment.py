"""What the environment of the process allows: open files; proxy variables, which are ignored."""

from __future__ import annotations

import os
import resource
import sys
from functools import cache
from urllib.request import getproxies_environment

_FILES_OF_OTHERS = 1024  # for Ray, decoders and libraries, if the limit is high
_RESERVED_FILES = 64  # for decoders and tables that are opened later, if the limit is low
_FILES_PER_REQUEST = 2  # its connection, and a name look-up or an idle connection
_FILES_PER_REQUEST_WHEN_FEW = 3  # its connection, and both


def requests_that_fit(wanted: int) -> int:
    """How many of `wanted` requests may be in flight within the limit of open files, at least one.

    Raises the soft limit of this process, often 1,024, as far as the hard limit allows. With too low a
    hard limit there are fewer requests: a connection that fails for lack of a file would look like
    one that the host refused.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _FILES_PER_REQUEST * wanted + _FILES_OF_OTHERS
    unlimited = resource.RLIM_INFINITY
    target = needed if hard == unlimited else min(hard, needed)
    if soft != unlimited and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    if hard == unlimited or hard >= needed:
        return wanted
    free = hard - _open_files() - min(_RESERVED_FILES, hard // 4)
    fit = max(1, min(wanted, free // _FILES_PER_REQUEST_WHEN_FEW))
    if fit < wanted:
        _warn_of_few_files(hard, wanted, fit)
    return fit


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return _RESERVED_FILES


@cache
def _warn_of_few_files(limit: int, wanted: int, fit: int) -> None:
    print(
        f"warning: this machine allows a process {limit} open files: {fit} requests are in flight at "
        f"a time, not {wanted}; raise the hard limit (ulimit -Hn) for more",
        file=sys.stderr,
        flush=True,
    )


def warn_of_ignored_proxies() -> None:
    """Print one line if the environment has proxy variables, which are ignored.

    A proxy decides which addresses are reached, so it has to be requested by `download.proxy`, not by
    a variable that is set for other programs.
    """
    proxies = getproxies_environment()
    names = [f"{scheme}_proxy" for scheme in ("http", "https", "all") if proxies.get(scheme)]
    if names:
        print(
            f"warning: {', '.join(names)} in the environment: ignored, images are fetched without a "
            "proxy (download.proxy=http://host:port sets one)",
            file=sys.stderr,
            flush=True,
        )
