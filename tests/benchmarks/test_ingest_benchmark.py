"""The measuring parts of the benchmark of ingest; the measuring itself takes minutes."""

import io
from collections import Counter
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.ingest.throughput import (
    CASES,
    MANY_HOSTS,
    Case,
    Measured,
    ssim,
    summarise,
    write_list,
)
from benchmarks.ingest.web import is_dead, write_photos


def test_similarity_is_one_for_the_same_and_less_for_others() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (70, 90)).astype(np.float64)
    assert ssim(picture, picture) == 1.0
    assert 0.9 < ssim(picture, picture + rng.normal(0, 5, picture.shape)) < 1.0
    assert ssim(picture, picture[::-1]) < 0.2


def test_photographs_have_the_given_sizes(tmp_path: Path) -> None:
    write_photos(tmp_path, 1)
    for file in sorted(tmp_path.glob("*.jpg")):
        with Image.open(io.BytesIO(file.read_bytes())) as photo:
            assert 500 <= min(photo.size) <= max(photo.size) <= 3000
            assert np.asarray(photo.convert("L").resize((64, 64))).std() > 5
    times = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    write_photos(tmp_path, 1)
    assert times == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}


def test_the_fraction_of_dead_urls_is_as_given() -> None:
    assert not any(is_dead(number, 0.0) for number in range(1000))
    assert 0.28 < np.mean([is_dead(number, 0.3) for number in range(20_000)]) < 0.32


def test_ratio_and_share_are_of_medians() -> None:
    def runs(*seconds: float) -> list[Measured]:
        return [Measured(100, s, 50.0, 10**9) for s in seconds]

    figures = summarise(
        CASES[0], {"ours": runs(1, 2, 9), "peer": runs(4, 4, 5)}, [80.0, 100.0], 2, 64
    )
    assert (figures["ratio"], figures["share_of_limit"]) == (2.0, 0.556)
    assert figures["ours"]["cpu_ms_per_image"] == 500.0
    assert "cost_of_rules" not in figures
    programs = {"ours_without_rules": runs(1), "ours": runs(1.25), "peer": runs(4)}
    assert summarise(MANY_HOSTS[0], programs, [80.0], 2, 64)["cost_of_rules"] == 0.2
    assert isinstance(CASES[1], Case)


def test_a_list_has_the_given_number_of_images_of_each_host(tmp_path: Path) -> None:
    for per_host, hosts in ((None, 1), (1, 600), (5, 120), (100, 6)):
        file = write_list(tmp_path, "http://127.0.0.1:81", 600, per_host)
        urls = [urlsplit(url) for url in pq.read_table(file)["url"].to_pylist()]
        found = Counter(url.hostname for url in urls)
        assert len(found) == hosts
        assert set(found.values()) == {600 // hosts}
        assert {url.port for url in urls} == {81}
        assert all(ip_address(host or "").is_loopback for host in found)
