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


def add_datasets(config: ConfigDict, **datasets: dict[str, Any]) -> None:
    """Adds datasets by name; `name` and `records` follow from it."""
    run = config.get_ref("run_dir")
    config.datasets = {
        name: dict(dataset, name=name, records=run + f"/records/{name}")
        for name, dataset in datasets.items()
    }


def video_stage(config: ConfigDict, **flow: Any) -> None:
    """Makes it stage 1, with the published noise and what is given for `config.flow`."""
    config.stage = "video"
    config.flow = dict(sigma_scale=4.0, sigma_tail=0.05, min_condition_latents=1, **flow)


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
    config.flow = dict(
        sigma_scale=4.0,
        sigma_tail=0.05,
        action_time_alpha=1.0,  # the paper's density is Beta(1.5, 1)
        action_time_beta=1.0,
        proprio_dropout=0.2,
        prefix=0,  # the largest number of given actions, where chunks shall continue one another
        **flow,
    )
