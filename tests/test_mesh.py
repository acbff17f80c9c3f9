import jax
import pytest
from jax.sharding import AxisType

from mvjax.parallel.mesh import MESH_AXES, make_mesh

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
