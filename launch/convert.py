"""Converts weights between PyTorch files and checkpoints of this project, in both directions.

    python -m launch.convert SOURCE DEST
    python -m launch.convert SOURCE DEST --to=diffusers|nvidia|mimic-video

The first command imports. SOURCE is recognised by its content: a .pt file of NVIDIA or mimic-video
with a video DiT, action decoder or VAE; a folder of diffusers or Hugging Face (also T5); the
released statistics of a dataset, or a run's normalizer.json (both become DEST/normalizer.json).
`launch.train`, `launch.evaluate` and `launch.generate` take DEST as a checkpoint. The second
command exports: SOURCE is a training directory or a converted checkpoint; of a joint run,
mimic-video's two files are written into the folder DEST. PyTorch need not be installed, and code
inside a file is never run.
"""

from pathlib import Path

import numpy as np
from absl import flags

from data_pipelines.normalize import looks_like_statistics, released_normalizer
from data_pipelines.progress import Bar
from launch.entry import run
from mvjax.models.layers import PRECISIONS
from mvjax.training.checkpoint import checkpoint_folder
from mvjax.weights.convert import (
    TARGETS,
    describe_conversion,
    describe_export,
    give_statistics,
    prepare,
    prepare_exports,
    write,
    write_export,
)
from mvjax.weights.kinds import Hints
from mvjax.weights.source import open_source

TO = flags.DEFINE_enum(
    "to", None, TARGETS, "Export SOURCE, a checkpoint of this project, in this layout."
)
LORA = flags.DEFINE_enum(
    "lora", "merge", ("merge", "keep"), "Merge LoRA adapters into the weights, or keep them."
)
ALPHA = flags.DEFINE_float(
    "lora_alpha", 32.0, "LoRA alpha of the adapters, which files do not store."
)
EMA = flags.DEFINE_bool("ema", False, "Use the moving average in an NVIDIA file (net_ema.*).")
DTYPE = flags.DEFINE_enum(
    "dtype", "", ("", "float32", "bfloat16"), "Type of the written weights; default: as in SOURCE."
)
ROPE = flags.DEFINE_list(
    "rope_ratio_thw", None, "Rotary ratios t,h,w of a video DiT; default: those of a released size."
)
PROPRIO = flags.DEFINE_integer("proprio_horizon", 1, "Proprioception steps of an action decoder.")
PRECISION = flags.DEFINE_enum(
    "precision", "bfloat16", PRECISIONS, "Default precision of the network's arithmetic."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Describe the conversion without writing anything.")
VERIFY = flags.DEFINE_bool(
    "verify", False, "Compare weights and outputs with PyTorch's; needs the extra mvjax[torch]."
)


def main(source: str, destination: str) -> None:
    """Converts SOURCE into DEST."""
    source, destination = Path(source), Path(destination)
    if TO.value:
        _export(source, destination)
    elif checkpoint_folder(source).is_dir():
        targets = "|".join(TARGETS)
        raise ValueError(f"{source} is a checkpoint already; give --to={targets} to export it.")
    elif looks_like_statistics(source):
        _statistics(source, destination)
    else:
        _import(source, destination)


def _import(source: Path, destination: Path) -> None:
    opened = open_source(source, _hints(), ema=EMA.value)
    try:
        conversion = prepare(opened, lora=LORA.value, alpha=ALPHA.value, dtype=DTYPE.value)
    except ValueError as error:
        raise ValueError(f"{source} looks like a {opened.kind.title}, but {error}") from error
    print(describe_conversion(conversion, destination))
    if DRY_RUN.value:
        return
    with _bar(conversion.nbytes) as bar:
        write(conversion, destination, bar.update)
    if VERIFY.value:
        # Not at the top: only this part needs torch.
        from launch.benchmarks.verify_weights import verify

        print(verify(conversion, destination))


def _export(source: Path, destination: Path) -> None:
    exports = prepare_exports(source, destination, TO.value, lora=LORA.value, dtype=DTYPE.value)
    for path, export in exports.items():
        print(describe_export(export, source, path))
    if DRY_RUN.value:
        return
    with _bar(sum(t.nbytes for export in exports.values() for t in export.tensors.values())) as bar:
        for path, export in exports.items():
            write_export(export, path, bar.update)


def _statistics(source: Path, destination: Path) -> None:
    normalizer = released_normalizer(source)
    for key, statistics in normalizer.statistics.items():
        steps, dim = np.shape(statistics["mean"])
        names = normalizer.streams.get(key, ())  # of the release's streams
        named = f" ({', '.join(names)})" if names else ""
        print(f"{source}: {key} of {steps} steps and {dim} numbers{named}")
    print(f"into {destination / 'normalizer.json'}")
    if not DRY_RUN.value:
        give_statistics(normalizer, destination)


def _hints() -> Hints:
    if ROPE.value is None:
        return Hints(None, PROPRIO.value, PRECISION.value)
    try:
        t, h, w = map(float, ROPE.value)
    except ValueError:
        given = ",".join(ROPE.value)
        raise ValueError(f"--rope_ratio_thw must be t,h,w, e.g. 1,3,3; got {given!r}.") from None
    return Hints((t, h, w), PROPRIO.value, PRECISION.value)


def _bar(nbytes: int) -> Bar:
    # The delay keeps the bar away from an error at the start.
    return Bar(total=nbytes, desc="tensors", delay=0.5, unit="B", unit_scale=True)


if __name__ == "__main__":
    run(main, positional=("SOURCE", "DEST"))
