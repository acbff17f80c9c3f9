"""A policy of two cameras over a real socket: the same observation gets the same chunk."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from running_server import Running
from tiny_policy import CAMERAS, SIZE, VIEW_SIZE, random_observation, tiny_policy
from tiny_stages import quick_compiles

from mvjax.policy.observation import History, ObservationSpec
from mvjax.serving.client import Client, QueryRefused

ROOT = Path(__file__).parents[1]
CORNER, GRIPPER = CAMERAS["plain"]


@pytest.fixture(scope="module", params=["tiled", "observed"])
def served(request):
    """The policy, and the server of an equal one."""
    running = Running("tiny_policy", f"cameras={request.param}", "sizes=1", wait=False)
    with quick_compiles():
        policy, _ = tiny_policy(cameras=request.param)
        policy.warm_up()
    running.wait()
    yield policy, running
    assert "Traceback" not in running.stop()


def message(asked, pictures):
    return {
        **pictures,
        "observation/state": asked.proprio[-1],
        "prompt": asked.instruction,
    }


def test_metadata_says_what_is_wanted_of_each_camera(served):
    second = ("video", SIZE) if len(served[0].views) == 1 else ("hand", VIEW_SIZE)
    with Client(served[1].uri) as client:
        assert client.metadata["cameras"] == {
            name: {
                "key": f"observation/images/{word}",
                "history": f"observation/images/{word}_history",
                "view": view,
                "height": size[0],
                "width": size[1],
            }
            for name, word, view, size in (
                (CORNER, "corner", "video", SIZE),
                (GRIPPER, "gripper", *second),
            )
        }
        assert "camera" not in client.metadata  # that of a policy of one


def test_the_chunk_is_the_policys_own(served):
    """With histories that the client keeps, and with those that the server keeps."""
    policy, running = served
    asked = random_observation(1, cameras=2)
    (expected,) = policy.act([asked])
    swapped = replace(asked, frames=dict(zip(asked.frames, reversed(asked.frames.values()))))
    assert np.abs(policy.act([swapped])[0] - expected).max() > 1e-3  # the cameras are told apart
    with Client(running.uri) as client:
        known = client.metadata["cameras"]
        kept = {known[name]["history"]: frames for name, frames in asked.frames.items()}
        answer = client.infer(message(asked, kept))
        np.testing.assert_allclose(answer["actions"], expected, atol=1e-5)
        for now in range(5):
            single = {known[name]["key"]: frames[now] for name, frames in asked.frames.items()}
            answer = client.infer(message(asked, single))
        np.testing.assert_allclose(answer["actions"], expected, atol=1e-5)


def test_the_message_of_the_page_is_that_of_a_robot_with_two_cameras(served):
    """docs/robot.md: `History` keeps the pictures by name, metadata says where they go."""
    policy, running = served
    asked = random_observation(3, cameras=2)
    history = History(ObservationSpec(5, 20, 1, 20, execute=1), control_hz=20)
    for now in range(5):
        pictures = {name: frames[now] for name, frames in asked.frames.items()}
        history.record(asked.proprio[-1], lambda pictures=pictures: pictures)
    seen, page = history.observation(asked.instruction), (ROOT / "docs/robot.md").read_text()
    (code,) = re.findall(r'```python title="several cameras[^"]*"\n(.*?)```', page, re.S)
    exec(code, names := {})
    with Client(running.uri) as client:
        sent = names["message_of"](client.metadata, seen, asked.instruction)
        answer = client.infer(sent)["actions"]
    np.testing.assert_allclose(answer, policy.act([asked])[0], atol=1e-5)


def test_one_picture_is_refused_by_the_name_of_the_missing_camera(served):
    policy, running = served
    asked = random_observation(2, cameras=2)
    corner = asked.frames[CORNER]
    with pytest.raises(ValueError, match=f"no pictures of '{GRIPPER}'"):
        policy.act([replace(asked, frames={CORNER: corner})])
    with pytest.raises(ValueError, match=f"sees the cameras '{CORNER}', '{GRIPPER}', but got the"):
        policy.act([replace(asked, frames=corner)])
    with Client(running.uri) as client:
        for sent, missing in (
            ({"observation/images/corner": corner[0]}, GRIPPER),
            ({"observation/images/corner_history": corner}, GRIPPER),
            ({"observation/image": corner[0]}, CORNER),
            ({"observation/image_history": corner}, CORNER),
        ):
            with pytest.raises(QueryRefused, match=f"the camera '{missing}' are expected; it has"):
                client.infer(message(asked, sent))
