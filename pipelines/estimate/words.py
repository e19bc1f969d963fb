"""Sizes, times and tables of an estimate as text."""

from __future__ import annotations

from collections.abc import Sequence


def size_words(size: float) -> str:
    """Bytes, with the unit that fits."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def memory_words(size: float) -> str:
    """Bytes of memory in GB, or below a tenth of one with the unit that fits."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else size_words(size)


def time_words(seconds: float) -> str:
    """A duration, with the unit that fits."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s" if seconds else "0 s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.0f} min"
    hours = minutes / 60
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"


def count_words(number: float) -> str:
    """A large number, as `1.25 B`."""
    for unit, scale in (("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= scale:
            return f"{number / scale:,.2f} {unit}"
    return f"{number:g}"


def worker_words(number: int) -> str:
    """A number of workers."""
    return "1 worker" if number == 1 else f"{number:,} workers"


def lines(pairs: Sequence[tuple[str, str]]) -> str:
    """Pairs of a name and a value as text, the values below each other."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in pairs)
