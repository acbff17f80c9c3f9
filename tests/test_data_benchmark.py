"""The data benchmark reads what it says it reads, and measures both sides."""

import numpy as np
import pytest

from data_pipelines.clip import Clip
from data_pipelines.statistics import column_statistics, compute_statistics
from launch.benchmarks.data import (
    NumberShards,
    clip_bytes,
    decoding_speed,
    make_records,
    make_videos,
    memory_over_time,
    records_speed,
    statistics_seconds,
)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "records"
    return make_records(path, Clip(32, 48, 5, 8, 5.0), (6, 4), count=60)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return make_videos(tmp_path_factory.mktemp("benchmark") / "videos", 2, 12)


def test_records_have_the_size_of_the_clip(records):
    assert len(records) == 60
    assert records[0]["latents"].shape == (4, 4, 6, 16)
    assert records.text(0).shape == (6, 4) and np.all(records.text(0)[-1] != 0)
    assert len(records.instructions) == 20
    assert clip_bytes(records) == 2 * (4 * 4 * 6 * 16 + 6 * 4)
    different = {records[i]["latents"].tobytes() for i in range(0, 60, 3)}
    assert len(different) > 1


def test_both_sides_are_measured(records, videos):
    for pair in (records_speed(records, 2, 2), decoding_speed(videos, 2, 2)):
        assert len(pair.ours) == len(pair.alone) == 2
        assert all(turn.speed > 0 and turn.cpu_ms >= 0 for turn in pair.ours + pair.alone)
        assert pair.speed_ratio > 0


def test_statistics_are_those_of_the_rows(tmp_path):
    numbers = NumberShards(tmp_path / "numbers", 60_000, (2, 3))
    whole = np.concatenate([part["actions"] for part in numbers.shard_columns("actions")])
    assert whole.shape == (60_000, 2, 3)
    found = column_statistics([(numbers, np.arange(60_000))], "actions", tmp_path / "scratch")
    np.testing.assert_allclose(found["std"], compute_statistics(whole)["std"])
    assert statistics_seconds(tmp_path / "timed", 100, (2, 3)) > 0


def test_memory_is_watched(records, videos):
    points = memory_over_time(records, videos, 1.5, points=5)
    assert 2 <= len(points) <= 5
    assert points[-1][0] == pytest.approx(1.5) and min(mb for _, mb in points) > 10
