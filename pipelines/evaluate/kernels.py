"""Distances of two sets of features by a kernel: KID (Bińkowski et al. 2018) and CMMD (Jayasumana et
al. 2024). Unlike FID, neither takes the features for a Gaussian, and KID is unbiased at any size.
"""

from __future__ import annotations

import numpy as np

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
_BLOCK = 2048  # rows of a kernel matrix held at once


def polynomial_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD of features `[n d]` and `[m d]` with the kernel (x·y / d + 1)³.

    ValueError for fewer than two rows.
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"an unbiased MMD needs two rows or more, got {min(n, m)}")
    x, y = x.astype(np.float64), y.astype(np.float64)
    width = x.shape[1]

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        cubed: np.ndarray = (a @ b.T / width + 1) ** 3
        return cubed

    same_x, same_y = kernel(x, x), kernel(y, y)
    return float(
        (same_x.sum() - np.trace(same_x)) / (n * (n - 1))
        + (same_y.sum() - np.trace(same_y)) / (m * (m - 1))
        - 2 * kernel(x, y).mean()
    )


def kernel_distances(
    x: np.ndarray, y: np.ndarray, subset: int, subsets: int, seed: int
) -> np.ndarray:
    """KID of `subsets` seeded subsets of `subset` rows of each, float64 `[subsets]`.

    KID is their mean. Published code has 100 subsets of 1,000 and gives the standard deviation with it.
    """
    rng = np.random.default_rng(seed)
    return np.array(
        [
            polynomial_mmd2(
                x[rng.choice(len(x), subset, replace=False)],
                y[rng.choice(len(y), subset, replace=False)],
            )
            for _ in range(subsets)
        ]
    )


def cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """CMMD of CLIP image embeddings `[n d]` and `[m d]`, which are normalised here.

    As published: the biased squared MMD with a Gaussian kernel of σ = 10, times 1000. The published
    figures are of openai/clip-vit-large-patch14-336. Memory holds a block of the kernel matrices.
    """
    x, y = normalised(x), normalised(y)
    mmd2 = _mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y)
    return CMMD_SCALE * mmd2


def normalised(features: np.ndarray) -> np.ndarray:
    """Features `[n d]` as float64 of length 1; those of length 0 stay."""
    exact = features.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    unit: np.ndarray = exact / np.where(lengths > 0, lengths, 1)
    return unit


def _mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
    total = 0.0
    squares = (y * y).sum(axis=1)
    for start in range(0, len(x), _BLOCK):
        block = x[start : start + _BLOCK]
        distances = (block * block).sum(axis=1)[:, None] + squares - 2 * block @ y.T
        total += float(np.exp(-np.maximum(distances, 0) / (2 * CMMD_SIGMA**2)).sum())
    return total / (len(x) * len(y))
