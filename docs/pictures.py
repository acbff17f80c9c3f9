"""Makes the README's pictures: the architecture, and the robot of a finished quickstart.

    python docs/pictures.py --run-dir=runs/quickstart

writes `docs/pictures/architecture.svg` and `docs/pictures/robot.webp`. The animation shows the
first tasks of the evaluation, each from its first initial state. Above: what the robot did, driven
by the policy that stops at step 0. Below: the same moments as the video model predicted them 0.4 s
earlier, or at the episode's start, where that was less. Every query gives both: its actions are
read from the noise at which its video begins (`Policy.act_with_video`).
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from absl import flags
from architecture_svg import architecture_svg
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from configs import trained
from data_pipelines.atomic import replacing, write_text
from launch.entry import run
from mvjax.evaluation.suites.metaworld import MetaWorld
from mvjax.policy.load import load_trained
from mvjax.policy.observation import History, ObservationSpec
from mvjax.policy.policy import Policy

RUN_DIR = flags.DEFINE_string("run_dir", "runs/quickstart", "Folder of a finished quickstart.")
OUT = flags.DEFINE_string("out", str(Path(__file__).parent / "pictures"), "Folder of the pictures.")
TASKS = flags.DEFINE_integer("tasks", 4, "Number of tasks in the animation.", 1)

GAP, TOP, MIDDLE = 8, 96, 44  # pixels around the pictures; the lines of text above each row
PAGE, INK, SOFT, SUCCESS, FAILURE = "#0d1117", "#e6edf3", "#9198a1", "#3fb950", "#f85149"
FRAME_MS, END_MS = 100, 2000  # 20 frames per second of simulation, shown at half speed
QUALITY = 70  # of WebP


@dataclass(frozen=True)
class Drive:
    """One episode.

    Attributes:
        instruction: the task in words.
        success: whether it was reached.
        seen: frames `clip.fps` apart, the last one after the end; uint8 [t, h, w, 3].
        predicted: the same moments, as they were predicted; [0] was observed, not predicted.
    """

    instruction: str
    success: bool
    seen: np.ndarray
    predicted: np.ndarray


def main() -> None:
    """Makes both pictures."""
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "architecture.svg", architecture_svg())
    workdir = Path(RUN_DIR.value) / "action"
    config, policy = trained.get_config(str(workdir)), load_trained(workdir, stop_step=0)
    tasks = config.evaluation.tasks[: TASKS.value]
    pictures = animation([drive(config, policy, task) for task in tasks])
    durations = [FRAME_MS] * (len(pictures) - 1) + [END_MS]
    with replacing(out / "robot.webp") as path:
        pictures[0].save(
            path,
            format="webp",
            save_all=True,
            append_images=pictures[1:],
            duration=durations,
            loop=0,
            quality=QUALITY,
            method=6,
        )
    for name in ("architecture.svg", "robot.webp"):
        print(f"{out / name}: {(out / name).stat().st_size / 1000:.0f} kB")


def drive(config: ConfigDict, policy: Policy, task: str) -> Drive:
    """Plays a task from its first initial state, as `launch.evaluate` does with K = 0."""
    clip, io, protocol = config.clip, config.policy_io, config.evaluation
    spec = ObservationSpec(
        clip.observed_frames, clip.fps, io.proprio.horizon, io.proprio.fps, protocol.execute
    )
    robot = MetaWorld(task)
    robot.reset(protocol.first_seed)
    history, stride = History(spec, robot.control_hz), round(robot.control_hz / clip.fps)
    seen: list[np.ndarray] = []
    predicted: dict[int, np.ndarray] = {}
    success = False
    for step in range(protocol.max_steps):
        frame = history.record(robot.proprio(), lambda: robot.render("corner"))
        if step % stride == 0:
            seen.append(robot.render("corner") if frame is None else frame)
        if step % protocol.execute == 0:
            name = f"{task}/{protocol.first_seed}", step // protocol.execute
            chunks, videos = policy.act_with_video(
                [history.observation(robot.instruction, None, name)]
            )
            now = step // stride
            for i, frame in enumerate(videos[0][clip.observed_frames - 1 :]):
                predicted.setdefault(now + i, frame)  # the earliest prediction of a moment stays
        success = bool(robot.step(chunks[0][step % protocol.execute]))
        if success:
            break
    seen.append(robot.render("corner"))
    robot.close()
    frames = np.stack([predicted[min(i, max(predicted))] for i in range(len(seen))])
    return Drive(robot.instruction, success, np.stack(seen), frames)


def animation(drives: Sequence[Drive]) -> list[Image.Image]:
    """Returns the frames: a column per episode, the shorter ones waiting for the longest."""
    size = drives[0].seen.shape[1]
    pitch, below = size + GAP, TOP + size + MIDDLE
    page = Image.new("RGB", (GAP + pitch * len(drives), below + size + GAP), PAGE)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 6), "The robot, driven by the policy", INK, _font(24, bold=True))
    below_title = "The same moments, predicted 0.4 s earlier"
    draw.text((GAP, TOP + size + 8), below_title, INK, _font(24, bold=True))
    for column, one in enumerate(drives):
        lines = textwrap.fill(one.instruction, width=17)
        draw.text((GAP + pitch * column, TOP - 8), lines, SOFT, _font(19), anchor="ld")
    pictures = []
    for i in range(max(len(one.seen) for one in drives)):
        picture = page.copy()
        for column, one in enumerate(drives):
            x, now = GAP + pitch * column, min(i, len(one.seen) - 1)
            picture.paste(Image.fromarray(one.seen[now]), (x, TOP))
            small = Image.fromarray(one.predicted[now])
            picture.paste(small.resize((size, size), Image.Resampling.BICUBIC), (x, below))
            if now == len(one.seen) - 1:
                word, colour = ("success", SUCCESS) if one.success else ("no success", FAILURE)
                mark, place = ImageDraw.Draw(picture), (x + 8, TOP + size - 8)
                mark.rectangle(mark.textbbox(place, word, _font(19, bold=True), "ld"), PAGE)
                mark.text(place, word, colour, _font(19, bold=True), anchor="ld")
        pictures.append(picture)
    return pictures


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = f"fonts/ttf/DejaVuSans{'-Bold' * bold}.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / name), size)


if __name__ == "__main__":
    run(main)
