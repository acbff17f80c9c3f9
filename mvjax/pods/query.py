"""Compiles a policy's query for TPUs that are not here: how long does an answer take?

Weights and inputs are shapes with shardings, as for the train step; see `mvjax.pods.cost` for how
the times are made. The stages of a query are compiled one by one, as `VideoActionModel` has them; a
policy runs them as one program. Times are the chips' own: preparing frames, sending them to the
chips and starting the program take the host's time, which comes on top.
"""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipelines.clip import CHANNELS, SPATIAL, TEMPORAL
from mvjax.chunking import Pending
from mvjax.experiment import Experiment
from mvjax.models.network import Params
from mvjax.models.presets import WAN_VAES, vae_network, video_network
from mvjax.models.stand_ins import LinearTokenizer, Projection
from mvjax.parallel import chip, sharding_tree, spec, split_ways, use_rules
from mvjax.pods.collectives import collectives
from mvjax.pods.compile import DoesNotFit
from mvjax.pods.cost import PARTS, Cost, Range, cost
from mvjax.pods.hlo import HLO
from mvjax.pods.report import PART_NAMES, as_bytes, as_lines, between
from mvjax.pods.topology import generation
from mvjax.policy.policy import Inputs, VideoActionModel, medoid
from mvjax.training.bridge import abstract_backbone


@dataclass(frozen=True)
class QueryEstimate:
    """The time of a batch of queries to a policy.

    Attributes:
        device: Name of the chip.
        devices: That answer together.
        mesh: Devices per axis.
        queries: Asked at a time.
        batch_size: Queries that are computed: `queries`, padded to what the devices can share.
        stop_step, action_steps: Evaluations of the video DiT before the one that is read, and of
            the action decoder.
        seconds: From the inputs on the chips to the chunks on the chips.
        queries_per_second: At the middle of it.
        stages: The same by stage: encode, video, context and actions. They add up.
        parts: The same by kind of work (`mvjax.pods.cost.PARTS`). They add up.
        weight_bytes: Of tokenizer, video DiT and decoder on a device.
        peak_bytes: With what the most demanding stage needs beside them.
        hbm_bytes: The memory of the device.
        notes: What the times were made from where a kernel's cycles were not known exactly.
        compile_seconds: On this machine.
        hlo: The program's text of each stage; not among the figures.
    """

    device: str
    devices: int
    mesh: dict[str, int]
    queries: int
    batch_size: int
    stop_step: int
    action_steps: int
    seconds: Range
    queries_per_second: float
    stages: dict[str, Range]
    parts: dict[str, Range]
    weight_bytes: int
    peak_bytes: int
    hbm_bytes: int
    notes: tuple[str, ...]
    compile_seconds: float
    hlo: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def figures(self) -> dict[str, Any]:
        """Everything but the program's text, as JSON values."""
        return {key: value for key, value in asdict(self).items() if key != "hlo"}


