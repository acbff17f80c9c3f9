"""LeRobot: the times of rows, and which frames of a video belong to them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_folders import CAMERA, FPS, numbers, rows, shown, write_numbers, write_v2, write_v3

from data_pipelines.sources.formats import open_dataset
from data_pipelines.sources.lerobot_frames import choose, locate, row_times
from data_pipelines.windows import nearest_indices

ROWS = np.arange(40)
EVEN = ROWS / FPS
LENGTHS = [8, 9, 7, 8]
WRIST = "observation.images.wrist"


def opened(root):
    return open_dataset("lerobot", root, "set", "arm")


def times_of(stored, index=ROWS):
    return row_times(stored, index, len(ROWS), FPS)


@pytest.mark.parametrize(
    ("stored", "finding"),
    [
        (EVEN.astype(np.float32), None),
        (EVEN.astype(np.float64) + 0.003, None),
        (EVEN.astype(np.float32) + 2, None),  # not reset, or rows dropped in front
        (EVEN.astype(np.float32) - 60, None),
        (EVEN + 1.76e9, None),  # since 1970
        ((EVEN + 1.76e9).astype(np.float32), "too coarse"),  # 128 s between two numbers
        ((EVEN + 1e6).astype(np.float32), "too coarse"),  # 0.06 s
        (np.full(40, 1.76e9, np.float32), "too coarse"),
        ((EVEN + 1.76e9).astype(np.int64), "too coarse"),
        ((EVEN * 1e3).astype(np.float32), "milliseconds"),
        ((EVEN * 1e3).astype(np.int64), "milliseconds"),
        ((EVEN * 1e6).astype(np.int64) + 5_000_000, "microseconds"),
        ((EVEN * 1e9).astype(np.float32), "nanoseconds"),
        (((EVEN + 1.76e9) * 1e9).astype(np.int64), "nanoseconds"),
        (((EVEN + 1.76e9) * 1e9).astype(np.float32), "too coarse"),
        (None, "no timestamp"),
    ],
)
def test_even_rows_in_any_unit_and_with_any_beginning_have_their_times(stored, finding):
    found = times_of(stored)
    assert np.abs(found.times - EVEN * 1e9).max() < 4e6
    assert [finding in text for text in found.findings] == ([True] if finding else [])


def test_a_wall_clock_keeps_its_pauses():
    rng = np.random.default_rng(0)
    clock = np.sort(EVEN * 1.05 + rng.uniform(-0.02, 0.02, 40))
    clock[20:] += 3.0
    for stored, unit in ((clock, None), (clock * 1e3, "milliseconds"), (clock + 1.7e9, None)):
        found = times_of(stored)
        expected = clock if unit or stored is clock else clock - clock[0]
        np.testing.assert_allclose(found.times / 1e9, expected, atol=1e-6)
        assert [(unit or "timestamp is not") in text for text in found.findings] == [True]
    dropped = np.delete(ROWS, [5, 6, 7])  # rows that were left out, and are still numbered
    found = row_times((dropped / FPS).astype(np.float32), dropped, 37, FPS)
    np.testing.assert_allclose(found.times / 1e9, dropped / FPS)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (ROWS / 20, r"0\.05 s apart, but fps .* is 10, which is 0\.1 s"),
        (ROWS / 2, r"0\.5 s apart, but fps"),
        (EVEN * 60, r"6 s apart, but fps"),
        (np.full(40, 5.0, np.float32), "must strictly increase"),
        (EVEN[::-1].copy(), "must strictly increase"),
        (np.where(ROWS == 7, np.nan, EVEN), "NaN"),
    ],
)
def test_timestamps_that_contradict_the_rate_are_refused_with_both_numbers(stored, message):
    with pytest.raises(ValueError, match=message):
        times_of(stored)


def test_a_frame_index_that_says_nothing_is_not_used():
    for index in (None, np.zeros(40, int)):
        found = times_of(EVEN.astype(np.float32), index)
        np.testing.assert_allclose(found.times / 1e9, EVEN, atol=1e-6)
        assert "frame_index" in found.findings[0]
        with pytest.raises(ValueError, match="neither timestamp nor"):
            times_of(None, index)
    found = times_of(EVEN.astype(np.float32), ROWS + 700)  # not reset
    np.testing.assert_allclose(found.times / 1e9, EVEN, atol=1e-6)


# Version 3: many episodes in a video.

FIRST = np.cumsum([0, *LENGTHS[:-1]])


def located(starts, frames=32, times=None, ends=None, lengths=LENGTHS):
    starts, lengths = np.array(starts, float), np.array(lengths)
    times = np.arange(frames) / FPS if times is None else times
    ends = starts + lengths / FPS if ends is None else ends
    return locate(times, starts, ends, lengths, FPS)


@pytest.mark.parametrize("shift", [0, 0.04, -0.04])
def test_rounding_is_settled_silently(shift):
    parts = located(FIRST / FPS + shift)
    assert [part.first for part in parts] == FIRST.tolist()
    assert not any(part.moved or part.fault for part in parts)


@pytest.mark.parametrize(
    "shifts",
    [[0, 1, 1, 1], [0, -1, -1, -1], [0, 0.33, 0.66, 0.99], [0, -0.33, -0.66, -0.99], [1, 1, 1, 1]],
)
def test_ranges_that_drift_from_the_frames_are_counted_off(shifts):
    parts = located((FIRST + shifts) / FPS)
    assert [part.first for part in parts] == FIRST.tolist()
    assert [part.stop for part in parts] == [*FIRST[1:], 32]
    assert not any(part.fault for part in parts)
    assert [part.moved for part in parts] == [abs(shift) > 0.5 for shift in shifts]


@pytest.mark.parametrize(
    ("starts", "extra", "times"),
    [
        (FIRST / FPS + 4.5, 0, None),  # a writer that did not begin at 0 again in a new file
        ((FIRST + 2 * np.arange(4)) / FPS, 2, None),  # durations that are two frames too long
        (FIRST / FPS, 0, 0.5 + np.arange(32) / FPS),  # a file whose first frame is late
    ],
)
def test_ranges_that_do_not_begin_where_the_file_does_are_counted_off(starts, extra, times):
    ends = starts + (np.array(LENGTHS) + extra) / FPS
    parts = located(starts, times=times, ends=ends)
    assert [part.first for part in parts] == FIRST.tolist()
    assert not any(part.fault for part in parts)


def test_frames_after_the_last_range_are_said_of_every_episode():
    """A repeated last frame per episode would give the others a neighbour's frames."""
    assert all(part.loose for part in located(FIRST / FPS, 36))
    even = located((FIRST + np.arange(4)) / FPS, 36)  # the ranges know about it
    assert not any(part.loose for part in (*even, *located(FIRST / FPS)))


