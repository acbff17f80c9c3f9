"""Episodes cut into clips: several cameras in one frame, padding masks, and who is at fault."""

from dataclasses import replace

import numpy as np
import pytest
from ml_collections import ConfigDict

from data_pipelines.cameras import camera_rows, cameras, tile
from data_pipelines.cutting import StreamMismatch, check_names, cut_episode, cut_numbers
from data_pipelines.episode import Episode, Section, Stream
from data_pipelines.frames import resize_area
from data_pipelines.vectors import parse

RNG = np.random.default_rng(0)
CLIP = ConfigDict(dict(height=32, width=48, observed_frames=5, future_frames=8, fps=10))
IO = ConfigDict(
    dict(action=dict(horizon=6, fps=20, shift=0.05, dim=4), proprio=dict(horizon=2, fps=20, dim=3))
)
N = 30  # seconds: 1.5


class Frames:
    """Frames that say their number: all pixels of frame i are i, plus noise in the green."""

    def __init__(self, n, height=64, width=96, offset=0):
        self.data = np.zeros((n, height, width, 3), np.uint8)
        self.data[..., 0] = offset + np.arange(n)[:, None, None]
        self.data[..., 1] = RNG.integers(0, 256, (n, height, width))
        self.asked = []

    def __len__(self):
        return len(self.data)

    def read(self, indices):
        self.asked += list(indices)
        return self.data[indices]