def estimate_queries(
    experiment: Experiment, devices: Sequence[jax.Device], queries: int
) -> QueryEstimate:
    """Compiles the stages of the answer to a batch of queries for devices of a pod.

    Args:
        experiment: Of stage 2 or of a joint run; no checkpoint that it names is read.
        devices: Of `pod_devices`, one chip or several that share the batch by `config.mesh`.
        queries: At a time.

    Raises:
        DoesNotFit: If the weights and a batch need more memory than a device has.
        ValueError: If the experiment trains no decoder, or mesh and devices do not go together.
    """
    if not experiment.learns_actions:
        raise ValueError(
            "a policy needs a configuration that trains a decoder (config.stage 'action' or "
            f"'joint'), got one of stage {experiment.stage!r}."
        )
    kind, mesh, rules = chip(devices[0].device_kind), experiment.mesh(devices), experiment.rules
    assert kind is not None  # every generation of `pod_devices` is in the table of chips
    start, ways = time.perf_counter(), split_ways("batch", mesh, rules)
    batch = -(-queries // ways) * ways
    model, weights = _abstract_policy(experiment, mesh)
    inputs = _abstract_inputs(experiment, model, mesh, batch)
    with jax.set_mesh(mesh), use_rules(rules):
        stages = _stages(model, weights, inputs)
    hlo = {name: made.as_text() for name, made in stages.items()}
    costs = {name: _cost(text, devices) for name, text in hlo.items()}
    nothing = Range(0.0, 0.0, 0.0)
    seconds = sum((made.seconds for made in costs.values()), nothing)
    parts = {p: sum((made.parts[p] for made in costs.values()), nothing) for p in PARTS}
    beside = max(
        made.memory_analysis().peak_memory_in_bytes - _bytes_of(weights[_WEIGHTS_OF[name]])
        for name, made in stages.items()
    )
    return QueryEstimate(
        device=kind.name,
        devices=len(devices),
        mesh=dict(mesh.shape),
        queries=queries,
        batch_size=batch,
        stop_step=model.sampling.stop_step,
        action_steps=model.sampling.action_steps,
        seconds=seconds,
        queries_per_second=queries / seconds.middle,
        stages={name: made.seconds for name, made in costs.items()},
        parts=parts,
        weight_bytes=_bytes_of(weights),
        peak_bytes=_bytes_of(weights) + beside,
        hbm_bytes=kind.hbm_bytes,
        notes=tuple(dict.fromkeys(note for made in costs.values() for note in made.notes)),
        compile_seconds=time.perf_counter() - start,
        hlo=hlo,
    )


def query_report(topology: str, estimates: Sequence[QueryEstimate]) -> str:
    """Several lines for each batch of queries: its latency, and where it goes."""
    rows = []
    for found in estimates:
        padded = f", computed as {found.batch_size}" if found.batch_size > found.queries else ""
        axes = " ".join(f"{axis}={size}" for axis, size in found.mesh.items())
        share = found.peak_bytes / found.hbm_bytes
        stages = [f"{name} {_milliseconds(time)}" for name, time in found.stages.items()]
        spent = {name: found.parts[key] for key, name in PART_NAMES.items()}
        parts = [f"{name} {_milliseconds(time)}" for name, time in spent.items() if time.high]
        rows += [
            (
                "queries",
                f"{found.queries} at a time{padded}, K = {found.stop_step}, {found.action_steps} "
                f"action steps; {topology}, {found.devices} x {found.device}, {axes}",
            ),
            (
                "latency",
                f"{between(found.seconds, 1e3)} ms by the compiled programs, "
                f"{found.queries_per_second:.3g} queries/s; the host's time comes on top",
            ),
            ("stages", f"{', '.join(stages)} ms"),
            ("where", f"{', '.join(parts)} ms"),
            (
                "memory",
                f"weights {as_bytes(found.weight_bytes)}, peak {as_bytes(found.peak_bytes)} of "
                f"{as_bytes(found.hbm_bytes)} per chip ({share:.0%})",
            ),
            *(("note", note) for note in found.notes),
            ("compiled", f"in {found.compile_seconds:.0f} s"),
        ]
    return as_lines(rows)


def _milliseconds(seconds: Range) -> str:
    return f"{1e3 * seconds.middle:.3g}"


# --- The policy as shapes ---


def _abstract_policy(experiment: Experiment, mesh: Mesh) -> tuple[VideoActionModel, Any]:
    """What `load_policy` gives, with shapes instead of weights."""
    rules, decoder = experiment.rules, experiment.decoder_network
    video_dit, backbone = abstract_backbone(experiment, mesh)
    shardings = sharding_tree(decoder.axes, mesh, rules, decoder.abstract)
    placed = lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s)  # noqa: E731
    decoder_params: Params = jax.tree.map(placed, decoder.abstract, shardings)
    whole = NamedSharding(mesh, PartitionSpec())
    tokenizer = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=whole),
        _abstract_tokenizer(Path(experiment.config.tokenizer)),
    )
    model = VideoActionModel(
        experiment.clip,
        experiment.config.context_layer,
        video_network(video_dit),
        decoder,
        experiment.sampling(),
        experiment.context_frames,
        prefix=experiment.config.flow.get("prefix", 0),
    )
    return model, (tokenizer, backbone, decoder_params)


