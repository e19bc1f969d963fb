"""Output of the real img2dataset, made in this process from a server on loopback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest


def download(folder: Path, rows: dict[str, list[Any]], kind: str, shard_rows: int = 1000) -> None:
    """Let img2dataset download `rows` (url, caption, …) into a folder, in one of its formats.

    It keeps the bytes that the server sends (`--disable_all_reencoding`).
    """
    pytest.importorskip("img2dataset")
    from img2dataset import writer
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer

    kinds = {
        "files": writer.FilesSampleWriter,
        "webdataset": writer.WebDatasetSampleWriter,
        "parquet": writer.ParquetSampleWriter,
    }
    resizer = Resizer(image_size=256, resize_mode="no", resize_only_if_bigger=False,
                      disable_all_reencoding=True)  # fmt: skip
    downloader = Downloader(
        kinds[kind], resizer, thread_count=4, save_caption="caption" in rows, extract_exif=True,
        output_folder=str(folder), column_list=list(rows), timeout=10,
        number_sample_per_shard=shard_rows, oom_shard_count=5, compute_hash="sha256",
        verify_hash_type=None, encode_format="jpg", retries=0, user_agent_token=None,
        disallowed_header_directives=["noai"],
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(rows)
    for shard, start in enumerate(range(0, table.num_rows, shard_rows)):
        file = folder.parent / f"{folder.name}-{shard}.feather"
        part = table.slice(start, shard_rows)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, part.schema) as stream:
            stream.write_table(part)
        downloader.download_shard((shard, str(file)))
