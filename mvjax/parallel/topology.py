"""TPU pods that are not here: their devices, as the compiler knows them."""

import importlib.util
import re

import jax
from jax.experimental import topologies

# Axes of the torus of a slice, and what libtpu must be told to count a chip as one device.
_AXES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}


class NoCompiler(RuntimeError):
    """The library that compiles for TPUs is not installed."""


def pod_devices(topology: str, slices: int = 1) -> list[jax.Device]:
    """The devices of a TPU pod, to compile for (nothing can be run or placed on them).

    Args:
        topology: generation and chips along the axes of a slice, "v5e:4x4" or "v5p:8x8x8".
        slices: number of such slices, joined by the network of the data center.

    Raises:
        NoCompiler: if libtpu is not installed.
        ValueError: if there is no such topology.
    """
    generation, sizes = _parse(topology)
    if slices < 1:
        raise ValueError(f"the number of slices must be at least 1, got {slices}.")
    if importlib.util.find_spec("libtpu") is None:
        raise NoCompiler(
            "compiling for a TPU needs libtpu, which is not installed; "
            "pip install -r requirements-aot.txt (no TPU is needed)."
        )
    name, options = f"{generation}:{'x'.join(map(str, sizes))}", _OPTIONS.get(generation, {})
    try:
        found = topologies.get_topology_desc(name, "tpu", num_slices=slices, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(": ")[2].splitlines()[0]
        raise ValueError(
            f"libtpu knows no slice {name}: {reason}. Slices of one host and those made of whole "
            "hosts (4 chips, 2x2) exist, e.g. v5e:4x4, v5p:4x4x4, v6e:16x16."
        ) from error
    return list(found.devices)


def _parse(topology: str) -> tuple[str, list[int]]:
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    generation = match[1] if match else ""
    sizes = [int(size) for size in match[2].split("x")] if match else []
    if generation not in _AXES:
        raise ValueError(
            f"the topology {topology!r} is not known; it is a TPU generation "
            f"({', '.join(_AXES)}) and its chips along each axis, e.g. v5e:4x4 or v5p:8x8x8."
        )
    if len(sizes) != _AXES[generation]:
        raise ValueError(
            f"a slice of {generation} has {_AXES[generation]} axes, but {topology!r} gives "
            f"{len(sizes)}; e.g. {generation}:{'x'.join(['4'] * _AXES[generation])}."
        )
    return generation, sizes
