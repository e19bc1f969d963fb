"""Repositories of the model hub: how they are named, which commit a name stands for, what is cached.

A hub id is `owner/name` or `owner/name@revision`; a revision is a commit, a branch or a tag.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from vlv_model.errors import ModelError, one_line

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w][\w./-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Of the HTTP library below, which was another one in each major version: no connection, no answer.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_PATIENCE = 10.0  # seconds in which the hub has to say which commit a name stands for


@dataclass(frozen=True)
class HubId:
    """A repository of the hub, and which of its revisions; None: that of its main branch."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """None for what is no hub id."""
        found = _HUB_ID.fullmatch(text)
        return cls(found[1], found[2]) if found else None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    @property
    def commit(self) -> str | None:
        """The commit that it names; None where it names a branch or a tag, or nothing."""
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None

    def pinned(self) -> HubId:
        """The same repository at the commit that the hub, or else its cache here, has for it now.

        Raises ModelError where neither knows it.
        """
        if self.commit:
            return self
        try:
            commit = HfApi().model_info(self.repo, revision=self.revision, timeout=_PATIENCE).sha
        except (OSError, _HTTP_ERROR, ValueError) as problem:  # no network, no such repository, …
            if (folder := self.snapshot()) is None:
                raise ModelError(
                    f"'{self}' is no local folder, and the model hub does not give it: "
                    f"{one_line(problem)}"
                ) from problem
            commit = folder.name
        return HubId(self.repo, commit)

    def snapshot(self) -> Path | None:
        """The folder of what is cached here of it, which may lack files; None where nothing is."""
        try:
            found = snapshot_download(self.repo, revision=self.revision, local_files_only=True)
            return Path(found)
        except LocalEntryNotFoundError as known:
            incomplete = getattr(known, "snapshot_path", None)  # told by newer versions
            return Path(incomplete) if incomplete else None
        except HFValidationError:
            return None
