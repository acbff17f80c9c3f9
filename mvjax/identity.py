"""What a result is a result of: digests of weights, and the identity of a folder of results.

An identity has two parts. "what" decides the result: step and digest of every network, the
normalizer, the resolved settings, the suite and the simulator's versions. Results may be mixed only
if it is equal. "where" is recorded only: the devices, the versions of Python, jax and mvjax, the
machine, and the folders that were read. A checkpoint that was copied or linked to another path is
the same "what".
"""

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from data_pipelines.atomic import write_json
from data_pipelines.settings import differences, plain
from mvjax import __version__

log = logging.getLogger(__name__)

FILE = "identity.json"
SHOWN = 6  # differences listed per message
PATIENCE = 60.0  # seconds after which a process says for what it waits

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "mujoco", "metaworld",
    "av",
)  # fmt: skip


# Digests of weights. Each leaf is summed where it lies, modulo 2^32, with numbers that depend on
# the position: integer sums are exact in any order, so a digest does not depend on the sharding,
# the kind of device or the names of files, and costs one pass over the parameters.

_PART = 1 << 16  # values summed at once on the host
_SMALL = 4 << 20  # bytes; a smaller leaf is summed by numpy sooner than a program is compiled


def digest(leaves: Mapping[str, Any]) -> str:
    """The digest of parameters by path (`leaf_paths`), 16 hexadecimal digits.

    All processes of a job must call it together if the arrays are spread over them.
    """
    sums, large = {}, {}
    for name, leaf in leaves.items():
        here = getattr(leaf, "is_fully_addressable", True)
        if here and (leaf.nbytes <= _SMALL or _on_host(leaf)):
            sums[name] = piece_sums(np.asarray(leaf))
        else:
            large[name] = leaf
    if large:
        shardings = [getattr(leaf, "sharding", None) for leaf in large.values()]
        meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
        # Whole on every device, so that every process can read them.
        whole = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
        sums |= jax.device_get(_sums_of_all(large, whole))
    return digest_of_sums({name: (a.shape, a.dtype, sums[name]) for name, a in leaves.items()})


def _on_host(leaf: Any) -> bool:
    # For CPUs, XLA's program takes temporary memory of twice the leaves; NumPy is faster, too.
    return not isinstance(leaf, jax.Array) or {d.platform for d in leaf.devices()} == {"cpu"}


def digest_of_sums(leaves: Mapping[str, tuple[Sequence[int], Any, np.ndarray]]) -> str:
    """The digest from the path, shape, dtype and `piece_sums` of every leaf."""
    folded = hashlib.sha256()
    for name, (shape, dtype, sums) in sorted(leaves.items()):
        folded.update(f"{name} {list(shape)} {np.dtype(dtype).name} ".encode())
        folded.update(np.asarray(sums, "<u4").tobytes())
    return folded.hexdigest()[:16]


def piece_sums(piece: np.ndarray, first: int = 0) -> np.ndarray:
    """The two sums, uint32 [2], of a piece of a leaf that begins at the leaf's flat index `first`.

    The sums of a leaf are those of its pieces, added modulo 2^32.
    """
    flat, sums = np.ascontiguousarray(piece).reshape(-1), np.zeros(2, np.uint32)
    # In parts that fit the cache: faster than a compiled program, and without its memory.
    for start in range(0, flat.size, _PART):
        sums += _sums_on_host(flat[start : start + _PART], first + start)
    return sums


def _sums_on_host(array: np.ndarray, first: int) -> np.ndarray:
    # At least one dimension: NumPy warns when a single number overflows.
    array = np.atleast_1d(np.ascontiguousarray(array))
    bits = array.view(f"u{array.dtype.itemsize}").astype(np.uint32)
    index = np.arange(array.size, dtype=np.uint32).reshape(array.shape)
    return np.stack(
        [x.sum(dtype=np.uint32) for x in _terms(bits, index + np.uint32(first % 2**32))]
    )


@partial(jax.jit, static_argnums=1)
def _sums_of_all(arrays: dict[str, jax.Array], whole: NamedSharding | None) -> dict[str, jax.Array]:
    sums = jax.tree.map(lambda array: _sums_on_device(array, jnp.uint32(0)), arrays)
    return sums if whole is None else jax.lax.with_sharding_constraint(sums, whole)


