"""A connection's episodes: the names of its queries, and what it is told once."""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from PIL import Image

from data_pipelines.cameras import View
from data_pipelines.frames import resize_area
from data_pipelines.normalize import Normalizer
from data_pipelines.representations import Mode
from data_pipelines.statistics import compute_statistics
from mvjax.policy.robot import Robot
from mvjax.serving.adapters import make_adapter
from mvjax.serving.messages import RequestError
from mvjax.serving.notices import Notices, Ranges, Trained, camera_sizes, trained_pictures
from mvjax.serving.session import Session, SessionSpec

PICTURE = np.zeros((4, 6, 3), np.uint8)
SPEC = SessionSpec(observed_frames=2, proprio_horizon=1)
ADAPTER = make_adapter("plain", Robot((), (), 2, 2))


def seeing(clip, size=None):
    """What training says of the only camera's pictures."""
    return {"": Trained(clip, size or clip, exact=size is not None)}


def message(state=(0.1, 0.2), **more):
    return {
        "observation/image": PICTURE,
        "observation/state": np.array(state),
        "prompt": "open the drawer",
        **more,
    }


def session(numbers=None, spec=SPEC, adapter=ADAPTER):
    return Session(adapter, spec, numbers or count(), Notices({}, "client"))


def name(session, **more):
    return session.observe(message(**more)).observation.noise_key


def test_queries_are_named_by_the_episodes_of_the_server_and_their_number():
    """Two clients with the same observations get other noise; the same order gives the same."""
    for _ in range(2):
        numbers = count()
        session(numbers)  # connects and leaves: it counts for nothing
        first, second = (session(numbers) for _ in range(2))
        first.reset()
        assert [name(first), name(second)] == [("session 0", 0), ("session 1", 0)]
        with pytest.raises(RequestError):
            name(first, state=(np.nan, 0))
        history = {"observation/image_history": np.stack([PICTURE] * 2)}
        assert [name(first, **history), name(first)] == [("session 0", 1), ("session 0", 2)]
        first.reset()
        assert [name(first), name(first)] == [("session 2", 0), ("session 2", 1)]
        assert name(first, prompt="close the drawer") == ("session 3", 0)
        assert name(second) == ("session 1", 1)


def with_bars(picture, side=224):
    """openpi_client.image_tools.resize_with_pad."""
    h, w = picture.shape[:2]
    ratio = max(w / side, h / side)
    height, width = int(h / ratio), int(w / ratio)
    small = Image.fromarray(picture).resize((width, height), resample=Image.Resampling.BILINEAR)
    padded = Image.new("RGB", (side, side), 0)
    padded.paste(small, (max(0, int((side - width) / 2)), max(0, int((side - height) / 2))))
    return np.asarray(padded)


def scene(height, width, seed=0):
    """A smooth picture without black."""
    few = np.random.default_rng(seed).integers(60, 255, (6, 8, 3), np.uint8)
    return np.asarray(
        Image.fromarray(few).resize((width, height), resample=Image.Resampling.BICUBIC)
    )


def told(one, **more):
    """What the policy is shown of its only camera, and what is said at this query."""
    (shown,) = one.observe(message(**more)).observation.frames.values()
    return shown, one.notices.take()


@pytest.mark.parametrize(
    "camera, clip, side",
    [
        ((720, 1280), (180, 320), 224),  # DROID
        ((480, 640), (480, 640), 224),  # ALOHA
        ((720, 1280), (176, 320), 224),  # a clip's sides are multiples of 16
        ((640, 480), (64, 48), 128),  # upright
        ((1080, 1920), (144, 256), 225),  # bars of two widths
    ],
)
def test_bars_that_openpi_adds_are_cut_off(camera, clip, side):
    one = session(spec=replace(SPEC, cameras=seeing(clip)))
    for number in range(3):
        original = scene(*camera, seed=number)
        padded = with_bars(original, side)
        shown, said = told(one, **{"observation/image": padded})
        ours = resize_area(shown[-1:], *clip)[0].astype(int)
        # As training saw it, but for the coarser pixels.
        assert np.abs(ours - resize_area(original[None], *clip)[0]).mean() < 3
        assert ours.min() > 20
        black = int((padded.max(axis=-1) == 0).mean() * 100)
        if number == 0:
            assert len(said) == 1 and "black" in said[0]
            assert f"({black}%)" in said[0] or f"({black + 1}%)" in said[0]
        else:
            assert not said
    history = np.stack([with_bars(scene(*camera, seed), side) for seed in (1, 2)])
    last = {"observation/image": history[-1]}  # beside a history it must be its last one
    assert told(one, **last, **{"observation/image_history": history})[0].shape == shown.shape


