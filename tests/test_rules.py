import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from mvjax.parallel import (
    MESH_AXES,
    constrain,
    make_mesh,
    make_rules,
    sharding_tree,
    spec,
    use_rules,
)

# A pod that does not exist: shardings are decided without devices.
POD = AbstractMesh((2, 8, 4, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 4)


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
