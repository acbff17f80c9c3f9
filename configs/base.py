"""The skeleton of every configuration: its sections, and the settings that all recipes share.

`mimic_video.py` (published sizes) and `quickstart.py` (tiny sizes) complete it.
"""

from typing import Any

from ml_collections import ConfigDict, FieldReference, config_dict

from mvjax.models.presets import PUBLISHED_LORA_TARGETS
from mvjax.parallel import DEFAULT_RULES


def skeleton(run_dir: str) -> ConfigDict:
    """The shared settings; paths that follow run_dir start with `config.get_ref("run_dir")`."""
    config = ConfigDict()
    config.run_dir = FieldReference(run_dir)  # where records and the runs of both stages go
    config.max_bad_share = 0.05  # of unreadable episodes or records; above it the work stops
    config.embodiment = ""  # whose normalizer a policy takes, where a run has those of several
    config.lora = dict(rank=0, alpha=32.0, targets=PUBLISHED_LORA_TARGETS)  # rank 0: all learns
    config.sampler = dict(
        action_steps=10,
        sigma_max=80.0,
        seed=0,
        chunking="none",  # "prefix" or "guided": chunks continue the one being executed
    )
    config.mesh = dict(context=1, tensor=1)
    config.rules = dict(DEFAULT_RULES)
    config.context_frames = "all"  # "observed": stage 2 and the policy have no future frames
    config.init_from = ""
    config.optimizer = dict(
        b1=0.9,
        eps=1e-8,
        mu_dtype="",  # "bfloat16": the first moment in half the memory
    )
    config.wandb = ""  # a project at Weights & Biases, if the package is installed
    config.training = dict(
        accumulate=1,  # micro-batches in turn, where a batch does not fit the chips at once
        seed=0,
        keep=2,
        keep_every=0,  # checkpoints of these steps stay for good; 0: none do
        sample_count=2,  # videos of held-out windows, every training.sample_every steps of stage 1
        episodes_per_task=config_dict.placeholder(object),  # a number; one, tenth, half or full
    )
    return config


def augment(
    config: ConfigDict,
    *,
    variants: int = 4,
    crop: float = 0.9,
    rotation: float = 5.0,
    brightness: float = 0.2,
    contrast: float = 0.2,
    saturation: float = 0.2,
    hue: float = 0.05,
) -> None:
    """Augments the pictures of every dataset; what each setting means: `data_pipelines.augment`.

    Encoding takes `variants` times as long, and the latents `variants` times as much disk.
    """
    for dataset in config.datasets.values():
        dataset.augment = dict(
            variants=variants,
            crop=crop,
            rotation=rotation,
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=hue,
        )


def add_datasets(config: ConfigDict, **datasets: dict[str, Any]) -> None:
    """Adds datasets by name; `name` and `records` follow from it."""
    run = config.get_ref("run_dir")
    config.datasets = {
        name: dict(dataset, name=name, records=run + f"/records/{name}")
        for name, dataset in datasets.items()
    }


_VIDEO_NOISE = dict(sigma_scale=4.0, sigma_tail=0.05)
_ACTION_NOISE = dict(
    action_time_alpha=1.0,  # the paper's density is Beta(1.5, 1)
    action_time_beta=1.0,
    proprio_dropout=0.2,
    prefix=0,  # the largest number of given actions, where chunks shall continue one another
    prefix_share=0.5,  # of the draws that have given actions
)


def video_stage(config: ConfigDict, **flow: Any) -> None:
    """Makes it stage 1, with the published noise and what is given for `config.flow`."""
    config.stage = "video"
    config.flow = dict(**_VIDEO_NOISE, min_condition_latents=1, **flow)


def joint_stage(config: ConfigDict, precision: str, **flow: Any) -> None:
    """Makes it joint training, with the published noise and what is given for `config.flow`.

    Args:
        config: changed in place.
        precision: of the backbone in a policy.
        **flow: video_weight, action_weight, sampling_sigma_share, action_draws.
    """
    config.stage = "joint"
    config.backbone = dict(precision=precision)
    config.decoder_init_from = ""  # init_from is the backbone's
    config.optimizer.backbone_rate = 1.0  # times the learning rate
    config.flow = dict(
        **_VIDEO_NOISE,
        **_ACTION_NOISE,
        action_gradient=True,  # False: the action loss trains the decoder alone
        **flow,
    )


def action_stage(
    config: ConfigDict, backbone: str | FieldReference, precision: str, **flow: Any
) -> None:
    """Makes it stage 2, with the published noise and what is given for `config.flow`.

    Args:
        config: changed in place.
        backbone: a stage-1 training directory, or converted weights.
        precision: of the backbone.
        **flow: sampling_sigma_share, action_draws, loss_scale.
    """
    config.stage = "action"
    config.backbone = dict(checkpoint=backbone, precision=precision)
    config.flow = dict(**_VIDEO_NOISE, **_ACTION_NOISE, **flow)
