"""Ids of model hub repositories: parse them, pin them to a commit, find their cache.

A hub id is `owner/name` or `owner/name@revision`; a revision is a commit, a branch or a tag.
"""

from __future__ import annotations

import re
import socket
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from vlv_model.errors import ModelError, one_line

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w][\w./-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Connection errors of huggingface_hub's HTTP library, which differs between its major versions.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_TIMEOUT_SECONDS = 10.0  # for the hub to resolve a revision
_CONNECT_SECONDS = 1.5  # for a connection to the hub, with the look-up of its name


@dataclass(frozen=True)
class HubId:
    """A repository of the hub at a revision; None: its main branch."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """The hub id in a string, or None if it is not one."""
        found = _HUB_ID.fullmatch(text)
        return cls(found[1], found[2]) if found else None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    @property
    def commit(self) -> str | None:
        """The revision if it is a commit; None for a branch, a tag or no revision."""
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None

    def pinned(self, unreachable: Exception | None = None) -> HubId:
        """The same repository at its current commit, from the hub or else the local cache.

        `unreachable`: why the hub need not be asked. Raises ModelError when neither has it.
        """
        if self.commit:
            return self
        try:
            if unreachable is not None:
                raise unreachable
            info = HfApi().model_info(self.repo, revision=self.revision, timeout=_TIMEOUT_SECONDS)
            commit = info.sha
        except (OSError, _HTTP_ERROR, ValueError) as problem:  # no network, no such repository, …
            if (folder := self.snapshot()) is None:
                raise ModelError(
                    f"'{self}' is not a local folder, and the model hub does not provide it: "
                    f"{one_line(problem)}"
                ) from problem
            commit = folder.name
        return HubId(self.repo, commit)

    def snapshot(self) -> Path | None:
        """The folder in the local cache, which may lack files; None if nothing is cached."""
        try:
            found = snapshot_download(self.repo, revision=self.revision, local_files_only=True)
            return Path(found)
        except LocalEntryNotFoundError as error:
            incomplete = getattr(error, "snapshot_path", None)  # in newer versions
            return Path(incomplete) if incomplete else None
        except HFValidationError:
            return None


def why_unreachable() -> ConnectionError | None:
    """Why the hub, or the proxy in front of it, takes no connection; None if it does.

    Known within two seconds. The library waits for each address of a hub in turn, which takes a
    minute behind a firewall that drops packets.
    """
    if constants.HF_HUB_OFFLINE:
        return ConnectionError("HF_HUB_OFFLINE is set")
    address = urlsplit(constants.ENDPOINT)
    host, port = address.hostname or "", address.port or (80 if address.scheme == "http" else 443)
    proxies = urllib.request.getproxies()
    proxy = urlsplit(proxies.get(address.scheme) or proxies.get("all") or "")
    if proxy.hostname and not urllib.request.proxy_bypass(host):
        host, port = proxy.hostname, proxy.port or (443 if proxy.scheme == "https" else 80)
    ended: list[OSError | None] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), 2 * _CONNECT_SECONDS).close()
        except OSError as problem:
            ended.append(problem)
        else:
            ended.append(None)

    # In a thread, which is not waited for: the look-up of a name has no time-out.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_CONNECT_SECONDS)
    problem = ended[0] if ended else f"no connection within {_CONNECT_SECONDS:g} s"
    return None if problem is None else ConnectionError(f"{host}:{port}: {problem}")
