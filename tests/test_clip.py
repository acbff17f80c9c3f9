"""Lengths that follow from others, and lengths that cannot be."""

import pytest

from data_pipelines.clip import Clip, tokens


def clip(**changes):
    return Clip(
        **{**dict(height=64, width=64, observed_frames=5, future_frames=8, fps=20.0)} | changes
    )


def test_quickstart_lengths():
    one = clip()
    assert (one.frames, one.latent_frames, one.condition_latents) == (13, 4, 2)
    assert one.latent_shape == (4, 8, 8, 16)
    assert one.tokens == 4 * 4 * 4


def test_published_lengths():
    """480x640, 61 frames at 5 fps: 16 latent frames of 60x80, 19,200 tokens (paper, release)."""
    one = clip(height=480, width=640, future_frames=56, fps=5.0)
    assert (one.frames, one.latent_frames, one.condition_latents) == (61, 16, 2)
    assert one.latent_shape == (16, 60, 80, 16)
    assert one.tokens == 19_200


def test_an_observed_view_adds_its_observed_latents():
    """A wrist of 240x320 beside the published video: 600 tokens beside 19,200."""
    sizes = dict(wrist=dict(height=240, width=320), elbow=dict(height=64, width=32))
    one = clip(height=480, width=640, future_frames=56, fps=5.0, views=sizes)
    assert one.view_shapes == {"elbow": (2, 8, 4, 16), "wrist": (2, 30, 40, 16)}
    assert [tokens(shape) for shape in one.view_shapes.values()] == [16, 600]
    assert one.tokens == 19_200 and clip().view_shapes == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(views=dict(wrist=dict(height=40, width=64))),
            "clip.views.wrist.height must be a mul",
        ),
        (dict(views=dict(wrist=dict(height=64))), r"wrist must be its height and width, got {'hei"),
        (dict(views=dict(video=dict(height=64, width=64))), "'video' is the name of the predicted"),
        (dict(height=72), "clip.height must be a multiple of 16 pixels, got 72"),
        (dict(width=0), "clip.width must be a multiple of 16 pixels, got 0"),
        (dict(observed_frames=4), r"clip.observed_frames must be 1 \+ 4k .* got 4"),
        (dict(observed_frames=0), r"clip.observed_frames must be 1 \+ 4k .* got 0"),
        (dict(observed_frames=-3), r"clip.observed_frames must be 1 \+ 4k .* got -3"),
        (dict(future_frames=7), "clip.future_frames must be a positive multiple of 4, got 7"),
        (dict(future_frames=0), "clip.future_frames must be a positive multiple of 4, got 0"),
        (dict(fps=0.0), "clip.fps must be positive, got 0"),
    ],
)
def test_impossible_lengths_are_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        clip(**changes)
    assert str(error.value).count("\n") == 0
