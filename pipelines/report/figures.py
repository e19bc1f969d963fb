"""Figures as the reports show them: counts, shares, durations and losses.

Units stand behind no-break spaces. A figure that is missing or not finite is shown as a dash.
"""

from __future__ import annotations

import math
from typing import TypeGuard

MISSING = "–"
"""Shown for a missing figure."""


def count(number: int) -> str:
    """Format `12,345`."""
    return f"{number:,}"


def percent(part: float, whole: float) -> str:
    """Format a share with one decimal; only exactly 0 reads `0 %`, and only the whole `100 %`."""
    if not whole > 0 or not math.isfinite(part):
        return MISSING
    share = 100 * part / whole
    if share in (0, 100):
        return f"{share:.0f}\u00a0%"
    return "<\u00a00.1\u00a0%" if share < 0.05 else f"{min(share, 99.9):.1f}\u00a0%"


def share(value: float | None) -> str:
    """Format a share from 0 to 1 in per cent, as `97.0 %`."""
    return MISSING if not known(value) else percent(_within(value), 1)


def gap(value: float | None) -> str:
    """Format the closed share of a gap in whole per cent; it may be below 0 or above 100."""
    return MISSING if not known(value) else f"{round(100 * value)}\u00a0%".replace("-", "−")


def width(part: float | None, whole: float = 1.0) -> str:
    """The style of a bar that shows a share of its frame; of no width if the share is missing."""
    filled = _within(part / whole) if known(part) and whole > 0 else 0.0
    return f"width:{100 * filled:.2f}%"


def duration(seconds: float) -> str:
    """Format seconds as `0.4 s`, `41 s`, `7 min 05 s` or `3 h 20 min`; a line may break between the
    units.
    """
    if not math.isfinite(seconds):
        return MISSING
    whole = round(seconds)
    if whole < 60:
        words = [f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"]
    elif whole < 3600:
        words = [f"{whole // 60} min", f"{whole % 60:02d} s"]
    else:
        words = [f"{whole // 3600:,} h", f"{whole % 3600 // 60:02d} min"]
    return " ".join(word.replace(" ", "\u00a0") for word in words)


def loss(value: float) -> str:
    """Format a loss with four significant digits: 5.545, 0.009012."""
    return f"{value:#.4g}".rstrip(".")


def before_after(before: float, after: float) -> str:
    """Format `0.9821 → 0.7340` without line breaks."""
    return f"{loss(before)}\u00a0→\u00a0{loss(after)}"


def change(before: float, after: float) -> str:
    """Format the relative change of a loss: `−25.3 %`."""
    moved = 100 * (after - before) / before if before else math.nan
    return f"{moved:+.1f}\u00a0%".replace("-", "−") if math.isfinite(moved) else MISSING


def known(value: float | None) -> TypeGuard[float]:
    """Whether the value is neither None nor non-finite."""
    return value is not None and math.isfinite(value)


def _within(value: float) -> float:
    """Clamp to 0…1; max returns the first of equal values, so never -0.0."""
    return max(0.0, min(value, 1.0))
