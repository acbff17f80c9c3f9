"""The released `dataset_statistics/*.json` as a normalizer of what the released decoders read.

The release normalises every stream by itself and concatenates position (3), rotation (6) and
gripper (1); its keys are `action/<stream>` and `obs/<stream>`, e.g. `obs/eef_pos_lowdim`.
Positions and grippers are normalised by VARIANCE, rotations left as they are (mimic-video release,
`configs/dataloading/policy_io`).
"""

import json
from pathlib import Path

import numpy as np

from data_pipelines.normalization.normalizer import Mode, Normalizer, concat_statistics

STREAMS = {"pos": Mode.VARIANCE, "rot": Mode.IDENTITY, "gripper": Mode.VARIANCE}  # in their order
GROUPS = {"actions": "action/", "proprio": "obs/"}


def looks_like_statistics(path: Path) -> bool:
    """Whether a file is JSON rather than weights."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"{")


def released_normalizer(path: Path) -> Normalizer:
    """Reads released statistics as the normalizer of "actions" and "proprio".

    Args:
        path: the JSON file.

    Raises:
        ValueError: if the file is damaged or has other entries than the releases.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); copy or download it again.") from error
    incomplete = [k for k, v in content.items() if not isinstance(v, dict) or "mean" not in v]
    if incomplete:
        raise ValueError(
            f"{path} is no file of statistics: {', '.join(incomplete)} lack min, max, mean, std ..."
        )
    statistics, modes = {}, {}
    for name, prefix in GROUPS.items():
        keys = _in_order(path, [key for key in content if key.startswith(prefix)], prefix)
        try:
            statistics[name] = concat_statistics(content, keys)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: the entries {', '.join(keys)} lack {error}.") from error
        dims = [np.shape(content[key]["mean"])[-1] for key in keys]
        modes[name] = [m for m, dim in zip(STREAMS.values(), dims) for _ in range(dim)]
    return Normalizer(statistics, modes, f"released {path.name}")


def _in_order(path: Path, keys: list[str], prefix: str) -> list[str]:
    ordered = [k for s in STREAMS for k in keys if f"_{s}_" in f"_{k.removeprefix(prefix)}_"]
    if len(ordered) != len(STREAMS) or len(keys) != len(STREAMS):
        raise ValueError(
            f"{path} must hold one position, one rotation and one gripper entry below {prefix!r}, "
            f"as the releases do; it has {', '.join(keys) or 'none'}."
        )
    return ordered
