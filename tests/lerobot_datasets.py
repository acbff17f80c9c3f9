"""The LeRobot datasets that the lerobot package wrote (fixtures/make_lerobot_v*.py), and damage."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq

from data_pipelines.sources.formats import open_dataset

FIXTURES = Path(__file__).parent / "fixtures"
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
NAMES = ("lerobot_v21", "lerobot_v30", "lerobot_v30_converted")
LENGTHS = (6, 9, 5)
FIRST = (0, 6, 15)
OPEN, CLOSE, WIPE = "open the drawer", "close the drawer – gently", "wipe the table"


def opened(path, **options):
    return open_dataset("lerobot", path, "drawers", "arm", options)


def copy_of(name: str, folder: Path, **changes) -> Path:
    """A dataset to break, with changes to its info.json."""
    root = shutil.copytree(FIXTURES / name, folder / name, dirs_exist_ok=True)
    file = root / "meta/info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return root


def data_file(root: Path, episode: int) -> Path:
    return sorted(root.glob("data/*/*.parquet"))[episode if "v21" in root.name else 0]


def rewrite(file: Path, **columns) -> None:
    """Replace columns of a parquet file; None takes one out."""
    table = pq.read_table(file)
    for key, values in columns.items():
        at = table.schema.get_field_index(key)
        table = table.remove_column(at)
        if values is not None:
            table = table.add_column(at, key, values)
    pq.write_table(table, file)
