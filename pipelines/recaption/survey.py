"""How healthy the captions of a finished table are: counts over all of it, kept in `_health.json`.

`_similar.csv` has the keys of rows whose caption is similar to that of an earlier row: what is known
of the whole table alone cannot stand in the rows, which were written before.

One pass over the small columns of the parts, by tasks of the cluster; the driver adds up, and sorts
signatures on its disk: of its memory one byte a row grows with the table.
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
SIMILAR_FILE = "_similar.csv"  # not Parquet, as globs of the rows should pass it over
_COLUMNS = ["caption", "status", "num_tokens", "num_words", "truncated", "empty", "repetition",
            "non_language"]  # fmt: skip


_COUNTED = ("captions", "truncated", "empty", "repeated", "non_language")


@dataclass(frozen=True)
class Survey:
    """Captions of a table by what is wrong with them; one can be several at once."""

    rows: int = 0
    captions: int = 0  # rows of status ok
    truncated: int = 0
    empty: int = 0
    repeated: int = 0
    non_language: int = 0
    duplicates: int = 0  # similar to the caption of an earlier row
    words: dict[int, int] = field(default_factory=dict)  # captions by number of words
    tokens: dict[int, int] = field(default_factory=dict)  # and of tokens
    commonest: list[tuple[int, str]] = field(default_factory=list)
    """How many captions have the signature of this one, itself included; of the largest groups."""

    @classmethod
    def read(cls, table: Table) -> Survey | None:
        """What was found of a table; None where nobody looked, or rows are gone since."""
        if not all(is_file(table.folder / name) for name in (FILE, SIMILAR_FILE)):
            return None
        found = read_json_object(table.folder / FILE)
        for name in ("words", "tokens"):
            found[name] = {int(number): count for number, count in found[name].items()}
        found["commonest"] = [tuple(group) for group in found["commonest"]]
        return cls(**found)


def survey(cluster: Cluster, table: Table) -> Survey:
    """The survey of a table of which no chunk is pending, made where there is none."""
    if (found := Survey.read(table)) is None:
        found = _survey(cluster, table)
        write_atomically(table.folder / FILE, json.dumps(asdict(found), indent=1))
    return found


def _survey(cluster: Cluster, table: Table) -> Survey:
    commits = table.commits()
    rows = sum(commit.rows for commit in commits)
    ends = list(accumulate(commit.rows for commit in commits))
    starts = {c.chunk: end - c.rows for c, end in zip(commits, ends, strict=True)}
    totals = Counter[str]()
    lengths: dict[str, Counter[int]] = {"words": Counter(), "tokens": Counter()}
    similar = SimilarCaptions(rows)
    for block in map_chunks(
        cluster, [c.chunk for c in commits if c.rows], partial(_look, table=table)
    ):
        (line,) = block.to_pylist()
        told = json.loads(line["told"])
        totals.update(told["counts"])
        for name, counter in lengths.items():
            counter.update({int(number): count for number, count in told[name].items()})
        signatures = np.frombuffer(line["signatures"], np.uint32).reshape(-1, HASHES)
        similar.add(np.array(line["said"], np.int64) + starts[line["chunk"]], signatures)
    later, groups = similar.count(rows)
    chunks = [commit.chunk for commit in commits]
    _write_similar(table, chunks, later)
    texts = []
    for size, number in groups:
        at = int(np.searchsorted(ends, number, "right"))
        texts.append((size, _caption(table, chunks[at], number - starts[chunks[at]])))
    return Survey(
        rows=rows,
        **{name: totals[name] for name in _COUNTED},
        duplicates=int(later.sum()),
        words=dict(sorted(lengths["words"].items())),
        tokens=dict(sorted(lengths["tokens"].items())),
        commonest=texts,
    )


def _look(chunks: pa.Table, table: Table) -> pa.Table:
    """Counts of a chunk, and the signatures of its captions that have a word."""
    (chunk,) = chunks["chunk"].to_pylist()
    with open_parquet(table.part(chunk)) as parquet:
        rows = parquet.read(columns=_COLUMNS)
    good = pc.equal(rows["status"], OK)
    captions = rows.filter(good)
    counts: dict[str, Any] = {
        name: pc.sum(captions[name], min_count=0).as_py() or 0
        for name in ("truncated", "empty", "non_language")
    }
    repeated = pc.greater_equal(captions["repetition"], pa.scalar(REPEATED, pa.float32()))
    counts |= {"captions": captions.num_rows, "repeated": pc.sum(repeated).as_py() or 0}
    words, tokens = (Counter(captions[f"num_{name}"].to_pylist()) for name in ("words", "tokens"))
    told = {"counts": counts, "words": words, "tokens": tokens}
    says = pc.and_(good, pc.fill_null(pc.greater(rows["num_words"], 0), False))
    texts = rows["caption"].filter(says).to_pylist()
    signatures = b"".join(signature(text).tobytes() for text in texts)
    said = np.flatnonzero(np.asarray(says.to_pylist(), bool)).tolist()
    made = {"chunk": chunk, "told": json.dumps(told), "said": said, "signatures": signatures}
    return pa.Table.from_pylist([made], _TOLD)


_TOLD = pa.schema(
    [
        ("chunk", pa.int64()),
        ("told", pa.string()),
        ("said", pa.list_(pa.int64())),
        ("signatures", pa.large_binary()),
    ]
)


def _write_similar(table: Table, chunks: Sequence[int], later: np.ndarray) -> None:
    """Write the keys of the rows in the mask `[rows]`, which is in the order of the chunks."""

    def pieces() -> Iterator[bytes]:
        yield b"key\n"
        start = 0
        for part in table.columns(chunks, ["key"]):
            keys = part["key"].to_numpy()
            mine = later[start : start + len(keys)]
            start += len(keys)
            yield "".join(f"{key}\n" for key in keys[mine]).encode()

    write_pieces(table.folder / SIMILAR_FILE, pieces())


def _caption(table: Table, chunk: int, row: int) -> str:
    with open_parquet(table.part(chunk)) as parquet:
        text: str = parquet.read(columns=["caption"])["caption"][row].as_py()
    return text
