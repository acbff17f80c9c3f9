"""docs/robot.md with the commands of a user: from a recorded dataset to a robot that asks a server.

At the small size of configs/my_robot.py, on the dataset of my_robot_dataset.py, with few steps.
"""

import json
import re
from pathlib import Path

import my_robot_dataset
import numpy as np
import pytest
from running_server import Running

from configs import my_robot
from configs.trained import get_config as trained_config
from data_pipelines.records import RecordDataset
from data_pipelines.representations import Mode
from data_pipelines.sources.formats import open_config
from data_pipelines.vectors import dims, modes, parse
from mvjax.policy.load import load_trained
from mvjax.policy.observation import Observation
from mvjax.policy.robot import trained_robot
from mvjax.serving.adapters import make_adapter
from mvjax.serving.client import Client, QueryRefused

PAGE = Path(__file__).parents[1] / "docs/robot.md"
STEPS = 3
SENTENCE = "pick up the red block"


@pytest.fixture(scope="module")
def journey(tmp_path_factory, command):
    """The folder of a run in which every command of the page has been given, with what it said."""
    folder = tmp_path_factory.mktemp("journey")
    data, run = folder / "data", folder / "run"
    my_robot_dataset.write(data, episodes=6, seconds=3.0, scale=1)
    here = [f"--config.run_dir={run}", f"--config.datasets.my_robot.path={data}"]
    few = [f"--config.training.steps={STEPS}", "--config.training.batch_size=4"]
    few += ["--config.video_model.num_blocks=1", "--config.context_layer=1"]
    few += ["--config.decoder.num_blocks=1", "--config.sampler.video_steps=2"]
    video, action = (f"--config=configs/my_robot.py:{stage},small" for stage in ("video", "action"))
    said = {}
    for name, words in {
        "inspect": ["launch.inspect", data],
        "tokenizer": ["launch.encode", video, *here, "--only=tokenizer"],
        "encode": ["launch.encode", video, *here],
        "video": ["launch.train", video, *here, *few, f"--workdir={run}/video"],
        "action": ["launch.train", action, *here, *few, f"--workdir={run}/action"],
        "offline": [
            *("launch.evaluate", "--suite=offline", f"--checkpoint={run}/action"),
            *(f"--out={run}/offline", "--moments=2", "--stop_steps=0"),
        ],
    }.items():
        said[name] = command(*words)
        assert said[name].code == 0, said[name].err
    return folder, said


@pytest.fixture(scope="module")
def server(journey):
    flags = ("--client=dataset", "--host=127.0.0.1", "--port=0", "--batch_sizes=1")
    checkpoint = f"--checkpoint={journey[0]}/run/action"
    running = Running("launch.serve", checkpoint, *flags, says="Serving")
    yield running
    running.stop()


def test_every_step_says_what_it_found(journey):
    folder, said = journey
    for words in ("format      lerobot", "observation.images.front", "30 ", "no problems found"):
        assert words in said["inspect"].out
    assert "my_robot: 90 windows of 6 episodes, 2 instructions." in said["encode"].out
    assert len(RecordDataset(folder / "run/records/my_robot")) == 90
    offline = json.loads((folder / "run/offline/offline.json").read_text())
    assert len(offline["generated_video"]["mae_by_dimension"][0]) == 6


def test_a_client_gets_the_policys_actions_in_the_datasets_units(journey, server, quickly):
    """Joints come back absolute, in degrees; the gripper as it was recorded."""
    checkpoint = journey[0] / "run/action"
    config = trained_config(str(checkpoint))
    policy = load_trained(checkpoint)
    episode = open_config(config.datasets.my_robot)[0]
    frames = episode.streams["observation.images.front"].values.read([0, 6, 12, 18, 24])
    state = episode.streams["observation.state"].values[24]
    asked = Observation(frames, state[None], SENTENCE, noise_key=("session 0", 0))
    (learned,) = policy.act([asked])
    with Client(server.uri) as client:
        message = {"observation/image_history": frames, "observation/state": state}
        actions = client.infer({**message, "prompt": SENTENCE})["actions"]
        with pytest.raises(QueryRefused, match=r"has shape \[7\]; expected \[6\]"):
            client.infer({**message, "observation/state": np.zeros(7), "prompt": SENTENCE})
    assert actions.shape == (90, 6)
    expected = learned + np.append(state[:5], 0)
    np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-3)
    recorded = episode.streams["action"].values
    assert np.abs(actions - recorded.mean(0)).max() < 3 * np.ptp(recorded)


class ToyRobot:
    """Goes where it is told, and shows itself."""

    def __init__(self):
        self.state_now, self.moves = my_robot_dataset.HOME.astype(np.float32), []

    def camera(self):
        return my_robot_dataset.draw(self.state_now, dict(red=-30, blue=30), scale=1)

    def state(self):
        return self.state_now

    def move(self, action):
        self.moves.append(action - self.state_now)
        self.state_now = np.asarray(action, np.float32)


def code_of(title):
    """The code of the page under this title."""
    (found,) = re.findall(rf'```python title="{title}[^"]*"\n(.*?)```', PAGE.read_text(), re.S)
    return found


