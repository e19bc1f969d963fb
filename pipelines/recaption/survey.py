"""Counts the faulty captions of a finished table, in `_health.json`.

`_similar.csv` has the keys of rows whose caption is similar to an earlier row's, which is known only
once all rows are written.

Ray tasks read the small columns of each part once. The driver adds up the counts and sorts signatures on
its disk; it needs one byte of memory per row.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.execution.chunks import map_chunks
from pipelines.execution.cluster import Cluster
from pipelines.images.rows import OK
from pipelines.recaption.health import REPEATED
from pipelines.recaption.similar import HASHES, SimilarCaptions, signature
from pipelines.storage.files import is_file, write_atomically, write_pieces
from pipelines.storage.parquet import open_parquet
from pipelines.storage.tables import Table, read_json_object

FILE = "_health.json"
SIMILAR_FILE = "_similar.csv"  # not Parquet, so that globs skip it
_COLUMNS = ["caption", "status", "num_tokens", "num_words", "truncated", "empty", "repetition",
            "non_language"]  # fmt: skip


_COUNTED = ("captions", "truncated", "empty", "repeated", "non_language")


@dataclass(frozen=True)
class Survey:
    """Numbers of captions by fault; a caption can have several."""

    rows: int = 0
    captions: int = 0  # rows of status ok
    truncated: int = 0
    empty: int = 0
    repeated: int = 0
    non_language: int = 0
    duplicates: int = 0  # similar to the caption of an earlier row
    words: dict[int, int] = field(default_factory=dict)  # captions by number of words
    tokens: dict[int, int] = field(default_factory=dict)  # captions by number of tokens
    commonest: list[tuple[int, str]] = field(default_factory=list)
    """The largest groups of captions with equal signatures: size and first caption."""

    @classmethod
    def read(cls, table: Table) -> Survey | None:
        """The survey of a table; None if there is none, or a takedown has removed it."""
        if not all(is_file(table.folder / name) for name in (FILE, SIMILAR_FILE)):
            return None
        fields = read_json_object(table.folder / FILE)
        for name in ("words", "tokens"):
            fields[name] = {int(number): count for number, count in fields[name].items()}
        fields["commonest"] = [tuple(group) for group in fields["commonest"]]
        return cls(**fields)


def survey(cluster: Cluster, table: Table) -> Survey:
    """Read the survey of a table without pending chunks, or make it."""
    if (result := Survey.read(table)) is None:
        result = _survey(cluster, table)
        write_atomically(table.folder / FILE, json.dumps(asdict(result), indent=1))
    return result


def _survey(cluster: Cluster, table: Table) -> Survey:
    commits = table.commits()
    rows = sum(commit.rows for commit in commits)
    ends = list(accumulate(commit.rows for commit in commits))
    starts = {c.chunk: end - c.rows for c, end in zip(commits, ends, strict=True)}
    totals = Counter[str]()
    lengths: dict[str, Counter[int]] = {"words": Counter(), "tokens": Counter()}
    similar = SimilarCaptions(rows)
    for block in map_chunks(
        cluster, [c.chunk for c in commits if c.rows], partial(_survey_chunk, table=table)
    ):
        (result,) = block.to_pylist()
        counts = json.loads(result["counts"])
        totals.update(counts["faults"])
        for name, counter in lengths.items():
            counter.update({int(number): count for number, count in counts[name].items()})
        signatures = np.frombuffer(result["signatures"], np.uint32).reshape(-1, HASHES)
        similar.add(np.array(result["rows"], np.int64) + starts[result["chunk"]], signatures)
    later, groups = similar.count(rows)
    chunks = [commit.chunk for commit in commits]
    _write_similar(table, chunks, later)
    texts = []
    for size, number in groups:
        chunk = chunks[int(np.searchsorted(ends, number, "right"))]
        texts.append((size, _caption(table, chunk, number - starts[chunk])))
    return Survey(
        rows=rows,
        **{name: totals[name] for name in _COUNTED},
        duplicates=int(later.sum()),
        words=dict(sorted(lengths["words"].items())),
        tokens=dict(sorted(lengths["tokens"].items())),
        commonest=texts,
    )


def _survey_chunk(chunk: int, table: Table) -> pa.Table:
    """The counts of a chunk, and the signatures of its non-empty captions."""
    with open_parquet(table.part(chunk)) as parquet:
        rows = parquet.read(columns=_COLUMNS)
    has_caption = pc.equal(rows["status"], OK)
    captions = rows.filter(has_caption)
    faults: dict[str, Any] = {
        name: pc.sum(captions[name], min_count=0).as_py() or 0
        for name in ("truncated", "empty", "non_language")
    }
    repeated = pc.greater_equal(captions["repetition"], pa.scalar(REPEATED, pa.float32()))
    faults |= {"captions": captions.num_rows, "repeated": pc.sum(repeated).as_py() or 0}
    words, tokens = (Counter(captions[f"num_{name}"].to_pylist()) for name in ("words", "tokens"))
    counts = {"faults": faults, "words": words, "tokens": tokens}
    has_words = pc.and_(has_caption, pc.fill_null(pc.greater(rows["num_words"], 0), False))
    texts = rows["caption"].filter(has_words).to_pylist()
    result = {
        "chunk": chunk,
        "counts": json.dumps(counts),
        "rows": np.flatnonzero(np.asarray(has_words.to_pylist(), bool)).tolist(),
        "signatures": b"".join(signature(text).tobytes() for text in texts),
    }
    return pa.Table.from_pylist([result], _CHUNK_RESULT)


_CHUNK_RESULT = pa.schema(
    [
        ("chunk", pa.int64()),
        ("counts", pa.string()),  # JSON
        ("rows", pa.list_(pa.int64())),  # positions of the signatures' captions
        ("signatures", pa.large_binary()),
    ]
)


def _write_similar(table: Table, chunks: Sequence[int], later: np.ndarray) -> None:
    """Write the keys of the rows in the mask `later`, bool `[rows]`, in the order of `chunks`."""

    def pieces() -> Iterator[bytes]:
        yield b"key\n"
        start = 0
        for part in table.columns(chunks, ["key"]):
            keys = part["key"].to_numpy()
            mask = later[start : start + len(keys)]
            start += len(keys)
            yield "".join(f"{key}\n" for key in keys[mask]).encode()

    write_pieces(table.folder / SIMILAR_FILE, pieces())


def _caption(table: Table, chunk: int, row: int) -> str:
    with open_parquet(table.part(chunk)) as parquet:
        text: str = parquet.read(columns=["caption"])["caption"][row].as_py()
    return text
