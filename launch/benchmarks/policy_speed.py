"""The latency of a query to the policy, by part, beside the same computation in PyTorch.

    prepare → encode → video → context → actions → fetch

are measured one by one, each as its own program, and all together as `query`: from observations on
the host to actions on the host. In mvjax, a query is one program between `prepare` and `fetch`.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import NamedSharding, PartitionSpec

from data_pipelines.cameras import View
from data_pipelines.clip import CHANNELS, SPATIAL, TEMPORAL, tokens
from data_pipelines.normalize import Normalizer
from data_pipelines.representations import Mode
from launch.benchmarks.training_speed import take_turns
from mvjax.experiment import Experiment
from mvjax.flow import Sampling
from mvjax.models.flops import peak_flops, sampling_flops, video_dit_flops
from mvjax.models.network import Network
from mvjax.models.presets import WAN_VAES, video_network
from mvjax.models.stand_ins import LinearTokenizer, Projection
from mvjax.models.wan_vae import WanVAE
from mvjax.parallel import sharding_tree, split_ways
from mvjax.pods.compile import DoesNotFit
from mvjax.policy.observation import Observation
from mvjax.policy.policy import Inputs, Policy, VideoActionModel, medoid
from mvjax.policy.robot import trained_robot
from mvjax.training.bridge import abstract_backbone, load_backbone

# --- The parts of a query, ours and PyTorch's, each to be called and timed alone ---


@dataclass(frozen=True)
class Part:
    """One part of a query, for a batch.

    Attributes:
        run: Computes it and returns when it is finished, given the result of `before`.
        before: Makes an argument that can be used only once; not measured.
    """

    run: Callable[[Any], Any]
    before: Callable[[], Any] = lambda: None


def compile_parts(policy: Policy, inputs: Inputs) -> dict[str, Any]:
    """The compiled programs of a query, by part; the whole is "query".

    Args:
        policy: Its weights may be shapes with shardings.
        inputs: A full batch.

    Raises:
        DoesNotFit: If the compiler asks for more memory than is free.
    """
    model, (tokenizer, backbone, decoder) = policy.model, policy.weights

    def compiled(function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
        """A program, and its result as shapes where it will lie."""
        lowered = jax.jit(function).lower(*args)
        program = lowered.compile()
        _check_memory(program.memory_analysis())
        result = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            lowered.out_info,
            program.output_shardings,
        )
        return program, result

    def choose(decoder, context_kv, proprio, noise):
        sigma = jnp.float32(model.context_sigma)
        return medoid(model.sample(decoder, context_kv, sigma, proprio, noise))

    def whole() -> Any:
        with policy.devices():
            return compiled(lambda w, i: model.act(w, i), policy.weights, inputs)[0]

    # The compiler is outside Python's lock: the whole takes no longer than its parts.
    with ThreadPoolExecutor(1) as beside, policy.devices():
        query = beside.submit(whole)
        encode, clean = compiled(model.encode, tokenizer, inputs.video, inputs.views)
        args = backbone, clean, inputs.text, inputs.video_noise
        video, hidden = compiled(model.context, *args)
        context, kv = compiled(model.keys_values, decoder, hidden)
        actions, _ = compiled(choose, decoder, kv, inputs.proprio, inputs.action_noise)
        programs = {"encode": encode, "video": video, "context": context, "actions": actions}
        return programs | {"query": query.result()}


def our_parts(policy: Policy, observations: Sequence[Observation]) -> dict[str, Part]:
    """The parts of a query to a policy, compiled for a full batch of observations.

    Raises:
        DoesNotFit: If the compiler asks for more memory than is free.
    """
    weights = policy.weights
    tokenizer, backbone, decoder = weights

    def prepare(_: Any = None) -> Inputs:
        return jax.block_until_ready(policy.inputs(observations, with_future=False))

    def fetch(chunks: Any) -> np.ndarray:
        return policy.normalizer.unnormalize("actions", np.asarray(chunks))

    i = prepare()
    encode, video, context, actions, act = (
        lambda *args, program=program: jax.block_until_ready(program(*args))
        for program in compile_parts(policy, i).values()
    )
    chunks = act(weights, i)
    clean = encode(tokenizer, i.video, i.views)
    hidden = video(backbone, clean, i.text, i.video_noise)
    read = lambda _=None: context(decoder, hidden)  # noqa: E731
    return {
        "prepare": Part(prepare),
        "encode": Part(lambda _: encode(tokenizer, i.video, i.views)),
        "video": Part(lambda _: video(backbone, clean, i.text, i.video_noise)),
        "context": Part(read),
        # Keys and values can be most of the memory, so they exist only while they are needed.
        "actions": Part(lambda kv: actions(decoder, kv, i.proprio, i.action_noise), read),
        # An array caches its values once fetched, so each repetition fetches a new one.
        "fetch": Part(fetch, lambda: jax.block_until_ready(chunks + 0)),
        "query": Part(lambda _: fetch(act(weights, prepare()))),
    }


def their_parts(peer: Any, observations: Sequence[Observation]) -> dict[str, Part]:
    """The same parts of a `launch.benchmarks.torch_peer.TorchPolicy`."""
    done = peer.synchronised
    prepare, encode, video, context, actions, fetch = map(
        done, (peer.prepare, peer.encode, peer.context, peer.keys_values, peer.sample, peer.fetch)
    )
    text, video_noise, action_noise = peer.constants(observations)

    def query(_: Any = None) -> np.ndarray:
        frames, proprio = peer.prepare(observations)
        hidden = peer.context(peer.encode(frames), text, video_noise)
        return peer.fetch(peer.sample(peer.keys_values(hidden), proprio, action_noise))

    frames, proprio = prepare(observations)
    clean = encode(frames)
    hidden = video(clean, text, video_noise)
    chunks = actions(context(hidden), proprio, action_noise)
    return {
        "prepare": Part(lambda _: prepare(observations)),
        "encode": Part(lambda _: encode(frames)),
        "video": Part(lambda _: video(clean, text, video_noise)),
        "context": Part(lambda _: context(hidden)),
        "actions": Part(lambda kv: actions(kv, proprio, action_noise), lambda: context(hidden)),
        "fetch": Part(lambda _: fetch(chunks)),
        "query": Part(done(query)),
    }


def part_flops(policy: Policy) -> dict[str, float]:
    """Operations of each part for one query, for the parts that run on the device."""
    model, sampling = policy.model, policy.model.sampling
    clip, backbone, decoder = model.clip, model.backbone.config, model.decoder.config
    text = policy.text_encoder.encode(["text"]).shape[1]
    read, *views = clip.read_shapes(model.observed_only)
    keys_values, actions = sampling_flops(
        decoder, sum(map(tokens, (read, *views))), sampling.draws, sampling.action_steps
    )
    evaluation = partial(video_dit_flops, backbone, text_length=text, views=views)
    seen, *others = (
        jax.ShapeDtypeStruct((1, clip.observed_frames, view.height, view.width, 3), np.uint8)
        for view in policy.views
    )
    others = {view.name: shape for view, shape in zip(policy.views[1:], others)}
    encode = jax.jit(model.encode).lower(policy.weights[0], seen, others)
    flops = {
        # Counted by the compiler: the borders of convolutions are not worth a formula.
        "encode": (encode.cost_analysis() or {}).get("flops", 0.0),
        "video": sampling.stop_step * evaluation(clip.latent_shape)
        + evaluation(read, layers=model.layer),
        "context": keys_values,
        "actions": actions,
    }
    return flops | {"query": sum(flops.values())}


def _check_memory(needed: Any) -> None:
    """Raises DoesNotFit if a program needs more memory than a device has left."""
    if needed is None:
        return
    # Checked beforehand: on a CPU the kernel kills the process instead of refusing an allocation.
    wanted = needed.temp_size_in_bytes + needed.output_size_in_bytes
    stats = jax.local_devices()[0].memory_stats() or {}
    free = psutil.virtual_memory().available
    if "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats["bytes_in_use"]
    if wanted > free:
        raise DoesNotFit(
            f"it needs {wanted / 2**30:.1f} GB beside what it is given, and "
            f"{free / 2**30:.1f} GB of {jax.devices()[0].device_kind} are free."
        )


# --- An untrained policy of a configuration's sizes ---


@dataclass(frozen=True)
class NoiseTextEncoder:
    """Embeds every text as noise of its own, float32 [n, length, dim]."""

    length: int
    dim: int

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Equal texts have equal embeddings."""
        generators = (np.random.default_rng(list(text.encode())) for text in texts)
        size = (self.length, self.dim)
        return np.stack([rng.standard_normal(size, np.float32) for rng in generators])


