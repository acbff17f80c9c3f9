r"""Records demonstrations of the scripted expert of a simulator, or replays existing ones.

    python -m launch.record --out=data/robot --kind=robot \
        --tasks=drawer-open-v3,door-open-v3 --episodes=24

records Meta-World. `robot` writes LeRobot v3.0 with the frame, action and state of every control
step (80 Hz); `--cameras=corner,gripper` adds the frame of the gripper's camera. `video` writes .mp4
files with captions at 20 fps from a slightly moved camera, for training on video without actions.
Two cores record about 120 frames per second; no accelerator is used.

To continue a recording that was stopped, run the same command again. The result has the same bytes
as a recording that was not stopped.

    python -m launch.record --suite=libero --out=data/libero --kind=robot \
        --tasks=object-2,object-4 --episodes=20

records LIBERO (run `bash launch/libero.sh` first) at 20 Hz, from random placements; its cameras are
agentview and wrist. No placement is among the 50 in which LIBERO is evaluated. `hdf5` writes
LIBERO's own layout, one file per task and both cameras; its simulator states allow the episodes to
be replayed. An episode takes about 10 seconds on one core.

    python -m launch.record --suite=libero --out=data/libero_spatial_regenerated \
        --regenerate=datasets/libero_spatial

replays the demonstrations of LIBERO's HDF5 files (`<task>_demo.hdf5`), as mimic-video's release
prepares them: actions without an effect are dropped, only successful episodes are kept, and the
pictures of both cameras are 480x640. It writes LeRobot v3.0 at 20 Hz, and `regenerated.json` with
the result of every demonstration. A demonstration takes about 20 seconds on one core.
"""

import re
from pathlib import Path

from absl import flags

from data_pipelines.lock import run_lock
from launch.entry import path_flag, run
from mvjax.evaluation.libero_demos import regenerate
from mvjax.evaluation.record import Recording, record_dataset
from mvjax.evaluation.suites.libero import in_libero_python
from mvjax.evaluation.suites.suite import SUITES

OUT = path_flag("out", "Folder of the dataset.")
SUITE = flags.DEFINE_enum("suite", "metaworld", list(SUITES), "The simulator.")
KIND = flags.DEFINE_enum("kind", None, ["robot", "video", "hdf5"], "Format of the dataset.")
TASKS = flags.DEFINE_list("tasks", [], "Tasks, such as drawer-open-v3,door-open-v3.")
EPISODES = flags.DEFINE_integer(
    "episodes", None, "Number of successful episodes per task.", lower_bound=1
)
NOISE = flags.DEFINE_float("noise", 0.1, "Standard deviation of the noise on the actions.", 0)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the placements and of the noise.", lower_bound=0)
REGENERATE = flags.DEFINE_string(
    "regenerate", None, "LIBERO's .hdf5 file, or a folder of them, to replay."
)
CAMERAS = flags.DEFINE_list(
    "cameras",
    [],
    "Cameras of a robot recording, such as corner,gripper; the main one if not given.",
)
WORKERS = flags.DEFINE_integer("workers", 2, "Number of simulator processes.", lower_bound=1)
SIZE = flags.DEFINE_string("size", None, "Height x width in pixels, such as 128x128.")


def main() -> None:
    """Records or replays, and prints the totals."""
    asked = [flag for flag in (KIND, TASKS, EPISODES) if flag.present]
    if REGENERATE.value is None and len(asked) < 3:
        raise ValueError("--kind, --tasks and --episodes must be given")
    if REGENERATE.value is not None and (asked or NOISE.present or SEED.present):
        raise ValueError("--regenerate takes the tasks, episodes and actions from its files")
    if REGENERATE.value is not None and CAMERAS.present:
        raise ValueError("--regenerate renders both cameras: leave --cameras out")
    if REGENERATE.value is not None and SUITE.value != "libero":
        raise ValueError("--regenerate is for --suite=libero")
    size = _size(SIZE.value) or SUITES[SUITE.value].size
    recording = REGENERATE.value is None and Recording(
        KIND.value,
        tuple(TASKS.value),
        EPISODES.value,
        NOISE.value,
        SEED.value,
        height=size[0],
        width=size[1],
        suite=SUITE.value,
        cameras=tuple(CAMERAS.value),
    )
    if SUITE.value == "libero":
        in_libero_python("launch.record")  # from here on in a Python that has the simulator
    out = Path(OUT.value)
    with run_lock(out):  # two recordings would assemble each other's episodes
        if recording:
            result = record_dataset(out, recording, WORKERS.value)
            print("{episodes} episodes, {frames} frames, {seconds:.0f} s".format(**result))
        else:
            result = regenerate(Path(REGENERATE.value), out, WORKERS.value, size)
            print("{kept} demonstrations kept, {failed} failed when replayed".format(**result))


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or any(int(number) % 2 for number in found.groups()):
        raise ValueError(f"--size must be height x width, both even, as 480x640; got {text!r}")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    run(main)
