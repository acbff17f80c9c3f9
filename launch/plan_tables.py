"""Makes the tables of docs/pods.md: one run of `launch.plan` per line, kept in docs/plans.

    nice python -m launch.plan_tables

A line whose file is there is not computed again; remove the file to do so. One line takes two to
ten minutes and 3 GB on two cores. --only=v5e makes the lines with that in their name.
"""

import json
import subprocess
import sys
from pathlib import Path

from absl import flags

from launch.entry import run
from mvjax.training.plan_report import table

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- begin: launch.plan_tables -->\n", "<!-- end: launch.plan_tables -->\n"
ONLY = flags.DEFINE_string("only", "", "Part of the names of the lines to make.")

LORA = "--config=configs/bridge_video.py"
FULL = "--config=configs/bridge_video.py --config.lora.rank=0"
DECODER = "--config=configs/bridge_action.py"
BIG = "--config=configs/cosmos14b_video.py"
ONE, HALF = "--batch_per_chip=1", "--batch_per_chip=0.5"

# Title of a table, and its lines: a name and the arguments of launch.plan.
TABLES: dict[str, dict[str, str]] = {
    "Stage 1, 2B, LoRA of rank 256 and the adaLN weights": {
        "lora_v5e_8": f"{LORA} --topology=v5e:2x4 {ONE} --config.video_model.remat=full",
        "lora_v6e_8": f"{LORA} --topology=v6e:2x4 {ONE}",
        "lora_v5p_8": f"{LORA} --topology=v5p:2x2x2 {ONE}",
        "lora_v6e_64": f"{LORA} --topology=v6e:8x8 {ONE}",
        "lora_v5e_128": f"{LORA} --topology=v5e:8x16 {HALF} --config.mesh.context=2",
    },
    "Stage 1, 2B, all parameters": {
        "full_v5e_16": f"{FULL} --topology=v5e:4x4 {ONE} --config.video_model.remat=full",
        "full_v6e_8": f"{FULL} --topology=v6e:2x4 {ONE}",
        "full_v5p_8": f"{FULL} --topology=v5p:2x2x2 {ONE}",
        "full_v6e_256": f"{FULL} --topology=v6e:16x16 {ONE}",
        "full_v5p_512": f"{FULL} --topology=v5p:8x8x8 {ONE} --config.mesh.data=8",
        "full_v6e_1024": f"{FULL} --topology=v6e:16x16 --slices=4 {ONE} --config.mesh.data=4",
        "full_v5p_4096": f"{FULL} --topology=v5p:16x16x16 {ONE} --config.mesh.data=64",
    },
    "Stage 2, the action decoder on the frozen 2B backbone": {
        "decoder_v5e_8": f"{DECODER} --topology=v5e:2x4 {ONE}",
        "decoder_v6e_8": f"{DECODER} --topology=v6e:2x4 --batch_per_chip=3",
        "decoder_v5p_8": f"{DECODER} --topology=v5p:2x2x2 --batch_per_chip=8",
        "decoder_v5e_256": f"{DECODER} --topology=v5e:16x16 {ONE}",
    },
    "Stage 1, 14B, all parameters": {  # the configuration shares a clip between two chips
        "14b_v5p_32": f"{BIG} --topology=v5p:2x4x4 {HALF}",
        "14b_v6e_64": f"{BIG} --topology=v6e:8x8 {HALF}",
        "14b_v5p_4096": f"{BIG} --topology=v5p:8x8x8 --slices=8 {HALF} --config.mesh.data=8",
    },
}


def main() -> None:
    """Runs what is missing and rewrites the tables."""
    for lines in TABLES.values():
        for name, arguments in lines.items():
            if ONLY.value in name and not _file(name).exists():
                _plan(name, arguments)
    _write_tables()


def _file(name: str) -> Path:
    return DOCS / "plans" / f"{name}.json"


def _plan(name: str, arguments: str) -> None:
    print(f"{name}: python -m launch.plan {arguments}", flush=True)
    command = [sys.executable, "-m", "launch.plan", *arguments.split(), f"--json={_file(name)}"]
    done = subprocess.run(command, capture_output=True, text=True)
    print((done.stdout or done.stderr).strip(), flush=True)


def _write_tables() -> None:
    parts = []
    for title, lines in TABLES.items():
        made = {a: json.loads(_file(n).read_text()) for n, a in lines.items() if _file(n).exists()}
        missing = [f"    python -m launch.plan {a}\n" for a in lines.values() if a not in made]
        parts.append(f"### {title}\n\n{table(made)}\n")
        if missing:
            parts.append(f"Not computed yet:\n\n{''.join(missing)}\n")
    path = DOCS / "pods.md"
    before, rest = path.read_text().split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{''.join(parts)}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    run(main)