def test_ranges_in_another_order_belong_to_their_episodes():
    parts = located([2.3, 0.8, 0.0, 1.7], lengths=[9, 9, 8, 6])
    assert [(part.first, part.stop) for part in parts] == [(23, 32), (8, 17), (0, 8), (17, 23)]


def test_a_gap_between_ranges_is_no_fault():
    """Such as after the episodes before and after a deleted one were kept."""
    parts = located([0, 0.8, 2.4], lengths=[8, 9, 8])
    assert [part.first for part in parts] == [0, 8, 24]
    assert not any(part.fault or part.moved for part in parts)


def test_what_cannot_be_settled_costs_its_episodes_only():
    def good(parts):
        return [place for place, part in enumerate(parts) if not part.fault]

    assert good(located([0, 1, 1, 3], 40, lengths=[10] * 4)) == [0, 3]  # two on one range
    assert good(located(FIRST / FPS, 31)) == [0, 1, 2]  # the last frame is lost
    assert good(located([0, 0.8, 1.7, 9.0])) == [0, 1, 2]  # a range of another file
    assert good(located([0, 0.9, 1.8, 2.5], 33)) == [0, 1, 2, 3]  # one frame between two episodes
    assert good(located([0, 0.9, 1.8, 2.6], 33)) == [0]  # and one more, which is not there
    ends = np.array([0.8, 1.6, 2.3, 3.1])  # the video of the second lost a frame, as the ranges say
    assert good(located([0, 0.8, 1.6, 2.3], 31, ends=ends)) == [0, 2, 3]
    ends[2:] += 0.1  # and that of the third has one more
    assert good(located([0, 0.8, 1.6, 2.4], 32, ends=ends)) == [0, 2, 3]
    swapped = [0, 1.6, 0.8, 2.4]  # of equal length: nothing could tell, and nothing is lost
    assert good(located(swapped, lengths=[8] * 4)) == [0, 1, 2, 3]
    # Merged files, whose second half begins at 0 again.
    assert good(located([0, 0.8, 0, 0.7], lengths=[8, 9, 7, 8])) == []


