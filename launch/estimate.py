"""Estimates memory and time of a training step or a query on a TPU pod, without a TPU.

    python -m launch.estimate --config=configs/bridge_video.py --topology=v6e:2x4 --batch_per_chip=1
    python -m launch.estimate --config=configs/bridge_action.py --topology=v6e:1x1 --policy

The program is compiled, not run, which takes minutes. For several slices, add --slices=4
--config.mesh.data=4. --search finds the mesh, the rematerialisation and the batch. Settings are
changed as for `launch.train`. How to read the output: docs/pods.md. Needs libtpu: pip install
'mvjax[tpu]'.
"""

import os

from launch.tpu_compiler import ENVIRONMENT

os.environ.update(ENVIRONMENT)  # jax and libtpu read it on import

from pathlib import Path

import jax
from absl import flags

from data_pipelines.atomic import write_json
from launch.entry import config_flag, path_flag, run
from mvjax.experiment import Experiment
from mvjax.pods.compile import batch_size, estimate
from mvjax.pods.query import estimate_queries, query_report
from mvjax.pods.report import report
from mvjax.pods.search import Found, search
from mvjax.pods.topology import pod_devices, pod_size

CONFIG = config_flag()
TOPOLOGY = path_flag(
    "topology", "TPU generation and chips of a slice, such as v5e:4x4 or v5p:8x8x8."
)
SLICES = flags.DEFINE_integer("slices", 1, "Number of slices, joined along the data axis.")
BATCH_PER_CHIP = flags.DEFINE_float(
    "batch_per_chip",
    None,
    "Clips per chip, instead of training.batch_size; 0.5: two chips share a clip.",
)
SEARCH = flags.DEFINE_bool(
    "search",
    False,
    "Find the mesh and the rematerialisation with the least time per clip and, without "
    "--batch_per_chip, the largest batch.",
)
MAX_COMPILES = flags.DEFINE_integer(
    "max_compiles", 12, "Largest number of programs that --search compiles.", lower_bound=1
)
POLICY = flags.DEFINE_bool(
    "policy", False, "Estimate queries of the policy instead of a training step."
)
BATCHES = flags.DEFINE_list("batches", ["1", "8"], "With --policy: numbers of queries at a time.")
JSON = flags.DEFINE_string("json", None, "JSON file to write the figures to.")
HLO = flags.DEFINE_string(
    "hlo",
    None,
    "File to write the text of the compiled program to; with --policy, one file for each stage of "
    "the first batch, such as FILE.encode.hlo.",
)


def main() -> None:
    """Prints the estimate."""
    for name, file in (("json", JSON.value), ("hlo", HLO.value)):
        # Before the compiler's minutes, not after them.
        if file and not Path(file).absolute().parent.is_dir():
            raise ValueError(f"--{name}={file} is in no folder that exists; make the folder first.")
    experiment = Experiment.from_config(CONFIG.value)
    if POLICY.value:
        _policy(experiment)
        return
    devices = pod_devices(TOPOLOGY.value, SLICES.value)
    per_chip, ended = BATCH_PER_CHIP.value, []
    size = None if per_chip is None else batch_size(per_chip, len(devices))
    if SEARCH.value:
        found = _search(experiment, devices, size)
        experiment, made = found.experiment, found.estimate
        ended = [f"largest     {found.ended}", f"train with  {found.flags}"]
    else:
        if size is not None:
            experiment = experiment.changed({"training.batch_size": size})
        made = estimate(experiment, devices)
    print("\n".join([report(experiment, TOPOLOGY.value, made), *ended]))
    if HLO.value:
        Path(HLO.value).write_text(made.hlo)
    if JSON.value:
        about = dict(topology=TOPOLOGY.value, stage=experiment.stage, remat=experiment.video.remat)
        write_json(Path(JSON.value), about | made.figures)


def _search(experiment: Experiment, devices: list[jax.Device], size: int | None) -> Found:
    return search(
        experiment,
        devices=len(devices),
        slices=SLICES.value,
        hbm_bytes=pod_size(TOPOLOGY.value)[1].hbm_bytes,
        compiled=lambda candidate: estimate(candidate, devices),
        batch_size=size,
        max_compiles=MAX_COMPILES.value,
    )


def _policy(experiment: Experiment) -> None:
    if not all(size.isdecimal() and int(size) for size in BATCHES.value):
        raise ValueError(
            f"--batches must be numbers of queries, e.g. 1,8; got {','.join(BATCHES.value)!r}."
        )
    if SLICES.value != 1 or SEARCH.value or BATCH_PER_CHIP.value is not None:
        raise ValueError(
            "--policy answers queries on the chips of one slice: it goes with --batches, not with "
            "--slices, --search or --batch_per_chip."
        )
    devices = pod_devices(TOPOLOGY.value)
    made = [estimate_queries(experiment, devices, int(size)) for size in BATCHES.value]
    print(query_report(TOPOLOGY.value, made))
    if HLO.value:
        for stage, text in made[0].hlo.items():
            file = Path(HLO.value)
            file.with_name(f"{file.stem}.{stage}{file.suffix}").write_text(text)
    if JSON.value:
        queries = [one.figures for one in made]
        write_json(Path(JSON.value), dict(topology=TOPOLOGY.value, queries=queries))


if __name__ == "__main__":
    run(main)
