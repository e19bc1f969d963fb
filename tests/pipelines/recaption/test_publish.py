"""The files of a published caption table, and other libraries that read it."""

import json
import re
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pipelines.admin.takedown import TakedownConfig, take_down
from pipelines.cli.config import build
from pipelines.recaption.card import caption_card
from pipelines.recaption.job import recaption
from pipelines.recaption.json_file import write_json
from pipelines.storage.tables import Table
from tests.pipelines.recaption.conftest import caption_table
from vlv_model.errors import RunError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three files, two with the same name, and one that is not an image."""
    folder = tmp_path / "pictures"
    for number, name in enumerate(["a.png", "one/a.png", "one/b.jpg"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 255, (70, 90, 3), np.uint8)
        Image.fromarray(noise).save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def test_other_libraries_read_the_table(settings, pictures: Path) -> None:
    import datasets

    config = settings(f"data.input={pictures}", "join=true", "format=json", "license=cc-by-4.0")
    assert recaption(config) == {"ok": 3, "decode:not_an_image": 1}
    folder = Path(config.data.output)

    opened = datasets.load_dataset(str(folder), split="train", cache_dir=str(folder.parent / "hf"))
    by_name = {row["name"]: row for row in opened}
    assert set(by_name) == {"a.png", "one/a.png", "one/b.jpg", "broken.png"}
    with Image.open(pictures / "one/a.png") as original:
        assert np.array_equal(np.asarray(by_name["one/a.png"]["image"]), np.asarray(original))
    assert by_name["broken.png"]["image"] is None
    assert by_name["broken.png"]["caption"] is None

    frame = pd.read_parquet(folder / "data")
    rows = duckdb.sql(f"select name, caption from '{folder}/data/*.parquet' where status = 'ok'")
    expected = {row["name"]: row["caption"] for row in opened if row["status"] == "ok"}
    assert dict(rows.fetchall()) == expected
    assert sorted(frame["name"]) == sorted(by_name)
    content = frame.set_index("name").loc["one/b.jpg", "image"]["bytes"]
    assert content == (pictures / "one/b.jpg").read_bytes()

    captions = json.loads((folder / "captions.json").read_text())
    assert captions == {
        name: by_name[name]["caption"] for name in ("a.png", "one/a.png")
    } | {"b.jpg": by_name["one/b.jpg"]["caption"]}  # fmt: skip

    text = (folder / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["license"] == "cc-by-4.0"
    assert header["size_categories"] == ["n<1K"]
    for words in (
        "3 captions of 4 images",
        "| decode:not_an_image | 1 |",
        "generate.num_beams | 1",
    ):
        assert words in text
    assert frame["model"][0] in text
    assert str(folder.parent) not in text
    images = folder.parent / "images.parquet"
    pd.DataFrame({"key": frame["key"], "image": [b"i"] * 4}).to_parquet(images)
    snippets = text.replace("path/to/images/data/*.parquet", str(images))
    snippets = snippets.replace(f"path/to/{folder.name}", str(folder))
    (sql,) = re.findall(r"```sql\n(.*?)```", snippets, re.DOTALL)
    captions, apart, joined = (duckdb.sql(part).fetchall() for part in sql.split(";")[:3])
    similar = (folder / "_similar.csv").read_text().split()[1:]
    assert dict(captions) == expected
    rest = frame[(frame["status"] == "ok") & ~frame["key"].astype(str).isin(similar)]
    assert sorted(name for name, _ in apart) == sorted(rest["name"])
    assert len(rest) >= 1
    assert sorted(key for key, _, _ in joined) == sorted(frame["key"])

    with pytest.raises(RunError, match="join: True there, None here"):
        recaption(settings(f"data.input={pictures}"))
    with pytest.raises(RunError, match=r"\(generate.max_new_tokens: 8 there, 9 here\)"):
        recaption(settings(f"data.input={pictures}", "join=true", "generate.max_new_tokens=9"))
    with pytest.raises(RunError, match=r"\(generate.temperature: None there, 0.5 here\)"):
        recaption(settings(f"data.input={pictures}", "join=true", "generate.temperature=0.5"))
    written = (folder / "README.md").stat().st_mtime_ns
    assert recaption(config) == {"ok": 3, "decode:not_an_image": 1}  # which is left as it is
    assert (folder / "README.md").stat().st_mtime_ns == written
    again = settings(f"data.input={pictures}", "join=true", "license=mit")  # nothing but the card
    assert recaption(again) == {"ok": 3, "decode:not_an_image": 1}
    assert "license: mit" in (folder / "README.md").read_text()


def test_repeated_image_names_are_made_unique(tmp_path: Path) -> None:
    names = [["x/a.png", "y/a.png", "same"], ["http://h/p/b.jpg?q=1", "same", "a.png", "c"]]
    chunks = [["one", "two", "three"], ["four", 'fi"ve\n', "six", None]]
    table = caption_table(tmp_path / "t", chunks, names)
    write_json(table)
    assert json.loads((table.folder / "captions.json").read_text()) == {
        "x/a.png": "one", "y/a.png": "two", "same#2": "three", "b.jpg?q=1": "four",
        "same#1001": 'fi"ve\n', "a.png": "six",
    }  # fmt: skip
    write_json(caption_table(tmp_path / "none", [[None]]))
    assert json.loads((tmp_path / "none/captions.json").read_text()) == {}


def test_samples_of_a_card_are_text(tmp_path: Path) -> None:
    """Markdown in names and captions is escaped."""
    text = "![x](http://h/t.png) | <img src=x> `code`\n\n# *big*"
    table = caption_table(tmp_path / "t", [[text]], [["[a](b).png"]])
    about = {
        "model": {"base_models": {}, "step": 1, "weights": "w", "fingerprint": "f", "image_size": 8},
        "license": "mit", "join": False, "generate": {}, "gate": {},
    }  # fmt: skip
    (line,) = (li for li in caption_card(table, about).splitlines() if li.startswith("| \\[a"))
    assert line == (
        r"| \[a\](b).png | !\[x\](http://h/t.png) \| &lt;img src=x> \`code\` # \*big\* |"
    )


def test_a_streamed_file_reaches_a_store(bucket: str) -> None:
    table = caption_table(Table(f"{bucket}/t").folder, [["a", "b"]])
    write_json(table)
    assert json.loads((table.folder / "captions.json").read_text()) == {"0.jpg": "a", "1.jpg": "b"}


def test_removed_captions_are_removed_from_all_files(settings, pair_table, tmp_path) -> None:
    config = settings("format=json")
    recaption(config)
    captions, images = Table(config.data.output), Table(tmp_path / "images")
    images.create("image", {}, 0)
    gone = pd.read_parquet(captions.parts).iloc[0]
    take = TakedownConfig(
        table=str(images.folder), keys=(int(gone["key"]),), derived=(str(captions.folder),)
    )
    assert take_down(take)[str(captions.folder)] == 1
    for file in captions.folder.rglob("*"):
        if file.is_file() and "_plan" not in file.parts:
            content = file.read_bytes()
            assert str(gone["name"]).encode() not in content, file
    assert "20 captions of 20 images" in (captions.folder / "README.md").read_text()


@pytest.mark.end_to_end
def test_a_table_in_a_store_has_all_of_it(ray_local, settings, bucket: str) -> None:
    config = settings(
        f"data.output={bucket}/captions", "format=json", "join=true", "ray.address=null"
    )
    assert recaption(config) == {"ok": 21}
    table = Table(config.data.output)
    names = {file.name for file in table.folder.iterdir()}
    assert {"README.md", "captions.json", "_report.html", "_published.json", "data"} <= names
    assert "_deaths" not in names
    assert len(json.loads((table.folder / "captions.json").read_text())) == 21
    assert (table.folder / "_report.html").read_text().count("<img") == 21
    assert recaption(config) == {"ok": 21}


def test_files_deleted_by_a_takedown_are_written_again(
    settings, pair_table: Path, tmp_path: Path
) -> None:
    """Also if the takedown did not list the captions, or the job was killed before it."""
    rows = pa.concat_tables(pq.read_table(file) for file in sorted(pair_table.iterdir()))
    images = Table(tmp_path / "images")
    images.create("image", {}, 2)
    for chunk in range(2):
        images.write(chunk, rows.slice(61 * chunk, 61), row_group_size=16)
    config = settings(f"data.input={images.folder}", "format=json")
    folder = Path(config.data.output)
    assert recaption(config) == {"ok": 21}
    beside = ["captions.json", "README.md", "_report.html", "_health.json", "_similar.csv"]
    before = pd.read_parquet(folder / "data").set_index("key")["caption"].to_dict()
    gone = list(before)[:3]
    for keys, derived in ((gone[:1], [str(folder)]), (gone[1:2], [])):
        named = {"table": str(images.folder), "keys": keys, "derived": derived}
        take_down(build(TakedownConfig, named))
        assert recaption(config) == {"ok": 21}  # the next rows come in, as data.limit=21
        after = pd.read_parquet(folder / "data").set_index("key")["caption"].to_dict()
        assert keys[0] not in after
        assert {key: after[key] for key in after if key in before} == {
            key: text for key, text in before.items() if key in after
        }
        assert len(json.loads((folder / "captions.json").read_text())) == 21
        assert all((folder / name).is_file() for name in beside)
        assert json.loads((folder / "_health.json").read_text())["rows"] == 21
    (folder / "data/part-000001.parquet").unlink()  # killed
    (folder / "_commits/000001.json").unlink()
    take_down(build(TakedownConfig, {"table": str(images.folder), "keys": gone[2:]}))
    assert recaption(config) == {"ok": 21}
    assert not set(pd.read_parquet(folder / "data")["key"]) & set(gone)