def test_a_pause_between_two_episodes_of_a_video_moves_no_frames():
    times = np.array([*range(20), *range(80, 100)]) / FPS
    parts = located([0, 1, 8, 9], times=times, lengths=[10] * 4)
    assert [part.first for part in parts] == [0, 10, 20, 30]
    assert not any(part.fault or part.moved for part in parts)


def test_a_video_with_a_higher_rate_than_the_rows_is_cut_by_time():
    times = np.arange(64) / 20
    parts = located(FIRST / FPS, times=times)
    assert [part.first for part in parts] == (2 * FIRST).tolist()
    assert not any(part.fault for part in parts)
    late = located([0, 0.8, 1.2, 2.4], times=times)  # the third begins inside the second
    assert [bool(part.fault) for part in late] == [False, True, True, False]
    first = choose(times[:16], row_times(None, np.arange(8), 8, FPS), FPS)
    assert (first.first, first.stop, first.by_number, first.findings) == (0, 16, False, ())
    pause = np.where(np.arange(8) < 4, 0, 3.0)  # both sides pause; the last row has two frames
    late = row_times(np.arange(8) / FPS + pause, np.arange(8), 8, FPS)
    cut = choose(np.arange(18) / 20 + np.repeat(pause[[0] * 4 + [4] * 5], 2), late, FPS)
    assert (cut.first, cut.stop) == (0, 16)


def test_frames_are_matched_with_rows():
    even = row_times(None, np.arange(10), 10, FPS)
    frame = np.arange(30) / FPS

    def chosen(times, rows=even):
        choice = choose(times, rows, FPS)
        return choice.first, choice.stop, choice.by_number, len(choice.findings)

    assert chosen(frame[:10]) == (0, 10, False, 0)
    assert chosen(frame[:10] + 5.5) == (0, 10, False, 0)  # a file that starts late
    assert chosen(frame[:12]) == (0, 10, False, 1)
    assert chosen(frame[:10] / 3) == (0, 10, True, 1)  # written as if at 30 fps
    late = row_times(np.arange(10) / FPS + 2, np.arange(10), 10, FPS)
    assert chosen(frame[:10], late) == (0, 10, False, 0)
    assert chosen(frame, late) == (20, 30, False, 1)  # the beginning was left out
    assert chosen(frame[:12], late) == (0, 10, False, 1)  # not reset, as no frame is that late
    today = row_times(np.arange(10) / FPS + 1.7e9, np.arange(10), 10, FPS)
    assert chosen(frame[:12], today) == (0, 10, False, 1)
    clock = np.arange(10) / FPS
    clock[5:] += 2
    pause = row_times(clock, np.arange(10), 10, FPS)
    assert chosen(frame[:10], pause) == (0, 10, True, 1)
    assert chosen(clock, pause) == (0, 10, False, 0)  # the video pauses, too
    assert chosen(frame, pause) == (0, 30, False, 0)  # the video goes on
    for times in (frame[:9], frame[:12]):
        with pytest.raises(ValueError, match=r"9 of the 10 frames|do not agree"):
            choose(times, pause, FPS)


# Whole datasets: frame k of episode e shows 100 e + k, as does its action.


def check(episode, e: int, length: int) -> None:
    """Every frame goes with the action of its row, as windows are cut."""
    video, action = episode.streams[CAMERA], episode.streams["action"]
    assert shown(video) == numbers(e, length)
    near = nearest_indices(action.timestamps, video.timestamps)
    assert action.values[near, 0].tolist() == numbers(e, length)


def test_episodes_of_a_video_whose_ranges_are_a_frame_late(tmp_path):
    root = write_v3(tmp_path / "set", LENGTHS, starts=[0.0, 0.9, 1.8, 2.5])
    for e, episode in enumerate(opened(root)):
        check(episode, e, LENGTHS[e])
        assert len(episode.findings) == (e > 0)


