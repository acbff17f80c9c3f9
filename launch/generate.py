r"""Generates a video from a picture or the end of a video, and a prompt.

    python -m launch.generate --checkpoint=runs/quickstart/video --image=start.png \
        --prompt="open the drawer" --out=video.mp4

The checkpoint is a training directory, of stage 1 or joint, whose settings are the defaults, or a
converted one.
Converted weights know only their network: --config names the configuration that they were trained
with, or the flags --tokenizer and --text_encoder (or --text_embedding) complete the released sizes:

    python -m launch.generate --checkpoint=weights/cosmos2b --tokenizer=weights/wan_vae \
        --text_encoder=weights/t5_11b --image=start.jpg --prompt="A robot arm opens the drawer." \
        --out=video.mp4
"""

import time
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from data_pipelines.clip import Clip
from data_pipelines.progress import Bar
from data_pipelines.video import read_observed, write_video
from launch.entry import config_flag, path_flag, run
from mvjax.flow import Sampling
from mvjax.models.layers import PRECISIONS
from mvjax.policy.generate import (
    check_tiled,
    check_views,
    cropped,
    embed_texts,
    generate,
    generation_config,
    load_matching_tokenizer,
    load_video_model,
    read_embedding,
)

CONFIG = config_flag(required=False)
CHECKPOINT = path_flag("checkpoint", "Stage-1 training directory, or converted video DiT.")
IMAGE = path_flag("image", "First frame, or a video whose last frames are observed.")
TILED = flags.DEFINE_bool(
    "tiled", False, "The pictures are tiled from several cameras, where those of training were."
)
VIEWS = flags.DEFINE_multi_string(
    "view", [], "NAME=FILE, pictures as --image of a view that the model sees beside the video."
)
OUT = path_flag("out", "The .mp4 file to write.")
PROMPT = flags.DEFINE_string("prompt", None, "Description of the video.")
EMBEDDING = flags.DEFINE_string(
    "text_embedding", None, "Embedding instead of --prompt: a .npy file of floats [tokens, dim]."
)
NEGATIVE = flags.DEFINE_string(
    "negative_prompt", None, "Description of what the video should not show."
)
GUIDANCE = flags.DEFINE_float(
    "guidance",
    0.0,
    "Strength of guidance away from --negative_prompt; 0: none, which is twice as fast.",
    0,
)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Converted Wan VAE, or linear tokenizer.")
TEXT_ENCODER = flags.DEFINE_string("text_encoder", None, "Converted T5.")
# The defaults of the following flags are those of the configuration, else of the checkpoint.
HEIGHT = flags.DEFINE_integer("height", None, "Height in pixels, a multiple of 16.")
WIDTH = flags.DEFINE_integer("width", None, "Width in pixels, a multiple of 16.")
FRAMES = flags.DEFINE_integer("frames", None, "Number of frames, including observed ones: 1 + 4k.")
FPS = flags.DEFINE_integer("fps", None, "Frames per second.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", None, "Denoising steps.", lower_bound=1)
SIGMA_MAX = flags.DEFINE_float("sigma_max", None, "Noise level at which denoising starts.")
SEED = flags.DEFINE_integer("seed", None, "Seed of the noise.", 0, 2**32 - 1)
PRECISION = flags.DEFINE_enum("precision", None, PRECISIONS, "Precision of the video DiT.")


def main() -> None:
    """Writes one video."""
    checkpoint, out = Path(CHECKPOINT.value), Path(OUT.value)
    if out.suffix != ".mp4":
        raise ValueError(f"--out must be the name of an .mp4 file, got {out}")
    config = generation_config(checkpoint, CONFIG.value)
    given = {
        "clip.height": HEIGHT.value,
        "clip.width": WIDTH.value,
        "clip.fps": FPS.value,
        "sampler.video_steps": STEPS.value,
        "sampler.sigma_max": SIGMA_MAX.value,
        "sampler.seed": SEED.value,
        "tokenizer": TOKENIZER.value,
        "text_encoder": TEXT_ENCODER.value,
        "video_model.precision": PRECISION.value,
    }
    config.update_from_flattened_dict({k: v for k, v in given.items() if v is not None})
    sampling = Sampling(**config.sampler)
    observed = read_observed(Path(IMAGE.value), config.clip.observed_frames, config.clip.fps)
    views = {
        name: read_observed(Path(path), len(observed), config.clip.fps)
        for name, path in _named(VIEWS.value).items()
    }
    check_views(config.clip.get("views") or {}, observed, views)  # before weights are read
    check_tiled(config, observed, TILED.value, views)
    observed = cropped(config, observed, TILED.value)
    views = {name: cropped(config, pictures, TILED.value) for name, pictures in views.items()}
    clip = _clip(config, len(observed))
    tokenizer = load_matching_tokenizer(config.tokenizer, checkpoint)
    text, negative = _texts(config, checkpoint)
    model = load_video_model(checkpoint, config.video_model.precision)
    out.parent.mkdir(parents=True, exist_ok=True)
    ends = []
    with Bar(total=sampling.evaluations, desc="denoise", unit="step", smoothing=0) as bar:

        def progress(done: int) -> None:
            if done == 1:  # compiled, too: the time left is estimated from the later steps
                bar.initial = 1
                bar.unpause()
            bar.update()
            ends.append(time.perf_counter())
            if done == bar.total:
                bar.close()  # before the video is decoded

        further = dict(views=views, guidance=GUIDANCE.value, negative=negative)
        video = generate(
            model, tokenizer, clip, observed, text, sampling, **further, progress=progress
        )
    fps = max(round(clip.fps), 1)
    write_video(out, video, fps, crf=18)
    pace = (ends[-1] - ends[0]) / (len(ends) - 1)
    print(
        f"{out}: {len(video)} frames of {clip.height}x{clip.width} at {fps} frames per second, "
        f"{len(observed)} of them observed; {pace:.3g} s per step."
    )


def _named(given: list[str]) -> dict[str, str]:
    """File by view, of NAME=FILE each."""
    named = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not name or not equals or not path or name in named:
            raise ValueError(f"--view must be NAME=FILE, each name once; got {text!r}")
        named[name] = path
    return named


def _clip(config: ConfigDict, observed: int) -> Clip:
    """The clip to generate, with `observed` given frames."""
    frames = FRAMES.value
    if frames is None:
        frames = config.clip.observed_frames + config.clip.future_frames
    if frames % 4 != 1 or frames <= observed:
        raise ValueError(
            f"--frames must be 1 + 4k and more than the {observed} observed, e.g. "
            f"{max(frames // 4 * 4 + 1, observed + 4)}; got {frames}"
        )
    lengths = dict(observed_frames=observed, future_frames=frames - observed)
    return Clip(**{**config.clip, **lengths})


def _texts(config: ConfigDict, checkpoint: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Embeddings of the prompt and, with guidance, of the negative prompt."""
    if (PROMPT.value is None) == (EMBEDDING.value is None):
        raise ValueError("give either --prompt or --text_embedding")
    if GUIDANCE.value and NEGATIVE.value is None:
        raise ValueError(f"--guidance={GUIDANCE.value:g} needs --negative_prompt")
    prompts = [PROMPT.value] if EMBEDDING.value is None else []
    prompts += [NEGATIVE.value] if GUIDANCE.value else []
    texts = [*embed_texts(config, prompts, checkpoint)] if prompts else []
    if EMBEDDING.value is not None:
        size = config.text.length, config.text.dim
        texts.insert(0, read_embedding(Path(EMBEDDING.value), *size))
    return texts[0], texts[1] if GUIDANCE.value else None


if __name__ == "__main__":
    run(main)
