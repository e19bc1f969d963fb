"""FID, KID, CMMD and intervals against closed forms and naive loops."""

import math

import numpy as np
import pytest

from pipelines.evaluate.gaussians import Moments, frechet_distance, frechet_of_samples
from pipelines.evaluate.intervals import mean_interval, share_interval
from pipelines.evaluate.kernels import cmmd, kernel_distances, polynomial_mmd2


def moments(features: np.ndarray, parts: int = 1) -> Moments:
    shards = []
    for part in np.array_split(features, parts):
        shards.append(Moments(features.shape[1]))
        for batch in np.array_split(part, 3):
            shards[-1].add(batch)
    for other in shards[1:]:
        shards[0].merge(other)
    return shards[0]


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    made = Moments(len(mean))
    made.rows, made.mean, made.scatter = 2, mean, covariance
    return made


def test_frechet_of_gaussians_whose_distance_is_known() -> None:
    # Diagonal covariances: the sum of (√a − √b)² in each direction; a rotation changes nothing.
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    first = gaussian(turn @ [1, 2, 3], turn @ np.diag([4.0, 9, 1]) @ turn.T)
    second = gaussian(turn @ [1, 0, 3], turn @ np.diag([1.0, 16, 0]) @ turn.T)
    assert frechet_distance(first, second) == pytest.approx(4 + 1 + 1 + 1, abs=1e-9)


def test_frechet_does_not_depend_on_shards_or_a_large_mean() -> None:
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(503, 24)) * rng.uniform(0.1, 2, 24) + 1000).astype(np.float32)
    y = (rng.normal(size=(411, 24)) + 1000.3).astype(np.float32)
    one = frechet_distance(moments(x), moments(y))
    for parts in (2, 7, 503):
        assert frechet_distance(moments(x, parts), moments(y, parts)) == pytest.approx(
            one, rel=1e-9
        )
    # As torchmetrics 1.9 computes it: eigenvalues of the product of numpy's covariances.
    roots = np.sqrt(
        np.linalg.eigvals(np.cov(x.T, dtype=float) @ np.cov(y.T, dtype=float))
    ).real.sum()
    shift = x.mean(0, dtype=float) - y.mean(0, dtype=float)
    traces = np.trace(np.cov(x.T, dtype=float)) + np.trace(np.cov(y.T, dtype=float))
    assert one == pytest.approx(shift @ shift + traces - 2 * roots, rel=1e-9)


def test_frechet_of_fewer_rows_than_features() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(20, 64)), rng.normal(size=(15, 64)) * 2 + 1
    assert frechet_of_samples(x, y) == pytest.approx(
        frechet_distance(moments(x), moments(y)), rel=1e-9
    )
    assert frechet_of_samples(x, x) == frechet_distance(moments(x), moments(x))
    assert frechet_distance(moments(x), moments(x)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="two rows or more, got 1"):
        frechet_of_samples(x[:1], y)


def test_kid_is_a_naive_double_loop() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(9, 5)), rng.normal(size=(7, 5)) + 0.5

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 5 + 1) ** 3)

    within = [
        sum(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j)
        / (len(z) * (len(z) - 1))
        for z in (x, y)
    ]
    between = sum(k(a, b) for a in x for b in y) / 63
    assert polynomial_mmd2(x, y) == pytest.approx(sum(within) - 2 * between, rel=1e-12)
    # Unbiased: of equal distributions, the mean over many subsets is 0 within its error.
    same = kernel_distances(*rng.normal(size=(2, 4000, 5)), subset=50, subsets=200, seed=0)
    assert abs(same.mean()) < 4 * same.std() / math.sqrt(80)
    again = kernel_distances(x, y, 5, 3, seed=4)
    assert (again == kernel_distances(x, y, 5, 3, seed=4)).all()


def test_cmmd_is_a_naive_double_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.evaluate.kernels._BLOCK", 4)
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(9, 6)), rng.normal(size=(7, 6)) + 1
    u, v = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([math.exp(-((p - q) @ (p - q)) / 200) for p in a for q in b]))

    expected = 1000 * (mean(u, u) + mean(v, v) - 2 * mean(u, v))
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)
    # Two points at a right angle: 1000 · (2 − 2 exp(−2 / 200)).
    right = cmmd(np.array([[2.0, 0]]), np.array([[0, 3.0]]))
    assert right == pytest.approx(2000 * (1 - math.exp(-0.01)), rel=1e-9)


def test_intervals_of_means_hold_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for trial in range(200):
        interval = mean_interval(rng.exponential(2.0, 60), seed=trial, resamples=400)
        held += interval.low < 2.0 < interval.high
    assert 0.87 < held / 200 < 0.98  # a bootstrap of 60 skewed values falls a little short of 95 %
    values = rng.normal(size=150_000)
    normal = mean_interval(values, seed=0)
    assert (normal.high - normal.low) == pytest.approx(2 * 1.96 / math.sqrt(150_000), rel=0.01)
    assert mean_interval(np.array([3.0]), 0).low is None


@pytest.mark.parametrize(
    ("wins", "ties", "n", "low", "high"),
    [
        (4, 0, 4, 0.3976, 1.0),  # 0.025^¼
        (0, 0, 10, 0.0, 0.3085),
        (7, 0, 10, 0.3475, 0.9333),  # Clopper and Pearson's table
        (6200, 0, 10000, 0.6104, 0.6295),
        (0, 10, 10, 0.1871, 0.8129),  # ties alone: 5 of 10
        (3, 1, 4, 0.1941, 1.0),  # half a win, outwards
    ],
)
def test_share_intervals(wins: int, ties: int, n: int, low: float, high: float) -> None:
    interval = share_interval(wins, ties, n)
    assert interval.value == (wins + ties / 2) / n
    assert (interval.low, interval.high) == (
        pytest.approx(low, abs=1e-4),
        pytest.approx(high, abs=1e-4),
    )