def test_two_episodes_on_one_range_are_both_without_the_camera(tmp_path):
    ends = {f"videos/{CAMERA}/to_timestamp": [1.0, 2.0, 2.0, 4.0]}
    root = write_v3(tmp_path / "set", [10] * 4, starts=[0, 1, 1, 3], listed=ends)
    episodes = opened(root)
    for e in (0, 3):
        check(episodes[e], e, 10)
    for e in (1, 2):
        assert "nothing says which frames" in episodes[e].left_out[CAMERA]
        assert episodes[e].cameras == () and "action" in episodes[e].streams


def test_episodes_of_which_a_merge_names_the_wrong_video(tmp_path):
    """LeRobot's `aggregate` gave all episodes the last file (its pull request 2550)."""
    root = write_v3(tmp_path / "set", LENGTHS, video=False, starts=[0, 0.8, 0, 0.7])
    write_numbers(root / f"videos/{CAMERA}/chunk-000/file-000.mp4", numbers(2, 7) + numbers(3, 8))
    assert all(CAMERA in episode.left_out for episode in opened(root))


def test_cameras_may_be_split_into_files_differently(tmp_path):
    wrist = {f"videos/{WRIST}/chunk_index": [0] * 4, f"videos/{WRIST}/file_index": [0, 1, 1, 2]}
    wrist[f"videos/{WRIST}/from_timestamp"] = [0, 0, 0.9, 0]
    feature = {WRIST: {"dtype": "video", "shape": [16, 96, 3]}}
    root = write_v3(tmp_path / "set", LENGTHS, listed=wrist, features=feature)
    for file, members in enumerate(([0], [1, 2], [3])):
        shows = [k for e in members for k in numbers(e, LENGTHS[e])]
        write_numbers(root / f"videos/{WRIST}/chunk-000/file-{file:03d}.mp4", shows)
    for e, episode in enumerate(opened(root)):
        check(episode, e, LENGTHS[e])
        assert shown(episode.streams[WRIST]) == numbers(e, LENGTHS[e])
        assert not episode.findings and not episode.left_out


def test_a_list_without_ranges_does_not_share_a_video(tmp_path):
    missing = {f"videos/{CAMERA}/{end}_timestamp": None for end in ("from", "to")}
    root = write_v3(tmp_path / "set", LENGTHS, listed=missing)
    assert "has no videos/observation" in opened(root)[1].left_out[CAMERA]


def test_ranges_beyond_the_end_of_a_video_are_named_with_both_times(tmp_path):
    episodes = opened(write_v3(tmp_path / "set", LENGTHS, starts=[0, 800, 1700, 2400]))  # ms
    assert shown(episodes[0].streams[CAMERA]) == numbers(0, 8)
    reason = episodes[1].left_out[CAMERA]
    assert "last frame is at 3.100 s" in reason and "begins at 800 s" in reason


def test_an_end_that_disagrees_with_the_rows_is_a_finding(tmp_path):
    ends = {f"videos/{CAMERA}/to_timestamp": [0.8, 2.5, 2.4, 3.2]}
    episodes = opened(write_v3(tmp_path / "set", LENGTHS, listed=ends))
    for e in range(4):
        check(episodes[e], e, LENGTHS[e])
    assert [len(episode.findings) for episode in episodes] == [0, 1, 0, 0]


def test_rows_with_a_pause_that_the_video_does_not_have(tmp_path):
    def paused(e, length, first):
        stamps = np.arange(length) / FPS + 1.7e9
        stamps[length // 2 :] += 2.0
        return rows(e, length, first, timestamp=pa.array(stamps))

    for e, episode in enumerate(opened(write_v2(tmp_path / "set", LENGTHS, table=paused))):
        check(episode, e, LENGTHS[e])
        assert "timestamp is not" in episode.findings[0]
        assert "matched by number" in episode.findings[1]
        assert episode.streams[CAMERA].timestamps[-1] > 2e9


def test_a_camera_that_is_stored_twice_is_a_finding(tmp_path):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    double = pa.array([{"bytes": b"\x89PNG", "path": ""}] * 8, kind)
    root = write_v2(tmp_path / "set", [8])
    file = root / "data/chunk-000/episode_000000.parquet"
    pq.write_table(rows(0, 8, 0, **{CAMERA: double}), file)
    (episode,) = opened(root)
    check(episode, 0, 8)
    assert "stored as images, too" in episode.findings[0]
