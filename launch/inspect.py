"""Inspects a dataset: prints its contents and problems, and writes an HTML page.

    python -m launch.inspect DATASET
    python -m launch.inspect DATASET --format=lerobot --option=key=value --out=report.html
    python -m launch.inspect NAME --config=quickstart_video

DATASET is a folder or file of any supported format, or a folder of records of `launch.encode`. With
--config, it is the name of a dataset in the configuration, and what encoding would skip is listed
too. The command reads metadata, numbers and a few frames of up to --episodes episodes; --thorough
decodes every frame. Unreadable episodes are listed. Formats: docs/formats.md.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from data_pipelines.inspect import Inspection, Wanted, inspect_dataset, inspect_path
from data_pipelines.inspect_page import write_page
from data_pipelines.inspect_records import inspect_records, is_records
from data_pipelines.inspect_text import describe
from data_pipelines.shards import StoredTexts
from data_pipelines.sources.formats import FORMATS, detect, open_config
from launch.entry import config_flag, run

CONFIG = config_flag(required=False)
FORMAT = flags.DEFINE_enum("format", None, sorted(FORMATS), "Format of DATASET; default: detected.")
OPTION = flags.DEFINE_multi_string("option", [], "KEY=VALUE for the format; may be repeated.")
OUT = flags.DEFINE_string("out", None, "HTML page to write; default: none.")
EPISODES = flags.DEFINE_integer(
    "episodes", 1000, "Largest number of episodes to read; 0: all.", lower_bound=0
)
THOROUGH = flags.DEFINE_bool("thorough", False, "Decode every frame.")
STRICT = flags.DEFINE_bool("strict", False, "Exit with 1 if there is any problem.")


def main(dataset: str) -> int:
    """Inspects DATASET."""
    if OUT.value and Path(OUT.value).is_dir():
        raise ValueError(f"--out must be an .html file, but {OUT.value} is a folder.")
    found = _inspect(dataset)
    print(describe(found))
    if OUT.value:
        write_page(found, Path(OUT.value))
        print(f"\n  page: {OUT.value}")
    if not found.readable:
        first = f": {found.problems[0].text}" if found.problems else ""
        raise ValueError(f"no episode of {dataset} could be read{first}.")
    return 1 if STRICT.value and found.problems else 0


def _inspect(dataset: str) -> Inspection:
    path, how = Path(dataset), dict(limit=EPISODES.value, thorough=THOROUGH.value)
    if CONFIG.value is not None:
        config = CONFIG.value
        sections = config.datasets
        if dataset not in sections:
            raise ValueError(
                f"the configuration has no dataset {dataset!r}; it has {', '.join(sections)}."
            )
        section, text = sections[dataset], config.text
        stored = config.text_encoder == "stored"
        texts = StoredTexts(text.length, text.dim) if stored else None
        anchor_fps = section.get("anchor_fps")
        wanted = Wanted(section, config.policy_io, config.clip, anchor_fps, texts)
        episodes = open_config(section)
        return inspect_dataset(episodes, dataset, section.format, wanted=wanted, **how)
    if is_records(path):
        return inspect_records(path, thorough=THOROUGH.value)
    return inspect_path(path, FORMAT.value or detect(path), _options(), **how)


def _options() -> dict[str, Any]:
    options = {}
    for given in OPTION.value:
        key, equals, value = given.partition("=")
        if not equals:
            raise ValueError(f"--option must be KEY=VALUE, got {given!r}.")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:  # an unquoted string
            options[key] = value
    return options


if __name__ == "__main__":
    run(main, positional=("DATASET",))
