"""The sum of the parts, and the largest batch that fits."""

from dataclasses import replace

from pipelines.estimate.memory import CONTEXT, Memory, largest_batch

STATES = Memory(weights=4_000_000_000, gradients=10, optimizer=100, buckets=1_000, context=CONTEXT)


def with_rows(rows: int) -> Memory:
    counted = 500_000_000 + rows * 800_000_000
    return replace(STATES, activations=counted, late_activations=counted - 1_000_000)


def test_activations_buckets_and_update_come_one_after_the_other() -> None:
    memory = Memory(1, 2, 4, buckets=8, activations=20, late_activations=10, update=100, context=50)
    assert (memory.allocated, memory.total, memory.least) == (107, 157, 157)
    assert replace(memory, update=0).allocated == 7 + 20
    assert replace(memory, update=0).total == 7 + 22 + 50  # fragments
    assert replace(memory, update=0, late_activations=20).allocated == 7 + 8 + 20


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    for start in (1, 4, 30):
        for capacity in (8e9, 20e9, 80e9):
            largest = largest_batch(start, with_rows(start), with_rows, int(capacity))
            assert with_rows(largest).total <= capacity
            assert with_rows(largest + 2).total > capacity


def test_none_fits_where_not_even_the_weights_do() -> None:
    assert largest_batch(4, with_rows(4), with_rows, 5_000_000_000) == 0
    assert largest_batch(4, with_rows(4), with_rows, 6_000_000_000) == 0  # one row does not
