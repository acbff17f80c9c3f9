"""Real recordings; skipped without `metaworld` or a software OpenGL."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import forked
import numpy as np
import pytest

from data_pipelines.lock import run_lock
from data_pipelines.sources.formats import open_dataset
from mvjax.evaluation import record
from mvjax.evaluation.record import Recording, assemble, record_dataset, record_unit

TASK = "coffee-button-v3"
ROBOT = Recording("robot", (TASK,), episodes=4, height=32, width=32, unit_episodes=1)
ROOT = Path(__file__).parent.parent
SCRIPT = """
import time
from pathlib import Path

from mvjax.evaluation import record
from mvjax.evaluation.record import record_unit


def all_but_the_last(unit, *rest):
    if unit.first == 3:  # however late the recording is killed, it is not finished
        time.sleep(600)
    return record_unit(unit, *rest)


if __name__ == "__main__":
    recording = record.Recording("robot", ("{task}",), 4, height=32, width=32, unit_episodes=1)
    record.record_unit = all_but_the_last
    record.record_dataset(Path("{out}"), recording, workers=1)
"""


@pytest.fixture(scope="module", autouse=True)
def drawing():
    try:
        from mvjax.evaluation.suites.metaworld import MetaWorld

        simulator = MetaWorld(TASK, 32, 32)
        simulator.reset(0)
        simulator.render("corner")
        simulator.close()
    except (ModuleNotFoundError, RuntimeError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    out = tmp_path_factory.mktemp("record") / "robot"
    return out, record_dataset(out, ROBOT, workers=2, progress=False)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start(script: Path, out: Path) -> subprocess.Popen:
    script.write_text(SCRIPT.format(task=TASK, out=out))
    return subprocess.Popen(
        [sys.executable, str(script)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(out: Path, pattern: str) -> list[str]:
    for _ in range(3000):
        found = [path.name for path in out.glob(pattern)]
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"no {pattern} in {out} within a minute")


def test_the_dataset_holds_what_was_asked_for(robot):
    out, result = robot
    episodes = list(open_dataset("lerobot", out, "robot", "metaworld_sawyer"))
    assert len(episodes) == result["episodes"] == 4
    assert not (out / "unfinished").exists()
    for episode in episodes:
        assert episode.instructions == ("press the button of the coffee machine",)
        streams = episode.streams
        steps = len(streams["action"].values)
        assert streams["action"].values.shape == (steps, 4)
        assert streams["observation.state"].values.shape == (steps, 4)
        assert streams[episode.cameras[0]].values.read([steps - 1]).shape == (1, 32, 32, 3)
        assert np.diff(streams["action"].timestamps).tolist() == [12_500_000] * (steps - 1)
    assert sum(len(e.streams["action"].values) for e in episodes) == result["frames"]
    assert len({e.streams["observation.state"].values[3].tobytes() for e in episodes}) == 4


def test_labels_are_clean_while_noise_is_executed(robot):
    from mvjax.evaluation.suites.metaworld import MetaWorld

    first = open_dataset("lerobot", robot[0], "robot", "metaworld_sawyer")[0].streams
    simulator = MetaWorld(TASK, 32, 32)
    rng = np.random.default_rng([ROBOT.seed, zlib.crc32(TASK.encode()), 0])
    simulator.reset(int(rng.integers(2**31)))
    successes = []
    for label, state in zip(first["action"].values, first["observation.state"].values):
        np.testing.assert_array_equal(simulator.proprio(), state)
        np.testing.assert_array_equal(simulator.expert_action(), label)
        successes.append(simulator.step(label + rng.normal(0, 0.1, 4)))
    simulator.close()
    assert successes.index(True) == len(successes) - 13  # 12 steps follow the first success


def test_an_episode_is_decided_by_seed_task_and_attempt_alone(robot, tmp_path):
    """Fewer episodes, bigger units and one worker give the same first episodes."""
    other = Recording("robot", (TASK,), episodes=2, height=32, width=32, unit_episodes=2)
    record_dataset(tmp_path / "a", other, workers=1, progress=False)
    ours = open_dataset("lerobot", tmp_path / "a", "robot", "metaworld_sawyer")
    theirs = open_dataset("lerobot", robot[0], "robot", "metaworld_sawyer")
    for mine, reference in zip(ours, theirs):
        for key in ("action", "observation.state"):
            np.testing.assert_array_equal(mine.streams[key].values, reference.streams[key].values)


def test_two_cameras_are_two_features_and_the_main_one_is_as_it_is_alone(robot, tmp_path):
    """A recording that was stopped goes on with the cameras that it was begun with."""
    both = replace(ROBOT, cameras=("corner", "gripper"))
    out, seen = tmp_path / "both", tmp_path / "both/unfinished"
    record._open_folder(out, both)
    for unit in both.units()[:2]:
        record_unit(unit, both, seen)
    with pytest.raises(ValueError, match=r"cameras is \['corner', 'gripper'\] there, \['corner'\]"):
        record_dataset(out, ROBOT)
    record_dataset(out, both, progress=False)
    episodes = open_dataset("lerobot", out, "robot", "metaworld_sawyer")
    names = tuple(f"observation.images.{camera}" for camera in ("corner", "gripper"))
    assert len(episodes) == 4 and all(episode.cameras == names for episode in episodes)
    corner, gripper = (episodes[3].streams[name].values for name in names)
    assert len(corner) == len(gripper)
    last = [frames.read([len(frames) - 1])[0].astype(int) for frames in (corner, gripper)]
    assert np.abs(last[0] - last[1]).mean() > 10
    alone, here = digests(robot[0]), digests(out)
    videos = [path for path in alone if "videos" in path]
    assert videos and all(here[path] == alone[path] for path in videos)
    stats = json.loads((out / "meta/stats.json").read_text())
    assert stats[names[0]] == json.loads((robot[0] / "meta/stats.json").read_text())[names[0]]
    assert stats[names[1]] != stats[names[0]]


def test_a_killed_recording_goes_on_and_ends_with_the_same_bytes(robot, tmp_path):
    out = tmp_path / "killed"
    process = start(tmp_path / "run.py", out)
    finished = wait_for(out, f"unfinished/{TASK}-*[0-9]")
    process.kill()  # only the parent: its workers must notice
    process.communicate()
    with pytest.raises(ValueError, match="unfinished recording"):
        open_dataset("lerobot", out, "robot", "metaworld_sawyer")
    with pytest.raises(ValueError, match=r"packages \(noise is 0\.1 there, 0\.2 here\)"):
        other = Recording("robot", (TASK,), 4, noise=0.2, height=32, width=32, unit_episodes=1)
        record_dataset(out, other)
    inodes = {(out / "unfinished" / name / "frames.mp4").stat().st_ino for name in finished}
    record_dataset(out, ROBOT, workers=2, progress=False)
    assert digests(out) == digests(robot[0])
    videos = {path.stat().st_ino for path in out.rglob("*.mp4")}
    assert inodes <= videos  # finished units were kept, not recorded again


def test_an_interrupted_assembly_is_repeated(robot, tmp_path):
    staging = tmp_path / "unfinished"
    staging.mkdir()
    content = {"recording": json.loads((robot[0] / "recording.json").read_text())["recording"]}
    (staging / "recording.json").write_text(json.dumps(content))
    for unit in ROBOT.units():
        record_unit(unit, ROBOT, staging)
    assemble(tmp_path, staging, ROBOT, ROBOT.units())
    (tmp_path / "meta/info.json").unlink()  # as if stopped before the last file
    with pytest.raises(ValueError, match="unfinished recording"):
        open_dataset("lerobot", tmp_path, "robot", "metaworld_sawyer")
    record_dataset(tmp_path, ROBOT, progress=False)
    assert digests(tmp_path) == digests(robot[0])


def test_a_finished_recording_is_left_alone(robot):
    before = {path: path.stat().st_mtime_ns for path in robot[0].rglob("*")}
    result = record_dataset(robot[0], ROBOT, progress=False)
    assert {path: path.stat().st_mtime_ns for path in robot[0].rglob("*")} == before
    assert (result["episodes"], result["frames"]) == (4, robot[1]["frames"])


def test_ctrl_c_ends_everything_at_once_and_quietly(tmp_path):
    out = tmp_path / "interrupted"
    command = [sys.executable, "-m", "launch.record", "--out", str(out), "--kind", "robot"]
    process = subprocess.Popen(
        [*command, "--tasks", TASK, "--episodes", "40", "--workers", "2"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(out, "unfinished/*.partial")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of its processes
    began = time.monotonic()
    error = process.communicate(timeout=10)[1]
    assert time.monotonic() - began < 3
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "run the same command again" in error


def test_videos_come_with_captions_at_a_quarter_of_the_rate(tmp_path):
    recording = Recording("video", (TASK,), episodes=2, height=32, width=32)
    result = record_dataset(tmp_path / "video", recording, workers=1, progress=False)
    episodes = open_dataset("video_folder", tmp_path / "video", "clips", "metaworld_sawyer")
    assert [episode.id for episode in episodes] == [f"{TASK}-00000", f"{TASK}-00001"]
    assert sum(len(episode.streams["video"].values) for episode in episodes) == result["frames"]
    assert np.diff(episodes[0].streams["video"].timestamps)[0] == 50_000_000
    assert episodes[0].instructions == ("press the button of the coffee machine",)
    assert json.loads((tmp_path / "video/recording.json").read_text())["fps"] == 20


def test_wrong_requests_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="kind must be 'robot' or 'video', got 'text'"):
        Recording("text", (TASK,), 1)
    with pytest.raises(ValueError, match="unknown Meta-World task 'fly'"):
        Recording("robot", ("fly",), 1)
    for tasks in ((), (TASK, TASK)):
        with pytest.raises(ValueError, match="each named once"):
            Recording("robot", tasks, 1)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds other files"):
        record_dataset(tmp_path, ROBOT)
    with pytest.raises(OSError):
        record_dataset(tmp_path / "thesis.tex/data", ROBOT)


def test_a_recording_has_one_owner_and_one_simulator(tmp_path, monkeypatch):
    arguments = ("--kind=robot", f"--tasks={TASK}", "--episodes=4", "--size=32x32")
    with run_lock(tmp_path):
        second = forked.run("launch.record", f"--out={tmp_path}", *arguments)
    assert second.code != 0 and "is writing to" in second.err
    assert not any(tmp_path.iterdir())
    record._open_folder(tmp_path, ROBOT)  # begun, and stopped
    newer = {"metaworld": "99"}
    monkeypatch.setattr(record, "package_versions", lambda suite: newer)
    with pytest.raises(ValueError, match=r"other settings or packages .*metaworld is .* '99' here"):
        record_dataset(tmp_path, ROBOT)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kind=robot"], "--kind, --tasks and --episodes must be given"),
        (["--kind=robot", f"--tasks={TASK}", "--episodes=1", "--size=31x32"], "--size .*31x32"),
        (["--kind=hdf5", f"--tasks={TASK}", "--episodes=1"], "kind must be .*'hdf5'"),
        (
            ["--kind=robot", f"--tasks={TASK}", "--episodes=1", "--cameras=corner,wrist"],
            "'metaworld' has the cameras 'corner', 'gripper', but no 'wrist'",
        ),
        (
            ["--kind=robot", f"--tasks={TASK}", "--episodes=1", "--cameras=corner,corner"],
            "cameras must each be named once",
        ),
        (
            ["--kind=video", f"--tasks={TASK}", "--episodes=1", "--cameras=gripper"],
            "kind 'video' are of 'corner'",
        ),
        (["--suite=libero", "--regenerate=x", "--cameras=wrist"], "renders both cameras"),
        (["--suite=libero", "--regenerate=x", "--seed=1"], "--regenerate takes .* its files"),
        (["--regenerate=x"], "--suite=libero"),
    ],
)
def test_wrong_flags_are_explained(tmp_path, arguments, said):
    done = forked.run("launch.record", f"--out={tmp_path}", *arguments)
    assert done.code == 2 and re.search(said, done.err), done
    assert not any(tmp_path.iterdir())
