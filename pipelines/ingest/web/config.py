"""How the web is asked: the settings of `download.`, and each process's share of them."""

from __future__ import annotations

from pydantic import Field

from pipelines.ingest.web.optout import AGENT
from pipelines.ingest.web.proxy import ProxyURL
from vlv_model.config import Config

PER_CPU = 256
"""Requests in flight by default: most of the web answers late, and some of it never."""
_PRINTABLE = r"^[ -~]+$"  # what a header may hold


class DownloadConfig(Config):
    """How the web is asked."""

    concurrency: int | None = Field(
        None,
        ge=1,
        description="most requests in flight, of the whole job, which begins with fewer and halves "
        "them while bodies stall; fewer where the machine allows few open files; default: 256 for each "
        "CPU",
    )
    concurrency_per_host: int = Field(
        16,
        ge=1,
        description="requests in flight to one host, of the whole job (but one for each process)",
    )
    connect_timeout: float = Field(5.0, gt=0, description="seconds to connect to one address")
    read_timeout: float = Field(10.0, gt=0, description="seconds without a byte from the server")
    total_timeout: float = Field(30.0, gt=0, description="seconds for one attempt, with redirects")
    host_timeouts: int | None = Field(
        None,
        ge=1,
        description="after so many time-outs in a row a host counts as down, if it has not answered in "
        "the last five minutes; its URLs then fail as host_down without a request, and one a minute is "
        "still tried (in each process); default: twice concurrency_per_host, and no fewer than 8",
    )
    retries: int = Field(
        1, ge=0, description="further attempts after timeout, refused, http_429, http_5xx"
    )
    retry_delay: float = Field(
        1.0, gt=0, description="seconds before the first retry, doubled for each one, jittered"
    )
    max_retry_after: float = Field(
        30.0,
        ge=0,
        description="longest Retry-After that is waited for; beyond it there is no retry",
    )
    max_redirects: int = Field(5, ge=0, description="redirects that are followed")
    max_bytes: int = Field(
        32 << 20, ge=1, description="largest body, in bytes, as sent and after decompression"
    )
    allow_private: bool = Field(
        False, description="connect to loopback and private addresses too; for tests only"
    )
    proxy: ProxyURL | None = Field(
        None,
        repr=False,
        description="HTTP proxy that all requests go through: http://host:port or https://host:port, "
        "user:password@ before the host where it wants them (put a password into the --config file: a "
        "command line is seen by others); it looks names up, so it decides which addresses are reached: "
        "only private addresses in URLs are still refused; default: none, whatever http_proxy says",
    )
    respect_optout: bool = Field(
        True, description="honour X-Robots-Tag: noai, noimageai, noindex, noimageindex"
    )
    user_agent: str = Field(
        f"{AGENT}/1.0 (VLV image dataset ingest; honours X-Robots-Tag: noai)",
        pattern=_PRINTABLE,
        description="User-Agent header, followed by `contact`",
    )
    contact: str | None = Field(
        None,
        pattern=_PRINTABLE,
        description="URL or e-mail address where you can be reached, told to every server that is "
        "asked: give one before you ask the open web",
    )


def share_of(config: DownloadConfig, processes: int, cpus: float) -> DownloadConfig:
    """What each of `processes` downloaders of a job on `cpus` CPUs may do."""
    total = config.concurrency or int(PER_CPU * cpus)
    return config.model_copy(
        update={
            "concurrency": max(1, total // processes),
            "concurrency_per_host": max(1, config.concurrency_per_host // processes),
        }
    )
