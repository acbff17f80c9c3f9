"""What the published configurations share: lengths, networks, data, and the recipes.

Everything follows the first public release of mimic-video. Where its code and the paper disagree
(batch sizes, steps), the file names of the release decide. The data are the release's own episodes,
one .zarr or .safetensors file each (format "mimic_episodes"). For data in another format, look into
the file of the robot in data_pipelines/embodiments: it may name their streams. For LIBERO's own
HDF5 files, write

    config.datasets.libero_goal.update(
        format="robomimic_hdf5",
        options=dict(flip="rotate"),
        video="obs/agentview_rgb",
        action=libero_panda.HDF5_ACTION,
        proprio=libero_panda.HDF5_PROPRIO,
    )

and for an observed wrist camera `views=dict(wrist="obs/eye_in_hand_rgb")`, too. BridgeData V2 as
recorded has the format "bridge_raw", the video "images0", widowx.RAW_ACTION and
widowx.RAW_PROPRIO. For other streams, describe the vectors (data_pipelines/vectors.py).

In the published stage 1, every camera of Bridge is a video of its own. Add a dataset for each:

    for camera in ("images1", "images2"):
        config.datasets[camera] = dict(
            config.datasets.bridge,
            name=camera,
            video=camera,
            action="",
            proprio="",
            records=config.get_ref("run_dir") + f"/records/{camera}",
        )

Episodes without that camera are skipped; `config.max_bad_share` is the largest share that may be.

Weights: `python -m launch.convert` puts the released files where these configurations look for them
(docs/weights.md). Records hold 2.5 MB of latents per window. One encoding serves both stages. To
take fewer windows, lower `--config.datasets.NAME.anchor_fps`.
"""

from ml_collections import ConfigDict, FieldReference, config_dict

from configs import base
from data_pipelines.embodiments import libero_panda, widowx
from mvjax.evaluation.suites.libero_scene import suite_tasks
from mvjax.models.presets import ACTION_DECODERS, VIDEO_DITS, decoder_section, video_section

LIBERO_SUITES = ("goal", "object", "spatial")
LIBERO_SHARES = {"full": 50, "half": 25, "tenth": 5, "one": 1}  # demonstrations per task
VIDEO_RATE = 10**-3.75  # of stage 1, 1.778e-4
LIBERO_CAMERAS = ("single", "tiled", "observed")  # see `libero`


def shared(run_dir: str, datasets: dict[str, dict], action: dict, *, width: int = 10) -> ConfigDict:
    """The sections that both stages of a run have in common.

    Args:
        run_dir: where records and the runs of both stages go.
        datasets: by name, without `name` and `records`, which follow from the name.
        action: horizon, fps and shift of the action chunk.
        width: of actions and proprioception. 10 are position 3, two rows of the rotation 6 (not
            normalised) and gripper 1.
    """
    config = base.skeleton(run_dir)
    base.add_datasets(config, **datasets)
    # 61 frames in 12 s are 16 latent frames of 60x80, 19,200 tokens; 2 latent frames are observed.
    config.clip = dict(height=480, width=640, observed_frames=5, future_frames=56, fps=5.0)
    config.policy_io = dict(
        action=dict(action, dim=width), proprio=dict(horizon=1, fps=action["fps"], dim=width)
    )
    config.validation_share = 0.0
    config.tokenizer = "weights/wan_vae"
    config.text_encoder = "weights/t5_11b"
    config.text = dict(length=512, dim=1024)

    config.video_model = video_model("cosmos2b")
    config.context_layer = 20
    config.decoder = decoder_section(ACTION_DECODERS["bridge"])
    config.sampler.update(video_steps=35, sigma_min=0.002, fresh_noise=False, draws=1)
    # Parameters and batch are split over all chips; where there are more chips than samples,
    # context=2 or 8 lets them share a clip (docs/pods.md).
    config.mesh.update(data=1, fsdp=-1)
    config.optimizer.update(
        schedule="constant",
        warmup_steps=0,
        decay_steps=0,
        final_fraction=1.0,
        b2=0.99,
        weight_decay=0.1,
        clip_norm=10.0,
    )
    config.training.update(
        ema_decay=0.0,
        log_every=50,
        checkpoint_every=1000,
        sample_every=0,  # looks at held-out windows, of which LIBERO has none
    )
    return config


def bridge() -> ConfigDict:
    """BridgeData V2: 3 s of actions at 5 Hz, the first 0.2 s ahead."""
    robot = dict(
        format="mimic_episodes",
        path="data/bridge",
        embodiment="widowx",
        video="workspace_rgb",
        action=widowx.ACTION,
        proprio=widowx.PROPRIO,
        anchor_fps=5.0,
        weight=1.0,
    )
    config = shared("runs/bridge", {"bridge": robot}, dict(horizon=15, fps=5.0, shift=0.2))
    config.validation_share = 0.0004  # published: 20 episodes of about 50,000
    config.training.sample_every = 1000
    return config


