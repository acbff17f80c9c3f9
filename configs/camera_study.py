"""One camera against two, on tasks whose small objects the corner camera hardly shows.

    python -m launch.benchmarks.cameras --folder=runs/cameras

trains and evaluates what the arguments of this configuration choose: the stage (video, action) and
the cameras (single, tiled, observed). Networks, optimizer and steps are the quickstart's. The three
read the same demonstrations, and their decoders are trained for as many steps.
"""

from ml_collections import ConfigDict

from configs import quickstart_action, quickstart_video

# The goals do not move; the puck or block is 2 to 3 pixels wide in the corner picture.
TASKS = ("sweep-into-v3", "hand-insert-v3", "bin-picking-v3")


def get_config(arguments: str = "video,single") -> ConfigDict:
    """The quickstart's with other tasks, and without the videos that have no actions.

    Args:
        arguments: stage and cameras, e.g. "action,observed".
    """
    stage, _, cameras = arguments.partition(",")
    stages = {"video": quickstart_video, "action": quickstart_action}
    if stage not in stages:
        raise ValueError(f"The stage must be video or action, got {stage!r}.")
    config = stages[stage].get_config(f"full,{cameras}")
    config.run_dir = f"runs/cameras/{cameras}"
    config.recording.robot.update(tasks=TASKS, episodes=40)
    config.datasets.robot.path = "runs/cameras/robot"
    with config.unlocked():
        del config.datasets.video
    config.evaluation.update(tasks=TASKS, episodes_per_task=50, max_steps=250, videos_per_task=1)
    return config
