"""A training that is killed at random moments and continued, compared with one that is not.

python tests/kills.py [--kills=20] [--steps=1500] [--seed=0] [--other_meshes]

The real loop, loader and checkpoints, with a small network. Prints what was found as JSON; with
--other_meshes every restart arranges eight devices in another way.
"""

import argparse
import dataclasses
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from forked import Program
from run_records import without_times
from toy_training import LENGTH, toy_config, toy_stage

from data_pipelines.atomic import write_json, write_npz
from data_pipelines.loader import make_loader
from data_pipelines.records import RecordDataset, RecordWriter, write_texts
from mvjax.experiment import Experiment
from mvjax.training.metrics import Record, read_records
from mvjax.training.train import train

DATASETS = {"one": range(60), "two": range(100, 137)}  # windows are numbers; 37 is no multiple of 8
WEIGHTS = (2.0, 1.0)
PAUSE = 0.01  # seconds per batch, so that a run lasts long enough to be killed in its middle
MESHES = ("data=8", "data=1 fsdp=8", "data=1 fsdp=2 context=2 tensor=2", "data=2 fsdp=2 context=2")


def write_datasets(folder: Path) -> None:
    """Records folders whose latents are the number of the window."""
    for name, numbers in DATASETS.items():
        path = folder / name
        path.mkdir()
        with RecordWriter(path / "shard_0.arrayrecord") as writer:
            for number in numbers:
                latents = np.full((1, 1, 1, 1), number, np.float32)
                writer.write({"latents": latents, "episode": np.int64(0), "text": np.int64(0)})
        write_npz(path / "shard_0.npz", anchor=np.arange(len(numbers)))
        write_texts(path / "texts.npz", ["push"], np.ones((1, 3, 4), np.float32))
        episode = dict(id="0", instructions=[0], first=0, count=len(numbers), split="train")
        manifest = dict(settings={"dataset": {"name": name}}, fingerprint=name, skipped=[])
        manifest |= dict(shards=["shard_0.arrayrecord"], episodes=[episode])
        write_json(path / "manifest.json", manifest)


class Numbered:
    """The training loader, its windows turned into what the toy stage takes.

    In place of batch number `ends` it waits, for a process that is to be killed before its end.
    """

    def __init__(self, folder: Path, batch_size: int, ends: int = 0):
        self._left = ends
        datasets = [RecordDataset(folder / name) for name in DATASETS]
        self._loader = make_loader(datasets, WEIGHTS, batch_size, 3, "train")

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        self._left -= 1
        time.sleep(PAUSE if self._left else 3600)
        numbers = next(self._loader)["latents"].reshape(-1).astype(int)
        tokens = [np.random.default_rng(n).normal(size=(LENGTH, 3)) for n in numbers]
        tokens = np.asarray(tokens, np.float32)
        return {"tokens": tokens, "target": tokens**2, "index": numbers.astype(np.int32)}

    def get_state(self) -> Any:
        return self._loader.get_state()

    def set_state(self, state: Any) -> None:
        self._loader.set_state(state)


def numbered_stage(batch_size: int):
    """The toy stage, which also writes down the numbers of the windows it was trained on."""
    stage = toy_stage()

    def objective(params, frozen, batch, draws):
        loss, _ = stage.objective(params, frozen, batch, draws)
        return loss, {f"sample_{i}": batch["index"][i] for i in range(batch_size)}

    return dataclasses.replace(stage, objective=objective)


def train_once(
    workdir: Path, data: Path, steps: int, mesh: Mapping[str, int], ends: int = 0
) -> None:
    """What the killed process does: trains to the end, from wherever it finds itself."""
    config = toy_config(steps=steps, checkpoint_every=10, keep=3)
    config.mesh.update(mesh)
    size = config.training.batch_size
    train(Experiment.from_config(config), numbered_stage(size), Numbered(data, size, ends), workdir)


def start(workdir: Path, data: Path, steps: int, mesh: str = "", ends: int = 0) -> Program:
    """`train_once` in a process of its own: on one device, or on eight in the given mesh."""
    devices = 8 if mesh else 1
    return Program("kills", "--train", workdir, data, steps, mesh, ends, devices=devices)


def finish(process: Program) -> None:
    """Waits for the end, which must be a good one."""
    said = process.finish()
    if said.code:
        raise RuntimeError(f"the training ended with code {said.code}: {said.err}")


