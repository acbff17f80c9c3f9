"""The attention kernels agree with each other, on one device and on eight."""

import dataclasses
import functools

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvjax.models.attention import (
    attend,
    attend_streams,
    check_context,
    choose_kernel,
    on_shards,
    xla,
)
from mvjax.models.presets import VIDEO_DITS
from mvjax.models.splash import splash_length_first
from mvjax.parallel import make_mesh, make_rules, use_rules

pytestmark = pytest.mark.usefixtures("quickly")
interpreted = functools.partial(
    splash_length_first, interpret=True
)  # the TPU's kernel, without a TPU


def arrays(samples, queries, keys, heads, head_dim, dtype="float32"):
    """Queries, keys, values, and a gradient of the result."""
    rng, scales = np.random.default_rng(0), (2, 2, 1, 1)
    shapes = [(samples, n, heads, head_dim) for n in (queries, keys, keys, queries)]
    drawn = [scale * rng.standard_normal(shape) for scale, shape in zip(scales, shapes)]
    return [x.astype(jnp.dtype(dtype)) for x in drawn]


def result_and_gradients(kernel, *arguments):
    def both(q, k, v, dy):
        y, pullback = jax.vjp(kernel, q, k, v)
        return y, *pullback(dy)

    return jax.jit(both)(*arguments)


def assert_close(ours, theirs, bound):
    for name, a, b in zip(("y", "dq", "dk", "dv"), ours, theirs, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b), name


def sharded_attention(kernel, arguments, **mesh):
    """The result and gradients, computed on a mesh."""
    with jax.set_mesh(make_mesh(mesh)), use_rules(make_rules()):
        return result_and_gradients(kernel, *arguments)


def as_one(q, k, v):
    """Streams as one sequence, by XLA."""
    y = xla(*(jnp.concatenate(xs, 1) for xs in (q, k, v)))
    return jnp.split(y, np.cumsum([x.shape[1] for x in q])[:-1], axis=1)


def main():
    """On eight devices (a program of its own, because their number is fixed at the start)."""
    short, odd = arrays(2, 144, 144, 2, 16), arrays(2, 40, 27, 2, 16)
    everywhere, long = dict(fsdp=2, context=2, tensor=2), dict(context=8)
    shards_of_xla, shards_of_splash = (
        lambda *arguments, kernel=kernel: on_shards(kernel, *([x] for x in arguments))[0]
        for kernel in (xla, interpreted)
    )
    for arguments, cases in (
        (short, ((attend, everywhere), (shards_of_xla, everywhere), (shards_of_splash, long))),
        (odd, ((attend, long), (shards_of_xla, long))),  # 27 keys cannot be split
    ):
        expected = result_and_gradients(xla, *arguments)
        for kernel, mesh in cases:
            assert_close(sharded_attention(kernel, arguments, **mesh), expected, 1e-5)
    # Streams: the keys of all, of which 27 stay whole.
    streams = [list(xs) for xs in zip(short[:3], arrays(2, 27, 27, 2, 16)[:3])]
    gradient = [x * 0.5 for x in streams[0]]
    expected = result_and_gradients(as_one, *streams, gradient)
    for kernel in (attend_streams, functools.partial(on_shards, xla)):
        ours = sharded_attention(kernel, (*streams, gradient), **everywhere)
        for number in range(2):
            assert_close(*([x[number] for x in both] for both in (ours, expected)), 1e-5)
    with jax.set_mesh(make_mesh(dict(context=8))):
        check_context(19_200)
        check_context(20)  # so short that it may stay whole
        with pytest.raises(ValueError, match=r"2052 tokens .* context=8 .* \(1, 2, 3, 4, 6, 9,"):
            check_context(2052)


def test_on_eight_devices_as_on_one():
    said = forked.run("test_attention", devices=8)
    assert said.code == 0, said.err


def test_splash_equals_xla_in_bfloat16():
    arguments = arrays(1, 256, 384, 2, 128, "bfloat16")
    ours = result_and_gradients(interpreted, *arguments)
    wide = [x.astype("float32") for x in arguments]
    assert_close(ours, result_and_gradients(xla, *wide), 2e-2)


def test_splash_pads_lengths_and_heads():
    arguments = arrays(2, 100, 150, 1, 24)
    ours = result_and_gradients(interpreted, *arguments)
    assert_close(ours, result_and_gradients(xla, *arguments), 1e-4)


def shaped(length, dtype="bfloat16", head_dim=128):
    return jax.ShapeDtypeStruct((1, length, 2, head_dim), jnp.dtype(dtype))


def abstract_mesh(kind, platform):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    axis = (jax.sharding.AxisType.Auto,)
    return jax.sharding.AbstractMesh((4,), ("data",), axis, abstract_device=device)


@pytest.mark.parametrize(
    ("platform", "q", "keys", "kernel"),
    [
        ("tpu", shaped(19_200), 19_200, "splash"),
        ("tpu", shaped(19_200), 512, "splash"),
        ("tpu", shaped(16), 19_200, "xla"),
        ("tpu", shaped(19_200, "float32", 32), 19_200, "splash"),
        ("gpu", shaped(19_200), 19_200, "cudnn"),
        ("gpu", shaped(19_200, "float32"), 19_200, "xla"),
        ("gpu", shaped(19_200, head_dim=36), 19_200, "xla"),
        ("cpu", shaped(19_200), 19_200, "xla"),
    ],
)
def test_auto_asks_what_is_compiled_for_not_what_is_here(platform, q, keys, kernel):
    with jax.sharding.use_abstract_mesh(abstract_mesh("any", platform)):
        assert choose_kernel("auto", q, keys) == kernel


def test_impossible_kernels_are_a_sentence():
    with pytest.raises(ValueError, match="attention must be one of auto, xla, cudnn, splash"):
        dataclasses.replace(VIDEO_DITS["tiny"], attention="flash")
    with pytest.raises(ValueError, match=r"'cudnn' needs precision 'bfloat16', got .*float32"):
        attend(*arrays(1, 8, 8, 1, 8)[:3], "cudnn")


if __name__ == "__main__":
    main()
