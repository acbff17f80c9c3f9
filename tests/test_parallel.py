"""The device mesh and the sharding rules."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from mvjax.parallel import (
    MESH_AXES,
    abstract_mesh,
    constrain,
    make_mesh,
    make_rules,
    sharding_tree,
    spec,
    use_rules,
)
from mvjax.pods.topology import pod_size

# A pod that does not exist: shardings are decided without devices.
POD = AbstractMesh((2, 8, 4, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
COUNT = len(jax.devices())


def test_rest_goes_to_the_open_axis_and_types_are_auto():
    mesh = make_mesh({"data": 1, "fsdp": -1})
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 1, "fsdp": COUNT, "context": 1, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 4


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"data": 3 * COUNT}, f"not the number of devices, {COUNT};"),
        ({"data": -1, "tensor": 3 * COUNT}, "does not divide the number of devices"),
        ({"data": -1, "fsdp": -1}, "at most one"),
        ({"data": 0}, "positive"),
        ({"model": 1}, "unknown axis 'model'"),
    ],
)
def test_sizes_that_do_not_fit_are_explained(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes)
    with pytest.raises(ValueError, match=message):
        abstract_mesh(sizes, COUNT)


def test_a_mesh_without_devices_is_shaped_like_a_real_one():
    ours, real = abstract_mesh({"fsdp": -1}, COUNT), make_mesh({"fsdp": -1})
    assert (ours.shape, ours.axis_types) == (real.shape, real.axis_types)
    assert dict(abstract_mesh({"data": 8, "fsdp": -1}, 4096).shape)["fsdp"] == 512


@pytest.mark.parametrize(
    ("topology", "slices", "devices", "name"),
    [
        ("v5e:2x4", 1, 8, "TPU v5e"),
        ("v5p:8x8x8", 8, 4096, "TPU v5p"),
        ("v6e:16x16", 4, 1024, "TPU v6e"),
        ("v4:2x2x1", 1, 4, "TPU v4"),
        ("tpu7x:2x2x1", 1, 8, "TPU7x core"),  # two devices per chip
    ],
)
def test_the_size_of_a_pod_needs_no_compiler(topology, slices, devices, name):
    count, kind = pod_size(topology, slices)
    assert (count, kind.name) == (devices, name)


def test_a_mesh_axis_is_used_once_by_the_leftmost_dimension():
    rules = make_rules()
    assert spec(("batch", "length", "embed"), rules) == PartitionSpec(
        ("data", "fsdp"), "context", None
    )
    assert spec(("layers", "embed", "mlp"), rules) == PartitionSpec(None, "fsdp", "tensor")
    assert spec((None, "heads"), rules) == PartitionSpec(None, "tensor")


def test_overrides_replace_single_entries():
    rules = make_rules({"embed": None, "text": "tensor", "mlp": ["fsdp", "tensor"]})
    assert spec(("embed", "mlp"), rules) == PartitionSpec(None, ("fsdp", "tensor"))
    assert spec(("text",), rules) == PartitionSpec("tensor")
    with pytest.raises(ValueError, match="'model'"):
        make_rules({"embed": "model"})


def test_unknown_logical_axis_is_named():
    with pytest.raises(ValueError, match="'emebd' is not in the sharding rules"):
        spec(("emebd",), make_rules())


def test_parameter_that_does_not_divide_is_an_error_naming_it():
    shapes = {"block": {"kernel": jax.ShapeDtypeStruct((12, 64), jnp.float32)}}
    axes = {"block": {"kernel": ("embed", "mlp")}}
    with pytest.raises(ValueError, match=r"block/kernel .*'embed' of 12 .* = 8 devices"):
        sharding_tree(axes, POD, make_rules(), shapes)
    tree = sharding_tree(axes, POD, make_rules({"embed": None}), shapes)
    assert tree["block"]["kernel"].spec == PartitionSpec(None, "tensor")


def test_axes_must_have_the_structure_and_rank_of_the_parameters():
    shapes = {"kernel": jax.ShapeDtypeStruct((16, 64), jnp.float32)}
    with pytest.raises(ValueError, match="bias"):
        sharding_tree({"bias": ("embed",)}, POD, make_rules(), shapes)
    with pytest.raises(ValueError, match="kernel has shape"):
        sharding_tree({"kernel": ("embed",)}, POD, make_rules(), shapes)


def test_constrain_without_rules_or_mesh_is_the_identity():
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", "length") is x
    with use_rules(make_rules()):
        assert constrain(x, "batch", "length") is x


def test_constrain_inside_a_mesh_keeps_values_and_checks_rank():
    with jax.set_mesh(make_mesh({"data": -1})), use_rules(make_rules()):
        x = jnp.arange(3.0)  # three samples: no mesh of several devices divides them evenly
        assert jnp.array_equal(jax.jit(lambda x: constrain(x, "batch"))(x), x)
        with pytest.raises(ValueError, match="shape"):
            constrain(x, "batch", "length")