def square(rows=slice(None), columns=slice(None), value=200):
    picture = np.zeros((224, 224, 3), np.uint8)
    picture[rows, columns] = value
    return picture


@pytest.mark.parametrize(
    "picture",
    [
        square(slice(60, 160), slice(60, 130)),  # a dark scene
        square(slice(31, 193)),  # symmetric, but wider bars than of 4:3
        square(slice(28, 190)),  # bars of other widths above and below
        square(slice(10, 214)),  # symmetric, but of another aspect than training's
        np.maximum(square(slice(28, 196)), 1),  # not zero
        square(columns=slice(28, 196)),  # at the sides
    ],
)
def test_a_dark_scene_is_not_cut(picture):
    one = session(spec=replace(SPEC, cameras=seeing((480, 640))))
    shown, said = told(one, **{"observation/image": picture})
    np.testing.assert_array_equal(shown[-1], picture)
    assert "224x224, of another aspect than what the policy sees, 480x640" in said[0]
    assert not told(one, **{"observation/image": picture})[1]


def test_bars_must_be_black_in_all_pictures():
    one = session(spec=replace(SPEC, cameras=seeing((480, 640))))
    boxed = with_bars(scene(480, 640))
    assert told(one, **{"observation/image": boxed})[0].shape == (2, 168, 224, 3)
    assert told(one, **{"observation/image": square()})[0].shape == (2, 224, 224, 3)
    assert told(one, **{"observation/image": boxed})[0].shape == (2, 224, 224, 3)


def test_bars_of_unknown_origin_and_black_pictures_are_said():
    """A square clip does not tell whether training had the bars; --camera_size does."""
    boxed = with_bars(scene(480, 640))
    one = session(spec=replace(SPEC, cameras=seeing((64, 64))))
    shown, said = told(one, **{"observation/image": boxed})
    np.testing.assert_array_equal(shown[-1], boxed)
    assert len(said) == 1 and "first 28 and the last 28 rows" in said[0]
    known = session(spec=replace(SPEC, cameras=seeing((64, 64), (480, 640))))
    assert told(known, **{"observation/image": boxed})[0].shape == (2, 168, 224, 3)
    assert "stretched." in told(known, **{"observation/image": scene(200, 200)})[1][0]
    assert "is black" in told(one, **{"observation/image": np.zeros_like(boxed)})[1][0]
    assert "are 4x4, but" in told(one, **{"observation/image": boxed[100:104, :4]})[1][0]
    # Bars of another aspect than the clip's, and bars that went through a JPEG.
    wide = session(spec=replace(SPEC, cameras=seeing((480, 640))))
    said = told(wide, **{"observation/image": with_bars(scene(720, 1280))})[1]
    assert len(said) == 2 and "first 49 and the last 49 rows" in said[1]
    wide = session(spec=replace(SPEC, cameras=seeing((480, 640))))
    said = told(wide, **{"observation/image": np.maximum(boxed, 3)})[1]
    assert "first 28 and the last 28 rows" in said[1] and "nearly black" in said[1]


@pytest.mark.parametrize("clip", [(480, 640), (64, 64)])
def test_a_black_first_picture_decides_nothing(clip):
    one, boxed = session(spec=replace(SPEC, cameras=seeing(clip))), with_bars(scene(480, 640))
    said = told(one, **{"observation/image": np.zeros_like(boxed)})[1]
    assert said == ["The picture is black; is the camera covered?"]
    said = told(one, **{"observation/image": boxed})[1]
    assert len(said) == 1 and "28" in said[0]


@pytest.mark.parametrize(
    "picture, words",
    [
        (np.full((64, 64, 3), 128, np.uint8), "one colour"),
        (np.full((64, 64, 3), (0, 0, 255), np.uint8), "one colour"),  # of a card without a camera
        ((scene(64, 64) / 255).round().astype(np.uint8), "no value above 1 of 255"),
        (scene(64, 64), ""),
    ],
)
def test_a_picture_that_shows_nothing_is_said(picture, words):
    one = session(spec=replace(SPEC, cameras=seeing((64, 64))))
    said = told(one, **{"observation/image": picture})[1]
    assert [words in sentence for sentence in said] == ([True] if words else [])