def libero(suite: str, share: str, cameras: str = "single") -> ConfigDict:
    """A LIBERO suite, regenerated at 480x640 and 20 Hz: 3 s of actions, the first without delay.

    Args:
        suite: goal, object or spatial.
        share: full, half, tenth or one: 50, 25, 5 or 1 demonstrations of each of the ten tasks.
        cameras: single, agentview as published; observed, the wrist's beside it; or tiled, both
            side by side in one picture of the same size, at half their width. The last two read
            what `launch.record --regenerate` writes, and have records and runs of their own.
    """
    if suite not in LIBERO_SUITES or share not in LIBERO_SHARES or cameras not in LIBERO_CAMERAS:
        raise ValueError(
            f"LIBERO takes a suite ({', '.join(LIBERO_SUITES)}), a share of its demonstrations "
            f"({', '.join(LIBERO_SHARES)}) and cameras ({', '.join(LIBERO_CAMERAS)}), e.g. "
            f"goal,full,observed; got {suite!r}, {share!r} and {cameras!r}."
        )
    name = f"libero_{suite}"
    run_dir, path = f"runs/{name}", f"data/{name}"
    robot = dict(
        format="mimic_episodes",
        path=path,
        embodiment="libero_panda",
        video="workspace_rgb",
        action=libero_panda.ACTION,
        proprio=libero_panda.PROPRIO,
        anchor_fps=20.0,
        weight=1.0,
    )
    if cameras != "single":
        run_dir += f"_{cameras}"
        scene, wrist = "observation.images.agentview", "observation.images.wrist"
        robot.update(
            format="lerobot",
            path=f"{path}_regenerated",
            video=scene,
            action=libero_panda.LEROBOT_ACTION,
            proprio=libero_panda.LEROBOT_PROPRIO,
        )
        robot |= (
            dict(views=dict(wrist=wrist)) if cameras == "observed" else dict(video=(scene, wrist))
        )
    config = shared(run_dir, {name: robot}, dict(horizon=60, fps=20.0, shift=0.0))
    if cameras == "observed":  # half the size of the scene: 600 tokens beside its 19,200
        config.clip.views = dict(wrist=dict(height=240, width=320))
    config.training.episodes_per_task = LIBERO_SHARES[share]
    config.evaluation = libero_protocol(suite)
    return config


def libero_words(arguments: str) -> tuple[str, str, str]:
    """Suite, share and cameras in the argument of a configuration, e.g. "goal,full,observed"."""
    suite, *rest = arguments.split(",")
    share, cameras = (*rest, "", "")[:2]
    if len(rest) > 2:
        raise ValueError(f"LIBERO takes a suite, a share and cameras, got {arguments!r}.")
    return suite, share or "full", cameras or "single"


def video_stage(config: ConfigDict, *, steps: int, batch_size: int) -> ConfigDict:
    """Stage 1 as published: LoRA of rank 256 and all adaLN weights, from Cosmos-Predict2."""
    base.video_stage(config, loss_scale=100.0)
    _adapters(config)
    config.optimizer.learning_rate = VIDEO_RATE
    config.training.update(steps=steps, batch_size=batch_size)
    return config


def action_stage(
    config: ConfigDict, *, steps: int, batch_size: int, backbone: str | FieldReference
) -> ConfigDict:
    """Stage 2 as published: a decoder of 499 million parameters on the frozen backbone.

    Args:
        config: of `bridge` or `libero`.
        steps: number of steps.
        batch_size: samples per step, over all chips.
        backbone: a stage-1 training directory, or converted weights.
    """
    # precision="published" repeats the release's roundings of times and rotary tables.
    base.action_stage(
        config,
        backbone,
        precision="bfloat16",
        sampling_sigma_share=0.0,
        action_draws=1,
        loss_scale=10.0,
    )
    _decoder_schedule(config)
    config.training.update(steps=steps, batch_size=batch_size)
    return config


def joint_stage(config: ConfigDict, *, steps: int, batch_size: int) -> ConfigDict:
    """Both stages in one run, each with its published loss and rate; this is not published.

    LoRA as in stage 1, from Cosmos-Predict2; the decoder starts at random.
    """
    base.joint_stage(
        config,
        precision="bfloat16",
        video_weight=100.0,
        action_weight=10.0,
        sampling_sigma_share=0.0,
        action_draws=1,
    )
    _adapters(config)
    _decoder_schedule(config)
    # The rate of stage 1; it follows the decoder's schedule.
    config.optimizer.backbone_rate = VIDEO_RATE / config.optimizer.learning_rate
    config.training.update(steps=steps, batch_size=batch_size)
    return config


def _adapters(config: ConfigDict) -> None:
    config.init_from = "weights/cosmos2b"
    config.lora.update(rank=256, alpha=32.0)
    config.rules.lora = ("fsdp",)  # else half of the adapters would be whole on every chip


def _decoder_schedule(config: ConfigDict) -> None:
    config.optimizer.update(
        learning_rate=1e-4,
        schedule="linear",
        warmup_steps=1000,
        decay_steps=500_000,
        final_fraction=0.2,
    )


def video_model(preset: str) -> dict:
    """The section of a named video DiT, without the settings of other sections."""
    # Not all activations of 19,200 tokens fit a chip: "auto" keeps as many as fit.
    return video_section(VIDEO_DITS[preset]) | {"remat": "auto"}


def libero_protocol(suite: str, workers: int = 8) -> dict:
    """The section `evaluation` for a LIBERO suite, as the release evaluates.

    The ten tasks of a suite, from initial states 0, 1, ... of fifty. An episode has 220, 280 or 300
    control steps, and each query executes five of them. The release's default is 5 episodes per
    task; the tables of the paper have 50: `--config.evaluation.episodes_per_task=50`.

    Args:
        suite: spatial, object, goal, 10 or 90.
        workers: number of simulator processes, and of queries that are answered together.
    """
    return dict(
        suite="libero",
        tasks=suite_tasks(suite),
        episodes_per_task=5,
        first_seed=0,
        execute=5,
        max_steps=config_dict.placeholder(int),  # the suite's own
        workers=workers,
        videos_per_task=1,
    )
