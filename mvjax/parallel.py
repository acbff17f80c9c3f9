"""Several devices as one: the mesh, the sharding rules, the start of several processes, the chips.

The sharding rules are one table from logical axis names to mesh axes. Parameters, batches and
activations name their dimensions ("embed", "heads", ...); the table says over which mesh axes such
a dimension is split. `config.rules` overrides single entries: `{"embed": None}` keeps parameters
whole, `{"batch": "data"}` leaves fsdp out of the batch. It is read with two rules:

- A mesh axis is used once per array; the leftmost dimension that asks for it gets it. So an
  activation (batch, length, embed) is split over fsdp by its batch, a parameter by its embed.
- A parameter or batch dimension that its mesh axes do not divide is an error that names it: silent
  replication would cost memory on every device. An activation is left whole there instead, since
  short sequences (a few action tokens) pass through the same code as long ones.
"""

import atexit
import contextlib
import logging
import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

log = logging.getLogger(__name__)

Axes = tuple[str | None, ...]  # a logical name per dimension; None: whole
Rules = Mapping[str, tuple[str, ...]]

MESH_AXES = ("data", "fsdp", "context", "tensor")
_TYPES = (AxisType.Auto,) * len(MESH_AXES)

DEFAULT_RULES: Rules = MappingProxyType(
    {
        "batch": ("data", "fsdp"),  # samples
        "length": ("context",),  # tokens of the video sequence
        "embed": ("fsdp",),  # residual width: the axis by which parameters are stored split
        "mlp": ("tensor",),  # hidden width of the MLP
        "heads": ("tensor",),  # attention heads, or heads x head_dim in one dimension
        "layers": (),  # the stacked blocks; scanned, so never split
        "lora": (),  # adapter rank
    }
)


