"""Stage 2 of mimic-video on BridgeData V2: the action decoder on the frozen backbone.

    python -m launch.train --config=configs/bridge_action.py --workdir=runs/bridge/action

reads the backbone that configs/bridge_video.py trains. The other published variant uses
Cosmos-Predict2 as NVIDIA released it:

    python -m launch.train --config=configs/bridge_action.py:pretrained \
        --workdir=runs/bridge/action_pretrained

Data and weights: as for configs/bridge_video.py, with the same records. Chips and memory:
docs/pods.md.
"""

from ml_collections import ConfigDict

from configs import mimic_video


def get_config(backbone: str = "finetuned") -> ConfigDict:
    """14,112 steps of 256 clips.

    Args:
        backbone: "finetuned" (runs/bridge/video) or "pretrained" (weights/cosmos2b).
    """
    config = mimic_video.bridge()
    checkpoints = {
        "finetuned": config.get_ref("run_dir") + "/video",
        "pretrained": "weights/cosmos2b",
    }
    if backbone not in checkpoints:
        raise ValueError(f"The backbone must be finetuned or pretrained, got {backbone!r}.")
    return mimic_video.action_stage(
        config, steps=14_112, batch_size=256, backbone=checkpoints[backbone]
    )
