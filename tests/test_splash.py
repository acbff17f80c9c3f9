"""Attention on TPUs, interpreted: it equals the plain layers, on one device and on eight."""

import dataclasses
import functools
import re

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvjax.models import splash as splash_module
from mvjax.models.attention import attend, splash_on_shards
from mvjax.models.layers import RMSNorm
from mvjax.models.norm_rope import HEAD_DIM, block_rows, norm_rope, rotation_tables
from mvjax.models.presets import VIDEO_DITS, video_network
from mvjax.models.rope import rope_table, rotate
from mvjax.models.splash import LANES, fit_block, fit_keys, splash
from mvjax.parallel import make_mesh, make_rules, use_rules

pytestmark = pytest.mark.usefixtures("quickly")
GRID = (4, 4, 16)  # 256 tokens
ROPE = rope_table(GRID, HEAD_DIM, (1.0, 3.0, 3.0))


def drawn(*shape, dtype="float32", scale=1.0):
    values = np.random.default_rng(len(shape) + shape[-1]).standard_normal(shape)
    return jnp.asarray(scale * values, dtype)


def ready(x, scale, rope):
    """What `norm_rope` computes, by the layers: [b, l, heads, 128]."""
    norm = RMSNorm(HEAD_DIM)
    norm.scale[...] = scale
    y = norm(x.reshape(*x.shape[:2], -1, HEAD_DIM))
    return y if rope is None else rotate(y, *rope)


def layers(q, k, v, q_scale, k_scale, rope):
    """What `splash_on_shards` computes, by the layers."""
    values = v.reshape(*v.shape[:2], -1, HEAD_DIM)
    y = attend(ready(q, q_scale, rope), ready(k, k_scale, rope), values, "xla")
    return y.reshape(q.shape)


def result_and_gradients(f, arguments, gradient):
    def both(*arguments):
        y, pullback = jax.vjp(f, *arguments)
        return y, *pullback(gradient)

    return jax.jit(both)(*arguments)


def assert_close(ours, theirs, bound):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b), i


def projected(keys=256, queries=256, heads=2, dtype="float32"):
    """q, k, v as projected, both scales, and a gradient of the result."""
    width = heads * HEAD_DIM
    q, k, v = (drawn(2, n, width, dtype=dtype) for n in (queries, keys, keys))
    scales = (1 + drawn(HEAD_DIM, scale=0.3), 1 - drawn(HEAD_DIM, scale=0.2))
    return (q, jnp.flip(k, 1), jnp.flip(v, 2), *scales), drawn(2, queries, width, dtype=dtype)


def kernels(rope):
    def interpreted(q, k, v, q_scale, k_scale):
        scales, ropes = (q_scale, k_scale), rope and [rope]
        return splash_on_shards([q], [k], [v], scales, ropes, interpret=True)[0]

    return interpreted


