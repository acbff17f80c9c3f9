"""Everything the quickstart's phases share: data, lengths, networks, evaluation.

`bash launch/quickstart.sh` runs all phases. `configs/quickstart_video.py` and
`configs/quickstart_action.py` add what the two training stages need. It needs two CPU cores, under
6 GB of memory and no accelerator. The recipe is made for minutes, not for the best success rate: a
real simulator (Meta-World v3), 64x64 video, and networks of about two million parameters with the
released structure.
"""

from ml_collections import ConfigDict

from configs import base
from data_pipelines.embodiments import metaworld_sawyer
from mvjax.models.presets import ACTION_DECODERS, VIDEO_DITS, decoder_section, video_section

ROBOT_TASKS = (
    "drawer-close-v3",
    "button-press-topdown-v3",
    "window-open-v3",
    "drawer-open-v3",
    "coffee-button-v3",
    "door-open-v3",
)
VIDEO_TASKS = (
    *ROBOT_TASKS,
    "window-close-v3",
    "door-close-v3",
    "faucet-open-v3",
    "handle-press-v3",
    "button-press-v3",
    "plate-slide-v3",
)

CAMERAS = ("single", "tiled", "observed")  # see `_add_gripper`
AUGMENTED = "augmented"  # the last word of a recipe with `base.augment`


def get_config(recipe: str = "full") -> ConfigDict:
    """The shared sections; `data_pipelines.clip` derives the lengths that follow from others.

    Args:
        recipe: "full", or "smoke": two tasks and a few steps, to see every phase run in a minute
            (`--config=configs/quickstart.py:smoke`). Its policy has learned nothing. A second word
            adds the gripper's camera: "full,tiled" or "full,observed", see `_add_gripper`. The last
            word "augmented" augments the pictures: "full,augmented" or "full,tiled,augmented".
    """
    words, _, augmented = recipe.partition(f",{AUGMENTED}")
    size, _, cameras = words.partition(",")
    if size not in ("", "full", "smoke"):
        raise ValueError(f"The quickstart's size must be full or smoke, got {size!r}.")
    if augmented:
        raise ValueError(f"{AUGMENTED!r} must be the quickstart's last word, got {recipe!r}.")
    if cameras not in ("", *CAMERAS):
        raise ValueError(
            f"The quickstart's cameras must be one of {', '.join(CAMERAS)}, got {cameras!r}."
        )
    smoke = size == "smoke"
    config = base.skeleton("runs/quickstart")
    run = config.get_ref("run_dir")
    config.size = size or "full"

    # Scripted experts in simulation; `seed` and the attempt's number decide an episode.
    robot_tasks = ROBOT_TASKS[:2] if smoke else ROBOT_TASKS
    video_tasks = VIDEO_TASKS[:3] if smoke else VIDEO_TASKS
    config.recording = dict(
        robot=dict(kind="robot", tasks=robot_tasks, episodes=3 if smoke else 24, seed=0),
        video=dict(kind="video", tasks=video_tasks, episodes=3 if smoke else 10, seed=1000),
    )
    # Recordings draw their reset seeds from 2³¹: none of theirs is among these.
    config.evaluation = dict(
        suite="metaworld",
        tasks=robot_tasks,
        episodes_per_task=1 if smoke else 20,
        first_seed=90_000,
        execute=8,
        max_steps=24 if smoke else 200,
        workers=2 if smoke else 6,
        videos_per_task=1,
        sweep_episodes=1 if smoke else 10,  # per task, for stop steps other than 0 and the oracle
        oracle_step=8,  # σ 1.4, τ 0.58: noise as in training, with the future still there
    )

    # `--study`: action demonstrations per task; the largest number means all that are recorded.
    config.study = dict(
        video_steps=16 if smoke else 6000,  # of the backbone that is trained on video
        demonstrations=(2,) if smoke else (5, 10, 24),
        seeds=1 if smoke else 3,
        steps=10 if smoke else 800,
        episodes_per_task=2 if smoke else 10,
    )

    # 13 frames at 20 fps = 4 latent frames of 8x8; 2 of them observed.
    config.clip = dict(height=64, width=64, observed_frames=5, future_frames=8, fps=20.0)
    config.policy_io = dict(
        action=dict(horizon=16, fps=80.0, shift=0.0, dim=4),
        proprio=dict(horizon=1, fps=80.0, dim=4),
    )
    base.add_datasets(
        config,
        robot=dict(
            format="lerobot",
            path=run + "/data/robot",
            embodiment="metaworld_sawyer",
            video="observation.images.corner",
            action=metaworld_sawyer.ACTION,
            proprio=metaworld_sawyer.PROPRIO,
            anchor_fps=80.0,
            weight=3.0,
        ),
        video=dict(
            format="video_folder",
            path=run + "/data/video",
            embodiment="metaworld_sawyer",
            video="video",
            action="",
            proprio="",
            anchor_fps=20.0,
            weight=1.0,
        ),
    )
    config.validation_share = 0.25 if smoke else 0.04
    config.tokenizer = run + "/tokenizer.npz"
    config.text_encoder = ""  # character n-grams
    config.text = dict(length=8, dim=64)

    config.video_model = video_section(VIDEO_DITS["tiny"])
    config.context_layer = 3
    config.decoder = decoder_section(ACTION_DECODERS["tiny"])
    # Published: 35 steps, σ_min 0.002, one noise for all queries, one draw. A short training sees
    # little noise below 0.3, and cannot remove it.
    config.sampler.update(video_steps=10, sigma_min=0.3, fresh_noise=True, draws=4)

    steps = 8 if smoke else 1500
    config.mesh.update(data=-1, fsdp=1)
    config.optimizer.update(
        learning_rate=1e-3,
        schedule="cosine",
        warmup_steps=min(50, steps // 4),
        decay_steps=steps,
        final_fraction=0.02,
        b2=0.98,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    config.training.update(
        steps=steps,
        batch_size=8 if smoke else 16,
        ema_decay=0.99,
        log_every=max(steps // 75, 1),
        checkpoint_every=steps // 4,
        sample_every=steps if smoke else 500,
    )
    if cameras in ("tiled", "observed"):
        _add_gripper(config, tiled=cameras == "tiled")
    if recipe.endswith(f",{AUGMENTED}"):
        base.augment(config, variants=2 if smoke else 4)
    return config


def _add_gripper(config: ConfigDict, *, tiled: bool) -> None:
    """Adds the gripper's camera, in the size of the corner camera.

    Tiled, it is the right half of the picture, whose future is predicted. Observed, it is a view of
    its own, of which only the present enters.
    """
    config.recording.robot.cameras = ("corner", "gripper")
    clip, robot, video = config.clip, config.datasets.robot, config.datasets.video
    corner, gripper = "observation.images.corner", "observation.images.gripper"
    # The other videos are of the corner camera alone: the gripper's picture is black there.
    if tiled:
        clip.width *= 2
        with config.ignore_type():
            robot.video, video.video = (corner, gripper), ("video", "")
    else:
        clip.views = dict(gripper=dict(height=clip.height, width=clip.width))
        robot.views, video.views = dict(gripper=gripper), dict(gripper="")