def _episode(**extra):
    times = np.arange(N, dtype=np.int64) * 50_000_000  # 20 Hz
    slow = np.arange(N // 2, dtype=np.int64) * 100_000_000 + 3_000_000  # 10 Hz, late
    streams = {
        "front": Stream(times, Frames(N)),
        "side": Stream(slow, Frames(N // 2, 48, 64, offset=100)),
        "wrist": Stream(times, Frames(N, 37, 51, offset=200)),
        "action": Stream(times, RNG.normal(size=(N, 4)).astype(np.float32)),
        "state": Stream(times, RNG.normal(size=(N, 3))),
    } | extra
    return Episode("e", "toy", "arm", ("go",), streams, ("front", "side", "wrist"))


def _dataset(video="front", action="action", proprio="state"):
    return ConfigDict(dict(name="toy", video=video, action=action, proprio=proprio))


def test_padding_masks_come_with_the_numbers():
    episode = _episode()
    cuts = cut_episode(episode, _dataset(), CLIP, IO)
    columns = cuts.columns
    assert set(columns) == {"anchor", "actions", "actions_padded", "proprio", "proprio_padded"}
    assert columns["actions"].shape == (N, 6, 4) and columns["proprio"].shape == (N, 2, 3)
    after = np.arange(N)[:, None] + np.arange(6) + 1  # 50 ms ahead, 50 ms apart
    np.testing.assert_array_equal(columns["actions_padded"], after > N - 1)
    action = episode.streams["action"].values
    np.testing.assert_array_equal(columns["actions"], action[np.minimum(after, N - 1)])
    np.testing.assert_array_equal(np.argwhere(columns["proprio_padded"]), [[0, 0]])
    numbers = cut_numbers(episode, _dataset(), IO)
    assert numbers.keys() == columns.keys()
    for key, value in numbers.items():
        np.testing.assert_array_equal(value, columns[key])


def test_numbers_are_read_without_a_frame():
    episode = _episode()
    cut_numbers(episode, _dataset(("front", "side")), IO, anchor_fps=10)
    assert episode.streams["front"].values.asked == episode.streams["side"].values.asked == []


def test_video_alone_has_an_anchor_per_frame():
    cuts = cut_episode(_episode(), _dataset(action="", proprio=""), CLIP, IO)
    assert set(cuts.columns) == {"anchor"} and cuts.video.clips.shape == (N, 13)
    k = 2 * (np.arange(13) - 4)  # 10 fps of 20
    shown = cuts.video.frames[cuts.video.clips][..., 0, 0, 0]
    np.testing.assert_array_equal(shown, np.clip(np.arange(N)[:, None] + k, 0, N - 1))


def test_a_view_shows_its_own_cameras_at_the_observed_moments():
    """Beside the video, which is what it is without; the clock is the video's first camera."""
    sizes = dict(hand=dict(height=16, width=32), both=dict(height=32, width=16))
    clip = ConfigDict(CLIP.to_dict() | dict(views=sizes))
    dataset = _dataset()
    dataset.views = dict(hand="wrist", both=(("side",), ("",)), unused="front")
    episode = _episode()
    cuts, alone = (
        cut_episode(episode, dataset, clip, IO),
        cut_episode(episode, _dataset(), CLIP, IO),
    )
    for mine, other in zip(
        (*cuts.video, *cuts.columns.values()), (*alone.video, *alone.columns.values())
    ):
        np.testing.assert_array_equal(mine, other)
    assert cuts.digest() != alone.digest() and set(cuts.views) == {"hand", "both"}
    now = np.arange(N)[:, None] + 2 * np.arange(-4, 1)
    frames = episode.streams["wrist"].values.data[np.maximum(now, 0)[7]]
    np.testing.assert_array_equal(cuts.views["hand"].window(7), resize_area(frames, 16, 32))
    both = cuts.views["both"].window(7)
    assert both.shape == (5, 32, 16, 3) and both[:, :16].any() and not both[:, 16:].any()
    dataset.views.hand = ""  # a dataset without that camera says so
    cuts = cut_episode(episode, dataset, clip, IO)
    assert not cuts.views["hand"].window(7).any() and cuts.findings == ()


@pytest.mark.parametrize(
    ("views", "error", "message"),
    [
        ({}, StreamMismatch, r"'toy': the model sees the view 'hand' .* set it to one, or to \"\""),
        (dict(hand=("",)), StreamMismatch, "views.hand must be a stream's name, several"),
        (dict(hand="elbow"), ValueError, r"toy.views asks for the cameras \['elbow'\], .* only"),
    ],
)
def test_a_view_without_a_camera_is_explained(views, error, message):
    clip = ConfigDict(CLIP.to_dict() | dict(views=dict(hand=dict(height=16, width=32))))
    dataset = _dataset()
    dataset.views = views
    with pytest.raises(error, match=message):
        cut_episode(_episode(), dataset, clip, IO)


def test_anchors_lie_where_all_parts_of_the_action_are():
    late = Stream(np.arange(10, 20, dtype=np.int64) * 50_000_000, np.zeros((10, 1)))
    action = (dict(stream="action", columns=(0, 1, 2)), dict(stream="late"))
    columns = cut_numbers(_episode(late=late), _dataset(action=action), IO)
    np.testing.assert_array_equal(columns["anchor"], np.arange(10, 20) * 50_000_000)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, "abc" * 10),  # paraphrases of one task take turns
        ({0: "ab", 10: "c"}, "ab" * 5 + "c" * 20),
        ({0: "a", 5: "c", 9: "b", 20: "c"}, "aaaaacccc" + "b" * 11 + "c" * 10),
        ({4: "b", 20: "ac"}, "b" * 20 + "ac" * 5),  # before the first one starts: its text
    ],
)
def test_a_window_has_a_text_of_its_moment(sections, expected):
    parts = tuple(Section(frame * 50_000_000, tuple(t)) for frame, t in sections.items())
    episode = replace(_episode(), instructions=("a", "b", "c"), sections=parts)
    cuts = cut_episode(episode, _dataset(), CLIP, IO)
    assert "".join("abc"[i] for i in cuts.texts) == expected
    # The hash sees another division into sections, and nothing else about the texts.
    flat = cut_episode(replace(episode, sections=()), _dataset(), CLIP, IO)
    assert (cuts.digest() == flat.digest()) == (not sections)


