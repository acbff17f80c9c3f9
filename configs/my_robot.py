"""A template for your own robot: from recorded demonstrations to a policy of the released size.

First on a laptop, with tiny networks, in minutes (no weights are needed; a tokenizer is fitted):

    python -m launch.encode --config=configs/my_robot.py:video,small --only=tokenizer
    python -m launch.encode --config=configs/my_robot.py:video,small
    python -m launch.train --config=configs/my_robot.py:video,small \
        --workdir=runs/my_robot_small/video
    python -m launch.train --config=configs/my_robot.py:action,small \
        --workdir=runs/my_robot_small/action

Then at the released size, on accelerators:

    python -m launch.encode --config=configs/my_robot.py:video
    python -m launch.train --config=configs/my_robot.py:video --workdir=runs/my_robot/video
    python -m launch.train --config=configs/my_robot.py:action --workdir=runs/my_robot/action

docs/robot.md goes through all steps. Change the section "Your robot" below; the rest can stay.

Weights: weights/cosmos2b, weights/wan_vae, weights/t5_11b (docs/weights.md), not for `small`. Data:
data/my_robot, a LeRobot dataset (v2.1 or v3.0); for other formats see docs/formats.md. Chips and
memory: see docs/pods.md.
"""

from ml_collections import ConfigDict

from configs import base, mimic_video, quickstart_action, quickstart_video
from mvjax.policy.observation import control_stride

# Your robot ---------------------------------------------------------------------------------------
# `python -m launch.inspect data/my_robot` prints what to write here.

PATH = "data/my_robot"  # the dataset's folder
FORMAT = "lerobot"  # the line "format"
# A name in the table "camera", or several: ("observation.images.front", "observation.images.hand").
CAMERA = "observation.images.front"
HZ = 30.0  # the control rate: "rate" of the stream "action"

# What an action is made of. Here: five joints and a gripper, absolute positions that the leader arm
# commanded. `represent="delta"` learns a joint as its difference from the present joint in `base`,
# as openpi does for joints and as the released Bridge policies do for poses: the chunk then starts
# where the arm is. A gripper stays absolute: it is open or closed, wherever it was.
# If your actions already are differences or velocities, write dict(stream="action") alone. For
# positions and rotations of the hand, take represent="relative_pose" (data_pipelines/vectors.py).
# Joints that turn past their limit (the dataset jumps from 180 to -180) need wrap=(-180, 180).
ACTION = (
    dict(stream="action", columns=(0, 1, 2, 3, 4), represent="delta", base="observation.state"),
    dict(stream="action", columns=(5,)),
)
ACTION_DIM = 6  # numbers in ACTION: "shape" of the stream, if every column is used

# What the policy knows of its own body, beside the picture.
PROPRIO = (dict(stream="observation.state", columns=(0, 1, 2, 3, 4, 5)),)
PROPRIO_DIM = 6

VIDEO_HZ = 5.0  # pictures per second that the policy sees, as published; HZ is a multiple of it
CHUNK_SECONDS = 3.0  # how far a chunk of actions reaches; 3 s as published
ANCHOR_HZ = 5.0  # windows per second of a recording; 2.5 MB each at the released size

# Starting points. The released LIBERO models took 7,020 to 8,260 steps of 32 clips (stage 1) and
# 19,998 to 51,212 of 128 (stage 2) for 10 to 500 demonstrations.
VIDEO_STEPS, VIDEO_BATCH = 7_500, 32
ACTION_STEPS, ACTION_BATCH = 30_000, 128
SMALL_STEPS = 300  # of both stages, batches of 16

# --------------------------------------------------------------------------------------------------

STAGES, SIZES = ("video", "action"), ("", "small")


def get_config(arguments: str = "video") -> ConfigDict:
    """A stage of training, at the released size or for a laptop.

    Args:
        arguments: "video" (stage 1) or "action" (stage 2), and ",small" for tiny networks that
            learn for a few minutes on a CPU: for trying the data, not for moving a robot.
    """
    stage, _, size = arguments.partition(",")
    if stage not in STAGES or size not in SIZES:
        raise ValueError(
            "configs/my_robot.py takes a stage, video or action, and ',small' for a laptop, e.g. "
            f"video,small; got {arguments!r}."
        )
    control_stride(HZ, VIDEO_HZ)  # the robot's loop takes every so many pictures
    return small(stage) if size else released(stage)


def released(stage: str) -> ConfigDict:
    """Clips of 480x640, Cosmos-Predict2 2B with LoRA, the published decoder."""
    config = mimic_video.shared("runs/my_robot", {"my_robot": dataset()}, action_window())
    config.policy_io.update(vectors())
    config.clip.fps = VIDEO_HZ
    config.validation_share = 0.1  # of the episodes; offline evaluation reads these
    config.training.sample_every = 1000
    if stage == "video":
        return mimic_video.video_stage(config, steps=VIDEO_STEPS, batch_size=VIDEO_BATCH)
    backbone = config.get_ref("run_dir") + "/video"
    return mimic_video.action_stage(
        config, steps=ACTION_STEPS, batch_size=ACTION_BATCH, backbone=backbone
    )


def small(stage: str) -> ConfigDict:
    """Clips of 48x64 and the quickstart's networks; needs no weights."""
    stages = {"video": quickstart_video, "action": quickstart_action}
    config = stages[stage].get_config()
    config.run_dir = "runs/my_robot_small"
    del config.recording, config.study, config.evaluation
    base.add_datasets(config, my_robot=dataset())
    config.policy_io = vectors()
    # 21 frames at 5 fps, 5 of them observed: the future reaches 3.2 s, as far as the actions.
    config.clip = dict(height=48, width=64, observed_frames=5, future_frames=16, fps=VIDEO_HZ)
    config.validation_share = 0.25  # a few of ten episodes
    config.optimizer.decay_steps = SMALL_STEPS
    config.training.update(
        steps=SMALL_STEPS, log_every=10, checkpoint_every=SMALL_STEPS // 3, sample_every=0
    )
    return config


def dataset() -> dict:
    """The section of the dataset. More of them (another robot, human video): docs/data.md."""
    return dict(
        format=FORMAT,
        path=PATH,
        embodiment="my_robot",  # statistics are kept for each robot by its name
        video=CAMERA,
        action=ACTION,
        proprio=PROPRIO,
        anchor_fps=ANCHOR_HZ,
        weight=1.0,
    )


def action_window() -> dict:
    """The chunk of actions: the first of them now."""
    return dict(horizon=round(CHUNK_SECONDS * HZ), fps=HZ, shift=0.0)


def vectors() -> dict:
    """The section `policy_io`: one state of now, and a chunk of actions."""
    return dict(
        action=dict(action_window(), dim=ACTION_DIM),
        proprio=dict(horizon=1, fps=HZ, dim=PROPRIO_DIM),
    )
