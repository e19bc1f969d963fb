"""Fréchet distance of two sets of features, each seen as a Gaussian: FID with Inception's features
(Heusel et al. 2017), FD-DINOv2 with DINOv2's (Stein et al. 2023).

    |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁ Σ₂)^½

The last trace is the sum of the singular values of Σ₁^½ Σ₂^½. Published implementations take a square
root of the matrix Σ₁ Σ₂, which is not symmetric: that gives complex numbers or NaN for few samples,
and scipy 1.18 removed the argument that they pass.
"""

from __future__ import annotations

import numpy as np


class Moments:
    """Mean and covariance of features that come in batches, in float64.

    Batches and parts of other workers are merged exactly (Chan et al. 1983), so any sharding gives the
    same value up to rounding, also where the mean is large beside the deviation.
    """

    def __init__(self, width: int) -> None:
        self.rows = 0
        self.mean = np.zeros(width)
        self.scatter = np.zeros((width, width))
        """Sum of the outer products of the deviations from the mean."""

    def add(self, features: np.ndarray) -> None:
        """Add a batch `[n d]`."""
        if not len(features):
            return
        batch = Moments(len(self.mean))
        exact = features.astype(np.float64)
        batch.rows, batch.mean = len(exact), exact.mean(axis=0)
        exact -= batch.mean
        batch.scatter = exact.T @ exact
        self.merge(batch)

    def merge(self, other: Moments) -> None:
        """Add the rows that another worker has seen."""
        rows = self.rows + other.rows
        if not rows:
            return
        shift = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter += np.outer(shift, shift) * (self.rows * other.rows / rows)
        self.mean += shift * (other.rows / rows)
        self.rows = rows

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased, `[d d]`; ValueError for fewer than two rows."""
        if self.rows < 2:
            raise ValueError(f"a covariance needs two rows or more, got {self.rows}")
        covariance: np.ndarray = self.scatter / (self.rows - 1)
        return covariance


def frechet_distance(first: Moments, second: Moments) -> float:
    """The distance of two Gaussians of the same width; ValueError for fewer than two rows."""
    one, other = first.covariance, second.covariance
    roots = np.linalg.svd(_square_root(one) @ _square_root(other), compute_uv=False).sum()
    return _distance(first.mean - second.mean, np.trace(one) + np.trace(other), roots)


def frechet_of_samples(first: np.ndarray, second: np.ndarray) -> float:
    """The same distance of features `[n d]` and `[m d]`, faster where n and m are below d.

    With centred features X and Y the singular values of X Yᵀ / √((n−1)(m−1)) are those of Σ₁^½ Σ₂^½.
    """
    if max(len(first), len(second)) >= first.shape[1]:
        moments = Moments(first.shape[1]), Moments(first.shape[1])
        for one, features in zip(moments, (first, second), strict=True):
            one.add(features)
        return frechet_distance(*moments)
    x, y = first.astype(np.float64), second.astype(np.float64)
    shift = x.mean(axis=0) - y.mean(axis=0)
    x -= x.mean(axis=0)
    y -= y.mean(axis=0)
    free = len(x) - 1, len(y) - 1
    if min(free) < 1:
        raise ValueError(f"a covariance needs two rows or more, got {min(free) + 1}")
    roots = np.linalg.svd(x @ y.T, compute_uv=False).sum() / np.sqrt(free[0] * free[1])
    return _distance(shift, (x * x).sum() / free[0] + (y * y).sum() / free[1], roots)


def _distance(shift: np.ndarray, traces: float, roots: float) -> float:
    # Equal sets give a rounding error of either sign.
    return max(0.0, float(shift @ shift + traces - 2 * roots))


def _square_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    # Below this, an eigenvalue is a rounding error; its root would be 1e8 times as large.
    values[values < values[-1] * len(values) * np.finfo(np.float64).eps] = 0
    root: np.ndarray = (vectors * np.sqrt(values)) @ vectors.T
    return root
