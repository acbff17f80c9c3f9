"""TPU pods that are not here: their devices, as the compiler knows them."""

import importlib.util
import math
import re
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental import topologies

from mvjax.parallel import Chip, chip


@dataclass(frozen=True)
class _Generation:
    """Axes of a slice's torus; its devices as jax names and counts them; options of libtpu."""

    axes: int
    device_kind: str
    devices_per_chip: int = 1
    options: dict[str, str] = field(default_factory=dict)


_GENERATIONS = {
    # Without this a v4 chip counts as two devices.
    "v4": _Generation(3, "TPU v4", options={"chip_config_name": "megacore"}),
    "v5e": _Generation(2, "TPU v5 lite"),
    "v5p": _Generation(3, "TPU v5"),
    "v6e": _Generation(2, "TPU v6 lite"),
    "tpu7x": _Generation(3, "TPU7x", devices_per_chip=2),
}
_CHIPS_PER_HOST = 4


class NoCompiler(RuntimeError):
    """The library that compiles for TPUs is not installed."""


def pod_devices(topology: str, slices: int = 1) -> list[jax.Device]:
    """The devices of a TPU pod, to compile for (nothing can be run or placed on them).

    Args:
        topology: Generation and chips along the axes of a slice, "v5e:4x4" or "v5p:8x8x8".
        slices: Number of such slices, joined by the network of the data center.

    Raises:
        NoCompiler: If libtpu is not installed.
        ValueError: If there is no such topology.
    """
    generation, sizes = _parse(topology)
    if slices < 1:
        raise ValueError(f"the number of slices must be at least 1, got {slices}.")
    if importlib.util.find_spec("libtpu") is None:
        raise NoCompiler(
            "compiling for a TPU needs libtpu, which is not installed; "
            "pip install -r requirements-aot.txt (no TPU is needed)."
        )
    name = f"{generation}:{'x'.join(map(str, sizes))}"
    options: dict[str, Any] = dict(_GENERATIONS[generation].options)
    if math.prod(sizes) < _CHIPS_PER_HOST:  # else older versions of libtpu look for whole hosts
        options["chips_per_host_bounds"] = [*sizes, 1, 1][:3]
    try:
        found = topologies.get_topology_desc(name, "tpu", num_slices=slices, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(": ")[2].splitlines()[0]
        raise ValueError(
            f"libtpu knows no slice {name}: {reason}. Slices of one host and those made of whole "
            "hosts (4 chips, 2x2) exist, e.g. v5e:4x4, v5p:4x4x4, v6e:16x16."
        ) from error
    return list(found.devices)


def pod_size(topology: str, slices: int = 1) -> tuple[int, Chip]:
    """Number of devices of `pod_devices`, and what each of them can do; needs no libtpu."""
    generation, sizes = _parse(topology)
    known = _GENERATIONS[generation]
    return math.prod(sizes) * known.devices_per_chip * slices, chip(known.device_kind)


def generation(device_kind: str) -> str:
    """The generation of a TPU by jax's name for it, "TPU v5 lite" -> "v5e"; "" if not known."""
    known = _GENERATIONS.items()
    return next((name for name, kind in known if kind.device_kind == device_kind), "")


def _parse(topology: str) -> tuple[str, list[int]]:
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    generation = match[1] if match else ""
    sizes = [int(size) for size in match[2].split("x")] if match else []
    if generation not in _GENERATIONS:
        raise ValueError(
            f"the topology {topology!r} is not known; it is a TPU generation "
            f"({', '.join(_GENERATIONS)}) and its chips along each axis, e.g. v5e:4x4 or v5p:8x8x8."
        )
    axes = _GENERATIONS[generation].axes
    if len(sizes) != axes:
        raise ValueError(
            f"a slice of {generation} has {axes} axes, but {topology!r} gives {len(sizes)}; "
            f"e.g. {generation}:{'x'.join(['4'] * axes)}."
        )
    return generation, sizes
