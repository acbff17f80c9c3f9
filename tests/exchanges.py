"""Every kind of exchange, on eight devices, and what is read from the compiled text."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mvjax.pods.collectives import collectives
from mvjax.pods.hlo import HLO

mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def local(w):  # [8, 32] of [64, 32]
    def body(x, _):
        whole = jax.lax.all_gather(x, "b", tiled=True)
        return jax.lax.psum_scatter(jnp.sin(whole), "b", tiled=True), None

    w, _ = jax.lax.scan(body, w, length=5)
    w = jax.lax.ppermute(w, "a", [(0, 1), (1, 0)])
    w = jax.lax.all_to_all(w, "b", 0, 1, tiled=True)
    return jax.lax.psum(w, ("a", "b"))


f = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(("a", "b")), out_specs=P()))
text = f.lower(jax.ShapeDtypeStruct((64, 32), "float32")).compile().as_text()
for c in collectives(HLO(text), 8):
    print(c.kind, c.across_slices, c.count, c.sent_bytes)
