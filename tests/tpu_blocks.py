"""Compiles a gradient of two blocks of the published 2B for TPUs and prints what it costs, as JSON.

    python tests/tpu_blocks.py v6e:2x2 0 attention      # topology, rank of LoRA, remat

A program of its own, because the compiler looks at the environment once. It needs libtpu, no TPU,
3 GB and one to two minutes. The weights are split over the devices, one clip is on each.
"""

import json
import sys

import jax
import jax.numpy as jnp

import launch.estimate  # noqa: F401  sets the environment, before libtpu is loaded
from configs import bridge_video
from mvjax.experiment import Experiment
from mvjax.models.lora import learns_with_lora
from mvjax.models.network import merge, split
from mvjax.parallel import chip, compiler_options, sharding_tree, use_rules
from mvjax.pods.collectives import collectives
from mvjax.pods.cost import cost
from mvjax.pods.hlo import HLO
from mvjax.pods.kernels import is_kernel
from mvjax.pods.topology import generation, pod_devices

BLOCKS = 2


def main(topology: str, rank: str, remat: str) -> None:
    """Prints the figures."""
    devices = pod_devices(topology)
    settings = {"video_model.num_blocks": BLOCKS, "video_model.remat": remat}
    experiment = Experiment.from_config(bridge_video.get_config()).changed(
        settings | {"lora.rank": int(rank), "training.batch_size": len(devices)}
    )
    compiled = gradient(experiment, devices)
    text, kind = HLO(compiled.as_text()), devices[0].device_kind
    found = cost(text, generation(kind), chip(kind), collectives(text, len(devices)))
    kernels = sum(times for instruction, times in text.runs() if is_kernel(instruction))
    figures = {
        "products_peak_share": found.products_peak_share,
        "kernels_per_block": kernels / BLOCKS,
        "peak_gb": compiled.memory_analysis().peak_memory_in_bytes / 2**30,
        "notes": found.notes,
        **{part: seconds.low / BLOCKS for part, seconds in found.parts.items()},
    }
    # What goes through the device's memory, apart from kernels and products.
    passes = ("memory_bound", "copies", "reductions")
    figures["gb_per_block"] = sum(figures[p] for p in passes) * chip(kind).hbm_bandwidth / 1e9
    print(json.dumps(figures))


def gradient(experiment: Experiment, devices: list[jax.Device]):
    """The compiled gradient of the network's mean square."""
    network, mesh, rules = experiment.video_network, experiment.mesh(devices), experiment.rules
    clip, samples = experiment.clip, experiment.config.training.batch_size
    learns = learns_with_lora if experiment.video.lora else lambda path: True
    shardings = sharding_tree(network.axes, mesh, rules, network.abstract)
    parameters = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        network.abstract,
        shardings,
    )

    def shaped(*shape):
        spec = jax.sharding.PartitionSpec(rules["batch"])
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct((samples, *shape), jnp.float32, sharding=sharding)

    inputs = (
        shaped(*clip.latent_shape),
        shaped(1),
        shaped(experiment.config.text.length, experiment.config.text.dim),
        shaped(clip.latent_frames),
    )

    def step(trainable, fixed, *inputs):
        def loss(trainable):
            return jnp.mean(network.bind(merge(fixed, trainable))(*inputs) ** 2)

        with use_rules(rules):
            return jax.value_and_grad(loss)(trainable)

    with jax.set_mesh(mesh):
        lowered = jax.jit(step).lower(*split(parameters, learns), *inputs)
        return lowered.compile(compiler_options=compiler_options())


if __name__ == "__main__":
    main(*sys.argv[1:])
