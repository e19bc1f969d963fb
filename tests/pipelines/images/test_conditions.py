"""A condition is one expression on the columns of a row, and nothing else."""

from __future__ import annotations

import pickle

import pyarrow as pa
import pytest

from pipelines.images.conditions import Where
from vlv_model.errors import ConfigError

ROWS = pa.table(
    {"text": ["x", None, "O'Brien"], "n": [1, 2, 3], "_row": ["a", "b", "c"], "url": ["u"] * 3,
     'we"ird name': [None, 1.5, 2.5]}
)  # fmt: skip


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("text = 'O''Brien'", [False, False, True]),
        ("text <> 'x'", [False, False, True]),  # null is not true
        ("text is null or N = 1", [True, True, False]),
        ("null", [False] * 3),
        ("_row = 'b' -- a comment", [False, True, False]),
        ('"we""ird name" > 1', [False, True, True]),
        ("n in (select unnest([1, 3]))", [True, False, True]),
    ],
)
def test_rows_that_satisfy_the_condition(condition: str, expected: list[bool]) -> None:
    where = pickle.loads(pickle.dumps(Where(condition)))
    assert where.mask(ROWS).tolist() == expected
    assert where.mask(ROWS.slice(0, 0)).tolist() == []


@pytest.mark.parametrize(
    "condition",
    [
        "",
        "true) union all select 99999 from rows where (true",
        "true) or (true",
        "true; drop table rows",
        "true limit 1",
        "n > (select avg(n) from rows)",  # a condition is evaluated on some of the rows at a time
        "n > (select avg(n) from numbered)",
        "row_number() over () = 1",
        "count(*) > 0",
        "colour = 'red'",
        "text = 'x",
        "text::int = 1",
        "n in (select 1 from read_csv('/etc/passwd'))",
    ],
)
def test_anything_but_a_condition_on_a_row_is_refused(condition: str) -> None:
    with pytest.raises(
        ConfigError, match=r"not a valid condition on these rows .*; columns: text, n, _row"
    ):
        Where(condition).mask(ROWS)


def test_columns_that_differ_only_in_case_cannot_be_used() -> None:
    """SQL would use either of them."""
    twins = pa.table({"url": ["u"], "URL": ["U"], "n": [1]})
    assert Where("n = 1").mask(twins).tolist() == [True]
    with pytest.raises(ConfigError, match=r'"url" not found.*; columns: n$'):
        Where("url = 'u'").mask(twins)
