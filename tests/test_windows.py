"""Windows against the release's reader, and their invariants."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.episode import NANOSECONDS, Stream
from data_pipelines.representations import relative_poses, rotation_to_6d
from data_pipelines.windows import WindowSpec, anchors, in_pause, read_window, request_times

GOLDEN = np.load(Path(__file__).parent / "golden" / "windows.npz")
SPECS = json.loads(str(GOLDEN["meta"]))["specs"]
INTERPOLATION = {
    "action/pose": "pose",
    "obs/pose": "pose",
    "action/gripper": "linear",
    "obs/quat": "quaternion",
}


def _stream(name):
    return Stream(GOLDEN[f"root.{name}_timestamps"], GOLDEN[f"root.{name}"])


def _window(key):
    spec = SPECS[key]
    name = key.split("/")[1].removesuffix("_nearest")
    return read_window(
        _stream(name),
        WindowSpec(
            name,
            spec["horizon"],
            spec["target_frequency"],
            spec["shift_right_by"],
            INTERPOLATION.get(key, "nearest"),
            "past" if key.startswith("obs/") else "future",
        ),
        GOLDEN["root.rgb_timestamps"][GOLDEN["anchor_indices"]],
    )


def _error(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))


@pytest.mark.parametrize("key", SPECS)
def test_windows_equal_the_release(key):
    values, _ = _window(key)
    expected = GOLDEN[f"chunk.{key}"]
    # The release appends an axis to one-dimensional streams.
    assert _error(values.reshape(expected.shape), expected) < 1e-6


def test_relative_poses_and_rotations_equal_the_release():
    future, _ = _window("action/pose")
    observed, _ = _window("obs/pose")
    relative = relative_poses(future, observed[:, -1])
    assert _error(relative, GOLDEN["relative.action/pose"]) < 1e-6
    assert _error(rotation_to_6d(relative[..., :3, :3]), GOLDEN["rot6d.action/pose"]) < 1e-6


def test_padding_marks_exactly_the_instants_outside_the_stream():
    stream = Stream(np.arange(4, dtype=np.int64) * NANOSECONDS, np.arange(4.0)[:, None])
    spec = WindowSpec("x", horizon=4, fps=1, shift=1.0)
    values, padded = read_window(stream, spec, np.array([0, 2, 3]) * NANOSECONDS)
    np.testing.assert_array_equal(values[..., 0], [[1, 2, 3, 3], [3, 3, 3, 3], [3, 3, 3, 3]])
    np.testing.assert_array_equal(padded.sum(1), [1, 3, 4])
    past, padded = read_window(stream, WindowSpec("x", 3, 1, look="past"), NANOSECONDS)
    np.testing.assert_array_equal(past[:, 0], [0, 0, 1])
    np.testing.assert_array_equal(padded, [True, False, False])


def test_one_anchor_and_many_give_the_same_windows():
    at = GOLDEN["root.rgb_timestamps"][[0, 9, 30]]
    spec = WindowSpec("pose", 5, 20, 0.1, "pose")
    together, _ = read_window(_stream("pose"), spec, at)
    for one, values in zip(at, together):
        np.testing.assert_array_equal(read_window(_stream("pose"), spec, one)[0], values)


def test_slerp_stays_a_rotation_and_previous_never_looks_ahead():
    spec = WindowSpec("pose", 40, 60, interpolation="pose")
    values, _ = read_window(_stream("pose"), spec, GOLDEN["root.rgb_timestamps"][3])
    rotation = values[:, :3, :3]
    np.testing.assert_allclose(
        rotation @ rotation.swapaxes(1, 2), np.tile(np.eye(3), (40, 1, 1)), atol=1e-6
    )
    stream = Stream(np.array([10, 20, 30]), np.array([0, 1, 2]))
    for time, expected in ((9, 0), (10, 0), (19, 0), (20, 1), (99, 2)):
        values, _ = read_window(stream, WindowSpec("x", 1, 1, interpolation="previous"), time)
        assert values == [expected]


def test_a_stream_of_one_sample_is_held():
    stream = Stream(np.array([5]), np.array([[1.0, 2.0]]))
    for how in ("nearest", "previous", "linear"):
        values, _ = read_window(stream, WindowSpec("x", 3, 10, interpolation=how), 0)
        np.testing.assert_array_equal(values, [[1.0, 2.0]] * 3)


def test_anchors_lie_where_every_action_stream_has_data():
    video = np.arange(10) * 100
    actions = [np.array([150, 700]), np.array([100, 650, 800])]
    np.testing.assert_array_equal(anchors(video, actions), [200, 300, 400, 500, 600, 700])
    np.testing.assert_array_equal(anchors(video), video)
    assert len(anchors(video, [np.array([2000, 3000])])) == 0


def test_anchors_lie_within_the_ranges():
    video, actions = np.arange(10) * 100, [np.array([150, 700])]
    ranges = [(0, 301), (500, 600), (750, 2000)]
    np.testing.assert_array_equal(anchors(video, actions, ranges=ranges), [200, 300, 500])
    np.testing.assert_array_equal(anchors(video, ranges=ranges), [0, 100, 200, 300, 500, 800, 900])
    slow = anchors(video, max_fps=NANOSECONDS / 200, ranges=[(300, 900)])  # thinned within them
    np.testing.assert_array_equal(slow, [300, 500, 700])
    assert len(anchors(video, ranges=[])) == 0


@pytest.mark.parametrize(("fps", "kept"), [(80, 80), (40, 40), (20, 20), (200, 80)])
def test_anchors_are_thinned_by_time(fps, kept):
    jitter = np.random.default_rng(0).integers(-300_000, 300_000, 80)
    video = np.rint(np.arange(80) * NANOSECONDS / 80).astype(np.int64) + jitter
    assert len(anchors(video, max_fps=fps)) == kept


@pytest.mark.parametrize("fps", [5, 20, 30])
def test_video_only_windows_are_the_frames_of_the_release_formula(fps):
    """Stage 1 of the release: indices rint(i + k * fps / 5), clipped to the video."""
    n, observed, total, step = 90, 5, 13, fps / 5
    stamps = np.rint(np.arange(n) * NANOSECONDS / fps).astype(np.int64)
    stream = Stream(stamps, np.arange(n))
    past, _ = read_window(stream, WindowSpec("v", observed, 5, look="past"), anchors(stamps))
    future, _ = read_window(stream, WindowSpec("v", total - observed, 5, 0.2), anchors(stamps))
    k = np.arange(total) - (observed - 1)
    expected = np.clip(np.rint(np.arange(n)[:, None] + k * step), 0, n - 1)
    np.testing.assert_array_equal(np.concatenate([past, future], axis=1), expected)


def test_request_times_are_exact_integers():
    anchor = 1_700_000_000_123_456_789
    times = request_times(WindowSpec("x", 3, 80, 0.0125), anchor)
    np.testing.assert_array_equal(times - anchor, [12_500_000, 25_000_000, 37_500_000])


def test_errors_name_the_stream():
    with pytest.raises(ValueError, match=r"'grip'.*horizon 0"):
        WindowSpec("grip", 0, 5)
    with pytest.raises(ValueError, match=r"'grip'.*cubic"):
        WindowSpec("grip", 1, 5, interpolation="cubic")
    with pytest.raises(ValueError, match=r"'grip'.*\(4, 4\)"):
        read_window(_stream("gripper"), WindowSpec("grip", 1, 5, interpolation="pose"), 0)


def _pauses(stamps, instants, fps=10.0):
    stamps = np.rint(np.asarray(stamps) * NANOSECONDS).astype(np.int64)
    times = np.rint(np.asarray(instants) * NANOSECONDS).astype(np.int64)
    return in_pause(stamps, times, fps).tolist()


def test_only_an_instant_far_from_every_value_is_in_a_pause():
    regular = np.arange(40) / 10
    with_pause = np.concatenate([regular, 10 + regular])
    assert _pauses(with_pause, [3.9, 4.0, 4.1, 6.9, 9.8, 10.0, 12.05, -3.0, 99.0]) == [
        *(False, False, True, True, True),
        *(False, False, False, False),  # outside, values are repeated, as anywhere
    ]
    lost = np.delete(regular, [10, 20, 21])  # single frames, and two in a row
    assert not any(_pauses(lost, np.arange(400) / 100, fps=100.0))
    assert any(_pauses(np.delete(regular, range(20, 25)), np.arange(400) / 100, fps=100.0))
    # Half of a long step between requests is what every window has.
    assert not any(_pauses(np.delete(regular, range(20, 25)), np.arange(4), fps=1.0))


@pytest.mark.parametrize(
    "steps",
    [
        np.full(60, 0.1),
        np.r_[np.full(30, 0.02), np.full(30, 0.1)],  # a rate that changes is no pause
        np.random.default_rng(0).uniform(0.08, 0.12, 60),
        np.tile([0.033, 0.1], 30),  # two steps that alternate
        np.r_[0.1, 0.1],
    ],
)
def test_a_pause_is_measured_by_its_neighbours(steps):
    stamps = np.r_[0, np.cumsum(steps)]
    instants = np.linspace(stamps[0], stamps[-1], 1000)
    assert not any(_pauses(stamps, instants, fps=100.0))
    # A pause at the end, and many of them: none hides another.
    many = np.concatenate([stamps + i * (stamps[-1] + 2) for i in range(4)])
    if len(stamps) > 10:
        between = [stamps[-1] + 1 + i * (stamps[-1] + 2) for i in range(3)]
        assert all(_pauses(many, between, fps=100.0))
        assert all(_pauses(np.r_[stamps, stamps[-1] + 2], [stamps[-1] + 1], fps=100.0))
        assert all(_pauses(np.r_[stamps[0] - 2, stamps], [stamps[0] - 1], fps=100.0))
