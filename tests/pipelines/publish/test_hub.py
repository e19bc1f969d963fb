"""A table and its card reach the hub: once, in spite of failures, and nobody sees the token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.cli.config import load
from pipelines.images.card import write_card
from pipelines.images.rows import IMAGE_ROW
from pipelines.publish import hub as pushing
from pipelines.publish.config import PublishConfig
from pipelines.publish.hub import push
from pipelines.storage.tables import Table
from tests.pipelines.publish.stand_in import TOKEN, Hub, stand_in
from vlv_model.errors import ConfigError, DataError, RunError, VLVError


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    with stand_in() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(pushing, "PAUSES", (0.0, 0.0))
        yield served


@pytest.fixture
def table(tmp_path: Path) -> Table:
    table = Table(tmp_path / "captions")
    table.create("image", {}, 5, parts="data")
    for part in range(5):
        rows = [
            {"key": 10 * part + i, "url": f"http://h.org/{i}", "status": "ok"} for i in range(3)
        ]
        table.write(part, pa.Table.from_pylist(rows, schema=IMAGE_ROW))
    write_card(table)
    return table


def content_of(table: Table) -> dict[str, bytes]:
    files = [*table.parts.glob("*.parquet"), table.folder / "README.md"]
    return {str(file.relative_to(table.folder)): file.read_bytes() for file in files}


def test_a_table_is_pushed_with_its_card(
    hub: Hub, table: Table, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pushing, "COMMIT_FILES", 2)
    assert (
        push(str(table.folder), "me/captions", private=True)
        == f"{hub.address}/datasets/me/captions"
    )
    assert hub.files == content_of(table)
    assert hub.private == {"me/captions": True}
    assert len(hub.commits) == 4  # the card's is the last
    assert "README.md" in hub.commits[-1]
    # Again: nothing is uploaded, and what the table has no more is deleted.
    hub.files["data/old.parquet"] = b"taken down"
    push(str(table.folder), "me/captions", private=True)
    assert hub.files == content_of(table)
    assert hub.uploads == 5
    shown = capsys.readouterr()
    assert "pushed 6 of 6 files" in shown.err
    assert TOKEN not in shown.err + shown.out


def test_a_push_that_failed_goes_on(
    hub: Hub, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "COMMIT_FILES", 2)
    hub.failures = [503, 429]  # then it answers
    push(str(table.folder), "me/a", private=False)
    assert hub.files == content_of(table)
    assert hub.private == {"me/a": False}
    before, hub.files, hub.objects, hub.uploads = hub.uploads, {}, {}, 0
    assert before == 5
    hub.failures = [503] * 3
    with pytest.raises(RunError, match=r"^repo=me/a: the hub does not take it .* goes on") as error:
        push(str(table.folder), "me/a", private=False)
    assert "\n" not in str(error.value)
    assert "README.md" not in hub.files
    push(str(table.folder), "me/a", private=False)
    assert hub.files == content_of(table)
    assert hub.uploads == 5


@pytest.mark.parametrize("token", ["hf_wrongwrongwrong", None])
def test_a_refused_token_is_one_line(
    hub: Hub, table: Table, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        VLVError, match=r"^repo=me/a: the hub refused the token: set HF_TOKEN"
    ) as error:
        push(str(table.folder), "me/a", private=True)
    assert "\n" not in str(error.value)
    assert "hf_wrong" not in str(error.value)
    assert not hub.files


def test_what_cannot_be_pushed(hub: Hub, table: Table, tmp_path: Path) -> None:
    (table.folder / "README.md").unlink()
    with pytest.raises(DataError, match="has no card"):
        push(str(table.folder), "me/a", private=True)
    for given, message in {
        "repo=captions": "expected OWNER/NAME",
        "private=false": "give either output=",
        "images=/i": "give either output=",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load(PublishConfig, None, ["table=/t", given])
    with pytest.raises(ConfigError, match="images belong to output"):
        load(PublishConfig, None, ["table=/t", "images=/i", "repo=a/b"])
