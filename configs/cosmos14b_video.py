"""Post-training of Cosmos-Predict2 14B on BridgeData V2, with NVIDIA's settings.

    python -m launch.encode --config=configs/bridge_video.py
    python -m launch.train --config=configs/cosmos14b_video.py --workdir=runs/bridge/video14b

trains all 14 billion parameters. With adapters of rank 32 instead:

    python -m launch.train --config=configs/cosmos14b_video.py:lora --workdir=runs/bridge/lora14b

The optimizer, the learning rates, the loss and the adapters are those of the documentation and the
example experiments of Cosmos-Predict2. NVIDIA trains 1,000 steps of 4 clips of 93 frames, every
fifth clip without its text, and does not train the adaLN weights beside adapters. Here the clips
and the text are those of mimic-video, and the adaLN weights are trained as in mimic-video. The
number of steps and the batch size are a starting point. mimic-video published no 14B backbone.

Weights: weights/cosmos14b (converted like weights/cosmos2b, docs/weights.md). Data: the records of
configs/bridge_video.py. Chips and memory: docs/pods.md.
"""

from ml_collections import ConfigDict

from configs import mimic_video

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "output_proj", "layer1", "layer2")


def get_config(training: str = "full") -> ConfigDict:
    """10,000 steps of 32 clips; two chips share a clip.

    Args:
        training: "full" or "lora".
    """
    if training not in ("full", "lora"):
        raise ValueError(f"Training must be full or lora, got {training!r}.")
    steps = 10_000
    config = mimic_video.video_stage(mimic_video.bridge(), steps=steps, batch_size=32)
    config.init_from = "weights/cosmos14b"
    config.video_model = mimic_video.video_model("cosmos14b")
    config.context_layer = 26  # as deep as block 20 of the 2B's 28
    config.flow.loss_scale = 10.0
    config.mesh.context = 2
    # NVIDIA's fine-tuning goes from a quarter of 2^-14.5 to zero.
    config.optimizer.update(
        learning_rate=0.25 * 2**-14.5,
        schedule="linear",
        decay_steps=steps,
        final_fraction=0.0,
        weight_decay=0.2,
        clip_norm=1.0,
    )
    config.lora.rank = 0
    if training == "lora":
        config.lora.update(rank=32, alpha=32.0, targets=LORA_TARGETS)
        config.optimizer.update(learning_rate=2**-11, schedule="constant", final_fraction=1.0)
    return config