def test_a_camera_that_has_stopped_is_said():
    """Bit for bit the same picture, while the arm moves farther than it trembles."""
    for history in (False, True):
        one = session(spec=replace(SPEC, cameras=seeing((64, 64)), proprio=ranges()))
        for number, (state, seed, words) in enumerate(
            [
                ((0.1, 0.5), 0, ""),
                ((0.101, 0.52), 0, ""),
                ((0.2, 0.5), 1, ""),
                ((0.2, 0.53), 1, ""),
                ((0.2, 0.56), 1, "has not changed while the robot moved"),
                ((0.2, 0.9), 1, ""),  # said once
            ]
        ):
            sent = {"observation/image": scene(64, 64, seed)}
            if history:
                sent["observation/image_history"] = np.stack([scene(64, 64, seed)] * 2)
            said = told(one, state=state, **sent)[1]
            assert [words in sentence for sentence in said] == ([True] if words else []), number


def test_a_large_camera_is_not_what_the_policy_sees():
    one = session(spec=replace(SPEC, cameras=seeing((64, 64), (1080, 1920))))
    assert told(one, **{"observation/image": scene(216, 384)})[1] == []


def ranges(mode=Mode.VARIANCE):
    """Of states between 0.05 and 0.35, and 0 and 1."""
    data = np.random.default_rng(0).uniform((0.05, 0), (0.35, 1), (500, 1, 2))
    statistics = {"proprio": compute_statistics(data)}
    return Ranges.of(Normalizer(statistics, {"proprio": mode}), "proprio", ("x[0]", "x[1]"))


@pytest.mark.parametrize(
    "state, words, far",
    [
        ((0.2, 0.5), None, False),
        ((0.35, 1.0), None, False),
        ((0.4, 0.5), "x[0] with 0.4", False),
        ((200, 500), "2 of 2 numbers, most of all x[1] with 500 (training: 0.00", True),
        ((1e30, 0.5), "1 of 2 numbers, most of all x[0] with 1e+30", True),
        ((0.2, -90), "x[1] with -90", True),
    ],
)
def test_a_state_in_other_units_is_said_once_and_counted(state, words, far):
    totals = {}
    one = session(spec=replace(SPEC, proprio=ranges()))
    one.notices = Notices(totals, "client")
    said = [told(one, state=state)[1] for _ in range(3)]
    assert said[1:] == [[], []]
    if words is None:
        assert totals == {} and said[0] == []
        return
    (sentence,) = said[0]
    assert words in sentence and ("units" in sentence) == far
    kind = "state_far_outside" if far else "state_outside"
    assert totals[kind] == {"queries": 3, "connections": 1, "first": sentence}
    if far:
        assert "They are clipped." in sentence
        assert totals["state_clipped"]["queries"] == 3


def test_noise_of_a_constant_state_is_not_far_outside():
    statistics = {"proprio": compute_statistics(np.full((50, 1, 2), (0.3, 0)))}
    known = Ranges.of(Normalizer(statistics, {"proprio": Mode.VARIANCE}), "proprio", ("a", "b"))
    assert not known.beyond(np.array([[0.3002, -2e-4]]), margin=0.05)
    assert not known.beyond(np.array([[0.31, -2e-3]]), margin=3.0)
    assert "b with 90" in known.beyond(np.array([[0.3, 90]]), margin=3.0)


def test_what_is_not_normalised_is_outside_all_the_same():
    one = session(spec=replace(SPEC, proprio=ranges(Mode.IDENTITY)))
    said = told(one, state=(200, 0.5))[1]
    assert "x[0] with 200" in said[0] and "clipped" not in said[0]
    assert Ranges.of(Normalizer({}, {"proprio": Mode.NONE}), "proprio", ()) is None


def test_actions_far_outside_the_training_data_are_said():
    one = session(spec=replace(SPEC, actions=ranges()))
    seen = one.observe(message())
    one.actions(np.array([[0.4, 0.5]], np.float32), seen)
    assert one.notices.take() == []
    one.actions(np.array([[0.4, 0.5], [0.4, 9]], np.float32), seen)
    assert "x[1] with 9" in one.notices.take()[0]