@pytest.mark.parametrize(("rate", "said"), [(10, "more"), (20, ""), (24, ""), (40, "fewer")])
def test_actions_of_another_rate_than_the_policys_are_a_finding(rate, said):
    """LIBERO as LeRobot says 10 per second, and LIBERO plays 20: each command is played twice."""
    io = ConfigDict({**IO.to_dict(), "action": {**IO.action.to_dict(), "fps": rate}})
    findings = cut_episode(_episode(), _dataset(), CLIP, io).findings
    assert [f"action has {said} values per second" in text for text in findings] == [True] * bool(
        said
    )
    positions = dict(stream="action", interpolation="linear")
    assert cut_episode(_episode(), _dataset(action=(positions,)), CLIP, io).findings == ()


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.0, 0.08, False), (0.0, 0.085, False), (-1, 1, True), (0, 100, True), (-0.08, 0, True)],
)
def test_a_gripper_of_another_range_is_a_finding(low, high, said):
    state = RNG.normal(size=(N, 3))
    state[:, 2] = np.linspace(low, high, N)
    episode = _episode(state=Stream(np.arange(N, dtype=np.int64) * 50_000_000, state))
    part = dict(stream="state", represent="gripper", columns=(2,), closed=0.0, open=0.08)
    io = ConfigDict({**IO.to_dict(), "proprio": dict(horizon=2, fps=20, dim=1)})
    findings = cut_episode(episode, _dataset(proprio=(part,)), CLIP, io).findings
    assert ["beyond closed = 0 and open = 0.08, to which it is" in f for f in findings] == [
        True
    ] * said


def test_windows_without_an_instruction_are_a_finding():
    said = "there are windows without an instruction; they have the empty text"
    parts = Section(0, ("a",)), Section(500_000_000, ("",))
    for episode in (
        replace(_episode(), instructions=("",)),
        replace(_episode(), instructions=()),
        replace(_episode(), instructions=("a", ""), sections=parts),
    ):
        assert cut_episode(episode, _dataset(), CLIP, IO).findings == (said,)
    unused = replace(_episode(), instructions=("a", ""), sections=parts[:1])
    assert cut_episode(unused, _dataset(), CLIP, IO).findings == ()


