"""The settings of `download.`, and each process's share of the limits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from pydantic import Field, field_validator

from pipelines.ingest.web.optout import AGENT, DEFAULT_RULES, RULES, Rule
from pipelines.ingest.web.proxy import ProxyURL
from vlv_model.config import Config

PER_CPU = 256
"""Requests in flight by default: many because most servers answer late, and some never."""
_PRINTABLE = r"^[ -~]+$"  # characters allowed in a header


class DownloadConfig(Config):
    """How images are downloaded."""

    concurrency: int | None = Field(
        None,
        ge=1,
        description="maximum of requests in flight in the whole job; it starts lower, and halves while "
        "bodies stall; lower still where the limit of open files is low; default: 256 for each CPU",
    )
    concurrency_per_host: int = Field(
        16,
        ge=1,
        description="requests in flight to one host in the whole job (at least one in each process)",
    )
    total_timeout: float = Field(
        30.0,
        gt=0,
        description="seconds for one attempt, with redirects: at most a sixth of it to connect to an "
        "address, and a third without a byte from the server; also the longest Retry-After to wait for",
    )
    retries: int = Field(
        1,
        ge=0,
        description="retries after timeout, refused, http_429, http_5xx; the first after a second, each "
        "further one after twice as long, with jitter",
    )
    max_bytes: int = Field(
        32 << 20, ge=1, description="largest body, in bytes, as sent and after decompression"
    )
    allow_private: bool = Field(
        False, description="connect to loopback and private addresses too; for tests only"
    )
    proxy: ProxyURL | None = Field(
        None,
        repr=False,
        description="HTTP proxy for all requests: http://host:port or https://host:port, with "
        "user:password@ before the host if it requires them (put a password into the --config file: "
        "others can see a command line); the proxy resolves host names and so decides which addresses "
        "are reached: only private addresses in URLs are still refused; default: none, http_proxy is ignored",
    )
    respect_optout: bool | tuple[Rule, ...] = Field(
        True,
        description="owners' refusals to honour: x_robots_tag (header X-Robots-Tag: noai, noimageai, "
        "noindex, noimageindex), noml (X-Robots-Tag: noml), tdm_header (tdm-reservation: 1), robots_txt "
        "and tdm_file (/.well-known/tdmrep.json), which each cost one request to every host, "
        "content_usage (Content-Usage: train-ai=n, as a header and in robots.txt); true: those of the "
        f"table, of a new table {', '.join(DEFAULT_RULES)}; false: none",
    )
    user_agent: str = Field(
        f"{AGENT}/1.0 (VLV image dataset ingest; honours X-Robots-Tag: noai)",
        pattern=_PRINTABLE,
        description="User-Agent header, followed by `contact`",
    )
    contact: str | None = Field(
        None,
        pattern=_PRINTABLE,
        description="your URL or e-mail address, sent to every server: set it before you fetch from "
        "the open web",
    )

    retry_delay: ClassVar[float] = 1.0  # seconds
    max_redirects: ClassVar[int] = 5

    removed: ClassVar[Mapping[str, str]] = {
        "connect_timeout": "it is a sixth of download.total_timeout",
        "read_timeout": "it is a third of download.total_timeout",
        "host_timeouts": "it is twice download.concurrency_per_host, at least 8",
        "retry_delay": "the first retry follows after a second, each further one after twice as long",
        "max_retry_after": "download.total_timeout is the longest Retry-After to wait for",
        "max_redirects": "five redirects are followed",
    }

    @cached_property
    def connect_timeout(self) -> float:
        """Seconds to connect to one address."""
        return self.total_timeout / 6

    @cached_property
    def read_timeout(self) -> float:
        """Seconds without a byte from the server."""
        return self.total_timeout / 3

    @field_validator("respect_optout", mode="before")
    @classmethod
    def _known_rules(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return value
        names = value if isinstance(value, list | tuple) else [value]
        for name in names:
            if name not in RULES:
                raise ValueError(f"'{name}': expected true, false or some of {', '.join(RULES)}")
        return tuple(names)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The refusals to honour, in the order of RULES."""
        if isinstance(self.respect_optout, bool):
            return DEFAULT_RULES if self.respect_optout else ()
        return tuple(rule for rule in RULES if rule in self.respect_optout)


def config_per_process(config: DownloadConfig, processes: int, cpus: float) -> DownloadConfig:
    """The configuration of each of `processes` downloaders of a job on `cpus` CPUs."""
    total = config.concurrency or int(PER_CPU * cpus)
    return config.model_copy(
        update={
            "concurrency": max(1, total // processes),
            "concurrency_per_host": max(1, config.concurrency_per_host // processes),
        }
    )
