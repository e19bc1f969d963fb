"""The metrics that jobs export to Prometheus, each declared once: name, kind, tags, meaning.

    metrics.ROWS.add(12, job="ingest", status="ok")
    metrics.TRAIN_LOSS.set(0.12, stage="stage1", run="first")

Ray's agent on each machine serves the metrics of that machine's processes at its metrics port, under the
names of `series`. Without a Ray nothing is exported, so that the same code runs in tests and benchmarks.
A test compares the dashboard with `METRICS`. Tags have few values, because each combination lives as long
as its process.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

_PREFIX = "ray_"  # Ray's agent adds it to all names

METRICS: dict[str, Metric] = {}
"""Every metric by its name."""


class Metric:
    """A declared metric. Each process creates its instrument at the first use."""

    def __init__(self, name: str, description: str, *tags: str) -> None:
        if not name.startswith("vlv_") or name in METRICS:
            raise ValueError(f"metric '{name}': expected a new name that begins with vlv_")
        self.name = name
        self.description = description
        self.tags = tags
        METRICS[name] = self

    @property
    def series(self) -> tuple[str, ...]:
        """The names of its time series in Prometheus."""
        raise NotImplementedError

    def _make(self) -> Any:
        raise NotImplementedError

    @cached_property
    def _instrument(self) -> Any:
        return self._make()

    def _is_exported(self, tags: dict[str, str]) -> bool:
        if set(tags) != set(self.tags):
            raise ValueError(f"metric {self.name} has the tags {self.tags}, not {tuple(tags)}")
        import ray  # here: `--help` need not wait for it

        return ray.is_initialized()


class Counter(Metric):
    """A sum that only grows; Prometheus takes its rate."""

    @property
    def series(self) -> tuple[str, ...]:
        return (f"{_PREFIX}{self.name}_total",)

    def add(self, amount: float, **tags: str) -> None:
        """Count `amount` more, 0 or greater."""
        if self._is_exported(tags) and amount:
            self._instrument.inc(amount, tags)

    def _make(self) -> Any:
        from ray.util.metrics import Counter

        return Counter(self.name, self.description, self.tags)


class Gauge(Metric):
    """A value as it stands, of each process by itself."""

    @property
    def series(self) -> tuple[str, ...]:
        return (f"{_PREFIX}{self.name}",)

    def set(self, value: float, **tags: str) -> None:
        """Note that it stands at `value` now."""
        if self._is_exported(tags):
            self._instrument.set(value, tags)

    def _make(self) -> Any:
        from ray.util.metrics import Gauge

        return Gauge(self.name, self.description, self.tags)


class Histogram(Metric):
    """A distribution, in buckets up to each of `boundaries`."""

    def __init__(self, name: str, description: str, boundaries: list[float], *tags: str) -> None:
        super().__init__(name, description, *tags)
        self.boundaries = boundaries

    @property
    def series(self) -> tuple[str, ...]:
        return tuple(f"{_PREFIX}{self.name}_{part}" for part in ("bucket", "sum", "count"))

    def observe(self, value: float, **tags: str) -> None:
        """Note one more value."""
        if self._is_exported(tags):
            self._instrument.observe(value, tags)

    def _make(self) -> Any:
        from ray.util.metrics import Histogram

        return Histogram(self.name, self.description, self.boundaries, self.tags)


# ------------------------------------------------------------------------------------ all tables
ROWS = Counter("vlv_rows", "rows that were committed to the job's table", "job", "status")
ACTOR_BUSY_SECONDS = Counter(
    "vlv_actor_busy_seconds", "seconds that the models of the job's actors took", "job"
)
ACTOR_SECONDS = Counter(
    "vlv_actor_seconds", "seconds that the actors were there, from their first chunk on", "job"
)

# ---------------------------------------------------------------------------------------- ingest
INGEST_BYTES = Counter("vlv_ingest_bytes", "bytes of the bodies that were received")
INGEST_REQUESTS = Gauge("vlv_ingest_requests", "requests in flight, of each fetcher")

# -------------------------------------------------------------------------------------- training
# `run` is the name of the run's folder. Rank 0 speaks for all workers.
TRAIN_STEP = Gauge("vlv_train_step", "optimiser updates that are done", "stage", "run")
TRAIN_LOSS = Gauge("vlv_train_loss", "loss of the last global batch", "stage", "run")
TRAIN_HELDOUT_LOSS = Gauge("vlv_train_heldout_loss", "loss on the held-out rows", "stage", "run")
TRAIN_GRAD_NORM = Gauge("vlv_train_grad_norm", "norm of the last gradient", "stage", "run")
TRAIN_IMAGES_PER_SECOND = Gauge(
    "vlv_train_images_per_second", "images of the last update by its time", "stage", "run"
)
TRAIN_DATA_SHARE = Gauge(
    "vlv_train_data_share",
    "share of the last update's time that it waited for its rows",
    "stage",
    "run",
)

# ------------------------------------------------------------------------------------- recaption
RECAPTION_IMAGES = Counter("vlv_recaption_images", "images that were captioned")
RECAPTION_TOKENS = Counter("vlv_recaption_tokens", "tokens of the captions, with end-of-text")
RECAPTION_BATCH_SECONDS = Histogram(
    "vlv_recaption_batch_seconds",
    "seconds from the first image of a chunk to its last caption",
    [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0],
)