def test_the_loop_of_the_page_moves_a_robot(server):
    names, robot = {}, ToyRobot()
    exec(code_of("robot.py"), names)
    names["drive"](robot, server.uri, SENTENCE, seconds=1.0)
    assert len(robot.moves) == 30
    assert (np.abs(robot.moves) <= names["MAX_MOVE"] + 1e-4).all() and np.any(robot.moves)


def test_the_check_of_the_page_asks_about_recorded_moments(journey, server, capsys):
    code = code_of("check_server.py").replace("data/my_robot", str(journey[0] / "data"))
    exec(code.replace("ws://localhost:8000", server.uri), {})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 6 and all(np.isfinite(float(row[-1])) for row in rows)


def test_the_template_normalises_joints_and_gripper():
    for description in (my_robot.ACTION, my_robot.PROPRIO):
        parts = parse(description)
        assert sum(dims(parts, 6)) == 6 and modes(parts, 6) == (Mode.VARIANCE,) * 6


def test_a_control_rate_that_no_picture_meets_is_refused(monkeypatch):
    monkeypatch.setattr(my_robot, "HZ", 33.0)
    with pytest.raises(ValueError, match=r"33 Hz, which is not a whole multiple of .* = 5"):
        my_robot.get_config("video")


def test_both_sizes_learn_the_same_vectors():
    for stage in ("video", "action"):
        small, released = (my_robot.get_config(f"{stage}{size}") for size in (",small", ""))
        assert small.policy_io == released.policy_io
        one, other = (c.datasets.my_robot for c in (small, released))
        assert {**one, "records": ""} == {**other, "records": ""}
    assert small.backbone.checkpoint == "runs/my_robot_small/video"


def test_a_policy_may_see_several_cameras(monkeypatch):
    cameras = ("observation.images.front", "observation.images.wrist")
    monkeypatch.setattr(my_robot, "CAMERA", cameras)
    for arguments in ("video", "action", "video,small", "action,small"):
        robot = trained_robot(my_robot.get_config(arguments))
        assert robot.cameras == cameras
        keys = ["/".join(keys) for keys in make_adapter("dataset", robot).images.values()]
        assert keys == ["observation/images/front", "observation/images/wrist"]


def test_a_run_without_a_simulator_is_told_how_to_be_evaluated(journey, complains):
    run = journey[0] / "run"
    words = "names no simulator (config.evaluation)"
    complains(words, "launch.evaluate", f"--checkpoint={run}/action", f"--out={run}/x")


@pytest.mark.parametrize(
    ("module", "changes", "words"),
    [
        (
            "launch.encode",
            ["--config.datasets.my_robot.video=observation.images.frnt"],
            "video asks for the cameras ['observation.images.frnt'], but there are only "
            "['observation.images.front']",
        ),
        (
            "launch.encode",
            ["--config.policy_io.action.dim=7"],
            "policy_io says 7 dimensions, but the parts have action 5, action 1: change their "
            "`columns`, or `dim` of policy_io",
        ),
        ("launch.encode", ["--config.datasets.my_robot.path=data/my_robt"], "data/my_robt"),
        (
            "launch.train",
            ["--config.datasets.my_robot.action=observation.state"],
            "were encoded with other settings: dataset.action is",
        ),
        (
            "launch.train",
            ["--config.backbone.checkpoint=weights/cosmos2b"],
            "weights/cosmos2b is not a training directory: there is no such folder. PyTorch "
            "weights must be converted first",
        ),
    ],
)
def test_mistakes_in_the_template(journey, command, tmp_path, module, changes, words):
    """What was given, what is expected and what to do, in the last line."""
    here = [f"--config.run_dir={journey[0]}/run"]
    here += [f"--config.datasets.my_robot.path={journey[0]}/data"]
    if module == "launch.encode":  # into another folder: the journey's is complete
        here += [f"--config.datasets.my_robot.records={tmp_path}/records"]
    else:
        here += [f"--workdir={tmp_path}/action"]
    said = command(module, "--config=configs/my_robot.py:action,small", *here, *changes)
    assert said.code == 2 and words in said.err.splitlines()[-1], said.err


def test_another_rate_than_the_recordings_is_said_with_both(journey, command, tmp_path):
    said = command(
        *("launch.encode", "--config=configs/my_robot.py:video,small"),
        f"--config.run_dir={journey[0]}/run",
        f"--config.datasets.my_robot.path={journey[0]}/data",
        f"--config.datasets.my_robot.records={tmp_path}/records",
        "--config.policy_io.action.fps=10.0",
    )
    assert "action has more values per second (30) than policy_io.action.fps (10)" in said.out


def test_videos_of_a_hand_are_a_folder_of_videos(tmp_path, command):
    my_robot_dataset.write_videos(tmp_path / "videos", videos=2, seconds=1.0)
    said = command("launch.inspect", tmp_path / "videos")
    assert said.code == 0 and "format      video_folder" in said.out, said.err
    assert "no problems found" in said.out