def test_a_picture_that_is_not_read_is_said_once():
    one = session(adapter=replace(ADAPTER, images={"front": ("observation/image",)}))
    wrist = {"observation/wrist_image": PICTURE, "images": {"cam_low": PICTURE}}
    (said,) = told(one, **wrist)[1]
    assert "'observation/wrist_image', 'images/cam_low' is not read" in said
    assert "this policy sees 'observation/image' (camera 'front')" in said
    assert not told(one, **wrist)[1]
    history = {"observation/image_history": np.stack([PICTURE] * 2)}
    assert not told(session(spec=SPEC), **history)[1]  # that and an equal picture


def test_states_of_another_rate_than_the_pictures_come_with_the_message():
    """Those of earlier messages would be four times as far apart as in training."""
    spec = SessionSpec(observed_frames=2, proprio_horizon=3, fps=20.0, proprio_fps=80.0)
    with pytest.raises(RequestError, match=r"3 states, 80 per second, .* 20 per second"):
        session(spec=spec).observe(message())
    one, states = session(spec=spec), np.arange(6, dtype=np.float32).reshape(3, 2)
    sent = {"state": states[-1], "observation/state_history": states}
    for _ in range(2):
        np.testing.assert_array_equal(one.observe(message(**sent)).observation.proprio, states)
    one = session(spec=replace(spec, proprio_fps=20.0))
    seen = [one.observe(message(state=(n, n))).observation.proprio[:, 0] for n in range(4)]
    np.testing.assert_array_equal(seen, [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]])


@pytest.mark.parametrize(
    "more, words",
    [
        ({"observation/image_history": np.full((2, 4, 6, 3), 7, np.uint8)}, "last picture"),
        ({"observation/state_history": np.ones((1, 2))}, "last state"),
        ({"prompt": "\u200b \n\x00"}, "no visible character"),
    ],
)
def test_two_sources_of_one_fact_and_empty_prompts_are_refused(more, words):
    with pytest.raises(RequestError, match=words):
        session().observe(message(**more))
    for prompt in ("🤖", "шкаф", "抽屉", "?"):
        session().observe(message(prompt=prompt))


# Several cameras.

TILED = View("video", (("a.front", "wrist"),), 64, 128)
TWO = make_adapter("plain", Robot((), (), 2, 2, views=(TILED,)))


def two(front=PICTURE, wrist=PICTURE, **more):
    """A message of two cameras; None leaves one out."""
    sent = {"observation/images/front": front, "observation/images/wrist": wrist}
    sent |= {"observation/state": np.array([0.1, 0.2]), "prompt": "open", **more}
    return {key: value for key, value in sent.items() if value is not None}


def test_each_camera_has_its_own_size_and_history():
    one, large = session(adapter=TWO), np.zeros((8, 8, 3), np.uint8)
    for number in range(3):
        frames = one.observe(two(PICTURE + number, large + number)).observation.frames
    assert {name: (f.shape, f[:, 0, 0, 0].tolist()) for name, f in frames.items()} == {
        "a.front": ((2, 4, 6, 3), [1, 2]),
        "wrist": ((2, 8, 8, 3), [1, 2]),
    }
    # A camera of another size begins an episode, as one does.
    frames = one.observe(two(PICTURE + 3, PICTURE + 3)).observation.frames
    assert [f[:, 0, 0, 0].tolist() for f in frames.values()] == [[3, 3], [3, 3]]


PAIR = np.stack([PICTURE, PICTURE + 1])
WRIST_HISTORY = {"observation/images/wrist_history": PAIR}
HISTORIES = {"observation/images/front_history": PAIR, **WRIST_HISTORY}


def test_the_client_may_keep_the_histories_of_all_cameras():
    for beside in (dict(front=None, wrist=None), dict(front=PICTURE + 1, wrist=PICTURE + 1)):
        frames = session(adapter=TWO).observe(two(**beside, **HISTORIES)).observation.frames
        np.testing.assert_array_equal([*frames.values()], [PAIR, PAIR])


@pytest.mark.parametrize(
    "sent, words",
    [
        (dict(wrist=None), r"no 'observation/images/wrist', where .*'wrist' are .*'observation/im"),
        (
            dict(front=None),
            r"no 'observation/images/front', where .* camera 'a.front' are expected",
        ),
        (WRIST_HISTORY, r"no 'observation/images/front_history', .* the history of every camera"),
        (
            dict(front=None, wrist=None, **{"observation/image": PICTURE}),
            r"no 'observation/images/front', .* it has .*'observation/image'",
        ),
        (HISTORIES, "'observation/images/front' is not the last picture of 'observation/images/fr"),
    ],
)
def test_a_message_without_a_camera_is_refused_by_its_name(sent, words):
    one = session(adapter=TWO)
    one.observe(two())
    with pytest.raises(RequestError, match=words):
        one.observe(two(**sent))
    assert name_of(one, two()) == ("session 0", 1)


