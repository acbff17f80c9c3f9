"""An example of a robot that queries a policy server. Meta-World stands in for the robot.

    python -m launch.serve --checkpoint=runs/quickstart/action
    python -m launch.robot_loop --server=ws://localhost:8000 --task=drawer-close-v3

The robot keeps moving while the server computes the next chunk; with --nooverlap it waits for every
answer. This program does not need JAX: a robot needs only `mvjax.serving.client`.
"""

import time

import numpy as np
from absl import flags

from data_pipelines.cameras import VIDEO, View
from data_pipelines.embodiments.metaworld_sawyer import CAMERAS
from launch.entry import run
from mvjax.evaluation.suites.metaworld import MetaWorld
from mvjax.policy.observation import History, Observation, ObservationSpec
from mvjax.policy.robot import Robot, match_cameras
from mvjax.serving.client import Client, Overlap
from mvjax.serving.session import IMAGE_HISTORY, STATE_HISTORY

SERVER = flags.DEFINE_string("server", "ws://localhost:8000", "Address of the policy server.")
PATIENCE = flags.DEFINE_float("patience", 60.0, "Seconds to wait for the server to start.", 0.0)
TASK = flags.DEFINE_string("task", "drawer-close-v3", "A Meta-World task.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the objects' placement.", 0)
STEPS = flags.DEFINE_integer("steps", 200, "Maximum number of control steps.", 1)
EXECUTE = flags.DEFINE_integer("execute", 8, "Control steps between two queries.", 1)
SPEED = flags.DEFINE_float("speed", 0.25, "Speed of the robot's clock; 1: real time.", 0.001)
OVERLAP = flags.DEFINE_bool("overlap", True, "Move while the next chunk is computed.")


def main() -> None:
    """Plays one episode, and prints its outcome and latencies."""
    robot = MetaWorld(TASK.value)
    with Client(SERVER.value, patience=PATIENCE.value) as policy:
        # A robot that waits for every answer has nothing that a chunk could continue.
        continues = OVERLAP.value and policy.metadata.get("chunking", "none") != "none"
        overlap = Overlap(policy.infer, period(robot) if continues else 0.0)
        try:
            done, steps, seconds = drive(robot, policy.metadata, overlap)
        finally:
            overlap.close()
            robot.close()
    latency = np.percentile(overlap.latencies, [50, 95]) * 1000
    steps_late = np.ceil(np.array(overlap.latencies) / period(robot))
    print(
        f"{'Success' if done else 'No success'} after {steps} steps in {seconds:.2f} s; "
        f"{len(overlap.latencies)} queries, p50 {latency[0]:.0f} ms, p95 {latency[1]:.0f} ms, a "
        f"delay of up to {steps_late.max():.0f} control steps; the robot waited "
        f"{overlap.waited:.2f} s"
    )
    if overlap.delays:
        print(f"Chunks continued the one before, held for {np.mean(overlap.delays):.1f} steps.")


def period(robot: MetaWorld) -> float:
    """Seconds of a control step."""
    return 1 / (robot.control_hz * SPEED.value)


def check_policy(robot: MetaWorld, metadata: dict) -> None:
    """Raises ValueError unless the server's policy moves this robot, at its rate."""
    client, embodiment = metadata["client"], metadata.get("embodiment", "")
    if client != "plain" or (embodiment and "metaworld" not in embodiment):
        raise ValueError(
            "This loop drives Meta-World's Sawyer with a policy for --client=plain, but the server "
            f"answers --client={client} with a policy of the robot {embodiment!r}."
        )
    if metadata["action_fps"] != robot.control_hz:
        raise ValueError(
            f"The policy's actions are {metadata['action_fps']:g} per second, but the robot takes "
            f"{robot.control_hz}."
        )
    if EXECUTE.value > metadata["action_horizon"]:
        raise ValueError(
            f"--execute={EXECUTE.value} is more than the {metadata['action_horizon']} actions of a "
            "chunk."
        )


def match(metadata: dict) -> dict[str, str]:
    """The policy's cameras -> Meta-World's; ValueError if it has not all of them."""
    cameras = tuple(metadata.get("cameras", ()))  # a server of an earlier version has one
    views = (View(VIDEO, (cameras,) if cameras else (), metadata["height"], metadata["width"]),)
    return match_cameras(Robot((), (), 0, 0, views=views), CAMERAS, "Meta-World")


def message_of(seen: Observation, metadata: dict) -> dict:
    """The query of an observation, with the pictures of every camera under its key."""
    keys = {name: camera["history"] for name, camera in metadata.get("cameras", {}).items()}
    pictures = {keys.get(name, IMAGE_HISTORY): frames for name, frames in seen.frames.items()}
    return {**pictures, STATE_HISTORY: seen.proprio, "prompt": seen.instruction}


def drive(robot: MetaWorld, metadata: dict, overlap: Overlap) -> tuple[bool, int, float]:
    """Plays one episode; returns its success, control steps and seconds."""
    check_policy(robot, metadata)
    cameras = match(metadata)
    spec = ObservationSpec(
        observed_frames=metadata["observed_frames"],
        fps=metadata["fps"],
        proprio_horizon=metadata["proprio_horizon"],
        proprio_fps=metadata["proprio_fps"],
        execute=EXECUTE.value,
    )
    history = History(spec, robot.control_hz)
    robot.reset(SEED.value)
    began = tick = time.monotonic()
    for step in range(STEPS.value):
        history.record(
            robot.proprio(), lambda: {name: robot.render(c) for name, c in cameras.items()}
        )
        if step % EXECUTE.value == 0 and not overlap.asking:
            overlap.ask(step, message_of(history.observation(robot.instruction), metadata))
            if not OVERLAP.value:
                overlap.wait()
        if robot.step(overlap.action(step)):
            return True, step + 1, time.monotonic() - began
        tick = max(tick + period(robot), time.monotonic())  # a late robot does not catch up
        time.sleep(max(0.0, tick - time.monotonic()))
    return False, STEPS.value, time.monotonic() - began


if __name__ == "__main__":
    run(main)
