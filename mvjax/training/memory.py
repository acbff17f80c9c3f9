"""The memory of a training step: what of a block is kept for the backward pass where the
configuration says remat="auto", and what a CPU does with what a step has freed.
"""

import ctypes
import logging
import math
from glob import glob
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from mvjax.experiment import Experiment
from mvjax.models.lora import learning
from mvjax.models.network import Network, split
from mvjax.parallel import GB, chip, sharding_tree, split_ways

log = logging.getLogger(__name__)

# From the most that is kept to the least; each is slower than the one before, for less memory.
# "none" keeps what costs nothing to compute again, and "offload" trusts the host's link.
LADDER = ("dots", "hidden", "outputs", "attention", "full")
SHARE = 0.92  # of the memory; the rest is the runtime's and the compiler's
# Besides state and what is kept, a step needs room for the activations of the block at work and
# their gradients: as many as this, each [tokens, width]. Compiled programs need 50 to 65.
WORKING_ACTIVATIONS = 70


def chosen_remat(experiment: Experiment, mesh: Mesh | AbstractMesh) -> str:
    """The policy for a video DiT that learns, on this mesh: "auto" resolved, any other as it is.

    The most that fits the memory of a device, by an estimate that is on the safe side; "attention"
    where the memory is not known (a CPU, an unknown device).
    """
    remat = experiment.video.remat
    if remat != "auto":
        return remat
    kind = chip(_device_kind(mesh))
    if kind is None:
        return "attention"
    remat = most_kept(experiment, mesh, kind.hbm_bytes)
    log.info(
        f"remat: {remat!r} was chosen for {kind.hbm_bytes / GB:.1f} GB of memory; a step may need "
        f"{step_bytes(experiment, mesh, remat) / GB:.1f} GB"
    )
    return remat


def most_kept(experiment: Experiment, mesh: Mesh | AbstractMesh, hbm_bytes: int) -> str:
    """The policy that keeps most of those that fit so much memory; the last if none does."""
    fits = (r for r in LADDER if step_bytes(experiment, mesh, r) <= SHARE * hbm_bytes)
    return next(fits, LADDER[-1])


def step_bytes(experiment: Experiment, mesh: Mesh | AbstractMesh, remat: str) -> float:
    """About what a step that trains the video DiT needs on a device."""
    training, model = experiment.config.training, experiment.video
    rules, samples = experiment.rules, training.batch_size / training.accumulate
    clips = samples / split_ways("batch", mesh, rules)
    tokens = clips * experiment.tokens / split_ways("length", mesh, rules)
    itemsize = 4 if model.dtype == "float32" else 2
    activation = tokens * model.width * itemsize
    state, block = _parameter_bytes(experiment, mesh)
    kept = model.num_blocks * kept_widths(remat, model.mlp_ratio) * activation
    if experiment.learns_actions:  # keys and values of the context, in each of its blocks
        decoder = experiment.decoder
        read = clips * experiment.context_tokens / split_ways("length", mesh, rules)
        kept += 2 * decoder.num_blocks * read * decoder.width * itemsize
        kept += activation  # what the decoder reads, seen on the way
    # Of two blocks at a time the weights are gathered.
    return state + 2 * block * itemsize + (WORKING_ACTIVATIONS + 1) * activation + kept


def kept_widths(remat: str, mlp_ratio: int) -> int:
    """Activations [tokens, width] that a block keeps: its input, and what the policy names."""
    outputs, projected = 3, 4  # of three sublayers; q, k, v and the queries of the cross-attention
    more = {
        "full": 0,
        "attention": 1,
        "outputs": 1 + outputs,
        "hidden": 1 + outputs + mlp_ratio,
        "dots": 1 + outputs + mlp_ratio + projected,
    }
    return 1 + more[remat]


def _parameter_bytes(experiment: Experiment, mesh: Mesh | AbstractMesh) -> tuple[float, float]:
    """Of the state and gradients on a device, and the number of parameters of one block."""
    network = experiment.video_network
    sizes = _shard_sizes(network, experiment, mesh)
    every, trainable = _total(sizes), _total(split(sizes, learning(experiment.video.lora))[0])
    if experiment.learns_actions:
        decoder = _total(_shard_sizes(experiment.decoder_network, experiment, mesh))
        every, trainable = every + decoder, trainable + decoder
    averages = 1 if experiment.config.training.ema_decay > 0 else 0
    # Parameters, and of those that learn a gradient, two moments and perhaps an average; float32.
    state = 4 * (every + (3 + averages) * trainable)
    blocks = jax.tree.map(lambda leaf: leaf.size, network.abstract["blocks"])
    return state, _total(blocks) / experiment.video.num_blocks


def _shard_sizes(network: Network, experiment: Experiment, mesh: Mesh | AbstractMesh) -> Any:
    """Of every parameter, the numbers on a device."""
    shardings = sharding_tree(network.axes, mesh, experiment.rules, network.abstract)
    return jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)),
        network.abstract,
        shardings,
    )


def _total(tree: Any) -> int:
    return sum(jax.tree.leaves(tree))


def _device_kind(mesh: Mesh | AbstractMesh) -> str:
    if isinstance(mesh, AbstractMesh):
        return mesh.abstract_device.device_kind if mesh.abstract_device else ""
    return mesh.devices.flat[0].device_kind


# --- A CPU's own memory ---

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's `mallopt` (malloc.h)
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")


def keep_freed_memory() -> bool:
    """Makes a process that trains on a CPU keep the memory it frees; False where it does not.

    A step takes its temporaries at once, a hundred megabytes in the quickstart, and frees them at
    its end. glibc would give them back to the kernel, and the next step get them page by page: up
    to a third of its time. Without `mmap` they come from the heap of the main thread and stay
    there, and the process remains as large as it has ever been. The step must run in that thread.

    Call it before JAX makes its devices. It asks for none: a machine that has an accelerator's
    device file is left alone, unless JAX_PLATFORMS says "cpu".
    """
    if platforms := jax.config.jax_platforms:
        on_cpu = platforms == "cpu"
    else:
        on_cpu = not any(map(glob, _ACCELERATORS))
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None or not on_cpu:
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return bool(set_option(_MMAP_MAX, 0) and set_option(_TRIM_THRESHOLD, 2**31 - 1))
