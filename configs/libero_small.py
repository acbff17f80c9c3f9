"""A small policy on LIBERO, from demonstrations to evaluation: what both stages share.

    bash launch/libero.sh
    python -m launch.record --suite=libero --kind=robot \
        --out=runs/libero_small/data/robot --tasks=object-2,object-4 --episodes=16
    python -m launch.encode --config=configs/libero_small.py --only=tokenizer
    python -m launch.encode --config=configs/libero_small.py
    python -m launch.train --config=configs/libero_small_video.py \
        --workdir=runs/libero_small/video
    python -m launch.train --config=configs/libero_small_action.py \
        --workdir=runs/libero_small/action
    python -m launch.evaluate --config=configs/libero_small_action.py \
        --checkpoint=runs/libero_small/action --out=runs/libero_small/evaluation

To evaluate the scripted expert by the release's protocol on all ten tasks of a suite:

    python -m launch.evaluate --config=configs/libero_small.py:spatial --modes=expert \
        --out=runs/expert_spatial

Networks and training are those of the quickstart, with LIBERO's rates and the ten action numbers of
the released policies. It takes about half an hour on two CPU cores, most of it for simulation, and
under 6 GB.
"""

from ml_collections import ConfigDict

from configs import mimic_video, quickstart
from data_pipelines.embodiments import libero_panda

TASKS = ("object-2", "object-4")


def get_config(argument: str = "full") -> ConfigDict:
    """The shared sections.

    Args:
        argument: "full", "smoke" (a few steps, as the quickstart's), or a suite (spatial, object,
            goal) whose ten tasks are to be evaluated.
    """
    size = quickstart_size(argument)
    config = quickstart.get_config(size)
    config.run_dir = "runs/libero_small"
    del config.recording, config.study, config.datasets.video
    suite = "object" if argument in ("", size) else argument
    protocol = mimic_video.libero_protocol(suite, workers=2)
    if argument in ("", size):
        protocol["tasks"] = TASKS
    if size == "smoke":
        protocol.update(episodes_per_task=1, max_steps=24)
    config.evaluation = protocol
    # 13 frames at 5 fps, 5 of them observed: 2.4 s. Actions reach as far ahead as the video.
    config.clip = dict(height=48, width=64, observed_frames=5, future_frames=8, fps=5.0)
    config.policy_io = dict(
        action=dict(horizon=32, fps=20.0, shift=0.0, dim=10),
        proprio=dict(horizon=1, fps=20.0, dim=10),
    )
    config.datasets.robot.update(
        embodiment="libero_panda",
        video="observation.images.agentview",
        action=libero_panda.LEROBOT_ACTION,
        proprio=libero_panda.LEROBOT_PROPRIO,
        anchor_fps=20.0,
        weight=1.0,
    )
    return config


def quickstart_size(argument: str) -> str:
    """The quickstart's size for an argument of these configurations: a suite's is "full"."""
    return "smoke" if argument == "smoke" else "full"