def test_a_stream_that_was_left_out_costs_nothing_unless_it_is_asked_for():
    left = {"wrist": "not downloaded", "force": "row 3 is null"}
    episode = replace(_episode(), left_out=left)
    cut_numbers(episode, _dataset(), IO)
    for change, message in (
        (dict(video=("front", "wrist")), r"wrist \(not downloaded\)$"),
        (dict(action=(dict(stream="action", columns=(0,)), dict(stream="force"))), "row 3 is null"),
        (dict(action=(dict(stream="action", represent="delta", base="force"),)), "row 3 is null"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            cut_numbers(episode, _dataset(**change), IO)
        assert not isinstance(error.value, StreamMismatch)


def test_windows_that_reach_into_a_pause_are_a_finding():
    """They hold what they held, the nearest values; now it is said of which stream."""
    episode = _episode()
    assert cut_episode(episode, _dataset(), CLIP, IO).findings == ()
    late = np.arange(N, dtype=np.int64) * 50_000_000 + 10**9 * (np.arange(N) >= 20)
    for name in ("front", "action", "state"):
        stream = episode.streams[name]
        cuts = cut_episode(_episode(**{name: Stream(late, stream.values)}), _dataset(), CLIP, IO)
        (finding,) = cuts.findings
        assert finding.startswith(f"{name} pauses within an episode: ")
    # A value that holds until the next one has no pauses, nor has what nobody asks for.
    held = _dataset(action=(dict(stream="action", interpolation="previous"),))
    for dataset, name in ((held, "action"), (_dataset(proprio=""), "state")):
        paused = _episode(**{name: Stream(late, episode.streams[name].values)})
        assert cut_episode(paused, dataset, CLIP, IO).findings == ()


def test_a_camera_that_shows_nothing_is_a_finding():
    """As the dummy pictures of a camera that an episode does not have."""
    dark = Frames(N)
    dark.data[:] = 1
    dark.data[0] = 200  # the average of the first batch is not black
    episode = _episode(wrist=Stream(np.arange(N, dtype=np.int64) * 50_000_000, dark))
    dataset = _dataset(video=("front", "wrist"))
    assert cut_episode(episode, dataset, CLIP, IO).findings == ()
    dark.data[0] = 1
    (finding,) = cut_episode(episode, dataset, CLIP, IO).findings
    assert finding == "wrist is black throughout an episode"


def test_a_stream_that_is_not_there_at_the_present_is_a_finding_or_an_error():
    """The edges of an episode are repeated in all windows, but those of one stream in few."""
    episode, dataset = _episode(), _dataset(("front", "side"))
    delta = dict(stream="action", columns=(0, 1, 2), represent="delta", base="state")
    based = _dataset(action=(delta, dict(pad=1)), proprio="")
    for name, asks in (("side", dataset), ("state", dataset), ("state", based)):
        stream = episode.streams[name]
        half = len(stream.values) // 2
        for some in (slice(half), slice(half, None)):
            times = stream.timestamps[some]
            values = stream.values[some] if name == "state" else Frames(len(times))
            short = _episode(**{name: Stream(times, values)})
            (finding,) = cut_episode(short, asks, CLIP, IO).findings
            assert finding.startswith(f"{name} begins later than an episode or ends earlier")
        other = _episode(**{name: Stream(stream.timestamps + 10**12, stream.values)})
        with pytest.raises(ValueError, match=f"the video and {name} do not overlap in time"):
            cut_numbers(other, asks, IO)


def test_pictures_of_different_sizes_are_an_error():
    episode, small = _episode(), Frames(N, 32, 48)

    class Changing(Frames):
        def read(self, indices):
            return super().read(indices) if max(indices) < N // 2 else small.read(indices)

    changing = _episode(front=Stream(episode.streams["front"].timestamps, Changing(N)))
    with pytest.raises(ValueError, match=r"front has pictures of different sizes, \[64, 96\] and"):
        cut_episode(changing, _dataset(), CLIP, IO)


def test_numbers_that_float32_cannot_tell_apart_are_a_finding():
    times, steps = np.arange(N, dtype=np.int64) * 50_000_000, np.arange(N)[:, None]
    for values, said in (
        (4.1e6 + 0.02 * steps, True),  # metres of a map
        (1.7e9 + 0.05 * steps, True),
        (2**26 + steps, True),  # counts of an encoder
        (0.7 + 1e-9 * steps, False),  # at rest in a simulator
        (4.1e6 + 5.0 * steps, False),
        (np.full((N, 1), 0.1), False),
    ):
        episode = _episode(state=Stream(times, np.tile(values, 3)))
        findings = cut_episode(episode, _dataset(), CLIP, IO).findings
        assert len(findings) == said and all("float32" in finding for finding in findings)


def test_a_camera_that_is_slower_than_the_clip_is_a_finding():
    episode = _episode()
    few = np.arange(0, N, 4)
    slow = _episode(front=Stream(episode.streams["front"].timestamps[few], Frames(len(few))))
    (finding,) = cut_episode(slow, _dataset(), CLIP, IO).findings
    assert finding.startswith("front has fewer than clip.fps = 10 frames per second")


def test_an_angle_that_jumps_is_a_finding_unless_its_part_says_how_it_wraps():
    turning = np.mod(np.linspace(2, 4.4, N) + np.pi, 2 * np.pi) - np.pi
    episode = _episode()
    values = np.column_stack([episode.streams["state"].values[:, :2], turning])
    episode = _episode(state=Stream(episode.streams["state"].timestamps, values))
    (finding,) = cut_episode(episode, _dataset(), CLIP, IO).findings
    assert finding.startswith("proprio: of state, dimension 2 jumps by 2π: an angle that wraps")
    part = dict(stream="state", columns=(2,))
    for change, count in (({}, 1), (dict(wrap=(-np.pi, np.pi)), 0)):
        asks = _dataset(proprio=(part | change, dict(pad=2)))
        assert len(cut_episode(episode, asks, CLIP, IO).findings) == count


def test_several_cameras_fill_one_frame():
    """Every camera by its own clock, at the instants of the first."""
    episode = _episode()
    rows = (("front", "side"), ("wrist",))
    cuts = cut_episode(episode, _dataset(rows), CLIP, IO)
    assert cuts.video.frames.shape[1:] == (32, 48, 3)
    clips = cuts.video.frames[cuts.video.clips]
    front, side, wrist = clips[..., 0, 0, 0], clips[..., 0, 24, 0], clips[..., 16, 0, 0]
    expected = np.clip(np.arange(N)[:, None] + 2 * (np.arange(13) - 4), 0, N - 1)
    np.testing.assert_array_equal(front, expected)
    np.testing.assert_array_equal(wrist, 200 + expected)
    nearest = np.abs(expected[..., None] * 50 - (np.arange(N // 2) * 100 + 3)).argmin(-1)
    np.testing.assert_array_equal(side, 100 + nearest)
    whole = clips[7, 3]
    for name, index, cell in (
        ("front", expected[7, 3], whole[:16, :24]),
        ("side", nearest[7, 3], whole[:16, 24:]),
        ("wrist", expected[7, 3], whole[16:]),
    ):
        frame = episode.streams[name].values.data[index : index + 1]
        np.testing.assert_array_equal(cell, resize_area(frame, *cell.shape[:2])[0])
    asked = episode.streams["front"].values.asked
    assert sorted(asked) == asked == list(range(N))  # in order, and once


@pytest.mark.parametrize(
    ("video", "rows"),
    [
        ("a", (("a",),)),
        (("a",), (("a",),)),
        (["a", "b"], (("a", "b"),)),
        (("a", "b", "c"), (("a", "b"), ("c", ""))),
        (tuple("abcde"), (("a", "b", "c"), ("d", "e", ""))),
        ((("a",), ["b", "c"]), (("a",), ("b", "c"))),
        (("a", ("b", "c")), (("a",), ("b", "c"))),
    ],
)
def test_layouts(video, rows):
    assert camera_rows(video) == rows
    assert cameras(rows) == tuple(dict.fromkeys("".join(map("".join, rows))))


def test_tiles_are_equal_and_unused_cells_black():
    frames = {name: np.full((2, 20, 30, 3), i + 1, np.uint8) for i, name in enumerate("abc")}
    whole = tile(camera_rows(tuple("abc")), frames, 41, 61)
    assert whole.shape == (2, 41, 61, 3)
    assert [whole[:, y, x].max() for y, x in ((0, 0), (0, 60), (40, 0), (40, 60))] == [1, 2, 3, 0]
    assert set(np.unique(whole)) == {0, 1, 2, 3}
    assert tile((("a",),), frames, 20, 30) is frames["a"]


@pytest.mark.parametrize("video", ["", (), ((),), (("a",), ()), ("", ""), ((1,),)])
def test_wrong_layouts_are_explained(video):
    with pytest.raises(ValueError, match="video must be a stream's name, several, or rows"):
        camera_rows(video)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(action="nose"), r"'toy': the config names the streams \['nose'\], but episode 'e'"),
        (dict(action=(dict(stream="action", columns=(4,)), dict(pad=3))), "'e': .*no column 4"),
        (dict(action=(dict(stream="front"),)), "'front' is a camera"),
        (dict(proprio=(dict(pad=2),)), "'toy': policy_io says 3 dimensions, but the parts have"),
        (dict(proprio=(dict(stream="state", base="x"),)), "'toy': part 0 of proprio"),
        (
            dict(action=(dict(stream="action", represent="delta", base="nose"),)),
            r"names the streams \['nose'\]",
        ),
        (dict(video=()), "'toy': video must be a stream's name"),
    ],
)
def test_what_the_config_gets_wrong_stops_the_job(change, message):
    with pytest.raises(StreamMismatch, match=message):
        cut_numbers(_episode(), _dataset(**change), IO)


def test_instructions_that_python_wrote_are_a_finding():
    """As `str` of the bytes that TFDS gives; tasks of converted datasets have them."""

    def found(text):
        return cut_episode(replace(_episode(), instructions=(text,)), _dataset(), CLIP, IO).findings

    for text in ("b'open it'", 'b"it\'s"', "['open it']", "None", "nan", "<NA>"):
        assert "instructions are Python's b'...'" in found(text)[0]
    for text in ("none of them", "[Low] open it", "banana", "b is 'it'"):
        assert not found(text)


JOINTS = ("waist", "elbow", "grip")
QUAT = ("x", "y", "z", "qx", "qy", "qz", "qw")


@pytest.mark.parametrize(
    ("part", "names", "message"),
    [
        (dict(base="state"), {"state": JOINTS, "action": JOINTS}, None),
        (dict(base="state"), {"action": JOINTS}, None),
        (dict(base="state"), {"state": ("a", "b", "c"), "action": JOINTS}, None),
        (
            dict(base="state"),
            {"state": ("grip", "waist", "elbow"), "action": JOINTS},
            "'waist' of action would be relative to 'grip' of state, .* column 1; set base_columns",
        ),
        (
            dict(base="state", columns=(0, 2)),
            {"state": (*JOINTS[:2], "pad", "grip"), "action": JOINTS},
            "'grip' of action would be relative to 'pad' of state, .* column 3",
        ),
        (
            dict(base="state", columns=(0, 2), base_columns=(0, 3)),
            {"state": (*JOINTS[:2], "pad", "grip"), "action": JOINTS},
            None,
        ),
        (dict(represent="pose", rotation="quaternion_xyzw"), {"action": QUAT}, None),
        (dict(represent="pose", rotation="rotvec"), {"action": QUAT[:6]}, None),
        (
            dict(represent="pose", rotation="quaternion_wxyz"),
            {"action": QUAT},
            r"\['qx', 'qy', 'qz', 'qw'\] by its names, but the config says quaternion_wxyz",
        ),
        (
            dict(stream=("p", "q"), represent="relative_pose", base=("p", "q"))
            | dict(rotation="quaternion_xyzw"),
            {"q": ("r_w", "r_x", "r_y", "r_z")},
            "the quaternion of q is",
        ),
    ],
)
def test_what_the_data_call_their_numbers_is_compared(part, names, message):
    given = {"stream": "action", "represent": "delta", **part}
    if not message:
        check_names(parse((given,)), names)
        return
    with pytest.raises(ValueError, match=message):
        check_names(parse((given,)), names)


def test_names_that_contradict_the_config_stop_the_job():
    swapped = {"action": "abcd", "state": "bac"}
    episode = replace(_episode(), names=swapped)
    part = dict(stream="action", represent="delta", base="state", columns=(0, 1, 2))
    io = ConfigDict({**IO.to_dict(), "action": {**IO.action.to_dict(), "dim": 3}})
    assert cut_numbers(replace(episode, names={}), _dataset(action=(part,)), io)
    with pytest.raises(StreamMismatch, match="'toy': 'a' of action would be relative to 'b'"):
        cut_numbers(episode, _dataset(action=(part,)), io)


def test_what_an_episode_lacks_is_its_own_fault():
    for change, message in (
        (dict(video=("front", "top")), r"cameras \['top'\], but there are only \['"),
        (dict(video="state"), r"cameras \['state'\], but there are only \['"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            cut_numbers(_episode(), _dataset(**change), IO)
        assert not isinstance(error.value, StreamMismatch)
    short = Stream(np.arange(2), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"two or fewer samples in \['state'\]"):
        cut_numbers(_episode(state=short), _dataset(), IO)
    later = Stream(np.arange(5) + 10**12, np.zeros((5, 4)))
    with pytest.raises(ValueError, match="do not overlap"):
        cut_numbers(_episode(action=later), _dataset(), IO)