def untrained_policy(
    experiment: Experiment, sampling: Sampling, batch_size: int = 1, *, abstract: bool = False
) -> Policy:
    """The policy that `load_policy` would give, with random weights.

    The tokenizer is linear where the configuration names an .npz file, else a Wan VAE of the
    released sizes. Texts are embedded as noise: a policy caches embeddings, so the text encoder
    does not contribute to the latency of a query.

    Args:
        experiment: A stage-2 run; its checkpoints and data are not read.
        sampling: Its noise and numbers of steps.
        batch_size: Queries per compiled batch; rounded up to what the devices can share.
        abstract: Make shapes with shardings of the networks' weights, to compile with.

    Raises:
        ValueError: If the configuration trains no decoder.
    """
    if not experiment.learns_actions:
        raise ValueError(
            "a policy needs a configuration that trains a decoder (config.stage 'action' or "
            f"'joint'), got one of stage {experiment.stage!r}."
        )
    config, rules, decoder = experiment.config, experiment.rules, experiment.decoder_network
    mesh = experiment.mesh(jax.local_devices())
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = sharding_tree(decoder.axes, mesh, rules, decoder.abstract)
    with jax.set_mesh(mesh):
        if abstract:
            video_dit, backbone_params = abstract_backbone(experiment, mesh)
            decoder_params = jax.tree.map(_placed, decoder.abstract, shardings)
        else:
            video_dit, backbone_params = load_backbone(experiment, mesh, directory="")
            decoder_params = jax.jit(decoder.init, out_shardings=shardings)(jax.random.key(1))
        tokenizer = _tokenizer(Path(config.tokenizer), whole, abstract)
    ways = split_ways("batch", mesh, rules)
    return Policy(
        model=VideoActionModel(
            experiment.clip,
            config.context_layer,
            video_network(video_dit),
            decoder,
            sampling,
            experiment.context_frames,
        ),
        weights=(tokenizer, backbone_params, decoder_params),
        text_encoder=NoiseTextEncoder(config.text.length, config.text.dim),
        normalizer=Normalizer({}, {"proprio": Mode.NONE, "actions": Mode.NONE}),
        batch_size=-(-batch_size // ways) * ways,
        mesh=mesh,
        rules=rules,
        views=trained_robot(config).views,
    )


def random_observations(policy: Policy, count: int) -> list[Observation]:
    """Observations of noise, with different pictures and texts."""
    rng, count_of = np.random.default_rng(0), policy.model.clip.observed_frames
    sizes = policy.model.decoder.config
    proprio = (sizes.proprio_horizon, sizes.proprio_dim)

    def picture(view: View) -> np.ndarray:
        return rng.integers(0, 256, (count_of, view.height, view.width, 3), np.uint8)

    return [
        Observation(
            frames={view.name: picture(view) for view in policy.views},
            arranged=True,
            proprio=rng.standard_normal(proprio, np.float32),
            instruction=f"put object {i} on the shelf",
            noise_key=("benchmark", i),
        )
        for i in range(count)
    ]


def _tokenizer(path: Path, sharding: NamedSharding, abstract: bool) -> LinearTokenizer | WanVAE:
    if path.suffix != ".npz":
        network = Network(lambda key: WanVAE(WAN_VAES["wan21"], key))
        if abstract:
            shapes = jax.tree.map(lambda leaf: _placed(leaf, sharding), network.abstract)
            return network.bind(shapes)
        params = jax.jit(network.init)(jax.random.key(2))
        return jax.device_put(network.bind(params), sharding)
    return jax.device_put(random_linear_tokenizer(), sharding)


def random_linear_tokenizer() -> LinearTokenizer:
    """A linear tokenizer that has been fitted to nothing."""
    rng = np.random.default_rng(2)

    def projection(features: int) -> Projection:
        maps = rng.standard_normal((features, CHANNELS), np.float32) / np.sqrt(features)
        return Projection(np.zeros(features, np.float32), 3 * maps, maps.T)

    pixels = 3 * SPATIAL**2
    return LinearTokenizer(projection(pixels), projection(TEMPORAL * pixels))


def _placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    # A weak type would make another program than the array does.
    kind = dict(dtype=leaf.dtype, weak_type=leaf.weak_type)
    return jax.ShapeDtypeStruct(leaf.shape, sharding=sharding, **kind)


# --- The measurement ---

TURN_SECONDS = 0.5  # how long each part is repeated in a turn


@dataclass(frozen=True)
class Latency:
    """The latency of one part for a batch, in milliseconds.

    Attributes:
        p50, p95: Percentiles of the repetitions.
        cpu: Mean processor time, of all threads together.
        tflop: Analytic operations of the batch, 1e12; None for parts on the host.
        mfu: The share of the device's peak that they use at p50; None on a CPU.
        count: Repetitions.
    """

    p50: float
    p95: float
    cpu: float
    tflop: float | None
    mfu: float | None
    count: int


@dataclass(frozen=True)
class PolicySpeed:
    """The figures of one implementation at one batch size.

    Attributes:
        parts: By name, in the order of a query, and "query".
        queries_per_second: At the median of "query".
        actions: Of the batch, to be compared.
    """

    name: str
    parts: dict[str, Latency]
    queries_per_second: float
    actions: np.ndarray


@dataclass(frozen=True)
class BatchSpeed:
    """The figures of all implementations at one batch size.

    Attributes:
        size: Queries per batch.
        answers: Of each implementation.
        difference: The largest one between the actions of both, relative to their rms; None where
            only one was measured.
        missing: Why nothing, or only ours, was measured.
    """

    size: int
    answers: list[PolicySpeed]
    difference: float | None = None
    missing: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the actions."""
        content = asdict(self)
        for answer in content["answers"]:
            del answer["actions"]
        return content


def measure_policy(
    experiment: Experiment,
    sizes: Sequence[int],
    *,
    stop_step: int,
    rounds: int,
    peer_of: Callable[[Policy], Any] | None,
) -> Iterator[BatchSpeed]:
    """Measures an untrained policy at several batch sizes, up to the first that does not fit.

    The noise is the published one, the same at every query, whatever the configuration says.

    Args:
        experiment: A stage-2 run.
        sizes: Queries per batch, ascending.
        stop_step: K of the sampling.
        rounds: Turns, see `measure`.
        peer_of: Makes a `TorchPolicy` of a policy; None where PyTorch does not take part.
    """
    sampling = experiment.sampling(fresh_noise=False, stop_step=stop_step)
    policy = untrained_policy(experiment, sampling)
    peer = peer_of(policy) if peer_of else None
    ways = policy.batch_size
    for size in sizes:
        policy = dataclasses.replace(policy, batch_size=-(-size // ways) * ways)
        observations = random_observations(policy, policy.batch_size)
        missing = ""
        try:
            competitors = {"mvjax": our_parts(policy, observations)}
        except (DoesNotFit, jax.errors.JaxRuntimeError) as error:
            if not _out_of_memory(error):
                raise
            yield BatchSpeed(size, [], missing=f"A batch of {size} does not fit: {error}")
            return
        if peer:
            try:
                competitors["PyTorch"] = their_parts(peer, observations)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                missing = f"A batch of {size} does not fit the memory that is left to PyTorch."
        answers = measure(competitors, policy, rounds)
        difference = None
        if len(answers) > 1:
            ours, theirs = (one.actions.astype(np.float64) for one in answers)
            difference = float(np.abs(ours - theirs).max() / np.sqrt(np.mean(theirs**2)))
        yield BatchSpeed(size, answers, difference, missing)


def policy_table(batch: BatchSpeed) -> str:
    """The figures of a batch size as text, one line per part."""
    lines = [batch.missing] if batch.missing else []
    for one in batch.answers:
        lines.append(
            f"{one.name}, {batch.size} at a time: {one.queries_per_second:.4g} queries/s, "
            f"p50 {one.parts['query'].p50:.4g} ms"
        )
        for part, found in one.parts.items():
            line = f"  {part:8} p50 {found.p50:9.3f}  p95 {found.p95:9.3f}  cpu {found.cpu:9.3f} ms"
            lines.append(line if found.mfu is None else f"{line}, MFU {found.mfu:.1%}")
    if batch.difference is not None:
        ours, theirs = batch.answers
        lines.append(
            f"mvjax answers {theirs.parts['query'].p50 / ours.parts['query'].p50:.2f} times as "
            f"fast as PyTorch, with {ours.parts['query'].cpu / theirs.parts['query'].cpu:.2f} "
            f"times its processor time; actions differ by at most {batch.difference:.1e} rms"
        )
    return "\n".join(lines)


def _out_of_memory(error: Exception) -> bool:
    words = str(error).lower()
    return isinstance(error, DoesNotFit) or "out of memory" in words or "exhausted" in words


def measure(
    competitors: dict[str, dict[str, Part]],
    policy: Policy,
    rounds: int,
    peak: float | None = None,
) -> list[PolicySpeed]:
    """Measures the parts of each implementation in turns.

    Args:
        competitors: Name of an implementation -> its parts.
        policy: Gives the batch size and the operations.
        rounds: Turns of each; in a turn every part is repeated for half a second, at least once.
        peak: Of a device in FLOP/s, where it is not a device of JAX.
    """
    measurements = {
        (name, part): partial(_turn, found)
        for name, parts in competitors.items()
        for part, found in parts.items()
    }
    taken = take_turns(measurements, rounds)
    flops, peak = part_flops(policy), peak or peak_flops(jax.devices()[0])
    answers = []
    for name, parts in competitors.items():
        latencies = {
            part: _latency([*chain(*taken[name, part])], flops.get(part), peak, policy)
            for part in parts
        }
        rate = policy.batch_size / latencies["query"].p50 * 1e3
        answers.append(PolicySpeed(name, latencies, rate, parts["query"].run(None)))
    return answers


def _turn(part: Part) -> list[tuple[float, float]]:
    """Wall and processor seconds of every repetition after the first one."""
    part.run(part.before())
    times, start = [], time.perf_counter()
    while not times or time.perf_counter() - start < TURN_SECONDS:
        argument = part.before()
        cpu, wall = time.process_time(), time.perf_counter()
        part.run(argument)
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
        del argument
    return times


def _latency(
    times: list[tuple[float, float]], flops: float | None, peak: float | None, policy: Policy
) -> Latency:
    wall, cpu = np.asarray(times).T * 1e3
    p50, p95 = np.percentile(wall, (50, 95)).tolist()
    batch = flops * policy.batch_size if flops else None
    mfu = batch / (p50 / 1e3) / (peak * policy.mesh.size) if batch and peak else None
    tflop = batch / 1e12 if batch else None
    return Latency(p50, p95, float(cpu.mean()), tflop, mfu, len(times))
