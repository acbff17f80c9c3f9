"""Makes the tables of docs/pods.md: one run of `launch.estimate` per line, kept in docs/estimates.

    nice python -m launch.benchmarks.pod_tables

A line is computed if it has no file yet, or if figures that need no compiler (parameters, shapes
and shardings, FLOPs, the chip) differ from its file. To compute a line again, remove its file. One
line takes two to ten minutes and 3 GB on two cores. --lines=v5e makes only the lines with v5e in
their name.
"""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from launch.entry import run
from mvjax.experiment import Experiment
from mvjax.parallel import abstract_mesh
from mvjax.pods.compile import Estimate, batch_size, before_compiling
from mvjax.pods.report import table
from mvjax.pods.topology import pod_size
from mvjax.training.bridge import abstract_backbone
from mvjax.training.step import make_program

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = (f"<!-- {word}: launch.benchmarks.pod_tables -->\n" for word in ("begin", "end"))
CHOSEN = flags.DEFINE_string(
    "lines", "", "Make only the lines with this text in their name; all by default."
)

LORA = "--config=configs/bridge_video.py"
FULL = "--config=configs/bridge_video.py --config.lora.rank=0"
DECODER = "--config=configs/bridge_action.py"
BIG = "--config=configs/cosmos14b_video.py"
BIG_LORA = "--config=configs/cosmos14b_video.py:lora"
# A file of an earlier version that lacks one of these is computed again.
_FIGURES = {field.name for field in fields(Estimate) if field.name != "hlo"}
ONE, HALF = "--batch_per_chip=1", "--batch_per_chip=0.5"
LONG = "--batch_per_chip=0.125 --config.mesh.context=8 --config.clip.future_frames=248"

# Title of a table, and its lines: a name and the arguments of launch.estimate.
TABLES: dict[str, dict[str, str]] = {
    "Stage 1, 2B, LoRA of rank 256 and the adaLN weights": {
        "lora_v5e_8": f"{LORA} --topology=v5e:2x4 {ONE}",
        "lora_v6e_8": f"{LORA} --topology=v6e:2x4 {ONE}",
        "lora_v6e_8_offload": f"{LORA} --topology=v6e:2x4 {ONE} --config.video_model.remat=offload",
        "lora_v5p_8": f"{LORA} --topology=v5p:2x2x2 {ONE}",
        "lora_tpu7x_4": f"{LORA} --topology=tpu7x:2x2x1 {ONE}",
        "lora_v6e_64": f"{LORA} --topology=v6e:8x8 {ONE}",
        "lora_v5e_128": f"{LORA} --topology=v5e:8x16 {HALF} --config.mesh.context=2",
    },
    "Stage 1, 2B, all parameters": {
        "full_v5e_16": f"{FULL} --topology=v5e:4x4 {ONE}",
        "full_v6e_8": f"{FULL} --topology=v6e:2x4 {ONE}",
        "full_v5p_8": f"{FULL} --topology=v5p:2x2x2 {ONE}",
        "full_v5p_64": f"{FULL} --topology=v5p:4x4x4 {ONE}",
        "full_v6e_256": f"{FULL} --topology=v6e:16x16 {ONE}",
        "full_v5p_512": f"{FULL} --topology=v5p:8x8x8 {ONE} --config.mesh.data=8",
        "full_v6e_1024": f"{FULL} --topology=v6e:16x16 --slices=4 {ONE} --config.mesh.data=4",
        "full_v5p_4096": f"{FULL} --topology=v5p:16x16x16 {ONE} --config.mesh.data=64",
    },
    "Stage 1, 2B, all parameters, videos of 253 frames, eight chips a clip": {
        "long_v5p_8": f"{FULL} --topology=v5p:2x2x2 {LONG}",
    },
    "Stage 2, the action decoder on the frozen 2B backbone": {
        "decoder_v5e_8": f"{DECODER} --topology=v5e:2x4 {ONE}",
        "decoder_v6e_8": f"{DECODER} --topology=v6e:2x4 {ONE}",
        "decoder_v6e_8_3": f"{DECODER} --topology=v6e:2x4 --batch_per_chip=3",
        "decoder_v5p_8": f"{DECODER} --topology=v5p:2x2x2 {ONE}",
        "decoder_v5p_8_8": f"{DECODER} --topology=v5p:2x2x2 --batch_per_chip=8",
        "decoder_v5e_256": f"{DECODER} --topology=v5e:16x16 {ONE}",
    },
    "Stage 1, 14B, LoRA of rank 32 and the adaLN weights": {
        "14b_lora_v6e_32": f"{BIG_LORA} --topology=v6e:4x8 {HALF}",
        "14b_lora_v5p_16": f"{BIG_LORA} --topology=v5p:2x2x4 {HALF}",
    },
    "Stage 1, 14B, all parameters": {  # the configuration shares a clip between two chips
        "14b_v5p_32": f"{BIG} --topology=v5p:2x4x4 {HALF}",
        "14b_v6e_64": f"{BIG} --topology=v6e:8x8 {HALF}",
        "14b_v5p_4096": f"{BIG} --topology=v5p:8x8x8 --slices=8 {HALF} --config.mesh.data=8",
    },
}