def _sums_on_device(array: jax.Array, first: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    index, stride = first, 1
    for axis in reversed(range(array.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        index = index + along * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return jnp.stack([jnp.sum(x, dtype=jnp.uint32) for x in _terms(bits, index)])


def _terms(bits: Any, index: Any) -> tuple[Any, Any]:
    """The numbers that are summed, from the bit patterns and the positions; uint32."""
    # An odd factor: no change of a single value goes unnoticed. The other one mixes the bits, so
    # that changes which cancel each other in the first sum do not in the second.
    u = np.uint32
    mixed = bits ^ (index * u(0x85EBCA6B))
    mixed = (mixed ^ (mixed >> u(15))) * u(0x2C1B3C6D)
    mixed = (mixed ^ (mixed >> u(12))) * u(0x297A2D39)
    return bits * (index * u(0x9E3779B1) | u(1)), mixed ^ (mixed >> u(15))


def digest_of_json(path: Path) -> str:
    """The digest of the values in a JSON file, whatever their order and layout."""
    return digest_of(json.loads(path.read_text()))


def digest_of(values: Any) -> str:
    """The digest of JSON values and configurations, whatever the order of their names."""
    text = json.dumps(plain(values), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Where something was computed.


def environment() -> dict[str, Any]:
    """Versions of mvjax, Python and packages, the system, CPU, cores and memory in MB."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    affinity = getattr(os, "sched_getaffinity", None)  # the cores that this process may use
    return {
        "mvjax": __version__,
        "python": platform.python_version(),
        "packages": {name: found for name, found in package_versions(PACKAGES).items() if found},
        "system": platform.platform(terse=True),
        "cpu": _cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_mb": memory // 2**20,
    }


def here() -> dict[str, Any]:
    """`environment` as far as it may change a number, with the devices of this process."""
    devices = jax.local_devices()
    known = {k: v for k, v in environment().items() if k not in ("cores", "memory_mb")}
    return known | {"devices": f"{len(devices)} x {devices[0].device_kind}"}


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Package -> installed version; "" for one that is not installed."""
    found = dict.fromkeys(names, "")
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# The identity of a folder of results.


def read_identity(folder: Path) -> dict[str, Any] | None:
    """What `claim` wrote into a folder: {"what", "where": [one or more]}; None for old results."""
    path = folder / FILE
    return json.loads(path.read_text()) if path.exists() else None


def claim(
    folder: Path,
    what: Mapping[str, Any],
    where: Mapping[str, Any],
    *,
    begun: bool,
    process: int = 0,
    apart: str = "--out",
) -> None:
    """Makes a folder that of one identity, and refuses one that holds results of another.

    Process 0 writes `identity.json`; the other processes of the job wait for it.

    Args:
        folder: of the results.
        what, where: see the top of this file.
        begun: whether the folder holds results; an identity without results is replaced.
        process: index of this process in the job.
        apart: the flags that give other results another folder, for messages.

    Raises:
        ValueError: names the entries that differ.
    """
    what, where = plain(what), plain(where)
    remedy = f"choose another {apart}, or delete that folder to evaluate anew."
    stored = read_identity(folder)
    if begun and stored is None:
        raise ValueError(
            f"{folder} holds results without {FILE}, as in earlier versions, so it is not known "
            f"which policy they belong to. They can be read, but not continued: {remedy}"
        )
    if begun and (found := different(stored["what"], what)):
        raise ValueError(f"{folder} holds the results of another evaluation: {found}; {remedy}")
    if process > 0:
        late = time.monotonic() + PATIENCE
        while (found := (read_identity(folder) or {}).get("what")) != what:
            if time.monotonic() > late:  # machines with other versions would wait for ever
                late = math.inf
                log.warning(
                    "process %d is still waiting for process 0: %s does not exist, or belongs to "
                    "another evaluation: %s.",
                    *(process, folder / FILE, different(found or {}, what)),
                )
            time.sleep(0.2)
        return
    places = stored["where"] if begun else []
    if where not in places:
        if places:
            log.warning(
                "%s is continued in another place: %s.", folder, different(places[-1], where)
            )
        write_json(folder / FILE, {"what": what, "where": [*places, where]})


def different(before: Any, after: Any) -> str:
    """The first differences between two settings, as one text; "" if there are none."""
    found = differences(before, after)
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(found[:SHOWN]) + more


# An identity for readers.


def described(identity: Mapping[str, Any] | None) -> dict[str, str]:
    """What was evaluated and where, as short texts by title; for `read_identity`."""
    if identity is None:
        return dict.fromkeys(("Decoder", "Backbone", "Simulator", "Computed on"), "not recorded")
    what, places = identity["what"], identity["where"]
    policy = what.get("policy", what)
    simulator = [what["suite"], *_words(what["simulator"])] if "suite" in what else []
    return {
        "Decoder": _weights(policy.get("decoder")),
        "Backbone": _weights(policy.get("backbone")),
        "Simulator": ", ".join(simulator) or "–",
        "Computed on": "; then ".join(
            map(_place, places if isinstance(places, list) else [places])
        ),
    }


def _weights(network: Mapping[str, Any] | None) -> str:
    if network is None:
        return "–"
    if "untrained" in network:
        return f"untrained, seed {network['untrained']}"
    return f"step {network['step']}, {network['digest']}"


def _place(where: Mapping[str, Any]) -> str:
    versions = {name: where["packages"].get(name) for name in ("jax", "jaxlib")}
    parts = [where["devices"], f"mvjax {where['mvjax']}", *_words(versions)]
    return ", ".join([*parts, *_words({"": where.get("simulator", {}).get("gl_renderer")})])


def _words(versions: Mapping[str, str | None]) -> list[str]:
    return [f"{name} {version}".strip() for name, version in versions.items() if version]