def _abstract_tokenizer(path: Path) -> Any:
    """The linear tokenizer where the configuration names an .npz file, else a Wan VAE."""
    if path.suffix != ".npz":
        network = vae_network(WAN_VAES["wan21"])
        dtype = jnp.bfloat16  # as `load_policy` restores it
        return network.bind(
            jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), network.abstract)
        )

    def projection(features: int) -> Projection:
        shapes = ((features,), (features, CHANNELS), (CHANNELS, features))
        return Projection(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))

    pixels = 3 * SPATIAL**2
    return LinearTokenizer(projection(pixels), projection(TEMPORAL * pixels))


def _abstract_inputs(
    experiment: Experiment, model: VideoActionModel, mesh: Mesh, batch: int
) -> Inputs:
    clip, sizes, text = model.clip, model.decoder.config, experiment.config.text
    frames = clip.frames if model.sampling.oracle else clip.observed_frames

    def placed(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        axes = ("batch", *[None] * len(shape))
        sharding = NamedSharding(mesh, spec(axes, experiment.rules))
        return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=sharding)

    def pictures(count: int, size: Mapping[str, int]) -> jax.ShapeDtypeStruct:
        return placed(count, size["height"], size["width"], 3, dtype=jnp.uint8)

    queries = sizes.action_horizon, sizes.action_dim
    count = placed(dtype=jnp.int32)
    chunking = model.sampling.chunking != "none"
    return Inputs(
        video=pictures(frames, dict(height=clip.height, width=clip.width)),
        views={name: pictures(clip.observed_frames, size) for name, size in clip.views.items()},
        text=placed(text.length, text.dim),
        proprio=placed(sizes.proprio_horizon, sizes.proprio_dim),
        video_noise=placed(*((0,) if model.observed_only else clip.latent_shape)),
        action_noise=placed(model.sampling.draws, *queries),
        pending=Pending(placed(*queries), count, count) if chunking else None,
    )


# --- Programs ---

# Which of a policy's weights (tokenizer, video DiT, decoder) a stage reads.
_WEIGHTS_OF = {"encode": 0, "video": 1, "context": 2, "actions": 2}


def _stages(model: VideoActionModel, weights: Any, i: Inputs) -> dict[str, Any]:
    """The stages of a query as compiled programs; each takes what the one before leaves."""
    tokenizer, backbone, decoder = weights

    def choose(decoder, context_kv, *queries):
        sigma = jnp.float32(model.context_sigma)
        return medoid(model.sample(decoder, context_kv, sigma, *queries))

    encode, clean = _compiled(model.encode, tokenizer, i.video, i.views)
    video, hidden = _compiled(model.context, backbone, clean, i.text, i.video_noise)
    context, context_kv = _compiled(model.keys_values, decoder, hidden)
    actions, _ = _compiled(choose, decoder, context_kv, i.proprio, i.action_noise, i.pending)
    return dict(encode=encode, video=video, context=context, actions=actions)


def _compiled(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """The compiled program, and its results as shapes with the shardings it gives them."""
    try:
        made = jax.jit(function).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "Hbm" not in text and "RESOURCE_EXHAUSTED" not in text:
            raise
        needed = re.search(r"\(([\d.]+[KMGT])\) exceeds", text)
        total = f"{needed[1]}B" if needed else "more than a chip has"
        raise DoesNotFit(
            f"the policy's weights and a batch of queries need {total}; use fewer --batches or "
            "more chips (--topology) with config.mesh.fsdp."
        ) from error
    results = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(function, *arguments),
        made.output_shardings,
    )
    return made, results


def _bytes_of(tree: Any) -> int:
    """Of arrays on one device, without the compiler's padding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _cost(hlo: str, devices: Sequence[jax.Device]) -> Cost:
    text, kind = HLO(hlo), devices[0].device_kind
    return cost(text, generation(kind), chip(kind), collectives(text, len(devices)))