def kill_and_continue(
    workdir: Path,
    data: Path,
    steps: int,
    kills: int,
    startup: float,
    chance: random.Random,
    meshes: Sequence[str] = ("",),
) -> list[int]:
    """Trains to the end through `kills` kills -9, in turn at a random moment of the training (the
    first) and of the `startup` seconds before its first step.

    Returns:
        The last step on record at each kill.

    Raises:
        ValueError: With so few steps that some process would have nothing to do.
        RuntimeError: If a process ended before it was killed.
    """
    ends = steps // (kills + 1)  # leaves work for the last start, however late the kills come
    if ends < 10:
        raise ValueError(f"{steps} steps are too few for {kills} kills; at least 10 for each.")
    reached = []
    for number in range(kills):
        process = start(workdir, data, steps, meshes[number % len(meshes)], ends)
        if number % 2:
            process.wait(chance.uniform(0, startup))
        else:
            _wait_for_records(workdir, process)
            process.wait(chance.uniform(0, ends * PAUSE))
        process.kill()
        said = process.finish()
        if said.code != -signal.SIGKILL:
            raise RuntimeError(f"the training ended with code {said.code}: {said.err}")
        reached.append(int((read_records(workdir) or [{"step": 0}])[-1]["step"]))
    finish(start(workdir, data, steps, meshes[kills % len(meshes)]))
    return reached


def _wait_for_records(workdir: Path, process: Program) -> None:
    """Until a process that was just started has logged a step, or has ended."""
    began = time.time()
    while process.poll() is None:
        records = read_records(workdir)
        if records and records[-1]["time"] > began:
            return
        time.sleep(0.02)


def samples(records: Sequence[Record]) -> list[int]:
    """The windows that were trained on, in order."""
    count = sum(name.startswith("sample_") for name in records[0])
    return [int(record[f"sample_{i}"]) for record in records for i in range(count)]


def broken_epochs(seen: Sequence[int]) -> list[str]:
    """The epochs of a dataset in which a window came twice or not at all; none, it is hoped."""
    broken = []
    for name, numbers in DATASETS.items():
        own = [number for number in seen if number in numbers]
        for first in range(0, len(own) - len(numbers) + 1, len(numbers)):
            if sorted(own[first : first + len(numbers)]) != list(numbers):
                broken.append(f"{name}, epoch {first // len(numbers)}")
    return broken


def largest_difference(ours: Sequence[Record], theirs: Sequence[Record]) -> float:
    """The largest relative difference between the losses of two runs."""
    losses = [np.array([record["loss"] for record in records]) for records in (ours, theirs)]
    return float(np.max(np.abs(losses[0] / losses[1] - 1)))


def experiment(folder: Path, kills: int, steps: int, seed: int, meshes: Sequence[str]) -> dict:
    """One run in peace, one through kills, and what they have in common."""
    data = folder / "data"
    data.mkdir()
    write_datasets(data)
    began = time.monotonic()
    finish(start(folder / "straight", data, steps))
    straight = read_records(folder / "straight")
    startup = straight[0]["time"] - time.time() + time.monotonic() - began
    chance = random.Random(seed)
    reached = kill_and_continue(folder / "killed", data, steps, kills, startup, chance, meshes)
    killed = read_records(folder / "killed")
    return {
        "kills": len(reached),
        "on record at each kill": reached,
        "steps": len(killed),
        "steps in order": [r["step"] for r in killed] == list(range(1, steps + 1)),
        "identical records": without_times(killed) == without_times(straight),
        "largest loss difference": largest_difference(killed, straight),
        "same samples": samples(killed) == samples(straight),
        "broken epochs": broken_epochs(samples(killed)),
        "seconds": round(time.monotonic() - began),
    }


def main(arguments: Sequence[str]) -> None:
    """The command of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--other_meshes", action="store_true")
    given = parser.parse_args(arguments)
    meshes = MESHES if given.other_meshes else ("",)
    with tempfile.TemporaryDirectory() as folder:
        found = experiment(Path(folder), given.kills, given.steps, given.seed, meshes)
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        folders, steps, mesh = sys.argv[2:4], int(sys.argv[4]), sys.argv[5].split()
        sizes = {axis: int(size) for axis, size in (entry.split("=") for entry in mesh)}
        train_once(*map(Path, folders), steps, sizes, int(sys.argv[6]))
    else:
        main(sys.argv[1:])