def main() -> None:
    """Computes the lines that are missing or outdated, and rewrites the tables."""
    lines = [line for rows in TABLES.values() for line in rows.items()]
    old = [(n, a) for n, a in lines if not file_of(n).exists() or changes(n, a)]
    failed = [name for name, a in old if CHOSEN.value in name and not _estimate(name, a)]
    page = DOCS / "pods.md"
    page.write_text(with_tables(page.read_text()))
    if failed:
        raise ValueError(f"no figures for {', '.join(failed)}; the reasons are above.")


def file_of(name: str) -> Path:
    """The file of a line's figures."""
    return DOCS / "estimates" / f"{name}.json"


def changes(name: str, arguments: str) -> list[str]:
    """Differences to the file of a line that show without a compiler: "field: then -> now"."""
    then, now = json.loads(file_of(name).read_text()), _shapes(arguments)
    missing = [f"{key}: not in the file" for key in _FIGURES if key not in then]
    changed = [f"{key}: {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key]]
    return changed + missing


def _shapes(arguments: str) -> dict[str, Any]:
    """The figures of `launch.estimate` for these arguments that need no compiler."""
    words, values = ["launch.estimate", *arguments.split()], flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=words)
    flags.DEFINE_string("topology", None, "", flag_values=values)
    flags.DEFINE_integer("slices", 1, "", flag_values=values)
    flags.DEFINE_float("batch_per_chip", None, "", flag_values=values)
    values(words)
    config, (devices, kind) = values.config, pod_size(values.topology, values.slices)
    config.training.batch_size = batch_size(values.batch_per_chip, devices)
    experiment = Experiment.from_config(config)
    program = make_program(experiment, abstract_mesh(config.mesh, devices), abstract_backbone)
    then = dict(topology=values.topology, slices=values.slices, stage=experiment.stage)
    then["remat"] = experiment.video.remat
    return then | before_compiling(experiment, program, kind)


def _estimate(name: str, arguments: str) -> bool:
    print(f"{name}: python -m launch.estimate {arguments}", flush=True)
    command = ["-m", "launch.estimate", *arguments.split(), f"--json={file_of(name)}"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    print((done.stdout or done.stderr).strip(), flush=True)
    return done.returncode == 0


def with_tables(page: str) -> str:
    """The page with the tables made from the files."""
    parts = []
    for title, lines in TABLES.items():
        files = {arguments: file_of(name) for name, arguments in lines.items()}
        stored = {a: json.loads(file.read_text()) for a, file in files.items() if file.exists()}
        made = {a: figures for a, figures in stored.items() if _FIGURES <= figures.keys()}
        missing = [f"    python -m launch.estimate {a}\n" for a in lines.values() if a not in made]
        parts.append(f"### {title}\n\n{table(made)}\n")
        if missing:
            parts.append(f"Not computed yet:\n\n{''.join(missing)}\n")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{''.join(parts)}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    run(main)
