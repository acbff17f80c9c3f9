"""Stage 2 of mimic-video on a LIBERO suite: the action decoder on the frozen backbone.

    python -m launch.train --config=configs/libero_action.py:goal,tenth \
        --workdir=runs/libero_goal/action_tenth

After the colon follow the suite (goal, object, spatial) and the share of its demonstrations (full,
half, tenth, one: 50, 25, 5, 1 per task). A third word adds the wrist camera, as in
configs/libero_video.py: observed or tiled.

    python -m launch.train --config=configs/libero_action.py:goal,full,observed \
        --workdir=runs/libero_goal_observed/action

The backbone is what configs/libero_video.py trains for this suite and these cameras on all
demonstrations, as published.

Data and weights: as for configs/libero_video.py, with the same records. Chips and memory:
docs/pods.md.
"""

from ml_collections import ConfigDict

from configs import mimic_video

# Of the released decoders.
STEPS = {
    ("goal", "half"): 50_022,
    ("goal", "tenth"): 40_014,
    ("goal", "one"): 19_998,
    ("object", "full"): 50_274,
    ("object", "half"): 30_090,
    ("object", "tenth"): 39_984,
    ("object", "one"): 29_997,
    ("spatial", "full"): 51_212,
    ("spatial", "tenth"): 30_012,
    ("spatial", "one"): 19_998,
}
UNRELEASED_STEPS = 50_000  # goal,full and spatial,half: the paper's number


def get_config(arguments: str = "goal") -> ConfigDict:
    """Steps of 128 clips.

    Args:
        arguments: suite, then share of the demonstrations and cameras if others than "full" and
            "single": e.g. "goal", "goal,tenth" or "goal,full,observed".
    """
    suite, share, cameras = mimic_video.libero_words(arguments)
    config = mimic_video.libero(suite, share, cameras)
    return mimic_video.action_stage(
        config,
        steps=STEPS.get((suite, share), UNRELEASED_STEPS),
        batch_size=128,
        backbone=config.get_ref("run_dir") + "/video",
    )