def name_of(session, sent):
    return session.observe(sent).observation.noise_key


def test_what_is_said_of_one_of_several_cameras_begins_with_its_name():
    cameras, totals = trained_pictures((TILED,), {}), {}
    assert cameras["wrist"] == Trained((64, 64), None)  # a tile's aspect says nothing
    one = session(spec=replace(SPEC, cameras=cameras, proprio=ranges()), adapter=TWO)
    one.notices = Notices(totals, "client")
    black, extra = np.zeros((60, 80, 3), np.uint8), {"observation/image": PICTURE}
    sent = two(black, black, **{"observation/state": np.array([0.2, 0.5])}, **extra)
    one.observe(sent)
    said = one.notices.take()
    assert len(said) == 3 and sum("is black" in sentence for sentence in said) == 2
    assert said[0].startswith("Camera 'a.front': The picture") and said[1].startswith("Camera 'wri")
    assert "'observation/image' is not read: this policy sees 'observation/images/fr" in said[2]
    assert "(camera 'a.front'), 'observation/images/wrist' (camera 'wrist')." in said[2]
    for number in (1, 2, 3):  # the wrist camera has stopped, and the front one is padded
        moved = {"observation/state": np.array([0.2, 0.5 + number / 10])}
        boxed = with_bars(scene(480, 640, seed=number), 80)
        frames = one.observe(two(boxed, scene(60, 80), **moved)).observation.frames
        assert frames["a.front"].shape == (2, 80, 80, 3)
    said = one.notices.take()
    assert len(said) == 2 and said[0].startswith("Camera 'a.front': The first 10 and the last 10")
    assert said[1].startswith("Camera 'wrist': ")
    assert "--camera_size=a.front=HEIGHTxWIDTH" in said[0] and "has not changed" in said[1]
    assert totals["picture_black: wrist"]["queries"] == 1


def test_bars_are_cut_off_where_the_size_of_the_camera_in_training_is_known():
    views = TILED, View("wrist", (("wrist",),), 48, 64)
    cameras = trained_pictures(views, {"a.front": (720, 1280)})
    assert cameras["wrist"] == Trained((64, 64), (48, 64))  # of the view that it fills
    one = session(spec=replace(SPEC, cameras=cameras), adapter=TWO)
    sent = two(with_bars(scene(720, 1280)), with_bars(scene(480, 640)))
    frames = one.observe(sent).observation.frames
    assert frames["a.front"].shape == (2, 126, 224, 3)
    assert frames["wrist"].shape == (2, 168, 224, 3)
    said = one.notices.take()
    assert ["cut off" in sentence for sentence in said] == [True, True]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", {}),
        ("480x640", {"a.front": (480, 640), "wrist": (480, 640)}),
        ("wrist=240x320", {"wrist": (240, 320)}),
        ("wrist=240x320,front=480x640", {"a.front": (480, 640), "wrist": (240, 320)}),
        ("a.front=480x640", {"a.front": (480, 640)}),
        ("front=480x640,a.front=1x1", "got 'a.front' in .*; it has 'a.front', 'wrist'"),
        ("480x640,wrist=240x320", "must be HEIGHTxWIDTH"),
        ("=480x640", "must be HEIGHTxWIDTH"),
        ("front=0x640", "must be HEIGHTxWIDTH"),
        ("front=480x640,", "must be HEIGHTxWIDTH"),
    ],
)
def test_the_sizes_of_cameras_in_a_flag(text, expected):
    cameras = ("a.front", "wrist")
    if isinstance(expected, dict):
        assert camera_sizes(text, cameras) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            camera_sizes(text, cameras)


def test_the_sizes_of_cameras_whose_names_do_not_tell():
    assert camera_sizes("480x640", ()) == {"": (480, 640)}
    with pytest.raises(ValueError, match=r"got 'top' in 'top=1x2'; it has 'a.top', 'b.top'"):
        camera_sizes("top=1x2", ("a.top", "b.top"))
    with pytest.raises(ValueError, match="it has one without a name"):
        camera_sizes("front=1x2", ())
