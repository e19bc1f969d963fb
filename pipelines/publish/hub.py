"""Pushes a table with its card to a data set on the Hugging Face hub.

The parts go in commits of COMMIT_FILES files, the card in the last. Files that are there already are not
uploaded again, so a killed push goes on where it stopped; parts that the table has no more are deleted. The
git history of the repository keeps what an earlier push uploaded.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.images.card import FILE as CARD
from pipelines.recaption.json_file import FILE as JSON_FILE
from pipelines.recaption.survey import SIMILAR_FILE
from pipelines.storage.files import PAUSES, is_file, is_url
from pipelines.storage.tables import Table, parquet_files
from vlv_model.errors import DataError, RunError, one_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COMMIT_FILES = 200
_DATA = "data"  # folder of the parts, as the card names it
_STATUS_ADVICE = {
    401: "the hub refused the token: set HF_TOKEN, or run `hf auth login`",
    403: "the token may not write there: it needs the role `write`, and you a right to {repo}",
    404: "there is no such owner, or the token may not see {repo}",
}
T = TypeVar("T")


def push(table: str, repo: str, private: bool) -> str:
    """Push a published table to the data set `repo`, which is created if needed; returns its address.

    Raises DataError for a table without a card, and RunError, one line without the token, when the hub
    refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    files = _files(table)
    api = HfApi()
    url = _call(
        repo, lambda: api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
    )
    _delete_others(api, repo, files)
    *data, card = sorted(files, key=lambda name: (name == CARD, name))
    done = 0
    for names in [*_batches(data), [card]]:
        _commit(api, repo, {name: files[name] for name in names})
        done += len(names)
        print(f"pushed {done:,} of {len(files):,} files", file=sys.stderr, flush=True)
    return str(url)


def _files(table: str) -> dict[str, Path]:
    """What is pushed, by its path in the repository."""
    parts, folder = parquet_files(table, "table"), Table(table).folder
    if is_url(folder):
        raise DataError(f"table={table}: a push reads a table on a disk: copy it")
    if not (Table(table).exists and is_file(folder / CARD)):
        raise DataError(f"table={table} has no card ({CARD}): give a table of this pipeline")
    others = [folder / name for name in (CARD, SIMILAR_FILE, JSON_FILE)]
    return {
        **{f"{_DATA}/{part.name}": part for part in parts},
        **{file.name: file for file in others if is_file(file)},
    }


def _batches(names: list[str]) -> Iterator[list[str]]:
    return (names[i : i + COMMIT_FILES] for i in range(0, len(names), COMMIT_FILES))


def _commit(api: HfApi, repo: str, files: dict[str, Path]) -> None:
    from huggingface_hub import CommitOperationAdd

    def commit() -> None:
        # Made again for each attempt: they hold the state of their upload.
        adds = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
        message = f"Add {next(iter(files))}" + (
            f" and {len(files) - 1} more" if len(files) > 1 else ""
        )
        api.create_commit(repo, adds, commit_message=message, repo_type="dataset")

    _call(repo, commit)


def _delete_others(api: HfApi, repo: str, files: dict[str, Path]) -> None:
    """Delete the parts of an earlier push that the table has no more."""
    from huggingface_hub import CommitOperationDelete

    there = _call(repo, lambda: api.list_repo_files(repo, repo_type="dataset"))
    gone = [n for n in there if n.startswith(f"{_DATA}/") and n not in files]
    if gone:
        deletes = [CommitOperationDelete(name) for name in gone]
        message = "Delete parts that are gone"
        _call(
            repo,
            lambda: api.create_commit(repo, deletes, commit_message=message, repo_type="dataset"),
        )


def _call(repo: str, action: Callable[[], T]) -> T:
    """The result of an action on the hub, which is repeated while the hub does not answer."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # Of an HTTP library that differs between the major versions.
    http_error: type[Any] = HfHubHTTPError.__bases__[0]
    for pause in (*PAUSES, None):
        try:
            return action()
        except OfflineModeIsEnabled:
            raise RunError(f"repo={repo}: HF_HUB_OFFLINE is set: unset it to push") from None
        except http_error as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in _STATUS_ADVICE:
                raise RunError(f"repo={repo}: {_STATUS_ADVICE[status].format(repo=repo)}") from None
            transient = status is None or status >= 500 or status in (408, 409, 412, 429)
            if pause is None or not transient:
                reason = one_line(error).replace(get_token() or "\0", "***")
                raise RunError(
                    f"repo={repo}: the hub does not take it ({reason}): the same command goes on where "
                    "this one stopped"
                ) from None
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")
