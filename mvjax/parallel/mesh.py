"""The device mesh: which devices work together, and along which axis."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

MESH_AXES = ("data", "fsdp", "context", "tensor")
_TYPES = (AxisType.Auto,) * len(MESH_AXES)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices of every process in a mesh with axes data, fsdp, context, tensor.

    `data` copies the parameters and splits the batch; `fsdp` splits both; `context` splits the
    token sequence; `tensor` splits heads and MLP columns. Axis types are Auto: the compiler fills
    in what the rules table leaves open.

    Several TPU slices are joined along `data`: the network between slices is much slower than the
    links inside one, and only `data` is content with one exchange of gradients per step.

    Args:
        sizes: Devices per axis, e.g. `{"data": -1, "fsdp": 4}`. An axis not given is 1; one axis
            may be -1, which means all remaining devices.
        devices: The devices to use; all of them when None.

    Raises:
        ValueError: On an unknown axis, or if the sizes do not multiply to the device count, or if
            `data` is not a multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = _resolve(sizes, len(devices))
    return Mesh(_arrange(shape, devices), MESH_AXES, axis_types=_TYPES)


def abstract_mesh(sizes: Mapping[str, int], device_count: int) -> AbstractMesh:
    """As `make_mesh` for so many devices, without devices: shapes can be split over it.

    Raises:
        ValueError: As `make_mesh`, but for what concerns slices.
    """
    return AbstractMesh(_resolve(sizes, device_count), MESH_AXES, axis_types=_TYPES)


def _arrange(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """The devices in the mesh's shape, neighbours of the physical network beside each other."""
    slices = slice_count(devices)
    data, *inside = shape
    if data % slices:
        raise ValueError(
            f"mesh data={data} is not a multiple of the {slices} slices, and only data can span "
            f"slices: set config.mesh.data to a multiple of {slices}."
        )
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *inside), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )


def slice_count(devices: Sequence[jax.Device]) -> int:
    """Number of TPU slices that devices are in; 1 for other devices.

    GPUs have a slice_index too; they reach other hosts fast enough for every axis.
    """
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def _resolve(sizes: Mapping[str, int], device_count: int) -> tuple[int, ...]:
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise ValueError(f"mesh has the unknown axis {unknown[0]!r}; the axes are {MESH_AXES}.")
    sizes = {axis: int(sizes.get(axis, 1)) for axis in MESH_AXES}
    given = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh sizes must be positive, at most one of them -1; got {given}.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if device_count % fixed or (not open_axes and fixed != device_count):
        kind = "a divisor of" if open_axes else "exactly"
        raise ValueError(
            f"mesh {given} needs {kind} the device count with a product of {fixed}, but there are "
            f"{device_count} devices; change config.mesh (one axis may be -1 for the rest)."
        )
    return tuple(device_count // fixed if size == -1 else size for size in sizes.values())
