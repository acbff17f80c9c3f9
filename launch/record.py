r"""Records demonstrations in a simulator, of its scripted expert or by playing old ones again.

    python -m launch.record --out=data/robot --kind=robot \
        --tasks=drawer-open-v3,door-open-v3 --episodes=24

`robot` writes LeRobot v3.0 with every control step's frame, action and state (80 Hz); `video`
writes captioned mp4 files at 20 fps from a slightly moved camera, as video without actions. Every
Meta-World task works. Two cores record about 120 frames per second; no accelerator is used.

A recording that was stopped at any moment goes on where it was when the same command is given
again, and ends with the same bytes as one that was never stopped.

    python -m launch.record --suite=libero --out=data/libero --kind=robot \
        --tasks=object-2,object-4 --episodes=20

records LIBERO (`bash launch/libero.sh` first) at 20 Hz, from placements drawn anew: none is among
the 50 in which LIBERO is evaluated. `hdf5` writes LIBERO's own layout, a file per task, from whose
simulator states the episodes can be played again. It takes about 10 seconds per episode and core.

    python -m launch.record --suite=libero --out=data/libero_spatial_regenerated \
        --regenerate=datasets/libero_spatial

plays the demonstrations of LIBERO's HDF5 files (`<task>_demo.hdf5`) again, as mimic-video's release
prepares them: actions that do nothing are dropped, only what ends in success is kept, and the
pictures of both cameras are 480x640. It writes LeRobot v3.0 at 20 Hz, and `regenerated.json`, which
says what became of every demonstration. It takes about 20 seconds per demonstration and core.
"""

import re
from pathlib import Path

from absl import flags

from launch.entry import path_flag, run
from mvjax.evaluation.libero_demos import regenerate
from mvjax.evaluation.record import Recording, record_dataset
from mvjax.evaluation.suites.libero import in_libero_python
from mvjax.evaluation.suites.suite import SUITES

OUT = path_flag("out", "The dataset's folder.")
SUITE = flags.DEFINE_enum("suite", "metaworld", list(SUITES), "The simulator.")
KIND = flags.DEFINE_enum("kind", None, ["robot", "video", "hdf5"], "The format of the dataset.")
TASKS = flags.DEFINE_list("tasks", [], "Such as drawer-open-v3,door-open-v3.")
EPISODES = flags.DEFINE_integer("episodes", None, "Per task.", lower_bound=1)
NOISE = flags.DEFINE_float("noise", 0.1, "On executed actions, standard deviation.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Decides every episode.", lower_bound=0)
REGENERATE = flags.DEFINE_string("regenerate", None, "LIBERO's .hdf5 files to play again instead.")
WORKERS = flags.DEFINE_integer("workers", 2, "Simulator processes.", lower_bound=1)
SIZE = flags.DEFINE_string("size", None, "Height x width of the pictures, pixels: 128x128.")


def main() -> None:
    """Records, and prints how much."""
    asked = [flag for flag in (KIND, TASKS, EPISODES) if flag.present]
    if REGENERATE.value is None and len(asked) < 3:
        raise ValueError("--kind, --tasks and --episodes must be given.")
    if REGENERATE.value is not None and (asked or NOISE.present or SEED.present):
        raise ValueError("--regenerate takes the tasks, episodes and actions from its files.")
    if REGENERATE.value is not None and SUITE.value != "libero":
        raise ValueError("--regenerate is for --suite=libero.")
    size = _size(SIZE.value) or SUITES[SUITE.value].demonstrations.size
    recording = REGENERATE.value is None and Recording(
        KIND.value,
        tuple(TASKS.value),
        EPISODES.value,
        NOISE.value,
        SEED.value,
        height=size[0],
        width=size[1],
        suite=SUITE.value,
    )
    if SUITE.value == "libero":
        in_libero_python("launch.record")  # from here on in a Python that has the simulator
    if recording:
        result = record_dataset(Path(OUT.value), recording, WORKERS.value)
        print("{episodes} episodes, {frames} frames, {seconds:.0f} s".format(**result))
    else:
        result = regenerate(Path(REGENERATE.value), Path(OUT.value), WORKERS.value, size)
        print("{kept} demonstrations kept, {failed} failed when replayed".format(**result))


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or any(int(number) % 2 for number in found.groups()):
        raise ValueError(f"--size must be height x width, both even, as 480x640; got {text!r}.")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    run(main)
