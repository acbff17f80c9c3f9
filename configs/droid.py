"""What the two stages on DROID share: the data and the sizes of the two views.

The exterior camera 1 is predicted, and the wrist camera observed. Actions are the commanded joint
positions relative to the present joints and the commanded gripper, at 15 Hz, as openpi's
joint-position policies on DROID have them (differences of joints mean the same in every pose, and
the client still gets positions): `droid_franka.JOINT_ACTION`.

Data: the RLDS release 1.0.1 in data/droid/1.0.1 (TFRecord; 1.7 TB). It has the instructions of all
annotated episodes; 1.0.0 has fewer, for which droid.annotations takes their list. Of it are used:
the episodes that succeeded and have an instruction, and of these the steps in which the robot
moves, by openpi's list in data/droid_lists (gs://openpi-assets/droid). Other lists, and where they
come from: docs/formats.md. With one window a second this is about a million windows, which make
2.7 TB of records (an estimate). To predict the other exterior camera, too, add a dataset:

    config.datasets.exterior_2 = dict(
        config.datasets.droid,
        name="exterior_2",
        video="steps/observation/exterior_image_2_left",
        records=config.get_ref("run_dir") + "/records/exterior_2",
    )

This is no published recipe, and it was never run on DROID itself. The tests encode a small dataset
that TFDS wrote with the release's features.
"""

from ml_collections import ConfigDict

from configs import mimic_video
from data_pipelines.embodiments import droid_franka


def robot() -> ConfigDict:
    """3 s of actions, the first without delay."""
    droid = dict(
        format="rlds",
        path="data/droid/1.0.1",
        options=dict(
            droid=dict(
                success_only=True,
                need_language=True,
                ranges="data/droid_lists/droid_sample_ranges_v1_0_1.json",
            )
        ),
        embodiment="droid_franka",
        video="steps/observation/exterior_image_1_left",
        views=dict(wrist="steps/observation/wrist_image_left"),
        action=droid_franka.JOINT_ACTION,
        proprio=droid_franka.JOINT_PROPRIO,
        anchor_fps=1.0,
        weight=1.0,
    )
    config = mimic_video.shared(
        "runs/droid", {"droid": droid}, dict(horizon=45, fps=15.0, shift=0.0), width=8
    )
    # DROID's pictures are 180x320. 432x768 has their aspect exactly and is the size at which
    # Cosmos-Predict2 was trained on 16:9: 20,736 tokens. Nothing was trained on the wrist, whose
    # 176x320 are the pixels that there are: 440 tokens.
    config.clip.update(height=432, width=768, views=dict(wrist=dict(height=176, width=320)))
    config.validation_share = 0.001
    config.training.sample_every = 1000
    return config
