r"""Record demonstrations of scripted experts in simulation.

    python -m data_pipelines.record --out data/robot --kind robot \
        --tasks drawer-open-v3,door-open-v3 --episodes 24

`robot` writes LeRobot v3.0 with every control step's frame, action and state (80 Hz); `video`
writes captioned mp4 files at 20 fps from a slightly moved camera, as video without actions. Every
Meta-World task works. Two cores record about 120 frames per second; no accelerator is used.

A recording that was stopped at any moment goes on where it was when the same command is given
again, and ends with the same bytes as one that was never stopped.

    python -m data_pipelines.record --suite libero --out data/libero --kind robot \
        --tasks object-2,object-4 --episodes 20

records LIBERO (`bash launch/libero.sh` first) at 20 Hz, from placements drawn anew: none is among
the 50 in which LIBERO is evaluated. `hdf5` writes LIBERO's own layout, a file per task, from whose
simulator states the episodes can be played again. It takes about 10 seconds per episode and core.
"""

import argparse
import json
import os
import shutil
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from data_pipelines.recording.assembly import assemble
from data_pipelines.recording.plan import Recording, Unit, picture_size
from data_pipelines.recording.suites import SUITES
from data_pipelines.recording.unit import record_unit
from data_pipelines.recording.workers import worker_pool
from data_pipelines.sources.finished import MANIFEST, UNFINISHED
from mvjax.evaluation.suites.libero_python import in_libero_python


def record_dataset(
    out: Path, recording: Recording, workers: int = 2, progress: bool = True
) -> dict:
    """Record a dataset, or go on with one that was stopped, or leave a finished one alone.

    Args:
        out: the dataset's folder.
        recording: what to record.
        workers: processes; one per core is best.
        progress: show a bar with the time left on stderr.

    Returns:
        {"episodes", "frames", "seconds"}: of the whole dataset, and spent by this call.

    Raises:
        ValueError: if the folder holds another recording or other files.
        OSError: if the folder cannot be written or the disk is full.
        RuntimeError: if no OpenGL is found, or an expert keeps failing.
    """
    out = Path(out)
    began = time.monotonic()
    staging = _open_folder(out, recording)
    if not (out / MANIFEST).exists():
        units = recording.units()
        todo = [unit for unit in units if not (staging / unit.name).is_dir()]
        _record_units(todo, recording, staging, workers, progress)
        totals = assemble(out, staging, recording, units)
        _write_json(out / MANIFEST, {"recording": asdict(recording), **totals})
    shutil.rmtree(staging, ignore_errors=True)
    manifest = json.loads((out / MANIFEST).read_text())
    return {
        "episodes": manifest["episodes"],
        "frames": manifest["frames"],
        "seconds": time.monotonic() - began,
    }


def _open_folder(out: Path, recording: Recording) -> Path:
    """The folder for finished units; refuses one that holds something else."""
    staging = out / UNFINISHED
    settings = json.loads(json.dumps(asdict(recording)))
    for manifest in (out / MANIFEST, staging / MANIFEST):
        if manifest.exists():
            found = json.loads(manifest.read_text())["recording"]
            found.setdefault("suite", "metaworld")  # older recordings knew no other
            differ = [f"{k}={found.get(k)!r} (now {settings[k]!r})" for k in settings]
            differ = [d for k, d in zip(settings, differ) if found.get(k) != settings[k]]
            if differ:
                raise ValueError(
                    f"{out} holds a recording with {', '.join(differ)}; give the same settings to "
                    "go on with it, or another folder"
                )
            break
    else:
        if out.exists() and any(p.name != UNFINISHED for p in out.iterdir()):
            raise ValueError(f"{out} holds other files; record into a new or an empty folder")
        try:
            staging.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make the folder {out}: {error.strerror}") from error
        _write_json(staging / MANIFEST, {"recording": settings})
    if staging.exists():
        for leftover in staging.glob(".unit-*"):  # units that were being recorded when it stopped
            shutil.rmtree(leftover, ignore_errors=True)
    return staging


def _record_units(
    units: list[Unit], recording: Recording, staging: Path, workers: int, progress: bool
) -> None:
    if not units:
        return
    expected = sum(unit.count for unit in recording.units())
    done = expected - sum(unit.count for unit in units)
    bar = tqdm(
        total=expected, initial=done, unit="episode", disable=not progress, desc=str(staging.parent)
    )
    frames, began = 0, time.monotonic()
    with bar, worker_pool(min(workers, len(units))) as submit:
        waiting: set[Future] = submit(record_unit, units, recording, staging)
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                count, new_frames = future.result()
                frames += new_frames
                bar.set_postfix_str(f"{frames / (time.monotonic() - began):.0f} frames/s", False)
                bar.update(count)


def _write_json(path: Path, content: dict) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(part, path)


def main() -> None:
    """Entry point of `python -m data_pipelines.record`."""
    parser = argparse.ArgumentParser(
        prog="data_pipelines.record",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the dataset's folder")
    parser.add_argument("--suite", choices=tuple(SUITES), default="metaworld", help="simulator")
    parser.add_argument("--kind", choices=("robot", "video", "hdf5"), required=True, help="format")
    parser.add_argument("--tasks", required=True, help="comma-separated, e.g. drawer-open-v3")
    parser.add_argument("--episodes", type=int, required=True, help="per task")
    parser.add_argument("--workers", type=int, default=2, help="simulator processes (2)")
    parser.add_argument("--noise", type=float, default=0.1, help="on executed actions, std (0.1)")
    parser.add_argument("--seed", type=int, default=0, help="decides every episode (0)")
    parser.add_argument("--size", help="of the pictures, e.g. 128x128: height x width, pixels")
    args = parser.parse_args()
    try:
        if args.suite == "libero":
            in_libero_python("data_pipelines.record")
        tasks = tuple(args.tasks.split(","))
        height, width = picture_size(args.size) or SUITES[args.suite].size
        recording = Recording(
            args.kind,
            tasks,
            args.episodes,
            args.noise,
            args.seed,
            height=height,
            width=width,
            suite=args.suite,
        )
        result = record_dataset(args.out, recording, args.workers)
    except KeyboardInterrupt:
        print(f"\nstopped; give the same command again to go on with {args.out}", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"recording failed: {error}", file=sys.stderr)
        sys.exit(2)
    print("{episodes} episodes, {frames} frames, {seconds:.0f} s".format(**result))


if __name__ == "__main__":
    main()