# --- The mesh: which devices work together, and along which axis ---


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
    shape, slices = _resolve(sizes, len(devices)), slice_count(devices)
    data, *inside = shape
    if data % slices:
        raise ValueError(
            f"mesh data={data} is not a multiple of the {slices} slices, and only data can span "
            f"slices: set config.mesh.data to a multiple of {slices}."
        )
    # Neighbours on an axis of the mesh should be neighbours in the physical network.
    if slices == 1:
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        arranged = mesh_utils.create_hybrid_device_mesh(
            (data // slices, *inside), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(arranged, MESH_AXES, axis_types=_TYPES)


def abstract_mesh(sizes: Mapping[str, int], device_count: int) -> AbstractMesh:
    """As `make_mesh` for so many devices of one slice, without devices: for shapes alone."""
    return AbstractMesh(_resolve(sizes, device_count), MESH_AXES, axis_types=_TYPES)


def slice_count(devices: Sequence[jax.Device]) -> int:
    """Number of TPU slices that devices are in; 1 for other devices.

    GPUs have a slice_index too; they reach other hosts fast enough for every axis.
    """
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def _resolve(sizes: Mapping[str, int], device_count: int) -> tuple[int, ...]:
    """The size of every axis of `MESH_AXES`, a -1 worked out."""
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
        wrong = "which does not divide" if open_axes else "which is not"
        raise ValueError(
            f"mesh {given}: the sizes have the product {fixed}, {wrong} the number of devices, "
            f"{device_count}; change config.mesh (one axis may be -1 for all remaining devices)."
        )
    return tuple(device_count // fixed if size == -1 else size for size in sizes.values())


# --- The rules: from logical axes to shardings ---


def make_rules(overrides: Mapping[str, Any] | None = None) -> Rules:
    """The default table with `overrides` (axis name -> mesh axis, several, or None) applied."""
    rules = dict(DEFAULT_RULES)
    for name, value in (overrides or {}).items():
        mesh_axes = (value,) if isinstance(value, str) else tuple(value or ())
        wrong = sorted(set(mesh_axes) - set(MESH_AXES))
        if wrong:
            raise ValueError(
                f"rules[{name!r}] names the mesh axis {wrong[0]!r}; the axes are {MESH_AXES}."
            )
        rules[name] = mesh_axes
    return MappingProxyType(rules)


def spec(axes: Axes, rules: Rules) -> PartitionSpec:
    """The partition of an array whose dimensions have the given logical names (None: whole)."""
    return PartitionSpec(*map(_entry, _mesh_axes(axes, rules)))


def split_ways(axis: str, mesh: Mesh, rules: Rules) -> int:
    """Over how many devices a dimension with this logical name is split."""
    return _ways(rules[axis], mesh)


def sharding_tree(axes: Any, mesh: Mesh, rules: Rules, abstract: Any = None) -> Any:
    """NamedShardings for a nested dict of logical axes.

    Args:
        axes: Nested dict whose leaves are tuples of logical axis names.
        mesh: The mesh of `make_mesh`.
        rules: The table of `make_rules`.
        abstract: The same tree with shaped leaves; when given, divisibility is checked.

    Raises:
        ValueError: Naming the parameter whose structure, rank or size does not fit.
    """

    def walk(axes: Any, abstract: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(axes, dict):
            if abstract is not None:
                _check_leaf("/".join(path), axes, abstract.shape, mesh, rules)
            return NamedSharding(mesh, spec(axes, rules))
        if abstract is None:
            return {name: walk(value, None, path) for name, value in axes.items()}
        if not isinstance(abstract, dict) or set(axes) != set(abstract):
            there = sorted(abstract) if isinstance(abstract, dict) else "an array"
            raise ValueError(
                f"the axes of {'/'.join(path) or 'the tree'} name {sorted(axes)}, "
                f"but the arrays there are {there}."
            )
        return {name: walk(axes[name], abstract[name], (*path, name)) for name in axes}

    return walk(axes, abstract, ())


def _check_leaf(name: str, axes: Axes, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> None:
    if len(axes) != len(shape):
        raise ValueError(f"{name} has shape {shape} but the logical axes {axes}.")
    for axis, size, mesh_axes in zip(axes, shape, _mesh_axes(axes, rules)):
        if size % _ways(mesh_axes, mesh):
            raise ValueError(
                f"{name} has shape {shape}; its dimension {axis!r} of {size} cannot be split over "
                f"{' x '.join(mesh_axes)} = {_ways(mesh_axes, mesh)} devices; change config.mesh, "
                f"or set config.rules[{axis!r}] = None to keep it whole."
            )


def _mesh_axes(axes: Axes, rules: Rules) -> list[tuple[str, ...]]:
    """The mesh axes that each dimension gets, every mesh axis once."""
    used: set[str] = set()
    result = []
    for name in axes:
        if name is not None and name not in rules:
            raise ValueError(
                f"the logical axis {name!r} is not in the sharding rules (known: "
                f"{', '.join(sorted(rules))}); add it to config.rules."
            )
        mesh_axes = tuple(a for a in (rules[name] if name is not None else ()) if a not in used)
        used.update(mesh_axes)
        result.append(mesh_axes)
    return result


def _entry(mesh_axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return mesh_axes if len(mesh_axes) > 1 else (mesh_axes[0] if mesh_axes else None)


def _ways(mesh_axes: tuple[str, ...], mesh: Any) -> int:
    return math.prod(mesh.shape[axis] for axis in mesh_axes)


# Networks name the axes of their activations and know no rules: those of the caller are in force.
_ACTIVE: ContextVar[Rules | None] = ContextVar("mvjax_sharding_rules", default=None)


@contextlib.contextmanager
def use_rules(rules: Rules) -> Iterator[None]:
    """Makes `constrain` act with this table inside the block (also while tracing)."""
    token = _ACTIVE.set(rules)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks the compiler to split activation `x` by its logical axes, one name per dimension.

    The identity when no rules or no mesh (`jax.set_mesh`) are active, so models run anywhere.
    """
    partition = activation_spec(x.shape, *axes)
    return x if partition is None else jax.lax.with_sharding_constraint(x, partition)


def activation_spec(shape: tuple[int, ...], *axes: str | None) -> PartitionSpec | None:
    """How an activation of this shape is split, one logical axis per dimension; None: it is not.

    A dimension that its mesh axes do not divide is left whole.
    """
    rules, mesh = _ACTIVE.get(), jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty:
        return None
    if len(axes) != len(shape):
        raise ValueError(f"constrain got the axes {axes} for an array of shape {shape}.")
    divides = lambda size, mesh_axes: size % _ways(mesh_axes, mesh) == 0  # noqa: E731
    return PartitionSpec(
        *(
            _entry(mesh_axes if divides(size, mesh_axes) else ())
            for size, mesh_axes in zip(shape, _mesh_axes(axes, rules))
        )
    )


def join_shards(
    shards: Sequence[jax.Array], split: Sequence[str | tuple[str, ...] | None], axis: int
) -> jax.Array:
    """All of several sequences one after another, inside `jax.shard_map`.

    Those that are split are joined before they are gathered, so that there is one exchange. Their
    parts then lie in the order of the devices, which attention does not care about in its keys.

    Args:
        shards: a device's parts.
        split: the mesh axes that split each sequence (the same for all that are split), or None.
        axis: of the sequences.
    """
    parts = [x for x, axes in zip(shards, split) if axes is not None]
    whole = [x for x, axes in zip(shards, split) if axes is None]
    if parts:
        over = next(axes for axes in split if axes is not None)
        whole.insert(0, jax.lax.all_gather(joined(parts, axis), over, axis=axis, tiled=True))
    return joined(whole, axis)


def joined(arrays: Sequence[jax.Array], axis: int) -> jax.Array:
    """Arrays one after another; a single one as it is, without an operation."""
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)


def shard_shape(shape: tuple[int, ...], *axes: str | None) -> tuple[int, ...]:
    """The shape of one device's part of an activation; see `activation_spec`."""
    split = activation_spec(shape, *axes)
    if split is None:
        return shape
    return NamedSharding(jax.sharding.get_abstract_mesh(), split).shard_shape(shape)


# --- What is compiled for ---


def platform() -> str:
    """What is compiled for: the devices of `jax.set_mesh`, else JAX's default ("cpu", "tpu", ...).

    The mesh decides because a program for a TPU pod may be compiled on a machine without TPUs.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def device_kind() -> str:
    """The kind of device that is compiled for, as jax names it ("TPU v5 lite", "cpu", ...)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


# Measured by the estimate of compiled steps (docs/pods.md).
_TPU_OPTIONS = {
    # A product that gathers its weights as it goes runs at a fifth of a TPU's peak here: weights
    # are 8 MB and activations 79 MB, and each part of the weights reads and writes the whole
    # result. Gathered first, the weights of a product cost 0.1 ms.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}
_TPU_OPTIONS_BY_KIND = {
    # Larger windows for products: they run at 88 instead of 80 % of the peak. Others have as much.
    "TPU v5": {"xla_tpu_scoped_vmem_limit_kib": "32768"},
}


def compiler_options() -> dict[str, str]:
    """Options of `Lowered.compile` for a large program; none but for TPUs."""
    if platform() != "tpu":
        return {}
    return _TPU_OPTIONS | _TPU_OPTIONS_BY_KIND.get(device_kind(), {})


# --- Several processes: how they find each other, agree, and end together ---

HEARTBEAT_SECONDS = 30  # a process that is silent for so long is dead, and the others stop
START_SECONDS = 300  # machines of a pod do not boot at the same moment


@contextlib.contextmanager
def initialized(start_seconds: float = START_SECONDS) -> Iterator[None]:
    """Makes this process one of the run's several, if it is; the first thing that `main` does.

    Which run it belongs to is found out in this order:

    1. MVJAX_COORDINATOR (host:port of process 0), MVJAX_PROCESS_COUNT and MVJAX_PROCESS_ID, when
       they are set, as `launch.local` does;
    2. else what JAX knows itself: a TPU pod (VMs and GKE, several slices), Slurm with srun, Open
       MPI. A job of one task there is a single process, which keeps all GPUs of its machine;
    3. else it is the only process, and nothing happens.

    Processes that do not find each other end with a message and code 2. A process that ends with an
    error does so at once, instead of waiting for the others as JAX would. The others are stopped by
    whoever started them (`launch.local`, srun, a JobSet), or by JAX after `HEARTBEAT_SECONDS`
    without a sign of life.

    Args:
        start_seconds: How long to wait for the other processes.

    Raises:
        ValueError: If only some of the three variables are set.
    """
    arguments = _arguments()
    if arguments is not None:
        waiting = threading.Timer(start_seconds, _give_up, [arguments, start_seconds])
        waiting.daemon = True
        waiting.start()
        try:
            jax.distributed.initialize(
                **arguments,
                # Later than the timer: JAX's own way to give up is a C++ stack trace.
                initialization_timeout=int(start_seconds) + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except ValueError as error:
            # JAX found no cluster: the only process.
            if arguments or "coordinator_address should be defined" not in str(error):
                raise
        finally:
            waiting.cancel()
    try:
        yield
    except BaseException as error:
        success = isinstance(error, SystemExit) and error.code in (None, 0)
        if jax.process_count() > 1 and not success:
            atexit.register(_leave_at_once, error)
        raise


def everywhere(condition: bool) -> bool:
    """True if the condition holds in every process. All of them must ask."""
    if jax.process_count() == 1:
        return condition
    return bool(np.all(multihost_utils.process_allgather(np.array(condition))))


def _arguments() -> dict[str, str | int] | None:
    """For `jax.distributed.initialize`: {} lets it look for a cluster, None is a single process."""
    names = ("MVJAX_COORDINATOR", "MVJAX_PROCESS_COUNT", "MVJAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if given and len(given) < len(names):
        raise ValueError(f"{' and '.join(given)} is set; set all of {', '.join(names)}, or none.")
    if given:
        coordinator, count, index = given.values()
        return dict(
            coordinator_address=coordinator, num_processes=int(count), process_id=int(index)
        )
    tasks = os.environ.get("SLURM_NTASKS") or os.environ.get("OMPI_COMM_WORLD_SIZE")
    return None if tasks == "1" else {}


def _give_up(arguments: dict[str, str | int], seconds: float) -> None:
    who = "this process"
    if arguments:
        who = "process {process_id} of {num_processes} (coordinator {coordinator_address})"
        who = who.format(**arguments)
    log.error(
        f"mvjax: {who} has not met all the others within {seconds:.0f} s; check that they all run "
        "and can reach the coordinator's port on the machine of process 0."
    )
    os._exit(2)  # the main thread is inside JAX, which cannot be interrupted


def _leave_at_once(error: BaseException) -> None:
    # JAX's own hook at exit waits until all processes are done, which they never will be.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 2)


# --- What one device of a kind can do: arithmetic, memory, and its links to other devices ---

GB = 2**30


@dataclass(frozen=True)
class Chip:
    """Published figures of one device as jax counts them (a TPU7x chip is two devices).

    Attributes:
        name: as people say it.
        peak_flops: dense bfloat16 FLOP/s.
        hbm_bytes: memory a program can use; for TPUs what their compiler (libtpu 0.0.50) allows.
        link_bytes: bytes/s that leave the device over all its links to the others in its slice;
            0 where not stated here.
        clock: of a TPU, Hz: its peak over the FLOPs of its matrix units in a cycle; 0 for a GPU.
        hbm_bandwidth: bytes/s between that memory and the cores; 0 for a GPU.
        cores: TensorCores of a TPU device; two that are one device are called megacore.
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    link_bytes: float = 0.0
    clock: float = 0.0
    hbm_bandwidth: float = 0.0
    cores: int = 1


# Sources: Google Cloud's pages of the TPU versions, NVIDIA's data sheets (dense, not sparse).
_TPUS = {
    "TPU v4": Chip("TPU v4", 275e12, int(30.75 * GB), 300e9, 1.05e9, 1228e9, 2),
    "TPU v5 lite": Chip("TPU v5e", 197e12, int(15.75 * GB), 200e9, 1.5e9, 819e9),
    "TPU v5": Chip("TPU v5p", 459e12, int(95.73 * GB), 600e9, 1.75e9, 2765e9, 2),
    "TPU v6 lite": Chip("TPU v6e", 918e12, int(31.24 * GB), 400e9, 1.75e9, 1638e9),
    "TPU7x": Chip("TPU7x core", 1153.5e12, int(94.74 * GB), 600e9, 2.2e9, 3690e9),
}
# jax reports the name that the driver gives, e.g. "NVIDIA H100 80GB HBM3"; the longest prefix wins.
_GPUS = {
    "NVIDIA A100": Chip("A100", 312e12, 80 * GB),
    "NVIDIA A100-SXM4-40GB": Chip("A100 40 GB", 312e12, 40 * GB),
    "NVIDIA A100-PCIE-40GB": Chip("A100 40 GB", 312e12, 40 * GB),
    "NVIDIA L4": Chip("L4", 121e12, 24 * GB),
    "NVIDIA L40S": Chip("L40S", 362e12, 48 * GB),
    "NVIDIA H100": Chip("H100", 989.4e12, 80 * GB),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 756e12, 80 * GB),
    "NVIDIA H100 NVL": Chip("H100 NVL", 835e12, 94 * GB),
    "NVIDIA GH200": Chip("GH200", 989.4e12, 96 * GB),
    "NVIDIA H200": Chip("H200", 989.4e12, 141 * 10**9),
    "NVIDIA B200": Chip("B200", 2250e12, 180 * 10**9),
    "NVIDIA GB200": Chip("GB200", 2500e12, 186 * 10**9),
}


def chip(device_kind: str) -> Chip | None:
    """The figures of `jax.Device.device_kind`; None for a CPU or a kind not known here."""
    if device_kind in _TPUS:
        return _TPUS[device_kind]
    prefixes = [name for name in _GPUS if device_kind.startswith(name)]
    return _GPUS[max(prefixes, key=len)] if prefixes else None
