import jax
import pytest
from jax.sharding import AxisType

from mvjax.parallel import MESH_AXES, abstract_mesh, make_mesh
from mvjax.pods.topology import pod_size

COUNT = len(jax.devices())


def test_rest_goes_to_the_open_axis_and_types_are_auto():
    mesh = make_mesh({"data": 1, "fsdp": -1})
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 1, "fsdp": COUNT, "context": 1, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 4


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"data": 3 * COUNT}, f"there are {COUNT} devices"),
        ({"data": -1, "tensor": 3 * COUNT}, "divisor"),
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