def streams(lengths, heads=2):
    """As `projected`, of several streams: lists of q, k, v, both scales; gradients; ropes."""
    several = [projected(n, n, heads) for n in lengths]
    q, k, v, *_ = (list(xs) for xs in zip(*(arguments for arguments, _ in several)))
    grids = [(n // 8, 2, 4) for n in lengths]
    ropes = [rope_table(grid, HEAD_DIM, (1.0, 3.0, 3.0)) for grid in grids]
    return (q, k, v, *several[0][0][3:]), [gradient for _, gradient in several], ropes


# Of a video's observed frames, of those after them and of a view: the present reads the present.
OBSERVED_FIRST = [[[0], [2]], [[0, 1], [2]], [[0], [2]]]


def joined_layers(ropes, reads=None):
    """What the kernels compute of streams, by the layers: of the keys that each reads, joined."""

    def plain(q, k, v, q_scale, k_scale):
        queries = [ready(x, q_scale, rope) for x, rope in zip(q, ropes[-len(q) :])]
        keys = [ready(x, k_scale, rope) for x, rope in zip(k, ropes)]
        values = [x.reshape(key.shape) for x, key in zip(v, keys)]

        def one(query, parts):
            read = [i for part in parts for i in part]
            own = (jnp.concatenate([xs[i] for i in read], 1) for xs in (keys, values))
            return attend(query, *own, "xla").reshape(*query.shape[:2], -1)

        return [one(*both) for both in zip(queries, reads or [[range(len(k))]] * len(q))]

    return plain


def of_streams(ropes, reads=None):
    def interpreted(q, k, v, q_scale, k_scale):
        scales = q_scale, k_scale
        return splash_on_shards(q, k, v, scales, ropes, reads=reads, interpret=True)

    return interpreted


def main():
    """On eight devices (a program of its own, because their number is fixed at the start)."""
    rope = rope_table((16, 4, 16), HEAD_DIM, (1.0, 3.0, 3.0))
    everywhere, long, heads = dict(fsdp=2, context=2, tensor=2), dict(context=8), dict(context=4)
    for keys, turned, count, meshes in (
        (1024, rope, 2, (everywhere, long)),  # keys and values are gathered
        (1024, rope, 4, (dict(fsdp=2) | heads,)),  # heads are exchanged for the whole sequence
        (256, None, 4, (long, dict(tensor=2) | heads)),  # a text is whole everywhere
    ):
        arguments, gradient = projected(keys, queries=1024, heads=count)
        plain = functools.partial(layers, rope=turned)
        expected = result_and_gradients(plain, arguments, gradient)
        for mesh in meshes:
            with jax.set_mesh(make_mesh(mesh)), use_rules(make_rules()):
                ours = result_and_gradients(kernels(turned), arguments, gradient)
            assert_close(ours, expected, 1e-5)
    for lengths, count, mesh, reads in (
        ((576, 544), 4, dict(fsdp=2) | heads, None),  # exchanged with the video's
        ((576, 544, 40), 2, everywhere, None),  # gathered; a short view is whole everywhere
        ((544, 576, 576), 4, dict(fsdp=2) | heads, OBSERVED_FIRST),
        ((544, 576, 40), 2, everywhere, OBSERVED_FIRST),
    ):
        arguments, gradient, ropes = streams(lengths, count)
        expected = result_and_gradients(joined_layers(ropes, reads), arguments, gradient)
        with jax.set_mesh(make_mesh(mesh)), use_rules(make_rules()):
            ours = result_and_gradients(of_streams(ropes, reads), arguments, gradient)
        assert_close(*map(jax.tree.leaves, (ours, expected)), 1e-5)


def test_on_eight_devices_as_the_layers_on_one():
    said = forked.run("test_splash", devices=8)
    assert said.code == 0, said.err


@pytest.mark.parametrize("rope", [None, ROPE], ids=["still", "rotated"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_norm_rope_equals_the_layers(rope, dtype, bound):
    """In bfloat16, the result to one rounding; gradients are rounded at other places."""
    (x, _, _, scale, _), _ = projected(heads=3, dtype=dtype)
    tables = None if rope is None else rotation_tables(*rope)

    def theirs(x, scale):
        wide = ready(x, scale, rope).astype("float32") * 0.5
        return wide.astype(dtype).swapaxes(1, 2)

    gradient = drawn(2, 3, 256, HEAD_DIM, dtype=dtype)
    ours = result_and_gradients(
        lambda x, scale: norm_rope(x, scale, tables, 0.5, True), (x, scale), gradient
    )
    assert_close(ours, result_and_gradients(theirs, (x, scale), gradient), bound)


@pytest.mark.parametrize(("keys", "rope"), [(256, ROPE), (384, None)], ids=["self", "cross"])
def test_the_kernels_equal_the_layers(keys, rope):
    arguments, gradient = projected(keys)
    ours = result_and_gradients(kernels(rope), arguments, gradient)
    theirs = result_and_gradients(lambda *a: layers(*a, rope), arguments, gradient)
    assert_close(ours, theirs, 1e-5)


def test_every_stream_reads_the_keys_of_all():
    """A view of 40 tokens, which are no block of rows."""
    arguments, gradient, ropes = streams((256, 40))
    ours = result_and_gradients(of_streams(ropes), arguments, gradient)
    theirs = result_and_gradients(joined_layers(ropes), arguments, gradient)
    assert_close(*map(jax.tree.leaves, (ours, theirs)), 1e-5)


def test_the_present_reads_the_present_and_may_be_known_already():
    """Keys of streams that ask nothing themselves come first, as when a video is denoised."""
    (q, k, v, *scales), gradient, ropes = streams((128, 256, 40))
    arguments = q, k, v, *scales
    ours = result_and_gradients(of_streams(ropes, OBSERVED_FIRST), arguments, gradient)
    theirs = result_and_gradients(joined_layers(ropes, OBSERVED_FIRST), arguments, gradient)
    assert_close(*map(jax.tree.leaves, (ours, theirs)), 1e-5)
    order = 0, 2, 1
    k, v, ropes = ([xs[i] for i in order] for xs in (k, v, ropes))
    (known,) = of_streams(ropes, [[[0, 2], [1]]])(q[1:2], k, v, *scales)
    np.testing.assert_allclose(known, ours[0][1], atol=1e-5)


@pytest.mark.parametrize("kind", ["TPU v5", "TPU v5 lite", "TPU v6 lite"])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_every_generation_computes_the_same(kind, samples, monkeypatch):
    """Block sizes differ, and how samples and heads are shared between two TensorCores."""
    q, k, v = (jnp.tile(drawn(1, 2, n, 128), (samples, 1, 1, 1)) for n in (256, 384, 384))
    theirs = [x.swapaxes(1, 2) for x in (q * 128**0.5, k, v)]
    monkeypatch.setattr(splash_module, "device_kind", lambda: kind)
    ours = result_and_gradients(lambda *a: splash(*a, interpret=True), (q, k, v), q)
    expected = attend(*theirs, "xla").swapaxes(1, 2)
    assert_close(ours[:1], [expected], 1e-5)


@pytest.mark.parametrize(
    ("length", "rows"),
    [(19_200, 1280), (9600, 1200), (2400, 1200), (512, 512), (100, 0), (1296, 432)],
)
def test_rows_of_a_block_divide_the_length_or_there_is_no_kernel(length, rows):
    assert block_rows(length) == rows


@pytest.mark.parametrize(
    ("length", "blocks", "padded"),
    [(19_200, 3840, 19_200), (512, 512, 512), (2400, 2560, 2560), (73_200, 3200, 73_600)],
)
def test_blocks_of_keys_have_large_parts(length, blocks, padded):
    """73,200 keys are 22 blocks of 3,328 almost exactly, but those have parts of 256 at most."""
    assert fit_keys(length, 3840, 640) == (blocks, padded)


@pytest.mark.parametrize("target", [640, 1280, 1920, 3840])
@pytest.mark.parametrize("length", [1, 16, 512, 2400, 4800, 9600, 19_200, 37_440, 84_480])
def test_blocks_are_multiples_of_128_and_hold_the_length(length, target):
    block, padded = fit_block(length, target)
    assert block % LANES == padded % block == 0 and block <= target
    assert length <= padded <= max(LANES, 1.07 * length)
    if length % 640 == 0:
        assert padded == length


def lowered_for_tpus(remat, **changes):
    """Names of the Pallas kernels in a gradient step of the video DiT, as lowered for TPUs."""
    config = dataclasses.replace(
        VIDEO_DITS["tiny"], precision="bfloat16", remat=remat, attention="splash", **changes
    )
    network = video_network(config)
    latents = jax.ShapeDtypeStruct((1, 1, 64, 64, 16), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 512, config.text_dim), jnp.float32)

    def loss(params, latents, text):
        velocity = network.bind(params)(latents, jnp.ones((1, 1)), text, jnp.zeros((1, 1)))
        return jnp.mean((velocity - latents) ** 2)

    traced = jax.jit(jax.grad(loss)).trace(network.abstract, latents, text)
    lowered = traced.lower(lowering_platforms=("tpu",)).as_text()
    return re.findall(r'kernel_name = "(?:splash_mha_)?(\w+)"', lowered)


HEADS_OF_128 = dict(width=256, num_heads=2)


@pytest.mark.parametrize("changes", [{}, HEADS_OF_128], ids=["small heads", "heads of 128"])
@pytest.mark.parametrize(("remat", "passes"), [("none", 2), ("attention", 3), ("full", 4)])
def test_the_forward_kernel_of_the_video_runs_twice_only_under_full(remat, passes, changes):
    """Of two forward kernels, the video's is kept by "attention" and the text's is not."""
    names = [n for n in lowered_for_tpus(remat, **changes) if not n.startswith("norm_rope")]
    assert names.count("fwd_residuals") == passes
    assert len(names) == passes + 2, names


def test_queries_and_keys_are_made_ready_by_one_kernel_each():
    """Of both attentions; under "dots" the backward pass makes them ready again."""
    names = lowered_for_tpus("dots", **HEADS_OF_128)
    assert names.count("norm_rope_fwd") == 8 and names.count("norm_rope_bwd") == 4
    assert not any("norm_rope" in name for name in lowered_for_tpus("dots"))


if __name__ == "__main__":
    main()
