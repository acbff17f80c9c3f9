"""How 2B and 14B are split over 8 and 256 chips, parameter by parameter."""

import json
import math

import pytest
from sharding_dumps import FOLDER, as_text, dump, names, path_of

from mvjax.parallel import MESH_AXES

REGENERATE = "if it is meant, run `python tests/sharding_dumps.py` and look at the diff"


@pytest.mark.parametrize(("case", "topology"), names())
def test_shardings_are_those_on_file(case, topology):
    stored = path_of(case, topology).read_text()
    now = as_text(dump(case, topology))
    changed = sorted(set(now.splitlines()) ^ set(stored.splitlines()))
    assert now == stored, f"{changed[:4]} changed; {REGENERATE}"


def test_every_file_is_that_of_a_case():
    assert {path.name for path in FOLDER.iterdir()} == {path_of(*each).name for each in names()}


@pytest.mark.parametrize(("case", "topology"), names())
def test_nothing_large_is_whole_on_a_chip(case, topology):
    """What the devices hold together is little more than one copy per slice."""
    stored = json.loads(path_of(case, topology).read_text())
    mesh, fsdp = stored["mesh"], stored["mesh"]["fsdp"]
    assert tuple(mesh) == MESH_AXES and math.prod(mesh.values()) == int(topology)
    for section in ("parameters", "frozen backbone"):
        for name, row in stored[section].items():
            size = math.prod(row["shape"]) * {"float32": 4, "bfloat16": 2}[row["dtype"]]
            if size > 16 << 20:
                assert row["bytes per device"] * fsdp <= size, name


@pytest.mark.parametrize("case", ["2b_full", "14b_full"])
def test_optimizer_state_is_split_like_the_parameters(case):
    stored = json.loads(path_of(case, "256").read_text())["bytes per device"]
    counts = 16  # four int32 scalars: steps and skips
    assert stored["optimizer"] == 2 * stored["parameters"] + counts
